//! Checkpoints that are compiled into the program.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use pricket_lm::Tokenizer;
use pricket_weights::SafetensorsFile;

use crate::Result;
use crate::loading::opened::Opened;
use crate::loading::provenance::Provenance;
use crate::loading::small_files::parse_json;

/// A checkpoint that is compiled into the program.
pub(crate) struct Embedded {
    pub(crate) name: &'static str,
    config: &'static [u8],
    /// Names and contents of the tokenizer's files, the main file first.
    tokenizer: &'static [(&'static str, &'static [u8])],
    weights: &'static [u8],
}

/// Embeds a checkpoint. Models with identical tokenizers name the same directory, so that the program contains the
/// files once.
macro_rules! embedded {
    ($name:literal, $tokenizer:literal: $($file:literal),+) => {
        Embedded {
            name: $name,
            config: include_bytes!(concat!("../../../../models/", $name, "/config.json")),
            tokenizer: &[$(($file, include_bytes!(concat!("../../../../models/", $tokenizer, "/", $file)))),+],
            weights: include_bytes!(concat!("../../../../models/", $name, "/model.safetensors")),
        }
    };
}

/// All embedded models. The first one is the default.
pub(crate) static EMBEDDED: [Embedded; 5] = [
    embedded!("tiny", "tiny": "tokenizer.json"),
    embedded!("tiny-mpt", "tiny": "tokenizer.json"),
    embedded!("tiny-chat", "tiny": "tokenizer.json"),
    embedded!("tiny-llama", "tiny-llama": "tokenizer.model", "tokenizer_config.json"),
    embedded!("tiny-rwkv", "tiny-rwkv": "tokenizer.json"),
];

impl Embedded {
    pub(crate) fn find(name: &str) -> Option<&'static Self> {
        EMBEDDED.iter().find(|model| model.name == name)
    }

    /// Returns the directory of its files in the source tree of this program.
    pub(crate) fn directory(&self) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("models").join(self.name)
    }

    fn path(&self, file: &str) -> PathBuf {
        format!("models/{}/{file} (embedded)", self.name).into()
    }

    pub(crate) fn open(&self, given: Option<Tokenizer>) -> Result<Opened> {
        let file = self.tokenizer[0].0;
        let own = || Tokenizer::from_files(self.tokenizer, self.path(file).display().to_string());
        let mut files = vec![("config.json", self.config)];
        files.extend(self.tokenizer);
        files.push(("model.safetensors", self.weights));
        Ok(Opened {
            config: parse_json(&self.path("config.json"), self.config)?,
            config_path: self.path("config.json"),
            tokenizer: Some(given.map_or_else(own, Ok)?),
            provenance: Provenance::of_embedded(&files),
            ..Opened::new(Arc::new(SafetensorsFile::embedded(self.weights)?))
        })
    }
}
