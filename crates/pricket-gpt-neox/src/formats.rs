//! Conversion between config.json and the metadata of GGUF and legacy GGML files.

use pricket_nn::config::{Keys, gguf_rope_scaling, rows};
use pricket_nn::{Error, GgmlBody, GgmlLayout, Result};
use serde_json::{Value, json};

use crate::keys::GGUF_KEYS;

/// Header layouts of legacy GGML files. Since 2023-05-13 the header has the field `par_res`, for a parallel residual.
pub(crate) const GGML: [GgmlLayout; 2] =
    [layout("gpt-neox header of 8", &fields::<8>(Some("par_res"))), layout("gpt-neox header of 7", &fields::<7>(None))];

const fn layout(name: &'static str, fields: &'static [(&'static str, bool)]) -> GgmlLayout {
    GgmlLayout { name, fields, plain_version: 0, embedding: "gpt_neox.embed_in.weight", body: GgmlBody::Vocabulary }
}

const fn fields<const N: usize>(residual: Option<&'static str>) -> [(&'static str, bool); N] {
    let mut out = [("ftype", false); N];
    let first = ["n_vocab", "n_ctx", "n_embd", "n_head", "n_layer", "n_rot"];
    let mut i = 0;
    while i < first.len() {
        out[i].0 = first[i];
        i += 1;
    }
    if let Some(residual) = residual {
        out[first.len()].0 = residual;
    }
    out
}

/// Returns the share whose product with `head_dim`, rounded down as in transformers, is `rotated`.
fn share(rotated: u64, head_dim: u64) -> f64 {
    let mut share = rotated as f64 / head_dim.max(1) as f64;
    while ((head_dim as f64 * share) as u64) < rotated && share < 1.0 {
        share = share.next_up();
    }
    share
}

/// Converts the header of a legacy GGML file to a config.json. `shape` returns the shape of a tensor in the file.
///
/// # Errors
/// Returns [`Error::Config`] naming a field that is missing.
pub(crate) fn config_from_ggml(header: &Value, shape: &dyn Fn(&str) -> Option<Vec<usize>>) -> Result<Value> {
    let field = |key: &str| header[key].as_u64().ok_or_else(|| Error::config(key, "missing in the header"));
    let (width, heads, rotated) = (field("n_embd")?, field("n_head")?, field("n_rot")?);
    let head_dim = width / heads.max(1);
    // Files without the field have either residual. Those of RedPajama-INCITE, which is sequential, rotate all
    // dimensions.
    let parallel = header["par_res"].as_u64().map_or(rotated != head_dim, |flag| flag != 0);
    Ok(json!({
        "model_type": "gpt_neox", "hidden_act": "gelu", "vocab_size": field("n_vocab")?, "hidden_size": width,
        "num_attention_heads": heads, "num_hidden_layers": field("n_layer")?, "max_position_embeddings": field("n_ctx")?,
        "intermediate_size": rows(shape, "gpt_neox.layers.0.mlp.dense_h_to_4h.weight")?, "layer_norm_eps": 1e-5,
        "rotary_pct": share(rotated, head_dim), "rotary_emb_base": 10000, "use_parallel_residual": parallel,
        "tie_word_embeddings": false, "eos_token_id": 0, "bos_token_id": 0,
    }))
}

/// Converts GGUF metadata to a config.json. `shape` returns the shape of a tensor in the file.
///
/// # Errors
/// Returns [`Error::Config`] naming a key that is missing or not implemented.
pub(crate) fn config_from_gguf(metadata: &Value, shape: &dyn Fn(&str) -> Option<Vec<usize>>) -> Result<Value> {
    let at = |key: &str| &metadata[format!("gptneox.{key}")];
    let number = |key: &str| at(key).as_u64().ok_or_else(|| Error::config(format!("gptneox.{key}"), "missing"));
    let (width, heads) = (number("embedding_length")?, number("attention.head_count")?);
    let head_dim = width / heads.max(1);
    Keys::check_gguf(GGUF_KEYS, "gptneox.", metadata)?;
    let kv = at("attention.head_count_kv");
    if kv.as_u64().is_some_and(|kv| kv != heads) {
        return Err(Error::config("gptneox.attention.head_count_kv", format!("{kv} is not implemented")));
    }
    Ok(json!({
        // Files of other programs do not record the activation, so that of the published checkpoints is assumed.
        "model_type": "gpt_neox", "hidden_act": metadata["pricket.hidden_act"].as_str().unwrap_or("gelu"), "vocab_size": rows(shape, "token_embd.weight")?,
        "hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": number("block_count")?,
        "max_position_embeddings": number("context_length")?, "intermediate_size": number("feed_forward_length")?,
        "layer_norm_eps": at("attention.layer_norm_epsilon").as_f64().unwrap_or(1e-5),
        "rotary_pct": share(at("rope.dimension_count").as_u64().unwrap_or(head_dim), head_dim),
        "rotary_emb_base": at("rope.freq_base").as_f64().unwrap_or(10000.0), "rope_scaling": gguf_rope_scaling("gptneox.", metadata),
        "use_parallel_residual": at("use_parallel_residual").as_bool().unwrap_or(true),
        "attention_bias": shape("blk.0.attn_qkv.bias").is_some(),
        "tie_word_embeddings": shape("output.weight").is_none(),
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
        "general.architecture": "gptneox",
        "gptneox.context_length": read.max_position_embeddings, "gptneox.embedding_length": read.hidden_size,
        "gptneox.block_count": read.num_hidden_layers, "gptneox.feed_forward_length": read.intermediate_size,
        "gptneox.attention.head_count": read.num_attention_heads,
        "gptneox.rope.dimension_count": rotary.as_ref().map_or(0, |rotary| rotary.dims),
        "gptneox.rope.freq_base": rotary.as_ref().map_or(10000.0, |rotary| rotary.base),
        "gptneox.use_parallel_residual": read.use_parallel_residual,
        "gptneox.attention.layer_norm_epsilon": read.layer_norm_eps, "pricket.hidden_act": read.hidden_act,
    });
    if let Some(rotary) = rotary.filter(|rotary| rotary.factor != 1.0) {
        out["gptneox.rope.scaling.type"] = "linear".into();
        out["gptneox.rope.scaling.factor"] = rotary.factor.into();
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_comes_back_as_the_dimensions_that_it_was_made_of() {
        for head_dim in 1..=256u64 {
            for rotated in 0..=head_dim {
                assert_eq!((head_dim as f64 * share(rotated, head_dim)) as u64, rotated, "{rotated} of {head_dim}");
            }
        }
    }

    #[test]
    fn rotary_scaling_of_gguf_is_read_as_llama_cpp_reads_it() {
        let base = json!({
            "gptneox.embedding_length": 64, "gptneox.attention.head_count": 2, "gptneox.block_count": 1,
            "gptneox.context_length": 64, "gptneox.feed_forward_length": 64,
        });
        let config = |more: &Value| {
            let mut metadata = base.clone();
            metadata.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            crate::Config::from_json(&config_from_gguf(&metadata, &|_| Some(vec![96, 64]))?)
        };
        for (keys, factor) in [
            (json!({}), 1.0),
            (json!({"gptneox.rope.scale_linear": 4.0}), 4.0),
            (json!({"gptneox.rope.scaling.factor": 4.0}), 4.0),
            (json!({"gptneox.rope.scaling.factor": 2.0, "gptneox.rope.scale_linear": 4.0}), 2.0),
            (json!({"gptneox.rope.scaling.type": "linear", "gptneox.rope.scaling.factor": 8}), 8.0),
            (json!({"gptneox.rope.scaling.type": "none", "gptneox.rope.scaling.factor": 8.0}), 1.0),
            (json!({"gptneox.rope.scaling.type": "linear"}), 1.0),
            (json!({"gptneox.rope.scaling.factor": 0.0}), 1.0),
        ] {
            assert_eq!(config(&keys).unwrap().rotary().unwrap().unwrap().factor, factor, "{keys}");
        }
        for (keys, named) in [
            (json!({"gptneox.rope.scaling.type": "yarn", "gptneox.rope.scaling.factor": 4.0}), "yarn"),
            (json!({"gptneox.attention.sliding_window": 128}), "gptneox.attention.sliding_window"),
            (json!({"gptneox.attention.key_length": 16}), "gptneox.attention.key_length"),
            (json!({"gptneox.rope.scaling.attn_factor": 0.5}), "gptneox.rope.scaling.attn_factor"),
        ] {
            let error = config(&keys).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }

    #[test]
    fn metadata_come_back_as_the_configuration_that_they_were_made_of() {
        let config = json!({
            "model_type": "gpt_neox", "vocab_size": 96, "hidden_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 100, "hidden_act": "gelu", "max_position_embeddings": 77, "rotary_pct": 0.3,
            "rotary_emb_base": 5000, "use_parallel_residual": false, "layer_norm_eps": 1e-6,
            "rope_scaling": {"type": "linear", "factor": 2.0},
        });
        let metadata = gguf_metadata(&config).unwrap();
        let shape = |name: &str| (name != "blk.0.attn_qkv.bias").then(|| vec![96, 80]);
        let back = crate::Config::from_json(&config_from_gguf(&metadata, &shape).unwrap()).unwrap();
        let config = crate::Config::from_json(&config).unwrap();
        assert_eq!(back.rotary().unwrap(), config.rotary().unwrap());
        assert_eq!((back.hidden_size, back.max_position_embeddings, back.layer_norm_eps), (80, 77, 1e-6));
        assert!(!back.use_parallel_residual && !back.attention_bias && back.intermediate_size == 100);
        let missing = config_from_gguf(&json!({}), &shape).unwrap_err();
        assert!(missing.to_string().contains("gptneox.embedding_length"), "{missing}");
    }
}
