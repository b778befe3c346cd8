//! The examples as a user runs them.

use serde_json::Value;

use crate::common::{example, root};

fn output(name: &str, args: &[&str]) -> (Option<i32>, String, String) {
    let output = example(name).args(args).current_dir(root()).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn generate_writes_the_prompt_and_more() {
    let (code, out, err) = output("generate", &["--seed", "1", "--max-tokens", "32"]);
    assert_eq!(code, Some(0), "{err}");
    assert!(out.starts_with("My fellow citizens, the people of the United States") && out.len() > 100, "{out}");
    assert!(err.contains("tokens/s"), "{err}");
    let (_, again, _) = output("generate", &["--seed", "1", "--max-tokens", "32"]);
    assert_eq!(out, again);
}

#[test]
fn generate_writes_json() {
    let (code, out, _) =
        output("generate", &["--json", "--prompt", "The", "-n", "5", "-t", "0", "--revision", "step512"]);
    assert_eq!(code, Some(0));
    let json: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(json["ids"].as_array().unwrap().len(), 5);
    assert_eq!(json["finish"], "length");
}

#[test]
fn inspect_shows_a_directory_and_a_file() {
    let (code, out, _) = output("inspect", &[]);
    assert_eq!(code, Some(0));
    assert!(out.contains("1317632") && out.contains("gpt_neox.layers.3.mlp.dense_4h_to_h.weight"), "{out}");
    let (code, out, _) = output("inspect", &["--json", "tests/golden/models/neox-bin-sharded-fp16"]);
    let json: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, json["parameters"].as_u64()), (Some(0), Some(33792)));
    assert!(json["tensors"].as_array().unwrap().iter().any(|t| t["buffer"] == true && t["dtype"] == "U8"));
    let (code, out, _) = output("inspect", &["tests/golden/models/neox-tied/expected.safetensors", "--brief"]);
    assert_eq!(code, Some(1), "the configuration beside it is of other weights: {out}");
}

#[test]
fn parity_reports_differences_and_fails_on_them() {
    let (code, out, _) = output("parity", &["tests/golden/models/neox-tied", "tests/golden/models/generate-neox"]);
    assert_eq!(code, Some(0), "{out}");
    for line in out.lines() {
        let json: Value = serde_json::from_str(line).unwrap();
        assert_eq!(json["ok"], true);
        assert!(json["max_abs"].as_object().unwrap().len() >= 3);
    }
    let (code, out, _) = output("parity", &["tests/golden/models/neox-tied", "tests/golden/models/bad"]);
    assert_eq!(code, Some(1));
    assert_eq!(out.lines().count(), 2);
}

/// Some shared flags have another help text in one example.
#[test]
fn help_is_that_of_the_example() {
    for (name, text) in [
        ("generate", "[default: tiny]"),
        ("chat", "[default: tiny-chat]"),
        ("quantize", "Quantize the weight matrices of the output"),
        ("quantize", "Type of the output's weights"),
    ] {
        let (code, out, err) = output(name, &["--help"]);
        assert!(code == Some(0) && out.contains(text), "{name}: {out}{err}");
    }
}

#[test]
fn bench_measures_random_weights() {
    let args = ["--shape", "14m", "--prefill", "16", "--decode", "8", "--new-tokens", "4", "--runs", "1", "--json"];
    let (code, out, err) = output("bench", &args);
    assert_eq!(code, Some(0), "{err}");
    let json: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(json["parameters"], 14_067_712);
    assert!(json["rows"].as_array().unwrap().iter().all(|row| row["tokens_per_second"].as_f64().unwrap() > 0.0));
}

