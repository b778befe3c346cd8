//! Sweeps over training steps: resumed, in shards, with failures.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use pricket::Sweep;
use pricket::hub::{self, Steps};
use pricket::lm::Task;
use pricket::sweep::{Measure, Shard};
use serde_json::{Value, json};

use crate::common::{example, root, tiny_steps};
use crate::world::{World, tiny_repo};

/// The rows of a file, sorted, without the fields that differ between runs.
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
fn shards_add_up_and_nothing_is_measured_twice() {
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole.jsonl");
    let swept = tiny(&whole).run(|_| ()).unwrap();
    assert_eq!((swept.checkpoints, swept.rows, swept.kept, swept.recomputed), (8, 16, 0, 0));
    assert!(swept.failed.is_empty());
    let mut parts = String::new();
    for i in 0..4 {
        let part = dir.path().join(format!("{i}.jsonl"));
        let share = Sweep { shard: format!("{i}/4").parse().unwrap(), prefetch: i == 1, ..tiny(&part) };
        assert_eq!(share.run(|_| ()).unwrap().checkpoints, 2);
        parts += &std::fs::read_to_string(part).unwrap();
    }
    let joined = dir.path().join("joined.jsonl");
    std::fs::write(&joined, parts).unwrap();
    assert_eq!(rows(&joined), rows(&whole));
    let again = tiny(&joined).run(|_| panic!("it is all there")).unwrap();
    assert_eq!((again.rows, again.kept), (0, 16));
    // Another measure is added. A measure of another text is not taken for the same one.
    let other = Measure::Text { name: "text".into(), text: "In the year of our Lord the Congress met!".into() };
    let added = Sweep { measures: vec![other], steps: "final".parse().unwrap(), ..tiny(&joined) };
    assert_eq!(added.run(|_| ()).unwrap().rows, 2);
}

