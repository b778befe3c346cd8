//! Features of single families: checkpoints without a configuration, rows in pairs, recurrences.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use pricket::candle::{DType, Device, Tensor};
use pricket::convert::{ConvertOptions, Target};
use pricket::lm::Tokenizer;
use pricket::loading::Inspection;
use pricket::nn::RowOrder;
use pricket::nn::{BlockType, Quantization, State};
use pricket::{CausalLm, Context, GenerateOptions, Loader, Pricket, Site, Source, Taps};
use pricket_testhub::{Content, Repo};
use serde_json::{Value, json};

use crate::common::{root, worst};
use crate::world::{World, only};

fn golden(part: &str) -> PathBuf {
    root().join("tests/golden").join(part)
}

fn logits(model: &dyn CausalLm, ids: &[u32], ctx: &mut Context) -> Tensor {
    let ids = Tensor::new(ids, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    model.head(&model.hidden(&ids, ctx).unwrap()).unwrap()
}

fn load(path: impl AsRef<Path>) -> Pricket {
    Loader::new(path).threads(2).load().unwrap()
}

/// The error of a model that must not load.
fn refused(path: &Path) -> String {
    match Loader::new(path).threads(2).load() {
        Ok(loaded) => panic!("{} was loaded: {:?}", path.display(), loaded.warnings()),
        Err(e) => e.to_string(),
    }
}

/// A file of rwkv.cpp, made from a native checkpoint by its documented layout.
fn rwkv_cpp(store: &dyn pricket::weights::Store, version: u32, kind: u32, quantize: Option<BlockType>) -> Vec<u8> {
    let shape = |name: &str| store.entry(name).unwrap().shape;
    let layers = store.names().iter().filter(|name| name.ends_with(".ln1.weight")).count();
    let (vocab, d) = (shape("emb.weight")[0], shape("emb.weight")[1]);
    let mut out = b"fmgg".to_vec();
    for number in [version, vocab as u32, d as u32, layers as u32, kind] {
        out.extend(number.to_le_bytes());
    }
    for name in store.names() {
        let tensor = pricket::weights::read_tensor(store, &name, &Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
        let tensor = if name.contains(".time_mix_") { tensor.flatten_all().unwrap() } else { tensor };
        let tensor = if name.ends_with("time_decay") { tensor.exp().unwrap().neg().unwrap() } else { tensor };
        let values: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();
        let is_embedding_or_head = name.starts_with("emb.") || name.starts_with("head.");
        let (own, bytes) = match (tensor.rank(), quantize) {
            (2, Some(block)) if !is_embedding_or_head => {
                (kind, pricket::nn::ops::quantize(block, &values, tensor.dims()[1]).unwrap())
            }
            (2, _) if kind == 1 => (1, values.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect()),
            _ => (0, values.iter().flat_map(|x| x.to_le_bytes()).collect()),
        };
        for number in [tensor.rank() as u32, name.len() as u32, own] {
            out.extend(number.to_le_bytes());
        }
        tensor.dims().iter().rev().for_each(|&n| out.extend((n as u32).to_le_bytes()));
        out.extend(name.as_bytes());
        out.extend(bytes);
    }
    out
}

/// A golden checkpoint under its native names, with tensors replaced, removed or added.
fn native(changes: &BTreeMap<&str, Option<Tensor>>) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let store =
        pricket::loading::open_weights(golden("models/rwkv4-native-bf16/RWKV-4-Tiny-L3-D20-ctx64.pth")).unwrap();
    let mut tensors: std::collections::HashMap<String, Tensor> = std::collections::HashMap::new();
    for name in store.names() {
        tensors.insert(name.clone(), pricket::weights::read_tensor(&*store, &name, &Device::Cpu).unwrap());
    }
    for (name, tensor) in changes {
        match tensor {
            Some(tensor) => drop(tensors.insert((*name).to_owned(), tensor.clone())),
            None => drop(tensors.remove(*name)),
        }
    }
    pricket::candle::safetensors::save(&tensors, dir.path().join("model.safetensors")).unwrap();
    dir
}

#[test]
fn rwkv_cpp_files_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let source = golden("models/rwkv4-native-bf16/RWKV-4-Tiny-L3-D20-ctx64.pth");
    let store = pricket::loading::open_weights(&source).unwrap();
    let ids: Vec<u32> = (0..30).map(|i| i * 11 % 72).collect();
    let expected = logits(&*load(&source).model(), &ids, &mut Context::new());
    for (version, kind, bound) in [(100, 0, 2e-5), (101, 0, 2e-5), (100, 1, 2e-2)] {
        let path = dir.path().join(format!("{version}-{kind}.bin"));
        std::fs::write(&path, rwkv_cpp(&*store, version, kind, None)).unwrap();
        let loaded = load(&path);
        let off = worst(&logits(&*loaded.model(), &ids, &mut Context::new()), &expected);
        assert!(off < bound, "version {version}, type {kind}: {off}");
        assert!(loaded.warnings().is_empty(), "{:?}", loaded.warnings());
        let seen = pricket::inspect(&path).unwrap();
        assert_eq!((seen.info.unwrap().parameters, seen.tensors.len()), (19_220, store.names().len()));
    }
    // 20 channels do not fill a block; 64 do.
    let wide = Loader::untrained(
        json!({"model_type": "rwkv", "vocab_size": 72, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96}),
        3,
    );
    let hub = dir.path().join("wide");
    wide.unwrap().convert(&hub, &ConvertOptions::default()).unwrap();
    let hub_store = pricket::loading::open_weights(hub.join("model.safetensors")).unwrap();
    let native = Renamed(hub_store);
    for (block, kind) in [(BlockType::Q4_0, 2), (BlockType::Q5_1, 8), (BlockType::Q8_0, 9)] {
        let path = dir.path().join(format!("{block}.bin"));
        std::fs::write(&path, rwkv_cpp(&native, 101, kind, Some(block))).unwrap();
        let quantized = Loader::new(&hub)
            .quantize(Quantization { weights: block, embeddings_and_head: None })
            .threads(2)
            .load()
            .unwrap();
        let expected = logits(&*quantized.model(), &ids, &mut Context::new());
        let found = logits(&*load(&path).model(), &ids, &mut Context::new());
        assert!(worst(&found, &expected) < 2e-5, "{block}: {}", worst(&found, &expected));
        // The same type number meant other blocks in older versions.
        std::fs::write(&path, rwkv_cpp(&native, 100, kind, Some(block))).unwrap();
        assert!(refused(&path).contains("whose block layout in this version"), "{}", refused(&path));
    }
}

