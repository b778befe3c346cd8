//! Conversions between formats, quantizing, and ambiguities of GGUF and GGML files.

use std::path::{Path, PathBuf};

use pricket::candle::{DType, Device, Tensor};
use pricket::convert::{ConvertOptions, Target};
use pricket::lm::Tokenizer;
use pricket::loading::Precision;
use pricket::nn::{BlockType, Quantization};
use pricket::weights::Dtype;
use pricket::{Context, Loader, Pricket};

use crate::common::{directories_with, root, worst};

fn golden(part: &str) -> PathBuf {
    root().join("tests/golden").join(part)
}

fn logits(pricket: &Pricket) -> Tensor {
    let vocab = pricket.info().vocab as u32;
    let ids: Vec<u32> = (0..20).map(|i| i * 37 % vocab).collect();
    let model = pricket.model();
    let hidden =
        model.hidden(&Tensor::new(ids, &Device::Cpu).unwrap().unsqueeze(0).unwrap(), &mut Context::new()).unwrap();
    model.head(&hidden).unwrap()
}

fn load(path: &Path) -> Pricket {
    Loader::new(path).threads(2).load().unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn options(target: Target) -> ConvertOptions {
    ConvertOptions { target, ..Default::default() }
}

/// The weights of a golden case, and whether GGUF can express its configuration. GGUF has no RWKV-4.
fn sources() -> Vec<(PathBuf, bool)> {
    let unsaid = [
        "mpt-logit-scale-inv-sqrt",
        "mpt-native-clip-scale",
        "mosaicgpt-6heads",
        "rwkv4-hf-left-padded-batch",
        "rwkv4-hf-rescale",
    ];
    let files = directories_with(&golden("files"), "expected.safetensors");
    let files = files.into_iter().map(|dir| {
        let name = if dir.join("model.gguf").is_file() { "model.gguf" } else { "model.bin" };
        (dir.join(name), true)
    });
    let models = directories_with(&golden("models"), "config.json");
    let models = models.into_iter().filter(|dir| dir.join("expected.safetensors").is_file()).map(|dir| {
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        (dir, !unsaid.contains(&name.as_str()))
    });
    files.chain(models).collect()
}

/// Conversions between all forms are lossless: the logits equal those of the source.
#[test]
fn conversions_keep_every_value() {
    let dir = tempfile::tempdir().unwrap();
    let (mut said, mut unsaid) = (0, 0);
    for (i, (source, gguf)) in sources().into_iter().enumerate() {
        let loaded = load(&source);
        assert!(loaded.warnings().is_empty(), "{}: {:?}", source.display(), loaded.warnings());
        let expected = logits(&loaded);
        let hub = dir.path().join(format!("{i}"));
        Loader::new(&source).convert(&hub, &options(Target::F32)).unwrap();
        // With widened blocks the arithmetic is that of the converted copy, so the logits are equal.
        let widened = logits(&Loader::new(&source).precision(Precision::F32).load().unwrap());
        assert_eq!(worst(&logits(&load(&hub)), &widened), 0.0, "{}", source.display());
        let apart = worst(&widened, &expected);
        // The order of summation differs. Logits of about ten have a last place of 1e-6.
        assert!(apart < 3e-5, "{}: {apart}", source.display());
        for target in [Target::F32, Target::Stored] {
            let file = dir.path().join(format!("{i}-{target:?}.gguf"));
            let done = Loader::new(&source).convert(&file, &options(target));
            if !gguf {
                let error = done.unwrap_err().to_string();
                let told = ["GGUF has no key for it", "models cannot be written as GGUF"]
                    .iter()
                    .any(|what| error.contains(what));
                assert!(told, "{}: {error}", source.display());
                assert!(!file.exists());
                unsaid += 1;
                continue;
            }
            let done = done.unwrap_or_else(|e| panic!("{}: {e}", source.display()));
            let source_logits = if target == Target::F32 { &widened } else { &expected };
            let found = worst(&logits(&load(&file)), source_logits);
            // Old blocks without a current form become f16, with a note.
            let rounded = target == Target::Stored && done.notes.iter().any(|note| note.contains("are F16"));
            assert!(found < if rounded { 2e-2 } else { 1e-5 }, "{} {target:?}: {found}", source.display());
            said += 1;
            if target == Target::F32 {
                // Back to Hub layout.
                let back = dir.path().join(format!("{i}-back"));
                Loader::new(&file).convert(&back, &options(Target::F32)).unwrap();
                assert!(worst(&logits(&load(&back)), &widened) < 1e-5, "{}", source.display());
            }
        }
    }
    assert!(said >= 80 && unsaid == 10, "{said} conversions, {unsaid} refused");
    let left = std::fs::read_dir(dir.path()).unwrap().flatten();
    assert!(
        left.into_iter().all(|entry| !entry.file_name().to_string_lossy().ends_with(".part")),
        "nothing half-written"
    );
}

#[test]
fn old_blocks_with_f16_scales_stay_quantized() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a.gguf");
    let source = golden("files/neox-ggml-20230515-q4_0/model.bin");
    let done = Loader::new(&source).convert(&file, &options(Target::Stored)).unwrap();
    assert!(done.notes.iter().any(|note| note.contains("are q4_0 instead of q4_0_v1")), "{:?}", done.notes);
    let store = pricket::loading::open_weights(&file).unwrap();
    assert_eq!(store.entry("blk.0.ffn_up.weight").unwrap().dtype, Dtype::Block(BlockType::Q4_0));
    assert_eq!(worst(&logits(&load(&file)), &logits(&load(&source))), 0.0);
}