/// A sweep that was killed twenty times ends with the rows of an undisturbed one. It repeats only the rows that were
/// being written.
#[test]
fn a_killed_sweep_resumes() {
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
            // Finished too early: starts again, with a torn line.
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

/// The number of lines of a file that may end in a torn line.
fn rows_or_torn(path: &Path) -> usize {
    std::fs::read_to_string(path).map_or(0, |text| text.lines().count())
}

/// The remains of a partly written measure are removed before it is measured again.
#[test]
fn partly_written_measures_are_repeated() {
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

/// The curve of the golden suite, with its planted branch.
#[test]
fn the_curve_of_a_suite_matches_the_harness() {
    let dir = tempfile::tempdir().unwrap();
    let suite = root().join("tests/golden/scoring/suite-tiny-neox");
    let mut settings = hub::Settings::new("http://localhost", suite.join("cache"));
    settings.offline = true;
    let hub = pricket::Hub::new(settings);
    let model = pricket::suites::Checkpoints::on(&hub, "test/tiny-neox", &pricket::nn::NoProgress).unwrap();
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

/// Writes a directory with two steps of the embedded model.
fn two_steps(model: &Path) {
    for step in ["step0", "step64"] {
        let (from, to) = (tiny_steps().join(step), model.join("revisions").join(step));
        std::fs::create_dir_all(&to).unwrap();
        for file in ["config.json", "tokenizer.json"] {
            std::fs::copy(root().join("models/tiny").join(file), to.join(file)).unwrap();
        }
        std::fs::copy(from.join("model.safetensors"), to.join("model.safetensors")).unwrap();
    }
}

/// The newest value of a metric at a step, as readers of the file get it.
fn newest(out: &Path, revision: &str, metric: &str) -> Option<f64> {
    let rows = pricket::sweep::read_rows(&[out]).unwrap();
    rows.into_iter().find(|row| row.revision == revision && row.metric == metric).map(|row| row.value)
}

/// If an input of a row changes under its name, the row is measured again. The old row stays in the file.
#[test]
fn rows_are_reused_only_for_unchanged_inputs() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let (model, out) = (at("model"), at("out.jsonl"));
    two_steps(&model);
    let write = |name: &str, text: &str| std::fs::write(at(name), text).unwrap();
    let documents = |goal: &str| {
        let line = json!({"goal": goal, "sol1": "the army", "sol2": "a red ball", "label": 0});
        format!("{line}\n{line}\n")
    };
    let definition = |text: &str| {
        format!(
            "name = 'own'\nkind = 'multiple_choice'\ntext = '{text}'\nchoices = '[sol1, sol2]'\nanswer = 'label'\nexamples = true"
        )
    };
    write("own.toml", &definition("{{ goal }}"));
    write("documents.jsonl", &documents("The President spoke of"));
    write("examples.jsonl", &documents("The Congress met"));
    write(
        "slices.jsonl",
        "{\"text\": \"the people\", \"slice\": \"a\"}\n{\"text\": \"the peace\", \"slice\": \"b\"}\n",
    );
    let run = |remeasure: bool| {
        let models = vec![pricket::checkpoints(model.to_str().unwrap()).unwrap()];
        let task = Task::from_file(at("own.toml")).unwrap();
        let measures = vec![
            Measure::Task { task, documents: vec![at("documents.jsonl")], examples: vec![at("examples.jsonl")] },
            Measure::Slices(at("slices.jsonl")),
        ];
        let mut sweep = Sweep { remeasure, ..Sweep::new(models, Steps::all(), measures, &out) };
        sweep.options.shots = Some(1);
        let swept = sweep.run(|_| ()).unwrap();
        ((swept.rows, swept.kept), swept.warnings)
    };
    let counts = || run(false).0;
    // Two metrics of the task and two of each slice, at two steps.
    assert_eq!(counts(), (12, 0));
    assert_eq!(counts(), (0, 12));
    let value = |metric: &str| newest(&out, "step64", metric).unwrap();
    let loss = value("a/loss");

    write("own.toml", &definition("So {{ goal }}"));
    assert_eq!(counts(), (4, 8), "the definition");
    write("documents.jsonl", &documents("The president spoke of"));
    assert_eq!(counts(), (4, 8), "documents of the same length");
    write("examples.jsonl", &documents("The congress met"));
    assert_eq!(counts(), (4, 8), "examples of the same length");
    write("slices.jsonl", "{\"text\": \"the peoples\", \"slice\": \"a\"}\n{\"text\": \"a peace\", \"slice\": \"c\"}\n");
    assert_eq!(counts(), (8, 4), "slices");
    assert!(
        value("a/loss") != loss
            && newest(&out, "step64", "b/loss").is_none()
            && newest(&out, "step64", "c/loss").is_some()
    );

    // Other weights under the same name, with the same length and modification time.
    let (loss, file) = (value("a/loss"), model.join("revisions/step64/model.safetensors"));
    let modified = std::fs::metadata(&file).unwrap().modified().unwrap();
    let weights = std::fs::read(tiny_steps().join("step256/model.safetensors")).unwrap();
    assert_eq!(weights.len() as u64, std::fs::metadata(&file).unwrap().len());
    std::fs::write(&file, &weights).unwrap();
    std::fs::File::options().append(true).open(&file).unwrap().set_modified(modified).unwrap();
    assert_eq!(counts(), (6, 6), "weights");
    assert_ne!(value("a/loss"), loss);
    // Rewriting the same bytes changes nothing.
    std::fs::write(&file, &weights).unwrap();
    assert_eq!(counts(), (0, 12));
    let tokenizer = model.join("revisions/step0/tokenizer.json");
    let text = std::fs::read_to_string(&tokenizer).unwrap();
    std::fs::write(
        &tokenizer,
        text.replacen("\"special\":true", "\"special\":false", 1).replacen(
            "\"special\": true",
            "\"special\": false",
            1,
        ),
    )
    .unwrap();
    assert_eq!(counts(), (6, 6), "the tokenizer");
    let lines = std::fs::read_to_string(&out).unwrap().lines().count();
    assert_eq!(lines, 12 + 3 * 4 + 8 + 2 * 6, "nothing is deleted");

    // Rows of earlier versions have no hashes.
    let mut old = String::new();
    for line in std::fs::read_to_string(&out).unwrap().lines() {
        let mut row: Value = serde_json::from_str(line).unwrap();
        for key in ["inputs", "measure", "stamps"] {
            row.as_object_mut().unwrap().remove(key);
        }
        // The order of the settings in a row does not matter.
        row["settings"] = row["settings"].as_object().unwrap().clone().into_iter().rev().collect();
        old += &row.to_string();
        old.push('\n');
    }
    std::fs::write(&out, &old).unwrap();
    let (found, warnings) = run(false);
    assert_eq!(found, (0, 12));
    assert!(warnings.iter().any(|warning| warning.contains("12 rows kept without hashes")), "{warnings:?}");
    let (found, warnings) = run(true);
    assert_eq!(found, (12, 0));
    assert!(!warnings.iter().any(|warning| warning.contains("without hashes")), "{warnings:?}");
    assert_eq!(run(true).0, (0, 12), "rows with hashes are not measured again");
}

/// A branch of the Hub that moved is measured again.
#[test]
fn a_branch_that_moved_is_measured_again() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.jsonl");
    let world = World::new([("test/tiny", tiny_repo(&["step0", "step64"]))]);
    let run = || {
        let text = Measure::Text { name: "text".into(), text: "In the year of our Lord the Congress met.".into() };
        let hub = world.hub();
        let mut sweep = Sweep::new(vec![world.checkpoints("test/tiny")], Steps::all(), vec![text], &out);
        sweep.configure = std::sync::Arc::new(move |loader| Ok(loader.hub(hub.clone())));
        let swept = sweep.run(|_| ()).unwrap();
        assert!(swept.failed.is_empty(), "{swept:?}");
        (swept.rows, swept.kept)
    };
    assert_eq!((run(), run()), ((4, 0), (0, 4)));
    let before = newest(&out, "step64", "text/loss").unwrap();
    let mut moved = tiny_repo(&["step0"]);
    let commit = moved.commit_directory(&tiny_steps().join("step256")).unwrap();
    moved.branch("step64", &commit);
    world.server.add("test/tiny", moved);
    assert_eq!((run(), run()), ((2, 2), (0, 4)));
    assert_ne!(newest(&out, "step64", "text/loss").unwrap(), before);
}

/// Space is freed before a checkpoint is fetched, so the cache never exceeds the budget.
#[test]
fn a_disk_budget_is_kept_while_checkpoints_are_fetched() {
    let steps = ["step0", "step1", "step64", "step256"];
    let size = std::fs::metadata(tiny_steps().join("step64/model.safetensors")).unwrap().len();
    for (prefetch, checkpoints) in [(true, 1), (true, 2), (false, 1), (false, 3)] {
        let world = World::new([("test/tiny", tiny_repo(&steps))]);
        let dir = tempfile::tempdir().unwrap();
        let budget = checkpoints * (size + (1 << 20));
        let text = Measure::Text { name: "text".into(), text: "In the year of our Lord the Congress met.".into() };
        let (hub, models) = (world.hub(), vec![world.checkpoints("test/tiny")]);
        let mut sweep = Sweep::new(models, Steps::all(), vec![text], dir.path().join("out.jsonl"));
        (sweep.prefetch, sweep.budget) = (prefetch, Some((world.hub(), budget)));
        sweep.configure = std::sync::Arc::new(move |loader| Ok(loader.hub(hub.clone())));
        let mut peak = 0;
        let swept = sweep
            .run(|_| peak = peak.max(world.hub().cache().repos().unwrap().iter().map(|repo| repo.bytes).sum::<u64>()))
            .unwrap();
        assert_eq!((swept.checkpoints, swept.failed.len()), (steps.len(), 0));
        assert!(peak > size / 2 && peak <= budget, "{peak} bytes with a budget of {budget}, prefetch {prefetch}");
    }
}

/// The checkpoints of a training program are a series of steps. A model without steps is one row.
#[test]
fn local_training_runs_are_swept() {
    let dir = tempfile::tempdir().unwrap();
    for (i, names) in [
        ["checkpoint-0", "checkpoint-64"],
        ["global_step0", "global_step64"],
        ["iter_0000000", "iter_0000064"],
        ["epoch-0", "64"],
    ]
    .iter()
    .enumerate()
    {
        let (run, made) = (dir.path().join(i.to_string()), dir.path().join(format!("made-{i}")));
        two_steps(&made);
        std::fs::create_dir_all(run.join("logs-7")).unwrap();
        for (step, name) in ["step0", "step64"].iter().zip(names) {
            std::fs::rename(made.join("revisions").join(step), run.join(name)).unwrap();
        }
        let found = pricket::checkpoints(run.to_str().unwrap()).unwrap();
        let steps: Vec<_> = found.steps.iter().map(|c| (c.revision.as_str(), c.step.unwrap())).collect();
        assert_eq!(steps, [(names[0], 0), (names[1], 64)]);
        let out = dir.path().join(format!("{i}.jsonl"));
        let text = Measure::Text { name: "text".into(), text: "In the year of our Lord the Congress met.".into() };
        let swept = Sweep::new(vec![found.clone()], Steps::all(), vec![text], &out).run(|_| ()).unwrap();
        assert_eq!((swept.checkpoints, swept.failed.len()), (2, 0));
        let audit =
            found.audit(&Steps::all(), pricket::suites::AuditOptions::default(), &pricket::nn::NoProgress).unwrap();
        assert_eq!(audit.revisions.len(), 2);
        assert!(
            pricket::load(run.join(names[1])).is_ok()
                && pricket::load(format!("{}@{}", run.display(), names[1])).is_ok()
        );
    }
    let none = dir.path().join("none");
    std::fs::create_dir_all(none.join("a")).unwrap();
    let found = pricket::checkpoints(none.to_str().unwrap()).unwrap();
    let error = found.select(&Steps::all()).unwrap_err().to_string();
    assert!(error.contains("checkpoint-500") && error.contains("revisions/stepN"), "{error}");
    let tiny = pricket::checkpoints("tiny-chat").unwrap();
    assert_eq!(tiny.select(&Steps::all()).unwrap().len(), 1);
    assert!(tiny.select(&"3".parse().unwrap()).is_err());
    let out = dir.path().join("one.jsonl");
    let text = Measure::Text { name: "text".into(), text: "In the year of our Lord the Congress met.".into() };
    assert_eq!(Sweep::new(vec![tiny], Steps::all(), vec![text], &out).run(|_| ()).unwrap().rows, 2);
}

/// A task with an unusable document is reported with the document. The other tasks are measured.
#[test]
fn an_unusable_task_does_not_end_the_others() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let own = "name = 'own'\nkind = 'loglikelihood'\ntext = '{{ a }}'\ntarget = '{{ b }}'\nmetrics = ['acc']";
    std::fs::write(at("own.toml"), own).unwrap();
    std::fs::write(at("own.validation.jsonl"), "{\"a\": \"x\", \"b\": \" y\"}\n{\"a\": \"x\", \"b\": \"\"}\n").unwrap();
    let data = root().join("tests/golden/scoring/score-neox-4tasks/data");
    std::fs::copy(data.join("piqa.validation.jsonl"), at("piqa.validation.jsonl")).unwrap();
    let tasks = format!("{},piqa", at("own.toml").display());
    for (program, out) in [("score", "--output"), ("sweep", "--out")] {
        let mut command = example(program);
        command.args(["--tasks", &tasks, "--limit", "20", "--bootstrap-iters", "0", "--data"]).arg(dir.path());
        if program == "sweep" {
            command.args(["--steps", "0,1"]);
        }
        let output = command.arg(out).arg(at(program)).output().unwrap();
        let (shown, said) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert_eq!(output.status.code(), Some(2), "{program}: {said}");
        assert!(
            said.contains("task own, document 1") && said.contains("no token is left for the continuation"),
            "{program}: {said}"
        );
        assert!(shown.contains("piqa"), "{program}: {shown}");
    }
}