/// Runs `chat` with `lines` as its input.
fn chat(args: &[&str], lines: &str) -> (Option<i32>, String, String) {
    use std::io::Write;
    use std::process::Stdio;

    let mut command = example("chat");
    command.args(args).current_dir(root()).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // The write fails if the program has ended already.
    let _ = child.stdin.take().unwrap().write_all(lines.as_bytes());
    let output = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn chat_replies_and_runs_commands() {
    let (code, out, err) = chat(
        &["-t", "0"],
        "My name is Rose.\n\nWhat is \\\nmy name?\nWhat is my name?\n/undo\n/reset\nWhat is my name?\n/quit\nHello.\n",
    );
    assert_eq!(code, Some(0), "{err}");
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!((lines[0], lines[2]), ("Hello, Rose!", "Your name is Rose."), "{out}");
    assert_eq!((lines[3], lines.len()), ("You have not told me your name.", 4), "{out}");
    assert!(err.contains("prompt format incite-chat") && err.contains("removed: What is my name?"), "{err}");

    let dir = tempfile::tempdir().unwrap();
    let (file, other) = (dir.path().join("talk.json"), dir.path().join("notes.txt"));
    std::fs::write(&other, "keep me").unwrap();
    let save = format!("I like tea.\n/save {}\n", file.display());
    assert_eq!(chat(&["-t", "0"], &save).0, Some(0));
    let (code, out, _) = chat(&["-t", "0", "--json", "--load", file.to_str().unwrap()], "What do I like?\n");
    let json: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, json["text"].as_str(), json["finish"].as_str()), (Some(0), Some("You like tea."), Some("stop")));
    // Other files are not overwritten, and the exit code reports it.
    let (code, _, err) = chat(&[], &format!("/save {}\n", other.display()));
    assert_eq!((code, std::fs::read_to_string(&other).unwrap().as_str()), (Some(1), "keep me"), "{err}");
    assert!(err.contains("notes.txt already exists and is not overwritten"), "{err}");
    let (code, out, err) = chat(&["--system", "Be kind."], "Hello.\n");
    assert_eq!((code, out.as_str()), (Some(1), ""), "{err}");
    assert!(err.contains("does not support a system text"), "{err}");
    let (_, out, _) = chat(&["--formats"], "");
    assert!(out.contains("chatml-shipped") && out.contains("oasst"), "{out}");
}

#[test]
fn generate_applies_a_prompt_format() {
    let ask = |format: &str| {
        let prompt = ["--prompt", "What is the opposite of war?", "-t", "0", "--json", "--prompt-format", format];
        let (code, out, err) = output("generate", &[&["--model", "tiny-chat"], &prompt[..]].concat());
        assert_eq!(code, Some(0), "{err}");
        serde_json::from_str::<Value>(&out).unwrap()
    };
    let json = ask("auto");
    assert_eq!(json["prompt"], "<human>: What is the opposite of war?\n<bot>:");
    assert_eq!(
        (json["text"].as_str(), json["finish"].as_str()),
        (Some(" The opposite of war is peace.\n"), Some("stop"))
    );
    assert_eq!(ask("plain")["prompt"], "What is the opposite of war?");
}

