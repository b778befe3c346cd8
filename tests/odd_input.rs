//! Files of other programs that are easily misread: each loads with the logits of its plain counterpart, or is refused.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pricket::candle::{Device, Tensor};
use pricket::convert::{ConvertOptions, Target};
use pricket::loading::Precision;
use pricket::weights::Dtype;
use pricket::weights::{GgufFile, GgufValue, Outline, Store, Writer, open};
use pricket::{Context, Error, Loader, Pricket};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::common::{example, root, small_config, worst};

/// Tensors by name, with shape and f32 values.
type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

fn mpt_config(changes: &Value) -> Value {
    let mut config = json!({
        "architectures": ["MPTForCausalLM"], "model_type": "mpt", "d_model": 24, "n_heads": 4, "n_layers": 2, "vocab_size": 61,
        "max_seq_len": 96, "expansion_ratio": 2, "no_bias": true, "attn_config": {"alibi": true},
    });
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    config
}

/// Values that differ between tensors, including norms and biases.
fn values(name: &str, n: usize) -> Vec<f32> {
    let mut state = name.bytes().fold(7u64, |state, b| state.wrapping_mul(31).wrapping_add(b.into())) | 1;
    let norm = (name.contains("norm") || name.contains("ln_")) && name.ends_with("weight");
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let x = (state >> 40) as f32 / (1 << 24) as f32 - 0.5;
            if norm { 1.0 + x } else { 0.4 * x }
        })
        .collect()
}

/// The tensors that a configuration needs, with values.
fn tensors(config: &Value) -> Tensors {
    let store = Arc::new(pricket::weights::ShapesOnly::new(Dtype::F32));
    // Loading over shapes alone records the names.
    let _ = Loader::from_store(config.clone(), Arc::clone(&store) as Arc<dyn Store>).load();
    let names = store.names().into_iter();
    names
        .map(|name| {
            let shape = store.entry(&name).unwrap().shape;
            let n = shape.iter().product();
            (name.clone(), (shape, values(&name, n)))
        })
        .collect()
}

fn bytes_of(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn write_safetensors(path: &Path, tensors: &Tensors, metadata: &[(&str, &str)]) {
    let bytes: Vec<(&String, &Vec<usize>, Vec<u8>)> =
        tensors.iter().map(|(name, (shape, values))| (name, shape, bytes_of(values))).collect();
    let views = bytes.iter().map(|(name, shape, bytes)| {
        let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, (*shape).clone(), bytes).unwrap();
        (name.as_str(), view)
    });
    let metadata = metadata.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    safetensors::serialize_to_file(views, Some(metadata), path).unwrap();
}

/// A directory with `config` and `tensors`.
fn directory(config: &Value, tensors: &Tensors) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    write_safetensors(&dir.path().join("model.safetensors"), tensors, &[("format", "pt")]);
    dir
}

