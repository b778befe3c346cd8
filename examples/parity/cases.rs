//! The kinds of golden cases. The files of a case decide its kind, never its name.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use pricket::candle::{DType, Device, IndexOp, Tensor};
use pricket::lm::Tokenizer;
use pricket::lm::{loss, token_logprobs};
use pricket::loading::Precision;
use pricket::nn::RowOrder;
use pricket::nn::State;
use pricket::{Context, GenerateOptions, Loader, Pricket, SamplingParams, Site, Taps};
use serde_json::{Value, json};

#[path = "batch.rs"]
mod batch;
#[cfg(feature = "train")]
#[path = "four_bit.rs"]
mod four_bit;
#[path = "scoring.rs"]
mod scoring;
#[cfg(feature = "train")]
#[path = "training.rs"]
mod training;

use batch::Batch;

/// Device and precision of the cases.
pub(crate) struct Setup {
    pub(crate) device: Device,
    pub(crate) precision: Precision,
}

impl Setup {
    /// Applies device and precision to a loader.
    fn of(&self, loader: Loader) -> Loader {
        loader.device(self.device.clone()).precision(self.precision)
    }

    /// Returns the tolerance of logits in bf16 or f16, which replaces that of the case. `None` in f32.
    ///
    /// It applies to the root mean square of the differences, divided by the standard deviation of the logits. A
    /// value in bf16 has a relative error of at most 2⁻⁸, one in f16 of at most 2⁻¹¹. A dozen roundings per layer add
    /// up.
    fn bound(&self) -> Option<f64> {
        match self.precision {
            Precision::BF16 => Some(0.03),
            Precision::F16 => Some(0.005),
            _ => None,
        }
    }
}

/// The result of a case.
pub(crate) struct Outcome {
    pub(crate) case: String,
    pub(crate) ok: bool,
    /// Largest absolute difference of each compared quantity.
    pub(crate) max_abs: BTreeMap<String, f64>,
    pub(crate) tolerance: Value,
    pub(crate) error: Option<String>,
}

impl Outcome {
    pub(crate) fn to_json(&self) -> Value {
        let mut line = json!({"case": self.case, "ok": self.ok, "max_abs": self.max_abs, "tolerance": self.tolerance});
        if let Some(error) = &self.error {
            line["error"] = json!(error);
        }
        line
    }
}

/// Runs the case in `dir`. A case of an unknown kind fails.
pub(crate) fn run(dir: &Path, setup: &Setup) -> Outcome {
    let case = read_json(&dir.join("case.json"));
    let name = dir.file_name().map_or_else(|| dir.display().to_string(), |n| n.to_string_lossy().into_owned());
    let tolerance = case.as_ref().map_or(Value::Null, |case| case["tolerance"].clone());
    let mut check = Check { bound: setup.bound(), ..Check::default() };
    let result = case.and_then(|case| compare(dir, &case, setup, &mut check));
    let error = result.err().map(|e| format!("{e:#}")).or_else(|| check.failures.first().cloned());
    Outcome { case: name, ok: error.is_none(), max_abs: check.max_abs, tolerance, error }
}

fn compare(dir: &Path, case: &Value, setup: &Setup, check: &mut Check) -> Result<()> {
    let has = |file: &str| dir.join(file).is_file();
    let is_model = (has("config.json") || case["model_file"].is_string()) && has("expected.safetensors");
    let of_logits = case["files"]["model"].is_string() || is_model;
    ensure!(of_logits || check.bound.is_none(), "--dtype: this case has no logits and can be compared in f32 only");
    #[cfg(feature = "train")]
    if let Some(result) = four_bit::run(dir, case, setup, check) {
        return result;
    }
    #[cfg(feature = "train")]
    if let Some(result) = training::run(dir, case, setup, check) {
        return result;
    }
    #[cfg(feature = "train")]
    if has("adapter_config.json") && has("expected.safetensors") {
        return training::adapter(dir, &base(dir, case)?, case, setup, check);
    }
    if has("generate.safetensors") {
        generate(dir, case, setup, check)?;
        if has("processors.safetensors") {
            processors(dir, case, check)?;
        }
        return Ok(());
    }
    if has("grads.safetensors") {
        return train(dir, case, setup, check);
    }
    if has("results.json") {
        return scoring::tasks(dir, case, setup, check);
    }
    if has("curve.json") {
        return scoring::suite(dir, case, setup, check);
    }
    if has("encode.jsonl") {
        return tokenizer(dir, check);
    }
    if let Some(file) = case["files"]["model"].as_str() {
        let file = dir.join(file);
        return if case["expect"]["error"] == true {
            refused(&file, case)
        } else {
            container(&file, case, setup, check)
        };
    }
    if is_model {
        return model(dir, case, setup, check);
    }
    bail!("unknown kind of case; this version may be too old for it")
}

