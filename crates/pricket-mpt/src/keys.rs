//! The configuration classes of MPT, their keys, and the keys of llama.cpp's GGUF metadata.

use pricket_nn::config::{GENERIC, Keys};
use serde_json::{Value, json};

/// Python class of a configuration. The classes differ in behavior too, not only in the names of their keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum ConfigClass {
    /// llm-foundry's `MPTForCausalLM`.
    #[default]
    LlmFoundry,
    /// transformers' `MptForCausalLM`, which never has biases.
    Transformers,
    /// `MosaicGPT` of mosaicml/examples, which computes the ALiBi slopes differently.
    MosaicGpt,
}

impl ConfigClass {
    /// Returns the class of a config.json; llm-foundry's if it names no other.
    pub(crate) fn of(json: &Value) -> Self {
        match (json["architectures"][0].as_str(), json["model_type"].as_str()) {
            (Some("MosaicGPT"), _) | (_, Some("mosaic_gpt")) => ConfigClass::MosaicGpt,
            (Some("MptForCausalLM"), _) => ConfigClass::Transformers,
            _ => ConfigClass::LlmFoundry,
        }
    }
}

/// Returns the key tables for the configuration class of `json`.
pub(crate) fn key_tables(json: &Value) -> &'static [Keys] {
    if ConfigClass::of(json) == ConfigClass::MosaicGpt { &[MOSAIC_GPT_KEYS, GENERIC] } else { &[KEYS, GENERIC] }
}

/// Converts a MosaicGPT configuration to the keys of MPT.
pub(crate) fn from_mosaic_gpt(json: &Value) -> Value {
    let mut out = json.clone();
    out["expansion_ratio"] = json.get("mlp_ratio").cloned().unwrap_or(json!(4));
    let mut attention = json!({});
    let unchanged_keys =
        ["softmax_scale", "alibi", "alibi_bias_max", "prefix_lm", "attn_uses_sequence_id"].map(|key| (key, key));
    for (mpt_key, mosaic_gpt_key) in
        unchanged_keys.into_iter().chain([("qk_ln", "attn_qk_ln"), ("clip_qkv", "attn_clip_qkv")])
    {
        if let Some(value) = json.get(mosaic_gpt_key) {
            attention[mpt_key] = value.clone();
        }
    }
    out["attn_config"] = attention;
    out
}

/// Keys of `MPTConfig` in llm-foundry 0.1 to 0.22 and its copies on the Hub, and of `MptConfig` in transformers 4.32 to
/// 5.24.
pub const KEYS: Keys = Keys {
    read: &[
        "d_model",
        "n_heads",
        "n_layers",
        "expansion_ratio",
        "max_seq_len",
        "vocab_size",
        "learned_pos_emb",
        "logit_scale",
        "no_bias",
        "attention_bias",
        "norm_eps",
        "layer_norm_epsilon",
        "tie_word_embeddings",
        "head_dim",
        "attn_config.attn_type",
        "attn_config.kv_n_heads",
        "attn_config.qk_ln",
        "attn_config.clip_qkv",
        "attn_config.softmax_scale",
        "attn_config.alibi",
        "attn_config.alibi_bias_max",
        "attn_config.norm_eps",
        "attn_config.head_dim",
        "ffn_config.ffn_hidden_size",
        "ffn_config.ffn_act_fn",
        "ffn_config.ffn_act_fn.name",
        "ffn_config.ffn_act_fn.approximate",
    ],
    neutral: &[
        "resid_pdrop",
        "emb_pdrop",
        "init_device",
        "embedding_fraction",
        "verbose",
        "use_pad_tok_in_ffn",
        "name",
        "loss_fn",
        "activation_checkpointing_target",
        "init_config",
        "param_init_fn",
        "attn_config.attn_pdrop",
        "attn_config.attn_impl",
        "attn_config.rope_theta",
        "attn_config.rope_impl",
        "attn_config.rope_dail_config",
        "attn_config.rope_hf_config",
        "attn_config.attn_temperature_tuning.floor_scale",
        "fc_type.bias",
        "fc_type.device",
        "ffn_config.fc_type.bias",
        "ffn_config.fc_type.device",
    ],
    only: &[
        ("norm_type", &["\"layernorm\"", "\"low_precision_layernorm\""]),
        ("fc_type", &["\"torch\""]),
        ("fc_type.name", &["\"torch\""]),
        ("block_overrides", &[]),
        ("final_logit_softcapping", &[]),
        ("fuse_norm_attn_norm", &["false"]),
        ("keyformer_config", &[]),
        ("attn_config.prefix_lm", &["false"]),
        ("attn_config.attn_uses_sequence_id", &["false"]),
        ("attn_config.qk_gn", &["false"]),
        ("attn_config.fused_qkv", &["true"]),
        ("attn_config.sliding_window_size", &["-1"]),
        ("attn_config.rope", &["false"]),
        ("attn_config.attn_logit_softcapping", &[]),
        ("attn_config.attn_temperature_tuning.attn_scale", &["0"]),
        ("attn_config.kv_dim", &[]),
        ("attn_config.nope", &["false"]),
        ("attn_config.reuse_kv_layer_idx", &[]),
        ("attn_config.reuse_kv_x_layer_idx", &[]),
        ("attn_config.norm_type", &["\"layernorm\"", "\"low_precision_layernorm\""]),
        ("attn_config.seq_parallel_world_size", &["1"]),
        ("ffn_config.ffn_type", &["\"mptmlp\""]),
        ("ffn_config.fc_type", &["\"torch\""]),
        ("ffn_config.fc_type.name", &["\"torch\""]),
        ("ffn_config.moe_num_experts", &[]),
        ("ffn_config.moe_top_k", &[]),
        ("ffn_config.mlp_type", &[]),
        ("ffn_config.moe_jitter_eps", &[]),
        ("ffn_config.moe_normalize_expert_weights", &[]),
        ("ffn_config.uniform_expert_assignment", &[]),
        ("ffn_config.moe_world_size", &[]),
        ("ffn_config.moe_weight_parallelism", &[]),
        ("ffn_config.moe_expert_model_parallelism", &[]),
        ("ffn_config.expert_parallel_group", &[]),
        ("ffn_config.device_mesh", &[]),
        ("ffn_config.lbl_process_group", &[]),
        ("ffn_config.moe_loss_weight", &[]),
        ("ffn_config.moe_lbl_in_fp32", &[]),
        ("ffn_config.num_layers", &[]),
        ("ffn_config.fp16", &[]),
        ("ffn_config.bf16", &[]),
        ("ffn_config.return_bias", &[]),
        ("ffn_config.bias", &[]),
        ("ffn_config.args", &[]),
    ],
};

