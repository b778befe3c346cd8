use pricket_nn::config::{Keys, divides, epsilon, limit, null_as_default, only, parse, plausible, positive, whole};
use pricket_nn::{Activation, Alibi, Error, Result};
use serde::Deserialize;
use serde_json::Value;

use crate::keys::{Spelling, from_mosaic_gpt, tables};

/// The keys of an MPT config.json that change the maths, with llm-foundry's defaults.
///
/// MosaicGPT's keys, which are the same without `attn_config`, are brought into this form when they are read.
#[derive(Clone, Debug, Deserialize)]
pub struct Config {
    /// Width of the residual stream.
    pub d_model: usize,
    /// Number of query heads; divides `d_model`.
    pub n_heads: usize,
    /// Number of blocks.
    pub n_layers: usize,
    /// Rows of the embedding, padding included.
    pub vocab_size: usize,
    /// Positions trained for; a limit only where positions are learned.
    #[serde(default = "max_seq_len", deserialize_with = "whole")]
    pub max_seq_len: usize,
    /// Width of the MLP, in `d_model`.
    #[serde(default = "four")]
    pub expansion_ratio: f64,
    /// Whether no linear layer and no norm has a bias.
    #[serde(default)]
    pub no_bias: Option<bool>,
    /// Whether positions are learned, where ALiBi is off.
    #[serde(default = "yes")]
    pub learned_pos_emb: bool,
    /// Whether the fused projection has a bias, where that differs from what `no_bias` says of all.
    #[serde(default)]
    pub attention_bias: Option<bool>,
    /// Added to the variance in every norm but those of queries and keys: llm-foundry's key.
    #[serde(default)]
    pub norm_eps: Option<f64>,
    /// The same: transformers' key.
    #[serde(default)]
    pub layer_norm_epsilon: Option<f64>,
    /// Width of a head; `d_model / n_heads`.
    #[serde(default)]
    pub head_dim: Option<usize>,
    /// Multiplies the logits: a number, or `inv_sqrt_d_model`.
    #[serde(default)]
    pub logit_scale: Option<Value>,
    /// Whether the embedding is the head too.
    #[serde(default = "yes")]
    pub tie_word_embeddings: bool,
    /// Of attention.
    #[serde(default, deserialize_with = "null_as_default")]
    pub attn_config: AttentionConfig,
    /// Of the MLP, in later versions: `ffn_type`, `ffn_act_fn`.
    #[serde(default)]
    pub ffn_config: Value,
    #[serde(skip)]
    spelling: Spelling,
}

/// `attn_config`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct AttentionConfig {
    /// `multihead_attention`, `multiquery_attention` or `grouped_query_attention`.
    pub attn_type: Option<String>,
    /// Key and value heads of grouped queries.
    pub kv_n_heads: Option<usize>,
    /// Whether queries and keys are normed over all heads together.
    pub qk_ln: bool,
    /// Added to the variance in the norms of queries and keys.
    pub norm_eps: Option<f64>,
    /// As [`Config::head_dim`].
    pub head_dim: Option<usize>,
    /// Limit of the absolute value of queries, keys and values. 0, `false` and infinity mean no limit.
    #[serde(deserialize_with = "limit")]
    pub clip_qkv: Option<f64>,
    /// Multiplies the scores; `1 / sqrt(head_dim)` by default.
    pub softmax_scale: Option<f64>,
    /// Whether positions enter as ALiBi. The two implementations' defaults disagree; the checkpoint decides.
    pub alibi: Option<bool>,
    /// The largest exponent of the slopes.
    pub alibi_bias_max: Option<f64>,
}

fn max_seq_len() -> usize {
    2048
}

fn four() -> f64 {
    4.0
}

/// The epsilon of every norm, unless a key says otherwise.
const EPS: f64 = 1e-5;

fn yes() -> bool {
    true
}

