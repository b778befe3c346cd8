//! Code that the examples share: flags for loading a model, progress bars, exit codes.

mod bar;
mod compute;
mod finish;
mod random;

use std::path::PathBuf;
use std::sync::Arc;

use pricket::{Loader, Pricket};

#[allow(unused_imports, reason = "not every example runs for long")]
pub(crate) use bar::{Bar, Hidden, interruptible};
pub(crate) use compute::ComputeArgs;
#[allow(unused_imports, reason = "not every example writes a file")]
pub(crate) use finish::{check_output, finish, is_closed, tell, write_whole};
#[allow(unused_imports, reason = "not every example uses random weights")]
pub(crate) use random::random;

/// The model to load and how to load it.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct ModelArgs {
    /// Model to load: a repository of the Hub (EleutherAI/pythia-410m, pythia-410m or pythia-410m@step3000), a
    /// directory in Hub layout, a weight file (GGUF, legacy GGML, or another format with a config.json next to it), or
    /// an embedded model (tiny, tiny-chat, tiny-mpt, tiny-llama or tiny-rwkv) [default: tiny]
    #[arg(long, short)]
    pub(crate) model: Option<PathBuf>,
    /// Revision to load, such as step3000: a branch, tag or commit of a repository, or a subdirectory of revisions/ in
    /// a directory
    #[arg(long)]
    pub(crate) revision: Option<String>,
    /// Name of the weight file to load, if the repository or directory has several, such as
    /// GGUF files of different types
    #[arg(long, value_name = "NAME")]
    pub(crate) file: Option<String>,
    /// Tokenizer file, instead of the model's own: a tokenizer.json or tokenizer.model
    #[arg(long, value_name = "FILE")]
    pub(crate) tokenizer: Option<PathBuf>,
    /// Override the activation function of config.json: gelu or gelu_tanh (llama.cpp uses gelu_tanh for every model)
    #[arg(long, alias = "activation", value_name = "NAME")]
    pub(crate) activation_function: Option<String>,
    /// Row order of the fused QKV matrices in a GGUF file that does not state it: split (all of Q, then K, then V),
    /// interleaved (Q, K and V of each head), or auto (the order with the lower loss on a built-in English text; if
    /// that does not decide, by row norms)
    #[arg(long, alias = "neox-qkv", value_name = "ORDER", default_value = "auto")]
    pub(crate) qkv_order: pricket::loading::QkvOrder,
    /// Override a key of the configuration, such as use_parallel_residual=false or attn_config.clip_qkv=6. Can be given
    /// several times
    #[arg(long, alias = "set", value_name = "KEY=VALUE")]
    pub(crate) set_config: Vec<String>,
    /// Load a checkpoint even if it has weights that its configuration does not use, and ignore them
    #[arg(long, alias = "allow-unused")]
    pub(crate) allow_unused_weights: bool,
    #[command(flatten)]
    pub(crate) compute: ComputeArgs,
}

impl ModelArgs {
    /// Returns a loader of the model, or of the embedded model `embedded` without `--model`.
    pub(crate) fn source(&self, embedded: &str) -> pricket::Result<Loader> {
        Ok(match &self.model {
            Some(model) => Loader::new(model),
            None => Loader::embedded(embedded)?,
        })
    }

    /// Returns these flags without adapters, for a model into which they are merged.
    #[allow(dead_code, reason = "only conversion merges adapters")]
    pub(crate) fn without_adapters(&self) -> Self {
        #[allow(unused_mut, reason = "there are no adapters without the feature `train`")]
        let mut args = self.clone();
        #[cfg(feature = "train")]
        args.compute.adapter.clear();
        args
    }

    /// Loads the model, or the embedded model `embedded` without `--model`. Progress and warnings go to stderr.
    pub(crate) fn load(&self, embedded: &str) -> pricket::Result<Pricket> {
        self.load_from(self.source(embedded)?)
    }

    /// Loads the model of `loader` with these flags. Progress and warnings go to stderr.
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

    /// Applies these flags to a loader, except `--model` and `--dtype`.
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
        for change in &self.set_config {
            let (key, value) = change.split_once('=').unwrap_or((change, ""));
            let value = serde_json::from_str::<serde_json::Value>(value).unwrap_or_else(|_| value.into());
            loader = loader.set(key, value);
        }
        if self.allow_unused_weights {
            loader = loader.allow_unused();
        }
        Ok(loader.qkv_order(self.qkv_order))
    }
}