/// A resumed sweep measures the other tasks even where only the unusable task is left of a checkpoint.
#[test]
fn an_unusable_task_is_tried_once_a_model() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let own = "name = 'own'\nkind = 'loglikelihood'\ntext = 'x'\ntarget = '{{ b }}'\nmetrics = ['acc']";
    std::fs::write(at("own.toml"), own).unwrap();
    std::fs::write(at("bad.jsonl"), "{\"b\": \"\"}\n").unwrap();
    let run = |steps: &str, prefetch: bool, with_task: bool| {
        let models = vec![pricket::checkpoints("tiny").unwrap()];
        let mut measures = vec![Measure::Text { name: "text".into(), text: "the people".into() }];
        if with_task {
            let task = Task::from_file(at("own.toml")).unwrap();
            measures.insert(0, Measure::Task { task, documents: vec![at("bad.jsonl")], examples: Vec::new() });
        }
        let sweep = Sweep { prefetch, ..Sweep::new(models, steps.parse().unwrap(), measures, at("out.jsonl")) };
        sweep.run(|_| ()).unwrap()
    };
    assert_eq!(run("0", true, false).rows, 2);
    for prefetch in [true, false] {
        let swept = run("0,1,16", prefetch, true);
        let expected = if prefetch { (4, 2, 2) } else { (0, 6, 0) };
        assert_eq!((swept.rows, swept.kept, swept.checkpoints), expected, "{swept:?}");
        assert_eq!(swept.failed.len(), 1, "{swept:?}");
        assert!(swept.warnings.iter().any(|warning| warning.contains("2 other checkpoints were skipped")), "{swept:?}");
    }
}

