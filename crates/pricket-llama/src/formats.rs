//! Conversion between config.json and the metadata of GGUF and legacy GGML files.

use pricket_nn::config::{Keys, gguf_rope_scaling, rows};
use pricket_nn::{Error, GgmlBody, GgmlLayout, Result};
use serde_json::{Value, json};

use crate::keys::GGUF_KEYS;

/// Header layout of legacy GGML files.
pub(crate) const GGML: [GgmlLayout; 1] = [GgmlLayout {
    name: "llama header",
    fields: &[
        ("n_vocab", false),
        ("n_embd", false),
        ("n_mult", false),
        ("n_head", false),
        ("n_layer", false),
        ("n_rot", false),
        ("ftype", false),
    ],
    plain_version: 0,
    embedding: "tok_embeddings.weight",
    body: GgmlBody::Vocabulary,
}];

/// Converts the header of a legacy GGML file to a config.json. `shape` returns the shape of a tensor in the file.
///
/// The header has no fields for epsilon, rotary base and length, so the values of the program that read these files are
/// used.
///
/// # Errors
/// Returns [`Error::Config`] naming a field that is missing.
pub(crate) fn config_from_ggml(header: &Value, shape: &dyn Fn(&str) -> Option<Vec<usize>>) -> Result<Value> {
    let field = |key: &str| header[key].as_u64().ok_or_else(|| Error::config(key, "missing in the header"));
    let (width, heads) = (field("n_embd")?, field("n_head")?);
    let head_dim = width / heads.max(1);
    if field("n_rot")? != head_dim {
        return Err(Error::config("n_rot", format!("{}; only {head_dim} is implemented", header["n_rot"])));
    }
    Ok(json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "vocab_size": field("n_vocab")?,
        "hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": field("n_layer")?,
        "num_key_value_heads": rows(shape, "layers.0.attention.wk.weight")? as u64 / head_dim.max(1),
        "intermediate_size": rows(shape, "layers.0.feed_forward.w1.weight")?, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": false, "bos_token_id": 1, "eos_token_id": 2,
    }))
}

/// Converts GGUF metadata to a config.json. `shape` returns the shape of a tensor in the file.
///
/// # Errors
/// Returns [`Error::Config`] naming a key that is missing or not implemented.
pub(crate) fn config_from_gguf(metadata: &Value, shape: &dyn Fn(&str) -> Option<Vec<usize>>) -> Result<Value> {
    let at = |key: &str| &metadata[format!("llama.{key}")];
    let number = |key: &str| at(key).as_u64().ok_or_else(|| Error::config(format!("llama.{key}"), "missing"));
    let (width, heads) = (number("embedding_length")?, number("attention.head_count")?);
    // Head widths are checked here and left out of `check_gguf`, because LLaMA supports any width.
    let (key, value) = (at("attention.key_length").as_u64(), at("attention.value_length").as_u64());
    let head_dim = key.or(at("rope.dimension_count").as_u64()).unwrap_or(width / heads.max(1));
    for (key, found) in
        [("attention.value_length", value), ("rope.dimension_count", at("rope.dimension_count").as_u64())]
    {
        if let Some(found) = found.filter(|found| *found != head_dim) {
            return Err(Error::config(format!("llama.{key}"), format!("{found}; only {head_dim} is implemented")));
        }
    }
    let mut others = metadata.clone();
    if let Some(others) = others.as_object_mut() {
        others.retain(|key, _| !["llama.attention.key_length", "llama.attention.value_length"].contains(&key.as_str()));
    }
    Keys::check_gguf(GGUF_KEYS, "llama.", &others)?;
    if shape("rope_freqs.weight").is_some() {
        return Err(Error::config("rope_freqs.weight", "separate factors of rotary frequencies are not implemented"));
    }
    let holds = |name: &str| shape(name).is_some();
    let missing = || Error::config("llama.attention.layer_norm_rms_epsilon", "missing");
    let eps = at("attention.layer_norm_rms_epsilon").as_f64().ok_or_else(missing)?;
    Ok(json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
        "vocab_size": rows(shape, "token_embd.weight")?, "hidden_size": width, "num_attention_heads": heads,
        "num_key_value_heads": at("attention.head_count_kv").as_u64().unwrap_or(heads), "head_dim": head_dim,
        "num_hidden_layers": number("block_count")?, "max_position_embeddings": number("context_length")?,
        "intermediate_size": number("feed_forward_length")?,
        "rms_norm_eps": eps,
        "rope_theta": at("rope.freq_base").as_f64().unwrap_or(10_000.0), "rope_scaling": gguf_rope_scaling("llama.", metadata),
        "attention_bias": holds("blk.0.attn_q.bias"), "mlp_bias": holds("blk.0.ffn_up.bias"),
        "tie_word_embeddings": !holds("output.weight"),
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"], "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
    }))
}

