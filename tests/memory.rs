//! Memory of loading, running and training.

use crate::common::root;

/// The peak memory of this process, in bytes.
#[cfg(target_os = "linux")]
pub(crate) fn peak_rss() -> u64 {
    status("VmHWM:")
}

/// The memory that this process holds, in bytes.
#[cfg(target_os = "linux")]
pub(crate) fn rss() -> u64 {
    status("VmRSS:")
}

#[cfg(target_os = "linux")]
fn status(key: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(key)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

/// Writes an f16 safetensors file of a published shape. Its bytes repeat random data that gives small finite numbers.
#[cfg(target_os = "linux")]
fn write_f16_file(config: &serde_json::Value, path: &std::path::Path) -> u64 {
    use std::io::Write;
    use std::sync::Arc;

    use pricket::weights::{Dtype, ShapesOnly, Store};

    let store = Arc::new(ShapesOnly::new(Dtype::F16));
    let asked: Arc<dyn Store> = store.clone();
    drop(pricket::Loader::from_store(config.clone(), asked).allow_any_memory().load().unwrap());
    let mut offset = 0u64;
    let mut header = serde_json::Map::new();
    for name in store.names() {
        let entry = store.entry(&name).unwrap();
        let end = offset + 2 * entry.elements() as u64;
        let info = serde_json::json!({"dtype": "F16", "shape": entry.shape, "data_offsets": [offset, end]});
        header.insert(name, info);
        offset = end;
    }
    let mut header = serde_json::to_vec(&header).unwrap();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut state = 1u64;
    let noise: Vec<u8> = (0..1 << 19)
        .flat_map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            half::f16::from_f32(((state >> 40) as f32 / f32::from(1u16 << 12) / 4096.0 - 0.5) * 0.05).to_le_bytes()
        })
        .collect();
    let mut file = std::fs::File::create(path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(&header).unwrap();
    let mut left = offset as usize;
    while left > 0 {
        let n = left.min(noise.len());
        file.write_all(&noise[..n]).unwrap();
        left -= n;
    }
    8 + header.len() as u64 + offset
}

/// A 1.4b model in f16 takes at most its file, 10 % of it, 64 MiB and its cache. There is no second or widened copy.
#[cfg(target_os = "linux")]
#[test]
fn a_model_takes_the_memory_of_its_file() {
    let dir = tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
    let config = pricket::suites::published_config("1.4b").unwrap();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let file = write_f16_file(&config, &dir.path().join("model.safetensors"));
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "memory::child_runs_a_model", "--nocapture"])
        .env("PRICKET_CHILD_MODEL", dir.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let number = |label: &str| -> u64 {
        let rest =
            text.split(label).nth(1).unwrap_or_else(|| panic!("{text}\n{}", String::from_utf8_lossy(&output.stderr)));
        rest.split_whitespace().next().unwrap().parse().unwrap()
    };
    let (peak, cache) = (number("PEAK "), number("CACHE "));
    let allowed = file + file / 10 + (64 << 20) + cache;
    println!("peak {peak}, file {file}, cache {cache}: {:.3} of the file", peak as f64 / file as f64);
    assert!(peak <= allowed, "{peak} bytes at the peak, {allowed} allowed");
}

#[cfg(target_os = "linux")]
#[test]
fn child_runs_a_model() {
    let Some(dir) = std::env::var_os("PRICKET_CHILD_MODEL") else { return };
    let pricket = pricket::load(dir).unwrap();
    let options = pricket::GenerateOptions { max_tokens: 4, stop_at_eos: false, ..Default::default() };
    let mut generation = pricket.generation(vec![(0..64).collect()], &options).unwrap();
    let mut tokens = 0;
    while generation.step().unwrap().is_some() {
        tokens += 1;
    }
    assert_eq!(tokens, 4);
    println!("PEAK {} CACHE {}", peak_rss(), generation.state_bytes());
}

#[test]
fn a_model_that_does_not_fit_is_refused_before_it_is_read() {
    let mut config = pricket::suites::published_config("12b").unwrap();
    config["num_hidden_layers"] = 4000.into();
    let store = std::sync::Arc::new(pricket::weights::Random::new(pricket::weights::Dtype::F32, 0));
    let error = pricket::Loader::from_store(config, store).load().unwrap_err();
    assert!(matches!(error, pricket::Error::OutOfMemory { .. }), "{error}");
    assert!(error.to_string().contains("GiB"), "{error}");
    assert!(pricket::load(root().join("models/tiny")).is_ok());
}

/// Initial RAM in MiB of the programs of 2023, for q4_0 and q5_1, from the model card of the GGML files of Pythia.
#[cfg(target_os = "linux")]
const CARD: [(&str, f64, f64); 6] = [
    ("70m", 113.3, 121.5),
    ("160m", 199.4, 227.5),
    ("410m", 399.2, 455.7),
    ("1b", 803.0, 927.3),
    ("1.4b", 1126.4, 1331.2),
    ("2.8b", 2048.0, 2457.6),
];

