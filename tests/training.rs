//! Adapters, gradients and training runs.

use std::path::Path;
use std::sync::atomic::Ordering;

use pricket::candle::{DType, Device, Tensor};
use pricket::convert::{ConvertOptions, Target};
use pricket::train::{
    Bias, Checkpointing, Gradients, Initial, Lora, LoraConfig, Optimizer, OptimizerConfig, Record, Rule, Sample,
    Schedule, Select, TrainOptions, TrainTarget, Trainer, add_gradients, losses, read_records,
};
use pricket::{CausalLm, Context, Loader, Pricket};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::common::{root, small, worst};
use crate::properties::any_config;

fn row(len: usize, seed: u64) -> Vec<u32> {
    (0..len as u64).map(|i| ((i + 3) * (seed * 2 + 7919) % 61) as u32).collect()
}

/// Three samples of different lengths, two of them with prompts.
fn samples() -> Vec<Sample> {
    let response = |prompt, len, seed| Sample::response(&row(prompt, seed), &row(len, seed + 50)).unwrap();
    vec![response(3, 9, 1), Sample::new(row(17, 2)).unwrap(), response(6, 2, 3)]
}

fn random_lora(pricket: &Pricket, config: LoraConfig) -> Lora {
    Lora::new(LoraConfig { initial: Initial::Random, ..config }, &pricket.base().unwrap(), 3).unwrap()
}

fn gradients(tuned: &pricket::train::Tuned, way: Checkpointing) -> (f64, Vec<Option<Vec<u32>>>) {
    let mut sum = Gradients::none(&tuned.parameters);
    tuned.passes.store(7, Ordering::Relaxed);
    let nll = add_gradients(&*tuned.model, &samples(), 0.1, &tuned.parameters, way, &mut sum).unwrap();
    let bits =
        |grad: &Tensor| grad.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect();
    (nll, sum.of().iter().map(|grad| grad.as_ref().map(bits)).collect())
}

