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
fn generate_speaks_json() {
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
fn parity_says_how_far_off_and_fails_when_something_is() {
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

#[test]
fn bench_measures_random_weights() {
    let args = ["--shape", "14m", "--prefill", "16", "--decode", "8", "--new-tokens", "4", "--runs", "1", "--json"];
    let (code, out, err) = output("bench", &args);
    assert_eq!(code, Some(0), "{err}");
    let json: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(json["parameters"], 14_067_712);
    assert!(json["rows"].as_array().unwrap().iter().all(|row| row["tokens_per_second"].as_f64().unwrap() > 0.0));
}

/// What the program writes when `lines` are its input.
fn chat(args: &[&str], lines: &str) -> (Option<i32>, String, String) {
    use std::io::Write;
    use std::process::Stdio;

    let mut command = example("chat");
    command.args(args).current_dir(root()).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // A program that has ended does not read on.
    let _ = child.stdin.take().unwrap().write_all(lines.as_bytes());
    let output = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn chat_talks_and_obeys() {
    let (code, out, err) = chat(
        &["-t", "0"],
        "My name is Rose.\n\nWhat is \\\nmy name?\nWhat is my name?\n/undo\n/reset\nWhat is my name?\n/quit\nHello.\n",
    );
    assert_eq!(code, Some(0), "{err}");
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!((lines[0], lines[2]), ("Hello, Rose!", "Your name is Rose."), "{out}");
    assert_eq!((lines[3], lines.len()), ("You have not told me your name.", 4), "{out}");
    assert!(err.contains("prompt format incite-chat") && err.contains("taken back: What is my name?"), "{err}");

    let dir = tempfile::tempdir().unwrap();
    let (file, other) = (dir.path().join("talk.json"), dir.path().join("notes.txt"));
    std::fs::write(&other, "keep me").unwrap();
    let save = format!("I like tea.\n/save {}\n", file.display());
    assert_eq!(chat(&["-t", "0"], &save).0, Some(0));
    let (code, out, _) = chat(&["-t", "0", "--json", "--load", file.to_str().unwrap()], "What do I like?\n");
    let json: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, json["text"].as_str(), json["finish"].as_str()), (Some(0), Some("You like tea."), Some("stop")));
    // Nothing else is written over, and a script learns of it.
    let (code, _, err) = chat(&[], &format!("/save {}\n", other.display()));
    assert_eq!((code, std::fs::read_to_string(&other).unwrap().as_str()), (Some(1), "keep me"), "{err}");
    assert!(err.contains("notes.txt is there and is not overwritten"), "{err}");
    let (code, out, err) = chat(&["--system", "Be kind."], "Hello.\n");
    assert_eq!((code, out.as_str()), (Some(1), ""), "{err}");
    assert!(err.contains("no place for a system text"), "{err}");
    let (_, out, _) = chat(&["--formats"], "");
    assert!(out.contains("chatml-shipped") && out.contains("oasst"), "{out}");
}

#[test]
fn generate_asks_in_a_prompt_format() {
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
    assert!(code == Some(0) && shown.contains("GGUF, version 3") && shown.contains("its own"), "{shown}");
    let (code, _, err) = output("quantize", &["--out", out, "--quantize", "q4_0"]);
    assert!(code == Some(1) && err.contains("is there already"), "{err}");
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