#[test]
fn quantize_writes_and_reports() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tiny.gguf");
    let out = file.to_str().unwrap();
    let text = "tests/data/tiny/held_out.txt";
    let (code, json, err) =
        output("quantize", &["--out", out, "--quantize", "q4_0", "--report", "--text", text, "--json"]);
    assert_eq!(code, Some(0), "{err}");
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["bytes"].as_u64(), Some(file.metadata().unwrap().len()));
    let report = &json["report"];
    let perplexity = |key: &str| report[key].as_f64().unwrap();
    assert!(perplexity("reference_perplexity") < perplexity("perplexity") && perplexity("perplexity") < 40.0, "{json}");
    assert!(report["top_1_agreement"].as_f64().unwrap() > 0.7 && report["tokens"].as_u64().unwrap() > 10_000, "{json}");
    let (code, shown, _) = output("inspect", &[out, "--brief"]);
    assert!(code == Some(0) && shown.contains("GGUF, version 3") && shown.contains("in the file"), "{shown}");
    assert!(shown.contains("  q4_0 ") && shown.contains("4.50 bits per element"), "{shown}");
    // The perplexity equals that of `score`, including the first token.
    let (_, scored, _) = output("score", &["--text", text, "--json"]);
    let scored: Value = serde_json::from_str(&scored).unwrap();
    let (ours, theirs) = (perplexity("reference_perplexity"), scored["perplexity"].as_f64().unwrap());
    assert!((ours / theirs - 1.0).abs() < 1e-5 && report["tokens"] == scored["tokens"], "{ours} {theirs}");
    // Without an output file the same blocks are made in memory.
    let (code, alone, err) = output("quantize", &["--quantize", "q4_0", "--report", "--text", text, "--json"]);
    let alone: Value = serde_json::from_str(&alone).unwrap_or_else(|_| panic!("{err}"));
    let off = alone["report"]["perplexity"].as_f64().unwrap() / perplexity("perplexity") - 1.0;
    assert!(code == Some(0) && off.abs() < 1e-4 && alone["path"].is_null(), "{alone}");
    let (code, said, err) = output("quantize", &["--quantize", "q4_0", "--report"]);
    assert!(code == Some(0) && said.contains("of pricket's README, scored after <|endoftext|>"), "{said} {err}");
    let (code, _, err) = output("quantize", &["--report"]);
    assert!(code == Some(1) && err.contains("--quantize or --dtype"), "{err}");
    let (code, _, err) = output("quantize", &["--out", out, "--quantize", "q4_0"]);
    assert!(code == Some(1) && err.contains("already exists"), "{err}");
    let (code, _, err) = output("quantize", &["--out", dir.path().to_str().unwrap(), "--quantize", "q4_0"]);
    assert!(code == Some(1) && err.contains("a name that ends in .gguf"), "{err}");
    let (code, text, _) = output("generate", &["--quantize", "q8_0", "-t", "0", "-n", "4", "--prompt", "The United"]);
    assert!(code == Some(0) && text.starts_with("The United States"), "{text}");
}

#[test]
fn wrong_arguments_are_one_line() {
    let wrong: [&[&str]; 5] = [
        &["--model", "nowhere"],
        &["--device", "tpu"],
        &["--device", "cuda"],
        &["--threads", "0"],
        &["--revision", "step3"],
    ];
    for args in wrong {
        let (code, out, err) = output("generate", args);
        assert_eq!((code, out.as_str()), (Some(1), ""), "{args:?}");
        assert_eq!(err.trim_end().lines().count(), 1, "{err}");
    }
}

/// Outputs and options are checked before the work starts, and nothing is written.
#[test]
fn outputs_are_checked_before_the_work() {
    let dir = tempfile::tempdir().unwrap();
    let data = root().join("tests/golden/scoring/score-neox-4tasks/data");
    let data = data.to_str().unwrap();
    let cases: [(&str, &[&str], &str); 12] = [
        ("score", &["--tasks", "piqa", "--data", data, "--output", "missing/x.json"], "missing/x.json"),
        ("score", &["-p", "a text", "--output", "x.json"], "--output"),
        ("score", &["--text", "nope.txt"], "nope.txt"),
        ("sweep", &["--plot", "x.txt"], "x.txt: expected a file name that ends in .svg or .png"),
        ("sweep", &["--csv", "missing/x.csv"], "missing/x.csv"),
        ("sweep", &["--out", "."], "not a regular file"),
        ("quantize", &["--out", "missing/x.gguf"], "missing"),
        ("quantize", &["--out", "x.gguf", "--report", "--text", "nope"], "nope"),
        ("generate", &["--threads", "20000"], "expected 1 to 1024"),
        ("generate", &["--file", "x.gguf"], "x.gguf"),
        ("checkpoints", &["norm", "-t", "nope"], "gpt_neox.embed_in.weight"),
        ("checkpoints", &["cards", "pythia-3b"], "EleutherAI/pythia-2.8b"),
    ];
    for (name, args, word) in cases {
        let output = example(name).args(args).current_dir(dir.path()).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{name} {args:?}: {said}");
        assert!(said.contains(word) && said.trim_end().lines().count() == 1, "{name} {args:?}: {said}");
        let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().flatten().map(|entry| entry.file_name()).collect();
        assert!(left.is_empty() || left == ["sweep.jsonl"], "{name} {args:?}: {left:?}");
    }
}

