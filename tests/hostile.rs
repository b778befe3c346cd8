//! Damaged and malicious files.

use std::path::{Path, PathBuf};

use proptest::prelude::*;
use serde_json::Value;

use crate::common::{directories_with, example, root};

fn bad_cases() -> Vec<PathBuf> {
    let dirs = directories_with(&root().join("tests/golden/models/bad"), "config.json");
    assert!(dirs.len() >= 17);
    dirs
}

/// Runs an example on a bad checkpoint and returns its single line of output.
fn refuse(program: &str, dir: &Path) -> String {
    let mut command = example(program);
    command.arg("--model").arg(dir).arg("--json");
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{program} {}: {stderr}", dir.display());
    assert!(output.stdout.is_empty(), "{program} {} wrote something", dir.display());
    assert!(!stderr.contains("panicked"), "{stderr}");
    assert_eq!(stderr.trim_end().lines().count(), 1, "one clear line, not: {stderr}");
    assert!(stderr.len() < 2000, "{} bytes of it", stderr.len());
    // A chain of causes that repeats itself would read "A: A".
    let said = stderr.trim_end().trim_start_matches("error: ");
    let half = said.len() / 2;
    assert!(said.get(..half.saturating_sub(1)) != said.get(half + 1..), "said twice: {stderr}");
    stderr
}

#[test]
fn bad_checkpoints_get_one_clear_line_and_exit_code_1() {
    let marker = Path::new("/tmp/golden_pickle_was_executed");
    // A program that unpickles the case creates this file.
    let _ = std::fs::remove_file(marker);
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
    let more = more_bad_checkpoints();
    assert!(more.len() > 40, "{}", more.len());
    for dir in &more {
        refuse("inspect", dir.path());
    }
}

/// Each case runs in a child process of its own, which measures its own peak memory.
#[cfg(target_os = "linux")]
#[test]
fn bad_checkpoints_cost_little_memory() {
    let more = more_bad_checkpoints();
    let more = more.iter().map(|dir| dir.path().to_owned());
    for dir in bad_cases().into_iter().chain(more) {
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "hostile::child_loads_a_bad_checkpoint", "--nocapture"])
            .env("PRICKET_BAD_CHECKPOINT", &dir)
            .output()
            .unwrap();
        let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        let peak = text.split("PEAK ").nth(1).and_then(|rest| rest.split_whitespace().next());
        let peak =
            peak.and_then(|n| n.parse::<u64>().ok()).unwrap_or_else(|| panic!("{}: {text}{errors}", dir.display()));
        assert!(peak < 200 << 20, "{}: {peak} bytes at the peak", dir.display());
    }
}

#[cfg(target_os = "linux")]
#[test]
fn child_loads_a_bad_checkpoint() {
    let Some(dir) = std::env::var_os("PRICKET_BAD_CHECKPOINT") else { return };
    let dir = std::path::PathBuf::from(dir);
    for line in [pricket::load(&dir).unwrap_err().to_string(), pricket::inspect(&dir).unwrap_err().to_string()] {
        assert!(line.len() < 2000, "{} bytes of message", line.len());
        assert!(!line.contains('\n'), "{line}");
        let names = |name: &str| line.contains(name);
        assert!(
            ["config.json", "safetensors", ".bin", "tokenizer.json"].into_iter().any(names),
            "no file is named: {line}"
        );
    }
    println!("PEAK {}", crate::memory::peak_rss());
}

fn safetensors_bytes(header: &str, data: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; data]].concat()
}

/// A PyTorch zip file around a given pickle.
fn torch_zip(pickle: &[u8]) -> Vec<u8> {
    use std::io::Write;
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let stored = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    zip.start_file("archive/data.pkl", stored).unwrap();
    zip.write_all(pickle).unwrap();
    zip.finish().unwrap().into_inner()
}

/// A stored zip whose central directory has 300 entries with extra fields of 64 kB.
fn zip_with_large_directory() -> Vec<u8> {
    let local = b"PK\x03\x04\x14\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0a";
    let extra = [0x34u8, 0x12, 0, 0].repeat(16_000);
    let mut central = Vec::new();
    for _ in 0..300 {
        central.extend(b"PK\x01\x02\x14\0\x14\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x01\0");
        central.extend((extra.len() as u16).to_le_bytes());
        central.extend([0; 14]);
        central.push(b'a');
        central.extend(&extra);
    }
    let mut end = b"PK\x05\x06\0\0\0\0".to_vec();
    end.extend(300u16.to_le_bytes().repeat(2));
    end.extend((central.len() as u32).to_le_bytes());
    end.extend((local.len() as u32).to_le_bytes());
    end.extend([0, 0]);
    [&local[..], &central, &end].concat()
}

