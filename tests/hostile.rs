use std::path::{Path, PathBuf};

use proptest::prelude::*;
use serde_json::Value;

use crate::common::{example, root};

fn bad_cases() -> Vec<PathBuf> {
    let mut dirs: Vec<PathBuf> = std::fs::read_dir(root().join("tests/golden/models/bad"))
        .unwrap()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.join("config.json").is_file())
        .collect();
    dirs.sort();
    assert!(dirs.len() >= 17);
    dirs
}

/// Runs an example with 200 MB of address space beyond what the program itself maps, and gives its single line.
fn refuse(program: &str, dir: &Path) -> String {
    let mut command = example(program);
    command.arg("--model").arg(dir).arg("--json");
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{program} {}: {stderr}", dir.display());
    assert!(output.stdout.is_empty(), "{program} {} wrote something", dir.display());
    assert!(!stderr.contains("panicked"), "{stderr}");
    assert_eq!(stderr.trim_end().lines().count(), 1, "one clear line, not: {stderr}");
    stderr
}

#[test]
fn bad_checkpoints_get_one_clear_line_and_exit_code_1() {
    let marker = Path::new("/tmp/golden_pickle_was_executed");
    for dir in bad_cases() {
        let case: Value = serde_json::from_slice(&std::fs::read(dir.join("case.json")).unwrap()).unwrap();
        for program in ["generate", "inspect"] {
            let line = refuse(program, &dir);
            for name in case["error_should_name"].as_array().unwrap() {
                let name = name.as_str().unwrap();
                let named = match name {
                    "the offending name" => line.contains("../"),
                    name if name.contains("posix system") => {
                        line.contains("posix system") || line.contains("os.system")
                    }
                    name if name.contains("expected") => line.contains("[48, 16]") && line.contains("[16, 48]"),
                    name => line.contains(name),
                };
                assert!(named, "{}: {name} is not named in: {line}", dir.display());
            }
        }
        assert!(!marker.exists(), "{}: code of the file was executed", dir.display());
    }
}

/// In a child of its own, whose peak is its own: the test runs itself once more for each case.
#[cfg(target_os = "linux")]
#[test]
fn bad_checkpoints_cost_little_memory() {
    for dir in bad_cases() {
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "hostile::child_loads_a_bad_checkpoint", "--nocapture"])
            .env("PRICKET_BAD_CHECKPOINT", &dir)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let peak = text
            .split("PEAK ")
            .nth(1)
            .and_then(|rest| rest.split_whitespace().next())
            .and_then(|n| n.parse::<u64>().ok());
        let peak = peak.unwrap_or_else(|| panic!("{}: {text}", dir.display()));
        assert!(peak < 200 << 20, "{}: {peak} bytes at the peak", dir.display());
    }
}

#[cfg(target_os = "linux")]
#[test]
fn child_loads_a_bad_checkpoint() {
    let Some(dir) = std::env::var_os("PRICKET_BAD_CHECKPOINT") else { return };
    assert!(pricket::load(&dir).is_err());
    println!("PEAK {}", crate::memory::peak_rss());
}

/// A directory with the configuration of a golden case and `weights` under `name`.
fn with_weights(case: &str, name: &str, weights: &[u8]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let config = root().join("tests/golden/models").join(case).join("config.json");
    std::fs::copy(config, dir.path().join("config.json")).unwrap();
    std::fs::write(dir.path().join(name), weights).unwrap();
    dir
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    /// Any byte of a file may be wrong and the file may end anywhere: an error or a model, never a panic.
    #[test]
    fn damaged_files_are_read_or_refused(
        torch: bool,
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        near_the_end: bool,
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let (case, name) = if torch { ("neox-sequential-rot100", "pytorch_model.bin") } else { ("neox-tied", "model.safetensors") };
        let mut bytes = std::fs::read(root().join("tests/golden/models").join(case).join(name)).unwrap();
        let headers = 6000.min(bytes.len());
        for (at, value) in flips {
            // Headers are where damage matters: a pickle's at the beginning, a zip's at the end.
            let at = at.index(headers);
            let at = if near_the_end { bytes.len() - 1 - at } else { at };
            bytes[at] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        let dir = with_weights(case, name, &bytes);
        if let Err(e) = pricket::load(dir.path()) {
            let line = e.to_string();
            prop_assert!(line.contains(name), "the file is not named: {line}");
        }
    }
}

#[test]
fn files_of_other_kinds_are_refused_by_name() {
    let legacy: Vec<u8> = [&b"tjgg"[..], &[0; 60]].concat();
    let kinds: [(&str, &[u8], &str); 5] = [
        ("model.safetensors", b"", "empty"),
        ("pytorch_model.bin", &legacy, "legacy GGML"),
        ("pytorch_model.bin", b"GGUF\x03\0\0\0 and so on", "GGUF"),
        ("pytorch_model.bin", b"<html>404</html>", "not a weight file"),
        ("layer_00-model_00-model_states.pt", b"anything", "DeepSpeed"),
    ];
    for (name, bytes, word) in kinds {
        let dir = with_weights("neox-tied", name, bytes);
        let line = pricket::load(dir.path()).unwrap_err().to_string();
        assert!(line.contains(word) && line.contains(name), "{line}");
    }
}

#[test]
fn a_missing_tokenizer_or_configuration_is_named() {
    let empty = tempfile::tempdir().unwrap();
    assert!(pricket::load(empty.path()).unwrap_err().to_string().contains("config.json"));
    let dir = with_weights("neox-tied", "nothing.txt", b"");
    assert!(pricket::load(dir.path()).unwrap_err().to_string().contains("model.safetensors"));
    let model = pricket::load(root().join("tests/golden/models/neox-tied")).unwrap();
    assert!(model.encode("text").unwrap_err().to_string().contains("tokenizer.json"));
}

#[test]
fn a_broken_tokenizer_is_named() {
    let dir = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(root().join("models/tiny").join(file), dir.path().join(file)).unwrap();
    }
    for text in ["", "{}", "{\"model\": 3}", "not json"] {
        std::fs::write(dir.path().join("tokenizer.json"), text).unwrap();
        let line = pricket::load(dir.path()).unwrap_err().to_string();
        assert!(line.contains("tokenizer.json"), "{line}");
    }
}