/// Other programs use -1 for no limit.
#[test]
fn minus_one_means_no_limit() {
    let (code, _, err) = output("generate", &["--top-k", "-1", "-n", "-1", "--prompt", "The people", "--seed", "3"]);
    assert_eq!(code, Some(0), "{err}");
}

#[test]
fn the_card_of_a_model_is_known_offline() {
    for name in ["pythia-2.8b", "EleutherAI/pythia-2.8b", "https://huggingface.co/EleutherAI/pythia-2.8b/tree/main"] {
        let (code, out, err) = output("checkpoints", &["cards", name]);
        assert_eq!(code, Some(0), "{err}");
        assert!(out.contains("wrong") && out.contains("good") && out.contains("https://github.com/"), "{out}");
    }
}

/// A closed pipe and a full disk cause no panic.
#[cfg(target_os = "linux")]
#[test]
fn closed_or_full_output_does_not_panic() {
    use std::fs::File;
    use std::process::Stdio;

    let dir = tempfile::tempdir().unwrap();
    let full = || Stdio::from(File::options().write(true).open("/dev/full").unwrap());
    let out = dir.path().join("x.gguf");
    let cases: [(&str, Vec<&str>); 6] = [
        ("chat", vec!["--formats"]),
        ("doctor", vec!["--offline"]),
        ("quantize", vec!["--overwrite", "--out", out.to_str().unwrap()]),
        ("inspect", vec![]),
        ("checkpoints", vec!["list", "tiny"]),
        ("score", vec!["--json"]),
    ];
    for (name, args) in cases {
        // The reading end of the pipe is closed before the program writes.
        let mut command = example(name);
        command.args(&args).current_dir(root()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        drop(child.stdout.take());
        let closed = child.wait_with_output().unwrap();
        let said = String::from_utf8(closed.stderr).unwrap();
        assert!(closed.status.success() && !said.contains("panicked"), "{name}: {said}");
        let status = example(name).args(&args).current_dir(root()).stdout(full()).stderr(full()).status().unwrap();
        assert_eq!(status.code(), Some(1), "{name}: a full disk is an error");
    }
}

#[test]
fn the_doctor_looks_at_every_part_and_says_what_is_broken() {
    let look = |environment: &[(&str, &str)]| {
        let mut command = example("doctor");
        let output = command.args(["--offline", "--json"]).envs(environment.iter().copied()).output().unwrap();
        let lines = String::from_utf8(output.stdout).unwrap();
        let lines: Vec<serde_json::Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        (output.status.code(), lines)
    };
    let (code, lines) = look(&[]);
    assert_eq!(code, Some(0), "{lines:?}");
    let parts: Vec<&str> = lines.iter().filter_map(|line| line["part"].as_str()).collect();
    assert_eq!(parts, ["instructions", "threads", "speed", "memory", "cuda", "metal", "cache", "token", "network"]);
    assert!(lines.iter().all(|line| line["ok"] == true && line["what"].as_str().is_some_and(|what| !what.is_empty())));
    for (variable, value, part) in [
        ("PRICKET_CPU", "mmx", "instructions"),
        ("PRICKET_KERNELS", "maybe", "instructions"),
        ("HF_ENDPOINT", "nowhere", "cache"),
    ] {
        let (code, lines) = look(&[(variable, value)]);
        let broken: Vec<&str> =
            lines.iter().filter(|line| line["ok"] == false).filter_map(|line| line["part"].as_str()).collect();
        assert!(code == Some(1) && broken.contains(&part), "{variable}: {broken:?}");
    }
}

/// Ctrl-C leaves no partial files.
#[cfg(unix)]
#[test]
fn a_conversion_that_is_interrupted_leaves_nothing() {
    use std::process::Stdio;

    let dir = tempfile::tempdir().unwrap();
    let mut quantize = example("quantize");
    quantize.args(["--shape", "410m", "--dtype", "f32", "--out"]).arg(dir.path().join("x.gguf"));
    let mut child = quantize.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let begun = || std::fs::read_dir(dir.path()).unwrap().count() > 0;
    while !begun() && child.try_wait().unwrap().is_none() {
        std::thread::yield_now();
    }
    let signalled = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(signalled.success(), "it ended before it could be interrupted");
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert!(!begun(), "{:?}", std::fs::read_dir(dir.path()).unwrap().flatten().collect::<Vec<_>>());
}

/// A proxy or certificate file that cannot be used is an error. It is never ignored.
#[test]
fn network_environment_variables_are_never_ignored() {
    let home = tempfile::tempdir().unwrap();
    for (name, value, word) in [
        ("ALL_PROXY", "socks5://me:secret@127.0.0.1:9", "socks5"),
        ("HTTPS_PROXY", "socks5h://127.0.0.1:9", "socks5h"),
        ("SSL_CERT_FILE", "/nowhere/own.pem", "/nowhere/own.pem"),
    ] {
        let mut command = example("generate");
        command.args(["--model", "EleutherAI/pythia-14m"]).env("HF_HOME", home.path()).env("HF_HUB_OFFLINE", "0");
        command.env_remove("REQUESTS_CA_BUNDLE").env_remove("CURL_CA_BUNDLE");
        let output = command.env(name, value).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(name) && said.contains(word) && !said.contains("secret"), "{said}");
    }
}

