//! The object that a run trains: an adapter or a whole model.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{Device, Tensor};
use pricket_nn::Parameter;
use serde_json::Value;

use crate::files::{read_tensors, write_tensors, write_text};
use crate::lora::Lora;
use crate::{Error, Result};

/// The object that a run trains and writes.
#[derive(Clone, Debug)]
pub enum TrainTarget {
    /// An adapter, in PEFT's format.
    Adapter(Box<Lora>),
    /// A whole model in Hub layout: config.json, and all parameters in model.safetensors.
    Model {
        /// Content of config.json.
        config: Value,
    },
}

impl TrainTarget {
    /// Writes the adapter or model with the current values of its parameters.
    pub(super) fn write(&self, directory: &Path, parameters: &[Parameter]) -> Result<()> {
        match self {
            TrainTarget::Adapter(lora) => lora.trained(parameters)?.write(directory),
            TrainTarget::Model { config } => {
                std::fs::create_dir_all(directory).map_err(Error::io(directory))?;
                let mut tensors = BTreeMap::new();
                for Parameter { name, var, rows } in parameters {
                    tensors.insert(name.clone(), rows.undo(&var.as_tensor().detach().to_device(&Device::Cpu)?)?);
                }
                // The file is written in f32, whatever type was loaded.
                let mut config = config.clone();
                for key in ["torch_dtype", "dtype"] {
                    if config[key].is_string() {
                        config[key] = "float32".into();
                    }
                }
                let json = serde_json::to_string_pretty(&config).unwrap_or_default();
                write_text(&directory.join("config.json"), &(json + "\n"))?;
                // The weights are written last, so that an interrupted write leaves no directory that loads as a model.
                write_tensors(&directory.join("model.safetensors"), &tensors)
            }
        }
    }

    /// Returns the settings that must be equal to resume from a checkpoint.
    pub(super) fn settings(&self) -> Value {
        match self {
            TrainTarget::Adapter(lora) => lora.config().to_json(),
            TrainTarget::Model { config } => config.clone(),
        }
    }

    /// Reads the tensors written by [`TrainTarget::write`].
    pub(super) fn read(&self, directory: &Path) -> Result<BTreeMap<String, Tensor>> {
        match self {
            TrainTarget::Adapter(_) => Ok(Lora::read(directory)?.tensors()),
            TrainTarget::Model { .. } => read_tensors(&directory.join("model.safetensors")),
        }
    }
}