/// Collects differences and compares them with tolerances.
#[derive(Default)]
struct Check {
    /// [`Setup::bound`].
    bound: Option<f64>,
    max_abs: BTreeMap<String, f64>,
    failures: Vec<String>,
}

impl Check {
    /// Records a difference. NaN exceeds every tolerance.
    fn within(&mut self, what: &str, difference: f64, tolerance: f64) {
        let difference = if difference.is_nan() { f64::INFINITY } else { difference };
        let worst = self.max_abs.entry(what.into()).or_insert(0.0);
        *worst = worst.max(difference);
        if difference > tolerance {
            self.failures.push(format!("{what} differs by {difference:e}, allowed {tolerance:e}"));
        }
    }

    /// Records a failure if two values differ.
    fn equal<T: PartialEq + std::fmt::Debug>(&mut self, what: &str, found: &T, expected: &T) {
        if found != expected {
            self.failures.push(format!("{what}: expected {expected:?}, found {found:?}"));
        }
    }
}

fn read_json(path: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    serde_json::from_str(&text).with_context(|| path.display().to_string())
}

fn read_lines(path: &Path) -> Result<Vec<Value>> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    text.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
}

fn read_tensors(path: &Path) -> Result<HashMap<String, Tensor>> {
    pricket::candle::safetensors::load(path, &Device::Cpu).with_context(|| path.display().to_string())
}

fn get<'a>(tensors: &'a HashMap<String, Tensor>, name: &str) -> Result<&'a Tensor> {
    tensors.get(name).with_context(|| format!("the case holds no tensor {name}"))
}

fn ids(tensor: &Tensor) -> Result<Vec<Vec<u32>>> {
    Ok(tensor.to_dtype(DType::U32)?.to_vec2()?)
}

fn tolerance(case: &Value, key: &str) -> Result<f64> {
    case["tolerance"][key].as_f64().with_context(|| format!("case.json gives no tolerance {key}"))
}

fn flat(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.to_dtype(DType::F32)?.flatten_all()?.to_device(&Device::Cpu)?.to_vec1()?)
}

/// Returns the largest absolute difference of two `[b, t, ..]` tensors, ignoring padding.
fn difference(found: &Tensor, expected: &Tensor, padding: &[usize]) -> Result<f64> {
    ensure!(found.dims() == expected.dims(), "shape {:?}, expected {:?}", found.dims(), expected.dims());
    let mut worst = 0f64;
    for (row, &pad) in padding.iter().enumerate() {
        let t = found.dim(1)?;
        let (a, b) = (found.i(row)?.narrow(0, pad, t - pad)?, expected.i(row)?.narrow(0, pad, t - pad)?);
        for (a, b) in flat(&a)?.iter().zip(&flat(&b)?) {
            let d = f64::from((a - b).abs());
            worst = if d.is_nan() { f64::INFINITY } else { worst.max(d) };
        }
    }
    Ok(worst)
}

/// Returns the root mean square of the differences of two `[b, t, v]` tensors, divided by the standard deviation of
/// `expected`. Padding is ignored.
fn relative_difference(found: &Tensor, expected: &Tensor, padding: &[usize]) -> Result<f64> {
    ensure!(found.dims() == expected.dims(), "shape {:?}, expected {:?}", found.dims(), expected.dims());
    let (mut squares, mut sum, mut sum_of_squares, mut count) = (0f64, 0f64, 0f64, 0f64);
    for (row, &pad) in padding.iter().enumerate() {
        let t = found.dim(1)?;
        let (a, b) = (found.i(row)?.narrow(0, pad, t - pad)?, expected.i(row)?.narrow(0, pad, t - pad)?);
        for (a, b) in flat(&a)?.iter().zip(&flat(&b)?) {
            let b = f64::from(*b);
            squares += (f64::from(*a) - b).powi(2);
            (sum, sum_of_squares, count) = (sum + b, sum_of_squares + b * b, count + 1.0);
        }
    }
    let variance = sum_of_squares / count - (sum / count).powi(2);
    Ok((squares / count / variance).sqrt())
}