fn logits(model: &dyn CausalLm) -> Tensor {
    let ids = Tensor::new(row(20, 5), &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    model.head(&model.hidden(&ids, &mut Context::new()).unwrap()).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn checkpointing_changes_no_bit_and_every_tensor_is_trained(
        config in any_config(), rslora: bool, dora: bool, dropout: bool, bias: bool,
    ) {
        let pricket = small(&config, 11);
        let lora = random_lora(&pricket, LoraConfig {
            rank: 3, rslora, dora, dropout: if dropout { 0.3 } else { 0.0 },
            bias: if bias { Bias::All } else { Bias::None }, ..LoraConfig::default()
        });
        let tuned = lora.train(&pricket.base().unwrap(), 9).unwrap();
        let (nll, plain) = gradients(&tuned, Checkpointing::Off);
        let (again, checkpointed) = gradients(&tuned, Checkpointing::PerBlock);
        prop_assert_eq!(nll, again);
        for (i, parameter) in tuned.parameters.iter().enumerate() {
            prop_assert!(plain[i].as_ref().is_some_and(|bits| bits.iter().any(|bits| *bits != 0)), "{}", parameter.name);
            prop_assert_eq!(&plain[i], &checkpointed[i], "{}", &parameter.name);
        }
        // One step changes every tensor of every layer.
        let before = lora.tensors();
        let mut sum = Gradients::none(&tuned.parameters);
        add_gradients(&*tuned.model, &samples(), 0.1, &tuned.parameters, Checkpointing::PerBlock, &mut sum).unwrap();
        let mut optimizer = Optimizer::new(OptimizerConfig::new(Rule::AdamW, 1e-3), &tuned.parameters).unwrap();
        optimizer.step(&tuned.parameters, &sum, 1.0).unwrap();
        for (name, tensor) in lora.trained(&tuned.parameters).unwrap().tensors() {
            prop_assert!(worst(&tensor, &before[&name]) > 0.0, "{} has not changed", name);
        }
    }

    #[test]
    fn an_adapter_survives_saving_and_merging(config in any_config(), rslora: bool, dora: bool, save: bool) {
        let pricket = small(&config, 12);
        // An adapter larger than the model would multiply the rounding errors of both ways.
        let mut lora_config = LoraConfig { rank: 2, alpha: 2.0, rslora, dora, ..LoraConfig::default() };
        if save {
            // A norm, whose name differs between families.
            let mut norm = String::new();
            drop(pricket.model().map_layers(&mut |layer| {
                if let pricket::nn::Layer::Norm(found) = layer { norm = found.name().to_owned() }
                Ok(())
            }).unwrap());
            lora_config.modules_to_save = vec![norm];
        }
        let lora = random_lora(&pricket, lora_config);
        let dir = tempfile::tempdir().unwrap();
        lora.write(dir.path()).unwrap();
        let read = Lora::read(dir.path()).unwrap();
        prop_assert_eq!(read.config().to_json(), lora.config().to_json());
        let adapted = logits(&*pricket.with_adapter(&read).unwrap().model());
        let effect = worst(&adapted, &logits(&*pricket.model()));
        prop_assert!(effect > 1e-3, "the adapter has an effect");
        prop_assert_eq!(worst(&adapted, &logits(&*pricket.with_adapter(&lora).unwrap().model())), 0.0);
        let merged = lora.merge(&pricket.base().unwrap()).unwrap();
        let off = worst(&adapted, &logits(&*merged));
        prop_assert!(off < 2e-5, "{off} of {effect}");
    }
}

#[test]
fn targets_are_those_of_peft() {
    let pricket = small(&json!({}), 1);
    let base = pricket.base().unwrap();
    let modules = |config: LoraConfig| -> Vec<String> {
        Lora::new(config, &base, 0).unwrap().modules().map(str::to_owned).collect()
    };
    let names = |names: &[&str]| Select::Names(names.iter().map(|name| (*name).to_owned()).collect());
    let default = LoraConfig::default;
    assert_eq!(modules(default()).len(), 8, "all linear layers but the head");
    // A list matches whole parts of a name: `dense` does not match dense_h_to_4h.
    assert_eq!(modules(LoraConfig { targets: names(&["dense"]), ..default() }).len(), 2);
    let pattern = Select::Pattern(r".*layers\.1\.(?!mlp|.*norm).*".into());
    let found = modules(LoraConfig { targets: pattern, ..default() });
    assert_eq!(found, ["gpt_neox.layers.1.attention.dense", "gpt_neox.layers.1.attention.query_key_value"]);
    let found =
        modules(LoraConfig { exclude: Some(names(&["query_key_value", "dense"])), layers: Some(vec![0]), ..default() });
    assert_eq!(found, ["gpt_neox.layers.0.mlp.dense_4h_to_h", "gpt_neox.layers.0.mlp.dense_h_to_4h"]);
    let written = Lora::new(default(), &base, 0).unwrap().config().to_json();
    assert_eq!(written["target_modules"], json!(["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"]));

    // The head under both of its names, an embedding, and a name without a module.
    let pattern = Select::Pattern(r".*attention\.dense".into());
    let error = Lora::new(LoraConfig { targets: pattern, layers: Some(vec![0]), ..default() }, &base, 0).unwrap_err();
    assert!(error.to_string().contains("layers_to_transform: cannot be combined with"), "{error}");
    for head in ["embed_out", "lm_head"] {
        let lora = Lora::new(LoraConfig { modules_to_save: vec![head.into()], ..default() }, &base, 0).unwrap();
        assert!(lora.tensors().contains_key(&format!("base_model.model.{head}.weight")));
        lora.apply(&base).unwrap();
    }
    let refused = |config: LoraConfig| Lora::new(config, &base, 0).unwrap_err().to_string();
    let error = refused(LoraConfig { targets: names(&["embed_in"]), ..default() });
    assert!(error.contains("embed_in is not a linear layer; modules_to_save"), "{error}");
    let error = refused(LoraConfig { targets: names(&["q_proj"]), ..default() });
    assert!(error.contains("target_modules: no module matches") && error.contains("query_key_value"), "{error}");
    let error = refused(LoraConfig { modules_to_save: vec!["score".into()], ..default() });
    assert!(error.contains("the model has no module score"), "{error}");
    let error = refused(LoraConfig { targets: Select::Pattern("(".into()), ..default() });
    assert!(error.contains("not a valid regular expression"), "{error}");
    let slow = Select::Pattern(r"((a|g|p|t|_|n|e|o|x|\.|l|y|r|s|[0-9])+)+(?=!)".into());
    assert!(refused(LoraConfig { targets: slow, ..default() }).contains("target_modules"));
}

#[test]
fn settings_that_are_not_implemented_are_refused_by_name() {
    let good = LoraConfig { rank: 2, ..LoraConfig::default() }.to_json();
    let with = |key: &str, value: Value| {
        let mut config = good.clone();
        config[key] = value;
        LoraConfig::from_json(&config)
    };
    for (key, value) in [
        ("peft_type", json!("IA3")),
        ("use_qalora", json!(true)),
        ("alora_invocation_tokens", json!([1, 2])),
        ("layer_replication", json!([[0, 2], [1, 3]])),
        ("target_parameters", json!(["experts"])),
        ("trainable_token_indices", json!([5])),
        ("lora_bias", json!(true)),
        ("ensure_weight_tying", json!(true)),
        ("something_new", json!({"a": 1})),
        ("init_lora_weights", json!("pissa")),
        ("r", json!(0)),
        ("r", json!("8")),
        ("lora_alpha", json!("16")),
        ("lora_dropout", json!(1.0)),
        ("bias", json!("some")),
        ("rank_pattern", json!({"dense": 2.5})),
        ("layers_to_transform", json!([-1])),
        ("target_modules", Value::Null),
        ("target_modules", json!([1])),
    ] {
        let error = with(key, value.clone()).unwrap_err().to_string();
        assert!(error.contains(&format!("adapter_config.json: {key}: ")), "{key} {value}: {error}");
    }
    // Settings that are unset or do not affect a trained adapter.
    for (key, value) in [
        ("something_new", Value::Null),
        ("something_new", json!(false)),
        ("megatron_core", json!("megatron.core")),
        ("init_lora_weights", json!("eva")),
        ("loftq_config", json!({})),
        ("peft_version", json!("9.0")),
        ("layers_to_transform", json!(3)),
    ] {
        with(key, value).unwrap();
    }
}

#[test]
fn damaged_adapters_are_refused_with_the_tensor() {
    let pricket = small(&json!({}), 1);
    let dir = tempfile::tempdir().unwrap();
    let lora = Lora::new(LoraConfig { rank: 2, ..LoraConfig::default() }, &pricket.base().unwrap(), 0).unwrap();
    let key = "base_model.model.gpt_neox.layers.1.attention.dense.lora_A.weight";
    let with = |name: &str, tensor: Option<Tensor>, config: &LoraConfig| {
        let mut tensors = lora.tensors();
        match tensor {
            Some(tensor) => tensors.insert(name.to_owned(), tensor),
            None => tensors.remove(name),
        };
        Lora::from_tensors(config.clone(), tensors, "adapter_model.safetensors")
    };
    let zeros = |shape: &[usize]| Some(Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap());
    let config = lora.config();
    let error = with(key, None, config).unwrap_err().to_string();
    assert!(error.contains("layers.1.attention.dense: lora_A or lora_B is missing"), "{error}");
    let error = with(key, zeros(&[3, 24]), config).unwrap_err().to_string();
    assert!(error.contains("lora_A is [3, 24]") && error.contains("expected rank 2"), "{error}");
    let error = with(&key.replace("lora_A", "lora_embedding_A"), zeros(&[2, 24]), config).unwrap_err().to_string();
    assert!(error.contains("lora_embedding_A.weight: this type of adapter is not implemented"), "{error}");
    let error = with(key, zeros(&[2, 24]), &LoraConfig { dora: true, ..config.clone() }).unwrap_err().to_string();
    assert!(error.contains("has no lora_magnitude_vector, but use_dora is true"), "{error}");
    // An adapter of another model.
    let error = pricket.with_adapter(&with(key, zeros(&[2, 32]), config).unwrap()).unwrap_err().to_string();
    assert!(error.contains("gpt_neox.layers.1.attention.dense") && error.contains("[rank, 24]"), "{error}");
    let other = with(&key.replace("layers.1", "layers.7").replace("lora_A", "lora_B"), zeros(&[24, 2]), config);
    assert!(other.unwrap_err().to_string().contains("layers.7"));
    let mpt = small(&json!({"model_type": "mpt", "d_model": 24, "n_heads": 2, "n_layers": 2}), 1);
    let error = pricket.with_adapter(&lora).and_then(|_| mpt.with_adapter(&lora)).unwrap_err().to_string();
    assert!(error.contains("which this mpt model does not have"), "{error}");

    let read = || Lora::read(dir.path()).unwrap_err().to_string();
    assert!(read().contains("adapter_config.json"));
    lora.write(dir.path()).unwrap();
    std::fs::write(dir.path().join("adapter_config.json"), "{\"r\": 2,").unwrap();
    assert!(read().contains("is not JSON"));
    std::fs::write(dir.path().join("adapter_config.json"), lora.config().to_json().to_string()).unwrap();
    std::fs::write(
        dir.path().join("adapter_model.safetensors"),
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    )
    .unwrap();
    assert!(read().contains("Git LFS"), "{}", read());
    std::fs::remove_file(dir.path().join("adapter_model.safetensors")).unwrap();
    assert!(read().contains("no adapter_model.safetensors"));
}

/// An adapter merged into a GGUF file, from a checkpoint and from a GGUF file with another order of rows.
#[test]
fn conversion_merges_adapters() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = root().join("models/tiny");
    let base = Loader::new(&tiny).precision(pricket::loading::Precision::F32).load().unwrap();
    let lora = random_lora(&base, LoraConfig { rank: 2, alpha: 1.0, ..LoraConfig::default() });
    let adapter = dir.path().join("adapter");
    lora.write(&adapter).unwrap();
    let expected = logits(&*Loader::new(&tiny).adapter(&adapter).load().unwrap().model());
    let plain = logits(&*base.model());
    assert!(worst(&expected, &plain) > 1e-2);

    let f32 = ConvertOptions { target: Target::F32, ..ConvertOptions::default() };
    let write = |loader: Loader, name: &str| {
        let out = dir.path().join(name);
        loader.convert(&out, &f32).unwrap();
        out
    };
    let gguf = write(Loader::new(&tiny), "plain.gguf");
    let sources = [
        write(Loader::new(&tiny).adapter(&adapter), "merged.gguf"),
        write(Loader::new(&tiny).adapter(&adapter), "merged"),
        write(Loader::new(&gguf).adapter(&adapter), "again.gguf"),
        write(Loader::new(&gguf).adapter(&adapter), "again"),
    ];
    for source in sources {
        let found = logits(&*Loader::new(&source).load().unwrap().model());
        assert!(worst(&found, &expected) < 1e-4, "{}: {}", source.display(), worst(&found, &expected));
    }
    // Over a file in the model's order of rows, without merging.
    let over = Loader::new(&gguf).adapter(&adapter).load().unwrap();
    assert!(worst(&logits(&*over.model()), &expected) < 1e-4);
    // Merged and quantized.
    let quantized = Loader::new(&tiny).adapter(&adapter);
    let options = ConvertOptions {
        target: Target::Quantized(pricket::nn::Quantization {
            weights: pricket::nn::BlockType::Q8_0,
            embeddings_and_head: None,
        }),
        ..ConvertOptions::default()
    };
    let out = dir.path().join("q8.gguf");
    quantized.convert(&out, &options).unwrap();
    let twice = dir.path().join("twice.gguf");
    Loader::new(dir.path().join("merged")).convert(&twice, &options).unwrap();
    let logits_of = |path: &Path| logits(&*Loader::new(path).load().unwrap().model());
    assert!(worst(&logits_of(&out), &logits_of(&twice)) < 1e-2, "as quantizing what was merged before");

    let mpt = Loader::new(root().join("models/tiny-mpt")).load().unwrap();
    let lora = random_lora(&mpt, LoraConfig { modules_to_save: vec!["wte".into()], ..LoraConfig::default() });
    lora.write(&adapter).unwrap();
    let error = Loader::new(root().join("models/tiny-mpt")).adapter(&adapter).convert(dir.path().join("x.gguf"), &f32);
    assert!(error.unwrap_err().to_string().contains("ties embedding and head"));
}