fn logits(model: &Pricket) -> Tensor {
    let ids: Vec<u32> = (0..17).map(|i| i * 37 % model.info().vocab as u32).collect();
    let ids = Tensor::new(ids, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let hidden = model.model().hidden(&ids, &mut Context::new()).unwrap();
    model.model().head(&hidden).unwrap()
}

fn load(path: impl AsRef<Path>) -> Pricket {
    let path = path.as_ref();
    Loader::new(path).threads(1).load().unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn error(path: impl AsRef<Path>) -> String {
    Loader::new(path.as_ref()).threads(1).load().expect_err("it is refused").to_string()
}

/// The logits of a configuration with exactly the tensors that it needs.
fn plain(config: &Value) -> Tensor {
    logits(&load(directory(config, &tensors(config))))
}

fn renamed(tensors: &Tensors, name: impl Fn(&str) -> String) -> Tensors {
    tensors.iter().map(|(old, tensor)| (name(old), tensor.clone())).collect()
}

/// GPT-NeoX with an untied head and MPT with a tied one, with the names of embedding and head.
fn families() -> [(Value, &'static str, &'static str); 2] {
    [
        (small_config(&json!({})), "gpt_neox.embed_in.weight", "embed_out.weight"),
        (mpt_config(&json!({})), "transformer.wte.weight", "lm_head.weight"),
    ]
}

// Configuration.

#[test]
fn keys_that_change_the_maths_change_the_logits_or_are_refused() {
    let all = mpt_config(&json!({"norm_eps": 0.05, "attn_config": {"alibi": true, "qk_ln": true}}));
    let (default, native) = (mpt_config(&json!({"attn_config": {"alibi": true, "qk_ln": true}})), {
        let mut config = all.clone();
        config["layer_norm_epsilon"] = json!(0.05);
        config.as_object_mut().unwrap().remove("norm_eps");
        config
    });
    assert!(worst(&plain(&all), &plain(&default)) > 1e-3, "norm_eps is read");
    assert_eq!(worst(&plain(&all), &plain(&native)), 0.0, "under both names");
    // llm-foundry does not apply norm_eps to the norms of queries and keys.
    let mut everywhere = all.clone();
    everywhere["attn_config"]["norm_eps"] = json!(0.05);
    assert!(worst(&plain(&all), &plain(&everywhere)) > 1e-5);

    // If only the fused projection has a bias, the model has all biases and the others are 0.
    let alone = mpt_config(&json!({"attention_bias": true}));
    let mut weights = tensors(&alone);
    assert!(
        weights.contains_key("transformer.blocks.1.attn.Wqkv.bias") && !weights.contains_key("transformer.norm_f.bias")
    );
    let expected = logits(&load(directory(&alone, &weights)));
    let full = mpt_config(&json!({"no_bias": false}));
    for (name, (shape, _)) in tensors(&full) {
        let n = shape.iter().product();
        weights.entry(name).or_insert_with(|| (shape, vec![0.0; n]));
    }
    assert_eq!(worst(&logits(&load(directory(&full, &weights))), &expected), 0.0);
    // The bias survives conversion to GGUF, which has no key for biases.
    let gguf = directory(&alone, &tensors(&alone));
    let file = gguf.path().join("model.gguf");
    Loader::new(gguf.path()).convert(&file, &ConvertOptions::default()).unwrap();
    assert!(worst(&logits(&load(&file)), &expected) < 1e-5);

    // The width of the MLP may be given directly.
    let by_width = mpt_config(&json!({"ffn_config": {"ffn_hidden_size": 48}, "expansion_ratio": 4}));
    assert_eq!(worst(&plain(&by_width), &plain(&mpt_config(&json!({})))), 0.0);

    let refused = [
        ("attn_config", json!({"alibi": true, "attn_logit_softcapping": 30.0}), "attn_config.attn_logit_softcapping"),
        ("final_logit_softcapping", json!(20.0), "final_logit_softcapping"),
        ("block_overrides", json!({"order": [{"name": "default", "repeat": 2}]}), "block_overrides"),
        ("attn_config", json!({"alibi": true, "reuse_kv_layer_idx": 0}), "attn_config.reuse_kv_layer_idx"),
        ("attn_config", json!({"attn_temperature_tuning": {"attn_scale": 0.1}}), "attn_config.attn_temperature_tuning"),
        ("attn_config", json!({"head_dim": 12}), "attn_config.head_dim"),
        ("head_dim", json!(12), "head_dim"),
    ];
    for (key, value, named) in refused {
        let config = mpt_config(&json!({key: value}));
        let dir = directory(&mpt_config(&json!({})), &tensors(&mpt_config(&json!({}))));
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let found = Loader::new(dir.path()).load().expect_err(named);
        assert!(matches!(&found, Error::Refused { key, .. } if key.starts_with(named)), "{named}: {found}");
    }
    // Keys that no version of the class knows give a warning.
    let told =
        load(directory(&mpt_config(&json!({"norm_epz": 1.0, "use_cache": false})), &tensors(&mpt_config(&json!({})))));
    assert!(
        told.notes().iter().any(|note| note.contains("unknown keys") && note.ends_with("norm_epz")),
        "{:?}",
        told.notes()
    );
}

/// docs/formats.md lists the keys of the tables. `PRICKET_WRITE_DOCS=1` rewrites the list.
#[test]
fn the_documented_keys_match_the_tables() {
    use pricket::nn::config::{GENERIC, Keys};
    let tables: [(&str, Keys); 9] = [
        ("transformers' `PretrainedConfig`, which all configurations share", GENERIC),
        ("`GPTNeoXConfig`", pricket_tables::NEOX),
        ("`MPTConfig` of llm-foundry and `MptConfig` of transformers", pricket_tables::MPT),
        ("`MosaicGPTConfig`", pricket_tables::MOSAIC_GPT),
        ("GGUF metadata of `gptneox`, behind `gptneox.`", pricket_tables::NEOX_GGUF),
        ("GGUF metadata of `mpt`, behind `mpt.`", pricket_tables::MPT_GGUF),
        ("`LlamaConfig`", pricket_tables::LLAMA),
        ("GGUF metadata of `llama`, behind `llama.`", pricket_tables::LLAMA_GGUF),
        ("`RwkvConfig`", pricket_tables::RWKV),
    ];
    let mut text = String::from("| class | read | without effect | refused unless |\n|---|---|---|---|\n");
    for (class, keys) in tables {
        let list = |names: &[&str]| names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        let only = keys.only.iter().map(|(key, values)| {
            let values = if values.is_empty() { "null".to_owned() } else { values.join(" or ") };
            format!("`{key}`: `{values}`")
        });
        let only = only.collect::<Vec<_>>().join(", ");
        writeln!(text, "| {class} | {} | {} | {only} |", list(keys.read), list(keys.neutral)).unwrap();
    }
    let path = root().join("docs/formats.md");
    let docs = std::fs::read_to_string(&path).unwrap();
    let (begin, end) = ("<!-- keys -->\n", "<!-- end of keys -->");
    let (before, rest) = docs.split_once(begin).expect("the table has its place");
    let (found, after) = rest.split_once(end).unwrap();
    if std::env::var_os("PRICKET_WRITE_DOCS").is_some() {
        std::fs::write(&path, format!("{before}{begin}{text}{end}{after}")).unwrap();
    } else {
        assert_eq!(found, text, "docs/formats.md is out of date: PRICKET_WRITE_DOCS=1 writes it");
    }
}

/// The tables of the families.
mod pricket_tables {
    pub(super) use pricket_gpt_neox::{GGUF_KEYS as NEOX_GGUF, KEYS as NEOX};
    pub(super) use pricket_llama::{GGUF_KEYS as LLAMA_GGUF, KEYS as LLAMA};
    pub(super) use pricket_mpt::{GGUF_KEYS as MPT_GGUF, KEYS as MPT, MOSAIC_GPT_KEYS as MOSAIC_GPT};
    pub(super) use pricket_rwkv4::KEYS as RWKV;
}

#[test]
fn configurations_written_by_python_are_read() {
    let config = mpt_config(&json!({"attn_config": {"alibi": true, "clip_qkv": null}}));
    let (weights, expected) = (tensors(&config), plain(&config));
    let dir = directory(&config, &weights);
    let write = |text: &str| std::fs::write(dir.path().join("config.json"), text).unwrap();
    let with = |attention: &str, more: &str| {
        let text = config.to_string().replace(r#"{"alibi":true,"clip_qkv":null}"#, attention);
        format!("{},{more}}}", text.strip_suffix('}').unwrap())
    };
    for (attention, more) in [
        (r#"{"alibi":true,"clip_qkv":0}"#, r#""init_std":NaN"#),
        (r#"{"alibi":true,"clip_qkv":false}"#, r#""emb_init_uniform_lim":-Infinity"#),
        (r#"{"alibi":true,"clip_qkv":Infinity}"#, r#""init_config":{"init_gain":[NaN,Infinity]}"#),
        ("null", r#""x":0"#),
    ] {
        write(&with(attention, more));
        assert_eq!(worst(&logits(&load(dir.path())), &expected), 0.0, "{attention}");
    }
    for (more, named) in [
        (r#""norm_eps":NaN"#, "norm_eps"),
        (r#""logit_scale":Infinity"#, "logit_scale"),
        (r#""d_model":NaN"#, "d_model"),
    ] {
        write(&with(r#"{"alibi":true}"#, more));
        assert!(error(dir.path()).contains(named), "{}", error(dir.path()));
    }
    // Without `attn_config` the checkpoint decides about positions.
    let mut silent = config.clone();
    silent["attn_config"] = Value::Null;
    write(&silent.to_string());
    assert_eq!(worst(&logits(&load(dir.path())), &expected), 0.0);
    // The configuration is written again in the form that Python reads.
    write(&with(r#"{"alibi":true}"#, r#""init_std":NaN,"auto_map":{"AutoConfig":"configuration_mpt.MPTConfig"}"#));
    let out = dir.path().join("out");
    Loader::new(dir.path()).convert(&out, &ConvertOptions::default()).unwrap();
    assert!(std::fs::read_to_string(out.join("config.json")).unwrap().contains("\"init_std\": NaN"));
}

#[test]
fn settings_apply_before_the_configuration_is_checked() {
    let whole = small_config(&json!({}));
    let (weights, expected) = (tensors(&whole), plain(&whole));
    let dir = directory(&whole, &weights);
    let mut lacking = whole.clone();
    lacking.as_object_mut().unwrap().remove("intermediate_size");
    std::fs::write(dir.path().join("config.json"), lacking.to_string()).unwrap();
    assert!(error(dir.path()).contains("intermediate_size"));
    let found = Loader::new(dir.path()).set("intermediate_size", 40).threads(1).load().unwrap();
    assert_eq!(worst(&logits(&found), &expected), 0.0);
    for (key, value) in [("intermediate_sizes", json!(40)), ("attn_config.clip_qkv", json!(1)), ("d_model", json!(24))]
    {
        let refused = Loader::new(dir.path()).set("intermediate_size", 40).set(key, value).load().err().unwrap();
        assert!(refused.to_string().contains(key) && matches!(refused, Error::Unknown { .. }), "{refused}");
    }
    // The program gives the same error and writes no file.
    let out = dir.path().join("out");
    let mut command = example("quantize");
    command
        .arg("--model")
        .arg(dir.path())
        // The second flag is the earlier name of the first.
        .args(["--set-config", "intermediate_size=40", "--set", "hidden=3", "--out"])
        .arg(&out);
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("hidden") && !out.exists());
    // Keys of MPT can be set too, inside an object that is missing.
    let mpt = mpt_config(&json!({"attn_config": {"alibi": true, "clip_qkv": 0.01}}));
    let mut lacking = mpt.clone();
    lacking.as_object_mut().unwrap().remove("attn_config");
    let dir = directory(&lacking, &tensors(&mpt));
    let found = Loader::new(dir.path()).set("attn_config.clip_qkv", 0.01).threads(1).load().unwrap();
    assert_eq!(worst(&logits(&found), &plain(&mpt)), 0.0);
}

/// A value of eos_token_id that cannot be a token id gives a warning, because the text would never end.
#[test]
fn invalid_end_tokens_give_a_warning() {
    let config = small_config(&json!({}));
    let weights = tensors(&config);
    for (value, told) in [
        (json!("0"), true),
        (json!({"id": 0}), true),
        (json!([0, "x"]), true),
        (json!(1.5), true),
        (json!(0.0), false),
        (json!([0, null, 1]), false),
        (json!(-1), false),
    ] {
        let model = load(directory(&small_config(&json!({"eos_token_id": value})), &weights));
        assert_eq!(
            model.warnings().iter().any(|w| w.contains("eos_token_id")),
            told,
            "{value}: {:?}",
            model.warnings()
        );
    }
}

// Weight files.

#[test]
fn tied_weights_are_found_under_either_name() {
    for (config, embedding, head) in families() {
        let mut config = config;
        config["tie_word_embeddings"] = json!(true);
        let weights = tensors(&config);
        let expected = plain(&config);
        let other = renamed(&weights, |name| if name == embedding { head.into() } else { name.into() });
        let dir = directory(&config, &other);
        assert_eq!(worst(&logits(&load(dir.path())), &expected), 0.0, "{head} alone");
        // The written file holds the embedding under its own name.
        for (out, name) in [("x.gguf", "token_embd.weight"), ("out", embedding)] {
            let out = dir.path().join(out);
            Loader::new(dir.path()).convert(&out, &ConvertOptions::default()).unwrap();
            assert_eq!(worst(&logits(&load(&out)), &expected), 0.0, "{}", out.display());
            assert!(open(&out).unwrap().entry(name).is_some(), "{name} is not in {}", out.display());
        }
        let mut both = weights.clone();
        both.insert(head.into(), weights[embedding].clone());
        assert_eq!(worst(&logits(&load(directory(&config, &both))), &expected), 0.0, "{head} too");
        // With different values it is unclear which tensor is meant, in loading and in converting.
        both.get_mut(head).unwrap().1[5] += 1.0;
        let dir = directory(&config, &both);
        assert!(error(dir.path()).contains(head), "{}", error(dir.path()));
        assert!(Loader::new(dir.path()).convert(dir.path().join("x.gguf"), &ConvertOptions::default()).is_err());
        let allowed = Loader::new(dir.path()).allow_unused().threads(1).load().unwrap();
        assert_eq!(worst(&logits(&allowed), &expected), 0.0);

        // safetensors' save_model keeps the first name and records the other one, whether or not the configuration ties
        // them.
        for (tied, kept, dropped) in [(true, head, embedding), (false, head, embedding), (false, embedding, head)] {
            config["tie_word_embeddings"] = json!(tied);
            let kept_alone = renamed(&weights, |name| if name == embedding { kept.into() } else { name.into() });
            let dir = directory(&config, &kept_alone);
            write_safetensors(&dir.path().join("model.safetensors"), &kept_alone, &[(dropped, kept), ("format", "pt")]);
            let model = load(dir.path());
            assert!(worst(&logits(&model), &expected) < 1e-6, "{dropped} is {kept}");
            assert!(model.warnings().is_empty(), "{:?}", model.warnings());
            assert!(pricket::inspect(dir.path()).unwrap().warnings.iter().all(|w| w.contains("tokenizer")));
            // Single tensors, possibly on the Hub, are found in the same way.
            let tensors = pricket::suites::tensors(dir.path()).unwrap();
            assert_eq!((tensors.resolve(dropped), tensors.resolve("x")), (kept, "x"));
            assert!(tensors.claims(dropped) && !tensors.claims("x"));
        }
        // An alias of a missing tensor is ignored.
        let dir = directory(&config, &weights);
        let mut without = weights.clone();
        without.remove(embedding);
        write_safetensors(&dir.path().join("model.safetensors"), &without, &[(embedding, "nowhere")]);
        assert!(error(dir.path()).contains("is missing"));
    }
}

#[test]
fn name_prefixes_of_training_wrappers_are_removed() {
    let prefixes = [
        "_orig_mod.",
        "module.",
        "module.module.",
        "model.",
        "model.model.",
        "base_model.model.",
        "pretrained_model.",
        "_fsdp_wrapped_module.",
        "module._orig_mod.",
        "_orig_mod.module.model.",
        "rwtransformer.",
        "transformer.",
    ];
    for (config, embedding, _) in families() {
        let weights = tensors(&config);
        let expected = plain(&config);
        for prefix in prefixes {
            let dir = directory(&config, &renamed(&weights, |name| format!("{prefix}{name}")));
            assert_eq!(worst(&logits(&load(dir.path())), &expected), 0.0, "{prefix}");
        }
        let inside = |name: &str| {
            name.replace(".0.", ".0._checkpoint_wrapped_module.").replace(".1.", ".1._fsdp_wrapped_module.")
        };
        let dir = directory(&config, &renamed(&weights, inside));
        assert_eq!(worst(&logits(&load(dir.path())), &expected), 0.0);
        // Two models in one file are refused.
        let mut two = renamed(&weights, |name| format!("module.{name}"));
        two.extend(weights.clone());
        assert!(error(directory(&config, &two)).contains("does not use"));
        // The error for tensors that fit nowhere gives a name that is in the file.
        let odd = error(directory(&config, &renamed(&weights, |name| format!("student.{name}"))));
        assert!(odd.contains(embedding) && odd.contains(&format!("student.{embedding}")), "{odd}");
    }
}

/// Writes nested dictionaries of tensors and a number as a pickle in the zip format of PyTorch.
fn write_torch(path: &Path, tensors: &Tensors, place: &[&str], beside: &Tensors) {
    use std::io::Write;
    let (mut pickle, mut storages) = (b"\x80\x02".to_vec(), Vec::new());
    let text = |out: &mut Vec<u8>, text: &str| {
        out.push(b'X');
        out.extend((text.len() as u32).to_le_bytes());
        out.extend(text.as_bytes());
    };
    let number = |out: &mut Vec<u8>, n: usize| {
        out.push(b'J');
        out.extend((n as i32).to_le_bytes());
    };
    let mut tensor = |out: &mut Vec<u8>, (shape, values): &(Vec<usize>, Vec<f32>)| {
        out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(out, "storage");
        out.extend(b"ctorch\nFloatStorage\n");
        text(out, &storages.len().to_string());
        text(out, "cpu");
        number(out, values.len());
        out.extend(b"tQ");
        number(out, 0);
        out.push(b'(');
        for &n in shape {
            number(out, n);
        }
        out.extend(b"t(");
        (0..shape.len()).for_each(|i| number(out, shape[i + 1..].iter().product()));
        out.extend(b"t\x89Nt");
        out.push(b'R');
        storages.push(bytes_of(values));
    };
    pickle.push(b'}');
    for (name, value) in beside {
        text(&mut pickle, name);
        tensor(&mut pickle, value);
        pickle.push(b's');
    }
    for key in place {
        text(&mut pickle, key);
        pickle.push(b'}');
    }
    for (name, value) in tensors {
        text(&mut pickle, name);
        tensor(&mut pickle, value);
        pickle.push(b's');
    }
    pickle.extend(vec![b's'; place.len()]);
    pickle.push(b'.');
    let mut zip = zip::ZipWriter::new(std::fs::File::create(path).unwrap());
    let stored = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    zip.start_file("archive/data.pkl", stored).unwrap();
    zip.write_all(&pickle).unwrap();
    for (i, bytes) in storages.iter().enumerate() {
        zip.start_file(format!("archive/data/{i}"), stored).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap();
}

#[test]
fn a_state_dict_is_found_where_training_code_keeps_it() {
    for (config, ..) in families() {
        let (weights, expected) = (tensors(&config), plain(&config));
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let file = dir.path().join("pytorch_model.bin");
        let step: Tensors =
            [("step".to_owned(), (vec![1], vec![3.0])), ("rng_state".to_owned(), (vec![9], vec![0.0; 9]))].into();
        let places: [&[&str]; 7] = [
            &[],
            &["state_dict"],
            &["model_state_dict"],
            &["model"],
            &["module"],
            &["state", "model"],
            &["model", "state_dict"],
        ];
        for place in places {
            for prefix in ["", "module.", "model."] {
                let beside = if place.is_empty() { Tensors::new() } else { step.clone() };
                write_torch(&file, &renamed(&weights, |name| format!("{prefix}{name}")), place, &beside);
                assert_eq!(worst(&logits(&load(dir.path())), &expected), 0.0, "{place:?} {prefix}");
            }
        }
        write_torch(&file, &weights, &["somewhere", "else"], &step);
        let odd = error(dir.path());
        assert!(odd.contains("is missing") && (odd.contains("step") || odd.contains("rng_state")), "{odd}");
    }
}

#[test]
fn shards_need_no_index_and_a_part_alone_is_refused() {
    // The configuration does not mention positions, so they are learned if the checkpoint has a table for them.
    let mut silent = mpt_config(&json!({}));
    silent["attn_config"] = json!({});
    let learned = {
        let mut config = silent.clone();
        config["attn_config"] = json!({"alibi": false});
        config
    };
    let (weights, expected) = (tensors(&learned), plain(&learned));
    let apart = |name: &str| usize::from(name.contains("wpe"));
    for (extension, is_torch) in [("safetensors", false), ("bin", true)] {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), silent.to_string()).unwrap();
        let stem = if is_torch { "pytorch_model" } else { "model" };
        let part = |i: usize| dir.path().join(format!("{stem}-0000{}-of-00002.{extension}", i + 1));
        for i in 0..2 {
            let own: Tensors =
                weights.iter().filter(|(name, _)| apart(name) == i).map(|(n, t)| (n.clone(), t.clone())).collect();
            if is_torch {
                write_torch(&part(i), &own, &[], &Tensors::new());
            } else {
                write_safetensors(&part(i), &own, &[]);
            }
        }
        for path in [dir.path().to_owned(), part(0), part(1)] {
            assert_eq!(worst(&logits(&load(&path)), &expected), 0.0, "{}", path.display());
        }
        // An index may omit a tensor, or list one that was never saved.
        let index = dir.path().join(format!("{stem}.{extension}.index.json"));
        let map = |more: &[&str], fewer: &str| {
            let names = weights.keys().map(String::as_str).chain(more.iter().copied()).filter(|name| *name != fewer);
            let map: serde_json::Map<_, _> =
                names.map(|name| (name.into(), json!(part(apart(name)).file_name().unwrap().to_str()))).collect();
            json!({"metadata": {"total_size": 1}, "weight_map": map}).to_string()
        };
        for (more, fewer) in
            [(&["transformer.blocks.0.attn_bias"][..], ""), (&[], "transformer.blocks.0.norm_1.weight")]
        {
            std::fs::write(&index, map(more, fewer)).unwrap();
            assert_eq!(worst(&logits(&load(dir.path())), &expected), 0.0);
        }
        // A required tensor that the index lists and the files lack is reported with its file. This also holds for the
        // table of positions.
        let without: Tensors =
            weights.iter().filter(|(name, _)| apart(name) == 1).map(|_| ("x".into(), (vec![1], vec![0.0]))).collect();
        if is_torch {
            write_torch(&part(1), &without, &[], &Tensors::new());
        } else {
            write_safetensors(&part(1), &without, &[]);
        }
        std::fs::write(&index, map(&[], "")).unwrap();
        let lacking = error(dir.path());
        assert!(
            lacking.contains("transformer.wpe.weight is missing") && lacking.contains("00002-of-00002"),
            "{lacking}"
        );
        // A part alone is refused, by directory and by file.
        std::fs::remove_file(&index).unwrap();
        std::fs::remove_file(part(1)).unwrap();
        for path in [dir.path().to_owned(), part(0)] {
            assert!(error(&path).contains("00002-of-00002"), "{}", error(&path));
        }
    }
}

/// Splits a GGUF file into two parts. `apart` selects the tensors of the second part.
fn split(file: &Path, into: &Path, apart: impl Fn(&str) -> bool) -> [PathBuf; 2] {
    let whole = GgufFile::open(file).unwrap();
    let metadata: Vec<(String, GgufValue)> = whole
        .metadata()
        .as_object()
        .unwrap()
        .iter()
        .map(|(key, value)| {
            let value = match value {
                Value::Bool(flag) => GgufValue::Bool(*flag),
                Value::String(text) => GgufValue::Text(text.clone()),
                Value::Number(n) => {
                    n.as_u64().map_or(GgufValue::F32(n.as_f64().unwrap() as f32), |n| GgufValue::U32(n as u32))
                }
                other => panic!("{key}: {other}"),
            };
            (key.clone(), value)
        })
        .collect();
    let count = whole.names().len() as u32;
    [0, 1].map(|part| {
        let path = into.join(format!("model-0000{}-of-00002.gguf", part + 1));
        let mut own = if part == 0 { metadata.clone() } else { Vec::new() };
        own.extend(
            [("split.no", part), ("split.count", 2), ("split.tensors.count", count)]
                .map(|(k, n)| (k.into(), GgufValue::U32(n))),
        );
        let names: Vec<String> = whole.names().into_iter().filter(|name| apart(name) == (part == 1)).collect();
        let outline = |name: &String| {
            let entry = whole.entry(name).unwrap();
            Outline { name: name.clone(), dtype: entry.dtype, shape: entry.shape }
        };
        let outlines = names.iter().map(outline).collect();
        let mut writer = Writer::gguf(std::fs::File::create(&path).unwrap(), &own, outlines).unwrap();
        for name in &names {
            writer.write(&whole.bytes(name).unwrap()).unwrap();
        }
        writer.finish().unwrap();
        path
    })
}

#[test]
fn a_split_gguf_file_needs_all_of_its_parts() {
    let neox = small_config(&json!({"attention_bias": true}));
    let mut learned = mpt_config(&json!({}));
    learned["attn_config"] = json!({"alibi": false});
    for (config, last) in [(&neox, "output.weight"), (&neox, "blk.0.attn_qkv.bias"), (&learned, "position_embd.weight")]
    {
        let dir = directory(config, &tensors(config));
        let file = dir.path().join("whole.gguf");
        Loader::new(dir.path()).convert(&file, &ConvertOptions::default()).unwrap();
        let expected = logits(&load(&file));
        let into = dir.path().join("parts");
        std::fs::create_dir(&into).unwrap();
        let parts = split(&file, &into, |name| name == last);
        for path in [&parts[0], &parts[1], &into] {
            assert_eq!(worst(&logits(&load(path)), &expected), 0.0, "{}", path.display());
        }
        assert_eq!(pricket::inspect(&parts[0]).unwrap().tensors.len(), GgufFile::open(&file).unwrap().names().len());
        // A part whose sibling is missing, has another name, or belongs to another file.
        let alone = dir.path().join("alone.gguf");
        std::fs::copy(&parts[0], &alone).unwrap();
        assert!(error(&alone).contains("part 1 of 2"), "{}", error(&alone));
        std::fs::rename(&parts[1], into.join("other.gguf")).unwrap();
        assert!(error(&parts[0]).contains("model-00002-of-00002.gguf"), "{}", error(&parts[0]));
        std::fs::copy(&parts[0], &parts[1]).unwrap();
        assert!(error(&parts[0]).contains("split.no"), "{}", error(&parts[0]));
        // Parts that together hold fewer tensors than they declare.
        split(&file, &into, |name| name == last);
        let smaller = dir.path().join("smaller");
        std::fs::create_dir(&smaller).unwrap();
        split(&file, &smaller, |name| name == last || name.contains("attn_norm"));
        std::fs::copy(smaller.join("model-00001-of-00002.gguf"), &parts[0]).unwrap();
        assert!(error(&parts[1]).contains("split.tensors.count"), "{}", error(&parts[1]));
    }
}

/// Writes a legacy GGML file of MPT: header, words, f32 tensors.
fn write_ggml(path: &Path, config: &Value, tensors: &Tensors) {
    let mut out = b"lmgg".to_vec();
    for key in ["d_model", "max_seq_len", "n_heads", "n_layers", "vocab_size"] {
        out.extend((config[key].as_u64().unwrap() as u32).to_le_bytes());
    }
    out.extend(8f32.to_le_bytes());
    out.extend(0f32.to_le_bytes());
    out.extend(0u32.to_le_bytes());
    for _ in 0..config["vocab_size"].as_u64().unwrap() {
        out.extend([1, 0, 0, 0, b'a']);
    }
    for (name, (shape, values)) in tensors {
        out.extend([shape.len() as u32, name.len() as u32, 0].iter().flat_map(|n| n.to_le_bytes()));
        shape.iter().rev().for_each(|&n| out.extend((n as u32).to_le_bytes()));
        out.extend(name.as_bytes());
        out.extend(bytes_of(values));
    }
    std::fs::write(path, out).unwrap();
}

#[test]
fn a_legacy_file_of_mpt_1b_keeps_its_norms() {
    let mut config = mpt_config(&json!({"attn_config": {"alibi": true, "qk_ln": true}}));
    config["model_type"] = json!("mpt");
    let weights = tensors(&config);
    let expected = plain(&config);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("model.bin");
    let mosaic = [
        ("norm_1", "ln_1"),
        ("norm_2", "ln_2"),
        ("norm_f", "ln_f"),
        ("ffn.up_proj", "mlp.mlp_up"),
        ("ffn.down_proj", "mlp.mlp_down"),
    ];
    let in_mosaic =
        renamed(&weights, |name| mosaic.iter().fold(name.to_owned(), |name, (from, to)| name.replace(from, to)));
    for named in [&weights, &in_mosaic] {
        write_ggml(&file, &config, named);
        let model = load(&file);
        assert_eq!(worst(&logits(&model), &expected), 0.0);
        // The same after conversion to GGUF.
        let gguf = dir.path().join("model.gguf");
        Loader::new(&file).convert(&gguf, &ConvertOptions { overwrite: true, ..Default::default() }).unwrap();
        assert!(worst(&logits(&load(&gguf)), &expected) < 1e-5);
    }
    let without: Tensors = weights.into_iter().filter(|(name, _)| !name.contains("k_ln")).collect();
    write_ggml(&file, &config, &without);
    assert!(error(&file).contains("k_ln"), "{}", error(&file));
}

#[test]
fn a_weight_that_the_configuration_does_not_use_is_an_error() {
    for (mut config, _, head) in families() {
        let (weights, untied) = (tensors(&config), config.clone());
        let expected = plain(&config);
        let block = weights.keys().find(|name| name.contains(".1.") && name.ends_with("weight")).unwrap().clone();
        // A third block, unmerged LoRA weights, a norm of queries.
        for extra in [
            block.replace(".1.", ".2."),
            block.replace(".weight", ".lora_A.default.weight"),
            block.replace("weight", "x.bias"),
        ] {
            let mut more = weights.clone();
            more.insert(extra.clone(), (vec![3], vec![1.0; 3]));
            let dir = directory(&config, &more);
            let found = Loader::new(dir.path()).load().err().unwrap_or_else(|| panic!("{extra} was left out"));
            assert!(matches!(&found, Error::Unused { first, count: 1, .. } if *first == extra), "{found}");
            assert_eq!(found.to_string().contains("LoRA"), extra.contains("lora"), "{found}");
            assert!(Loader::new(dir.path()).convert(dir.path().join("x.gguf"), &ConvertOptions::default()).is_err());
            let inspected = pricket::inspect(dir.path()).unwrap();
            assert!(
                inspected.warnings.iter().any(|warning| warning.contains("loading refuses")),
                "{:?}",
                inspected.warnings
            );
            let allowed = Loader::new(dir.path()).allow_unused().threads(1).load().unwrap();
            assert_eq!(worst(&logits(&allowed), &expected), 0.0);
        }
        // The same in a file without the root of the names, as models without a head are saved.
        let bare = |name: &str| name.split_once('.').map_or(name, |(_, rest)| rest).to_owned();
        config["tie_word_embeddings"] = json!(true);
        let mut rootless = renamed(&weights, |name| if name == head { name.into() } else { bare(name) });
        rootless.remove(head);
        assert!(load(directory(&config, &rootless)).warnings().is_empty());
        let norm = bare(&block.replace(".weight", ".x.bias"));
        rootless.insert(norm.clone(), (vec![3], vec![1.0; 3]));
        let found = error(directory(&config, &rootless).path());
        assert!(found.contains(&norm) && found.contains("does not use"), "{found}");
        let config = untied;
        // Heads of other tasks give a note, buffers are ignored.
        let mut other = weights.clone();
        for name in ["v_head.summary.weight", "score.weight"] {
            other.insert(name.into(), (vec![3], vec![1.0; 3]));
        }
        let model = load(directory(&config, &other));
        assert!(model.warnings().iter().any(|w| w.contains("2 tensors are not used")), "{:?}", model.warnings());
        let mut buffers = weights.clone();
        for name in [
            "gpt_neox.layers.0.attention.rotary_emb.cos_cached",
            "gpt_neox.rotary_emb.inv_freq",
            "transformer.attn_bias",
        ] {
            buffers.insert(name.into(), (vec![3], vec![1.0; 3]));
        }
        assert_eq!(worst(&logits(&load(directory(&config, &buffers))), &expected), 0.0);
    }
}

/// Files that do not hold what their names suggest, and checkpoints of other kinds of models, get an error with advice.
#[test]
fn files_that_are_not_models_give_an_error_with_advice() {
    let config = small_config(&json!({}));
    let weights = tensors(&config);
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1234567\n";
    for (text, named) in [
        (pointer, "git lfs pull"),
        ("<!DOCTYPE html>\n<html>", "web page"),
        ("\n <HTML><body>", "web page"),
        ("{\"error\":\"Repository not found\"}", "error of a server"),
        ("Entry not found", "error of a server"),
    ] {
        for file in
            ["model.safetensors", "pytorch_model.bin", "model.gguf", "ggml-model.bin", "tokenizer.json", "config.json"]
        {
            let dir = directory(&config, &weights);
            if !["tokenizer.json", "config.json"].contains(&file) {
                std::fs::remove_file(dir.path().join("model.safetensors")).unwrap();
            }
            std::fs::write(dir.path().join(file), text).unwrap();
            let found = error(dir.path());
            assert!(found.contains(named) && found.contains(file), "{file}: {found}");
        }
    }
    // Pointers of Git LFS do not count as equal weights.
    let dir = tempfile::tempdir().unwrap();
    for step in ["step1", "step2"] {
        let step = dir.path().join("revisions").join(step);
        std::fs::create_dir_all(&step).unwrap();
        std::fs::write(step.join("config.json"), config.to_string()).unwrap();
        std::fs::write(step.join("model.safetensors"), pointer).unwrap();
    }
    let found = pricket::checkpoints(dir.path().to_str().unwrap()).unwrap();
    let audit = found
        .audit(&pricket::hub::Steps::all(), pricket::suites::AuditOptions::default(), &pricket::nn::NoProgress)
        .unwrap();
    assert!(audit.identical.is_empty() && audit.is_alarming());
    assert!(audit.findings.iter().all(|finding| finding.words.contains("git lfs pull")), "{:?}", audit.findings);

    let lora = renamed(&weights, |name| format!("base_model.model.{}", name.replace(".weight", ".lora_A.weight")));
    for with_config in [true, false] {
        let dir = directory(&config, &weights);
        std::fs::remove_file(dir.path().join("model.safetensors")).unwrap();
        write_safetensors(&dir.path().join("adapter_model.safetensors"), &lora, &[]);
        let adapter = json!({"peft_type": "LORA", "base_model_name_or_path": "EleutherAI/pythia-70m"});
        std::fs::write(dir.path().join("adapter_config.json"), adapter.to_string()).unwrap();
        if !with_config {
            std::fs::remove_file(dir.path().join("config.json")).unwrap();
        }
        let found = error(dir.path());
        assert!(found.contains("PEFT adapter") && found.contains("merge"), "{found}");
    }
    let unmerged = renamed(&weights, |name| name.replace("query_key_value.", "query_key_value.base_layer."));
    assert!(error(directory(&config, &unmerged)).contains("not merged"));
    for (key, value, named) in [
        ("quantization_config", json!({"quant_method": "gptq", "bits": 4}), "quantized by gptq"),
        ("quantization_config", json!({"quant_method": "awq"}), "quantized by awq"),
        ("architectures", json!(["GPTNeoXForSequenceClassification"]), "classification head"),
    ] {
        let found = error(directory(&small_config(&json!({key: value})), &weights));
        assert!(found.contains(named) && found.contains(key), "{found}");
    }
}

// Tokenizers.

const TOKENIZER_FILES: [&str; 3] = ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"];

/// tests/data/added-tokens.json holds the ids and texts of transformers 5.24 (`AutoTokenizer`) for the same files.
#[test]
fn added_tokens_are_merged_as_transformers_merges_them() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let json = |path: &str| -> Value { serde_json::from_slice(&std::fs::read(root().join(path)).unwrap()).unwrap() };
    let (text, cases) = ("<|im_start|>hi<|im_end|>", json("tests/data/added-tokens.json"));
    for case in cases.as_array().unwrap() {
        let mut own = json("models/tiny/tokenizer.json");
        if let Some(special) = case["own_are_special"].as_bool() {
            for (id, content) in [(2000, "<|im_start|>"), (2001, "<|im_end|>")] {
                own["added_tokens"].as_array_mut().unwrap().push(json!({"id": id, "content": content,
                    "special": special, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false}));
            }
        }
        std::fs::write(at("tokenizer.json"), own.to_string()).unwrap();
        for file in TOKENIZER_FILES {
            let _ = std::fs::remove_file(at(file));
            if let Some(json) = case.get(file) {
                std::fs::write(at(file), json.to_string()).unwrap();
            }
        }
        let name = &case["name"];
        let found = pricket::lm::Tokenizer::from_file(at("tokenizer.json")).unwrap_or_else(|e| panic!("{name}: {e}"));
        let ids = found.encode(text).unwrap();
        assert_eq!(json!(ids), case["ids"], "{name}");
        assert_eq!(found.decode_text(&ids), case["text"], "{name}");
        assert_eq!(found.decode(&ids), text, "{name}");
        // The written tokenizer.json gives the same ids without the files beside it.
        let alone = pricket::lm::Tokenizer::from_bytes(found.to_json().unwrap().as_bytes(), "alone").unwrap();
        assert_eq!(alone.encode(text).unwrap(), ids, "{name}");
    }
}

#[test]
fn broken_files_beside_a_tokenizer_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::copy(root().join("models/tiny/tokenizer.json"), at("tokenizer.json")).unwrap();
    for (file, json, named) in [
        ("tokenizer_config.json", r#"{"added_tokens_decoder": {"x": {"content": "a"}}}"#, "added_tokens_decoder"),
        ("tokenizer_config.json", r#"{"added_tokens_decoder": {"2000": {"special": true}}}"#, "2000"),
        ("added_tokens.json", r#"{"<a>": "b"}"#, "added_tokens.json"),
        ("special_tokens_map.json", "{", "special_tokens_map.json"),
    ] {
        for other in TOKENIZER_FILES {
            let _ = std::fs::remove_file(at(other));
        }
        std::fs::write(at(file), json).unwrap();
        let refused = pricket::lm::Tokenizer::from_file(at("tokenizer.json")).unwrap_err().to_string();
        assert!(refused.contains(named), "{refused}");
    }
    // An absurd number of tokens is refused before the tokens are compared with each other.
    let many: Vec<String> = (0..300_000).map(|n| format!("<{n}>")).collect();
    for (file, json) in [
        ("tokenizer_config.json", json!({ "additional_special_tokens": many })),
        ("added_tokens.json", many.iter().zip(2000..).map(|(token, id)| (token.clone(), json!(id))).collect()),
    ] {
        for other in TOKENIZER_FILES {
            let _ = std::fs::remove_file(at(other));
        }
        std::fs::write(at(file), json.to_string()).unwrap();
        let refused = pricket::lm::Tokenizer::from_file(at("tokenizer.json")).unwrap_err().to_string();
        assert!(refused.contains("more than 16384"), "{refused}");
    }
}

/// A conversion into a directory keeps files of other kinds there.
#[test]
fn converting_loses_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let convert = |overwrite| {
        let options = ConvertOptions { overwrite, ..Default::default() };
        Loader::embedded("tiny").unwrap().convert(dir.path(), &options).map(drop).map_err(|e| e.to_string())
    };
    for name in ["LICENSE", "NOTICE", "LICENSE.md"] {
        std::fs::write(at(name), "mine").unwrap();
    }
    for name in ["README.md", "tokenizer_config.json", "generation_config.json"] {
        std::fs::write(at(name), "mine").unwrap();
        let refused = convert(false).unwrap_err();
        assert!(refused.contains(name) && refused.contains("already exists"), "{refused}");
        assert_eq!(std::fs::read_to_string(at(name)).unwrap(), "mine");
        std::fs::remove_file(at(name)).unwrap();
    }
    assert!(!at("model.safetensors").exists());
    convert(false).unwrap();
    std::fs::write(at("added_tokens.json"), "{\"<of another model>\": 2000}").unwrap();
    convert(true).unwrap();
    // The tokens of another model would apply to the new one.
    assert!(!at("added_tokens.json").exists() && at("tokenizer.json").exists());
    for name in ["LICENSE", "NOTICE", "LICENSE.md"] {
        assert_eq!(std::fs::read_to_string(at(name)).unwrap(), "mine", "{name}");
    }
}

#[test]
fn chatml_is_detected_by_tokens_of_the_configuration() {
    let dir = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(root().join("models/tiny").join(file), dir.path().join(file)).unwrap();
    }
    let config = json!({"added_tokens_decoder": {
        "2000": {"content": "<|im_start|>", "special": true}, "2001": {"content": "<|im_end|>", "special": true}}});
    std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    let model = load(dir.path());
    assert_eq!(model.prompt_format().name, "chatml");
    // The same after a conversion to each form.
    for name in ["out", "out.gguf"] {
        let out = dir.path().join(name);
        Loader::new(dir.path()).convert(&out, &ConvertOptions::default()).unwrap();
        let converted = load(&out);
        assert_eq!(converted.prompt_format().name, "chatml", "{name}");
        assert_eq!(converted.encode("<|im_end|>").unwrap(), [2001], "{name}");
    }
}

// Conversions.

#[test]
fn a_converted_directory_is_complete() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("my-model");
    std::fs::create_dir(&source).unwrap();
    for file in ["model.safetensors", "tokenizer.json"] {
        std::fs::copy(root().join("models/tiny").join(file), source.join(file)).unwrap();
    }
    let mut config: Value =
        serde_json::from_slice(&std::fs::read(root().join("models/tiny/config.json")).unwrap()).unwrap();
    config["torch_dtype"] = json!("float32");
    config["_name_or_path"] = json!(source.join("checkpoint-500"));
    config["auto_map"] = json!({"AutoModelForCausalLM": "modeling.Model"});
    config.as_object_mut().unwrap().remove("architectures");
    std::fs::write(source.join("config.json"), config.to_string()).unwrap();
    for (file, text) in [
        ("tokenizer_config.json", r#"{"tokenizer_class": "GPTNeoXTokenizerFast"}"#),
        ("special_tokens_map.json", r#"{"eos_token": "<|endoftext|>"}"#),
        ("generation_config.json", r#"{"eos_token_id": 0}"#),
        ("LICENSE", "free"),
        ("README.md", "---\nlicense: mit\n---\n# x"),
    ] {
        std::fs::write(source.join(file), text).unwrap();
    }
    let read = |path: PathBuf| std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    for (target, dtype) in [(Target::F16, "float16"), (Target::BF16, "bfloat16"), (Target::F32, "float32")] {
        let out = dir.path().join(dtype);
        let done = Loader::new(&source).convert(&out, &ConvertOptions { target, ..Default::default() }).unwrap();
        let config: Value = serde_json::from_str(&read(out.join("config.json"))).unwrap();
        assert_eq!(config["torch_dtype"], dtype);
        assert_eq!(config["architectures"], json!(["GPTNeoXForCausalLM"]));
        assert!(
            config.get("auto_map").is_none() && done.notes.iter().any(|note| note.contains("auto_map")),
            "{:?}",
            done.notes
        );
        assert_eq!(read(out.join("tokenizer_config.json")), read(source.join("tokenizer_config.json")));
        assert_eq!(read(out.join("special_tokens_map.json")), read(source.join("special_tokens_map.json")));
        assert_eq!(read(out.join("LICENSE")), "free");
        assert!(read(out.join("generation_config.json")).contains("eos_token_id"));
        let card = read(out.join("README.md"));
        assert!(card.starts_with("---\nlicense: mit\n---\n") && card.contains("from my-model with pricket"), "{card}");
        assert_eq!(
            open(&out).unwrap().entry("embed_out.weight").unwrap().dtype.to_string().to_lowercase(),
            dtype.replace("float", "f")
        );
        for file in std::fs::read_dir(&out).unwrap().flatten() {
            let bytes = std::fs::read(file.path()).unwrap();
            let place = dir.path().to_str().unwrap().as_bytes();
            assert!(
                !bytes.windows(place.len()).any(|window| window == place),
                "{} names a path of this machine",
                file.path().display()
            );
        }
    }
    // transformers 5 names the key `dtype` and prefers it where both are present.
    config["dtype"] = json!("float32");
    std::fs::write(source.join("config.json"), config.to_string()).unwrap();
    let out = dir.path().join("both");
    Loader::new(&source).convert(&out, &ConvertOptions { target: Target::F16, ..Default::default() }).unwrap();
    let converted: Value = serde_json::from_str(&read(out.join("config.json"))).unwrap();
    assert_eq!((converted["dtype"].as_str(), converted["torch_dtype"].as_str()), (Some("float16"), Some("float16")));
    config.as_object_mut().unwrap().remove("torch_dtype");
    config["dtype"] = json!("float32");
    std::fs::write(source.join("config.json"), config.to_string()).unwrap();
    let out = dir.path().join("newer");
    Loader::new(&source).convert(&out, &ConvertOptions { target: Target::F16, ..Default::default() }).unwrap();
    let converted: Value = serde_json::from_str(&read(out.join("config.json"))).unwrap();
    assert_eq!((converted["dtype"].as_str(), converted.get("torch_dtype")), (Some("float16"), None));

    // GGUF stores the name of the model, not its path.
    let gguf = dir.path().join("x.gguf");
    for (from, name) in [
        (source.clone(), "my-model"),
        (gguf.clone(), "x"),
        (root().join("models/tiny/revisions/step64"), "tiny@step64"),
    ] {
        let out = dir.path().join(format!("{name}-out.gguf"));
        let out = if name == "my-model" { &gguf } else { &out };
        Loader::new(&from).convert(out, &ConvertOptions::default()).unwrap();
        let metadata = GgufFile::open(out).unwrap().metadata();
        assert_eq!((metadata["general.name"].as_str(), metadata["pricket.source"].as_str()), (Some(name), Some(name)));
    }
    let source = logits(&Loader::new(&source).precision(Precision::F32).load().unwrap());
    assert!(worst(&logits(&load(&gguf)), &source) < 1e-4);
}