/// A converted checkpoint under the names of the original program.
struct Renamed(std::sync::Arc<dyn pricket::weights::Store>);

const PARTS: [(&str, &str); 9] = [
    ("rwkv.embeddings", "emb"),
    ("rwkv.ln_out", "ln_out"),
    ("rwkv.blocks", "blocks"),
    (".pre_ln.", ".ln0."),
    (".attention.", ".att."),
    (".feed_forward.", ".ffn."),
    ("time_mix_key", "time_mix_k"),
    ("time_mix_value", "time_mix_v"),
    ("time_mix_receptance", "time_mix_r"),
];

impl Renamed {
    fn hub(name: &str) -> String {
        // Only the last part of a `time_mix` name is ambiguous.
        let name = PARTS[..6].iter().fold(name.to_owned(), |name, (hub, own)| name.replacen(own, hub, 1));
        let mixes =
            [("time_mix_k", "time_mix_key"), ("time_mix_v", "time_mix_value"), ("time_mix_r", "time_mix_receptance")];
        mixes.iter().find(|(own, _)| name.ends_with(own)).map_or(name.clone(), |(own, hub)| name.replace(own, hub))
    }
}

impl pricket::weights::Store for Renamed {
    fn names(&self) -> Vec<String> {
        let rename = |name: String| PARTS.iter().fold(name, |name, (hub, own)| name.replace(hub, own));
        self.0.names().into_iter().map(rename).collect()
    }

    fn entry(&self, name: &str) -> Option<pricket::weights::Entry> {
        self.0.entry(&Self::hub(name))
    }

    fn bytes(&self, name: &str) -> pricket::weights::Result<pricket::weights::Bytes<'_>> {
        self.0.bytes(&Self::hub(name))
    }

    fn origin(&self, name: &str) -> String {
        self.0.origin(&Self::hub(name))
    }
}

