//! The configuration of LLaMA and OpenLLaMA.

use pricket_nn::config::{GENERIC, Keys, RopeParameters, divides, epsilon, parse, plausible};
use pricket_nn::{Activation, Error, Result, Rotary};
use serde::Deserialize;

use crate::keys::KEYS;

/// Keys of a LLaMA config.json that affect the forward pass, with the defaults of transformers.
#[derive(Clone, Debug, Deserialize)]
pub struct Config {
    /// Number of rows of the embedding and the head, padding included.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Number of query heads.
    pub num_attention_heads: usize,
    /// Number of key and value heads; divides `num_attention_heads`, which is the default.
    #[serde(default)]
    pub num_key_value_heads: Option<usize>,
    /// Width of a head; `hidden_size / num_attention_heads` if absent.
    #[serde(default)]
    pub head_dim: Option<usize>,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Activation of the MLP; only `silu` is supported.
    #[serde(default = "silu")]
    pub hidden_act: String,
    /// Number of positions for which the model was trained, before linear scaling.
    #[serde(default = "max_positions")]
    pub max_position_embeddings: usize,
    /// Epsilon, added to the mean of squares in every norm.
    #[serde(default = "eps")]
    pub rms_norm_eps: f64,
    /// Whether the four attention projections have biases.
    #[serde(default)]
    pub attention_bias: bool,
    /// Whether the three projections of the MLP have biases.
    #[serde(default)]
    pub mlp_bias: bool,
    /// Whether the head shares the table of the embedding.
    #[serde(default)]
    pub tie_word_embeddings: bool,
    /// Base of the rotary frequencies, if `rope_scaling` and `rope_parameters` have none; 10,000 if absent.
    #[serde(default)]
    pub rope_theta: Option<f64>,
    /// Rotary base and scaling, in transformers 5.
    #[serde(default)]
    pub rope_parameters: Option<RopeParameters>,
    /// Scaling of rotary positions; replaces `rope_parameters` if it is set.
    #[serde(default)]
    pub rope_scaling: Option<RopeParameters>,
}

fn silu() -> String {
    "silu".into()
}

fn max_positions() -> usize {
    2048
}

fn eps() -> f64 {
    1e-6
}

impl Config {
    /// Reads and checks a config.json.
    ///
    /// # Errors
    /// Returns [`Error::Config`] naming the key if a value is missing, invalid or not implemented.
    pub fn from_json(json: &serde_json::Value) -> Result<Self> {
        let config: Self = parse(json)?;
        plausible("vocab_size", config.vocab_size, 1 << 24)?;
        plausible("hidden_size", config.hidden_size, 1 << 17)?;
        plausible("num_hidden_layers", config.num_hidden_layers, 1 << 12)?;
        plausible("num_attention_heads", config.num_attention_heads, 1 << 12)?;
        plausible("intermediate_size", config.intermediate_size, 1 << 20)?;
        plausible("max_position_embeddings", config.max_position_embeddings, 1 << 24)?;
        divides("num_attention_heads", config.num_attention_heads, "hidden_size", config.hidden_size)?;
        divides("num_key_value_heads", config.kv_heads(), "num_attention_heads", config.num_attention_heads)?;
        plausible("head_dim", config.head_dim(), 1 << 12)?;
        epsilon("rms_norm_eps", Some(config.rms_norm_eps))?;
        if Activation::from_name(&config.hidden_act) != Some(Activation::Silu) {
            let what = format!("{:?} is not implemented for llama; only silu is", config.hidden_act);
            return Err(Error::config("hidden_act", what));
        }
        config.rotary()?;
        config.trained_length()?;
        Keys::check(&[KEYS, GENERIC], json)?;
        Ok(config)
    }

    /// Returns the number of key and value heads.
    pub fn kv_heads(&self) -> usize {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    /// Returns the width of a head.
    pub fn head_dim(&self) -> usize {
        self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads.max(1))
    }

    /// Returns the rotary positions, which rotate all dimensions of a head. A base in `rope_scaling` or
    /// `rope_parameters` has priority over the flat key `rope_theta`.
    pub(crate) fn rotary(&self) -> Result<Rotary> {
        let chosen = RopeParameters::chosen(self.rope_scaling.as_ref(), self.rope_parameters.as_ref());
        let (key, rope) = chosen.unwrap_or(("rope_theta", RopeParameters::default()));
        if rope.partial_rotary_factor.is_some_and(|share| share != 1.0) {
            return Err(Error::config(key, "only the value 1 of partial_rotary_factor is implemented"));
        }
        let dims = self.head_dim();
        if !dims.is_multiple_of(2) {
            return Err(Error::config("head_dim", format!("{dims} dimensions; expected an even number")));
        }
        Ok(Rotary { dims, base: rope.base(key, self.rope_theta)?, factor: rope.divisor(key)? })
    }

    /// Returns the number of positions that the model supports: `max_position_embeddings` times the factor of linear
    /// scaling.
    pub(crate) fn trained_length(&self) -> Result<usize> {
        let length = (self.max_position_embeddings as f64 * self.rotary()?.factor) as usize;
        plausible("max_position_embeddings", length, 1 << 32).map(|()| length)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn with(changes: &serde_json::Value) -> Result<Config> {
        let mut config = json!({
            "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
        });
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        Config::from_json(&config)
    }

    #[test]
    fn absent_keys_take_the_defaults_of_transformers() {
        let config = with(&json!({})).unwrap();
        assert_eq!((config.kv_heads(), config.head_dim(), config.rms_norm_eps), (4, 16, 1e-6));
        assert_eq!(config.rotary().unwrap(), Rotary { dims: 16, base: 10_000.0, factor: 1.0 });
        assert!(!config.attention_bias && !config.mlp_bias && !config.tie_word_embeddings);
    }

    #[test]
    fn rotary_keys_take_precedence_as_in_transformers() {
        let parameters = json!({"rope_theta": 20_000.0, "rope_type": "default"});
        for (keys, base, factor) in [
            (json!({"rope_theta": 500.0}), 500.0, 1.0),
            (json!({"rope_theta": 500.0, "rope_parameters": parameters}), 20_000.0, 1.0),
            (json!({"rope_theta": 500.0, "rope_parameters": {"rope_type": "linear", "factor": 2.0}}), 500.0, 2.0),
            (json!({"rope_scaling": {"type": "linear", "factor": 4}, "rope_parameters": parameters}), 10_000.0, 4.0),
            (json!({"rope_scaling": {}, "rope_parameters": parameters}), 20_000.0, 1.0),
        ] {
            assert_eq!(with(&keys).unwrap().rotary().unwrap(), Rotary { dims: 16, base, factor }, "{keys}");
        }
        assert_eq!(
            with(&json!({"rope_scaling": {"type": "linear", "factor": 4}})).unwrap().trained_length().unwrap(),
            8192
        );
    }

    #[test]
    fn what_later_models_added_is_refused_by_name() {
        for (keys, named) in [
            (json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}), "llama3"),
            (json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}}), "dynamic"),
            (json!({"hidden_act": "gelu"}), "hidden_act"),
            (json!({"num_key_value_heads": 3}), "num_key_value_heads"),
            (json!({"head_dim": 15}), "head_dim"),
            (json!({"sliding_window": 4096}), "sliding_window"),
            (json!({"num_local_experts": 8}), "num_local_experts"),
            (
                json!({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
                "partial_rotary_factor",
            ),
            (json!({"residual_multiplier": 0.22}), "residual_multiplier"),
        ] {
            let error = with(&keys).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }
}
