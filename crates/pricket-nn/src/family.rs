//! The trait that a family of models implements. The rest of pricket uses only this trait and names no family.

use std::sync::Arc;

use pricket_weights::Store;
use serde_json::Value;

use crate::config::{GENERIC, Keys};
use crate::{Activation, CausalLm, Error, GgmlLayout, Initialization, Names, Result, Weights};

/// Function that returns the shape of a tensor by its name in the file, or `None` if there is no such tensor.
pub type ShapeOf<'a> = &'a dyn Fn(&str) -> Option<Vec<usize>>;

/// Row order of fused query-key-value matrices in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FusedRows {
    /// The order of checkpoints on the Hub.
    AsTrained,
    /// The model's order.
    InModelOrder,
    /// The model's order, recorded in the metadata of the file.
    Stated,
    /// One of the two orders; the file does not record which.
    Unknown {
        /// Whether the model's order is the more likely one.
        model_order_is_likely: bool,
        /// Reason for the guess.
        why: &'static str,
    },
}

/// Tokenizer that the legacy files of a family were made with, and how to recognize its vocabulary.
#[derive(Clone, Copy, Debug)]
pub struct KnownTokenizer {
    /// Repository on the Hub.
    pub repository: &'static str,
    /// Some ids and the words at them.
    pub words: &'static [(usize, &'static str)],
    /// Minimum number of words.
    pub count: usize,
}

/// A family of models.
///
/// The crate of each family has one `pub static FAMILY: &dyn Family`, and `pricket` has a list of all families. A
/// configuration is the unchanged content of a config.json. A family without GGUF and legacy GGML files has to
/// implement only the first five methods.
pub trait Family: Sync {
    /// Returns the name of the family, as model cards spell it. It is the name of the crate without `pricket-`.
    fn name(&self) -> &'static str;

