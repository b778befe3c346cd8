use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use crate::common::{files, root};

/// Which crate may use which; the same table stands in crates/README.md.
const ALLOWED: [(&str, &[&str]); 10] = [
    ("pricket-hub", &[]),
    ("pricket-testhub", &[]),
    ("pricket-weights", &["pricket-kernels"]),
    ("pricket-kernels", &[]),
    ("pricket-nn", &["pricket-weights", "pricket-kernels"]),
    ("pricket-gpt-neox", &["pricket-nn"]),
    ("pricket-mpt", &["pricket-nn"]),
    ("pricket-redpajama-incite", &["pricket-gpt-neox", "pricket-nn"]),
    ("pricket-lm", &["pricket-nn"]),
    (
        "pricket",
        &[
            "pricket-hub",
            "pricket-weights",
            "pricket-nn",
            "pricket-gpt-neox",
            "pricket-mpt",
            "pricket-redpajama-incite",
            "pricket-lm",
        ],
    ),
];

fn metadata() -> serde_json::Value {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn crates_use_only_what_the_architecture_allows() {
    let allowed: BTreeMap<&str, BTreeSet<&str>> =
        ALLOWED.iter().map(|(c, uses)| (*c, uses.iter().copied().collect())).collect();
    let metadata = metadata();
    for package in metadata["packages"].as_array().unwrap() {
        let name = package["name"].as_str().unwrap();
        let allowed = allowed.get(name).unwrap_or_else(|| panic!("{name} is not in the table of the architecture"));
        for dependency in package["dependencies"].as_array().unwrap() {
            let uses = dependency["name"].as_str().unwrap();
            // Tests may look further.
            assert!(!(name == "pricket-hub" && uses.starts_with("candle")), "the hub knows no tensors");
            if uses.starts_with("pricket") && dependency["kind"] != "dev" {
                assert!(allowed.contains(uses), "{name} must not use {uses}");
            }
        }
    }
}

/// Source lines of a crate, tests and comments left out.
fn code(krate: &str) -> Vec<(String, String)> {
    let mut out = Vec::new();
    for path in files(&root().join("crates").join(krate).join("src")) {
        let text = std::fs::read_to_string(&path).unwrap();
        let text = text.split("#[cfg(test)]").next().unwrap();
        for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim_start().starts_with("//")) {
            out.push((format!("{}:{}", path.display(), i + 1), line.to_owned()));
        }
    }
    out
}

fn refuse(krate: &str, words: &[&str]) {
    for (place, line) in code(krate) {
        for word in words {
            assert!(!line.contains(word), "{place} mentions {word}: {line}");
        }
    }
}

#[test]
fn families_know_no_device_type_feature_or_cache() {
    for family in ["pricket-gpt-neox", "pricket-mpt", "pricket-redpajama-incite"] {
        refuse(family, &["cfg(feature", "Device::", "to_dtype", "DType", "uantis", "uantiz", "Cache"]);
        // What files call its tensors and keys are tables beside it.
        let is_table = |place: &str| place.contains("formats.rs") || place.contains("names.rs");
        // Lists of keys, with nothing else in them, are as long as other programs made them.
        let lines = code(family).into_iter().filter(|(place, _)| !place.contains("keys.rs"));
        let (tables, code): (Vec<_>, Vec<_>) = lines.partition(|(place, _)| is_table(place));
        let (tables, lines) = (tables.len(), code.len());
        assert!(
            lines < 300 && tables < 160,
            "{family}: {lines} lines, {tables} in tables; a family is config and block"
        );
    }
}

#[test]
fn shared_crates_name_no_family() {
    for krate in ["pricket-weights", "pricket-kernels", "pricket-nn", "pricket-lm"] {
        refuse(krate, &["neox", "NeoX", "pythia", "Pythia", "\"mpt", "Mpt", "MPT"]);
    }
}

#[test]
fn fused_operations_are_called_in_one_file() {
    for (place, line) in code("pricket-nn") {
        let fused = ["candle_nn::ops", "pricket_kernels", "rotary_emb"].iter().any(|word| line.contains(word));
        assert!(!fused || place.contains("ops.rs"), "{place}: {line}");
    }
}

#[test]
fn public_handles_are_owned() {
    for file in ["handle.rs", "load.rs", "memory.rs"] {
        let text = std::fs::read_to_string(root().join("crates/pricket/src").join(file)).unwrap();
        for line in text.lines() {
            let public = line.starts_with("pub struct") || line.starts_with("pub enum");
            assert!(!(public && line.contains("<'")), "{file}: a notebook cannot keep a borrowed handle: {line}");
            assert!(!line.contains("async fn"), "{file}: {line}");
        }
    }
}
