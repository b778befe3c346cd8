//! The configuration of MPT and MosaicGPT.

use pricket_nn::config::{Keys, divides, epsilon, limit, null_as_default, only, parse, plausible, positive, whole};
use pricket_nn::{Activation, Alibi, Error, Result};
use serde::Deserialize;
use serde_json::Value;

use crate::keys::{ConfigClass, from_mosaic_gpt, key_tables};

/// Keys of an MPT config.json that affect the forward pass, with the defaults of llm-foundry.
///
/// Reading a MosaicGPT configuration, which has no `attn_config`, converts it to this form.
#[derive(Clone, Debug, Deserialize)]
pub struct Config {
    /// Width of the residual stream.
    pub d_model: usize,
    /// Number of query heads; divides `d_model`.
    pub n_heads: usize,
    /// Number of blocks.
    pub n_layers: usize,
    /// Number of rows of the embedding, padding included.
    pub vocab_size: usize,
    /// Number of positions for which the model was trained; a limit only without ALiBi.
    #[serde(default = "max_seq_len", deserialize_with = "whole")]
    pub max_seq_len: usize,
    /// Width of the MLP divided by `d_model`; ignored if `ffn_config.ffn_hidden_size` is present.
    #[serde(default = "four")]
    pub expansion_ratio: f64,
    /// Whether all linear layers and norms have no bias.
    #[serde(default)]
    pub no_bias: Option<bool>,
    /// Whether the model has learned positions, if it does not use ALiBi.
    #[serde(default = "yes")]
    pub learned_pos_emb: bool,
    /// Whether the fused query-key-value projection has a bias; overrides `no_bias` for this layer.
    #[serde(default)]
    pub attention_bias: Option<bool>,
    /// Epsilon, added to the variance in every norm except those of queries and keys. Key of llm-foundry.
    #[serde(default)]
    pub norm_eps: Option<f64>,
    /// Epsilon of the same norms. Key of transformers.
    #[serde(default)]
    pub layer_norm_epsilon: Option<f64>,
    /// Width of a head; must equal `d_model / n_heads`.
    #[serde(default)]
    pub head_dim: Option<usize>,
    /// Factor of the logits: a number, or `inv_sqrt_d_model`.
    #[serde(default)]
    pub logit_scale: Option<Value>,
    /// Whether the head shares the table of the embedding.
    #[serde(default = "yes")]
    pub tie_word_embeddings: bool,
    /// Settings of attention.
    #[serde(default, deserialize_with = "null_as_default")]
    pub attn_config: AttentionConfig,
    /// Settings of the MLP in later versions of llm-foundry: `ffn_hidden_size`, `ffn_act_fn` and others.
    #[serde(default)]
    pub ffn_config: Value,
    #[serde(skip)]
    class: ConfigClass,
}

/// Settings of attention, the object `attn_config`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct AttentionConfig {
    /// Type of attention: `multihead_attention`, `multiquery_attention` or `grouped_query_attention`.
    pub attn_type: Option<String>,
    /// Number of key and value heads of grouped-query attention.
    pub kv_n_heads: Option<usize>,
    /// Whether queries and keys are normalized, over all heads together.
    pub qk_ln: bool,
    /// Epsilon, added to the variance in the norms of queries and keys.
    pub norm_eps: Option<f64>,
    /// Width of a head; see [`Config::head_dim`].
    pub head_dim: Option<usize>,
    /// Limit of the absolute values of queries, keys and values. 0, `false` and infinity mean no limit.
    #[serde(deserialize_with = "limit")]
    pub clip_qkv: Option<f64>,
    /// Factor of the scores; `1 / sqrt(head_dim)` by default.
    pub softmax_scale: Option<f64>,
    /// Whether attention uses ALiBi. If the key is absent, ALiBi is used unless the checkpoint has learned positions,
    /// because the defaults of llm-foundry and transformers differ.
    pub alibi: Option<bool>,
    /// Largest exponent of the ALiBi slopes; 8 by default.
    pub alibi_bias_max: Option<f64>,
}

fn max_seq_len() -> usize {
    2048
}

fn four() -> f64 {
    4.0
}

/// Default epsilon of norms.
const EPS: f64 = 1e-5;

fn yes() -> bool {
    true
}

