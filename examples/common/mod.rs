//! What the examples share: flags, a progress bar, and how they end.

mod bar;
mod compute;
mod finish;
mod random;

use std::path::PathBuf;
use std::sync::Arc;

use pricket::{Loader, Pricket};

#[allow(unused_imports, reason = "not every example works long")]
pub(crate) use bar::{Bar, Hidden, interruptible};
pub(crate) use compute::ComputeArgs;
#[allow(unused_imports, reason = "not every example writes a file")]
pub(crate) use finish::{check_output, finish, is_closed, tell, write_whole};
#[allow(unused_imports, reason = "not every example makes weights up")]
pub(crate) use random::random;

/// Which model to load, and how.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct ModelArgs {
    /// A repository of the Hub (EleutherAI/pythia-410m, or pythia-410m), a directory in its layout, or a weight file: GGUF,
    /// legacy GGML, or another with its config.json beside it [default: the embedded model]
    #[arg(long, short)]
    pub(crate) model: Option<PathBuf>,
    /// A branch, tag or commit, such as step3000; of a directory, a training step kept beside it
    #[arg(long)]
    pub(crate) revision: Option<String>,
    /// The weight file to load of a repository or directory that has several, such as one of its GGUF files
    #[arg(long, value_name = "NAME")]
    pub(crate) file: Option<String>,
    /// A tokenizer.json or tokenizer.model to use instead of the model's
    #[arg(long, value_name = "FILE")]
    pub(crate) tokenizer: Option<PathBuf>,
    /// Computes another GELU than the configuration says: gelu, or gelu_tanh as llama.cpp does for every model
    #[arg(long, value_name = "NAME")]
    pub(crate) activation_function: Option<String>,
    /// Order of the QKV rows in a GGUF file that does not say it: split, interleaved, or auto to find out by the loss of a text
    #[arg(long, alias = "neox-qkv", value_name = "ORDER", default_value = "auto")]
    pub(crate) qkv_order: pricket::loading::QkvOrder,
    /// Changes a key of the configuration, as use_parallel_residual=false or attn_config.clip_qkv=6; can be given several times
    #[arg(long, value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
    /// Loads a checkpoint although its configuration has no use for some of its weights
    #[arg(long)]
    pub(crate) allow_unused: bool,
    #[command(flatten)]
    pub(crate) compute: ComputeArgs,
}

impl ModelArgs {
    /// The model, or an embedded one where none is named.
    pub(crate) fn source(&self, embedded: &str) -> pricket::Result<Loader> {
        Ok(match &self.model {
            Some(model) => Loader::new(model),
            None => Loader::embedded(embedded)?,
        })
    }

    /// The same without adapters: they are in the weights already.
    #[allow(dead_code, reason = "only conversion merges adapters")]
    pub(crate) fn without_adapters(&self) -> Self {
        #[allow(unused_mut, reason = "there are none without the feature `train`")]
        let mut args = self.clone();
        #[cfg(feature = "train")]
        args.compute.adapter.clear();
        args
    }

    /// Loads it, or an embedded model where none is named, with a progress bar on a terminal; warnings go to stderr.
    pub(crate) fn load(&self, embedded: &str) -> pricket::Result<Pricket> {
        self.load_from(self.source(embedded)?)
    }

    /// Loads what `loader` has, likewise.
    pub(crate) fn load_from(&self, loader: Loader) -> pricket::Result<Pricket> {
        let loaded = self.configure(loader)?.precision(self.compute.dtype).load()?;
        for warning in loaded.warnings() {
            tell(format_args!("warning: {warning}"));
        }
        for note in loaded.notes() {
            tell(format_args!("note: {note}"));
        }
        Ok(loaded)
    }

    /// Everything that these flags say but the model and its type.
    pub(crate) fn configure(&self, loader: Loader) -> pricket::Result<Loader> {
        pricket::nn::ops::keep_freed_memory();
        let mut loader = self.compute.configure(loader)?.progress(Arc::new(Bar::default()));
        if let Some(tokenizer) = &self.tokenizer {
            loader = loader.tokenizer(tokenizer);
        }
        if let Some(revision) = &self.revision {
            loader = loader.revision(revision);
        }
        if let Some(name) = &self.file {
            loader = loader.file(name);
        }
        if let Some(name) = &self.activation_function {
            loader = loader.activation_function(name);
        }
        for change in &self.set {
            let (key, value) = change.split_once('=').unwrap_or((change, ""));
            let value = serde_json::from_str::<serde_json::Value>(value).unwrap_or_else(|_| value.into());
            loader = loader.set(key, value);
        }
        if self.allow_unused {
            loader = loader.allow_unused();
        }
        Ok(loader.qkv_order(self.qkv_order))
    }
}
