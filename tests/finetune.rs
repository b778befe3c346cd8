//! The example `finetune`: data, recipes, evaluation, resumption, and the use of its adapters.

use std::io::BufRead;
use std::path::Path;
use std::process::{Command, Stdio};

use pricket::lm::Documents;
use pricket::train::{Dataset, Recipe, Rule, Sample, losses as losses_of, read_records};
use pricket_testhub::{Content, Repo};
use serde_json::{Value, json};

use crate::common::{example, root};
use crate::world::{World, only};

fn finetune(out: &Path, data: &Path, more: &[&str]) -> Command {
    let mut command = example("finetune");
    command.args(["--data", data.to_str().unwrap(), "--out", out.to_str().unwrap(), "--threads", "1"]);
    command.args(["--rank", "2"]).args(more);
    if !more.contains(&"--batch") {
        command.args(["--batch", "2"]);
    }
    if !more.contains(&"--steps") {
        command.args(["--steps", "12", "--save-every", "1", "--dropout", "0.1"]);
    }
    command.current_dir(root());
    command
}

fn data(dir: &Path) -> std::path::PathBuf {
    let path = dir.join("data.jsonl");
    let line =
        |i: usize| json!({"prompt": format!("Say {i}:"), "completion": format!(" {i}, and no more.")}).to_string();
    std::fs::write(&path, (0..9).map(line).collect::<Vec<_>>().join("\n")).unwrap();
    path
}

fn failed(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(!output.status.success());
    String::from_utf8(output.stderr).unwrap()
}

/// The names in a directory.
fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap().flatten();
    let mut names: Vec<_> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// A run that is killed 20 times gives the bytes of an undisturbed run: with packs, several micro-batches per step,
/// evaluation, dropout, and the best weights kept.
#[test]
fn a_killed_run_resumes_to_the_same_adapter() {
    let dir = tempfile::tempdir().unwrap();
    let data = data(dir.path());
    let settings = "--pack 40 --batch 3 --micro-batch-tokens 80 --eval-examples 2 --eval-every 2 --best --dropout 0.1 \
                    --steps 24 --save-every 1 --lr 0.02 --schedule constant";
    let settings: Vec<&str> = settings.split_whitespace().collect();
    let files = |run: &Path| {
        ["adapter_model.safetensors", "adapter_config.json"].map(|name| std::fs::read(run.join(name)).unwrap())
    };
    let lines = |run: &Path| -> Vec<Vec<Value>> {
        let text = std::fs::read_to_string(run.join("log.jsonl")).unwrap();
        let parse = |line| serde_json::from_str::<Value>(line).unwrap();
        // Times and memory differ from run to run.
        let keys = ["step", "loss", "lr", "grad_norm", "tokens", "counted", "eval_loss"];
        text.lines().map(parse).map(|line| keys.map(|key| line[key].clone()).to_vec()).collect()
    };
    let whole = dir.path().join("whole");
    let output = finetune(&whole, &data, &settings).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && said.contains("using step"), "{said}");
    assert_eq!(lines(&whole).len(), 25, "24 steps and the evaluation before them");

    let killed = dir.path().join("killed");
    let mut kills = 0;
    for attempt in 0..80 {
        let mut child = finetune(&killed, &data, &[&settings[..], &["--resume"]].concat())
            .stderr(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // The process is killed after some lines of output, independent of time.
        let mut lines = std::io::BufReader::new(child.stdout.take().unwrap()).lines();
        let done = (0..=attempt % 3).all(|_| lines.next().is_some());
        if done && kills < 20 {
            child.kill().unwrap();
            kills += 1;
        }
        drop(lines);
        if child.wait().unwrap().success() {
            break;
        }
    }
    assert!(kills > 9, "killed {kills} times");
    assert_eq!(files(&killed), files(&whole));
    assert_eq!(lines(&killed), lines(&whole));
    assert_eq!(names(&killed), names(&whole));
}