impl Config {
    /// Reads and checks a config.json of any of the three classes that the [crate documentation](crate) lists.
    ///
    /// # Errors
    /// Returns [`Error::Config`] naming the key if a value is missing, invalid or not implemented.
    pub fn from_json(json: &Value) -> Result<Self> {
        let (original, class) = (json, ConfigClass::of(json));
        let json = if class == ConfigClass::MosaicGpt { &from_mosaic_gpt(json) } else { json };
        let mut config: Self = parse(json)?;
        config.class = class;
        plausible("vocab_size", config.vocab_size, 1 << 24)?;
        plausible("d_model", config.d_model, 1 << 17)?;
        plausible("n_layers", config.n_layers, 1 << 12)?;
        plausible("n_heads", config.n_heads, 1 << 12)?;
        plausible("max_seq_len", config.max_seq_len, 1 << 24)?;
        config.check_sizes()?;
        config.activation()?;
        config.logit_scale()?;
        Self::unknown_keys(original)?;
        Ok(config)
    }

    /// Returns the keys of a config.json that are not in the tables of its class.
    ///
    /// # Errors
    /// Returns [`Error::Config`] naming the first key whose effect is not implemented.
    pub fn unknown_keys(json: &Value) -> Result<Vec<String>> {
        Keys::check(key_tables(json), json)
    }

    fn check_sizes(&self) -> Result<()> {
        let (d, heads, attention) = (self.d_model, self.n_heads, &self.attn_config);
        divides("n_heads", heads, "d_model", d)?;
        only("head_dim", self.head_dim, d / heads)?;
        only("attn_config.head_dim", attention.head_dim, d / heads)?;
        let hidden = self.expansion_ratio * d as f64;
        if let Some(hidden) = self.ffn_config["ffn_hidden_size"].as_u64() {
            plausible("ffn_config.ffn_hidden_size", hidden as usize, 1 << 20)?;
        // `config_from_gguf` computes the ratio from two widths, so the product may differ from an integer by rounding.
        } else if !(hidden >= 1.0 && hidden <= f64::from(1 << 20) && (hidden - hidden.round()).abs() < 1e-6) {
            let what = format!("{} times d_model {d} is not a valid MLP width", self.expansion_ratio);
            return Err(Error::config("expansion_ratio", what));
        }
        divides("attn_config.kv_n_heads", self.kv_heads()?, "n_heads", heads)?;
        positive("attn_config.clip_qkv", attention.clip_qkv)?;
        positive("attn_config.softmax_scale", attention.softmax_scale)?;
        positive("attn_config.alibi_bias_max", attention.alibi_bias_max)?;
        epsilon("norm_eps", self.norm_eps)?;
        epsilon("layer_norm_epsilon", self.layer_norm_epsilon)?;
        epsilon("attn_config.norm_eps", attention.norm_eps)
    }

    /// Returns the epsilon of the norms except those of queries and keys.
    ///
    /// transformers reads `layer_norm_epsilon`, the others `norm_eps`. If both are present, the key of the
    /// configuration's own class wins.
    pub(crate) fn eps(&self) -> f64 {
        let (own, other) = match self.class {
            ConfigClass::Transformers => (self.layer_norm_epsilon, self.norm_eps),
            _ => (self.norm_eps, self.layer_norm_epsilon),
        };
        own.or(other).unwrap_or(EPS)
    }

    /// Returns the epsilon of the norms of queries and keys. As in llm-foundry, the top-level `norm_eps` does not apply
    /// to them.
    pub(crate) fn qk_eps(&self) -> f64 {
        self.attn_config.norm_eps.unwrap_or(EPS)
    }

    /// Returns the number of key and value heads.
    pub(crate) fn kv_heads(&self) -> Result<usize> {
        let key = "attn_config.kv_n_heads";
        match self.attn_config.attn_type.as_deref() {
            None | Some("multihead_attention") => Ok(self.n_heads),
            Some("multiquery_attention") => Ok(1),
            Some("grouped_query_attention") => {
                self.attn_config.kv_n_heads.ok_or_else(|| Error::config(key, "missing; attn_type requires it"))
            }
            Some(other) => Err(Error::config("attn_config.attn_type", format!("{other:?} is not implemented"))),
        }
    }

    /// Returns the width of the MLP.
    pub(crate) fn hidden(&self) -> usize {
        let given = self.ffn_config["ffn_hidden_size"].as_u64();
        given.map_or((self.expansion_ratio * self.d_model as f64).round() as usize, |hidden| hidden as usize)
    }

