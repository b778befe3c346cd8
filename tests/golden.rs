//! Golden cases: outputs of the original implementations.

use std::path::PathBuf;

use pricket::candle::Device;
use pricket::loading::Precision;
use sha2::{Digest, Sha256};

use crate::common::{directories_with, files, root};

#[path = "../examples/parity/cases.rs"]
mod cases;

/// All cases run on the CPU, with weights as stored.
const CPU: cases::Setup = cases::Setup { device: Device::Cpu, precision: Precision::Auto };

fn golden() -> PathBuf {
    root().join("tests/golden")
}

#[test]
fn golden_data_matches_its_checksums() {
    let sums = std::fs::read_to_string(golden().join("SHA256SUMS")).unwrap();
    let mut listed = 0;
    for line in sums.lines() {
        let (sum, file) = line.split_once("  ./").unwrap();
        let found = Sha256::digest(std::fs::read(golden().join(file)).unwrap());
        assert_eq!(cases::hex(&found), sum, "{file} was changed");
        listed += 1;
    }
    let is_data = |path: &PathBuf| !path.ends_with("SHA256SUMS") && !path.is_symlink();
    let present = files(&golden()).into_iter().filter(is_data).count();
    assert_eq!(present, listed, "every file below tests/golden has a checksum");
}

#[test]
fn every_golden_case_passes() {
    let mut cases = directories_with(&golden().join("models"), "case.json");
    cases.extend(directories_with(&golden().join("files"), "case.json"));
    cases.extend(directories_with(&golden().join("scoring"), "case.json"));
    cases.extend(directories_with(&golden().join("training"), "case.json"));
    cases.extend(directories_with(&golden().join("text"), "case.json"));
    assert!(cases.len() >= 107, "{} cases", cases.len());
    let failures: Vec<String> = cases
        .iter()
        .map(|case| cases::run(case, &CPU))
        .filter(|outcome| !outcome.ok)
        .map(|outcome| outcome.to_json().to_string())
        .collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn positions_missing_from_the_configuration_come_from_the_checkpoint() {
    let (from, silent) = (golden().join("models/mpt-wpe"), tempfile::tempdir().unwrap());
    for file in files(&from) {
        std::fs::copy(&file, silent.path().join(file.file_name().unwrap())).unwrap();
    }
    let path = silent.path().join("config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["attn_config"].as_object_mut().unwrap().remove("alibi").unwrap();
    std::fs::write(&path, config.to_string()).unwrap();

    let outcome = cases::run(silent.path(), &CPU);
    assert!(outcome.ok, "{}", outcome.to_json());
    let (said, meant) = (pricket::inspect(silent.path()).unwrap(), pricket::inspect(&from).unwrap());
    let (said_info, meant_info) = (said.info.unwrap(), meant.info.unwrap());
    assert_eq!((said_info.context, said_info.parameters), (meant_info.context, meant_info.parameters));
    assert_eq!(said.warnings, meant.warnings);
}

/// Vectors for the tokenizer of models/tiny, made with the reference implementation by tools/tokenizer_vectors.py.
#[test]
fn the_tiny_tokenizer_matches_the_reference() {
    let outcome = cases::run(&root().join("tests/data/tokenizer-tiny"), &CPU);
    assert!(outcome.ok, "{}", outcome.to_json());
}

/// The tokenizer file is not part of this repository. PRICKET_GOLDEN_TEXT names a directory with it and its vectors.
#[test]
fn the_20b_tokenizer_matches_the_reference() {
    let beside = root().join("../shared/golden/text");
    let dir = std::env::var_os("PRICKET_GOLDEN_TEXT").map(PathBuf::from).or(beside.is_dir().then_some(beside));
    let Some(dir) = dir else {
        eprintln!("not run: PRICKET_GOLDEN_TEXT is not set");
        return;
    };
    let outcome = cases::run(&dir, &CPU);
    assert!(outcome.ok, "{}", outcome.to_json());
}

#[test]
fn an_unknown_case_fails() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("case.json"), "{}").unwrap();
    assert!(!cases::run(dir.path(), &CPU).ok);
}

/// The comparison can fail: one expected value is changed by slightly more than the tolerance.
#[test]
fn a_wrong_answer_is_noticed() {
    let case = golden().join("models/neox-tied");
    let dir = tempfile::tempdir().unwrap();
    for file in ["case.json", "config.json", "model.safetensors"] {
        std::fs::copy(case.join(file), dir.path().join(file)).unwrap();
    }
    let mut expected = pricket::candle::safetensors::load(case.join("expected.safetensors"), &Device::Cpu).unwrap();
    for name in ["logits", "hidden", "final_norm", "nll"] {
        let right = expected[name].clone();
        expected.insert(name.into(), (&right + 2e-4).unwrap());
        pricket::candle::safetensors::save(&expected, dir.path().join("expected.safetensors")).unwrap();
        assert!(!cases::run(dir.path(), &CPU).ok, "{name}");
        expected.insert(name.into(), right);
    }
    pricket::candle::safetensors::save(&expected, dir.path().join("expected.safetensors")).unwrap();
    assert!(cases::run(dir.path(), &CPU).ok);
}