/// A run does not resume from the checkpoints of another run.
#[test]
fn a_run_resumes_only_with_its_own_settings() {
    let dir = tempfile::tempdir().unwrap();
    let data = data(dir.path());
    let run = dir.path().join("run");
    assert!(finetune(&run, &data, &[]).output().unwrap().status.success());
    let refused = |more: &[&str]| failed(&mut finetune(&run, &data, more));
    assert!(refused(&[]).contains("already holds a run; continue it with --resume"));
    assert!(refused(&["--resume", "--lr", "1"]).contains("was made with optimizer"));
    assert!(refused(&["--resume", "--alpha", "1"]).contains("was made with lora_alpha 4, now it is 1"));
    assert!(refused(&["--resume", "--model", "models/tiny-chat"]).contains("was made "));
    let moved = dir.path().join("moved");
    std::fs::create_dir(&moved).unwrap();
    std::fs::copy(run.join("adapter_config.json"), moved.join("adapter_config.json")).unwrap();
    assert!(failed(&mut finetune(&moved, &data, &["--resume"])).contains("no checkpoint to resume"));
    assert!(refused(&["--resume", "--pack", "64"]).contains("was made with pack null, now it is 64"));
    assert!(refused(&["--resume", "--eval-data", data.to_str().unwrap()]).contains("other evaluation samples"));
    std::fs::write(&data, "{\"text\": \"another\"}").unwrap();
    assert!(refused(&["--resume"]).contains("was made with other samples"));
}

/// With a limit on the size of files, as on a full disk, the run ends with one line and the last checkpoint is
/// complete.
#[cfg(unix)]
#[test]
fn a_full_disk_leaves_the_last_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let (data, out) = (data(dir.path()), dir.path().join("run"));
    let mut child = finetune(&out, &data, &[]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = std::io::BufReader::new(child.stdout.take().unwrap()).lines();
    assert!((0..4).all(|_| lines.next().is_some()));
    child.kill().unwrap();
    child.wait().unwrap();
    let checkpoints = || -> Vec<_> {
        let entries = std::fs::read_dir(&out).unwrap().flatten().map(|entry| entry.file_name());
        let mut names: Vec<_> = entries.filter(|name| name.to_string_lossy().starts_with("checkpoint-")).collect();
        names.sort();
        names
    };
    let before = checkpoints();
    assert!(!before.is_empty());
    let state = |name: &std::ffi::OsString| std::fs::read(out.join(name).join("optimizer.safetensors")).unwrap();
    let bytes: Vec<_> = before.iter().map(state).collect();

    let resumed = finetune(&out, &data, &["--resume"]);
    let words = std::iter::once(resumed.get_program()).chain(resumed.get_args());
    let words: Vec<String> = words.map(|word| format!("'{}'", word.to_string_lossy())).collect();
    // Files may have 8 blocks. A write beyond that is an error rather than a signal.
    let script = format!("trap '' XFSZ; ulimit -f 8; exec {}", words.join(" "));
    let output = Command::new("sh").args(["-c", &script]).current_dir(root()).output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success());
    let lines: Vec<&str> = error.lines().filter(|line| line.starts_with("error: ")).collect();
    assert!(lines.len() == 1 && lines[0].contains(".safetensors"), "{error}");
    assert_eq!(checkpoints(), before);
    assert_eq!(before.iter().map(state).collect::<Vec<_>>(), bytes);
    assert!(finetune(&out, &data, &["--resume"]).output().unwrap().status.success());
}