/// Measures with equal metric names do not replace each other.
#[test]
fn slice_files_with_equal_metric_names_stay_separate() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for name in ["a", "b"] {
        std::fs::write(at(&format!("{name}.jsonl")), format!("{{\"text\": \"the {name} people\"}}\n")).unwrap();
    }
    let run = || {
        let models = vec![pricket::checkpoints("tiny").unwrap()];
        let measures = vec![Measure::Slices(at("a.jsonl")), Measure::Slices(at("b.jsonl"))];
        Sweep::new(models, "0".parse().unwrap(), measures, at("out.jsonl")).run(|_| ()).unwrap()
    };
    assert_eq!((run().rows, run().kept), (4, 4));
}

/// A text has one loss in every command: every token is scored, the first one after the prefix token.
#[test]
fn a_text_file_has_one_perplexity() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("story.txt");
    // Several windows, and a byte order mark that does not belong to the text.
    let text = std::fs::read_to_string(root().join("CONTRIBUTING.md")).unwrap().repeat(2);
    std::fs::write(&path, format!("\u{feff}{text}")).unwrap();
    let tiny = pricket::load("tiny@step512").unwrap();
    let scored = tiny.score(&text, &pricket::ScoreOptions::default()).unwrap();
    assert!(scored.len() > 600 && scored.len() == tiny.encode(&text).unwrap().len());
    let loss = -scored.iter().map(|token| f64::from(token.logprob)).sum::<f64>() / scored.len() as f64;
    // The first token again, with a plain computation.
    let model = tiny.model();
    let ids = [&[tiny.prefix_id()], &tiny.encode(&text).unwrap()[..8]].concat();
    let plain = pricket::lm::token_logprobs(&*model, &ids).unwrap();
    for (a, b) in plain.iter().zip(&scored) {
        assert!(a.id == b.id && (a.logprob - b.logprob).abs() < 1e-4);
    }

    let close = |value: &Value, expected: f64, what: &str| {
        let value = value.as_f64().unwrap();
        assert!((value - expected).abs() < 1e-4 * expected, "{what}: {value}, not {expected}");
    };
    let json = |args: &[&str], input: &str| -> Value {
        let mut command = example("score");
        command
            .args(["--model", "tiny@step512", "--json"])
            .args(args)
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped());
        let mut child = command.spawn().unwrap();
        let _ = std::io::Write::write_all(&mut child.stdin.take().unwrap(), input.as_bytes());
        serde_json::from_slice(&child.wait_with_output().unwrap().stdout).unwrap()
    };
    let file = json(&["--text", path.to_str().unwrap()], "");
    close(&file["loss"], loss, "--text");
    close(&file["perplexity"], loss.exp(), "--text");
    assert_eq!(file["given"], "<|endoftext|>");
    close(&json(&["--prompt", "-"], &text)["loss"], loss, "--prompt");
    std::fs::write(dir.path().join("slices.jsonl"), json!({ "text": text }).to_string()).unwrap();
    let slices = json(&["--slices", dir.path().join("slices.jsonl").to_str().unwrap()], "");
    close(&slices["slices"]["all"]["loss"], loss, "--slices");

    let models = vec![pricket::checkpoints("tiny@step512").unwrap()];
    let out = dir.path().join("out.jsonl");
    let sweep = Sweep::new(models, Steps::all(), vec![Measure::TextFile(path.clone())], &out);
    let swept = sweep.run(|_| ()).unwrap();
    assert_eq!((swept.rows, sweep.run(|_| ()).unwrap().kept), (3, 3));
    let rows = pricket::sweep::read_rows(&[out]).unwrap();
    let row = rows.iter().find(|row| row.metric == "story/perplexity").unwrap();
    close(&json!(row.value), loss.exp(), "sweep");
}

/// A checkpoint that cannot be loaded is recorded, skipped, reported by the exit code, and tried again.
#[test]
fn failed_checkpoints_are_recorded() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    for step in ["step0", "step1", "step16"] {
        let to = model.join("revisions").join(step);
        std::fs::create_dir_all(&to).unwrap();
        for file in ["config.json", "tokenizer.json"] {
            std::fs::copy(root().join("models/tiny").join(file), to.join(file)).unwrap();
        }
        let from = tiny_steps().join(step).join("model.safetensors");
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
    let weights = std::fs::read(tiny_steps().join("step1/model.safetensors")).unwrap();
    std::fs::write(model.join("revisions/step1/model.safetensors"), weights).unwrap();
    let (code, said) = run();
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("1 checkpoint measured") && said.contains("4 kept"), "{said}");
}

#[test]
fn shards_are_parsed_and_refused() {
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
    assert_eq!(json!(found), json!(["step1", "step4000"]));
    let refused = slurm("9");
    assert!(!refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("shard 8 of 6"));

    let busy = std::fs::File::options().append(true).open(&out).unwrap();
    busy.lock().unwrap();
    let error = tiny(&out).run(|_| ()).unwrap_err().to_string();
    assert!(error.contains("another sweep"), "{error}");
}