/// Quantizing while loading and quantizing to a file give the same model.
#[test]
fn a_file_and_a_flag_quantize_alike() {
    let dir = tempfile::tempdir().unwrap();
    let exact = logits(&pricket::tiny().unwrap());
    let mut last = f32::INFINITY;
    for kind in [BlockType::Q4_0, BlockType::Q5_1, BlockType::Q8_0] {
        let wanted = Quantization { weights: kind, embeddings_and_head: Some(BlockType::Q8_0) };
        let loaded = Loader::tiny().quantize(wanted).threads(2).load().unwrap();
        assert_eq!(loaded.info().dtype, Dtype::Block(kind));
        let file = dir.path().join(format!("{kind}.gguf"));
        let done = Loader::tiny().convert(&file, &options(Target::Quantized(wanted))).unwrap();
        let (a, b) = (logits(&loaded), logits(&load(&file)));
        assert_eq!(worst(&a, &b), 0.0, "{kind}");
        let off = worst(&a, &exact);
        assert!(off > 0.0 && off < last, "{kind}: {off} after {last}");
        last = off;
        assert!(done.bits_per_weight() < 9.2 && loaded.info().weight_bytes < 1_600_000, "{}", done.bits_per_weight());
        // A quantized model generates text like any other.
        let text = loaded.generate("The people of the United", &pricket::GenerateOptions::default()).unwrap().text;
        assert!(text.starts_with(" States"), "{kind}: {text}");
    }
    let compared = pricket::tiny().unwrap().compare(
        &load(&dir.path().join("q8_0.gguf")),
        &std::fs::read_to_string(root().join("tests/data/tiny/held_out.txt")).unwrap()[..6000],
        &pricket::ScoreOptions::default(),
    );
    let compared = compared.unwrap();
    assert!(compared.kl_divergence > 0.0 && compared.kl_divergence < 2e-3, "{compared:?}");
    assert!(
        compared.top_1_agreement > 0.97 && (compared.perplexity / compared.reference_perplexity - 1.0).abs() < 0.01
    );
}

#[test]
fn a_width_that_is_not_a_multiple_of_the_block_gets_another_type() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a.gguf");
    let wanted = Quantization { weights: BlockType::Q6K, embeddings_and_head: None };
    let done = Loader::tiny().convert(&file, &options(Target::Quantized(wanted))).unwrap();
    assert!(done.notes.iter().any(|note| note.contains("are q8_0 instead of q6k")), "{:?}", done.notes);
    let store = pricket::loading::open_weights(&file).unwrap();
    assert_eq!(store.entry("token_embd.weight").unwrap().dtype, Dtype::F16);
    assert_eq!(store.entry("blk.0.ffn_down.weight").unwrap().dtype, Dtype::Block(BlockType::Q6K));
}