/// Keys of `MosaicGPTConfig` in mosaicml/examples up to 0.0.4.
pub const MOSAIC_GPT_KEYS: Keys = Keys {
    read: &[
        "d_model",
        "n_heads",
        "n_layers",
        "mlp_ratio",
        "max_seq_len",
        "vocab_size",
        "attn_qk_ln",
        "attn_clip_qkv",
        "softmax_scale",
        "alibi",
        "alibi_bias_max",
        "logit_scale",
        "no_bias",
        "tie_word_embeddings",
    ],
    neutral: &[
        "attn_pdrop",
        "resid_pdrop",
        "emb_pdrop",
        "attn_impl",
        "init_device",
        "verbose",
        "param_init_fn",
        "init_div_is_residual",
        "init_std",
        "emb_init_std",
        "emb_init_uniform_lim",
        "init_gain",
        "fan_mode",
        "init_nonlinearity",
        "embedding_fraction",
        "low_precision_layernorm",
        "name",
        "loss_fn",
    ],
    only: &[
        ("prefix_lm", &["false"]),
        ("attn_uses_sequence_id", &["false"]),
        ("gpt_block", &["\"standard\""]),
        ("mup", &[]),
        ("multiquery_attention", &["false"]),
        ("norm_type", &["\"low_precision_layernorm\"", "\"layernorm\""]),
        ("te_linears", &["false"]),
        ("te_tx_layer", &["false"]),
        ("tensor_parallel_mlp", &["false"]),
        ("norm_eps", &["1e-5"]),
        ("layer_norm_epsilon", &["1e-5"]),
    ],
};

/// Keys of llama.cpp's GGUF metadata, without the prefix `mpt.`.
pub const GGUF_KEYS: Keys = Keys {
    read: &[
        "context_length",
        "embedding_length",
        "block_count",
        "feed_forward_length",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_epsilon",
        "attention.max_alibi_bias",
        "attention.clamp_kqv",
    ],
    neutral: &[
        "vocab_size",
        "tensor_data_layout",
        "attention.layer_norm_rms_epsilon",
        "rope.dimension_count",
        "rope.freq_base",
    ],
    only: &[
        ("attention.causal", &["true"]),
        ("attention.scale", &["0"]),
        ("attention.sliding_window", &["0"]),
        ("attn_logit_softcapping", &["0"]),
        ("final_logit_softcapping", &["0"]),
        ("logit_scale", &["0", "1"]),
        ("residual_scale", &["0", "1"]),
        ("embedding_scale", &["0", "1"]),
        ("expert_count", &["0"]),
        ("use_parallel_residual", &["false"]),
    ],
};
