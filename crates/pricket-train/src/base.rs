//! The model that an adapter is for.

use std::collections::BTreeMap;
use std::sync::Arc;

use pricket_nn::{CausalLm, Layer, Names};

use crate::Result;

/// A model to be adapted, and what the Hub calls its modules.
#[derive(Clone)]
pub struct Base {
    /// The model.
    pub model: Arc<dyn CausalLm>,
    names: Names,
    /// Canonical names of modules, and names on the Hub where those are others.
    on_hub: BTreeMap<String, String>,
}

impl std::fmt::Debug for Base {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Base({})", self.model.info().family)
    }
}

impl Base {
    /// A model whose modules have their family's canonical names on the Hub.
    pub fn new(model: Arc<dyn CausalLm>, names: Names) -> Self {
        Self { model, names, on_hub: BTreeMap::new() }
    }

    /// The same for a checkpoint that spells tensors otherwise: pairs of the canonical name of a tensor and its name on file, as
    /// [`Weights::asked`](pricket_nn::Weights::asked) gives them.
    #[must_use]
    pub fn with_names_on_file(mut self, tensors: &[(String, String)]) -> Self {
        let pairs = tensors.iter().filter_map(|(canonical, file)| Some((module_of(canonical)?, module_of(file)?)));
        self.on_hub = pairs.map(|(canonical, file)| (canonical.to_owned(), file.to_owned())).collect();
        self
    }

    /// The names that a module may have on the Hub, that of this checkpoint first: transformers has renamed heads.
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

    /// The names of its family.
    pub fn names(&self) -> &Names {
        &self.names
    }

    /// The canonical name of a module that an adapter calls `name`.
    pub(crate) fn canonical(&self, name: &str) -> String {
        let known = self.on_hub.iter().find(|(_, on_hub)| *on_hub == name);
        let by_family = || {
            let tensor = self.names.canonical(&format!("{name}.weight"));
            module_of(&tensor).unwrap_or(name).to_owned()
        };
        known.map_or_else(by_family, |(canonical, _)| canonical.clone())
    }

    /// The canonical name of a tensor that an adapter calls `name`.
    pub(crate) fn canonical_tensor(&self, name: &str) -> String {
        let module = module_of(name).unwrap_or(name);
        format!("{}{}", self.canonical(module), &name[module.len()..])
    }

    /// Visits every layer of a copy of the model that is thrown away.
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

/// The name of the module that a tensor belongs to.
pub(crate) fn module_of(tensor: &str) -> Option<&str> {
    tensor.strip_suffix(".weight").or_else(|| tensor.strip_suffix(".bias"))
}
