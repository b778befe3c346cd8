//! Which crate a configuration belongs to.

use std::sync::Arc;

use pricket_nn::{CausalLm, Error, Names, Result, Weights};
use serde_json::Value;

/// What `model_type` can be.
const KNOWN: &str = "\"gpt_neox\", \"mpt\", \"mosaic_gpt\"";

/// A family, its configuration read.
#[derive(Debug)]
pub(crate) enum Family {
    GptNeoX(Box<pricket_gpt_neox::Config>),
    Mpt(Box<pricket_mpt::Config>),
}

impl Family {
    /// By `model_type`, else by `architectures`; never by the shape of a model or the name of a repository.
    pub(crate) fn from_config(config: &Value) -> Result<Self> {
        let architecture = config["architectures"][0].as_str();
        match (config["model_type"].as_str(), architecture) {
            (Some("gpt_neox"), _) | (None, Some("GPTNeoXForCausalLM")) => {
                Ok(Family::GptNeoX(Box::new(pricket_gpt_neox::Config::from_json(config)?)))
            }
            (Some("mpt" | "mosaic_gpt"), _) | (None, Some("MPTForCausalLM" | "MptForCausalLM" | "MosaicGPT")) => {
                Ok(Family::Mpt(Box::new(pricket_mpt::Config::from_json(config)?)))
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

    /// What sets this configuration apart from the family that a card names; `None` if nothing does.
    pub(crate) fn unlike(&self, family: &str) -> Option<String> {
        match (self, family) {
            (Family::GptNeoX(config), "redpajama-incite") => pricket_redpajama_incite::unlike(config),
            (Family::GptNeoX(_), "gpt-neox") | (Family::Mpt(_), "mpt") => None,
            (_, other) => Some(format!("it is not of the family {other}")),
        }
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
