//! Conversion between config.json and the metadata of GGUF and legacy GGML files.

use pricket_nn::config::{Keys, rows};
use pricket_nn::{Error, GgmlBody, GgmlLayout, Result};
use serde_json::{Value, json};

use crate::{GGUF_KEYS, NAMES};

/// Header layout of legacy GGML files. If `ftype` and the container give no version of the quantized block layout,
/// version 1 is assumed, unless the sizes show version 2.
pub(crate) const GGML: [GgmlLayout; 1] = [GgmlLayout {
    name: "mpt header",
    fields: &[
        ("d_model", false),
        ("max_seq_len", false),
        ("n_heads", false),
        ("n_layers", false),
        ("n_vocab", false),
        ("alibi_bias_max", true),
        ("clip_qkv", true),
        ("ftype", false),
    ],
    plain_version: 1,
    embedding: "transformer.wte.weight",
    body: GgmlBody::Vocabulary,
}];

/// Converts the header of a legacy GGML file to a config.json. `shape` returns the shape of a tensor in the file.
///
/// # Errors
/// Returns [`Error::Config`] naming a field that is missing.
pub(crate) fn config_from_ggml(header: &Value, shape: &dyn Fn(&str) -> Option<Vec<usize>>) -> Result<Value> {
    let field = |key: &str| header[key].as_u64().ok_or_else(|| Error::config(key, "missing in the header"));
    let float = |key: &str| header[key].as_f64().filter(|x| *x > 0.0);
    // Converters kept the tensor names of the checkpoint, MPT's or MosaicGPT's.
    let tensor_shape = |name: &str| NAMES.shape(name, shape);
    let in_block = |part: &str| tensor_shape(&format!("transformer.blocks.0.{part}"));
    let d = field("d_model")?;
    let ratio = rows(&tensor_shape, "transformer.blocks.0.ffn.up_proj.weight")? as f64 / d.max(1) as f64;
    // The header has no field for norms of queries and keys.
    let qk_ln = in_block("attn.q_ln.weight").is_some();
    let (alibi, bias_max, clip) = (float("alibi_bias_max").is_some(), float("alibi_bias_max"), float("clip_qkv"));
    let mut config = json!({
        "d_model": d, "n_heads": field("n_heads")?, "n_layers": field("n_layers")?, "vocab_size": field("n_vocab")?,
        "max_seq_len": field("max_seq_len")?, "no_bias": !has_bias(shape), "eos_token_id": 0, "bos_token_id": 0,
        "tie_word_embeddings": tensor_shape("lm_head.weight").is_none(),
    });
    let class_keys = if shape("transformer.blocks.0.ln_1.weight").is_some() {
        json!({
            "model_type": "mosaic_gpt", "architectures": ["MosaicGPT"], "mlp_ratio": ratio, "attn_qk_ln": qk_ln,
            "attn_clip_qkv": clip, "alibi": alibi, "alibi_bias_max": bias_max,
        })
    } else {
        json!({
            "model_type": "mpt", "architectures": ["MPTForCausalLM"], "expansion_ratio": ratio,
            "attention_bias": in_block("attn.Wqkv.bias").is_some(),
            "attn_config": {"alibi": alibi, "alibi_bias_max": bias_max, "clip_qkv": clip, "qk_ln": qk_ln},
        })
    };
    if let (Some(config), Value::Object(class_keys)) = (config.as_object_mut(), class_keys) {
        config.extend(class_keys);
    }
    Ok(config)
}

/// Returns whether any norm or linear layer of the first block except `Wqkv` has a bias. `attention_bias` controls the
/// bias of `Wqkv`.
fn has_bias(shape: &dyn Fn(&str) -> Option<Vec<usize>>) -> bool {
    let parts = ["norm_1", "attn.out_proj", "norm_2", "ffn.up_proj", "ffn.down_proj"];
    parts.iter().any(|part| NAMES.shape(&format!("transformer.blocks.0.{part}.bias"), shape).is_some())
}