/// The steps of a user: train, generate with the adapter, merge.
#[test]
fn an_adapter_is_trained_used_and_merged() {
    let dir = tempfile::tempdir().unwrap();
    let (data, out) = (data(dir.path()), dir.path().join("run"));
    let lr = ["--steps", "60", "--save-every", "0", "--lr", "0.01", "--schedule", "constant", "--json"];
    let output = finetune(&out, &data, &lr).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let losses: Vec<f64> = String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["loss"].as_f64().unwrap())
        .collect();
    assert!(losses[59] < losses[0] / 4.0, "{losses:?}");
    let run = |name: &str, args: &[&str]| {
        let output = example(name).args(args).current_dir(root()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let prompt = ["--prompt", "Say 7:", "--max-tokens", "8"];
    let adapter = ["--adapter", out.to_str().unwrap()];
    assert!(run("generate", &[&prompt[..], &adapter].concat()).contains("and no more."));
    let merged = dir.path().join("merged.gguf");
    let merged = merged.to_str().unwrap();
    run("quantize", &[&["--model", "models/tiny", "--out", merged, "--quantize", "q8_0"], &adapter[..]].concat());
    assert!(run("generate", &[&["--model", merged], &prompt[..]].concat()).contains("and no more."));
    let sweep = dir.path().join("sweep.jsonl");
    let steps = ["--models", "models/tiny", "--steps", "64", "--text", "README.md", "--out", sweep.to_str().unwrap()];
    let plain = run("sweep", &steps);
    let adapted = run("sweep", &[&steps[..], &adapter].concat());
    assert_ne!(plain, adapted, "another adapter is another setting, so the row is measured again");
    let mut chat = example("chat");
    chat.args(["--model", "tiny", "--prompt-format", "plain", "--max-tokens", "8"]).args(adapter).current_dir(root());
    let mut chat = chat.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    std::io::Write::write_all(&mut chat.stdin.take().unwrap(), b"Say 7:\n").unwrap();
    let said = String::from_utf8(chat.wait_with_output().unwrap().stdout).unwrap();
    assert!(said.contains("and no more."), "{said}");
    let score = |more: &[&str]| run("score", &[&["-p", "Say 7: 7, and no more.", "--json"], more].concat());
    assert_ne!(score(&adapter), score(&[]));
}

/// Every record that is changed or left out is reported with its place, before the run.
#[test]
fn odd_records_are_reported_with_their_places() {
    let dir = tempfile::tempdir().unwrap();
    let (path, out) = (dir.path().join("data.jsonl"), dir.path().join("run"));
    let pair = |prompt: &str, completion: &str| json!({"prompt": prompt, "completion": completion}).to_string();
    let long = "one two three four five six seven eight ".repeat(4);
    let lines = [
        pair("Say 1:", " 1."),
        pair("Say 2:", " \n"),
        pair("Say 3:", &long),
        pair(&long, " 4."),
        pair("Say 1:", " 1."),
        pair("Say 5:", " 5."),
    ];
    std::fs::write(&path, lines.join("\n")).unwrap();
    let more = ["--steps", "1", "--max-length", "20", "--save-every", "0"];
    let output = finetune(&out, &path, &more).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    for expected in [
        "4 examples, ",
        "1 example truncated to 20 tokens (",
        "; the first is DATA, line 3",
        "1 example left out, because the prompt alone has 20 tokens or more; the first is DATA, line 4",
        "1 example left out, because the response is empty; the first is DATA, line 2",
        "1 duplicate kept; --drop-duplicates leaves them out; the first is DATA, line 5 (it repeats DATA, line 1)",
        "  | Say 1:\n  >  1.<|endoftext|>\n",
    ] {
        let expected = expected.replace("DATA", path.to_str().unwrap());
        assert!(said.contains(&expected), "{expected}\n{said}");
    }
    let other = dir.path().join("other");
    let output = finetune(&other, &path, &[&more[..], &["--drop-duplicates"]].concat()).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("3 examples, ") && said.contains("1 duplicate left out"), "{said}");

    // Malformed lines, and files without a usable example, end the program before the model is trained.
    for (text, expected) in [
        (format!("{}\n{{\"prompt\": \n", lines[0]), "DATA, line 2: not valid JSON at column"),
        (format!("{}\n\n{{\"promt\": \"x\"}}\n", lines[0]), "DATA, line 3: expected input_ids; messages;"),
        (lines[1].clone(), "none of 1 records can be used: 1 have no response"),
        (String::new(), "DATA: no records found"),
    ] {
        std::fs::write(&path, text).unwrap();
        let error = failed(&mut finetune(&dir.path().join("none"), &path, &more));
        let expected = expected.replace("DATA", path.to_str().unwrap());
        assert!(error.contains(&expected), "{expected}\n{error}");
    }
    let error = failed(&mut finetune(&dir.path().join("none"), Path::new("absent.jsonl"), &more));
    assert!(error.contains("absent.jsonl: "), "{error}");
}