/// Returns the number of padding positions on the left of each row.
fn left_padding(expected: &HashMap<String, Tensor>, batch: usize) -> Result<Vec<usize>> {
    let Some(mask) = expected.get("attention_mask") else { return Ok(vec![0; batch]) };
    let count = |row: Vec<u32>| {
        let pad = row.iter().take_while(|&&m| m == 0).count();
        ensure!(
            row[pad..].iter().all(|&m| m == 1),
            "attention_mask has zeros after the first one; expected left padding"
        );
        Ok(pad)
    };
    ids(mask)?.into_iter().map(count).collect()
}

/// Compares logits, hidden states, log-probabilities, and logits computed with a state.
fn model(dir: &Path, case: &Value, setup: &Setup, check: &mut Check) -> Result<()> {
    let pricket = setup.of(Loader::new(model_in(dir, case))).load()?;
    let expected = read_tensors(&dir.join("expected.safetensors"))?;
    let model = pricket.model();
    let input = get(&expected, "input_ids")?.to_dtype(DType::U32)?;
    let (batch, time) = input.dims2()?;
    let batch = Batch { ids: input.to_device(&setup.device)?, padding: left_padding(&expected, batch)?, time };
    let padding = batch.padding.clone();
    let (logits_atol, hidden_atol) = (tolerance(case, "logits_atol")?, tolerance(case, "hidden_atol")?);
    if let Some(bound) = check.bound {
        let logits = batch.logits(&*model, &[time], &mut Context::new())?;
        let found = relative_difference(&logits, get(&expected, "logits")?, &padding)?;
        check.within("relative_logits", found, bound);
        return Ok(());
    }
    if let Some(count) = case["param_count"].as_u64() {
        check.equal("param_count", &model.info().parameters, &count);
    }

    let taps = Taps::new().record(Site::Embed).record(Site::ResidPost);
    let mut ctx = Context::new().with_taps(taps);
    let final_norm = batch.read(&*model, (0, time), &mut ctx)?;
    let final_norm = batch.laid_out(final_norm.into_iter().map(|row| row.into_iter().collect()).collect())?;
    let logits = model.head(&final_norm)?;
    ensure!(logits.device().same_device(&setup.device), "the logits are on another device than --device");
    check.within("logits", difference(&logits, get(&expected, "logits")?, &padding)?, logits_atol);

    let recording = ctx.take_recording();
    let at_positions = |x: &Tensor| -> Result<Tensor> {
        let x = x.to_device(&Device::Cpu)?;
        Ok(match expected.get("hidden_positions") {
            Some(positions) => x.index_select(positions, 1)?,
            None => x,
        })
    };
    let kept =
        |x: Tensor| if expected.contains_key("hidden_positions") { vec![0; x.dims()[0]] } else { padding.clone() };
    let found = at_positions(&final_norm)?;
    check.within("final_norm", difference(&found, get(&expected, "final_norm")?, &kept(found.clone()))?, hidden_atol);
    let hidden = get(&expected, "hidden")?;
    check.equal("hidden layers", &hidden.dim(0)?, &(model.info().layers + 1));
    for layer in 0..hidden.dim(0)? {
        let found = if layer == 0 { recording.get(Site::Embed, 0) } else { recording.get(Site::ResidPost, layer - 1) };
        let found = at_positions(&batch.recorded(found.context("no hidden state was recorded")?)?)?;
        check.within("hidden", difference(&found, &hidden.i(layer)?, &kept(found.clone()))?, hidden_atol);
    }

    let nll = get(&expected, "nll")?.to_vec2::<f32>()?;
    for ((row, pad), nll) in ids(&input)?.iter().zip(&padding).zip(&nll) {
        for (scored, nll) in token_logprobs(&*model, &row[*pad..])?.iter().zip(&nll[*pad..]) {
            check.within("nll", f64::from((scored.logprob + nll).abs()), tolerance(case, "nll_atol")?);
        }
    }

    // The same logits with a state: in the chunks of the case, then one token at a time.
    let splits = expected.get("split").map(|split| -> Result<Vec<usize>> {
        Ok(split.to_dtype(DType::U32)?.to_vec1::<u32>()?.into_iter().map(|n| n as usize).collect())
    });
    for (what, split) in [("split_logits", splits.transpose()?), ("stepped_logits", Some(vec![1; time]))] {
        let Some(split) = split else { continue };
        ensure!(split.iter().sum::<usize>() == time, "the split {split:?} does not add up to {time}");
        let mut ctx = Context::new().with_state(State::new());
        let logits = batch.logits(&*model, &split, &mut ctx)?;
        check.within(what, difference(&logits, get(&expected, "logits")?, &padding)?, logits_atol);
        recurrence("state", &ctx, &expected, case, check)?;
        if split.len() > 1 {
            let mut ctx = Context::new().with_state(State::new());
            batch.read(&*model, (0, split[0]), &mut ctx)?;
            if what == "split_logits" {
                recurrence("state_after_first_chunk", &ctx, &expected, case, check)?;
            }
        }
    }
    Ok(())
}

