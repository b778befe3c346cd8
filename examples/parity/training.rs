//! Cases of training: optimizers, schedules, adapters, packed samples, and the loss of responses.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use pricket::candle::{DType, Tensor};
use pricket::nn::Parameter;
use pricket::nn::RowOrder;
use pricket::train::{
    Checkpointing, Decay, Gradients, Lora, Optimizer, OptimizerConfig, Record, Rule, Sample, Schedule, add_gradients,
    losses,
};
use pricket::{Context, Loader, Pricket};
use serde_json::Value;

use super::{Check, Setup, flat, get, read_json, read_lines, read_tensors, tolerance};

/// Runs a case of training. Returns `None` if the case is of another kind.
pub(super) fn run(dir: &Path, case: &Value, setup: &Setup, check: &mut Check) -> Option<Result<()>> {
    Some(match case["kind"].as_str()? {
        "optimizer-run" => optimizer_run(dir, case, setup, check),
        "schedules" => schedules(dir, case, check),
        "lora-train" => lora_train(dir, case, setup, check),
        "lora-two" => lora_two(dir, case, setup, check),
        "packing" => packing(dir, case, setup, check),
        "response-loss" => responses(dir, case, setup, check),
        _ => return None,
    })
}

fn loader(dir: &Path, case: &Value, setup: &Setup) -> Result<Loader> {
    let path = match (case["model"].as_str(), case["model"]["repository_path"].as_str()) {
        (Some(inside), _) => dir.join(inside),
        (None, Some(path)) => Path::new(env!("CARGO_MANIFEST_DIR")).join(path),
        (None, None) => bail!("case.json names no model"),
    };
    Ok(setup.of(Loader::new(path)))
}

fn number(value: &Value, key: &str) -> Result<f64> {
    value[key].as_f64().with_context(|| format!("case.json has no number {key}"))
}

/// Returns the largest absolute difference of two tensors, over the elements at which `ignore` is 0.
pub(super) fn distance(found: &Tensor, expected: &Tensor, ignore: Option<&Tensor>) -> Result<f64> {
    ensure!(found.dims() == expected.dims(), "shape {:?}, expected {:?}", found.dims(), expected.dims());
    let ignored = ignore.map(flat).transpose()?.unwrap_or_else(|| vec![0.0; found.elem_count()]);
    let pairs = flat(found)?.into_iter().zip(flat(expected)?).zip(ignored);
    Ok(pairs.filter(|(_, ignored)| *ignored == 0.0).fold(0.0, |worst, ((a, b), _)| {
        let d = f64::from((a - b).abs());
        if d.is_nan() { f64::INFINITY } else { worst.max(d) }
    }))
}

/// Reads a schedule with the arguments of transformers or composer.
fn schedule(json: &Value) -> Result<Schedule> {
    let steps = |key: &str| json[key].as_u64().unwrap_or(0);
    let name = json["name"].as_str().context("a schedule without a name")?;
    let (warmup, total) = (steps("warmup_steps"), steps("total_steps"));
    let mut schedule = Schedule::named(name, warmup, total)?;
    let kwargs = &json["kwargs"];
    let given = |key: &str, default: f64| kwargs[key].as_f64().unwrap_or(default);
    let rate = json["lr"].as_f64().unwrap_or(1e-3);
    schedule.decay = match schedule.decay {
        Decay::Cosine { cycles, min } => Decay::Cosine {
            cycles: given("num_cycles", cycles),
            min: given("min_lr_rate", given("min_lr", min * rate) / rate),
        },
        Decay::CosineRestarts { cycles } => Decay::CosineRestarts { cycles: given("num_cycles", cycles) },
        Decay::Polynomial { power, .. } => {
            Decay::Polynomial { power: given("power", power), end: given("lr_end", 1e-7) / rate }
        }
        Decay::WarmupStableDecay { decay_steps, min } => Decay::WarmupStableDecay {
            decay_steps: kwargs["num_decay_steps"].as_u64().unwrap_or(decay_steps),
            min: given("min_lr_ratio", min),
        },
        Decay::ComposerCosine { .. } => Decay::ComposerCosine { alpha_f: json["alpha_f"].as_f64().unwrap_or(0.0) },
        Decay::ComposerLinear { .. } => Decay::ComposerLinear { alpha_f: json["alpha_f"].as_f64().unwrap_or(0.0) },
        other => other,
    };
    Ok(schedule)
}