/// A data file that changes or shrinks during the run does not affect it. The changed file is refused on resumption.
#[test]
fn data_that_change_during_a_run_do_not_affect_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = data(dir.path());
    let text = std::fs::read_to_string(&path).unwrap();
    let [whole, changed] = ["whole", "changed"].map(|name| dir.path().join(name));
    assert!(finetune(&whole, &path, &[]).output().unwrap().status.success());
    let mut child = finetune(&changed, &path, &[]).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut lines = std::io::BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.next().is_some());
    std::fs::write(&path, &text[..text.len() / 2]).unwrap();
    assert!(lines.all(|line| line.is_ok()) && child.wait().unwrap().success());
    let adapter = |run: &Path| std::fs::read(run.join("adapter_model.safetensors")).unwrap();
    assert_eq!(adapter(&changed), adapter(&whole));
    let error = failed(&mut finetune(&changed, &path, &["--resume"]));
    assert!(error.contains("line 5: not valid JSON") || error.contains("other samples"), "{error}");
}

/// The same records from all file formats, and from a dataset of the Hub.
#[test]
fn all_forms_of_data_give_the_same_adapter() {
    let dir = tempfile::tempdir().unwrap();
    let records = root().join("tests/data/documents/dolly.parquet");
    let documents: Vec<Value> = Documents::open(&records).unwrap().collect::<Result<_, _>>().unwrap();
    let texts: Vec<String> = documents.iter().map(Value::to_string).collect();
    let lines = dir.path().join("lines.jsonl");
    std::fs::write(&lines, texts.join("\n")).unwrap();
    let array = dir.path().join("array.json");
    std::fs::write(&array, format!("\n[\n{}\n]\n", texts.join(",\n"))).unwrap();
    let file = Content::lfs(std::fs::read(&records).unwrap());
    let world = World::new([
        ("datasets/test/converted", {
            let mut repo = Repo::default();
            let commit = repo.commit([("README.md", Content::text("# Dolly"))]);
            repo.branch("main", &commit);
            let commit = repo.commit([("default/train/0000.parquet", file.clone())]);
            repo.branch("refs/convert/parquet", &commit);
            repo
        }),
        ("datasets/test/lines", only([("databricks-dolly-15k.jsonl", Content::text(texts.join("\n")))])),
    ]);
    let train = |data: &str| {
        let out = dir.path().join(data.replace('/', "-"));
        let mut command = finetune(&out, Path::new(data), &["--steps", "2", "--prompt-format", "dolly-blank"]);
        let output = command.envs(world.variables()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        std::fs::read(out.join("adapter_model.safetensors")).unwrap()
    };
    let expected = train(lines.to_str().unwrap());
    for data in [records.to_str().unwrap(), array.to_str().unwrap(), "test/converted", "test/lines@main"] {
        assert_eq!(train(data), expected, "{data}");
    }
    let mut command = finetune(&dir.path().join("none"), Path::new("test/lines"), &["--split", "test"]);
    let error = failed(command.envs(world.variables()));
    assert!(error.contains("no file for split test; the files are ") && error.contains("dolly-15k.jsonl"), "{error}");
    let error = failed(finetune(&dir.path().join("none"), Path::new("test/absent"), &[]).envs(world.variables()));
    assert!(error.contains("test/absent: no such file; tried as a dataset of the Hub"), "{error}");
}

/// The run ends early, and writes the weights of the step with the lowest evaluation loss.
#[test]
fn a_run_ends_early_and_writes_its_best_step() {
    let dir = tempfile::tempdir().unwrap();
    let (data, out) = (data(dir.path()), dir.path().join("run"));
    let held = dir.path().join("held.jsonl");
    // Training on the data raises the loss of this text.
    std::fs::write(&held, json!({"prompt": "Say 1:", "completion": "We the people of the United States"}).to_string())
        .unwrap();
    let more = "--steps 40 --lr 0.02 --schedule constant --eval-every 2 --patience 2 --save-every 2 --keep 1";
    let mut more: Vec<&str> = more.split(' ').collect();
    more.extend(["--eval-data", held.to_str().unwrap(), "--json"]);
    let output = finetune(&out, &data, &more).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && said.contains("ended early at step "), "{said}");
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let losses: Vec<(u64, f64)> = lines
        .iter()
        .filter(|line| line["step"] != 0)
        .filter_map(|line| Some((line["step"].as_u64().unwrap(), line["eval_loss"].as_f64()?)))
        .collect();
    let best = losses.iter().min_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
    assert_eq!(losses.last().unwrap().0, best.0 + 4, "two evaluations after the best: {losses:?}");
    assert!(said.contains(&format!("using step {}, whose evaluation loss is {:.4}", best.0, best.1)), "{said}");
    let adapter = |run: &Path| std::fs::read(run.join("adapter_model.safetensors")).unwrap();
    assert_eq!(adapter(&out), adapter(&out.join(format!("best-{}", best.0))));
    assert_ne!(adapter(&out), adapter(&out.join(format!("checkpoint-{}", best.0 + 4))));
    // The evaluation is the loss that the adapter gives the text.
    let pricket = pricket::Loader::embedded("tiny").unwrap().adapter(&out).load().unwrap();
    let options = pricket.dataset_options();
    let evaluation = Dataset::new(&read_records(&[&held]).unwrap(), pricket.tokenizer().ok(), &options).unwrap();
    let [sample] = &evaluation.samples[..] else { panic!("one sample") };
    let nll = losses_of(&*pricket.model(), std::slice::from_ref(sample)).unwrap()[0] / sample.counted() as f64;
    assert!((nll - best.1).abs() < 1e-5, "{nll} {}", best.1);
    assert!(out.join("loss.svg").is_file());
}

