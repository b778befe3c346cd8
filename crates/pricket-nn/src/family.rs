//! What a family of models says of itself, so that nothing else has to name it.

use std::sync::Arc;

use pricket_weights::Store;
use serde_json::Value;

use crate::config::{GENERIC, Keys};
use crate::{Activation, CausalLm, Error, GgmlLayout, Initialization, Names, Result, Weights};

/// The shape of a tensor of a file, by the name that it has there.
pub type ShapeOf<'a> = &'a dyn Fn(&str) -> Option<Vec<usize>>;

/// How a file has the rows of fused query-key-value matrices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FusedRows {
    /// As the Hub has them.
    AsTrained,
    /// As the model multiplies with them.
    InModelOrder,
    /// As the model multiplies with them: the file says so.
    Stated,
    /// One of the two, and the file does not say which.
    Unknown {
        /// Whether the model's order is the more likely one.
        model_order_is_likely: bool,
        /// Why.
        why: &'static str,
    },
}

/// A tokenizer that a family's files of old containers were made with, and how its vocabulary is recognized.
#[derive(Clone, Copy, Debug)]
pub struct KnownTokenizer {
    /// Its repository on the Hub.
    pub repository: &'static str,
    /// Words that it has at these ids.
    pub words: &'static [(usize, &'static str)],
    /// Words that it has at least.
    pub count: usize,
}

/// A family of models. Each family's crate has one `pub static FAMILY: &dyn Family`; `pricket` has a list of them. Configurations
/// are config.json as it is.
///
/// A family that no GGUF or legacy GGML file was made of needs the first five methods only.
pub trait Family: Sync {
    /// Its name, as a model card spells it: that of its crate without `pricket-`.
    fn name(&self) -> &'static str;