#[test]
fn a_checkpoint_without_a_configuration_is_identified_by_its_shapes_or_refused() {
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let plain = native(&BTreeMap::new());
    let loaded = load(plain.path());
    assert!(loaded.notes().iter().any(|note| note.contains("no config.json")), "{:?}", loaded.notes());
    assert_eq!((loaded.info().family, loaded.info().layers, loaded.info().d_model), ("rwkv", 3, 20));
    assert_eq!(pricket::inspect(plain.path()).unwrap().info.unwrap().parameters, 19_220);
    for (name, tensor, named) in [
        ("blocks.1.att.ln_x.weight", Some(zeros(&[20])), "RWKV-5"),
        ("blocks.1.att.gate.weight", Some(zeros(&[20, 20])), "RWKV-5"),
        ("blocks.2.tiny_ln.weight", Some(zeros(&[20])), "RWKV-4a"),
        ("blocks.0.att.time_mix_qq", Some(zeros(&[1, 1, 20])), "RWKV-4b"),
        ("blocks.0.ffnPre.key.weight", Some(zeros(&[80, 20])), "ffnPre"),
        ("blocks.0.att.time_maa_x", Some(zeros(&[1, 1, 20])), "RWKV-6"),
        ("head_q.weight", Some(zeros(&[20, 20])), "head_q"),
        ("blocks.1.att.key.weight", None, "att.key.weight"),
        ("blocks.1.att.key.weight", Some(zeros(&[20, 21])), "att.key.weight"),
        ("blocks.0.att.time_decay", None, "config.json"),
    ] {
        let dir = native(&BTreeMap::from([(name, tensor)]));
        let error = refused(dir.path());
        assert!(error.contains(named), "{name}: {error}");
    }
}

#[test]
fn a_wrongly_published_end_token_is_ignored() {
    let dir = tempfile::tempdir().unwrap();
    let config = |vocab: u32| {
        json!({
            "model_type": "rwkv", "architectures": ["RwkvForCausalLM"], "vocab_size": vocab, "hidden_size": 8,
            "num_hidden_layers": 1, "eos_token_id": 0,
        })
    };
    let made = |vocab| {
        let options = ConvertOptions { overwrite: true, ..ConvertOptions::default() };
        Loader::untrained(config(vocab), 1).unwrap().convert(dir.path(), &options).unwrap();
    };
    made(50_277);
    let write = |id: u32| {
        let text = json!({"eos_token_id": id, "bos_token_id": 0}).to_string();
        std::fs::write(dir.path().join("generation_config.json"), text).unwrap();
    };
    write(2);
    let loaded = load(dir.path());
    assert_eq!(loaded.eos_ids(), [0]);
    assert!(loaded.notes().iter().any(|note| note.contains("eos_token_id 2")), "{:?}", loaded.notes());
    // Any other end token is kept.
    write(3);
    assert_eq!(load(dir.path()).eos_ids(), [0, 3]);
    let ids = json!({"eos_token_id": [2, 3]}).to_string();
    std::fs::write(dir.path().join("generation_config.json"), ids).unwrap();
    assert_eq!(load(dir.path()).eos_ids(), [0, 3]);
    // With another vocabulary, token 2 is an ordinary end token.
    made(96);
    write(2);
    assert_eq!(load(dir.path()).eos_ids(), [0, 2]);
}

#[test]
fn the_state_of_a_recurrent_model_does_not_grow() {
    let model = load(golden("models/rwkv4-hf-rescale")).model();
    let vocab = model.info().vocab as u32;
    let ids: Vec<u32> = (0..900).map(|i| i * 7 % vocab).collect();
    let mut ctx = Context::new().with_state(State::new());
    logits(&*model, &ids[..3], &mut ctx);
    let small = ctx.state().unwrap().bytes();
    logits(&*model, &ids[3..800], &mut ctx);
    assert_eq!(ctx.state().unwrap().bytes(), small);
    // A copy of the state continues separately, and `rewind` returns to a mark.
    ctx.state_mut().unwrap().mark(0);
    let mut copy = ctx.fork();
    let after = logits(&*model, &ids[800..820], &mut ctx);
    assert_eq!(worst(&logits(&*model, &ids[800..820], &mut copy), &after), 0.0);
    assert_eq!(ctx.state_mut().unwrap().rewind(0, 810), 800);
    assert_eq!(worst(&logits(&*model, &ids[800..820], &mut ctx), &after), 0.0);
    assert_eq!(model.info().cache_bytes_per_token(), 0);
}

