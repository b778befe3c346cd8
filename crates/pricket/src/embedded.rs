//! The checkpoints that are compiled into the program.

use std::path::PathBuf;
use std::sync::Arc;

use pricket_lm::Tokenizer;
use pricket_weights::SafetensorsFile;

use crate::opened::Opened;
use crate::small_files::parse_json;
use crate::{Provenance, Result};

/// A checkpoint that is compiled into the program.
pub(crate) struct Embedded {
    pub(crate) name: &'static str,
    config: &'static [u8],
    tokenizer: &'static [u8],
    weights: &'static [u8],
}

macro_rules! embedded {
    ($name:literal) => {
        Embedded {
            name: $name,
            config: include_bytes!(concat!("../../../models/", $name, "/config.json")),
            tokenizer: include_bytes!(concat!("../../../models/", $name, "/tokenizer.json")),
            weights: include_bytes!(concat!("../../../models/", $name, "/model.safetensors")),
        }
    };
}

/// The first is the one that is meant where none is named.
pub(crate) static EMBEDDED: [Embedded; 3] = [embedded!("tiny"), embedded!("tiny-mpt"), embedded!("tiny-chat")];

impl Embedded {
    pub(crate) fn find(name: &str) -> Option<&'static Self> {
        EMBEDDED.iter().find(|model| model.name == name)
    }

    fn path(&self, file: &str) -> PathBuf {
        format!("models/{}/{file} (embedded)", self.name).into()
    }

    pub(crate) fn open(&self, given: Option<Tokenizer>) -> Result<Opened> {
        let own = || Tokenizer::from_bytes(self.tokenizer, self.path("tokenizer.json").display().to_string());
        Ok(Opened {
            config: parse_json(&self.path("config.json"), self.config)?,
            config_path: self.path("config.json"),
            tokenizer: Some(given.map_or_else(own, Ok)?),
            provenance: Provenance::of_embedded(&[
                ("config.json", self.config),
                ("tokenizer.json", self.tokenizer),
                ("model.safetensors", self.weights),
            ]),
            ..Opened::new(Arc::new(SafetensorsFile::embedded(self.weights)?))
        })
    }
}