#[test]
fn invalid_training_settings_are_refused() {
    let pricket = small(&json!({}), 1);
    let lora = Lora::new(LoraConfig::default(), &pricket.base().unwrap(), 0).unwrap();
    let new = |samples: Vec<Sample>, change: &dyn Fn(&mut TrainOptions)| {
        let mut options = TrainOptions::new(4, 1e-3);
        change(&mut options);
        let tuned = lora.train(&pricket.base().unwrap(), 0).unwrap();
        Trainer::new(TrainTarget::Adapter(Box::new(lora.clone())), tuned, samples, options)
    };
    let refused =
        |samples: Vec<Sample>, change: &dyn Fn(&mut TrainOptions)| new(samples, change).unwrap_err().to_string();
    assert!(refused(vec![], &|_| ()).contains("has a token id that counts"));
    assert!(refused(vec![Sample::new(vec![1]).unwrap()], &|_| ()).contains("has a token id that counts"));
    assert!(refused(vec![Sample::new(vec![1, 61]).unwrap()], &|_| ()).contains("sample 1: id 61 is outside"));
    assert!(
        refused(vec![Sample::new(row(97, 1)).unwrap()], &|_| ())
            .contains("has 97 token ids; the model's context is 96")
    );
    assert!(refused(samples(), &|options| options.batch = 0).contains("expected at least 1"));
    assert!(refused(samples(), &|options| options.clip = Some(-1.0)).contains("clip is"));
    assert!(refused(samples(), &|options| options.optimizer.lr = f64::NAN).contains("lr is NaN"));
    assert!(refused(samples(), &|options| options.optimizer.betas.1 = 1.0).contains("betas"));
    let ratios =
        |end: &str, ratio: f64| refused(samples(), &|options| options.optimizer.lr_ratios = vec![(end.into(), ratio)]);
    assert!(ratios("lora_B.weight", -1.0).contains("expected a positive number"));
    assert!(ratios("lora_b.weight", 2.0).contains("no parameter has a name that ends in lora_b.weight"));
    assert!(Schedule::named("sine", 0, 1).unwrap_err().to_string().contains("use constant"));
}