    /// Returns whether the fused query-key-value projection has a bias.
    pub(crate) fn has_attention_bias(&self) -> bool {
        match self.class {
            ConfigClass::Transformers => false,
            _ => self.attention_bias.unwrap_or(self.has_bias()),
        }
    }

    pub(crate) fn has_bias(&self) -> bool {
        match self.class {
            ConfigClass::Transformers => false,
            _ => !self.no_bias.unwrap_or(false),
        }
    }

    pub(crate) fn alibi(&self) -> Alibi {
        let bias_max = self.attn_config.alibi_bias_max.unwrap_or(8.0);
        match self.class {
            ConfigClass::MosaicGpt => Alibi::geometric(self.n_heads, bias_max),
            _ => Alibi::new(self.n_heads, bias_max),
        }
    }

    /// Returns whether the ALiBi slopes are those of [`Alibi::new`]. MosaicGPT computes others if the number of heads
    /// is not a power of two.
    pub(crate) fn has_standard_alibi_slopes(&self) -> bool {
        self.alibi() == Alibi::new(self.n_heads, self.attn_config.alibi_bias_max.unwrap_or(8.0))
    }

    pub(crate) fn activation(&self) -> Result<Activation> {
        let function = &self.ffn_config["ffn_act_fn"];
        match (function["name"].as_str(), function["approximate"].as_str()) {
            _ if function.is_null() => Ok(Activation::GeluErf),
            (Some("gelu"), None | Some("none")) => Ok(Activation::GeluErf),
            (Some("gelu"), Some("tanh")) => Ok(Activation::GeluTanh),
            _ => Err(Error::config("ffn_config.ffn_act_fn", format!("{function} is not implemented"))),
        }
    }

