use std::path::PathBuf;

use pricket_weights::clip;

/// What can go wrong in training.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The model.
    #[error(transparent)]
    Model(pricket_nn::Error),
    /// An adapter file that cannot be read.
    #[error(transparent)]
    Weights(#[from] pricket_weights::Error),
    /// A file that cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A key of adapter_config.json that is missing, impossible or not implemented.
    #[error("adapter_config.json: {key}: {what}")]
    Config {
        /// The key.
        key: String,
        /// What was found and what was expected.
        what: String,
    },
    /// An adapter or a checkpoint that contradicts itself or the model.
    #[error("{origin}: {what}")]
    Adapter {
        /// The file or directory.
        origin: String,
        /// What is wrong, naming the tensor where there is one.
        what: String,
    },
    /// A loss or a gradient that is NaN or infinite.
    #[error("step {step}, micro-batch {micro_batch}: {what}; the last checkpoint is as it was")]
    NonFinite {
        /// The step, from 1.
        step: u64,
        /// The micro-batch of the step, from 1.
        micro_batch: usize,
        /// Where it is first.
        what: String,
    },
    /// A line of a data file.
    #[error("{}, line {line}: {what}", path.display())]
    Data {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        what: String,
    },
    /// A text that the tokenizer or the prompt format cannot take.
    #[error(transparent)]
    Text(#[from] pricket_lm::Error),
    /// An argument that does not fit the model or the other arguments.
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
