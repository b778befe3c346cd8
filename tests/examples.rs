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