/// The types that the examples and the programs in the docs import need one `use`.
#[test]
fn the_prelude_has_what_the_examples_import() {
    let source = std::fs::read_to_string(root().join("crates/pricket/src/lib.rs")).unwrap();
    let prelude = source.split("pub mod prelude").nth(1).unwrap();
    let has = |name: &str| prelude.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == name);
    // Types that only one kind of program needs, for auditing and for sharing a sweep among machines.
    let rare = ["Audit", "AuditOptions", "Checkpoints", "KnownKind", "Shard", "Converted", "Error"];
    let examples = std::fs::read_dir(root().join("examples")).unwrap().flatten().map(|entry| entry.path());
    let pages = ["README.md", "docs/recipes.md", "docs/interop.md"].map(|page| root().join(page));
    let mut seen = 0;
    for path in examples.filter(|path| path.extension().is_some_and(|end| end == "rs")).chain(pages) {
        let text = std::fs::read_to_string(&path).unwrap();
        for list in
            text.lines().filter_map(|line| line.strip_prefix("use pricket::")).filter(|list| !list.contains("::"))
        {
            let names = list.trim_matches(|c: char| "{};".contains(c)).split(", ");
            for name in names.filter(|name| name.starts_with(char::is_uppercase) && !rare.contains(name)) {
                assert!(has(name), "{}: {name}", path.display());
                seen += 1;
            }
        }
    }
    assert!(seen > 20);
}

/// Messages use the singular for a count of one.
#[test]
fn counts_of_one_use_the_singular() {
    let (_, _, err) = output("score", &["--prompt", "the"]);
    assert!(err.contains("1 token, scored after"), "{err}");
    let (_, _, err) = output("generate", &["--prompt", "the", "-n", "2", "--temperature", "0"]);
    assert!(err.contains("1 token at") && err.contains("ended by the maximum number of tokens"), "{err}");
}