impl Config {
    /// Reads a config.json of any of the three spellings and checks that the sizes fit each other.
    ///
    /// # Errors
    /// [`Error::Config`], naming the key.
    pub fn from_json(json: &Value) -> Result<Self> {
        let (original, spelling) = (json, Spelling::of(json));
        let json = if spelling == Spelling::MosaicGpt { &from_mosaic_gpt(json) } else { json };
        let mut config: Self = parse(json)?;
        config.spelling = spelling;
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

    /// Keys of a config.json that no version of its class has.
    ///
    /// # Errors
    /// As [`Config::from_json`].
    pub fn unknown_keys(json: &Value) -> Result<Vec<String>> {
        Keys::check(tables(json), json)
    }

    fn check_sizes(&self) -> Result<()> {
        let (d, heads, attention) = (self.d_model, self.n_heads, &self.attn_config);
        divides("n_heads", heads, "d_model", d)?;
        only("head_dim", self.head_dim, d / heads)?;
        only("attn_config.head_dim", attention.head_dim, d / heads)?;
        let hidden = self.expansion_ratio * d as f64;
        if let Some(hidden) = self.ffn_config["ffn_hidden_size"].as_u64() {
            plausible("ffn_config.ffn_hidden_size", hidden as usize, 1 << 20)?;
        // A ratio that was made of two widths is not always the float that gives them back.
        } else if !(hidden >= 1.0 && hidden <= f64::from(1 << 20) && (hidden - hidden.round()).abs() < 1e-6) {
            let what = format!("{} times d_model {d} is not the width of an MLP", self.expansion_ratio);
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

    /// The epsilon of the norms, but those of queries and keys. Each implementation knows one of the two keys.
    pub(crate) fn eps(&self) -> f64 {
        let (own, other) = match self.spelling {
            Spelling::Native => (self.layer_norm_epsilon, self.norm_eps),
            _ => (self.norm_eps, self.layer_norm_epsilon),
        };
        own.or(other).unwrap_or(EPS)
    }

    /// The epsilon of the norms of queries and keys, which llm-foundry does not hand `norm_eps` to.
    pub(crate) fn qk_eps(&self) -> f64 {
        self.attn_config.norm_eps.unwrap_or(EPS)
    }

    /// Key and value heads.
    pub(crate) fn kv_heads(&self) -> Result<usize> {
        let key = "attn_config.kv_n_heads";
        match self.attn_config.attn_type.as_deref() {
            None | Some("multihead_attention") => Ok(self.n_heads),
            Some("multiquery_attention") => Ok(1),
            Some("grouped_query_attention") => {
                self.attn_config.kv_n_heads.ok_or_else(|| Error::config(key, "missing; grouped queries need it"))
            }
            Some(other) => Err(Error::config("attn_config.attn_type", format!("{other:?} is not implemented"))),
        }
    }

    pub(crate) fn hidden(&self) -> usize {
        let given = self.ffn_config["ffn_hidden_size"].as_u64();
        given.map_or((self.expansion_ratio * self.d_model as f64).round() as usize, |hidden| hidden as usize)
    }

    /// Whether the fused projection of attention has a bias.
    pub(crate) fn has_attention_bias(&self) -> bool {
        match self.spelling {
            Spelling::Native => false,
            _ => self.attention_bias.unwrap_or(self.has_bias()),
        }
    }

    pub(crate) fn has_bias(&self) -> bool {
        match self.spelling {
            Spelling::Native => false,
            _ => !self.no_bias.unwrap_or(false),
        }
    }

    pub(crate) fn alibi(&self) -> Alibi {
        let bias_max = self.attn_config.alibi_bias_max.unwrap_or(8.0);
        match self.spelling {
            Spelling::MosaicGpt => Alibi::geometric(self.n_heads, bias_max),
            _ => Alibi::new(self.n_heads, bias_max),
        }
    }

    /// Whether slopes are those of everybody else's rule too.
    pub(crate) fn alibi_as_others_do(&self) -> bool {
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
    fn the_spellings_differ_where_their_code_does() {
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
    fn every_key_that_changes_the_maths_is_read() {
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
    fn what_is_not_implemented_is_refused_by_name() {
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
            // `outer.inner` is a key of an object.
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
