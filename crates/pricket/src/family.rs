//! Which crate a configuration belongs to.

use std::sync::Arc;

use pricket_nn::config::{GENERIC, Keys};
use pricket_nn::{CausalLm, Error, GgmlLayout, Names, Result, Weights};
use serde_json::{Value, json};

/// What `model_type` can be.
const KNOWN: &str = "\"gpt_neox\", \"mpt\", \"mosaic_gpt\"";

/// A family, its configuration read.
#[derive(Debug)]
pub(crate) enum Family {
    GptNeoX(Box<pricket_gpt_neox::Config>),
    Mpt(Box<pricket_mpt::Config>),
}

/// A family whose configuration has not been read.
enum Kind {
    GptNeoX,
    Mpt,
}

impl Family {
    pub(crate) fn from_config(config: &Value) -> Result<Self> {
        let kind = Self::kind(config)?;
        Self::check_form(config)?;
        match kind {
            Kind::GptNeoX => Ok(Family::GptNeoX(Box::new(pricket_gpt_neox::Config::from_json(config)?))),
            Kind::Mpt => Ok(Family::Mpt(Box::new(pricket_mpt::Config::from_json(config)?))),
        }
    }

    /// Refuses checkpoints that are no language model with weights of a known type, and says what they are.
    fn check_form(config: &Value) -> Result<()> {
        let architecture = config["architectures"][0].as_str().unwrap_or_default();
        let heads = ["ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"];
        if heads.iter().any(|head| architecture.ends_with(head)) {
            let what = format!(
                "{architecture:?} has a classification head in place of a language model's; load its base model"
            );
            return Err(Error::config("architectures", what));
        }
        let quantized = &config["quantization_config"];
        if !quantized.is_null() {
            let method = quantized["quant_method"].as_str().unwrap_or("an unnamed method");
            let what = format!(
                "the weights are quantized by {method}, which is not read; load the original checkpoint, with --quantize to make it small"
            );
            return Err(Error::config("quantization_config", what));
        }
        Ok(())
    }

    /// By `model_type`, else by `architectures`; never by the shape of a model or the name of a repository.
    fn kind(config: &Value) -> Result<Kind> {
        let architecture = config["architectures"][0].as_str();
        match (config["model_type"].as_str(), architecture) {
            (Some("gpt_neox"), _) | (None, Some("GPTNeoXForCausalLM")) => Ok(Kind::GptNeoX),
            (Some("mpt" | "mosaic_gpt"), _) | (None, Some("MPTForCausalLM" | "MptForCausalLM" | "MosaicGPT")) => {
                Ok(Kind::Mpt)
            }
            (Some(other), _) => Err(Error::config(
                "model_type",
                format!("{other:?} is not a family of this zoo; expected one of {KNOWN}"),
            )),
            (None, Some(other)) => Err(Error::config(
                "architectures",
                format!(
                    "{other:?} is not of this zoo; expected GPTNeoXForCausalLM, MPTForCausalLM, MptForCausalLM or MosaicGPT"
                ),
            )),
            (None, None) => Err(Error::config("model_type", format!("missing; expected one of {KNOWN}"))),
        }
    }

    /// Every header of legacy GGML files.
    pub(crate) fn ggml_layouts() -> Vec<GgmlLayout> {
        [&pricket_gpt_neox::GGML[..], &pricket_mpt::GGML].concat()
    }

    /// The config.json that a legacy GGML header stands for.
    pub(crate) fn config_from_ggml(
        layout: &GgmlLayout,
        header: &Value,
        shape: &dyn Fn(&str) -> Option<Vec<usize>>,
    ) -> Result<Value> {
        if pricket_mpt::GGML.contains(layout) {
            pricket_mpt::config_from_ggml(header, shape)
        } else {
            pricket_gpt_neox::config_from_ggml(header, shape)
        }
    }

    /// The config.json that GGUF metadata stand for.
    pub(crate) fn config_from_gguf(metadata: &Value, shape: &dyn Fn(&str) -> Option<Vec<usize>>) -> Result<Value> {
        match metadata["general.architecture"].as_str() {
            Some("gptneox") => pricket_gpt_neox::config_from_gguf(metadata, shape),
            Some("mpt") => pricket_mpt::config_from_gguf(metadata, shape),
            other => Err(Error::config(
                "general.architecture",
                match other {
                    Some(other) => format!("{other:?} is not a family of this zoo; expected \"gptneox\" or \"mpt\""),
                    None => "missing; expected \"gptneox\" or \"mpt\"".into(),
                },
            )),
        }
    }

    /// The GGUF metadata that a config.json stands for.
    pub(crate) fn gguf_metadata(&self, config: &Value, learned_positions: bool) -> Result<Value> {
        match self {
            Family::GptNeoX(_) => pricket_gpt_neox::gguf_metadata(config),
            Family::Mpt(_) => pricket_mpt::gguf_metadata(config, learned_positions),
        }
    }

