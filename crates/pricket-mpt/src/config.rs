use pricket_nn::config::{parse, plausible};
use pricket_nn::{Activation, Alibi, Error, Result};
use serde::Deserialize;
use serde_json::{Value, json};

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
    #[serde(default = "max_seq_len")]
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
    /// Added to the variance in every norm.
    #[serde(default = "eps")]
    pub layer_norm_epsilon: f64,
    /// Multiplies the logits: a number, or `inv_sqrt_d_model`.
    #[serde(default)]
    pub logit_scale: Option<Value>,
    /// Whether the embedding is the head too.
    #[serde(default = "yes")]
    pub tie_word_embeddings: bool,
    /// Of attention.
    #[serde(default)]
    pub attn_config: AttentionConfig,
    /// Of the MLP, in later versions: `ffn_type`, `ffn_act_fn`.
    #[serde(default)]
    pub ffn_config: Value,
    #[serde(skip)]
    spelling: Spelling,
}

/// Whose code wrote the configuration: they differ in what they do, not only in what they call it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Spelling {
    /// llm-foundry, `MPTForCausalLM`.
    #[default]
    Foundry,
    /// transformers, `MptForCausalLM`: never a bias.
    Native,
    /// mosaicml/examples, `MosaicGPT`: another rule for slopes.
    MosaicGpt,
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
    /// Queries, keys and values are clamped to plus and minus this.
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

fn eps() -> f64 {
    1e-5
}

fn yes() -> bool {
    true
}

/// MosaicGPT's keys in MPT's places.
fn from_mosaic_gpt(json: &Value) -> Value {
    let mut out = json.clone();
    out["expansion_ratio"] = json.get("mlp_ratio").cloned().unwrap_or(json!(4));
    let mut attention = json!({});
    let kept = ["softmax_scale", "alibi", "alibi_bias_max", "prefix_lm", "attn_uses_sequence_id"].map(|key| (key, key));
    for (ours, theirs) in kept.into_iter().chain([("qk_ln", "attn_qk_ln"), ("clip_qkv", "attn_clip_qkv")]) {
        if let Some(value) = json.get(theirs) {
            attention[ours] = value.clone();
        }
    }
    out["attn_config"] = attention;
    out
}

/// Refuses by name what changes the maths and is not done here.
fn check_implemented(json: &Value) -> Result<()> {
    let harmless = |key: &str, value: &Value| match key {
        "attn_config.sliding_window_size" => *value == json!(-1) || value.is_null(),
        "ffn_config.ffn_type" => *value == json!("mptmlp") || value.is_null(),
        "norm_type" => {
            value.is_null() || ["layernorm", "low_precision_layernorm"].iter().any(|norm| *value == json!(norm))
        }
        _ => *value == json!(false) || value.is_null(),
    };
    let keys = ["prefix_lm", "attn_uses_sequence_id", "rope", "qk_gn", "sliding_window_size"];
    let attention = keys.iter().map(|key| (format!("attn_config.{key}"), &json["attn_config"][key]));
    let others = ["norm_type"].map(|key| (key.to_owned(), &json[key]));
    let ffn = ("ffn_config.ffn_type".to_owned(), &json["ffn_config"]["ffn_type"]);
    match attention.chain(others).chain([ffn]).find(|(key, value)| !harmless(key, value)) {
        Some((key, value)) => Err(Error::config(key, format!("{value} is not implemented"))),
        None => Ok(()),
    }
}