#[test]
fn files_are_overwritten_only_on_request() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a.gguf");
    std::fs::write(&file, "precious").unwrap();
    let error = Loader::tiny().convert(&file, &options(Target::F16)).unwrap_err().to_string();
    assert!(error.contains("already exists; allow overwriting to replace it"), "{error}");
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    let all = ConvertOptions { overwrite: true, ..options(Target::F16) };
    assert!(Loader::tiny().convert(&file, &all).unwrap().bytes > 2_000_000);
    assert_eq!(load(&file).provenance().repo, None);
}

/// Lists of words and merges hold everything that a tokenizer.json holds.
#[test]
fn a_tokenizer_survives_as_word_and_merge_lists() {
    let mut paths = vec![root().join("models/tiny/tokenizer.json")];
    let neox = std::env::var_os("PRICKET_GOLDEN_TEXT").map(PathBuf::from);
    let neox = neox.unwrap_or_else(|| root().join("../shared/golden/text")).join("20B_tokenizer.json");
    paths.extend(neox.is_file().then_some(neox));
    for path in paths {
        let own = Tokenizer::from_file(&path).unwrap();
        let lists = own.to_vocabulary(own.vocab_size() + 27).unwrap();
        let bytes = |texts: &[String]| texts.iter().map(|text| text.clone().into_bytes()).collect::<Vec<_>>();
        let kinds: Vec<i64> = lists.kinds.iter().map(|&kind| kind.into()).collect();
        let words = bytes(&lists.words);
        // Word lists as current programs write them, as one of 2023 that marked every word as plain, and as one that
        // wrote raw bytes.
        let plain = vec![1; words.len()];
        let raw: Vec<Vec<u8>> = (0..words.len() as u32).map(|id| own.token_bytes(id).to_vec()).collect();
        for (words, kinds) in [(&words, &kinds[..]), (&words, &[]), (&words, &plain), (&raw, &[])] {
            let again = Tokenizer::from_vocabulary(words, kinds, &bytes(&lists.merges), "lists").unwrap();
            assert_eq!(again.vocab_size(), own.vocab_size());
            for text in [
                "Hello, I am",
                "    def foo():\n        return 1\n",
                "\t\t x",
                "e\u{301} \u{212b} \u{fb01}",
                "日本語 \u{1f917}",
                "Hello<|endoftext|>World",
                "a\r\nb  c   d",
                " Alice Alice",
                "1234567",
                "",
            ] {
                let ids = own.encode(text).unwrap();
                assert_eq!(again.encode(text).unwrap(), ids, "{text:?}");
                assert_eq!(again.decode(&ids), own.decode(&ids));
            }
        }
    }
}