fn schedules(dir: &Path, case: &Value, check: &mut Check) -> Result<()> {
    let json = read_json(&dir.join("schedules.json"))?;
    let (rate, rtol) = (number(&json, "lr")?, tolerance(case, "lrs_rtol")?);
    for entry in json["schedules"].as_array().context("schedules.json has no schedules")? {
        let mut entry = entry.clone();
        entry["lr"] = rate.into();
        let schedule = schedule(&entry)?;
        for (step, expected) in entry["lrs"].as_array().into_iter().flatten().enumerate() {
            let expected = expected.as_f64().context("lrs: expected numbers")?;
            let found = schedule.at(step as u64) * rate;
            let allowed = rtol * expected.abs() + tolerance(case, "lrs_atol")?;
            check.within("lrs", (found - expected).abs() / allowed, 1.0);
        }
    }
    Ok(())
}

/// Creates samples from rows of ids and their labels, if there are any. Ids with label -100 are not counted.
fn samples(ids: &Tensor, labels: Option<&Tensor>) -> Result<Vec<Sample>> {
    let rows = ids.to_dtype(DType::U32)?.to_vec2::<u32>()?;
    let Some(labels) = labels else { return Ok(rows.into_iter().map(Sample::new).collect::<Result<_, _>>()?) };
    let labels = labels.to_vec2::<i64>()?;
    let sample = |(ids, labels): (Vec<u32>, Vec<i64>)| {
        let counts = labels.iter().map(|&label| label >= 0).collect();
        ensure!(
            labels.iter().zip(&ids).all(|(&label, &id)| label < 0 || label == i64::from(id)),
            "labels: expected -100 or the id"
        );
        Ok(Sample::masked(ids, counts)?)
    };
    rows.into_iter().zip(labels).map(sample).collect()
}

/// Compares the losses, gradient norms, learning rates and final weights of a training run of a whole model.
fn optimizer_run(dir: &Path, case: &Value, setup: &Setup, check: &mut Check) -> Result<()> {
    let pricket = loader(dir, case, setup)?.train().load()?;
    let expected = read_tensors(&dir.join("expected.safetensors"))?;
    let settings = &case["optimizer"];
    let lr = number(settings, "lr")?;
    let mut rule: Rule = settings["name"].as_str().context("an optimizer without a name")?.parse()?;
    if settings["decoupled_weight_decay"] == true {
        rule = Rule::DecoupledLion;
    }
    let groups = case["weight_decay_groups"].as_str().unwrap_or("all");
    let betas: (f64, f64) = serde_json::from_value(settings["betas"].clone())?;
    let config = OptimizerConfig {
        betas,
        eps: settings["eps"].as_f64().unwrap_or(1e-8),
        weight_decay: settings["weight_decay"].as_f64().unwrap_or(0.0),
        decay_vectors: !groups.contains("none: biases"),
        ..OptimizerConfig::new(rule, lr)
    };
    let mut of_schedule = case["schedule"].clone();
    of_schedule["lr"] = lr.into();
    let schedule = schedule(&of_schedule)?;
    let (model, parameters) = (pricket.model(), pricket.parameters());
    let mut optimizer = Optimizer::new(config, parameters)?;
    let (ids, labels) = (get(&expected, "input_ids")?, expected.get("labels"));
    let per_micro_batch = case["loss_normalisation"] == "micro_batches";
    for step in 0..ids.dim(0)? {
        let at = |tensor: &Tensor, i: usize| tensor.get(step)?.get(i);
        let parts = (0..ids.dim(1)?)
            .map(|i| samples(&at(ids, i)?, labels.map(|labels| at(labels, i)).transpose()?.as_ref()))
            .collect::<Result<Vec<_>>>()?;
        let counted = |part: &[Sample]| part.iter().map(Sample::counted).sum::<usize>() as f64;
        let all: f64 = parts.iter().map(|part| counted(part)).sum();
        let (mut sum, mut loss) = (Gradients::none(parameters), 0.0);
        for part in &parts {
            let weight = if per_micro_batch { 1.0 / counted(part) / parts.len() as f64 } else { 1.0 / all };
            let nll = add_gradients(&*model, part, weight, parameters, Checkpointing::PerBlock, &mut sum)?;
            loss += nll * weight;
        }
        let of = |name: &str| -> Result<f64> { Ok(get(&expected, name)?.to_vec1::<f64>()?[step]) };
        check.within("losses", (loss - of("losses")?).abs(), tolerance(case, "losses_atol")?);
        let norm = sum.clip(case["clip_norm"].as_f64())?;
        check.within("grad_norms", (norm / of("grad_norms")? - 1.0).abs(), tolerance(case, "grad_norms_rtol")?);
        let multiplier = schedule.at(step as u64);
        let wanted = of("lrs")?;
        check.within("lrs", (multiplier * lr - wanted).abs(), tolerance(case, "lrs_rtol")? * wanted.abs() + 1e-15);
        optimizer.step(parameters, &sum, multiplier)?;
    }
    for Parameter { name, var, rows } in parameters {
        let found = rows.undo(&var.as_tensor().detach())?;
        let ignore = expected.get(&format!("ignore.{name}"));
        let worst = distance(&found, get(&expected, &format!("final.{name}"))?, ignore)?;
        check.within("final", worst, tolerance(case, "final_atol")?);
    }
    let finals = expected.keys().filter(|name| name.starts_with("final.")).count();
    check.equal("number of parameters", &parameters.len(), &finals);
    Ok(())
}

