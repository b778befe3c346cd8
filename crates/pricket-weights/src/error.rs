//! The error type of this crate and helpers for messages.

use std::path::PathBuf;

/// An error in reading weights. Every variant names the file, and the tensor if one is concerned.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file could not be opened or read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Error of the operating system.
        source: std::io::Error,
    },
    /// The path does not exist, or a directory has no weights.
    #[error("{}: {what}", path.display())]
    NotFound {
        /// The path.
        path: PathBuf,
        /// Description of the missing file.
        what: String,
    },
    /// A directory has the weights of several models.
    #[error("{}: {what}", path.display())]
    Ambiguous {
        /// The directory.
        path: PathBuf,
        /// Description of the files found.
        what: String,
    },
    /// The contents of the file are invalid.
    #[error("{}: {what}", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// Description of the problem, with the name of the tensor if one is concerned.
        what: String,
    },
    /// The file requires something unsafe: running code, or opening a file outside its directory.
    #[error("{}: refused: {what}", path.display())]
    Refused {
        /// The file.
        path: PathBuf,
        /// Description of the refused operation.
        what: String,
    },
    /// A format or element type that is not supported.
    #[error("{}: {what}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// Description of the format or type.
        what: String,
    },
    /// The store has no tensor of this name.
    #[error("{origin}: tensor {name} is missing{}", nearest.as_ref().map_or(String::new(), |other| format!("; the most similar name is {other}")))]
    Missing {
        /// The file or store.
        origin: String,
        /// The tensor.
        name: String,
        /// The most similar name in the store.
        nearest: Option<String>,
    },
    /// The shape of a tensor differs from the shape that the model needs.
    #[error("{origin}: tensor {name} has shape {found:?}, expected {expected:?}")]
    Shape {
        /// The file.
        origin: String,
        /// The tensor.
        name: String,
        /// The shape that the configuration implies.
        expected: Vec<usize>,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// The element type of a tensor is not floating-point.
    #[error("{origin}: tensor {name} is stored as {found}, expected a floating-point type")]
    NotFloat {
        /// The file.
        origin: String,
        /// The tensor.
        name: String,
        /// The type in the file.
        found: crate::Dtype,
    },
    /// Candle failed to create the tensor, usually because the device has too little memory.
    #[error("{origin}: tensor {name}: {source}")]
    Candle {
        /// The file.
        origin: String,
        /// The tensor.
        name: String,
        /// Error of candle.
        source: candle_core::Error,
    },
}

/// Formats a count with its noun for a message: `1 tensor`, `2 tensors`.
///
/// ```
/// assert_eq!(pricket_weights::counted(1, "tensor"), "1 tensor");
/// assert_eq!(pricket_weights::counted(0, "tensor"), "0 tensors");
/// ```
pub fn counted(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

/// Prepares text from a file for a message: escapes control characters and cuts the text after 160 characters.
pub fn clip(text: &str) -> String {
    const LENGTH: usize = 160;
    let mut out: String = text
        .chars()
        .take(LENGTH)
        .flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] })
        .collect();
    if text.chars().nth(LENGTH).is_some() {
        out.push_str("...");
    }
    out
}

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