/// Compares the state of a recurrent model, if the case has one: the last inputs of both token shifts, and the sums of
/// the recurrence. The sums are compared independently of their scale.
fn recurrence(
    what: &str,
    ctx: &Context,
    expected: &HashMap<String, Tensor>,
    case: &Value,
    check: &mut Check,
) -> Result<()> {
    let part = |name: &str| expected.get(&format!("{what}.{name}"));
    let (Some(time), Some(channel)) = (part("att_x"), part("ffn_x")) else { return Ok(()) };
    let (Some(num), Some(den), Some(max)) = (part("att_num"), part("att_den"), part("att_max")) else {
        bail!("the case has att_x and ffn_x of the state, but not att_num, att_den and att_max");
    };
    let (state, atol) = (ctx.state().context("no state")?, tolerance(case, "state_atol")?);
    let (layers, rows, _) = time.dims3()?;
    for (layer, row) in (0..layers).flat_map(|layer| (0..rows).map(move |row| (layer, row))) {
        let kept = |name| state.recurrent(row, layer, name).with_context(|| format!("the state keeps no {name}"));
        let worst = |found: &Tensor, expected: &Tensor| -> Result<f64> {
            let (found, expected) = (flat(found)?, flat(expected)?);
            ensure!(found.len() == expected.len(), "{} values, expected {}", found.len(), expected.len());
            Ok(found.iter().zip(&expected).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max))
        };
        for (name, expected) in [("time shift", time), ("channel shift", channel)] {
            check.within(what, worst(kept(name)?, &expected.i((layer, row))?)?, atol);
        }
        let own = kept("wkv")?;
        let [num, den, max] = [num, den, max].map(|x| x.i((layer, row)));
        let (num, den, max) = (num?, den?, max?);
        check.within(what, worst(&(own.i(0)? / own.i(1)?)?, &(num / &den)?)?, atol);
        check.within(what, worst(&(own.i(1)?.log()? + own.i(2)?)?, &(den.log()? + max)?)?, atol);
    }
    Ok(())
}

/// Checks that a file is rejected with an error that mentions the cause.
fn refused(file: &Path, case: &Value) -> Result<()> {
    let error = match Loader::new(file).load() {
        Ok(_) => bail!("{} was loaded", file.display()),
        Err(e) => e.to_string(),
    };
    let words = case["expect"]["message_should_mention_any_of"].as_array().cloned().unwrap_or_default();
    let mentioned =
        |word: &Value| word.as_str().is_some_and(|word| error.to_lowercase().contains(&word.to_lowercase()));
    ensure!(words.is_empty() || words.iter().any(mentioned), "{error:?} mentions none of {words:?}");
    Ok(())
}

