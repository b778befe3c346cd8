//! Sweeps over training: resumed, in shares, with what fails in them.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use pricket::lm::Task;
use pricket::{Measure, Shard, Steps, Sweep, hub};
use serde_json::{Value, json};

use crate::common::{example, root};

/// The rows of a file, without what differs from run to run, sorted.
fn rows(path: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(path).unwrap();
    assert!(text.ends_with('\n') || text.is_empty());
    let mut rows: Vec<String> = text
        .lines()
        .map(|line| {
            let mut row: Value = serde_json::from_str(line).unwrap();
            row.as_object_mut().unwrap().remove("seconds");
            row.to_string()
        })
        .collect();
    rows.sort();
    rows
}

fn tiny(out: &Path) -> Sweep {
    let models = vec![pricket::checkpoints(root().join("models/tiny").to_str().unwrap()).unwrap()];
    let text = Measure::Text { name: "text".into(), text: "In the year of our Lord the Congress met.".into() };
    Sweep::new(models, Steps::all(), vec![text], out)
}

#[test]
fn shares_add_up_and_nothing_is_measured_twice() {
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole.jsonl");
    let swept = tiny(&whole).run(|_| ()).unwrap();
    assert_eq!((swept.checkpoints, swept.rows, swept.kept, swept.recomputed), (12, 24, 0, 0));
    assert!(swept.failed.is_empty());
    let mut parts = String::new();
    for i in 0..3 {
        let part = dir.path().join(format!("{i}.jsonl"));
        let share = Sweep { shard: format!("{i}/3").parse().unwrap(), prefetch: i == 1, ..tiny(&part) };
        assert_eq!(share.run(|_| ()).unwrap().checkpoints, 4);
        parts += &std::fs::read_to_string(part).unwrap();
    }
    let joined = dir.path().join("joined.jsonl");
    std::fs::write(&joined, parts).unwrap();
    assert_eq!(rows(&joined), rows(&whole));
    let again = tiny(&joined).run(|_| panic!("it is all there")).unwrap();
    assert_eq!((again.rows, again.kept), (0, 24));
    // Another measure is added beside it; the same one of another text is not taken for it.
    let other = Measure::Text { name: "text".into(), text: "In the year of our Lord the Congress met!".into() };
    let added = Sweep { measures: vec![other], steps: "final".parse().unwrap(), ..tiny(&joined) };
    assert_eq!(added.run(|_| ()).unwrap().rows, 2);
}

/// Killed at twenty moments, a sweep ends with the rows of one that was left alone; what is measured again is what was being
/// written.
#[test]
fn a_sweep_that_is_killed_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let (alone, killed) = (dir.path().join("alone.jsonl"), dir.path().join("killed.jsonl"));
    let command = |out: &Path| {
        let mut command = example("sweep");
        command.args(["--json", "--threads", "1", "--out"]).arg(out);
        command
    };
    let start = Instant::now();
    let output = command(&alone).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let (took, mut state, mut kills) = (start.elapsed(), 12345u64, 0);
    while kills < 20 {
        if rows_or_torn(&killed) == rows(&alone).len() {
            // Done before all kills: from the beginning, with a line that was torn.
            std::fs::write(&killed, "{\"model\": \"torn").unwrap();
        }
        let mut child =
            command(&killed).stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn().unwrap();
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let moment = took.mul_f64((state >> 40) as f64 / f64::from(1 << 24)).max(Duration::from_millis(1));
        let waited = Instant::now();
        while waited.elapsed() < moment && child.try_wait().unwrap().is_none() {
            std::thread::yield_now();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        kills += 1;
    }
    let output = command(&killed).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(rows(&killed), rows(&alone));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let summary: Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
    assert!(summary["recomputed"].as_u64().unwrap() <= 2, "{summary}");
}

/// Lines of a file that a process was killed over.
fn rows_or_torn(path: &Path) -> usize {
    std::fs::read_to_string(path).map_or(0, |text| text.lines().count())
}

/// What is left of a measure goes before the measure is made again.
#[test]
fn half_a_measure_is_none() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.jsonl");
    let sweep = Sweep { steps: "0,1".parse().unwrap(), ..tiny(&out) };
    sweep.run(|_| ()).unwrap();
    let (text, expected) = (std::fs::read_to_string(&out).unwrap(), rows(&out));
    let third = text.match_indices('\n').nth(2).unwrap().0 + 1;
    for (end, torn) in [(third, 1), (third + 20, 2), (third - 5, 1), (text.len() - 1, 2)] {
        std::fs::write(&out, &text[..end]).unwrap();
        let swept = sweep.run(|_| ()).unwrap();
        assert_eq!((swept.rows, swept.recomputed), (2, torn), "{end}");
        assert_eq!(rows(&out), expected);
    }
    std::fs::write(&out, "not json\n").unwrap();
    let error = sweep.run(|_| ()).unwrap_err().to_string();
    assert!(error.contains("out.jsonl, line 1"), "{error}");
}

