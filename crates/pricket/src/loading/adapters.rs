//! Adapters: finding them on disk or on the Hub, applying them to a model, merging them into tensors.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Tensor};
use pricket_hub::Hub;
use pricket_nn::{CausalLm, Names, Parameter, Progress, RowOrder};
use pricket_train::{Base, DatasetOptions, Lora};

use crate::loading::family::checked_family;
use crate::loading::provenance::Provenance;
use crate::loading::repository::fetch_adapter;
use crate::loading::source::{Place, Source};
use crate::text::handle::Parts;
use crate::text::handle::Pricket;
use crate::{Error, Result};

impl From<pricket_train::Error> for Error {
    fn from(e: pricket_train::Error) -> Self {
        match e {
            pricket_train::Error::Model(e) => e.into(),
            pricket_train::Error::Weights(e) => e.into(),
            pricket_train::Error::Io { path, source } => Error::Io { path, error: source },
            pricket_train::Error::Config { key, what } => {
                Error::Refused { path: PathBuf::from("adapter_config.json"), key, what }
            }
            e => Error::Training(e),
        }
    }
}

/// Reads the adapter at a path or in a repository of the Hub.
pub(crate) fn find(adapter: &Path, hub: Option<&Hub>, progress: &dyn Progress) -> Result<Lora> {
    let directory = match Source::new(adapter).locate()? {
        Place::Local(path) if path.is_dir() => path,
        // The path names a file of the adapter.
        Place::Local(path) => path.parent().map(Path::to_owned).unwrap_or_default(),
        Place::Hub(id, _) => {
            let hub = hub.cloned().map_or_else(Hub::from_env, Ok)?;
            fetch_adapter(&id, &hub, progress)?
        }
    };
    Lora::read(&directory).map_err(|e| match Error::from(e) {
        Error::Refused { path, key, what } if path.is_relative() => {
            Error::Refused { path: directory.join(path), key, what }
        }
        e => e,
    })
}

/// Keeps the pairs of canonical name and name on file that belong to the Hub's layout.
fn spelled(names: &Names, asked: Vec<(String, String)>) -> Vec<(String, String)> {
    let root = format!("{}.", names.root);
    asked.into_iter().filter(|(_, file)| file.starts_with(&root) && names.unwrapped(file) == *file).collect()
}

/// Wraps a model as the base of adapters.
pub(crate) fn base(model: Arc<dyn CausalLm>, names: Names, asked: Vec<(String, String)>) -> Base {
    Base::new(model, names).with_names_on_file(&spelled(&names, asked))
}

/// Returns notes about an adapter: its rank, its modules, and whether it was made for another model.
pub(crate) fn notes(adapter: &Lora, provenance: &Provenance) -> Vec<String> {
    let modules = pricket_weights::counted(adapter.modules().count(), "module");
    let mut notes = vec![format!("adapter of rank {} on {modules}", adapter.config().rank)];
    if let (Some(made_for), Some(repo)) = (&adapter.config().base, &provenance.repo)
        && made_for.contains('/')
        && !Path::new(made_for).exists()
        && made_for.split('@').next() != Some(repo)
    {
        notes.push(format!("the adapter was made for {}, but the model is {repo}", pricket_weights::clip(made_for)));
    }
    notes
}

impl Pricket {
    /// Returns the settings with which [`Dataset::new`](pricket_train::Dataset::new) makes samples for this model: its
    /// prompt format, its end token, and its context of at most 2048 token ids.
    pub fn dataset_options(&self) -> DatasetOptions {
        DatasetOptions {
            format: self.prompt_format().clone(),
            end: self.eos_ids().first().copied().into_iter().collect(),
            max_length: self.info().context.unwrap_or(usize::MAX).min(2048),
            drop_duplicates: false,
        }
    }

    /// Returns the model as the base of an adapter, for [`crate::train`].
    ///
    /// # Errors
    /// Returns [`Error::Refused`] if no family supports the configuration. This cannot happen for a loaded model.
    pub fn base(&self) -> Result<Base> {
        let family = checked_family(self.config())?;
        Ok(base(self.model(), family.names(), self.names_on_file().to_vec()))
    }

    /// Returns pairs of the canonical name and the name on file of each tensor. Empty for files that do not have the
    /// Hub's layout, such as GGUF.
    pub fn names_on_file(&self) -> &[(String, String)] {
        &self.parts().names_on_file
    }

    /// Returns a copy of this model with an additional adapter. Both share the weights, so two adapters over one base
    /// need little more memory than one.
    ///
    /// ```no_run
    /// use pricket::train::Lora;
    /// let base = pricket::load("EleutherAI/pythia-410m")?;
    /// let [a, b] = ["runs/a", "runs/b"].map(|run| base.with_adapter(&Lora::read(run)?));
    /// # Ok::<(), pricket::Error>(())
    /// ```
    ///
    /// # Errors
    /// Returns [`Error::Training`] if the adapter has a module that the model lacks, or whose shape differs.
    pub fn with_adapter(&self, adapter: &Lora) -> Result<Self> {
        let model = adapter.apply(&self.base()?)?;
        Ok(self.with_model(model, self.parameters().to_vec()))
    }

    /// Returns a copy of this handle that computes with `model`, for example a model whose adapter is being trained.
    /// `parameters` are its trainable variables.
    #[must_use]
    pub fn with_model(&self, model: Arc<dyn CausalLm>, parameters: Vec<Parameter>) -> Self {
        Self::new(Parts { model, parameters, ..self.parts().clone() })
    }
}

/// Checks that adapters fit a model and can be merged into the tensors of a file. `base` is loaded from headers only.
pub(crate) fn check_mergeable(adapters: &[Lora], base: &Base, names: &Names) -> Result<()> {
    for adapter in adapters {
        adapter.check(base)?;
        let Some(plan) = base.model.plan().filter(|plan| plan.is_tied) else { continue };
        for name in [plan.embed.name(), plan.head.name()] {
            if adapter.changes(names, &format!("{name}.weight")) {
                let what = "the adapter changes it and cannot be merged, because this model ties embedding and head";
                return Err(Error::Adapter { name: name.into(), what });
            }
        }
    }
    Ok(())
}

/// Returns a tensor on file with adapters merged into it, in f32. `rows` is its row order relative to the Hub's.
pub(crate) fn merged(adapters: &[Lora], names: &Names, name: &str, tensor: &Tensor, rows: RowOrder) -> Result<Tensor> {
    adapters.iter().try_fold(tensor.to_dtype(DType::F32)?, |tensor, adapter| {
        Ok(adapter.merged_weight(names, name, &tensor, rows)?.unwrap_or(tensor))
    })
}