/// Compares a file with weights, configuration and tokenizer: its tensors, then its logits.
fn container(file: &Path, case: &Value, setup: &Setup, check: &mut Check) -> Result<()> {
    let expected = match case["files"]["expected"].as_str() {
        Some(name) => read_tensors(&file.with_file_name(name))?,
        None => HashMap::new(),
    };
    let store = pricket::loading::open_weights(file)?;
    for entry in case["tensors"].as_array().into_iter().flatten() {
        let name = entry["name"].as_str().context("a tensor without a name")?;
        let found = pricket::weights::read_tensor(&*store, name, &Device::Cpu)?.to_dtype(DType::F32)?;
        let shape: Vec<usize> = serde_json::from_value(entry["shape"].clone())?;
        check.equal(&format!("shape of {name}"), &found.dims(), &&shape[..]);
        let found = flat(&found)?;
        if let Some(expected) = expected.get(name) {
            let worst = found.iter().zip(flat(expected)?).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max);
            check.within("tensors", worst, tolerance(case, "tensors_abs")?);
        } else if let Some(hash) = entry["dequantised_sha256"].as_str() {
            let bytes: Vec<u8> = found.iter().flat_map(|x| x.to_le_bytes()).collect();
            check.equal(&format!("hash of {name}"), &sha256(&bytes).as_str(), &hash);
        }
    }

    let pricket = setup.of(Loader::new(file)).load()?;
    for vector in case["tokenizer_vectors"]["vectors"].as_array().into_iter().flatten() {
        let text = vector["text"].as_str().context("a text")?;
        let wanted: Vec<u32> = serde_json::from_value(vector["ids"].clone())?;
        check.equal(&format!("ids of {text:?}"), &pricket.tokenizer()?.encode(text)?, &wanted);
    }
    let input = get(&expected, "__input_ids__")?.to_dtype(DType::U32)?.flatten_all()?.to_vec1::<u32>()?;
    let logits = file_logits(&pricket, &input, &setup.device, input.len())?;
    let stepped = file_logits(&pricket, &input, &setup.device, 1)?;
    let logits_abs = tolerance(case, "logits_abs")?;
    for (what, found) in [("logits", &logits), ("stepped_logits", &stepped)] {
        let (all, last8) = (expected.get("__logits__"), expected.get("__logits_last8__"));
        let expected = all.or(last8).context("the case holds no logits")?;
        let kept = expected.dim(0)?;
        let found = found.narrow(0, input.len() - kept, kept)?.unsqueeze(0)?;
        if let Some(bound) = check.bound {
            check.within("relative_logits", relative_difference(&found, &expected.unsqueeze(0)?, &[0])?, bound);
            continue;
        }
        check.within(what, difference(&found, &expected.unsqueeze(0)?, &[0])?, logits_abs);
    }
    if check.bound.is_some() {
        return Ok(());
    }
    if let Some(expected) = expected.get("__logits_tanh_gelu_last__") {
        let pricket = setup.of(Loader::new(file)).activation_function("gelu_tanh").load()?;
        let last = file_logits(&pricket, &input, &setup.device, input.len())?.narrow(0, input.len() - 1, 1)?;
        let found = difference(&last.unsqueeze(0)?, &expected.reshape((1, 1, ()))?, &[0])?;
        check.within("tanh_logits", found, tolerance(case, "logits_tanh_abs").unwrap_or(logits_abs));
    }
    if let Some(text) = case["text_for_loss"].as_str() {
        check.equal("ids of the text", &pricket.encode(text)?, &input[1..].to_vec());
        let scored = token_logprobs(&*pricket.model(), &input)?;
        let nll = -scored.iter().map(|token| f64::from(token.logprob)).sum::<f64>() / scored.len() as f64;
        let expected = case["mean_nll_right_order"].as_f64().context("mean_nll_right_order")?;
        check.within("mean_nll", (nll - expected).abs(), tolerance(case, "mean_nll_abs")?);
    }
    Ok(())
}

/// Returns the logits of all positions, computed in chunks of `chunk` tokens.
fn file_logits(pricket: &Pricket, ids: &[u32], device: &Device, chunk: usize) -> Result<Tensor> {
    let model = pricket.model();
    let mut ctx = Context::new().with_state(State::new());
    let parts = ids.chunks(chunk).map(|ids| {
        let ids = Tensor::new(ids, device)?.unsqueeze(0)?;
        Ok(model.head(&model.hidden(&ids, &mut ctx)?)?.i(0)?)
    });
    Ok(Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)?)
}

fn sha256(bytes: &[u8]) -> String {
    pricket::hub::Digest::Sha256(String::new()).of(bytes).hex().to_owned()
}

/// Returns the path of a case's model: its `model_file`, or its directory.
fn model_in(dir: &Path, case: &Value) -> std::path::PathBuf {
    case["model_file"].as_str().map_or(dir.to_owned(), |file| dir.join(file))
}

/// Returns the path of the model in the `base_case` of a case that has no weights.
fn base(dir: &Path, case: &Value) -> Result<std::path::PathBuf> {
    let name = case["base_case"].as_str().context("case.json names no base_case")?;
    let base = dir.parent().context("the case has no parent directory")?.join(name);
    Ok(model_in(&base, &read_json(&base.join("case.json"))?))
}