/// Returns the logits of the case's `input_ids`.
pub(super) fn logits(pricket: &Pricket, expected: &HashMap<String, Tensor>) -> Result<Tensor> {
    let model = pricket.model();
    let ids = get(expected, "input_ids")?.to_dtype(DType::U32)?.to_device(&model.info().device)?;
    Ok(model.head(&model.hidden(&ids, &mut Context::new())?)?)
}

/// Compares the training of an adapter, and the logits of the trained and the merged model.
fn lora_train(dir: &Path, case: &Value, setup: &Setup, check: &mut Check) -> Result<()> {
    let pricket = loader(dir, case, setup)?.load()?;
    let (base, expected) = (pricket.base()?, read_tensors(&dir.join("expected.safetensors"))?);
    let atol = |key: &str| tolerance(case, key);
    check.within(
        "base_logits",
        distance(&logits(&pricket, &expected)?, get(&expected, "base_logits")?, None)?,
        atol("logits_atol")?,
    );

    let initial = Lora::read(dir.join(case["adapter"]["initial"].as_str().context("no initial adapter")?))?;
    let lora = train_steps(&initial, &pricket, &expected, &case["train"], &case["tolerance"], check)?;
    let directory = dir.join(case["adapter"]["final"].as_str().context("no final adapter")?);
    let reference = Lora::read(&directory)?;
    for (name, tensor) in reference.tensors() {
        let found = lora.tensors().remove(&name).with_context(|| format!("{name} was not trained"))?;
        check.within("final", distance(&found, &tensor, None)?, atol("final_atol")?);
    }

    // Every adapter of the case except `init` is the final adapter in another form.
    let mut directories: Vec<_> = std::fs::read_dir(dir)?.flatten().map(|entry| entry.path()).collect();
    directories.retain(|path| path.join("adapter_config.json").exists() && !path.ends_with("init"));
    let copy =
        std::env::temp_dir().join(format!("pricket-parity-{}-{:?}", std::process::id(), std::thread::current().id()));
    reference.write(&copy)?;
    directories.push(copy.clone());
    for directory in &directories {
        let adapted = pricket.with_adapter(&Lora::read(directory)?)?;
        let worst = distance(&logits(&adapted, &expected)?, get(&expected, "logits")?, None)?;
        check.within("logits", worst, atol("logits_atol")?);
    }
    std::fs::remove_dir_all(copy)?;

    let merged = pricket.with_model(reference.merge(&base)?, Vec::new());
    let worst = distance(&logits(&merged, &expected)?, get(&expected, "logits")?, None)?;
    check.within("merged_logits", worst, atol("logits_atol")?);
    let file = dir.join(case["model"].as_str().unwrap_or_default()).join("model.safetensors");
    let names = base.names();
    for (name, tensor) in read_tensors(&file)? {
        let found = reference.merged_weight(names, &name, &tensor.to_dtype(DType::F32)?, RowOrder::default())?;
        match (found, expected.get(&format!("merged.{name}"))) {
            (Some(found), Some(wanted)) => {
                check.within("merged", distance(&found, wanted, None)?, atol("merged_atol")?);
            }
            (found, wanted) => check.equal(&format!("{name} is merged"), &found.is_some(), &wanted.is_some()),
        }
    }
    Ok(())
}

