use pricket_weights::clip;

/// What can go wrong between a configuration and its logits.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The weights on disk.
    #[error(transparent)]
    Weights(#[from] pricket_weights::Error),
    /// An operation on tensors.
    #[error(transparent)]
    Candle(candle_core::Error),
    /// A key of the configuration that is missing, impossible, or not implemented.
    #[error("config.json: {key}: {what}")]
    Config {
        /// The key, as config.json spells it.
        key: String,
        /// What was found and what was expected.
        what: String,
    },
    /// More positions than the model was trained for.
    #[error("{asked} positions asked for, the model was trained for {limit}; allow it explicitly to go beyond")]
    ContextExceeded {
        /// Positions that the call would reach.
        asked: usize,
        /// `max_position_embeddings`.
        limit: usize,
    },
    /// An argument that does not fit the model or the other arguments.
    #[error("{0}")]
    Input(String),
    /// A [`crate::Progress`] asked to stop.
    #[error("cancelled")]
    Cancelled,
}

impl Error {
    /// A [`Error::Config`] from anything printable. What a file says may be of any length and is cut.
    pub fn config(key: impl Into<String>, what: impl Into<String>) -> Self {
        Error::Config { key: clip(&key.into()), what: clip(&what.into()) }
    }
}

impl From<candle_core::Error> for Error {
    /// Without candle's backtrace, which would make its message a page long where RUST_BACKTRACE is set.
    fn from(mut e: candle_core::Error) -> Self {
        while let candle_core::Error::WithBacktrace { inner, .. } = e {
            e = *inner;
        }
        Error::Candle(e)
    }
}

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