/// Compares greedy continuations: all prompts in one batch, each prompt alone, and one up to an end token.
fn generate(dir: &Path, case: &Value, setup: &Setup, check: &mut Check) -> Result<()> {
    let pricket = setup.of(Loader::new(base(dir, case)?)).load()?;
    let expected = read_tensors(&dir.join("generate.safetensors"))?;
    let lens = get(&expected, "prompt_lens")?.to_dtype(DType::U32)?.to_vec1::<u32>()?;
    let padded = ids(get(&expected, "prompts_left_padded")?)?;
    let prompts: Vec<Vec<u32>> =
        padded.iter().zip(&lens).map(|(row, &len)| row[row.len() - len as usize..].to_vec()).collect();
    let continuations = ids(get(&expected, "continuations")?)?;
    let step_logits = get(&expected, "step_logits")?;
    let atol = tolerance(case, "step_logits_atol")?;
    let options = |eos| GenerateOptions { max_tokens: continuations[0].len(), stop_at_eos: eos, ..Default::default() };

    let (rows, logits) = run_greedy(&pricket, prompts.clone(), &options(false))?;
    check.equal("continuations", &rows, &continuations);
    if rows == continuations {
        for (row, steps) in logits.iter().enumerate() {
            for (step, logits) in steps.iter().enumerate() {
                let found = Tensor::new(logits.as_slice(), &Device::Cpu)?.reshape((1, 1, logits.len()))?;
                let reference = step_logits.i((row, step))?.reshape((1, 1, logits.len()))?;
                check.within("step_logits", difference(&found, &reference, &[0])?, atol);
            }
        }
    }
    for (prompt, continuation) in prompts.iter().zip(&continuations) {
        let (alone, _) = run_greedy(&pricket, vec![prompt.clone()], &options(false))?;
        check.equal("continuation alone", &alone[0], continuation);
    }

    let eos = &case["eos"];
    if !eos.is_null() {
        let id = eos["eos_token_id"].as_u64().context("eos_token_id")? as u32;
        let prompt = eos["prompt"].as_u64().context("prompt")? as usize;
        let wanted: Vec<u32> = serde_json::from_value(eos["expected"].clone())?;
        let options = GenerateOptions { max_tokens: continuations[0].len(), ..GenerateOptions::default() };
        let mut request = pricket::lm::Request::new(prompts[prompt].clone(), options);
        request.eos = vec![id];
        let mut generation = pricket::lm::Generation::new(pricket.model(), vec![request])?;
        let mut found = Vec::new();
        while let Some(tokens) = generation.step()? {
            found.extend(tokens.iter().map(|token| token.id));
        }
        check.equal("continuation to its end token", &found, &wanted);
    }
    Ok(())
}

/// The ids of each row, and the logits of each of its steps.
type Rows = (Vec<Vec<u32>>, Vec<Vec<Vec<f32>>>);

fn run_greedy(pricket: &Pricket, prompts: Vec<Vec<u32>>, options: &GenerateOptions) -> Result<Rows> {
    let mut rows = vec![Vec::new(); prompts.len()];
    let mut logits = vec![Vec::new(); prompts.len()];
    let mut generation = pricket.generation(prompts, options)?;
    while let Some(tokens) = generation.step()? {
        for (token, row) in tokens.iter().zip(generation.logits()) {
            rows[token.row].push(token.id);
            logits[token.row].push(row.clone());
        }
    }
    Ok((rows, logits))
}

fn sampling(settings: &Value) -> Result<SamplingParams> {
    let mut sampling = SamplingParams::unchanged();
    for (key, value) in settings.as_object().context("settings: expected an object")? {
        let number = || value.as_f64().map(|x| x as f32).with_context(|| format!("{key}: expected a number"));
        let count = || value.as_u64().map(|x| x as usize).with_context(|| format!("{key}: expected a count"));
        match key.as_str() {
            "temperature" => sampling.temperature = number()?,
            "top_k" => sampling.top_k = count()?,
            "top_p" => sampling.top_p = number()?,
            "min_p" => sampling.min_p = number()?,
            "typical_p" => sampling.typical_p = number()?,
            "repetition_penalty" => sampling.repetition_penalty = number()?,
            "no_repeat_ngram_size" => sampling.no_repeat_ngram_size = count()?,
            other => bail!("unknown logits processor {other}"),
        }
    }
    Ok(sampling)
}