/// The recipes that are part of pricket, and the rules by which flags replace their keys.
#[test]
fn recipes_set_the_run_and_flags_replace_their_keys() {
    let sample = || Sample::new(vec![1, 2, 3]).unwrap();
    let samples: Vec<Sample> = (0..96).map(|_| sample()).collect();
    for recipe in pricket::suites::recipes() {
        recipe.lora().unwrap();
        recipe.options(&samples).unwrap();
        assert!(!recipe.about.is_empty() && !recipe.source.is_empty(), "{}", recipe.name);
        if let Some(format) = &recipe.prompt_format {
            pricket::text::prompt_format(format).unwrap();
        }
    }
    let dolly = pricket::suites::recipe("dolly").unwrap();
    let options = dolly.options(&samples).unwrap();
    assert_eq!((options.steps, options.batch, options.optimizer.lr), (4, 48, 5e-6));
    assert_eq!(options.evaluation.unwrap().every, 50);
    let lion = pricket::suites::recipe("mpt-lion").unwrap().options(&samples).unwrap();
    assert_eq!((lion.optimizer.rule, lion.optimizer.betas), (Rule::DecoupledLion, (0.9, 0.99)));
    // The number of steps replaces the number of epochs; an adapter's keys are replaced one by one.
    let lora = pricket::suites::recipe("dolly-lora").unwrap();
    let changed = lora.with(&json!({"steps": 7, "adapter": {"r": 4}})).unwrap();
    assert_eq!((changed.options(&samples).unwrap().steps, changed.epochs), (7, None));
    assert_eq!((changed.lora().unwrap().rank, changed.lora().unwrap().alpha), (4, 32.0));
    for (text, expected) in [
        ("lr = 1e-4\nstep = 3", "line 2: unknown field `step`"),
        ("batch = \"8\"", "line 1: invalid type"),
        ("batch = ", "line 1: "),
    ] {
        let error = Recipe::from_toml(text).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    for (text, expected) in [
        ("batch = 0", "batch is 0; expected at least 1"),
        ("epochs = -1.0", "epochs is -1; expected more than 0"),
        ("steps = 3\nepochs = 2.0", "steps and epochs are both set"),
        ("patience = 2", "eval_every and patience need eval_data or eval_examples"),
        ("schedule = \"linear\"\nmin_lr_rate = 0.1", "has no minimum learning rate"),
    ] {
        let error = Recipe::from_toml(text).unwrap().options(&samples).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    // Data for evaluation replace examples taken out of the data, and 0 turns the evaluation off.
    let other = dolly.with(&json!({"eval_data": ["held.jsonl"]})).unwrap();
    assert_eq!((other.eval_examples, other.is_evaluated()), (None, true));
    let none = dolly.with(&json!({"eval_examples": 0})).unwrap();
    assert_eq!(none.options(&samples).unwrap().evaluation, None);
    for (text, expected) in [
        ("eval_examples = 2\neval_data = [\"x\"]", "eval_data and eval_examples are both set"),
        ("full = true\n[adapter]\nr = 4", "full is set, so the table adapter has no effect"),
        ("pack = 0", "pack is 0"),
    ] {
        let error = Recipe::from_toml(text).unwrap().options(&samples).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    assert!(Recipe::from_toml("clip = inf").unwrap_err().to_string().contains("finite"));
    let huge = Recipe::from_toml("steps = 9223372036854775807").unwrap().options(&samples).unwrap();
    assert_eq!(huge.steps, i64::MAX as u64);
    let error = Recipe::from_toml("[adapter]\nuse_qalora = true").unwrap().lora().unwrap_err().to_string();
    assert!(error.contains("use_qalora"), "{error}");
}

/// A directory of best weights that another run left has no effect, and flags that a recipe excludes are refused.
#[test]
fn nothing_of_another_run_or_recipe_is_used_silently() {
    let dir = tempfile::tempdir().unwrap();
    let (data, run, clean) = (data(dir.path()), dir.path().join("run"), dir.path().join("clean"));
    let more = "--steps 4 --eval-examples 2 --eval-every 2 --best --save-every 0 --lr 0.01";
    let more: Vec<&str> = more.split(' ').collect();
    assert!(finetune(&clean, &data, &more).output().unwrap().status.success());
    for step in [2, 4] {
        let old = run.join(format!("best-{step}"));
        std::fs::create_dir_all(&old).unwrap();
        std::fs::write(old.join("adapter_config.json"), "{}").unwrap();
    }
    let output = finetune(&run, &data, &more).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let adapter = |run: &Path| std::fs::read(run.join("adapter_model.safetensors")).unwrap();
    assert_eq!(adapter(&run), adapter(&clean));
    assert_eq!(names(&clean).iter().filter(|name| name.starts_with("best-")).count(), 1, "{:?}", names(&clean));

    let none = dir.path().join("none");
    let refused = |more: &[&str]| failed(&mut finetune(&none, &data, more));
    assert!(refused(&["--recipe", "dolly"]).contains("settings of an adapter have no effect"));
    assert!(refused(&["--pack", "20", "--max-length", "30"]).contains("--max-length is 30, but --pack is 20"));
    assert!(refused(&["--clip", "inf"]).contains("expected a finite number"));
    assert!(refused(&["--batch", "99999999"]).contains("batch is 99999999; expected at most 1048576"));
    std::fs::create_dir_all(none.join("checkpoint-3")).unwrap();
    assert!(refused(&["--resume"]).contains("checkpoints of another program"));
}

/// `--estimate` prints the parts of the memory and the time, and writes nothing.
#[test]
fn an_estimate_trains_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let data = data(dir.path());
    let mut command = example("finetune");
    let args = ["--data", data.to_str().unwrap(), "--estimate", "--quantize", "nf4", "--steps", "30", "--threads", "1"];
    let output = command.args(args).current_dir(root()).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for part in ["weights of the base model", "optimizer", "inputs of the blocks, at ", "estimated time: ", "30 steps"]
    {
        assert!(text.contains(part), "{part}\n{text}");
    }
    assert_eq!(names(dir.path()), ["data.jsonl"]);
}
