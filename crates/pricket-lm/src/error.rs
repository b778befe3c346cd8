//! The error type of this crate.

/// Errors of tokenizing, generating and scoring.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An error of the model.
    #[error(transparent)]
    Nn(#[from] pricket_nn::Error),
    /// The tokenizer file is invalid, or a text cannot be tokenized.
    #[error("{origin}: {what}")]
    Tokenizer {
        /// Tokenizer file, or another name for the tokenizer's source.
        origin: String,
        /// Description of the problem.
        what: String,
    },
    /// The model computed NaN or infinity, usually because a value overflowed.
    #[error("{what} are not finite (NaN or infinity), weights {dtype}, activations {activations}; {advice}")]
    NonFinite {
        /// First values that were not finite: the output of a layer, or the logits.
        what: String,
        /// Index of the layer, if the values are the output of one.
        layer: Option<usize>,
        /// Data type of the weights.
        dtype: &'static str,
        /// Data type of the activations.
        activations: &'static str,
        /// Suggested remedy.
        advice: &'static str,
    },
    /// An argument is invalid.
    #[error("{0}")]
    Input(String),
}

impl From<candle_core::Error> for Error {
    fn from(e: candle_core::Error) -> Self {
        Error::Nn(e.into())
    }
}

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
