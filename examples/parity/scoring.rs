//! Cases of lm-evaluation-harness: figures, answers and prompts of tasks over local documents, and over a suite's
//! steps.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use pricket::hub::{Hub, Settings};
use pricket::lm::{Documents, EvalOptions, Metric, Outcome, Task};
use pricket::{Loader, Pricket};
use serde_json::Value;

use super::{Check, Setup, read_json, read_lines};

/// Returns a tolerance of a case, or `otherwise` if the case does not give it.
fn allowed(case: &Value, key: &str, otherwise: f64) -> f64 {
    case["tolerance"][key].as_f64().unwrap_or(otherwise)
}

/// Compares the results of one model on tasks, with and without few-shot examples.
pub(crate) fn tasks(dir: &Path, case: &Value, setup: &Setup, check: &mut Check) -> Result<()> {
    let directory = dir.join("model");
    let loader = if directory.is_dir() {
        Loader::new(&directory)
    } else {
        Loader::new(dir.join(case["files"]["model"].as_str().context("the case names no model")?))
            .tokenizer(dir.join(case["files"]["tokenizer"].as_str().unwrap_or("tokenizer.json")))
    };
    let model = setup.of(loader).load()?;
    let results = read_json(&dir.join("results.json"))?;
    if results["results"].is_object() {
        return figures(&model, dir, case, 0, &results["results"], Some(&results["loglikelihoods_per_doc"]), check);
    }
    let mut seen = 0;
    for (name, expected) in results.as_object().context("results.json: expected an object")? {
        let Some(shots) = name.strip_suffix("-shot").and_then(|n| n.parse().ok()) else { continue };
        seen += 1;
        figures(&model, dir, case, shots, expected, None, check)?;
    }
    ensure!(seen > 0, "results.json has no results");
    Ok(())
}

/// Compares the results of every revision of a repository in a local cache.
pub(crate) fn suite(dir: &Path, case: &Value, setup: &Setup, check: &mut Check) -> Result<()> {
    let mut settings = Settings::new("http://localhost", dir.join("cache"));
    settings.offline = true;
    let hub = Hub::new(settings);
    let repo = case["repo_id"].as_str().context("the case names no repository")?;
    for (revision, expected) in
        read_json(&dir.join("curve.json"))?.as_object().context("curve.json: expected an object")?
    {
        let loader = Loader::new(format!("{repo}@{revision}")).hub(hub.clone());
        let model = setup.of(loader).load().with_context(|| revision.clone())?;
        figures(&model, dir, case, 0, expected, None, check).with_context(|| revision.clone())?;
    }
    Ok(())
}

/// Evaluates the tasks of `expected` and compares metrics, samples and log-likelihoods.
#[allow(clippy::too_many_arguments, reason = "the model, the settings and the expected values")]
fn figures(
    model: &Pricket,
    dir: &Path,
    case: &Value,
    shots: usize,
    expected: &Value,
    sums: Option<&Value>,
    check: &mut Check,
) -> Result<()> {
    let samples = dir.join(format!("samples_{shots}-shot.jsonl"));
    let samples = if samples.is_file() { read_lines(&samples)? } else { Vec::new() };
    for (name, expected) in expected.as_object().context("results: expected an object")? {
        let task = Task::named(name)?;
        let file = |split: &str| dir.join("data").join(format!("{name}.{split}.jsonl"));
        let documents = Documents::open(file(task.split()))?;
        let examples = match task.examples_split().map(file).filter(|path| shots > 0 && path.is_file()) {
            Some(path) => Documents::open(path)?.collect::<Result<Vec<_>, _>>()?,
            None => Documents::open(file(task.split()))?.collect::<Result<Vec<_>, _>>()?,
        };
        let bootstrap = case["bootstrap_iters"].as_u64().unwrap_or(0) as usize;
        let mut options = EvalOptions { shots: Some(shots), bootstrap, samples: true, ..EvalOptions::default() };
        options.score.max_length = case["max_length"].as_u64().map(|n| n as usize);
        // lm-evaluation-harness does not limit max_length to the trained length.
        options.score.beyond_trained_length = true;
        let found = model.evaluate(&task, documents, &examples, &options)?;
        compare(case, name, expected, &found, check);
        let of_task: Vec<&Value> = samples.iter().filter(|sample| sample["task"] == **name).collect();
        if !of_task.is_empty() {
            check.equal(&format!("{name}: documents"), &found.samples.len(), &of_task.len());
            for (expected, found) in of_task.iter().zip(&found.samples) {
                answers(case, expected, found, check)?;
            }
        }
        if let Some(sums) = sums.map(|sums| &sums[name]).and_then(Value::as_array) {
            for (expected, found) in sums.iter().zip(&found.samples) {
                let expected = expected.as_array().context("log-likelihoods: expected a list")?;
                // A text that is read in windows has one expected sum for all of them.
                let found: Vec<f64> = if expected.len() == found.answers.len() {
                    found.answers.iter().map(|answer| answer.sum).collect()
                } else {
                    vec![found.answers.iter().map(|answer| answer.sum).sum()]
                };
                for (expected, found) in expected.iter().zip(found) {
                    let off = (expected.as_f64().context("log-likelihood: expected a number")? - found).abs();
                    check.within(&format!("{name}: log-likelihood"), off, allowed(case, "loglikelihood_abs", 1e-3));
                }
            }
        }
    }
    Ok(())
}