/// For weights that overflow, the error names the step, the micro-batch and the block, and nothing changes.
#[test]
fn a_nan_loss_is_reported_with_its_block() {
    let pricket = small(&json!({}), 1);
    let base = pricket.base().unwrap();
    let lora = random_lora(&pricket, LoraConfig { rank: 2, ..LoraConfig::default() });
    let mut tensors = lora.tensors();
    let name = "base_model.model.gpt_neox.layers.1.mlp.dense_4h_to_h.lora_B.weight";
    let huge = (tensors[name].ones_like().unwrap() * 1e38).unwrap();
    tensors.insert(name.into(), huge);
    let lora = Lora::from_tensors(lora.config().clone(), tensors, "adapter").unwrap();
    let tuned = lora.train(&base, 0).unwrap();
    let before = lora.trained(&tuned.parameters).unwrap();
    let options = TrainOptions { batch: 3, micro_batch_tokens: 20, ..TrainOptions::new(4, 1e-3) };
    let mut trainer = Trainer::new(TrainTarget::Adapter(Box::new(lora)), tuned, samples(), options).unwrap();
    let error = trainer.advance().unwrap_err().to_string();
    assert!(error.starts_with("step 1, micro-batch 1: the loss is "), "{error}");
    assert!(error.contains("the output of block 1 contains NaN or infinity"), "{error}");
    let after = before.trained(&trainer.tuned().parameters).unwrap();
    for (name, tensor) in after.tensors() {
        assert_eq!(worst(&tensor, &before.tensors()[&name]), 0.0, "{name}");
    }
}

