use serde_json::{Value, json};

/// Layers, width, heads and vocabulary of the published GPT-NeoX checkpoints.
const GPT_NEOX: [(&str, usize, usize, usize, usize); 13] = [
    ("14m", 6, 128, 4, 50304),
    ("31m", 6, 256, 8, 50304),
    ("70m", 6, 512, 8, 50304),
    ("160m", 12, 768, 12, 50304),
    ("410m", 24, 1024, 16, 50304),
    ("1b", 16, 2048, 8, 50304),
    ("1.4b", 24, 2048, 16, 50304),
    ("2.8b", 32, 2560, 32, 50304),
    ("6.9b", 32, 4096, 32, 50432),
    ("12b", 36, 5120, 40, 50688),
    ("neox-20b", 44, 6144, 64, 50432),
    ("incite-3b", 32, 2560, 32, 50432),
    ("incite-7b", 32, 4096, 32, 50432),
];

/// Layers, width, heads, positions, `alibi_bias_max` and `clip_qkv` of the published MPT checkpoints.
const MPT: [(&str, [usize; 4], f64, Option<f64>); 5] = [
    ("mpt-1b", [24, 2048, 16, 2048], 8.0, None),
    ("mpt-7b", [32, 4096, 32, 2048], 8.0, None),
    ("mpt-7b-8k", [32, 4096, 32, 8192], 8.0, None),
    ("mpt-7b-storywriter", [32, 4096, 32, 65536], 16.0, Some(6.0)),
    ("mpt-30b", [48, 7168, 64, 8192], 8.0, None),
];

/// The names that [`published_config`] knows.
pub fn published_shapes() -> impl Iterator<Item = &'static str> {
    GPT_NEOX.iter().map(|(name, ..)| *name).chain(MPT.iter().map(|(name, ..)| *name))
}

fn mpt(name: &str) -> Option<Value> {
    let &(_, [layers, d, heads, positions], bias_max, clip) = MPT.iter().find(|(known, ..)| *known == name)?;
    let common = json!({
        "d_model": d, "n_heads": heads, "n_layers": layers, "vocab_size": 50432, "max_seq_len": positions,
        "no_bias": true, "eos_token_id": 0,
    });
    let own = if name == "mpt-1b" {
        json!({
            "architectures": ["MosaicGPT"], "model_type": "mosaic_gpt", "mlp_ratio": 4, "alibi": true,
            "alibi_bias_max": bias_max, "attn_qk_ln": true,
        })
    } else {
        json!({
            "architectures": ["MPTForCausalLM"], "model_type": "mpt", "expansion_ratio": 4,
            "attn_config": {"alibi": true, "alibi_bias_max": bias_max, "clip_qkv": clip},
        })
    };
    let mut config = common;
    config.as_object_mut()?.extend(own.as_object()?.clone());
    Some(config)
}

/// The config.json of a published shape, such as `1.4b` (Pythia), `neox-20b`, `incite-3b` or `mpt-7b`, for estimates and
/// for measuring with random weights.
///
/// ```
/// let config = pricket::published_config("12b").unwrap();
/// let estimate = pricket::estimate(&config, pricket::Dtype::F16, 2048)?;
/// assert_eq!(estimate.info.parameters, 11_846_072_320);
/// # Ok::<(), pricket::Error>(())
/// ```
pub fn published_config(name: &str) -> Option<Value> {
    let Some(&(_, layers, d, heads, vocab)) = GPT_NEOX.iter().find(|(known, ..)| *known == name) else {
        return mpt(name);
    };
    let incite = name.starts_with("incite");
    Some(json!({
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": vocab,
        "hidden_size": d,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * d,
        "hidden_act": if name == "neox-20b" { "gelu_fast" } else { "gelu" },
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "rotary_pct": if incite { 1.0 } else { 0.25 },
        "rotary_emb_base": 10000,
        "use_parallel_residual": !incite,
        "tie_word_embeddings": false,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }))
}
