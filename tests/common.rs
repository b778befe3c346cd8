//! Helpers of the tests: paths, examples, small random models.

use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, OnceLock};

use pricket::candle::Tensor;
use pricket::convert::{ConvertOptions, Target};
use pricket::weights::Dtype;
use pricket::weights::Random;
use pricket::{Loader, Pricket};
use serde_json::{Value, json};

/// The root of the repository.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The training steps of models/tiny as directories in Hub layout, `stepN` each. The repository holds them as GGUF
/// files. They are converted once and kept in the target directory, under a name that depends on their content.
pub(crate) fn tiny_steps() -> &'static Path {
    static MADE: OnceLock<PathBuf> = OnceLock::new();
    MADE.get_or_init(|| {
        let tiny = root().join("models/tiny");
        let mut files: Vec<PathBuf> =
            std::fs::read_dir(tiny.join("revisions")).unwrap().map(|step| step.unwrap().path()).collect();
        files.sort();
        let mut hasher = std::hash::DefaultHasher::new();
        for step in &files {
            std::fs::read(step.join("model.gguf")).unwrap().hash(&mut hasher);
        }
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let made = folder.join(format!("tiny-steps-{:016x}", hasher.finish()));
        if made.is_dir() {
            return made;
        }
        std::fs::create_dir_all(folder).unwrap();
        let making = tempfile::tempdir_in(folder).unwrap();
        for step in &files {
            let out = making.path().join(step.file_name().unwrap());
            let options = ConvertOptions { target: Target::F16, ..ConvertOptions::default() };
            Loader::new(step).convert(&out, &options).unwrap();
            for file in ["config.json", "generation_config.json", "tokenizer.json"] {
                std::fs::copy(tiny.join(file), out.join(file)).unwrap();
            }
        }
        // Another process may have created it in the meantime.
        if std::fs::rename(making.path(), &made).is_ok() {
            let _ = making.keep();
        }
        assert!(made.is_dir());
        made
    })
}

/// A built example. `cargo test` builds all examples, `cargo test --test tests` builds none.
pub(crate) fn example(name: &str) -> Command {
    let deps = std::env::current_exe().expect("the test knows itself");
    let target = deps.parent().and_then(Path::parent).expect("target/PROFILE/deps/TEST");
    let file = target.join("examples").join(format!("{name}{}", std::env::consts::EXE_SUFFIX));
    if !file.is_file() {
        let status = Command::new(env!("CARGO")).args(["build", "--example", name]).current_dir(root()).status();
        assert!(status.is_ok_and(|status| status.success()), "example {name} does not build");
    }
    Command::new(file)
}

/// A small GPT-NeoX configuration with `changes` applied.
pub(crate) fn small_config(changes: &Value) -> Value {
    if changes["model_type"].is_string() && changes["vocab_size"].is_number() {
        // `changes` is a complete configuration.
        return changes.clone();
    }
    let mut config = json!({
        "model_type": "gpt_neox", "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
        "intermediate_size": 40, "hidden_act": "gelu", "max_position_embeddings": 96, "rotary_pct": 0.5, "eos_token_id": 0,
    });
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    config
}

/// A model with random weights of that configuration, which may be of a toy family.
pub(crate) fn small(changes: &Value, seed: u64) -> Pricket {
    small_loader(changes, seed).load().unwrap()
}

/// A loader of that model.
pub(crate) fn small_loader(changes: &Value, seed: u64) -> Loader {
    pricket::loading::add_family(pricket_toys::GATED);
    pricket::loading::add_family(pricket_toys::RECURRENT);
    Loader::from_store(small_config(changes), Arc::new(Random::new(Dtype::F32, seed))).threads(2)
}

/// Largest absolute difference of two tensors.
pub(crate) fn worst(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.dims(), b.dims());
    (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

/// The directories in `dir` that contain `file`, sorted.
pub(crate) fn directories_with(dir: &Path, file: &str) -> Vec<PathBuf> {
    let mut out: Vec<PathBuf> = std::fs::read_dir(dir).unwrap().flatten().map(|entry| entry.path()).collect();
    out.retain(|path| path.join(file).is_file());
    out.sort();
    out
}

/// All files below `dir`, sorted.
pub(crate) fn files(dir: &Path) -> Vec<PathBuf> {
    let mut out = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() { out.extend(files(&path)) } else { out.push(path) }
    }
    out.sort();
    out
}
