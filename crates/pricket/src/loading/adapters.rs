//! Adapters: found on disk or on the Hub, put on a model, merged into a file.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Tensor};
use pricket_hub::Hub;
use pricket_nn::{CausalLm, Names, Parameter, Progress, RowOrder};
use pricket_train::{Base, Lora};

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

/// The adapter at a path, or of a repository of the Hub.
pub(crate) fn find(adapter: &Path, hub: Option<&Hub>, progress: &dyn Progress) -> Result<Lora> {
    let directory = match Source::new(adapter).locate()? {
        Place::Local(path) if path.is_dir() => path,
        // One of its files was named.
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

/// What the Hub calls the modules of a model: pairs of canonical names and names on file, where the file is in the Hub's layout and
/// spells modules otherwise.
fn spelled(names: &Names, asked: Vec<(String, String)>) -> Vec<(String, String)> {
    let root = format!("{}.", names.root);
    asked.into_iter().filter(|(_, file)| file.starts_with(&root) && names.unwrapped(file) == *file).collect()
}

/// A model as the base of adapters.
pub(crate) fn base(model: Arc<dyn CausalLm>, names: Names, asked: Vec<(String, String)>) -> Base {
    Base::new(model, names).with_names_on_file(&spelled(&names, asked))
}

/// What a user should know of an adapter on this model.
pub(crate) fn notes(adapter: &Lora, provenance: &Provenance) -> Vec<String> {
    let modules = pricket_weights::counted(adapter.modules().count(), "module");
    let mut notes = vec![format!("an adapter of rank {} on {modules}", adapter.config().rank)];
    if let (Some(made_for), Some(repo)) = (&adapter.config().base, &provenance.repo)
        && made_for.contains('/')
        && !Path::new(made_for).exists()
        && made_for.split('@').next() != Some(repo)
    {
        notes.push(format!("the adapter was made for {}, and this is {repo}", pricket_weights::clip(made_for)));
    }
    notes
}

impl Pricket {
    /// The model as the base of an adapter, for [`crate::train`].
    ///
    /// # Errors
    /// [`Error::Refused`] for a configuration of no known family, which a loaded model does not have.
    pub fn base(&self) -> Result<Base> {
        let family = checked_family(self.config())?;
        Ok(base(self.model(), family.names(), self.names_on_file().to_vec()))
    }

    /// Canonical names of its tensors, and their names on file; none for a file in another layout than the Hub's, such as GGUF.
    pub fn names_on_file(&self) -> &[(String, String)] {
        &self.parts().names_on_file
    }

    /// This model with an adapter added to those that it has. Weights are shared: two adapters over one base take hardly more memory
    /// than one.
    ///
    /// ```no_run
    /// use pricket::train::Lora;
    /// let base = pricket::load("EleutherAI/pythia-410m")?;
    /// let [a, b] = ["runs/a", "runs/b"].map(|run| base.with_adapter(&Lora::read(run)?));
    /// # Ok::<(), pricket::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Training`] naming a module that the model does not have, or that has other sizes.
    pub fn with_adapter(&self, adapter: &Lora) -> Result<Self> {
        let model = adapter.apply(&self.base()?)?;
        Ok(self.with_model(model, self.parameters().to_vec()))
    }

    /// This model computing with `model` instead: one that an adapter is trained on.
    #[must_use]
    pub fn with_model(&self, model: Arc<dyn CausalLm>, parameters: Vec<Parameter>) -> Self {
        Self::new(Parts { model, parameters, ..self.parts().clone() })
    }
}

/// Checks, over a model that is loaded from headers, that adapters fit it and can be merged into the tensors of a file.
pub(crate) fn check_mergeable(adapters: &[Lora], base: &Base, names: &Names) -> Result<()> {
    for adapter in adapters {
        adapter.check(base)?;
        let Some(plan) = base.model.plan().filter(|plan| plan.is_tied) else { continue };
        for name in [plan.embed.name(), plan.head.name()] {
            if adapter.changes(names, &format!("{name}.weight")) {
                let what = "the adapter changes it, and this model ties embedding and head: it cannot be merged";
                return Err(Error::Adapter { name: name.into(), what });
            }
        }
    }
    Ok(())
}

/// A tensor on file with adapters merged into it, in f32. `rows` is the order of its rows relative to the Hub's.
pub(crate) fn merged(adapters: &[Lora], names: &Names, name: &str, tensor: &Tensor, rows: RowOrder) -> Result<Tensor> {
    adapters.iter().try_fold(tensor.to_dtype(DType::F32)?, |tensor, adapter| {
        Ok(adapter.merged_weight(names, name, &tensor, rows)?.unwrap_or(tensor))
    })
}
