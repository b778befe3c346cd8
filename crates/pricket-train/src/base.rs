//! The base model of an adapter, and the names of its modules on the Hub.

use std::collections::BTreeMap;
use std::sync::Arc;

use pricket_nn::{CausalLm, Layer, Names};

use crate::Result;

/// A base model and the names of its modules on the Hub.
///
/// Adapters name modules as the Hub does. A [`Base`] maps these names to the canonical names of the model's family.
#[derive(Clone)]
pub struct Base {
    /// The model.
    pub model: Arc<dyn CausalLm>,
    names: Names,
    /// Names on the Hub by canonical module name, for modules whose names differ.
    on_hub: BTreeMap<String, String>,
}

impl std::fmt::Debug for Base {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Base({})", self.model.info().family)
    }
}

impl Base {
    /// Creates a base whose modules have their family's canonical names on the Hub.
    pub fn new(model: Arc<dyn CausalLm>, names: Names) -> Self {
        Self { model, names, on_hub: BTreeMap::new() }
    }

    /// Sets the tensor names of a checkpoint whose names differ from the canonical ones.
    ///
    /// `tensors` holds pairs of a tensor's canonical name and its name on file, as returned by
    /// [`Weights::loaded_names`](pricket_nn::Weights::loaded_names).
    #[must_use]
    pub fn with_names_on_file(mut self, tensors: &[(String, String)]) -> Self {
        let pairs = tensors.iter().filter_map(|(canonical, file)| Some((module_of(canonical)?, module_of(file)?)));
        self.on_hub = pairs.map(|(canonical, file)| (canonical.to_owned(), file.to_owned())).collect();
        self
    }

    /// Returns the names that a module may have on the Hub, this checkpoint's name first.
    ///
    /// There can be several because transformers has renamed heads.
    pub(crate) fn spellings(&self, canonical: &str) -> Vec<String> {
        let mut names = vec![self.on_hub(canonical)];
        let others =
            self.names.aliases.iter().filter_map(|(known, other)| Some((module_of(known)?, module_of(other)?)));
        names.extend(others.filter(|(known, _)| *known == canonical).map(|(_, other)| other.to_owned()));
        names
    }

    fn on_hub(&self, canonical: &str) -> String {
        self.on_hub.get(canonical).cloned().unwrap_or_else(|| canonical.to_owned())
    }

    /// Returns the tensor names of the model's family.
    pub fn names(&self) -> &Names {
        &self.names
    }

    /// Returns the canonical name of the module that an adapter calls `name`.
    pub(crate) fn canonical(&self, name: &str) -> String {
        let known = self.on_hub.iter().find(|(_, on_hub)| *on_hub == name);
        let by_family = || {
            let tensor = self.names.canonical(&format!("{name}.weight"));
            module_of(&tensor).unwrap_or(name).to_owned()
        };
        known.map_or_else(by_family, |(canonical, _)| canonical.clone())
    }

    /// Returns the canonical name of the tensor that an adapter calls `name`.
    pub(crate) fn canonical_tensor(&self, name: &str) -> String {
        let module = module_of(name).unwrap_or(name);
        format!("{}{}", self.canonical(module), &name[module.len()..])
    }

    /// Calls `f` on every layer of a temporary copy of the model.
    pub(crate) fn visit(&self, f: &mut dyn FnMut(&Layer<'_>) -> Result<()>) -> Result<()> {
        let mut failed = None;
        self.model.map_layers(&mut |layer| {
            if failed.is_none() {
                failed = f(&layer).err();
            }
            Ok(())
        })?;
        failed.map_or(Ok(()), Err)
    }
}

/// Returns the name of the module that a tensor belongs to.
pub(crate) fn module_of(tensor: &str) -> Option<&str> {
    tensor.strip_suffix(".weight").or_else(|| tensor.strip_suffix(".bias"))
}