/// Trains an adapter on the case's batch and compares each step. Returns the trained adapter.
pub(super) fn train_steps(
    initial: &Lora,
    pricket: &Pricket,
    expected: &HashMap<String, Tensor>,
    train: &Value,
    tolerance: &Value,
    check: &mut Check,
) -> Result<Lora> {
    let atol = |key: &str| number(tolerance, key);
    let tuned = initial.train(&pricket.base()?, 0)?;
    let config = OptimizerConfig {
        betas: serde_json::from_value(train["betas"].clone())?,
        eps: number(train, "eps")?,
        weight_decay: number(train, "weight_decay")?,
        ..OptimizerConfig::new(Rule::AdamW, number(train, "lr")?)
    };
    let mut optimizer = Optimizer::new(config, &tuned.parameters)?;
    let batch = samples(get(expected, "batch")?, None)?;
    let weight = 1.0 / batch.iter().map(Sample::counted).sum::<usize>() as f64;
    let wanted = get(expected, "losses")?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
    for (step, of_step) in wanted.iter().enumerate() {
        // Steps alternate between the two ways of computing gradients.
        let way = if step % 2 == 0 { Checkpointing::PerBlock } else { Checkpointing::Off };
        let mut sum = Gradients::none(&tuned.parameters);
        let loss = add_gradients(&*tuned.model, &batch, weight, &tuned.parameters, way, &mut sum)? * weight;
        check.within("losses", (loss - of_step).abs(), atol("losses_atol")?);
        if step == 0 {
            for (parameter, grad) in tuned.parameters.iter().zip(sum.of()) {
                let grad = grad.as_ref().with_context(|| format!("{} has no gradient", parameter.name))?;
                let reference = get(expected, &format!("grad1.{}", parameter.name))?;
                check.within("grad1", distance(&parameter.rows.undo(grad)?, reference, None)?, atol("grad1_atol")?);
            }
            let grads = expected.keys().filter(|name| name.starts_with("grad1.")).count();
            check.equal("number of gradients", &tuned.parameters.len(), &grads);
        }
        if step + 1 < wanted.len() {
            optimizer.step(&tuned.parameters, &sum, 1.0)?;
        }
    }
    Ok(initial.trained(&tuned.parameters)?)
}