/// The golden suite's curve, and its planted branch.
#[test]
fn the_curve_of_a_suite_is_the_harnesss() {
    let dir = tempfile::tempdir().unwrap();
    let suite = root().join("tests/golden/scoring/suite-tiny-neox");
    let mut settings = hub::Settings::new("http://localhost", suite.join("cache"));
    settings.offline = true;
    let hub = pricket::Hub::new(settings);
    let model = pricket::Checkpoints::on(&hub, "test/tiny-neox", &pricket::Silent).unwrap();
    let measure = |name: &str| {
        let task = Task::named(name).unwrap();
        let documents = suite.join("data").join(format!("{name}.{}.jsonl", task.split()));
        Measure::Task { task, documents: vec![documents], examples: Vec::new() }
    };
    let mut sweep = Sweep::new(
        vec![model],
        Steps::all(),
        ["lambada_openai", "piqa", "sciq", "wikitext"].map(measure).to_vec(),
        dir.path().join("curve.jsonl"),
    );
    sweep.options.bootstrap = 0;
    sweep.options.score.max_length = Some(128);
    sweep.configure = std::sync::Arc::new(move |loader| Ok(loader.hub(hub.clone())));
    let mut found = Vec::new();
    let swept = sweep.run(|row| found.push(row.clone())).unwrap();
    let curve: Value = serde_json::from_slice(&std::fs::read(suite.join("curve.json")).unwrap()).unwrap();
    let mut seen = BTreeSet::new();
    for row in &found {
        let (task, metric) = row["metric"].as_str().unwrap().split_once('/').unwrap();
        let revision = row["revision"].as_str().unwrap();
        let (expected, value) = (curve[revision][task][metric].as_f64().unwrap(), row["value"].as_f64().unwrap());
        let within = if metric.starts_with("acc") { 0.0 } else { 2e-4 * expected };
        assert!((value - expected).abs() <= within, "{revision} {task} {metric}: {value}, expected {expected}");
        seen.insert(revision.to_owned());
    }
    assert_eq!(seen.len(), 7, "{seen:?}");
    assert!(swept.warnings.iter().any(|w| w.contains("step1000 and step512 hold the same weights")), "{swept:?}");
    assert!(!swept.warnings.iter().any(|w| w.contains("step0")), "step1 is step0 in every suite: {swept:?}");
}

/// A checkpoint that cannot be loaded is written down, skipped, told by the exit code, and tried again.
#[test]
fn what_fails_is_written_down() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    for step in ["step0", "step1", "step2"] {
        let to = model.join("revisions").join(step);
        std::fs::create_dir_all(&to).unwrap();
        for file in ["config.json", "tokenizer.json"] {
            std::fs::copy(root().join("models/tiny").join(file), to.join(file)).unwrap();
        }
        let from = root().join("models/tiny/revisions").join(step).join("model.safetensors");
        let mut weights = std::fs::read(from).unwrap();
        if step == "step1" {
            weights.truncate(1000);
        }
        std::fs::write(to.join("model.safetensors"), weights).unwrap();
    }
    let out = dir.path().join("out.jsonl");
    let run = || {
        let output = example("sweep").arg("--models").arg(&model).arg("--out").arg(&out).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, said) = run();
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("@step1: ") && said.contains("2 checkpoints measured"), "{said}");
    let failed: Vec<Value> =
        std::fs::read_to_string(&out).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert!(failed.iter().any(|row| row["revision"] == "step1" && row["error"].is_string()));
    let weights = std::fs::read(root().join("models/tiny/revisions/step1/model.safetensors")).unwrap();
    std::fs::write(model.join("revisions/step1/model.safetensors"), weights).unwrap();
    let (code, said) = run();
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("1 checkpoints measured") && said.contains("4 were there"), "{said}");
}

#[test]
fn shares_are_read_and_refused() {
    assert_eq!("2/3".parse::<Shard>().unwrap(), Shard::new(2, 3).unwrap());
    for text in ["3/3", "1", "a/b", "0/0"] {
        assert!(text.parse::<Shard>().is_err(), "{text}");
    }
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.jsonl");
    let slurm = |id: &str| {
        let variables = [("SLURM_ARRAY_TASK_ID", id), ("SLURM_ARRAY_TASK_MIN", "1"), ("SLURM_ARRAY_TASK_COUNT", "6")];
        example("sweep").args(["--json", "--out"]).arg(&out).envs(variables).output().unwrap()
    };
    assert!(slurm("2").status.success());
    let found: BTreeSet<String> = std::fs::read_to_string(&out)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["revision"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(json!(found), json!(["step1", "step256"]));
    let refused = slurm("9");
    assert!(!refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("share 8 of 6"));

    let busy = std::fs::File::options().append(true).open(&out).unwrap();
    busy.lock().unwrap();
    let error = tiny(&out).run(|_| ()).unwrap_err().to_string();
    assert!(error.contains("another sweep"), "{error}");
}
