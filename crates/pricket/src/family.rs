//! Which crate a configuration belongs to.

use std::sync::Arc;

use pricket_nn::{CausalLm, Error, Names, Result, Weights};
use serde_json::Value;

/// A family, its configuration read.
#[derive(Debug)]
pub(crate) enum Family {
    GptNeoX(pricket_gpt_neox::Config),
}

impl Family {
    /// By `model_type`, else by `architectures`; never by the shape of a model or the name of a repository.
    pub(crate) fn from_config(config: &Value) -> Result<Self> {
        let architecture = config["architectures"][0].as_str();
        match (config["model_type"].as_str(), architecture) {
            (Some("gpt_neox"), _) | (None, Some("GPTNeoXForCausalLM")) => {
                Ok(Family::GptNeoX(pricket_gpt_neox::Config::from_json(config)?))
            }
            (Some(other), _) => Err(Error::config(
                "model_type",
                format!("{other:?} is not a family of this zoo; expected \"gpt_neox\""),
            )),
            (None, Some(other)) => Err(Error::config(
                "architectures",
                format!("{other:?} is not of this zoo; expected \"GPTNeoXForCausalLM\""),
            )),
            (None, None) => Err(Error::config("model_type", "missing; expected \"gpt_neox\"")),
        }
    }

    pub(crate) fn names(&self) -> Names {
        match self {
            Family::GptNeoX(_) => pricket_gpt_neox::NAMES,
        }
    }

    pub(crate) fn load(&self, weights: &Weights) -> Result<Arc<dyn CausalLm>> {
        match self {
            Family::GptNeoX(config) => Ok(Arc::new(pricket_gpt_neox::load(config, weights)?)),
        }
    }
}