#[test]
fn records_of_all_forms_become_samples() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data.jsonl");
    let lines = [
        json!({"text": "We the people"}),
        json!({"prompt": "One, two,", "completion": " three"}),
        json!({"instruction": "Who?", "context": "", "response": "Ahab", "category": "qa"}),
        json!({"instruction": "Who?", "input": "A whale.", "output": "Ahab"}),
        json!({"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}),
        json!({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"},
            {"role": "user", "content": "Hey"}, {"role": "assistant", "content": "Hum"}]}),
    ];
    let text: Vec<String> = lines.iter().map(Value::to_string).collect();
    std::fs::write(&path, text.join("\n\n")).unwrap();
    let records: Vec<Record> = read_records(&[&path]).unwrap().into_iter().map(|(_, record)| record).collect();
    let tiny = pricket::tiny().unwrap();
    let tokenizer = tiny.tokenizer().unwrap();
    let counted = |record: usize, format: &str| {
        let sample =
            records[record].sample(Some(tokenizer), &pricket::text::prompt_format(format).unwrap(), &[0]).unwrap();
        (sample.ids().to_vec(), sample.counted())
    };
    let ids = |text: &str| tokenizer.encode(text).unwrap();
    assert_eq!(counted(0, "plain"), ([ids("We the people"), vec![0]].concat(), ids("We the people").len()));
    assert_eq!(counted(1, "plain"), ([ids("One, two,"), ids(" three"), vec![0]].concat(), ids(" three").len() + 1));
    assert_eq!(counted(2, "dolly").1, ids("Ahab").len() + 1);
    assert!(tokenizer.decode(&counted(3, "dolly-blank").0).contains("Who?\n\nInput:\nA whale.\n\n### Response:\nAhab"));
    assert_eq!(counted(4, "plain"), (vec![5, 6, 7, 8], 2));
    // Both answers of a conversation count, with the tokens that end them.
    let (chat, count) = counted(5, "chatml");
    assert_eq!(count, ids("Ho<|im_end|>").len() + ids("Hum<|im_end|>").len() + 1, "{}", tokenizer.decode(&chat));

    // A format whose answers begin with a space, in a conversation and alone, and a format that ends turns with the end
    // token.
    let text = |record: usize, format: &str| tokenizer.decode(&counted(record, format).0);
    assert!(text(5, "incite-chat").contains("<bot>: Ho\n<human>: Hey\n<bot>: Hum"), "{}", text(5, "incite-chat"));
    assert!(text(2, "incite-chat").contains("<bot>: Ahab"));
    assert!(!text(5, "oasst").contains("<|endoftext|><|endoftext|>"), "{}", text(5, "oasst"));

    for (line, what) in [
        ("[1]", "expected an object"),
        ("{\"prompt\": \"x\"}", "prompt without completion"),
        ("{\"question\": \"x\"}", "found question"),
        ("{\"text\": 3}", "text is 3"),
        ("{\"input_ids\": [1, -2]}", "input_ids: expected a list of token ids"),
        ("{\"input_ids\": [1, 2], \"labels\": [1, 3]}", "labels: expected -100"),
        ("{\"messages\": [{\"role\": \"user\", \"content\": \"x\"}]}", "at least one message of the assistant"),
        ("{\"text\": ", "not valid JSON"),
    ] {
        std::fs::write(&path, format!("{{\"text\": \"x\"}}\n{line}\n")).unwrap();
        let error = read_records(&[&path]).unwrap_err().to_string();
        assert!(error.contains("data.jsonl, line 2: ") && error.contains(what), "{error}");
    }
}

