//! The error type of this crate.

use pricket_weights::clip;

/// Error of loading or running a model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Reading the weights failed.
    #[error(transparent)]
    Weights(#[from] pricket_weights::Error),
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(candle_core::Error),
    /// A key of the configuration is missing, invalid or not implemented.
    #[error("config.json: {key}: {what}")]
    Config {
        /// The key, as config.json spells it.
        key: String,
        /// Description of the problem: the value found and the value expected.
        what: String,
    },
    /// The text is longer than the model was trained for.
    #[error("{asked} positions asked for, the model was trained for {limit}; allow it explicitly to go beyond")]
    ContextExceeded {
        /// Number of positions that the call needs.
        asked: usize,
        /// Number of positions that the model was trained for, such as `max_position_embeddings`.
        limit: usize,
    },
    /// An argument does not match the model or the other arguments.
    #[error("{0}")]
    Input(String),
    /// A [`crate::Progress`] canceled the operation.
    #[error("cancelled")]
    Cancelled,
}

impl Error {
    /// Returns an [`Error::Config`]. Long texts are cut, because they may come from a file.
    pub fn config(key: impl Into<String>, what: impl Into<String>) -> Self {
        Error::Config { key: clip(&key.into()), what: clip(&what.into()) }
    }
}

impl From<candle_core::Error> for Error {
    /// Drops candle's backtrace, which would make the message a page long if RUST_BACKTRACE is set.
    fn from(mut e: candle_core::Error) -> Self {
        while let candle_core::Error::WithBacktrace { inner, .. } = e {
            e = *inner;
        }
        Error::Candle(e)
    }
}

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