/// Writes a legacy GGML file of a published shape in the format of mid-May 2023. The blocks hold arbitrary bytes with
/// small scales.
#[cfg(target_os = "linux")]
fn write_ggml_file(shape: &str, kind: u32, path: &std::path::Path) {
    use std::io::Write;
    use std::sync::Arc;

    use pricket::weights::{Dtype, ShapesOnly, Store};

    let config = pricket::suites::published_config(shape).unwrap();
    let store = Arc::new(ShapesOnly::new(Dtype::F32));
    let asked: Arc<dyn Store> = store.clone();
    let info = pricket::Loader::from_store(config, asked).allow_any_memory().load().unwrap().info().clone();
    let mut file = std::io::BufWriter::new(std::fs::File::create(path).unwrap());
    let rotated = (info.head_dim / 4) as u32;
    // q4_0 is file type 2, q5_1 file type 9, both of version 1.
    let file_type = 1000 + if kind == 2 { 2 } else { 9 };
    let sizes = [info.vocab, 2048, info.d_model, info.heads, info.layers].map(|n| n as u32);
    file.write_all(b"lmgg").unwrap();
    for n in sizes.into_iter().chain([rotated, 1, file_type]) {
        file.write_all(&n.to_le_bytes()).unwrap();
    }
    for id in 0..info.vocab {
        let word = if id == 0 { "<|endoftext|>".to_owned() } else { format!("w{id}") };
        file.write_all(&(word.len() as u32).to_le_bytes()).unwrap();
        file.write_all(word.as_bytes()).unwrap();
    }
    let block: Vec<u8> = if kind == 2 {
        [&0.002f32.to_le_bytes()[..], &[0x5b; 16]].concat()
    } else {
        [
            &half::f16::from_f32(0.001).to_le_bytes()[..],
            &half::f16::from_f32(-0.015).to_le_bytes(),
            &[0xa5; 4],
            &[0x3c; 16],
        ]
        .concat()
    };
    let run = block.repeat(1 << 14);
    for name in store.names() {
        let shape = store.entry(&name).unwrap().shape;
        let number = if shape.len() == 1 { 0 } else { kind };
        for n in [shape.len() as u32, name.len() as u32, number] {
            file.write_all(&n.to_le_bytes()).unwrap();
        }
        shape.iter().rev().for_each(|&n| file.write_all(&(n as u32).to_le_bytes()).unwrap());
        file.write_all(name.as_bytes()).unwrap();
        let elements: usize = shape.iter().product();
        if number == 0 {
            (0..elements).for_each(|_| file.write_all(&1f32.to_le_bytes()).unwrap());
            continue;
        }
        let mut left = elements / 32 * block.len();
        while left > 0 {
            let n = left.min(run.len());
            file.write_all(&run[..n]).unwrap();
            left -= n;
        }
    }
    file.into_inner().unwrap().sync_all().unwrap();
}

/// Compares the peak memory of writing 128 tokens with the card, for each type that the card lists for a shape, in MiB.
#[cfg(target_os = "linux")]
fn needs_no_more_than_the_card(rows: &[(&str, f64, f64)]) {
    for (shape, q4_0, q5_1) in rows {
        for (kind, name, most) in [(2, "q4_0", q4_0), (7, "q5_1", q5_1)] {
            let dir = tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
            let path = dir.path().join("ggml-model.bin");
            write_ggml_file(shape, kind, &path);
            let output = std::process::Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "memory::child_writes_128_tokens", "--nocapture"])
                .env("PRICKET_CHILD_GGML", &path)
                .output()
                .unwrap();
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            let peak = text.split("PEAK ").nth(1).and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
            let peak = peak.unwrap_or_else(|| panic!("{text}\n{}", String::from_utf8_lossy(&output.stderr)));
            let (peak, file) = (peak as f64 / 1_048_576.0, path.metadata().unwrap().len() as f64 / 1_048_576.0);
            println!("| {shape} {name} | {file:.1} | {most:.1} | {peak:.1} |");
            assert!(peak <= *most, "{shape} {name}: {peak:.1} MiB, the card has {most:.1}");
        }
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_legacy_file_takes_no_more_memory_than_its_card_says() {
    needs_no_more_than_the_card(&CARD[..1]);
}

/// `cargo test --test tests -- --ignored --nocapture memory::`
#[cfg(target_os = "linux")]
#[test]
#[ignore = "minutes, and files of 2 GB"]
fn a_large_legacy_file_takes_no_more_memory_than_its_card_says() {
    needs_no_more_than_the_card(&CARD[1..]);
}