#[test]
fn a_recurrent_model_refuses_attention_taps() {
    let model = load(golden("models/rwkv4-hf-rescale")).model();
    let ids = Tensor::new(&[[1u32, 2, 3]], &Device::Cpu).unwrap();
    let run = |site| {
        let mut ctx = Context::new().with_taps(Taps::new().record(site));
        model.hidden(&ids, &mut ctx).map(|_| ctx.take_recording().get(site, 1).is_some())
    };
    for site in [Site::ResidPre, Site::AttentionOut, Site::ResidMid, Site::MlpOut, Site::ResidPost] {
        assert!(run(site).unwrap(), "{site:?}");
    }
    for site in [Site::Pattern, Site::Query, Site::Key, Site::Value] {
        let error = run(site).unwrap_err().to_string();
        assert!(error.contains(&format!("{site:?}")), "{error}");
    }
}

/// From tokenizer.model to GGUF and back: the same ids, and the same token at the start of a text.
#[test]
fn a_sentencepiece_tokenizer_survives_conversion() {
    let dir = tempfile::tempdir().unwrap();
    for case in ["sp-v1-merge-spaces", "sp-v2-keep-spaces", "sp-charsmap", "sp-no-byte-fallback"] {
        let folder = dir.path().join(case);
        std::fs::create_dir(&folder).unwrap();
        let file = golden(&format!("text/{case}/tokenizer.model"));
        let own = Tokenizer::from_sentencepiece(&std::fs::read(&file).unwrap(), "own").unwrap();
        let config = json!({
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": own.vocab_size() + 5,
            "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
            "intermediate_size": 32, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
        });
        Loader::untrained(config, 1).unwrap().convert(&folder, &ConvertOptions::default()).unwrap();
        std::fs::copy(&file, folder.join("tokenizer.model")).unwrap();
        let gguf = dir.path().join(format!("{case}.gguf"));
        let wanted = Quantization { weights: BlockType::Q8_0, embeddings_and_head: None };
        let options = ConvertOptions { target: Target::Quantized(wanted), ..ConvertOptions::default() };
        Loader::new(&folder).convert(&gguf, &options).unwrap();
        let back = dir.path().join(format!("{case}-back"));
        Loader::new(&gguf)
            .convert(&back, &ConvertOptions { target: Target::F32, ..ConvertOptions::default() })
            .unwrap();
        let (packed, back) = (load(&gguf), load(&back));
        assert!(packed.warnings().is_empty(), "{:?}", packed.warnings());
        for line in std::fs::read_to_string(golden(&format!("text/{case}/encode.jsonl"))).unwrap().lines() {
            let line: Value = serde_json::from_str(line).unwrap();
            let text = line["text"].as_str().unwrap();
            let expected = own.encode(text).unwrap();
            assert_eq!(packed.tokenizer().unwrap().encode(text).unwrap(), expected, "{case}: {text:?}");
            let spelled = ["<s>", "</s>", "<unk>"].iter().any(|token| text.contains(token));
            if !spelled {
                assert_eq!(back.tokenizer().unwrap().encode(text).unwrap(), expected, "{case}: {text:?}");
            }
        }
        for loaded in [&packed, &back] {
            assert_eq!(loaded.encode("a").unwrap()[0], 1);
            assert_eq!(loaded.prefix_id(), 1);
        }
    }
}

/// A continuation follows the prompt directly. The space that sentencepiece puts before a text is not lost between
/// them.
#[test]
fn a_continuation_keeps_its_first_space() {
    let pricket = pricket::load("tiny-llama").unwrap();
    let tokenizer = pricket.tokenizer().unwrap();
    let ids = tokenizer.encode("The people of the United States").unwrap();
    let (start, rest) = ids.split_at(3);
    assert_eq!(tokenizer.decode(start) + &tokenizer.decode_part(rest), "The people of the United States");
    assert!(!tokenizer.decode(&ids).starts_with(' '));
    let text = pricket.generate("The people of the", &GenerateOptions { max_tokens: 8, ..Default::default() }).unwrap();
    let whole = [&text.prompt_ids[..], &text.ids].concat();
    assert_eq!(tokenizer.decode(&whole), format!("The people of the{}", text.text));
}