/// Compares an adapter over the model of another case: its logits and, if the case has them, the steps of training.
pub(super) fn adapter(dir: &Path, base: &Path, case: &Value, setup: &Setup, check: &mut Check) -> Result<()> {
    let pricket = setup.of(Loader::new(base)).load()?;
    let expected = read_tensors(&dir.join("expected.safetensors"))?;
    let atol = tolerance(case, "logits_atol")?;
    check.within("base_logits", distance(&logits(&pricket, &expected)?, get(&expected, "base_logits")?, None)?, atol);
    let lora = Lora::read(dir)?;
    let found = logits(&pricket.with_adapter(&lora)?, &expected)?;
    check.within("logits", distance(&found, get(&expected, "logits")?, None)?, atol);
    let merged = pricket.with_model(lora.merge(&pricket.base()?)?, Vec::new());
    check.within("merged_logits", distance(&logits(&merged, &expected)?, get(&expected, "logits")?, None)?, atol);

    if !dir.join("train.safetensors").is_file() {
        return Ok(());
    }
    let steps = read_tensors(&dir.join("train.safetensors"))?;
    let of = |prefix: &str| -> std::collections::BTreeMap<String, Tensor> {
        steps
            .iter()
            .filter_map(|(name, tensor)| Some((name.strip_prefix(prefix)?.to_owned(), tensor.clone())))
            .collect()
    };
    let initial = Lora::from_tensors(lora.config().clone(), of("init."), "train.safetensors")?;
    let train = &case["train"];
    let trained = train_steps(&initial, &pricket, &steps, train, &train["tolerance"], check)?;
    let wanted = of("final.");
    check.equal("number of tensors", &trained.tensors().len(), &wanted.len());
    for (name, found) in trained.tensors() {
        let reference = wanted.get(&name).with_context(|| format!("{name} is not expected"))?;
        check.within("final", distance(&found, reference, None)?, number(&train["tolerance"], "final_atol")?);
    }
    Ok(())
}

/// Compares two adapters on one model: each alone, both together, and their combinations.
fn lora_two(dir: &Path, case: &Value, setup: &Setup, check: &mut Check) -> Result<()> {
    let pricket = loader(dir, case, setup)?.load()?;
    let expected = read_tensors(&dir.join("expected.safetensors"))?;
    let read = |name: &str| Lora::read(dir.join(case["adapters"][name].as_str().unwrap_or(name)));
    let (a, b) = (read("a")?, read("b")?);
    let weights: Vec<f64> = serde_json::from_value(case["weights"].clone())?;
    let parts = [(&a, weights[0]), (&b, weights[1])];
    let with = |adapter: &Lora| pricket.with_adapter(adapter);
    let models = [
        ("base_logits", pricket.clone()),
        ("logits_a", with(&a)?),
        ("logits_b", with(&b)?),
        ("logits_a_and_b", with(&a)?.with_adapter(&b)?),
        ("logits_cat", with(&Lora::cat(&parts)?)?),
        ("logits_delta_sum", with(&Lora::cat(&parts)?)?),
        ("logits_linear", with(&Lora::linear(&parts)?)?),
        ("logits_cat", with(&read("cat")?)?),
        ("logits_linear", with(&read("linear")?)?),
        // The base must be unchanged.
        ("base_logits", pricket),
    ];
    for (name, model) in models {
        let worst = distance(&logits(&model, &expected)?, get(&expected, name)?, None)?;
        check.within(name, worst, tolerance(case, "logits_atol")?);
    }
    Ok(())
}

/// Compares the losses and gradients of packed samples.
fn packing(dir: &Path, case: &Value, setup: &Setup, check: &mut Check) -> Result<()> {
    let pricket = loader(dir, case, setup)?.train().load()?;
    let expected = read_tensors(&dir.join("expected.safetensors"))?;
    let (model, parameters) = (pricket.model(), pricket.parameters());
    let count = get(&expected, "sample_tokens")?.dim(0)?;
    let of = |i: usize| {
        let part =
            |what: &str| get(&expected, &format!("sample.{i}.{what}"))?.unsqueeze(0).map_err(anyhow::Error::from);
        samples(&part("input_ids")?, Some(&part("labels")?))
    };
    let packed: Vec<Sample> = (0..count).map(of).collect::<Result<Vec<_>>>()?.into_iter().flatten().collect();
    let tokens: Vec<usize> = packed.iter().map(Sample::counted).collect();
    let wanted: Vec<usize> =
        get(&expected, "sample_tokens")?.to_vec1::<i64>()?.into_iter().map(|count| count as usize).collect();
    check.equal("sample_tokens", &tokens, &wanted);
    let sums = get(&expected, "sample_nll_sums")?.to_vec1::<f64>()?;
    for (found, wanted) in losses(&*model, &packed)?.iter().zip(&sums) {
        check.within("sample_nll", (found - wanted).abs(), tolerance(case, "sample_nll_atol")?);
    }
    let weight = 1.0 / tokens.iter().sum::<usize>() as f64;
    for way in [Checkpointing::Off, Checkpointing::PerBlock] {
        let mut sum = Gradients::none(parameters);
        let loss = add_gradients(&*model, &packed, weight, parameters, way, &mut sum)? * weight;
        check.within("loss", (loss - number(case, "loss")?).abs(), tolerance(case, "loss_atol")?);
        for (parameter, grad) in parameters.iter().zip(sum.of()) {
            let reference = get(&expected, &format!("grad.{}", parameter.name))?;
            let grad = grad.as_ref().with_context(|| format!("{} has no gradient", parameter.name))?;
            let largest = flat(reference)?.iter().fold(0f32, |max, x| max.max(x.abs()));
            let worst = distance(&parameter.rows.undo(grad)?, reference, None)?;
            check.within("grad", worst, 1e-5 + 1e-3 * f64::from(largest));
        }
    }
    Ok(())
}