/// The words in a legacy file have lost bytes. A tokenizer beside it is used if it matches, and reported if not.
#[test]
fn a_legacy_file_takes_the_tokenizer_beside_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ggml-model.bin");
    std::fs::copy(golden("files/neox-ggml-20230515-q5_1/model.bin"), &path).unwrap();
    let mute = load(&path);
    assert!(
        mute.generate("Anna", &pricket::GenerateOptions::default())
            .unwrap_err()
            .to_string()
            .contains("has no tokenizer")
    );
    let other = Loader::new(&path).tokenizer(root().join("models/tiny/tokenizer.json")).load().unwrap();
    assert!(
        other.warnings().iter().any(|text| text.contains("the tokenizer does not match")),
        "{:?}",
        other.warnings()
    );
    // The same vocabulary, from a GGUF file of the same model family.
    let hub = dir.path().join("hub");
    Loader::new(golden("files/neox-gguf-f16/model.gguf")).convert(&hub, &options(Target::F32)).unwrap();
    std::fs::copy(hub.join("tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
    let talking = load(&path);
    assert!(talking.warnings().is_empty(), "{:?}", talking.warnings());
    assert!(!talking.encode("Anna had a red ball.").unwrap().is_empty());
    assert_eq!(load(dir.path()).info().parameters, talking.info().parameters, "a directory with nothing else");
}

#[test]
fn the_row_order_is_detected_by_the_loss_of_a_text() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a.gguf");
    Loader::tiny().convert(&file, &options(Target::F16)).unwrap();
    let expected = logits(&pricket::tiny().unwrap());
    // pricket writes the order of rows to the file. Without the key the order is detected. A wrong order is used if the
    // user sets it.
    let key = b"pricket.qkv_order";
    let mut bytes = std::fs::read(&file).unwrap();
    let at = bytes.windows(key.len()).position(|window| window == key).unwrap();
    bytes[at] = b'P';
    std::fs::write(&file, bytes).unwrap();
    let found = load(&file);
    assert!(
        found.notes().iter().any(|note| note.contains("QKV rows are split: loss of a text")),
        "{:?}",
        found.notes()
    );
    assert!(worst(&logits(&found), &expected) < 1e-5);
    let wrong = Loader::new(&file).qkv_order(pricket::loading::QkvOrder::Interleaved).load().unwrap();
    assert!(worst(&logits(&wrong), &expected) > 0.1);
}

#[test]
fn keys_can_be_changed_and_the_activation_too() {
    let tiny = |change: fn(Loader) -> Loader| change(Loader::tiny()).load();
    let own = logits(&tiny(|loader| loader).unwrap());
    let tanh = logits(&tiny(|loader| loader.activation_function("gelu_tanh")).unwrap());
    let off = worst(&own, &tanh);
    assert!(off > 1e-5 && off < 0.05, "{off}");
    assert!(worst(&own, &logits(&tiny(|loader| loader.set("use_parallel_residual", false)).unwrap())) > 0.1);
    let error = tiny(|loader| loader.set("hidden_act", "swish")).unwrap_err().to_string();
    assert!(error.contains("hidden_act"), "{error}");
    assert!(tiny(|loader| loader.set("hidden_act.name", 1)).is_err());
    assert!(
        tiny(|loader| loader.activation_function("relu"))
            .unwrap_err()
            .to_string()
            .contains("expected gelu or gelu_tanh")
    );
    let rounded = logits(&tiny(|loader| loader.activations(pricket::nn::ops::ActivationPrecision::Q8)).unwrap());
    let off = worst(&own, &rounded);
    assert!(off > 0.0 && off < 0.05, "{off}");
    assert_eq!(rounded.dtype(), DType::F32);
}

#[test]
fn several_files_in_a_directory_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["a.gguf", "b.gguf"] {
        std::fs::copy(golden("files/mpt-gguf-f16/model.gguf"), dir.path().join(name)).unwrap();
    }
    for error in
        [pricket::load(dir.path()).unwrap_err().to_string(), pricket::inspect(dir.path()).unwrap_err().to_string()]
    {
        assert!(error.contains("2 files of a model (a.gguf, ...); name one of them"), "{error}");
    }
    assert_eq!(Loader::new(dir.path()).file("b.gguf").load().unwrap().info().family, "mpt");
}

/// A file of 2023 with its words as bytes gives the same ids as its current counterpart.
#[test]
fn words_written_as_bytes_are_the_same_words() {
    let today = load(&golden("files/neox-gguf-f16/model.gguf"));
    let old = load(&golden("files/neox-gguf-old-v2-interleaved-f16/model.gguf"));
    assert!(old.warnings().is_empty(), "{:?}", old.warnings());
    for text in ["Anna had a red ball.", "the  hat\n\n", " caf\u{e9} \u{1f917}", "<|endoftext|>a"] {
        let ids = old.encode(text).unwrap();
        assert_eq!(old.decode(&ids).unwrap(), text);
        // The current file also has tokens for runs of spaces.
        if !text.contains("  ") {
            assert_eq!(ids, today.encode(text).unwrap(), "{text:?}");
        }
    }
}