/// Converts a config.json to GGUF metadata, the inverse of [`config_from_gguf`].
///
/// # Errors
/// Returns the errors of [`crate::Config::from_json`].
pub(crate) fn gguf_metadata(config: &Value) -> Result<Value> {
    let read = crate::Config::from_json(config)?;
    let rotary = read.rotary()?;
    let mut out = json!({
        "general.architecture": "llama", "llama.context_length": read.max_position_embeddings,
        "llama.embedding_length": read.hidden_size, "llama.block_count": read.num_hidden_layers,
        "llama.feed_forward_length": read.intermediate_size, "llama.vocab_size": read.vocab_size,
        "llama.attention.head_count": read.num_attention_heads, "llama.attention.head_count_kv": read.kv_heads(),
        "llama.attention.key_length": rotary.dims, "llama.attention.value_length": rotary.dims,
        "llama.attention.layer_norm_rms_epsilon": read.rms_norm_eps,
        "llama.rope.dimension_count": rotary.dims, "llama.rope.freq_base": rotary.base,
    });
    if rotary.factor != 1.0 {
        out["llama.rope.scaling.type"] = "linear".into();
        out["llama.rope.scaling.factor"] = rotary.factor.into();
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_come_back_as_the_configuration_that_they_were_made_of() {
        let config = json!({
            "model_type": "llama", "vocab_size": 96, "hidden_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 24, "intermediate_size": 100, "hidden_act": "silu", "rms_norm_eps": 1e-5,
            "max_position_embeddings": 77, "rope_theta": 5000, "rope_scaling": {"type": "linear", "factor": 2.0},
            "tie_word_embeddings": true, "attention_bias": true,
        });
        let metadata = gguf_metadata(&config).unwrap();
        let tensors = ["token_embd.weight", "blk.0.attn_q.bias"];
        let back = config_from_gguf(&metadata, &|name| tensors.contains(&name).then(|| vec![96, 80])).unwrap();
        let (back, config) = (crate::Config::from_json(&back).unwrap(), crate::Config::from_json(&config).unwrap());
        assert_eq!(back.rotary().unwrap(), config.rotary().unwrap());
        assert_eq!((back.kv_heads(), back.head_dim(), back.vocab_size, back.rms_norm_eps), (2, 24, 96, 1e-5));
        assert!(back.tie_word_embeddings && back.attention_bias && !back.mlp_bias);
    }

    #[test]
    fn what_a_file_has_beside_the_original_is_refused() {
        let metadata = json!({
            "llama.embedding_length": 64, "llama.attention.head_count": 4, "llama.block_count": 1, "llama.context_length": 64,
            "llama.feed_forward_length": 64,
        });
        for (key, value, tensor, named) in [
            ("llama.rope.dimension_count", json!(8), "", "value_length"),
            ("llama.expert_count", json!(8), "", "expert_count"),
            ("llama.vocab_size", json!(96), "rope_freqs.weight", "rope_freqs"),
        ] {
            let mut metadata = metadata.clone();
            (metadata[key], metadata["llama.attention.value_length"]) = (value, json!(16));
            let shape = |name: &str| ["token_embd.weight", tensor].contains(&name).then(|| vec![96, 64]);
            let error = config_from_gguf(&metadata, &shape).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }
}