#[cfg(target_os = "linux")]
#[test]
fn child_writes_128_tokens() {
    let Some(path) = std::env::var_os("PRICKET_CHILD_GGML") else { return };
    let pricket = pricket::load(path).unwrap();
    let options = pricket::GenerateOptions { max_tokens: 128, stop_at_eos: false, ..Default::default() };
    let mut generation = pricket.generation(vec![vec![1, 2, 3, 4]], &options).unwrap();
    while generation.step().unwrap().is_some() {}
    println!("PEAK {}", peak_rss());
}

/// Layers, width and sequence length of the training steps below.
#[cfg(all(target_os = "linux", feature = "train"))]
const STEP: (usize, usize, usize) = (10, 512, 1024);

/// The bytes that a training step adds to the memory of a process, and their estimate. The step runs in a process of
/// its own.
#[cfg(all(target_os = "linux", feature = "train"))]
fn added_by_a_step(layers: usize, checkpointing: bool, residual: &str) -> (f64, f64) {
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "memory::child_trains", "--nocapture"])
        .env("PRICKET_CHILD_TRAIN", format!("{layers} {checkpointing} {residual}"))
        // Freed memory returns to the system at once, so that the measured memory is the memory in use.
        .envs([("MALLOC_MMAP_THRESHOLD_", "65536"), ("MALLOC_TRIM_THRESHOLD_", "0"), ("MALLOC_ARENA_MAX", "1")])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let number = |name: &str| {
        let number = text.split(name).nth(1).and_then(|rest| rest.split_whitespace().next());
        number.unwrap_or_else(|| panic!("{text}{}", String::from_utf8_lossy(&output.stderr))).parse().unwrap()
    };
    (number("ADDED "), number("ESTIMATED "))
}

/// With checkpointing, a step at 1,024 tokens adds at most 1.3 times the activations of one block, the inputs of the
/// blocks and the gradients of the adapters. The activations of a block are measured as the memory that each further
/// block adds without checkpointing.
#[cfg(all(target_os = "linux", feature = "train"))]
#[test]
fn checkpointing_keeps_the_inputs_of_blocks_only() {
    let (layers, d, t) = STEP;
    for residual in ["parallel", "sequential"] {
        let added = |layers, checkpointing| added_by_a_step(layers, checkpointing, residual).0;
        let [few, many] = [layers / 2, layers].map(|layers| added(layers, false));
        let block = (many - few) / (layers - layers / 2) as f64;
        let (found, estimated) = added_by_a_step(layers, true, residual);
        // Rank 16 on the four matrices of a block, whose inputs and outputs sum to 4, 2, 5 and 5 widths. Each adapter
        // weight has a gradient.
        let adapters = (16 * (4 + 2 + 5 + 5) * d * layers * 4) as f64;
        let inputs = ((layers + 1) * d * t * 4) as f64;
        let blocks = (found - inputs - adapters) / block;
        println!(
            "{residual}: {blocks:.3} times the activations of a block, which are {:.1} inputs",
            block / (d * t * 4) as f64
        );
        assert!(
            blocks <= 1.3,
            "{residual}: added {found}: block {block}, inputs {inputs}, adapters {adapters}: {blocks}"
        );
        println!("{residual}: {:.3} of the estimate", found / estimated);
        assert!((0.75..1.25).contains(&(found / estimated)), "{residual}: added {found}, estimated {estimated}");
        // A further block adds its input and its adapters, and nothing else.
        let more = (found - added(layers / 2, true)) / (layers - layers / 2) as f64;
        assert!(more < 1.3 * (inputs + adapters) / layers as f64, "{residual}: a block more adds {more}");
    }
}

#[cfg(all(target_os = "linux", feature = "train"))]
#[test]
fn child_trains() {
    use pricket::train::{Checkpointing, Initial, Lora, LoraConfig, Sample, TrainOptions, TrainTarget, Trainer};

    let Ok(setup) = std::env::var("PRICKET_CHILD_TRAIN") else { return };
    let [layers, checkpointing, residual] = setup.split(' ').collect::<Vec<_>>()[..] else { panic!("{setup}") };
    let (_, d, t) = STEP;
    let config = serde_json::json!({
        "num_hidden_layers": layers.parse::<usize>().unwrap(), "hidden_size": d, "num_attention_heads": 8,
        "intermediate_size": 4 * d, "max_position_embeddings": t, "vocab_size": 64,
        "use_parallel_residual": residual == "parallel",
    });
    let pricket = crate::common::small(&config, 3);
    let base = pricket.base().unwrap();
    let lora = Lora::new(LoraConfig { rank: 16, initial: Initial::Random, ..LoraConfig::default() }, &base, 0).unwrap();
    let tuned = lora.train(&base, 0).unwrap();
    let way = if checkpointing == "true" { Checkpointing::PerBlock } else { Checkpointing::Off };
    let options = TrainOptions { batch: 1, checkpointing: way, ..TrainOptions::new(2, 1e-4) };
    let sample = Sample::new((0..t as u32).map(|i| i * 7 % 64).collect()).unwrap();
    let mut trainer = Trainer::new(TrainTarget::Adapter(Box::new(lora)), tuned, vec![sample], options).unwrap();
    // The first step also allocates the optimizer's state and loads code.
    trainer.advance().unwrap();
    let memory = trainer.memory().unwrap();
    println!("ESTIMATED {}", memory.to_allocate() - memory.optimizer);
    let before = rss();
    // Resets the peak.
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    trainer.advance().unwrap();
    println!("ADDED {}", peak_rss() - before);
}

