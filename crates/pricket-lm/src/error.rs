/// What can go wrong between a text and its continuation.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The model.
    #[error(transparent)]
    Nn(#[from] pricket_nn::Error),
    /// The tokenizer file, or a text that it cannot take.
    #[error("{origin}: {what}")]
    Tokenizer {
        /// The file.
        origin: String,
        /// What is wrong.
        what: String,
    },
    /// The model's numbers overflowed.
    #[error("{what} are not finite (NaN or infinity), weights {dtype}, activations {activations}; {advice}")]
    NonFinite {
        /// Where it was first seen: a layer's output, or the logits.
        what: String,
        /// The layer, if it was one.
        layer: Option<usize>,
        /// Type of the weights.
        dtype: &'static str,
        /// Type of the activations.
        activations: &'static str,
        /// What may help.
        advice: &'static str,
    },
    /// An argument out of range.
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
