//! The configuration of GPT-NeoX and Pythia.

use pricket_nn::config::{GENERIC, Keys, RopeParameters, divides, epsilon, only, parse, plausible};
use pricket_nn::{Activation, Error, Result, Rotary};
use serde::Deserialize;

use crate::keys::KEYS;

/// Keys of a GPT-NeoX config.json that affect the forward pass, with the defaults of transformers.
#[derive(Clone, Debug, Deserialize)]
pub struct Config {
    /// Model type, `gpt_neox`.
    #[serde(default)]
    pub model_type: Option<String>,
    /// Number of rows of the embedding and the head, padding included.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Number of heads; divides `hidden_size`.
    pub num_attention_heads: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Activation of the MLP: `gelu` uses the error function; `gelu_fast`, `gelu_new` and `gelu_pytorch_tanh` use the
    /// tanh approximation.
    #[serde(default = "gelu")]
    pub hidden_act: String,
    /// Number of positions for which the model was trained.
    #[serde(default = "max_positions")]
    pub max_position_embeddings: usize,
    /// Epsilon, added to the variance in every norm.
    #[serde(default = "eps")]
    pub layer_norm_eps: f64,
    /// Whether the residual is parallel: attention and MLP both read the input of the block.
    #[serde(default = "yes")]
    pub use_parallel_residual: bool,
    /// Whether the attention projections have biases.
    #[serde(default = "yes")]
    pub attention_bias: bool,
    /// Whether the head shares the table of the embedding.
    #[serde(default)]
    pub tie_word_embeddings: bool,
    /// Share of the rotated dimensions of a head, from 0 to 1; 0.25 if absent.
    #[serde(default)]
    pub rotary_pct: Option<f64>,
    /// Base of the rotary frequencies; 10,000 if absent.
    #[serde(default)]
    pub rotary_emb_base: Option<f64>,
    /// Rotary parameters of transformers 5, whose keys have priority over the two above.
    #[serde(default)]
    pub rope_parameters: Option<RopeParameters>,
    /// Scaling of rotary positions; replaces `rope_parameters` if it is set.
    #[serde(default)]
    pub rope_scaling: Option<RopeParameters>,
    /// Number of key and value heads; must equal `num_attention_heads`.
    #[serde(default)]
    pub num_key_value_heads: Option<usize>,
    /// Width of a head; must equal `hidden_size / num_attention_heads`.
    #[serde(default)]
    pub head_dim: Option<usize>,
}

fn gelu() -> String {
    "gelu".into()
}

fn max_positions() -> usize {
    2048
}

fn eps() -> f64 {
    1e-5
}