/// Rewrites the header of a GGUF file as version 1, whose counts and lengths have 32 bits.
fn as_version_1(file: &[u8]) -> Vec<u8> {
    let mut at = 24;
    let u32_at = |at: usize| u32::from_le_bytes(file[at..at + 4].try_into().unwrap());
    let u64_at = |at: usize| u64::from_le_bytes(file[at..at + 8].try_into().unwrap());
    let mut out = b"GGUF".to_vec();
    let put = |out: &mut Vec<u8>, n: u64| out.extend((n as u32).to_le_bytes());
    put(&mut out, 1);
    let (tensors, values) = (u64_at(8), u64_at(16));
    put(&mut out, tensors);
    put(&mut out, values);
    let text = |out: &mut Vec<u8>, at: &mut usize| {
        let len = u64_at(*at);
        put(out, len);
        out.extend(&file[*at + 8..*at + 8 + len as usize]);
        *at += 8 + len as usize;
    };
    let width = |kind: u32| [1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8][kind as usize];
    for _ in 0..values {
        text(&mut out, &mut at);
        let kind = u32_at(at);
        put(&mut out, kind.into());
        at += 4;
        match kind {
            8 => text(&mut out, &mut at),
            9 => {
                let (kind, count) = (u32_at(at), u64_at(at + 4));
                put(&mut out, kind.into());
                put(&mut out, count);
                at += 12;
                for _ in 0..count {
                    if kind == 8 {
                        text(&mut out, &mut at);
                    } else {
                        out.extend(&file[at..at + width(kind)]);
                        at += width(kind);
                    }
                }
            }
            _ => {
                out.extend(&file[at..at + width(kind)]);
                at += width(kind);
            }
        }
    }
    for _ in 0..tensors {
        text(&mut out, &mut at);
        let dims = u32_at(at);
        put(&mut out, dims.into());
        at += 4;
        for _ in 0..dims {
            put(&mut out, u64_at(at));
            at += 8;
        }
        out.extend(&file[at..at + 12]);
        at += 12;
    }
    out.resize(out.len().next_multiple_of(32), 0);
    out.extend(&file[at.next_multiple_of(32)..]);
    out
}

#[test]
fn version_1_of_gguf_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.gguf");
    for case in ["neox-gguf-q8_0", "mpt-gguf-f16"] {
        let today = golden("files").join(case).join("model.gguf");
        std::fs::write(&path, as_version_1(&std::fs::read(&today).unwrap())).unwrap();
        assert_eq!(pricket::inspect(&path).unwrap().describe, "GGUF, version 1");
        let split = Loader::new(&path).qkv_order(pricket::loading::QkvOrder::Split).load().unwrap();
        assert_eq!(worst(&logits(&split), &logits(&load(&today))), 0.0, "{case}");
        assert_eq!(split.encode("Anna had a ball").unwrap(), load(&today).encode("Anna had a ball").unwrap());
    }
}

/// Puts a plain legacy file into a container with a score for each word and tensors at multiples of 32 bytes.
fn in_container(file: &[u8], magic: &[u8], version: u32, fields: usize, words: usize) -> Vec<u8> {
    let u32_at = |at: usize| u32::from_le_bytes(file[at..at + 4].try_into().unwrap());
    let mut out = [magic, &version.to_le_bytes()].concat();
    let mut at = 4 + 4 * fields;
    // In these containers the version of the container gives the version of the blocks. The field holds no version.
    out.extend(&file[4..at - 4]);
    out.extend((u32_at(at - 4) % 1000).to_le_bytes());
    for _ in 0..words {
        let len = u32_at(at) as usize;
        out.extend(&file[at..at + 4 + len]);
        out.extend(0.5f32.to_le_bytes());
        at += 4 + len;
    }
    while at < file.len() {
        let (dims, name, kind) = (u32_at(at) as usize, u32_at(at + 4) as usize, u32_at(at + 8));
        let elements: usize = (0..dims).map(|i| u32_at(at + 12 + 4 * i) as usize).product();
        let head = 12 + 4 * dims + name;
        out.extend(&file[at..at + head]);
        if magic == b"tjgg" {
            out.resize(out.len().next_multiple_of(32), 0);
        }
        at += head;
        let bytes = match kind {
            0 => 4 * elements,
            2 if version == 3 => elements / 32 * 18,
            2 => elements / 32 * 20,
            _ => elements / 32 * 24,
        };
        out.extend(&file[at..at + bytes]);
        at += bytes;
    }
    out
}