/// Compares the prompts, ids, losses and gradients of training records.
fn responses(dir: &Path, case: &Value, setup: &Setup, check: &mut Check) -> Result<()> {
    let pricket = loader(dir, case, setup)?.train().load()?;
    let (model, parameters) = (pricket.model(), pricket.parameters());
    let records = read_lines(&dir.join("records.jsonl"))?;
    let lines = read_lines(&dir.join("samples.jsonl"))?;
    let end = case["eos_token_id"].as_u64().context("eos_token_id")? as u32;
    let mut all = Vec::new();
    for line in &lines {
        let format = pricket::text::prompt_format(line["format"].as_str().context("a sample without a format")?)?;
        let record =
            Record::from_json(&records[line["record"].as_u64().context("a sample without a record")? as usize])?;
        let prompt = record.prompt(&format)?;
        check.equal("prompt", &prompt.as_str(), &line["prompt"].as_str().unwrap_or_default());
        let sample = record.sample(Some(pricket.tokenizer()?), &format, &[end])?;
        let ids = |key: &str| serde_json::from_value::<Vec<u32>>(line[key].clone());
        check.equal("ids", &sample.ids(), &&[ids("prompt_ids")?, ids("response_ids")?].concat()[..]);
        check.equal("tokens", &(sample.counted() as u64), &line["tokens"].as_u64().unwrap_or(0));
        let nll = losses(&*model, std::slice::from_ref(&sample))?[0];
        let allowed = tolerance(case, "nll_sum_atol_per_token")? * sample.counted() as f64;
        check.within("nll_sum", (nll - number(line, "nll_sum")?).abs(), allowed);
        all.push(sample);
    }
    let counted: usize = all.iter().map(Sample::counted).sum();
    check.equal("counted_tokens", &(counted as u64), &case["counted_tokens"].as_u64().unwrap_or(0));
    let mut sum = Gradients::none(parameters);
    let weight = 1.0 / counted as f64;
    let loss = add_gradients(&*model, &all, weight, parameters, Checkpointing::PerBlock, &mut sum)? * weight;
    check.within("loss", (loss - number(case, "loss")?).abs(), tolerance(case, "loss_atol")?);
    let rtol = tolerance(case, "grad_norms_rtol")?;
    for (parameter, grad) in parameters.iter().zip(sum.of()) {
        let grad = grad.as_ref().with_context(|| format!("{} has no gradient", parameter.name))?;
        let norm = grad.sqr()?.sum_all()?.to_scalar::<f32>()?.sqrt();
        let wanted = number(&case["grad_norms"], &parameter.name)?;
        check.within("grad_norms", (f64::from(norm) / wanted - 1.0).abs(), rtol);
    }
    check.within("grad_global_norm", (sum.norm()? / number(case, "grad_global_norm")? - 1.0).abs(), rtol);
    Ok(())
}