/// Compares logits processors: the tokens they keep, the scores and the probabilities.
fn processors(dir: &Path, case: &Value, check: &mut Check) -> Result<()> {
    let tensors = read_tensors(&dir.join("processors.safetensors"))?;
    let (logits, context) = (get(&tensors, "in_logits")?.to_vec2::<f32>()?, ids(get(&tensors, "in_ids")?)?);
    let tolerance =
        |key: &str| case["processors"]["tolerance"][key].as_f64().with_context(|| format!("no tolerance {key}"));
    let (scores_atol, probs_atol) = (tolerance("scores_atol")?, tolerance("probs_atol")?);
    for setting in case["processors"]["settings"].as_array().context("no processor settings")? {
        let index = setting["index"].as_u64().context("index")?;
        let sampling = sampling(&setting["settings"])?;
        let scores = get(&tensors, &format!("s{index}.scores"))?.to_vec2::<f32>()?;
        let probs = get(&tensors, &format!("s{index}.probs"))?.to_vec2::<f32>()?;
        for (row, ((logits, context), (scores, probs))) in
            logits.iter().zip(&context).zip(scores.iter().zip(&probs)).enumerate()
        {
            let mut found = logits.clone();
            sampling.process(&mut found, context, context.len());
            let survivors = |x: &[f32]| x.iter().map(|x| *x > f32::NEG_INFINITY).collect::<Vec<_>>();
            check.equal(&format!("survivors of setting {index} row {row}"), &survivors(&found), &survivors(scores));
            for (a, b) in found.iter().zip(scores).filter(|(_, b)| **b > f32::NEG_INFINITY) {
                check.within("scores", f64::from((a - b).abs()), scores_atol);
            }
            let max = found.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f64 = found.iter().map(|&x| f64::from(x - max).exp()).sum();
            for (a, b) in found.iter().zip(probs) {
                check.within("probs", (f64::from(a - max).exp() / sum - f64::from(*b)).abs(), probs_atol);
            }
        }
    }
    Ok(())
}

/// Compares the loss of a batch and its gradients with respect to every parameter.
fn train(dir: &Path, case: &Value, setup: &Setup, check: &mut Check) -> Result<()> {
    let base = base(dir, case)?;
    let folder = if base.is_dir() { &*base } else { base.parent().context("the model has no parent directory")? };
    let prefix = read_json(&folder.join("case.json"))?["name_prefix"].as_str().unwrap_or("").to_owned();
    let pricket = setup.of(Loader::new(&base)).train().load()?;
    let expected = read_tensors(&dir.join("grads.safetensors"))?;
    let batch = get(&expected, "batch")?.to_dtype(DType::U32)?.to_device(&setup.device)?;
    let loss = loss(&*pricket.model(), &batch)?;
    let reference = case["loss"].as_f64().context("loss")?;
    check.within("loss", (f64::from(loss.to_scalar::<f32>()?) - reference).abs(), tolerance(case, "loss_atol")?);
    let grads = loss.backward()?;
    let wanted = expected.keys().filter(|name| name.starts_with("grad.")).count();
    check.equal("number of parameters", &pricket.parameters().len(), &wanted);
    for parameter in pricket.parameters() {
        let name = parameter.name.strip_prefix(prefix.trim_start_matches('-')).unwrap_or(&parameter.name);
        let reference = get(&expected, &format!("grad.{name}"))?;
        let grad = grads.get(&parameter.var).with_context(|| format!("{name} has no gradient"))?;
        let grad = RowOrder::undo(parameter.rows, &grad.to_device(&Device::Cpu)?)?;
        ensure!(grad.dims() == reference.dims(), "{name}: shape {:?}, expected {:?}", grad.dims(), reference.dims());
        let (found, reference) = (flat(&grad)?, flat(reference)?);
        let abs_max = reference.iter().fold(0f32, |max, x| max.max(x.abs()));
        let (mut distance, mut norm) = (0f64, 0f64);
        for (a, b) in found.iter().zip(&reference) {
            check.within("grad", f64::from((a - b).abs()), 1e-5 + 1e-3 * f64::from(abs_max));
            distance += f64::from(a - b).powi(2);
            norm += f64::from(*b).powi(2);
        }
        check.within("grad_relative_norm", (distance / norm).sqrt(), 1e-4);
    }
    Ok(())
}