impl Config {
    /// Reads a config.json of any of the three spellings and checks that the sizes fit each other.
    ///
    /// # Errors
    /// [`Error::Config`], naming the key.
    pub fn from_json(json: &Value) -> Result<Self> {
        let spelling = match (json["architectures"][0].as_str(), json["model_type"].as_str()) {
            (Some("MosaicGPT"), _) | (_, Some("mosaic_gpt")) => Spelling::MosaicGpt,
            (Some("MptForCausalLM"), _) => Spelling::Native,
            _ => Spelling::Foundry,
        };
        let json = if spelling == Spelling::MosaicGpt { &from_mosaic_gpt(json) } else { json };
        let mut config: Self = parse(json)?;
        config.spelling = spelling;
        plausible("vocab_size", config.vocab_size, 1 << 24)?;
        plausible("d_model", config.d_model, 1 << 17)?;
        plausible("n_layers", config.n_layers, 1 << 12)?;
        plausible("n_heads", config.n_heads, 1 << 12)?;
        plausible("max_seq_len", config.max_seq_len, 1 << 24)?;
        config.check_sizes()?;
        check_implemented(json)?;
        config.activation()?;
        config.logit_scale()?;
        Ok(config)
    }

    fn check_sizes(&self) -> Result<()> {
        let (d, heads) = (self.d_model, self.n_heads);
        if d % heads != 0 {
            return Err(Error::config("n_heads", format!("{heads} does not divide d_model {d}")));
        }
        let hidden = self.expansion_ratio * d as f64;
        // A ratio that was made of two widths is not always the float that gives them back.
        if !(hidden >= 1.0 && hidden <= f64::from(1 << 20) && (hidden - hidden.round()).abs() < 1e-6) {
            let what = format!("{} times d_model {d} is no width of an MLP", self.expansion_ratio);
            return Err(Error::config("expansion_ratio", what));
        }
        let kv = self.kv_heads()?;
        if kv == 0 || heads % kv != 0 {
            return Err(Error::config("attn_config.kv_n_heads", format!("{kv} does not divide n_heads {heads}")));
        }
        let positive = |key: &str, value: Option<f64>| match value {
            Some(value) if !(value.is_finite() && value > 0.0) => {
                Err(Error::config(key, format!("{value} is not a positive number")))
            }
            _ => Ok(()),
        };
        positive("attn_config.clip_qkv", self.attn_config.clip_qkv)?;
        positive("attn_config.softmax_scale", self.attn_config.softmax_scale)?;
        positive("attn_config.alibi_bias_max", self.attn_config.alibi_bias_max)?;
        if !(self.layer_norm_epsilon > 0.0 && self.layer_norm_epsilon < 1.0) {
            let what = format!("{} is not between 0 and 1", self.layer_norm_epsilon);
            return Err(Error::config("layer_norm_epsilon", what));
        }
        Ok(())
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
        (self.expansion_ratio * self.d_model as f64).round() as usize
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
            _ if function.is_null() => Ok(Activation::Gelu),
            (Some("gelu"), None | Some("none")) => Ok(Activation::Gelu),
            (Some("gelu"), Some("tanh")) => Ok(Activation::GeluTanh),
            _ => Err(Error::config("ffn_config.ffn_act_fn", format!("{function} is not implemented"))),
        }
    }

    pub(crate) fn logit_scale(&self) -> Result<f64> {
        match &self.logit_scale {
            None => Ok(1.0),
            Some(Value::String(name)) if name == "inv_sqrt_d_model" => Ok(1.0 / (self.d_model as f64).sqrt()),
            Some(value) => value.as_f64().ok_or_else(|| {
                Error::config("logit_scale", format!("{value} is no number and not \"inv_sqrt_d_model\""))
            }),
        }
    }
}

#[cfg(test)]
mod tests {
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
    fn what_is_not_implemented_is_refused_by_name() {
        for (key, value) in [
            ("prefix_lm", json!(true)),
            ("attn_uses_sequence_id", json!(true)),
            ("rope", json!(true)),
            ("qk_gn", json!(true)),
            ("sliding_window_size", json!(128)),
            ("attn_type", json!("linear")),
            ("clip_qkv", json!(-1)),
            ("softmax_scale", json!(0)),
        ] {
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
        ] {
            let error = with(&json!({key: value})).unwrap_err();
            assert!(error.to_string().contains(key), "{error}");
        }
    }
}