    /// The class of Python's that a configuration of this family is for: the one that it names, if that is a language model.
    pub(crate) fn architecture(&self, config: &Value) -> String {
        let named = config["architectures"][0].as_str();
        let classes: &[&str] = match self {
            Family::GptNeoX(_) => &["GPTNeoXForCausalLM"],
            Family::Mpt(_) if config["model_type"] == "mosaic_gpt" => &["MosaicGPT"],
            Family::Mpt(_) => &["MPTForCausalLM", "MptForCausalLM", "MosaicGPT"],
        };
        named.filter(|named| classes.contains(named)).unwrap_or(classes[0]).to_owned()
    }

    /// What llama.cpp calls the tensors.
    pub(crate) fn gguf_names(&self) -> &'static [(&'static str, &'static str)] {
        match self {
            Family::GptNeoX(_) => pricket_gpt_neox::GGUF,
            Family::Mpt(_) => pricket_mpt::GGUF,
        }
    }

    /// Whether a tensor is the embedding or the head.
    pub(crate) fn is_table(&self, canonical: &str) -> bool {
        ["token_embd.weight", "output.weight"].contains(&Names::spelled(canonical, self.gguf_names()).as_str())
    }

    /// Names another activation in a config.json: `gelu` by the error function, or `gelu_tanh`.
    pub(crate) fn set_activation(config: &mut Value, name: &str) -> Result<()> {
        let tanh = match name {
            "gelu" => false,
            "gelu_tanh" => true,
            _ => return Err(Error::Input(format!("{name:?} is no activation; use gelu or gelu_tanh"))),
        };
        match Self::from_config(config)? {
            Family::GptNeoX(_) => config["hidden_act"] = if tanh { "gelu_pytorch_tanh" } else { "gelu" }.into(),
            Family::Mpt(_) => {
                let approximate = if tanh { "tanh" } else { "none" };
                if !config["ffn_config"].is_object() {
                    config["ffn_config"] = json!({});
                }
                config["ffn_config"]["ffn_act_fn"] = json!({"name": "gelu", "approximate": approximate});
            }
        }
        Ok(())
    }

    /// What sets this configuration apart from the family that a card names; `None` if nothing does.
    pub(crate) fn unlike(&self, family: &str) -> Option<String> {
        match (self, family) {
            (Family::GptNeoX(config), "redpajama-incite") => pricket_redpajama_incite::unlike(config),
            (Family::GptNeoX(_), "gpt-neox") | (Family::Mpt(_), "mpt") => None,
            (_, other) => Some(format!("it is not of the family {other}")),
        }
    }

    /// The tables of keys that a configuration may have; of every family where it does not say which.
    fn tables(config: &Value) -> Vec<Keys> {
        match Self::kind(config) {
            Ok(Kind::GptNeoX) => vec![pricket_gpt_neox::KEYS, GENERIC],
            Ok(Kind::Mpt) => pricket_mpt::Config::tables(config).to_vec(),
            Err(_) => vec![pricket_gpt_neox::KEYS, pricket_mpt::KEYS, pricket_mpt::MOSAIC_GPT_KEYS, GENERIC],
        }
    }

    /// Whether a key has a place in a configuration of this family.
    pub(crate) fn knows(config: &Value, key: &str) -> bool {
        Keys::knows(&Self::tables(config), key)
    }

    /// The keys of a configuration that no version of its class has.
    pub(crate) fn unknown_keys(config: &Value) -> Vec<String> {
        Keys::check(&Self::tables(config), config).unwrap_or_default()
    }

    /// The keys of GGUF metadata that this program does not know.
    pub(crate) fn unknown_gguf_keys(metadata: &Value) -> Vec<String> {
        let checked = match metadata["general.architecture"].as_str() {
            Some("gptneox") => Keys::check_gguf(pricket_gpt_neox::GGUF_KEYS, "gptneox.", metadata),
            Some("mpt") => Keys::check_gguf(pricket_mpt::GGUF_KEYS, "mpt.", metadata),
            _ => return Vec::new(),
        };
        checked.unwrap_or_default()
    }

    pub(crate) fn names(&self) -> Names {
        match self {
            Family::GptNeoX(_) => pricket_gpt_neox::NAMES,
            Family::Mpt(_) => pricket_mpt::NAMES,
        }
    }

    pub(crate) fn load(&self, weights: &Weights) -> Result<Arc<dyn CausalLm>> {
        match self {
            Family::GptNeoX(config) => Ok(Arc::new(pricket_gpt_neox::load(config, weights)?)),
            Family::Mpt(config) => Ok(Arc::new(pricket_mpt::load(config, weights)?)),
        }
    }
}
