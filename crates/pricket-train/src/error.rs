//! The errors of this crate.

use std::path::PathBuf;

use pricket_lm::Place;
use pricket_weights::clip;

/// An error of training or of an adapter.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An error of the model.
    #[error(transparent)]
    Model(pricket_nn::Error),
    /// A weight file cannot be read.
    #[error(transparent)]
    Weights(#[from] pricket_weights::Error),
    /// A file cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The error of the operating system.
        source: std::io::Error,
    },
    /// A key of adapter_config.json is missing, invalid or not implemented.
    #[error("adapter_config.json: {key}: {what}")]
    Config {
        /// The key.
        key: String,
        /// The value found and the value expected.
        what: String,
    },
    /// An adapter or a checkpoint is inconsistent or does not fit the model.
    #[error("{origin}: {what}")]
    Adapter {
        /// The file or directory.
        origin: String,
        /// Description of the problem, with the tensor if there is one.
        what: String,
    },
    /// A loss or a gradient is NaN or infinite.
    #[error("step {step}, micro-batch {micro_batch}: {what}; the last checkpoint is unchanged")]
    NonFinite {
        /// The training step, counted from 1.
        step: u64,
        /// The micro-batch within the step, counted from 1.
        micro_batch: usize,
        /// The first place with a value that is not finite.
        what: String,
    },
    /// A record of a data file is invalid.
    #[error("{place}: {what}")]
    Data {
        /// The file, and the line or row in it.
        place: Place,
        /// Description of the problem.
        what: String,
    },
    /// A record has no text or token id that is counted in the loss.
    #[error("the response is empty")]
    NoResponse,
    /// A recipe has an unknown key or a value out of range.
    #[error("recipe: {0}")]
    Recipe(String),
    /// The tokenizer or the prompt format rejects a text.
    #[error(transparent)]
    Text(#[from] pricket_lm::Error),
    /// An argument does not fit the model or the other arguments.
    #[error("{0}")]
    Input(String),
}

impl Error {
    pub(crate) fn config(key: impl Into<String>, what: impl Into<String>) -> Self {
        Error::Config { key: clip(&key.into()), what: clip(&what.into()) }
    }

    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Error::Io { path, source }
    }
}

impl From<pricket_nn::Error> for Error {
    fn from(e: pricket_nn::Error) -> Self {
        match e {
            pricket_nn::Error::Weights(e) => Error::Weights(e),
            pricket_nn::Error::Input(what) => Error::Input(what),
            e => Error::Model(e),
        }
    }
}

impl From<candle_core::Error> for Error {
    fn from(e: candle_core::Error) -> Self {
        Error::Model(e.into())
    }
}

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