    /// What it calls itself in a configuration: values of `model_type`, and Python classes in `architectures`, that of newly
    /// written files first. Empty for a family whose configurations are another's.
    fn spellings(&self) -> (&'static [&'static str], &'static [&'static str]);

    /// Checks a configuration: every key that changes the maths is implemented.
    ///
    /// # Errors
    /// [`Error::Config`] naming the key.
    fn check(&self, config: &Value) -> Result<()>;

    /// Loads the model that `config` describes.
    ///
    /// # Errors
    /// As [`Family::check`], and if a tensor is missing or misshapen.
    fn load(&self, config: &Value, weights: &Weights) -> Result<Arc<dyn CausalLm>>;

    /// What its tensors are called on file.
    fn names(&self) -> Names;

    /// The configuration of a checkpoint that has no config.json, as the shapes of its tensors tell it; `None` for a family whose
    /// checkpoints have one, and for tensors that are not the family's.
    fn config_from_shapes(&self, shape: ShapeOf<'_>) -> Option<Value> {
        let _ = shape;
        None
    }

    /// An end token that published generation_config.json files of the family name by mistake: text would end at an ordinary word.
    fn mistaken_end_token(&self, config: &Value) -> Option<u32> {
        let _ = config;
        None
    }

    /// Whether a configuration is one of this family: by `model_type`, or by `architectures` where there is none. Never by the
    /// shape of a model or the name of a repository.
    fn claims(&self, config: &Value) -> bool {
        let (model_types, classes) = self.spellings();
        match (config["model_type"].as_str(), config["architectures"][0].as_str()) {
            (Some(kind), _) => model_types.contains(&kind),
            (None, Some(class)) => classes.contains(&class),
            (None, None) => false,
        }
    }

    /// The keys that a configuration may have.
    fn keys(&self, config: &Value) -> Vec<Keys> {
        let _ = config;
        vec![GENERIC]
    }

    /// The Python class that a configuration is for: the one that it names, if it is one of this family's.
    fn class(&self, config: &Value) -> &'static str {
        let classes = self.spellings().1;
        let named = config["architectures"][0].as_str();
        classes.iter().find(|class| Some(**class) == named).or(classes.first()).copied().unwrap_or_default()
    }

    /// Writes another activation function into a configuration.
    ///
    /// # Errors
    /// [`Error::Input`] for one that the family cannot have.
    fn set_activation(&self, config: &mut Value, activation: Activation) -> Result<()> {
        let _ = config;
        Err(Error::Input(format!("{activation:?}: the activation of {} models cannot be chosen", self.name())))
    }

    /// How a model begins training.
    ///
    /// # Errors
    /// [`Error::Config`] naming a key that is not implemented.
    fn initialization(&self, config: &Value) -> Result<Initialization> {
        let _ = config;
        Err(Error::Input(format!("{} models are not trained from random weights", self.name())))
    }

    /// What sets a configuration apart from those of the family; `None` if nothing does.
    fn unlike(&self, config: &Value) -> Option<String> {
        (!self.claims(config)).then(|| format!("it is not of the family {}", self.name()))
    }

    /// `general.architecture` of its GGUF files; `None` if there are none.
    fn gguf_architecture(&self) -> Option<&'static str> {
        None
    }

    /// Canonical parts of names, and what GGUF calls them.
    fn gguf_names(&self) -> &'static [(&'static str, &'static str)] {
        &[]
    }

    /// The keys that GGUF metadata may have behind the name of the architecture.
    fn gguf_keys(&self) -> Keys {
        Keys { read: &[], neutral: &[], only: &[] }
    }

    /// The configuration that GGUF metadata stand for.
    ///
    /// # Errors
    /// [`Error::Config`] naming a key that is missing or not implemented.
    fn config_from_gguf(&self, metadata: &Value, shape: ShapeOf<'_>) -> Result<Value> {
        let _ = (metadata, shape);
        Err(Error::config("general.architecture", format!("there are no GGUF files of {} models", self.name())))
    }

    /// The GGUF metadata that a configuration stands for. `holds` tells whether the file has a tensor, by its GGUF name.
    ///
    /// # Errors
    /// As [`Family::check`], and for what GGUF has no key for.
    fn gguf_metadata(&self, config: &Value, holds: &dyn Fn(&str) -> bool) -> Result<Value> {
        let _ = (config, holds);
        Err(Error::Input(format!("GGUF has no form for {} models", self.name())))
    }

    /// How a GGUF file of this version has the rows of fused matrices.
    fn gguf_rows(&self, metadata: &Value, version: u32) -> FusedRows {
        let _ = (metadata, version);
        FusedRows::InModelOrder
    }

    /// The matrices whose rows files of llama.cpp have in the order [`RowOrder::Pairs`](crate::RowOrder::Pairs), GGUF and legacy GGML
    /// alike, by a part of their canonical names; and their numbers of heads.
    ///
    /// # Errors
    /// As [`Family::check`].
    fn paired_rows(&self, config: &Value) -> Result<Vec<(&'static str, usize)>> {
        let _ = config;
        Ok(Vec::new())
    }

    /// Whether llama.cpp wants a head of its own where the checkpoint ties it to the embedding.
    fn gguf_repeats_tied_head(&self) -> bool {
        false
    }

    /// The headers of its legacy GGML files.
    fn ggml_layouts(&self) -> &'static [GgmlLayout] {
        &[]
    }

    /// The configuration that the header of a legacy GGML file stands for.
    ///
    /// # Errors
    /// [`Error::Config`] naming a field that is missing.
    fn config_from_ggml(&self, header: &Value, shape: ShapeOf<'_>) -> Result<Value> {
        let _ = (header, shape);
        Err(Error::Input(format!("there are no legacy GGML files of {} models", self.name())))
    }

    /// What is assumed of a legacy GGML file because its header has no field for it; completes "not in the file and assumed: ".
    fn ggml_assumes(&self) -> Option<&'static str> {
        None
    }

    /// The tensors of a legacy GGML file as the Hub has them, where a program wrote other values or shapes.
    fn ggml_tensors(&self, store: Arc<dyn Store>) -> Arc<dyn Store> {
        store
    }

    /// The tokenizer that its legacy GGML files were made with: their words have lost bytes.
    fn ggml_tokenizer(&self) -> Option<KnownTokenizer> {
        None
    }
}