fn yes() -> bool {
    true
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
        let (d, heads) = (config.hidden_size, config.num_attention_heads);
        divides("num_attention_heads", heads, "hidden_size", d)?;
        only("num_key_value_heads", config.num_key_value_heads, heads)?;
        only("head_dim", config.head_dim, d / heads)?;
        epsilon("layer_norm_eps", Some(config.layer_norm_eps))?;
        config.rotary()?;
        config.activation()?;
        Keys::check(&[KEYS, GENERIC], json)?;
        Ok(config)
    }

    /// Returns the keys of a config.json that no version of the class has.
    ///
    /// # Errors
    /// Returns [`Error::Config`] naming the first key whose effect is not implemented.
    pub fn unknown_keys(json: &serde_json::Value) -> Result<Vec<String>> {
        Keys::check(&[KEYS, GENERIC], json)
    }

    pub(crate) fn activation(&self) -> Result<Activation> {
        Activation::from_name(&self.hidden_act)
            .filter(|activation| matches!(activation, Activation::GeluErf | Activation::GeluTanh))
            .ok_or_else(|| Error::config("hidden_act", format!("{:?} is not implemented", self.hidden_act)))
    }

    /// Returns the rotary positions, or `None` if no dimension is rotated.
    ///
    /// `rope_scaling`, if it is set, replaces `rope_parameters`. The keys of that object have priority over
    /// `rotary_pct` and `rotary_emb_base`. The flat keys `rope_theta` and `partial_rotary_factor` are ignored, as in
    /// transformers.
    pub(crate) fn rotary(&self) -> Result<Option<Rotary>> {
        let chosen = RopeParameters::chosen(self.rope_scaling.as_ref(), self.rope_parameters.as_ref());
        let (key, rope) = chosen.unwrap_or(("rotary_pct", RopeParameters::default()));
        let base = rope.base(key, self.rotary_emb_base)?;
        let share = rope.partial_rotary_factor.or(self.rotary_pct).unwrap_or(0.25);
        if !(0.0..=1.0).contains(&share) {
            return Err(Error::config(key, format!("share {share} of rotated dimensions; expected 0 to 1")));
        }
        let factor = rope.divisor(key)?;
        let dims = ((self.hidden_size / self.num_attention_heads) as f64 * share) as usize;
        if !dims.is_multiple_of(2) {
            return Err(Error::config(key, format!("{dims} rotated dimensions; expected an even number")));
        }
        Ok((dims > 0).then_some(Rotary { dims, base, factor }))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn with(changes: &serde_json::Value) -> Result<Config> {
        let mut config = json!({
            "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128,
        });
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        Config::from_json(&config)
    }

    fn rotary(changes: &serde_json::Value) -> Rotary {
        with(changes).unwrap().rotary().unwrap().unwrap()
    }

    #[test]
    fn absent_keys_take_the_defaults_of_transformers() {
        let config = with(&json!({})).unwrap();
        assert!(config.use_parallel_residual && config.attention_bias && !config.tie_word_embeddings);
        assert_eq!(config.activation().unwrap(), Activation::GeluErf);
        assert_eq!(config.rotary().unwrap().unwrap(), Rotary { dims: 8, base: 10000.0, factor: 1.0 });
    }

    #[test]
    fn rotary_keys_take_precedence_as_in_transformers() {
        let parameters = json!({"rope_theta": 20000.0, "partial_rotary_factor": 0.5, "rope_type": "default"});
        let both = json!({"rotary_pct": 1.0, "rotary_emb_base": 500, "rope_parameters": parameters});
        assert_eq!(rotary(&both), Rotary { dims: 16, base: 20000.0, factor: 1.0 });
        let mut scaled = both.clone();
        scaled["rope_scaling"] = json!({"type": "linear", "factor": 4});
        assert_eq!(rotary(&scaled), Rotary { dims: 32, base: 500.0, factor: 4.0 });
        let both_spellings = json!({"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}});
        assert_eq!(rotary(&both_spellings), Rotary { dims: 8, base: 10000.0, factor: 2.0 });
        let empty = json!({"rope_scaling": {}, "rope_parameters": {"rope_theta": 500.0}});
        assert_eq!(rotary(&empty), Rotary { dims: 8, base: 500.0, factor: 1.0 });
        let flat = json!({"rotary_pct": 1.0, "partial_rotary_factor": 0.5, "rope_theta": 3.0});
        assert_eq!(rotary(&flat), Rotary { dims: 32, base: 10000.0, factor: 1.0 });
    }

    #[test]
    fn keys_without_effect_are_left_alone_and_unknown_ones_told() {
        let config = json!({
            "vocab_size": 96, "num_key_value_heads": 2, "head_dim": 32, "attention_dropout": 0.1, "rope_scaling": null,
            "layer_types": ["full_attention"], "temperature": "Infinity", "rope_parameters": {"rope_theta": 1e4, "mscale": 2},
            "odd_key": 1,
        });
        with(&config).unwrap();
        assert_eq!(Config::unknown_keys(&config).unwrap(), ["odd_key"]);
    }

    #[test]
    fn what_is_not_implemented_is_refused_by_key() {
        let refused = [
            (json!({"hidden_act": "swish"}), "hidden_act"),
            (json!({"rope_scaling": {"type": "yarn", "factor": 2}}), "rope_scaling"),
            (json!({"rope_parameters": {"rope_type": "dynamic", "factor": 2}}), "rope_parameters"),
            (json!({"rope_scaling": {"factor": 2.0}}), "rope_scaling"),
            (json!({"num_attention_heads": 3}), "num_attention_heads"),
            (json!({"num_hidden_layers": -1}), "num_hidden_layers"),
            (json!({"hidden_size": 1u64 << 40}), "hidden_size"),
            (json!({"rotary_pct": 1.5}), "rotary_pct"),
            (json!({"vocab_size": "many"}), "vocab_size"),
            (json!({"num_key_value_heads": 1}), "num_key_value_heads"),
            (json!({"head_dim": 16}), "head_dim"),
            (json!({"quantization_config": {"quant_method": "gptq"}}), "quantization_config"),
            (json!({"attn_logit_softcapping": 30.0}), "attn_logit_softcapping"),
            (json!({"is_causal": false}), "is_causal"),
            (json!({"layer_types": ["full_attention", "sliding_attention"]}), "layer_types"),
            (json!({"layer_norm_eps": "NaN"}), "layer_norm_eps"),
        ];
        for (change, key) in refused {
            let Err(Error::Config { key: found, .. }) = with(&change) else { panic!("{key} was accepted") };
            assert_eq!(found, key);
        }
    }
}