/// The names of the original program imply its order of rows, in any container.
#[test]
fn a_checkpoint_under_the_original_names_has_its_rows_in_pairs() {
    let dir = tempfile::tempdir().unwrap();
    let source = golden("models/llama-gqa");
    let expected = load(&source);
    let store = pricket::loading::open_weights(source.join("model.safetensors")).unwrap();
    let names = [
        ("model.embed_tokens", "tok_embeddings"),
        ("model.layers", "layers"),
        ("input_layernorm", "attention_norm"),
        ("self_attn.q_proj", "attention.wq"),
        ("self_attn.k_proj", "attention.wk"),
        ("self_attn.v_proj", "attention.wv"),
        ("self_attn.o_proj", "attention.wo"),
        ("post_attention_layernorm", "ffn_norm"),
        ("mlp.gate_proj", "feed_forward.w1"),
        ("mlp.down_proj", "feed_forward.w2"),
        ("mlp.up_proj", "feed_forward.w3"),
        ("model.norm", "norm"),
        ("lm_head", "output"),
    ];
    let info = expected.info();
    let mut tensors = std::collections::HashMap::new();
    for name in store.names() {
        let tensor = pricket::weights::read_tensor(&*store, &name, &Device::Cpu).unwrap();
        let heads =
            [("q_proj", info.heads), ("k_proj", info.kv_heads)].into_iter().find(|(part, _)| name.contains(part));
        let tensor = heads.map_or(tensor.clone(), |(_, heads)| RowOrder::Pairs { heads }.undo(&tensor).unwrap());
        tensors.insert(names.iter().fold(name, |name, (hub, own)| name.replace(hub, own)), tensor);
    }
    pricket::candle::safetensors::save(&tensors, dir.path().join("model.safetensors")).unwrap();
    std::fs::copy(source.join("config.json"), dir.path().join("config.json")).unwrap();
    let ids: Vec<u32> = (1..20).collect();
    let logits = |pricket: &Pricket| logits(&*pricket.model(), &ids, &mut Context::new());
    assert_eq!(worst(&logits(&load(dir.path())), &logits(&expected)), 0.0);
}

fn tokenizer_with(files: &[(&str, Value)]) -> pricket::lm::Result<Tokenizer> {
    let model = std::fs::read(golden("text/sp-v2-keep-spaces/tokenizer.model")).unwrap();
    let texts: Vec<(&str, String)> = files.iter().map(|(name, value)| (*name, value.to_string())).collect();
    let mut all = vec![("tokenizer.model", &model[..])];
    all.extend(texts.iter().map(|(name, text)| (*name, text.as_bytes())));
    Tokenizer::from_files(&all, "made")
}

#[test]
fn files_beside_a_sentencepiece_model_are_applied_or_refused() {
    let plain = tokenizer_with(&[]).unwrap();
    let count = plain.vocab_size() as u32;
    // Added tokens, without the empty one.
    let added = tokenizer_with(&[("added_tokens.json", json!({"<sep>": count, "": count + 1}))]).unwrap();
    assert_eq!(added.token_to_id("<sep>"), Some(count));
    let ids = added.encode("a<sep>b").unwrap();
    assert_eq!(ids.iter().filter(|&&id| id == count).count(), 1, "{ids:?}");
    assert!(!added.is_special(count) && added.decode(&ids).contains("<sep>"));
    // If tokenizer_config.json lists tokens, added_tokens.json is ignored.
    let decoder = json!({"added_tokens_decoder": {count.to_string(): {"content": "<a>", "special": true}}});
    let both = [("tokenizer_config.json", decoder), ("added_tokens.json", json!({"<b>": count}))];
    let listed = tokenizer_with(&both).unwrap();
    assert_eq!((listed.token_to_id("<a>"), listed.token_to_id("<b>")), (Some(count), None));
    assert!(listed.is_special(count));
    // Without a token at the start of a text.
    let without = tokenizer_with(&[("tokenizer_config.json", json!({"add_bos_token": false}))]).unwrap();
    assert_eq!((plain.begin(), without.begin()), (Some(1), None));
    let names: Vec<&str> = without.to_files().unwrap().iter().map(|(name, _)| *name).collect();
    assert_eq!(names, ["tokenizer.model", "tokenizer_config.json"]);
    let kept = without.to_files().unwrap();
    let again =
        Tokenizer::from_files(&kept.iter().map(|(name, bytes)| (*name, &bytes[..])).collect::<Vec<_>>(), "again")
            .unwrap();
    assert_eq!(again.begin(), None);
    for (file, value, named) in [
        ("added_tokens.json", json!({"<sep>": count + 7}), "the next free id"),
        ("tokenizer_config.json", json!({"pad_token": {"content": "<p>", "rstrip": true}}), "rstrip"),
        (
            "special_tokens_map.json",
            json!({"additional_special_tokens": [{"content": "<p>", "lstrip": true}]}),
            "lstrip",
        ),
    ] {
        let error = tokenizer_with(&[(file, value)]).unwrap_err().to_string();
        assert!(error.contains(named), "{error}");
    }
    let many: serde_json::Map<String, Value> = (0..20_000u32).map(|i| (format!("<{i}>"), json!(count + i))).collect();
    assert!(tokenizer_with(&[("added_tokens.json", many.into())]).unwrap_err().to_string().contains("at most 16384"));
}

