//! The embedded models and their training steps.

use std::collections::HashSet;

use pricket::lm::token_logprobs;
use pricket::{GenerateOptions, Loader, Pricket, SamplingParams};

use crate::common::{files, root};

fn data(name: &str) -> String {
    std::fs::read_to_string(root().join("tests/data/tiny").join(name)).unwrap()
}

/// The models that write prose.
const TEXT_MODELS: [&str; 4] = ["tiny", "tiny-mpt", "tiny-llama", "tiny-rwkv"];

fn embedded(name: &str) -> Pricket {
    Loader::embedded(name).unwrap().load().unwrap()
}

/// Loss in nats a token over windows of the model's context.
fn held_out_loss(pricket: &Pricket, ids: &[u32]) -> f64 {
    let (mut sum, mut count) = (0.0, 0);
    for window in ids.chunks(256).filter(|window| window.len() > 1) {
        for token in token_logprobs(&*pricket.model(), window).unwrap() {
            sum -= f64::from(token.logprob);
            count += 1;
        }
    }
    sum / f64::from(count)
}

/// Loss in nats a token under the token frequencies of the training text, with one added to each count.
fn unigram_loss(ids: &[u32]) -> f64 {
    let counts: Vec<f64> = serde_json::from_str(&data("unigram_counts.json")).unwrap();
    let total: f64 = counts.iter().map(|n| n + 1.0).sum();
    let tail = &ids[1..];
    tail.iter().map(|&id| -((counts[id as usize] + 1.0) / total).ln()).sum::<f64>() / tail.len() as f64
}

#[test]
fn models_predict_held_out_text() {
    for name in TEXT_MODELS {
        let pricket = embedded(name);
        let text = data("held_out.txt");
        let (ids, known) = (pricket.encode(&text).unwrap(), pricket::tiny().unwrap().encode(&text).unwrap());
        // In nats a character, because the tokenizers differ.
        let length = text.chars().count() as f64;
        let model = held_out_loss(&pricket, &ids) * ids.len() as f64 / length;
        let unigram = unigram_loss(&known) * known.len() as f64 / length;
        println!("{name} held out: {model:.3} nats a character, unigram {unigram:.3}");
        assert!(model < 0.765 * unigram, "{name}: model {model}, unigram {unigram}");
    }
}

/// With ALiBi, text beyond the training length is as likely as text on its own.
#[test]
fn the_mpt_reads_on_beyond_its_training_length() {
    let pricket = embedded("tiny-mpt");
    assert_eq!((pricket.info().family, pricket.info().trained_length, pricket.info().context), ("mpt", 512, None));
    let ids = pricket.encode(&data("held_out.txt")).unwrap();
    let loss = |ids: &[u32], from: usize| {
        let scored = token_logprobs(&*pricket.model(), ids).unwrap();
        -scored[from..].iter().map(|token| f64::from(token.logprob)).sum::<f64>() / (scored.len() - from) as f64
    };
    let (far, near) = (loss(&ids[..2048], 1599), loss(&ids[1536..2048], 63));
    println!("positions 1600 to 2047: {far:.3} nats a token, the same text from position 64: {near:.3}");
    assert!(far < near + 0.05, "far {far}, near {near}");
}

#[test]
fn models_write_words_of_their_language() {
    TEXT_MODELS.into_iter().for_each(writes_words);
}

fn writes_words(name: &str) {
    let pricket = embedded(name);
    let list = data("words.txt");
    let known: HashSet<&str> = list.lines().collect();
    let mut words: Vec<String> = Vec::new();
    let mut seed = 0;
    while words.len() < 500 {
        let sampling = SamplingParams { temperature: 0.8, top_p: 0.95, ..SamplingParams::default() };
        let options = GenerateOptions { max_tokens: 200, sampling, seed, ..Default::default() };
        let text = pricket.generate("The", &options).unwrap().text.to_lowercase();
        let mut found: Vec<&str> = text.split(|c: char| !c.is_ascii_alphabetic()).filter(|w| !w.is_empty()).collect();
        // The first piece continues the prompt's word, and the last may be cut off.
        found.pop();
        words.extend(found.iter().skip(1).map(|w| (*w).to_owned()));
        seed += 1;
    }
    words.truncate(500);
    let real = words.iter().filter(|word| known.contains(word.as_str())).count();
    println!("{name}: {real} of 500 sampled words are in the training text");
    assert!(real >= 450, "{real} of 500: {words:?}");
}