/// Formats bytes as lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut out, byte| {
        let _ = write!(out, "{byte:02x}");
        out
    })
}

/// Compares a sentencepiece tokenizer with transformers' Llama tokenizer, in legacy and in non-legacy mode.
fn llama_tokenizer(model: &Path, vectors: &Path, check: &mut Check) -> Result<()> {
    if !vectors.is_file() {
        return Ok(());
    }
    for legacy in [true, false] {
        let folder = tempfile::tempdir()?;
        let copy = folder.path().join("tokenizer.model");
        std::fs::copy(model, &copy)?;
        std::fs::write(folder.path().join("tokenizer_config.json"), json!({"legacy": legacy}).to_string())?;
        let tokenizer = Tokenizer::from_file(copy)?;
        for line in read_lines(vectors)? {
            let text = line["text"].as_str().context("a text")?;
            let other = line["ids_non_legacy"].is_array() && !legacy;
            let wanted = serde_json::from_value(line[if other { "ids_non_legacy" } else { "ids_legacy" }].clone())?;
            check.equal(&format!("ids of {text:?}, legacy {legacy}"), &tokenizer.encode_from_start(text)?, &wanted);
        }
    }
    Ok(())
}

/// Compares a tokenizer: encoding, decoding, and streamed decoding.
fn tokenizer(dir: &Path, check: &mut Check) -> Result<()> {
    let mut files = std::fs::read_dir(dir)?.flatten().map(|entry| entry.path());
    let is_one = |path: &std::path::PathBuf| {
        ["tokenizer.json", "tokenizer.model"].iter().any(|name| path.to_string_lossy().ends_with(name))
    };
    let file = files.find(is_one).context("the case has neither a tokenizer.json nor a tokenizer.model")?;
    let tokenizer = if file.extension().is_some_and(|end| end == "model") {
        llama_tokenizer(&file, &dir.join("llama_tokenizer.jsonl"), check)?;
        Tokenizer::from_sentencepiece(&std::fs::read(&file)?, file.display().to_string())?
    } else {
        Tokenizer::from_file(file)?
    };
    let list = |value: &Value| -> Result<Vec<u32>> { Ok(serde_json::from_value(value.clone())?) };
    let text = |value: &Value| value.as_str().map(str::to_owned).context("expected a string");
    for line in read_lines(&dir.join("encode.jsonl"))? {
        let (input, wanted) = (text(&line["text"])?, list(&line["ids"])?);
        check.equal(&format!("ids of {input:?}"), &tokenizer.encode(&input)?, &wanted);
        let decoded = if line["decoded"].is_string() { text(&line["decoded"])? } else { input };
        check.equal("decoded ids", &tokenizer.decode(&wanted), &decoded);
    }
    for line in read_lines(&dir.join("decode.jsonl"))? {
        let (input, decoded) = (list(&line["ids"])?, text(&line["decoded"])?);
        check.equal("decoded", &tokenizer.decode(&input), &decoded);
        let bytes: Vec<u8> = input.iter().flat_map(|&id| tokenizer.token_bytes(id)).copied().collect();
        check.equal("bytes", &hex(&bytes), &text(&line["bytes_hex"])?);
        let mut decoder = tokenizer.decoder();
        let chunks: Vec<String> = input.iter().map(|&id| decoder.push(id)).collect();
        let flush = decoder.finish();
        check.equal("streamed", &(chunks.concat() + &flush), &decoded);
        // Pieces may end earlier than the reference's, but not later.
        if let Ok(wanted) = serde_json::from_value::<Vec<String>>(line["stream_chunks"].clone()) {
            let on_time = (1..=chunks.len()).all(|n| chunks[..n].concat().starts_with(&wanted[..n].concat()));
            check.equal("streamed on time", &on_time, &true);
        }
    }
    if dir.join("hf_cleanup.jsonl").is_file() {
        for line in read_lines(&dir.join("hf_cleanup.jsonl"))? {
            let input = list(&line["ids"])?;
            check.equal("decoded, raw", &tokenizer.decode(&input), &text(&line["decoded_raw"])?);
            check.equal("decoded, cleaned", &tokenizer.decode_cleaned(&input), &text(&line["decoded_clean_up"])?);
        }
    }
    Ok(())
}