/// Converts GGUF metadata to a config.json. `shape` returns the shape of a tensor in the file.
///
/// # Errors
/// Returns [`Error::Config`] naming a key that is missing or not implemented.
pub(crate) fn config_from_gguf(metadata: &Value, shape: &dyn Fn(&str) -> Option<Vec<usize>>) -> Result<Value> {
    let metadata_value = |key: &str| &metadata[format!("mpt.{key}")];
    let number = |key: &str| metadata_value(key).as_u64().ok_or_else(|| Error::config(format!("mpt.{key}"), "missing"));
    let float = |key: &str| metadata_value(key).as_f64().filter(|x| *x > 0.0);
    let (d, heads) = (number("embedding_length")?, number("attention.head_count")?);
    let kv = metadata_value("attention.head_count_kv").as_u64().unwrap_or(heads);
    let holds = |name: &str| shape(name).is_some();
    Keys::check_gguf(GGUF_KEYS, "mpt.", metadata)?;
    let epsilon = metadata_value("attention.layer_norm_epsilon").as_f64().unwrap_or(1e-5);
    if holds("blk.0.ffn_act.scales") {
        return Err(Error::config("blk.0.ffn_act.scales", "scaled activations are not implemented"));
    }
    Ok(json!({
        "model_type": "mpt", "architectures": ["MPTForCausalLM"], "d_model": d, "n_heads": heads,
        "n_layers": number("block_count")?, "vocab_size": rows(shape, "token_embd.weight")?,
        "max_seq_len": number("context_length")?, "learned_pos_emb": holds("position_embd.weight"),
        "expansion_ratio": number("feed_forward_length")? as f64 / d.max(1) as f64,
        "norm_eps": epsilon,
        "no_bias": !has_bias(shape), "attention_bias": holds("blk.0.attn_qkv.bias"),
        "attn_config": {
            "attn_type": if kv == heads { "multihead_attention" } else { "grouped_query_attention" }, "kv_n_heads": kv,
            "alibi": metadata_value("attention.max_alibi_bias").as_f64()
                .map_or(!holds("position_embd.weight"), |bias| bias > 0.0),
            "alibi_bias_max": float("attention.max_alibi_bias"),
            "clip_qkv": float("attention.clamp_kqv"), "qk_ln": holds("blk.0.attn_q_norm.weight"),
            // GGUF has one epsilon for all norms.
            "norm_eps": epsilon,
        },
        // GGUF files of 2023 may hold a copy of a tied head, quantized with more bits. The copy is used as an untied
        // head.
        "tie_word_embeddings": !holds("output.weight"),
        "ffn_config": {"ffn_act_fn": serde_json::from_str(metadata["pricket.ffn_act_fn"].as_str().unwrap_or("null")).unwrap_or(Value::Null)},
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"], "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
    }))
}

/// Converts a config.json to GGUF metadata, the inverse of [`config_from_gguf`]. `learned_positions` is true if the
/// checkpoint has a table of positions.
///
/// # Errors
/// Returns the errors of [`crate::Config::from_json`], or [`Error::Config`] naming a setting for which GGUF has no key.
pub(crate) fn gguf_metadata(config: &Value, learned_positions: bool) -> Result<Value> {
    let read = crate::Config::from_json(config)?;
    let attention = &read.attn_config;
    // If `attn_config.alibi` is absent, ALiBi is used unless the checkpoint has learned positions, as in `load`.
    let alibi = attention.alibi.unwrap_or(!learned_positions);
    let lost = [
        ("attn_config.softmax_scale", attention.softmax_scale.is_some()),
        ("logit_scale", read.logit_scale()? != 1.0),
        ("norm_eps", attention.qk_ln && read.eps() != read.qk_eps()),
        ("attn_config.alibi_bias_max", alibi && !read.has_standard_alibi_slopes()),
    ];
    if let Some((key, _)) = lost.into_iter().find(|(_, lost)| *lost) {
        return Err(Error::config(key, "GGUF has no key for it"));
    }
    let mut out = json!({
        "general.architecture": "mpt",
        "mpt.context_length": read.max_seq_len, "mpt.embedding_length": read.d_model, "mpt.block_count": read.n_layers,
        "mpt.feed_forward_length": read.hidden(), "mpt.attention.head_count": read.n_heads,
        "mpt.attention.head_count_kv": read.kv_heads()?,
        "mpt.attention.layer_norm_epsilon": read.eps(),
        "mpt.attention.max_alibi_bias":
            if alibi { attention.alibi_bias_max.unwrap_or(8.0) } else { 0.0 },
    });
    if let function @ Value::Object(_) = &read.ffn_config["ffn_act_fn"] {
        out["pricket.ffn_act_fn"] = function.to_string().into();
    }
    if let Some(clip) = attention.clip_qkv {
        out["mpt.attention.clamp_kqv"] = clip.into();
    }
    Ok(out)
}