#[test]
fn training_steps_load_and_improve() {
    let held_out = data("held_out.txt");
    let held_out = &held_out[..12_000];
    let mut last = f64::INFINITY;
    for step in [0, 16, 64, 1000, 4000] {
        let pricket = pricket::load(root().join(format!("models/tiny@step{step}"))).unwrap();
        let loss = held_out_loss(&pricket, &pricket.encode(held_out).unwrap());
        println!("step {step}: {loss:.3}");
        assert!(loss < last, "step {step}: {loss} after {last}");
        last = loss;
    }
    // The embedded model is `main`, which is the last step rounded to q8_0.
    let ids = pricket::tiny().unwrap().encode(held_out).unwrap();
    let embedded = held_out_loss(&pricket::tiny().unwrap(), &ids);
    let main = held_out_loss(&pricket::load(root().join("models/tiny@main")).unwrap(), &ids);
    assert!((main - embedded).abs() < 1e-9 && (main - last).abs() < 1e-3, "{embedded}, {main}, {last}");
}

#[test]
fn the_error_for_a_missing_revision_lists_the_existing_ones() {
    let error = pricket::load(root().join("models/tiny@step3")).unwrap_err().to_string();
    assert!(error.contains("step3") && error.contains("main, step0, step1, step16, step64"), "{error}");
}

#[test]
fn embedded_models_are_small() {
    let size = |folder: &str| -> u64 {
        let all = files(&root().join("models").join(folder));
        let own = all.iter().filter(|path| !path.to_string_lossy().contains("revisions"));
        own.map(|path| path.metadata().unwrap().len()).sum()
    };
    let sizes = ["tiny", "tiny-mpt", "tiny-chat", "tiny-llama", "tiny-rwkv"].map(size);
    // Models and code form the package, whose limit is 8 MiB compressed. `.ci/run` measures it.
    assert!(sizes.iter().all(|&bytes| bytes < 3_000_000) && sizes.iter().sum::<u64>() < 9_000_000, "{sizes:?}");
    assert!(sizes[3..].iter().all(|&bytes| bytes < 1_500_000), "{sizes:?}");
    let steps = files(&root().join("models/tiny/revisions"));
    let bytes: u64 = steps.iter().map(|path| path.metadata().unwrap().len()).sum();
    assert!(steps.len() >= 8 && bytes < 12_000_000, "{} steps of {bytes} bytes", steps.len());
}

#[test]
fn embedded_models_load_by_name() {
    // By name, and by a path that does not exist. An existing path comes first.
    for name in ["tiny", "tiny-mpt", "tiny-chat", "tiny-llama", "tiny-rwkv"] {
        assert_eq!(pricket::load(name).unwrap().info().parameters, embedded(name).info().parameters);
        let from_disk = pricket::load(root().join("models").join(name)).unwrap();
        assert_eq!(from_disk.config(), embedded(name).config());
    }
    let error = Loader::embedded("huge").unwrap_err().to_string();
    assert!(error.contains("tiny, tiny-mpt, tiny-chat, tiny-llama, tiny-rwkv"), "{error}");
}

/// The embedded models rely on this.
#[test]
fn three_embedded_models_share_one_tokenizer() {
    let tokenizer = |name: &str| std::fs::read(root().join("models").join(name).join("tokenizer.json")).unwrap();
    assert!(["tiny-mpt", "tiny-chat"].iter().all(|name| tokenizer(name) == tokenizer("tiny")));
}