/// Options that are invalid or have no effect, and empty texts.
#[test]
fn invalid_options_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("empty.txt"), "").unwrap();
    std::fs::write(dir.path().join("short.txt"), "The people").unwrap();
    let zero =
        "task: zero\noutput_type: loglikelihood\ntest_split: test\nnum_fewshot: 0\ndoc_to_text: a\ndoc_to_target: b";
    std::fs::write(dir.path().join("zero.yaml"), zero).unwrap();
    let data = root().join("tests/golden/scoring/score-neox-4tasks/data");
    let data = data.to_str().unwrap();
    let cases: &[(&str, &[&str], &str)] = &[
        ("score", &["--text", "empty.txt"], "--text: expected at least one token"),
        ("score", &["--prompt", ""], "the text has no tokens"),
        ("bench", &["--shape", "14m", "--file", "x.gguf"], "revision or file: the model has no revisions or files"),
        ("bench", &["--shape", "14m", "--revision", "step1"], "revision or file: the model has no revisions or files"),
        ("score", &["--tasks", "piqa,piqa", "--data", data], "two tasks named piqa"),
        ("score", &["--tasks", "piqa", "--data", data, "--num-fewshot", "2,2"], "a number twice"),
        ("score", &["--tasks", "zero.yaml", "--num-fewshot", "0,2"], "zero takes no examples"),
        ("score", &["--tasks", "piqa", "--data", data, "--stride", "5"], "--stride applies to whole texts only"),
        ("score", &["--text", "short.txt", "--fewshot-seed", "7"], "--fewshot-seed requires --tasks"),
        ("score", &["--text", "short.txt", "--bootstrap-iters", "5"], "--bootstrap-iters requires"),
        ("sweep", &["--text", "short.txt,./short.txt"], "two measures have the metric short/loss"),
        ("sweep", &["--tasks", "piqa", "--data", data, "--stride", "5"], "stride only affects whole texts"),
        ("generate", &["--temperature", "0", "--top-k", "5"], "top_k has no effect at temperature 0"),
        ("generate", &["--temperature", "0", "--top-p", "0.9"], "top_p has no effect at temperature 0"),
        ("score", &["--tasks", "piqa", "--data", data, "--limit", "0"], "expected a number of documents"),
        ("score", &["--tasks", "README.md"], "unknown task"),
        ("score", &["--tasks", "nowhere.yaml"], "nowhere.yaml: No such file"),
        ("score", &["--text", "short.txt", "--max-length", "0"], "max_length: expected at least 1, found 0"),
        ("score", &["--text", "short.txt", "--batch-tokens", "0"], "batch_tokens: expected at least 1"),
        ("score", &["--text", "short.txt", "--stride", "513"], "stride: expected 1 to 512, found 513"),
        (
            "score",
            &["--text", "short.txt", "--max-length", "513"],
            "513 positions asked for, the model was trained for 512",
        ),
        ("score", &["--prompt", "a", "--limit", "3"], "--tasks"),
        ("score", &["--prompt", "a", "--num-fewshot", "3"], "--tasks"),
        ("sweep", &["--limit", "0.5"], "--tasks"),
        ("quantize", &["--report", "--quantize", "q4_0", "--text", "empty.txt"], "at least one token"),
        ("quantize", &["--quantize", "q4_0"], "--out"),
    ];
    for (name, args, word) in cases {
        let output = example(name).args(*args).current_dir(dir.path()).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && said.contains(word), "{name} {args:?}: {said}");
        let table = "|model|revision|metric|value|stderr|\n|---|---|---|---:|---:|\n";
        assert!(output.stdout.is_empty() || output.stdout == table.as_bytes(), "{name} {args:?}");
    }
    let beyond = ["--text", "short.txt", "--max-length", "513", "--beyond-trained-length"];
    assert!(example("score").args(beyond).current_dir(dir.path()).status().unwrap().success());
}