#[test]
fn the_other_containers_of_2023_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ggml-a.bin");
    // ggjt 1, 2 and 3 hold blocks of versions 0, 1 and 2.
    for (case, version, fields) in [
        ("neox-ggml-20230430-q5_1", 1, 7),
        ("neox-ggml-20230515-q5_1", 2, 8),
        ("neox-ggml-20230520-q4_0-qnt2", 3, 8),
        ("mpt-ggml-20230517-q4_0-plainftype", 2, 8),
    ] {
        let plain = golden("files").join(case).join("model.bin");
        let bytes = std::fs::read(&plain).unwrap();
        std::fs::write(&path, in_container(&bytes, b"tjgg", version, fields, 352)).unwrap();
        let described = pricket::inspect(&path).unwrap().describe;
        assert!(
            described.starts_with("ggjt") && described.ends_with(&format!("version {}", version - 1)),
            "{described}"
        );
        assert_eq!(worst(&logits(&load(&path)), &logits(&load(&plain))), 0.0, "{case}");
    }
    let plain = golden("files/neox-ggml-20230430-q5_1/model.bin");
    std::fs::write(&path, in_container(&std::fs::read(&plain).unwrap(), b"fmgg", 1, 7, 352)).unwrap();
    assert!(pricket::inspect(&path).unwrap().describe.starts_with("ggmf"));
    assert_eq!(worst(&logits(&load(&path)), &logits(&load(&plain))), 0.0);
}

#[test]
fn a_directory_is_complete_and_never_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("pytorch_model.bin"), "another").unwrap();
    let error = Loader::tiny().convert(dir.path(), &options(Target::F16)).unwrap_err().to_string();
    assert!(error.contains("already contains a model"), "{error}");
    assert!(!dir.path().join("model.safetensors").exists());
    let source = root().join("models/tiny");
    let out = dir.path().join("out");
    let done = Loader::new(&source).convert(&out, &options(Target::Stored)).unwrap();
    assert!(done.warnings.is_empty(), "{:?}", done.warnings);
    for file in ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors"] {
        assert!(out.join(file).is_file(), "{file}");
    }
    let mute = Loader::new(golden("files/neox-ggml-20230515-q5_1/model.bin"));
    let over = ConvertOptions { overwrite: true, ..options(Target::F32) };
    let done = mute.convert(&out, &over).unwrap();
    assert!(done.warnings.iter().any(|text| text.contains("no tokenizer")), "{:?}", done.warnings);
    assert!(!out.join("tokenizer.json").exists() && !out.join("generation_config.json").exists(), "another model's");
}

/// The sizes of the blocks decide, not the header. A plain file type around blocks of version 2 gives no warning; MPT
/// files of three days have that. A wrong version gives a warning.
#[test]
fn a_header_with_a_wrong_block_version_warns() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ggml-a.bin");
    for (case, file_type, words) in [
        ("neox-ggml-20230520-q4_0-qnt2", 2u32, None),
        ("mpt-ggml-20230524-storywriter-q8_0", 7, None),
        ("mpt-ggml-20230524-storywriter-q8_0", 1007, Some("the header gives block version 1")),
        ("neox-ggml-20230515-q4_0", 2002, Some("the header gives block version 2")),
    ] {
        let source = golden("files").join(case).join("model.bin");
        let mut bytes = std::fs::read(&source).unwrap();
        // The last of the eight header fields.
        bytes[32..36].copy_from_slice(&file_type.to_le_bytes());
        std::fs::write(&path, bytes).unwrap();
        let loaded = load(&path);
        assert_eq!(worst(&logits(&loaded), &logits(&load(&source))), 0.0, "{case} as {file_type}");
        let told = loaded.warnings().join(" ");
        let right = words.map_or(told.is_empty(), |words| told.contains(words));
        assert!(right, "{case} as {file_type}: {told:?}");
    }
}