    /// Returns the values of `model_type` and the Python classes in `architectures` that select this family.
    ///
    /// The first class is used for newly written files. Both lists are empty for a family that uses the configurations
    /// of another family.
    fn spellings(&self) -> (&'static [&'static str], &'static [&'static str]);

    /// Checks that the values of a configuration are valid and that every key that affects the forward pass is
    /// implemented.
    ///
    /// # Errors
    /// Returns [`Error::Config`] naming the key if one is not.
    fn check(&self, config: &Value) -> Result<()>;

    /// Loads the model that `config` describes.
    ///
    /// # Errors
    /// Returns the errors of [`Family::check`], or an error if a tensor is missing or has another shape.
    fn load(&self, config: &Value, weights: &Weights) -> Result<Arc<dyn CausalLm>>;

    /// Returns the tensor names of the family.
    fn names(&self) -> Names;

    /// Returns the configuration of a checkpoint without a config.json, derived from the shapes of its tensors.
    ///
    /// Returns `None` if the tensors are not those of the family, or if checkpoints of the family always have a
    /// config.json.
    fn config_from_shapes(&self, shape: ShapeOf<'_>) -> Option<Value> {
        let _ = shape;
        None
    }

    /// Returns an end token that published generation_config.json files of the family set by mistake. It is an ordinary
    /// word, at which generation would stop.
    fn mistaken_end_token(&self, config: &Value) -> Option<u32> {
        let _ = config;
        None
    }

    /// Returns whether a configuration belongs to this family, by `model_type`, or by `architectures` if `model_type`
    /// is missing. Shapes and repository names do not matter.
    fn claims(&self, config: &Value) -> bool {
        let (model_types, classes) = self.spellings();
        match (config["model_type"].as_str(), config["architectures"][0].as_str()) {
            (Some(kind), _) => model_types.contains(&kind),
            (None, Some(class)) => classes.contains(&class),
            (None, None) => false,
        }
    }

    /// Returns the keys that a configuration may have.
    fn keys(&self, config: &Value) -> Vec<Keys> {
        let _ = config;
        vec![GENERIC]
    }

    /// Returns the Python class of a configuration: the class that it names, if it is one of this family, otherwise the
    /// first class.
    fn class(&self, config: &Value) -> &'static str {
        let classes = self.spellings().1;
        let named = config["architectures"][0].as_str();
        classes.iter().find(|class| Some(**class) == named).or(classes.first()).copied().unwrap_or_default()
    }

    /// Sets the activation function in a configuration.
    ///
    /// # Errors
    /// Returns [`Error::Input`] if the family does not support the function.
    fn set_activation(&self, config: &mut Value, activation: Activation) -> Result<()> {
        let _ = config;
        Err(Error::Input(format!("{activation:?}: the activation function of {} models is fixed", self.name())))
    }

    /// Returns the initialization scheme for training from scratch.
    ///
    /// # Errors
    /// Returns [`Error::Config`] naming a key that is not implemented, or [`Error::Input`] if the family has no scheme.
    fn initialization(&self, config: &Value) -> Result<Initialization> {
        let _ = config;
        Err(Error::Input(format!("{} models cannot be trained from random weights", self.name())))
    }

    /// Returns how a configuration differs from all configurations of the family, or `None` if it does not.
    fn unlike(&self, config: &Value) -> Option<String> {
        (!self.claims(config)).then(|| format!("it does not belong to the family {}", self.name()))
    }

    /// Returns `general.architecture` of GGUF files, or `None` if the family has no GGUF files.
    fn gguf_architecture(&self) -> Option<&'static str> {
        None
    }

    /// Returns pairs of a part of canonical names and its name in GGUF files.
    fn gguf_names(&self) -> &'static [(&'static str, &'static str)] {
        &[]
    }

    /// Returns the keys that GGUF metadata may have after the prefix of the architecture.
    fn gguf_keys(&self) -> Keys {
        Keys { read: &[], neutral: &[], only: &[] }
    }

    /// Converts GGUF metadata to a configuration.
    ///
    /// # Errors
    /// Returns [`Error::Config`] naming a key that is missing or not implemented.
    fn config_from_gguf(&self, metadata: &Value, shape: ShapeOf<'_>) -> Result<Value> {
        let _ = (metadata, shape);
        Err(Error::config("general.architecture", format!("{} models in GGUF files are not supported", self.name())))
    }

    /// Converts a configuration to GGUF metadata. `holds` returns whether the file has a tensor, by its GGUF name.
    ///
    /// # Errors
    /// Returns the errors of [`Family::check`], or an error if GGUF has no key for a value.
    fn gguf_metadata(&self, config: &Value, holds: &dyn Fn(&str) -> bool) -> Result<Value> {
        let _ = (config, holds);
        Err(Error::Input(format!("{} models cannot be written as GGUF", self.name())))
    }

    /// Returns the row order of fused matrices in a GGUF file. `version` is the version of the file format.
    fn gguf_rows(&self, metadata: &Value, version: u32) -> FusedRows {
        let _ = (metadata, version);
        FusedRows::InModelOrder
    }

    /// Returns the matrices whose rows have the order [`RowOrder::Pairs`](crate::RowOrder::Pairs) in GGUF and legacy
    /// GGML files.
    ///
    /// Each element is a part of the canonical name and the number of heads.
    ///
    /// # Errors
    /// Returns the errors of [`Family::check`].
    fn paired_rows(&self, config: &Value) -> Result<Vec<(&'static str, usize)>> {
        let _ = config;
        Ok(Vec::new())
    }

    /// Returns whether llama.cpp needs a separate head tensor even if the checkpoint ties the head to the embedding.
    fn gguf_repeats_tied_head(&self) -> bool {
        false
    }

    /// Returns the header layouts of legacy GGML files.
    fn ggml_layouts(&self) -> &'static [GgmlLayout] {
        &[]
    }

    /// Converts the header of a legacy GGML file to a configuration.
    ///
    /// # Errors
    /// Returns [`Error::Config`] naming a field that is missing.
    fn config_from_ggml(&self, header: &Value, shape: ShapeOf<'_>) -> Result<Value> {
        let _ = (header, shape);
        Err(Error::Input(format!("{} models in legacy GGML files are not supported", self.name())))
    }

    /// Returns the values assumed for a legacy GGML file because its header has no fields for them, as a list for a
    /// note to the user.
    fn ggml_assumes(&self) -> Option<&'static str> {
        None
    }

    /// Converts the tensors of a legacy GGML file to the values and shapes of checkpoints on the Hub.
    fn ggml_tensors(&self, store: Arc<dyn Store>) -> Arc<dyn Store> {
        store
    }

    /// Returns the tokenizer that legacy GGML files were made with. The words in these files have lost bytes, so the
    /// original is needed.
    fn ggml_tokenizer(&self) -> Option<KnownTokenizer> {
        None
    }
}