/// The initialization of each family, by the standard deviations of its weights.
#[test]
fn untrained_weights_have_the_deviations_of_their_scheme() {
    let deviations = |config: Value| {
        let pricket = Loader::untrained(config, 5).unwrap().threads(1).load().unwrap();
        let mut found = std::collections::BTreeMap::new();
        let note = &mut |layer: pricket::nn::Layer<'_>| {
            let weight = match &layer {
                pricket::nn::Layer::Linear(linear) => linear.weight().to_dense(DType::F32, &Device::Cpu)?,
                pricket::nn::Layer::Embedding(table) => table.weight().to_dense(DType::F32, &Device::Cpu)?,
                _ => return Ok(()),
            };
            let square = weight.sqr()?.mean_all()?.to_scalar::<f32>()?;
            let part = layer.name().rsplit('.').next().unwrap_or_default().to_owned();
            found.insert(part, f64::from(square).sqrt());
            Ok(())
        };
        drop(pricket.model().map_layers(note).unwrap());
        found
    };
    let near =
        |found: f64, expected: f64| assert!((found / expected - 1.0).abs() < 0.05, "{found}, expected {expected}");
    let (d, layers) = (96f64, 3f64);
    let neox =
        deviations(crate::common::small_config(&json!({"hidden_size": 96, "num_hidden_layers": 3, "vocab_size": 200})));
    for part in ["embed_in", "query_key_value", "embed_out"] {
        near(neox[part], (2.0 / (5.0 * d)).sqrt());
    }
    for part in ["dense", "dense_4h_to_h"] {
        near(neox[part], 2.0 / (layers * d.sqrt()));
    }
    let mpt = |init: Value| json!({"model_type": "mpt", "d_model": 96, "n_heads": 4, "n_layers": 3, "vocab_size": 200, "init_config": init});
    let kaiming = deviations(mpt(json!({"emb_init_std": 0.5})));
    near(kaiming["wte"], 0.5);
    near(kaiming["Wqkv"], (2.0 / d).sqrt());
    near(kaiming["out_proj"], (2.0 / d).sqrt() / (2.0 * layers).sqrt());
    near(kaiming["down_proj"], (2.0 / (4.0 * d)).sqrt() / (2.0 * layers).sqrt());
    let neox_init = deviations(mpt(json!({"name": "neox_init_"})));
    near(neox_init["up_proj"], (2.0 / (5.0 * d)).sqrt());
    near(neox_init["down_proj"], 2.0 / (layers * d.sqrt()));
    let error = Loader::untrained(mpt(json!({"name": "xavier_normal_"})), 0).unwrap_err().to_string();
    assert!(error.contains("init_config.name: xavier_normal_ is not implemented"), "{error}");
}

