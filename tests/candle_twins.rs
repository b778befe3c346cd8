//! Comparison with models of candle-transformers.

use candle_nn::VarBuilder;
use candle_transformers::generation::{LogitsProcessor, Sampling};
use candle_transformers::models::llama::{Cache, Config, Llama};
use pricket::candle::{DType, Device, Tensor};
use pricket::convert::{ConvertOptions, Target};
use pricket::lm::Sampler;
use pricket::{Context, Loader, SamplingParams};

use crate::common::{example, root, worst};

/// candle-transformers' Llama reads the tensors that a conversion to Hub layout writes, from safetensors and from ggjt.
#[test]
fn candles_llama_gives_the_same_logits() {
    let logits = |model: &dyn pricket::CausalLm, ids: &[u32], ctx: &mut Context| {
        let ids = Tensor::new(ids, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        model.head(&model.hidden(&ids, ctx).unwrap()).unwrap()
    };
    let dir = tempfile::tempdir().unwrap();
    let sources = ["models/llama-gqa", "files/llama-ggjt-q4_0/model.bin", "files/llama-gguf-f16/model.gguf"];
    for (i, source) in sources.iter().enumerate() {
        let hub = dir.path().join(format!("{i}"));
        let options = ConvertOptions { target: Target::F32, ..ConvertOptions::default() };
        Loader::new(root().join("tests/golden").join(source)).convert(&hub, &options).unwrap();
        let ours = Loader::new(root().join("tests/golden").join(source)).threads(2).load().unwrap();
        let (config, info) = (ours.config(), ours.info().clone());
        assert_ne!(config["attention_bias"], true, "candle's has no biases");
        let twin_config = Config {
            hidden_size: info.d_model,
            intermediate_size: config["intermediate_size"].as_u64().unwrap() as usize,
            vocab_size: info.vocab,
            num_hidden_layers: info.layers,
            num_attention_heads: info.heads,
            num_key_value_heads: info.kv_heads,
            use_flash_attn: false,
            rms_norm_eps: config["rms_norm_eps"].as_f64().unwrap(),
            rope_theta: config["rope_theta"].as_f64().unwrap_or(10_000.0) as f32,
            bos_token_id: None,
            eos_token_id: None,
            rope_scaling: None,
            max_position_embeddings: info.trained_length,
            tie_word_embeddings: config["tie_word_embeddings"] == true,
        };
        let tensors = pricket::candle::safetensors::load(hub.join("model.safetensors"), &Device::Cpu).unwrap();
        let weights = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
        let twin = Llama::load(weights, &twin_config).unwrap();
        let mut cache = Cache::new(false, DType::F32, &twin_config, &Device::Cpu).unwrap();
        let ids: Vec<u32> = (0..24).map(|i| i * 37 % info.vocab as u32).collect();
        let input = Tensor::new(&ids[..], &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let expected = twin.forward(&input, 0, &mut cache).unwrap();
        let found = logits(&*ours.model(), &ids, &mut Context::new()).narrow(1, 23, 1).unwrap().squeeze(1).unwrap();
        assert!(worst(&found, &expected) < 2e-5, "{source}: {}", worst(&found, &expected));
    }
}

#[test]
fn the_example_continues_a_prompt_with_candles_llama() {
    let run = |args: &[&str]| example("candle").args(args).output().unwrap();
    let output = run(&["--model", "models/tiny-llama", "--prompt", "The whale", "-n", "12"]);
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    // Greedy decoding gives the text of pricket.
    let options = pricket::GenerateOptions { max_tokens: 12, stop_at_eos: false, ..Default::default() };
    let ours = Loader::embedded("tiny-llama").unwrap().load().unwrap().generate("The whale", &options).unwrap();
    assert_eq!(said.trim_end(), format!("The whale{}", ours.text).trim_end());
    assert_eq!(run(&["--model", "models/tiny"]).status.code(), Some(1));
}

/// Counts how often each token is drawn.
fn histogram(n: usize, mut draw: impl FnMut() -> u32) -> Vec<f64> {
    let mut counts = vec![0.0; n];
    for _ in 0..4000 {
        counts[draw() as usize] += 1.0 / 4000.0;
    }
    counts
}

#[test]
fn sampling_matches_candles_sampler() {
    let logits = [1.0f32, -2.0, 0.5, 3.0, 2.0, -1.0];
    let tensor = Tensor::new(&logits, &Device::Cpu).unwrap();
    for sampling in [
        Sampling::All { temperature: 0.9 },
        Sampling::TopK { k: 3, temperature: 1.2 },
        Sampling::TopP { p: 0.8, temperature: 1.0 },
        Sampling::TopKThenTopP { k: 4, p: 0.9, temperature: 0.7 },
    ] {
        let mut theirs = LogitsProcessor::from_sampling(7, sampling.clone());
        let mut ours = Sampler::new(SamplingParams::from(&sampling), 7);
        let a = histogram(6, || theirs.sample(&tensor).unwrap());
        let b = histogram(6, || ours.sample(&mut logits.to_vec(), &[], 0));
        for (a, b) in a.iter().zip(&b) {
            assert!((a - b).abs() < 0.035, "{sampling:?}: {a} and {b}");
        }
    }
}