    pub(crate) fn logit_scale(&self) -> Result<f64> {
        match &self.logit_scale {
            None => Ok(1.0),
            Some(Value::String(name)) if name == "inv_sqrt_d_model" => Ok(1.0 / (self.d_model as f64).sqrt()),
            Some(value) => value.as_f64().ok_or_else(|| {
                Error::config("logit_scale", format!("{value} is neither a number nor \"inv_sqrt_d_model\""))
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn with(changes: &Value) -> Result<Config> {
        let mut config =
            json!({"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 96, "architectures": ["MPTForCausalLM"]});
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        Config::from_json(&config)
    }

    #[test]
    fn classes_differ_in_bias_and_alibi() {
        let foundry = with(&json!({})).unwrap();
        assert!(foundry.has_bias() && foundry.hidden() == 256 && foundry.kv_heads().unwrap() == 4);
        assert!(!with(&json!({"architectures": ["MptForCausalLM"]})).unwrap().has_bias());
        let six = json!({"n_heads": 6, "d_model": 48, "mlp_ratio": 2, "attn_qk_ln": true, "model_type": "mosaic_gpt", "architectures": ["MosaicGPT"]});
        let mosaic = with(&six).unwrap();
        assert!(mosaic.attn_config.qk_ln && mosaic.hidden() == 96);
        assert_ne!(mosaic.alibi(), with(&json!({"n_heads": 6, "d_model": 48})).unwrap().alibi());
        assert_eq!(with(&json!({"logit_scale": "inv_sqrt_d_model"})).unwrap().logit_scale().unwrap(), 0.125);
    }

    #[test]
    fn every_key_that_changes_the_forward_pass_is_read() {
        let eps = |changes: &Value| with(changes).map(|config| (config.eps(), config.qk_eps())).unwrap();
        assert_eq!(eps(&json!({})), (1e-5, 1e-5));
        assert_eq!(eps(&json!({"norm_eps": 1e-3})), (1e-3, 1e-5));
        assert_eq!(eps(&json!({"layer_norm_epsilon": 1e-4, "norm_eps": 1e-3})), (1e-3, 1e-5));
        let native = json!({"architectures": ["MptForCausalLM"], "layer_norm_epsilon": 1e-4, "norm_eps": 1e-3});
        assert_eq!(eps(&native), (1e-4, 1e-5));
        assert_eq!(eps(&json!({"attn_config": {"norm_eps": 1e-2}})), (1e-5, 1e-2));
        let biases = |changes: &Value| with(changes).map(|c| (c.has_attention_bias(), c.has_bias())).unwrap();
        assert_eq!(biases(&json!({"no_bias": true, "attention_bias": true})), (true, false));
        assert_eq!(biases(&json!({"attention_bias": false})), (false, true));
        assert_eq!(biases(&json!({"no_bias": true})), (false, false));
        assert_eq!(with(&json!({"ffn_config": {"ffn_hidden_size": 100}})).unwrap().hidden(), 100);
        let clip = |value: Value| with(&json!({"attn_config": {"clip_qkv": value}})).unwrap().attn_config.clip_qkv;
        assert_eq!(clip(json!(6)), Some(6.0));
        for off in [json!(0), json!(0.0), json!(false), json!(null), json!("Infinity")] {
            assert_eq!(clip(off), None);
        }
        assert!(with(&json!({"attn_config": null, "ffn_config": null})).is_ok());
        assert_eq!(with(&json!({"max_seq_len": 4096.0})).unwrap().max_seq_len, 4096);
        assert!(with(&json!({"max_seq_len": 0.5})).unwrap_err().to_string().contains("max_seq_len"));
        let saved = json!({
            "fc_type": {"name": "torch", "bias": true}, "attn_config": {"attn_temperature_tuning": {"attn_scale": 0.0, "floor_scale": 8192},
            "rope_hf_config": {"type": "linear", "factor": 4}, "kv_n_heads": 4, "model_type": "", "temperature": 1.0}, "head_dim": 16, "x": 1,
        });
        with(&saved).unwrap();
        assert_eq!(Config::unknown_keys(&saved).unwrap(), ["x"]);
        let mosaic = json!({"architectures": ["MosaicGPT"], "attn_config": {}, "gpt_block": "standard"});
        assert_eq!(Config::unknown_keys(&mosaic).unwrap(), ["attn_config"]);
    }

    #[test]
    fn unsupported_settings_name_their_key() {
        for (key, value) in [
            ("prefix_lm", json!(true)),
            ("attn_uses_sequence_id", json!(true)),
            ("rope", json!(true)),
            ("qk_gn", json!(true)),
            ("sliding_window_size", json!(128)),
            ("attn_type", json!("linear")),
            ("clip_qkv", json!(-1)),
            ("clip_qkv", json!(true)),
            ("softmax_scale", json!(0)),
            ("attn_logit_softcapping", json!(30.0)),
            ("reuse_kv_layer_idx", json!(0)),
            ("attn_temperature_tuning.attn_scale", json!(0.1)),
            ("head_dim", json!(32)),
            ("fused_qkv", json!(false)),
            ("nope", json!(true)),
            ("kv_dim", json!(32)),
            ("norm_type", json!("rmsnorm")),
            ("norm_eps", json!("NaN")),
        ] {
            // `outer.inner` is the key `inner` in the object `outer`.
            let (key, value) = match key.split_once('.') {
                Some((key, inner)) => (key, json!({inner: value})),
                None => (key, value),
            };
            let error = with(&json!({"attn_config": {key: value}})).unwrap_err();
            assert!(error.to_string().contains(&format!("attn_config.{key}")), "{error}");
        }
        let grouped = json!({"attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 3}});
        assert!(with(&grouped).unwrap_err().to_string().contains("kv_n_heads"));
        for (key, value) in [
            ("norm_type", json!("rmsnorm")),
            ("expansion_ratio", json!(0.001)),
            ("logit_scale", json!("large")),
            ("ffn_config", json!({"ffn_type": "te_ln_mlp"})),
            ("n_heads", json!(5)),
            ("layer_norm_epsilon", json!(0)),
            ("norm_eps", json!(2)),
            ("final_logit_softcapping", json!(30.0)),
            ("block_overrides", json!({"order": [{"name": "default"}]})),
            ("fc_type", json!("te")),
            ("fc_type", json!({"name": "te"})),
            ("head_dim", json!(8)),
            ("fuse_norm_attn_norm", json!(true)),
            ("quantization_config", json!({"quant_method": "awq"})),
            ("ffn_config", json!({"ffn_type": "mb_moe"})),
            ("ffn_config", json!({"moe_num_experts": 4})),
            ("ffn_config", json!({"ffn_hidden_size": 0})),
            ("ffn_config", json!({"ffn_act_fn": {"name": "silu"}})),
        ] {
            let error = with(&json!({key: value})).unwrap_err();
            assert!(error.to_string().contains(key), "{error}");
        }
    }
}