/// Steps that are too small for bf16 add up in the f32 copy of the weights.
#[test]
fn weights_in_bf16_are_trained_by_f32_masters() {
    let var = pricket::candle::Var::from_tensor(&Tensor::ones((2, 2), DType::BF16, &Device::Cpu).unwrap()).unwrap();
    let parameters = [pricket::nn::Parameter { name: "w".into(), var, rows: pricket::nn::RowOrder::AsStored }];
    let mut optimizer = Optimizer::new(OptimizerConfig::new(Rule::Lion, 1e-4), &parameters).unwrap();
    let loss = || parameters[0].var.as_tensor().to_dtype(DType::F32).unwrap().sum_all().unwrap();
    for _ in 0..100 {
        let found = loss().backward().unwrap();
        let gradients = Gradients::from_tensors(vec![found.get(&parameters[0].var).cloned()]);
        optimizer.step(&parameters, &gradients, 1.0).unwrap();
    }
    // Each step changes a weight by 1e-4. Below 1, bf16 values are 4e-3 apart.
    let value = loss().to_scalar::<f32>().unwrap() / 4.0;
    assert!((value - 0.99).abs() < 3e-3, "{value}");
}

#[test]
fn batched_losses_match_single_losses() {
    let pricket = small(&json!({}), 4);
    let all = samples();
    let together = losses(&*pricket.model(), &all).unwrap();
    for (sample, nll) in all.iter().zip(together) {
        let alone = losses(&*pricket.model(), std::slice::from_ref(sample)).unwrap()[0];
        assert!((alone - nll).abs() < 1e-4);
    }
}