/// The tokenizer of models/tiny with one section changed, and files without a tokenizer.
fn bad_tokenizers() -> Vec<String> {
    let good = std::fs::read_to_string(root().join("models/tiny/tokenizer.json")).unwrap();
    let good: Value = serde_json::from_str(&good).unwrap();
    let with = |key: &str, section: Value| {
        let mut file = good.clone();
        file[key] = section;
        file.to_string()
    };
    let bpe = |vocab: &str, merges: &str, more: &str| {
        format!(
            r#"{{"version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": null, "post_processor": null,
            "decoder": {{"type": "ByteLevel"}}, "model": {{"type": "BPE", "vocab": {vocab}, "merges": {merges}{more}}}}}"#
        )
    };
    let added = |content: &str| {
        serde_json::json!([{"id": 0, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": true, "special": false}])
    };
    let grow = serde_json::json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaaaa"});
    let raw = |decoder: &str| with("decoder", "HERE".into()).replace("\"HERE\"", decoder);
    vec![
        String::new(),
        "{}".into(),
        r#"{"model": 3}"#.into(),
        "not json".into(),
        bpe(r#"{"a": 0, "b": 1}"#, r#"["a b"]"#, ""),
        bpe(r#"{"a": 0, "b": 1, "ab": 2}"#, r#"["a c"]"#, ""),
        bpe(r#"{"a": 0, "b": 1, "ab": 2}"#, r#"["ab"]"#, ""),
        bpe(r#"{"a": 0, "b": 1, "ab": 2}"#, r#"["a b"]"#, r#", "continuing_subword_prefix": "xxxx""#),
        bpe(r#"{"a": 0, "b": 1, "ab": 2}"#, &format!("[{}]", vec![r#""a b""#; 900_000].join(",")), ""),
        bpe(r#"{"a": 0}"#, &format!("[{}]", vec![r#""""#; 1_900_000].join(",")), ""),
        bpe(r#"{"a": 0, "b": 4294967295}"#, "[]", ""),
        bpe(r#"{"a": -1}"#, "[]", ""),
        with("normalizer", serde_json::json!({"type": "Precompiled", "precompiled_charsmap": "!"})),
        with("normalizer", serde_json::json!({"type": "Precompiled", "precompiled_charsmap": "/////w=="})),
        with("normalizer", serde_json::json!({"type": "Sequence", "normalizers": vec![grow; 8]})),
        with(
            "pre_tokenizer",
            serde_json::json!({"type": "Split", "pattern": {"Regex": "(a*)*b"}, "behavior": "Isolated", "invert": false}),
        ),
        with("post_processor", serde_json::json!({"type": "\u{1}\n"})),
        with("decoder", serde_json::json!({"type": "WordPiece", "prefix": "##", "cleanup": true})),
        with("decoder", Value::Null),
        raw("1e400"),
        raw(&"[".repeat(200)),
        with("added_tokens", added(&"a".repeat(5 << 20))),
        " ".repeat(30 << 20),
    ]
}

/// Defects that the golden cases do not cover.
fn more_bad_checkpoints() -> Vec<tempfile::TempDir> {
    // Eight tensors whose end offsets add up to slightly less than 2^64.
    let huge = (1u64 << 61) - 1;
    let eighths: Vec<String> = (0..8u64)
        .map(|i| {
            format!(r#""t{i}":{{"dtype":"U8","shape":[{huge}],"data_offsets":[{},{}]}}"#, i * huge, (i + 1) * huge)
        })
        .collect();
    let overflow = safetensors_bytes(&format!("{{{}}}", eighths.join(",")), 16);
    let unknown = r#"{"gpt_neox.embed_in.weight":{"dtype":"Q4","shape":[1],"data_offsets":[0,1]}}"#;
    let metadata = safetensors_bytes(&format!(r#"{{"__metadata__":{{"x":"{}"}}}}"#, "y".repeat(8 << 20)), 0);
    // A memoized tuple that is referenced very often, and a name of 16 MB.
    let repeated =
        [&b"\x80\x02ctorch\nSize\nq\x00(K\x01K\x02t\x85q\x01("[..], &b"h\x00h\x01R".repeat(3 << 20)].concat();
    let name = [&b"\x80\x02c"[..], &vec![1; 16 << 20], b"\nsystem\n."].concat();
    let text = [&b"\x80\x04X"[..], &(30u32 << 20).to_le_bytes(), &vec![0xff; 30 << 20], b"q\x00"].concat();
    let stack_global = [&text[..], b"h\x00\x93."].concat();
    let tensor = b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x00tQK\x00K\x00\x85K\x01\x85\x89}tRq\x01";
    let pairs = b"h\x00h\x01s".repeat(100_000);
    let long_key = [&text[..], b"0", tensor, b"0}", &pairs, b"."].concat();
    let keys: Vec<String> = (0..250_000).map(|i| format!(r#""{i}":"""#)).collect();
    let many_keys = format!(r#"{{"__metadata__":{{{}}}}}"#, keys.join(","));
    let ones = vec!["1"; 1_000_000].join(",");
    let many_dims =
        format!(r#"{{"gpt_neox.embed_in.weight":{{"dtype":"F32","shape":[{ones}],"data_offsets":[0,4]}}}}"#);
    let mut dirs = vec![
        with_weights("neox-tied", "model.safetensors", &overflow),
        with_weights("neox-tied", "model.safetensors", &safetensors_bytes(unknown, 1)),
        with_weights("neox-tied", "model.safetensors", &metadata),
        with_weights("neox-tied", "pytorch_model.bin", &torch_zip(&repeated)),
        with_weights("neox-tied", "pytorch_model.bin", &torch_zip(&name)),
        with_weights("neox-tied", "pytorch_model.bin", &torch_zip(b"")),
        // A module name of 30 MB for STACK_GLOBAL that is invalid UTF-8.
        with_weights("neox-tied", "pytorch_model.bin", &torch_zip(&stack_global)),
        // One name of 30 MB as the key of many tensors.
        with_weights("neox-tied", "pytorch_model.bin", &torch_zip(&long_key)),
        // Extra fields of empty records fill the directory of a zip.
        with_weights("neox-tied", "pytorch_model.bin", &zip_with_large_directory()),
        with_weights("neox-tied", "model.safetensors", &safetensors_bytes(&many_keys, 0)),
        with_weights("neox-tied", "model.safetensors", &safetensors_bytes(&many_dims, 4)),
    ];
    let index: Vec<String> = (0..400_000).map(|i| format!(r#""{i}":"""#)).collect();
    dirs.push(with_weights(
        "neox-tied",
        "model.safetensors.index.json",
        format!(r#"{{"weight_map":{{{}}}}}"#, index.join(",")).as_bytes(),
    ));
    for config in [
        "null",
        "[]",
        "3",
        "{",
        "{\"model_type\": \"gpt_neox\"}",
        "{\"model_type\": \"gpt_neox\", \"vocab_size\": 1e400}",
    ] {
        dirs.push(with_weights("neox-tied", "config.json", config.as_bytes()));
    }
    let long_name = format!(r#"{{"weight_map": {{"x": "a\\nb{}"}}}}"#, "z".repeat(1 << 20));
    dirs.push(with_weights("neox-tied", "model.safetensors.index.json", long_name.as_bytes()));
    for tokenizer in bad_tokenizers() {
        let dir = with_weights("neox-tied", "tokenizer.json", tokenizer.as_bytes());
        let case = root().join("tests/golden/models/neox-tied/model.safetensors");
        std::fs::copy(case, dir.path().join("model.safetensors")).unwrap();
        dirs.push(dir);
    }
    let long = format!(r#"{{"model_type": "{}"}}"#, "z".repeat(900_000));
    dirs.push(with_weights("neox-tied", "config.json", long.as_bytes()));
    dirs.push(with_weights("neox-tied", "config.json", &vec![b' '; 40 << 20]));
    dirs
}

/// A tensor of an unsupported type is reported with its type, not as missing.
#[test]
fn a_weight_of_an_unread_type_is_named_with_its_type() {
    let shape = r#""shape":[112,40],"data_offsets":[0,17920]"#;
    let header = format!(r#"{{"gpt_neox.embed_in.weight":{{"dtype":"U32",{shape}}}}}"#);
    let dir = with_weights("neox-tied", "model.safetensors", &safetensors_bytes(&header, 17920));
    let line = pricket::load(dir.path()).unwrap_err().to_string();
    assert!(line.contains("gpt_neox.embed_in.weight") && line.contains("U32"), "{line}");
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
    /// Changed bytes and truncation give an error or a model, never a panic.
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
            // Damage matters most in headers: at the beginning of a pickle, at the end of a zip.
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
        ("pytorch_model.bin", &legacy, "ggjt version 0"),
        ("pytorch_model.bin", b"GGUF\x03\0\0\0 and so on", "truncated: the number of"),
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
    for text in bad_tokenizers() {
        std::fs::write(dir.path().join("tokenizer.json"), text).unwrap();
        let line = pricket::load(dir.path()).unwrap_err().to_string();
        assert!(line.contains("tokenizer.json"), "{line}");
    }
}

/// tests/hostile holds files with one defect each, and a text that each error must contain.
#[test]
fn hostile_files_give_their_expected_errors() {
    let folder = root().join("tests/hostile");
    let errors = std::fs::read(folder.join("errors.json")).unwrap();
    let errors: std::collections::BTreeMap<String, String> = serde_json::from_slice(&errors).unwrap();
    let files = crate::common::files(&folder).into_iter().filter(|path| !path.ends_with("errors.json"));
    assert_eq!(files.count(), errors.len(), "every file has an error");
    for (name, words) in errors {
        let path = folder.join(&name);
        let (loaded, seen) = (pricket::load(&path).map(|_| ()), pricket::inspect(&path).map(|_| ()));
        for result in [loaded, seen] {
            let error = result.expect_err(&name).to_string();
            assert!(error.contains(&words), "{name}: {words:?} is not in {error:?}");
            assert!(error.contains(&name) && error.len() < 1000 && !error.contains('\n'), "{name}: {error}");
        }
    }
    // The examples fail in the same way.
    for name in ["gguf-tensors-overlap.gguf", "ggml-tensor-cut-off.bin"] {
        refuse("inspect", &folder.join(name));
    }
}

/// Golden GGUF and GGML files with changed or missing bytes give an answer or an error, never a panic.
#[test]
fn damaged_containers_never_panic() {
    let files: Vec<Vec<u8>> = crate::common::files(&root().join("tests/golden/files"))
        .into_iter()
        .filter(|path| path.extension().is_some_and(|e| e == "gguf" || e == "bin"))
        .map(|path| std::fs::read(path).unwrap())
        .collect();
    assert!(files.len() >= 20);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("damaged");
    let mut state = 12345u64;
    let mut random = |most: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % most.max(1)
    };
    let (mut opened, mut refused) = (0, 0);
    for file in &files {
        for round in 0..60 {
            let mut bytes = file.clone();
            // Headers are at the beginning, so most of the damage goes there.
            let reach = if round % 3 == 0 { bytes.len() } else { 4000.min(bytes.len()) };
            for _ in 0..=random(4) {
                let at = random(reach);
                bytes[at] = [0, 255, 1, bytes[at] ^ (1 << random(8)), random(256) as u8][random(5)];
            }
            if round % 7 == 0 {
                bytes.truncate(random(bytes.len()));
            }
            std::fs::write(&path, &bytes).unwrap();
            // Only the headers are read, because loading takes as long as a whole model.
            match pricket::inspect(&path) {
                Ok(_) => opened += 1,
                Err(e) => {
                    refused += 1;
                    assert!(e.to_string().len() < 1500, "{e}");
                }
            }
        }
    }
    println!("{opened} opened, {refused} refused");
    assert!(opened > 100 && refused > 100, "{opened} opened, {refused} refused");
}

/// A damaged tokenizer.model gives an error or a working tokenizer.
#[test]
fn damaged_sentencepiece_models_never_panic() {
    let mut state = 7u64;
    let mut random = move |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    let texts = root().join("tests/golden/text");
    let mut answered = 0;
    for case in ["sp-charsmap", "sp-v2-keep-spaces", "sp-no-byte-fallback"] {
        let whole = std::fs::read(texts.join(case).join("tokenizer.model")).unwrap();
        for round in 0..400 {
            let mut bytes = whole.clone();
            match round % 3 {
                0 => bytes.truncate(random(bytes.len())),
                // The end of the file holds the settings and the normalizer.
                1 => (0..3).for_each(|_| bytes[whole.len() - 1 - random(1500.min(whole.len()))] = random(256) as u8),
                _ => (0..8).for_each(|_| bytes[random(whole.len())] ^= 1 << random(8)),
            }
            let Ok(tokenizer) = pricket::lm::Tokenizer::from_files(&[("tokenizer.model", &bytes)], "damaged") else {
                continue;
            };
            let ids = tokenizer.encode_from_start("Anna  had a\n red b\u{e4}ll.\tﬁ </s> \u{1f917}").unwrap();
            assert!(ids.len() < 4096 && ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()));
            let _ = tokenizer.decode(&ids);
            answered += 1;
        }
    }
    assert!(answered > 100, "{answered}");
    // A piece of more than 1,024 bytes is refused.
    let long = [&b"\x0a\x84\x10\x0a\x81\x10"[..], &[b'a'; 2049]].concat();
    let error = pricket::lm::Tokenizer::from_files(&[("tokenizer.model", &long)], "long").unwrap_err().to_string();
    assert!(error.contains("at most 1024"), "{error}");
}