/// A tap that cannot fire is an error that names the available sites.
#[test]
fn taps_and_arguments_that_fit_no_model_are_refused() {
    use pricket::candle::{DType, Device, Tensor};
    use pricket::{Context, Loader, Site, Taps};
    let (parallel, sequential) = (pricket::tiny().unwrap(), Loader::embedded("tiny-mpt").unwrap().load().unwrap());
    let ids = Tensor::new(&[[1u32, 2, 3]], &Device::Cpu).unwrap();
    let layers = parallel.info().layers;
    let run = |pricket: &pricket::Pricket, taps: Taps| {
        pricket.model().hidden(&ids, &mut Context::new().with_taps(taps)).map_err(|e| e.to_string())
    };
    let same = |_: usize, x: &Tensor| Ok(x.clone());
    for taps in [
        Taps::new().edit(Site::ResidMid, same),
        Taps::new().record(Site::ResidMid),
        Taps::new().record_at(Site::ResidMid, 0),
    ] {
        let error = run(&parallel, taps).unwrap_err();
        assert!(error.contains("no site ResidMid") && error.contains("ResidPost"), "{error}");
    }
    assert!(run(&sequential, Taps::new().edit(Site::ResidMid, same)).is_ok());
    for taps in
        [Taps::new().record_at(Site::ResidPost, layers), Taps::new().edit_at(Site::Query, 99, |x| Ok(x.clone()))]
    {
        let error = run(&parallel, taps).unwrap_err();
        assert!(error.contains(&format!("0 to {}", layers - 1)), "{error}");
    }
    assert!(run(&parallel, Taps::new().record_at(Site::Embed, 1)).unwrap_err().contains("layer 0"));
    // An edit of one layer equals an edit of all layers that selects this layer.
    let plain = run(&parallel, Taps::new()).unwrap();
    let zero = |x: &Tensor| Ok(x.zeros_like()?);
    let one = run(&parallel, Taps::new().edit_at(Site::MlpOut, 1, zero)).unwrap();
    let all = Taps::new().edit(Site::MlpOut, |layer, x| if layer == 1 { Ok(x.zeros_like()?) } else { Ok(x.clone()) });
    assert_eq!(crate::common::worst(&one, &run(&parallel, all).unwrap()), 0.0);
    assert!(crate::common::worst(&one, &plain) > 1e-3);

    let model = parallel.model();
    let refused = |ids: Tensor, named: &str| {
        let error = model.hidden(&ids, &mut Context::new()).unwrap_err().to_string();
        assert!(error.contains(named), "{error}");
    };
    refused(Tensor::new(&[1u32, 2], &Device::Cpu).unwrap(), "[batch, length]");
    refused(Tensor::new(&[[1i64, 2]], &Device::Cpu).unwrap(), "expected u32");
    refused(Tensor::new(&[[1u32, 99_999]], &Device::Cpu).unwrap(), "token id 99999");
    let wide = Tensor::zeros((1, 3, parallel.info().d_model), DType::F32, &Device::Cpu).unwrap();
    assert!(model.block(99, &wide, &mut Context::new()).unwrap_err().to_string().contains("block 99"));
    let narrow = wide.narrow(2, 0, 3).unwrap();
    for result in [model.block(0, &narrow, &mut Context::new()), model.finish(&narrow), model.head(&narrow)] {
        let error = result.unwrap_err().to_string();
        assert!(error.contains("expected a last dimension of 128, found shape [1, 3, 3]"), "{error}");
    }
    assert!(parallel.logprobs("").unwrap_err().to_string().contains("fewer than two tokens"));
}

/// The names of embedded models work in every command.
#[test]
fn embedded_names_are_models_in_every_command() {
    for name in ["tiny", "tiny-chat", "tiny@step64"] {
        assert!(pricket::inspect(name).unwrap().info.is_some(), "{name}");
        assert!(pricket::suites::tensors(name).unwrap().names().count() > 0, "{name}");
        assert!(pricket::load(name).is_ok(), "{name}");
    }
    assert_eq!(pricket::checkpoints("tiny").unwrap().steps.len(), 8);
}