/// Training encodes a prompt with the same ids as generation.
#[test]
fn training_examples_have_the_ids_of_prompts() {
    use pricket::train::Record;
    let tokenizer = tokenizer_with(&[]).unwrap();
    let format = pricket::text::prompt_format("incite-chat").unwrap();
    let turns = ["One?", "Yes.", "Two?", "No."].map(str::to_owned);
    let turns = vec![
        pricket::lm::Turn::user(&*turns[0]),
        pricket::lm::Turn::assistant(&*turns[1]),
        pricket::lm::Turn::user(&*turns[2]),
        pricket::lm::Turn::assistant(&*turns[3]),
    ];
    let prompt = tokenizer.encode_prompt(&format.prompt(None, &turns[..3]).unwrap()).unwrap();
    let sample = Record::Chat { system: None, turns }.sample(Some(&tokenizer), &format, &[2]).unwrap();
    assert_eq!(sample.ids()[..prompt.len()], prompt);
    assert_eq!(tokenizer.decode(sample.ids()), "<human>: One?\n<bot>: Yes.\n<human>: Two?\n<bot>: No.");
    let pair = Record::Pair { prompt: "Q: x\nA:".into(), response: " yes".into() };
    let sample = pair.sample(Some(&tokenizer), &format, &[2]).unwrap();
    let whole = [tokenizer.encode_from_start("Q: x\nA: yes").unwrap(), vec![2]].concat();
    assert_eq!(sample.ids(), whole);
    assert_eq!(sample.counted(), whole.len() - tokenizer.encode_from_start("Q: x\nA:").unwrap().len());
}

/// In a tokenizer from a GGUF file, text stays text, and the special tokens of a prompt format are tokens.
#[test]
fn a_gguf_file_marks_special_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let gguf = dir.path().join("m.gguf");
    Loader::embedded("tiny-llama").unwrap().set("bos_token_id", 7).convert(&gguf, &ConvertOptions::default()).unwrap();
    let packed = load(&gguf);
    // The tokenizer's own first token, also if the model's configuration names another.
    assert_eq!(packed.tokenizer().unwrap().begin(), Some(1));
    let store = pricket::inspect(&gguf).unwrap().metadata.unwrap();
    assert_eq!(
        (&store["tokenizer.ggml.bos_token_id"], &store["tokenizer.ggml.unknown_token_id"]),
        (&json!(1), &json!(0))
    );
    let tokenizer = packed.tokenizer().unwrap();
    assert!(!tokenizer.encode("a</s>").unwrap().contains(&2));
    assert_eq!(tokenizer.encode_prompt("a</s>").unwrap().last(), Some(&2));
}

