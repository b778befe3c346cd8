use std::path::PathBuf;

/// What can be wrong with weights on disk. Every variant names the file, and the tensor where there is one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file could not be opened or read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The path does not exist, or a directory holds no weights.
    #[error("{}: {what}", path.display())]
    NotFound {
        /// The path.
        path: PathBuf,
        /// What was looked for.
        what: String,
    },
    /// A directory holds several models.
    #[error("{}: {what}", path.display())]
    Ambiguous {
        /// The directory.
        path: PathBuf,
        /// What is in it.
        what: String,
    },
    /// The bytes contradict themselves or their format.
    #[error("{}: {what}", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong, naming the tensor where there is one.
        what: String,
    },
    /// The file asks for something that is never done: running code, leaving its directory.
    #[error("{}: refused: {what}", path.display())]
    Refused {
        /// The file.
        path: PathBuf,
        /// What it asked for.
        what: String,
    },
    /// A format or element type that is known but not read.
    #[error("{}: {what}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The format or type.
        what: String,
    },
    /// No tensor of this name.
    #[error("{origin}: tensor {name} is missing{}", nearest.as_ref().map_or(String::new(), |other| format!("; it holds {other}, among others")))]
    Missing {
        /// The store that was asked.
        origin: String,
        /// The tensor.
        name: String,
        /// The tensor of the store whose name is most like it.
        nearest: Option<String>,
    },
    /// A tensor of another shape than the model needs.
    #[error("{origin}: tensor {name} has shape {found:?}, expected {expected:?}")]
    Shape {
        /// The file.
        origin: String,
        /// The tensor.
        name: String,
        /// The shape that the configuration implies.
        expected: Vec<usize>,
        /// The shape on file.
        found: Vec<usize>,
    },
    /// A tensor of a type that cannot be a weight.
    #[error("{origin}: tensor {name} is stored as {found}, expected a floating-point type")]
    NotFloat {
        /// The file.
        origin: String,
        /// The tensor.
        name: String,
        /// The type on file.
        found: crate::Dtype,
    },
    /// Candle could not make the tensor (no memory on the device, mostly).
    #[error("{origin}: tensor {name}: {source}")]
    Candle {
        /// The file.
        origin: String,
        /// The tensor.
        name: String,
        /// What candle said.
        source: candle_core::Error,
    },
}

/// A count with its noun, for a message: `1 tensor`, `2 tensors`.
///
/// ```
/// assert_eq!(pricket_weights::counted(1, "tensor"), "1 tensor");
/// assert_eq!(pricket_weights::counted(0, "tensor"), "0 tensors");
/// ```
pub fn counted(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

/// Text out of a file for a message: one line of a length that can be read, whatever the file holds.
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