/// Weights in place have the same bits as copied ones, take memory only when used, and give an error if their file
/// shrinks.
#[cfg(target_os = "linux")]
#[test]
fn weights_are_used_in_place() {
    use pricket::convert::{ConvertOptions, Target};

    let directory = tempfile::tempdir().unwrap();
    let logits = |pricket: &pricket::Pricket| {
        let model = pricket.model();
        let ids = pricket::candle::Tensor::new(&[[1u32, 5, 9, 200, 17, 3]], &model.info().device).unwrap();
        let mut ctx = pricket::Context::new();
        Ok::<_, pricket::nn::Error>(model.head(&model.hidden(&ids, &mut ctx)?)?.flatten_all()?.to_vec1::<f32>()?)
    };
    for (model, target) in [("tiny", Target::F16), ("tiny-mpt", Target::F32), ("tiny-llama", Target::BF16)] {
        let out = directory.path().join(model);
        let options = ConvertOptions { target, ..ConvertOptions::default() };
        pricket::Loader::new(root().join("models").join(model)).convert(&out, &options).unwrap();
        let load = || pricket::Loader::new(&out).threads(1);
        let (copied, in_place) = (load().load().unwrap(), load().in_place().load().unwrap());
        assert_eq!(logits(&in_place).unwrap(), logits(&copied).unwrap(), "{model}");
        assert_eq!(in_place.info().weight_bytes, copied.info().weight_bytes);
        let file = std::fs::File::options().write(true).open(out.join("model.safetensors")).unwrap();
        file.set_len(file.metadata().unwrap().len() - 1).unwrap();
        let error = logits(&in_place).unwrap_err().to_string();
        assert!(error.contains("model.safetensors") && error.contains("bytes when it was loaded"), "{error}");
        assert_eq!(logits(&copied).unwrap(), logits(&copied).unwrap(), "{model}");
    }
}

/// The private memory of a process grows with the copied weights, not with the mapped ones.
#[cfg(target_os = "linux")]
#[test]
fn weights_in_place_are_not_copied() {
    let directory = tempfile::tempdir().unwrap();
    let config = serde_json::json!({
        "model_type": "mpt", "d_model": 512, "n_layers": 8, "n_heads": 8, "expansion_ratio": 4, "max_seq_len": 64, "vocab_size": 64,
        "attn_config": {"alibi": true}, "no_bias": true,
    });
    let store = std::sync::Arc::new(pricket::weights::Random::new(pricket::weights::Dtype::F32, 1));
    let options = pricket::convert::ConvertOptions::default();
    pricket::Loader::from_store(config, store).convert(directory.path().join("model"), &options).unwrap();
    let own = |in_place: &str| -> f64 {
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "memory::child_holds_a_model", "--nocapture"])
            .env("PRICKET_CHILD_HOLDS", directory.path().join("model"))
            .env("PRICKET_CHILD_IN_PLACE", in_place)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let number = text.split("OWN ").nth(1).and_then(|rest| rest.split_whitespace().next());
        number.unwrap_or_else(|| panic!("{text}{}", String::from_utf8_lossy(&output.stderr))).parse().unwrap()
    };
    let weights = f64::from(8 * 12 * 512 * 512 * 4);
    let (copied, in_place) = (own("no"), own("yes"));
    assert!(copied > weights && in_place < 0.15 * weights, "copied {copied}, in place {in_place} of {weights}");
}

#[cfg(target_os = "linux")]
#[test]
fn child_holds_a_model() {
    let Some(path) = std::env::var_os("PRICKET_CHILD_HOLDS") else { return };
    let own = || status("RssAnon:") as f64;
    let loader = pricket::Loader::new(path).threads(1);
    let loader = if std::env::var("PRICKET_CHILD_IN_PLACE").unwrap() == "yes" { loader.in_place() } else { loader };
    let before = own();
    let pricket = loader.load().unwrap();
    println!("OWN {}", own() - before);
    drop(pricket);
}