#[test]
fn a_pth_file_is_the_last_choice_for_weights() {
    use pricket::weights::choose_weights;
    let choose = |names: &[&str]| {
        let chosen = choose_weights(names, Path::new("here"));
        chosen.map(str::to_owned).map_err(|e| e.to_string())
    };
    assert_eq!(choose(&["README.md", "RWKV-4.pth"]).unwrap(), "RWKV-4.pth");
    assert_eq!(choose(&["model.gguf", "scheduler.pth"]).unwrap(), "model.gguf");
    assert_eq!(choose(&["model.gguf", "a.pth"]).unwrap(), "model.gguf");
    assert!(choose(&["a.pth", "b.pth"]).unwrap_err().contains("name one of them"));
    for state in ["optimizer.pth", "rng_state_0.pth", "scaler.pth"] {
        assert!(choose(&[state]).is_err(), "{state}");
    }
}

/// RWKV's own repositories hold one or several `.pth` files and no configuration.
#[test]
fn native_rwkv_files_load_like_checkpoints() {
    let native = std::fs::read(golden("models/rwkv4-native-bf16/RWKV-4-Tiny-L3-D20-ctx64.pth")).unwrap();
    let other = std::fs::read(golden("models/rwkv4-native-fp16-widths/model-fp16.pth")).unwrap();
    let mut steps = Repo::default();
    for (branch, bytes) in [("step1", &other), ("step2", &native), ("main", &native)] {
        let commit = steps.commit([("RWKV-4.pth", Content::lfs(bytes.clone()))]);
        steps.branch(branch, &commit);
    }
    let files = pricket::suites::cards().iter().filter(|card| card.id == "BlinkDL/rwkv-4-pileplus");
    let files: Vec<_> =
        files.filter_map(|card| card.file.as_deref()).map(|f| (f, Content::lfs(native.clone()))).collect();
    assert_eq!(files.len(), 4);
    let world = World::new([("owner/native", steps), ("BlinkDL/rwkv-4-pileplus", only(files))]);

    let audit = world.audit("owner/native");
    assert_eq!(audit.identical, [["step2", "main"]], "{:?}", audit.findings);
    let seen = Inspection::on(&world.hub(), Source::new("owner/native").revision("step1")).unwrap();
    let parameters = seen.info.unwrap().parameters;
    assert!(Inspection::on(&world.hub(), "rwkv-4-pileplus").unwrap_err().to_string().contains("name one of them"));

    // Each of several models in a repository has a name.
    let seen = Inspection::on(&world.hub(), "rwkv-4-pileplus-1b5").unwrap();
    assert!(seen.tensors[0].file.contains("RWKV-4-PilePlus-1B5"), "{}", seen.tensors[0].file);
    let found = world.checkpoints("rwkv-4-pileplus-3b");
    assert!(found.model.contains("/RWKV-4-PilePlus-3B"), "{}", found.model);
    let loader = Loader::new(found.source(found.main.as_ref().unwrap())).hub(world.hub()).threads(2);
    let loaded = loader.load().unwrap();
    let used = &loaded.provenance().files;
    assert!(used.iter().any(|file| file.path.contains("PilePlus-3B")), "{used:?}");

    // Directories of steps, as training programs write them.
    let dir = tempfile::tempdir().unwrap();
    for (step, bytes) in [("checkpoint-100", &other), ("checkpoint-200", &native)] {
        std::fs::create_dir(dir.path().join(step)).unwrap();
        std::fs::write(dir.path().join(step).join("rwkv.pth"), bytes).unwrap();
    }
    let found = pricket::checkpoints(dir.path()).unwrap();
    assert_eq!(found.steps.iter().filter_map(|at| at.step).collect::<Vec<_>>(), [100, 200]);
    let of = |loader: Loader| loader.threads(2).load().unwrap().info().parameters;
    assert_eq!(of(Loader::new(dir.path()).revision("checkpoint-200")), 19_220);
    assert_eq!([0, 1].map(|i| of(Loader::new(found.source(&found.steps[i])))), [parameters, 19_220]);
    assert_ne!(parameters, 19_220);
}

#[test]
fn the_estimate_includes_the_recurrent_state() {
    let tiny = Loader::embedded("tiny-rwkv").unwrap().load().unwrap();
    let mut ctx = Context::new().with_state(State::new());
    logits(&*tiny.model(), &[1, 2, 3], &mut ctx);
    assert_eq!(ctx.state().unwrap().bytes() as u64, tiny.info().state_bytes);
    let estimate = pricket::loading::estimate(tiny.config(), pricket::weights::Dtype::F32, 4096).unwrap();
    assert_eq!(estimate.cache, tiny.info().state_bytes);
}