/// Compares the metrics and standard errors of a task.
fn compare(case: &Value, name: &str, expected: &Value, found: &Outcome, check: &mut Check) {
    if let Some(count) = expected["sample_len"].as_u64() {
        check.equal(&format!("{name}: documents"), &found.documents, &(count as usize));
    }
    for figure in &found.figures {
        let metric = figure.metric.name();
        let Some(value) = expected[metric].as_f64() else { continue };
        let what = format!("{name} {metric}");
        if figure.metric.higher_is_better() {
            check.within(&what, (figure.value - value).abs(), allowed(case, "acc", 0.0));
        } else {
            check.within(&what, (figure.value / value - 1.0).abs(), allowed(case, "perplexity_rel", 1e-4));
        }
        if let Some(stderr) = expected[format!("{metric}_stderr")].as_f64() {
            // The bootstrap of a perplexity depends on the likelihoods of a few documents, so its tolerance is
            // relative.
            let (off, within) = if figure.metric == Metric::Perplexity {
                ((figure.stderr.unwrap_or(f64::NAN) / stderr - 1.0).abs(), 1e-3)
            } else {
                ((figure.stderr.unwrap_or(f64::NAN) - stderr).abs(), allowed(case, "stderr_mean_abs", 1e-6))
            };
            check.within(&format!("{what} stderr"), off, within);
        }
    }
}

/// Compares the prompts of a document byte for byte, the answers, and the scores.
fn answers(case: &Value, expected: &Value, found: &pricket::lm::Sample, check: &mut Check) -> Result<()> {
    let task = expected["task"].as_str().unwrap_or_default();
    check.equal(&format!("{task}: target"), &found.target, &expected["target"]);
    let requests = match expected["requests"].as_array() {
        Some(requests) => requests.clone(),
        None => vec![expected.clone()],
    };
    let rolling = requests.iter().all(|request| request["continuation"].is_null());
    if rolling {
        let sum: f64 = found.answers.iter().map(|answer| answer.sum).sum();
        let expected = requests[0]["loglikelihood"].as_f64().context("a sample has no log-likelihood")?;
        let allowed = allowed(case, "rolling_loglikelihood_abs", 5e-3);
        check.within(&format!("{task}: log-likelihood"), (sum - expected).abs(), allowed);
        return Ok(());
    }
    check.equal(&format!("{task}: requests"), &found.requests.len(), &requests.len());
    for ((request, (context, continuation)), answer) in requests.iter().zip(&found.requests).zip(&found.answers) {
        let given = if request["context"].is_null() { &expected["context"] } else { &request["context"] };
        check.equal(&format!("{task}: context"), &Some(context.as_str()), &given.as_str());
        check.equal(&format!("{task}: continuation"), &Some(continuation.as_str()), &request["continuation"].as_str());
        let sum = request["loglikelihood"].as_f64().context("a sample has no log-likelihood")?;
        let allowed = allowed(case, "loglikelihood_abs", 1e-3);
        check.within(&format!("{task}: log-likelihood"), (answer.sum - sum).abs(), allowed);
        check.equal(&format!("{task}: is_greedy"), &Some(answer.is_greedy), &request["is_greedy"].as_bool());
        if let Some(tokens) = request["continuation_tokens"].as_u64() {
            check.equal(&format!("{task}: tokens"), &answer.tokens, &(tokens as usize));
        }
    }
    for (metric, score) in &found.scores {
        if let Some(value) = expected[metric.name()].as_f64().filter(|_| metric.higher_is_better()) {
            check.equal(&format!("{task}: {}", metric.name()), score, &value);
        }
    }
    Ok(())
}