/// A 4-bit checkpoint that was written has the bits of the model that is quantized while loading, and damaged ones are
/// refused.
#[test]
fn four_bit_checkpoints_round_trip() {
    use pricket::candle::{Device, Tensor};

    let logits = |pricket: &pricket::Pricket| {
        let model = pricket.model();
        let ids = Tensor::new(&[[1u32, 5, 9, 200, 17, 3]], &Device::Cpu).unwrap();
        let hidden = model.hidden(&ids, &mut pricket::Context::new()).unwrap();
        model.head(&hidden).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    for name in ["nf4", "fp4", "nf4_f32", "fp4_f32"] {
        for model in ["tiny", "tiny-mpt"] {
            let directory = tempfile::tempdir().unwrap();
            let wanted = name.parse().unwrap();
            let options = ConvertOptions { target: Target::FourBit(wanted), ..ConvertOptions::default() };
            // From f32, so that values converted back are not rounded to the type before quantization.
            let (source, out) = (directory.path().join("source"), directory.path().join("model"));
            let to_f32 = ConvertOptions { target: Target::F32, ..ConvertOptions::default() };
            Loader::new(model).convert(&source, &to_f32).unwrap();
            let written = Loader::new(&source).convert(&out, &options).unwrap();
            let quantized = Loader::new(&source).four_bit(wanted).load().unwrap();
            let read = Loader::new(&out).load().unwrap();
            assert_eq!(logits(&read), logits(&quantized), "{model} {name}");
            assert!(read.info().weight_bytes < pricket::load(&source).unwrap().info().weight_bytes);
            assert_eq!(written.parameters, read.info().parameters);
            // Inspecting and converting back see the matrices under their names.
            let seen = pricket::inspect(&out).unwrap();
            let types: Vec<String> = seen.types().iter().map(|summary| summary.dtype.to_string()).collect();
            assert!(types.contains(&name[..3].to_owned()), "{types:?}");
            let back = directory.path().join("back");
            Loader::new(&out).convert(&back, &ConvertOptions::default()).unwrap();
            assert_eq!(logits(&pricket::load(&back).unwrap()), logits(&read), "{model} {name}");
            // A checkpoint that has the type already keeps its bytes.
            let same = directory.path().join("same");
            Loader::new(&out).convert(&same, &options).unwrap();
            let bytes = |path: &Path| std::fs::read(path.join("model.safetensors")).unwrap();
            assert_eq!(bytes(&same), bytes(&out), "{model} {name}");
        }
    }
    let directory = tempfile::tempdir().unwrap();
    let options = ConvertOptions { target: Target::FourBit("nf4".parse().unwrap()), ..ConvertOptions::default() };
    let refused = Loader::tiny().convert(directory.path().join("x.gguf"), &options).unwrap_err().to_string();
    assert!(refused.contains("GGUF has no type nf4"), "{refused}");
    Loader::tiny().convert(directory.path(), &options).unwrap();
    let file = directory.path().join("model.safetensors");
    let whole = std::fs::read(&file).unwrap();
    for (from, to, expected) in [
        ("\"blocksize\":64", "\"blocksize\":32", "absmax: expected"),
        ("\"blocksize\":64", "\"blocksize\":00", "quant_state"),
        ("\"float16\"", "\"float99\"", "the type before quantization is \"float99\""),
        ("[128,128]", "[128,999]", "bytes"),
        ("\"nested_blocksize\":256", "\"nested_blocksize\":000", "quant_state"),
    ] {
        let at =
            whole.windows(from.len()).position(|window| window == from.as_bytes()).unwrap_or_else(|| panic!("{from}"));
        let mut damaged = whole.clone();
        damaged[at..at + to.len()].copy_from_slice(to.as_bytes());
        std::fs::write(&file, damaged).unwrap();
        let error = pricket::load(directory.path()).unwrap_err().to_string();
        assert!(error.contains("model.safetensors") && error.contains(expected), "{from}: {error}");
    }
}
