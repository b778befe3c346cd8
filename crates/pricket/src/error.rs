//! The error type of the facade.

use std::path::PathBuf;

/// Errors of this crate, by what a caller can do about them.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A path, revision or tokenizer that does not exist.
    #[error("{}: {what}", path.display())]
    NotFound {
        /// The path that was searched.
        path: PathBuf,
        /// Description of the missing item.
        what: String,
    },
    /// A configuration with a value that is invalid or not implemented.
    #[error("{}: {key}: {what}", path.display())]
    Refused {
        /// The config.json.
        path: PathBuf,
        /// The key.
        key: String,
        /// The value found and the values expected.
        what: String,
    },
    /// Weights or metadata that are inconsistent, or that differ from what the configuration implies.
    #[error("{error}")]
    Corrupt {
        /// The tensor, if the error concerns one.
        tensor: Option<String>,
        /// The file and what is wrong with it. Not a `source`, because a chain of causes would print it twice.
        error: pricket_weights::Error,
    },
    /// A checkpoint with weights of the family that the configuration does not use. [`crate::Loader::allow_unused`]
    /// ignores them.
    #[error("{}: {} that this configuration does not use ({first}{}); {}", path.display(), holds(*count),
        if *count > 1 { ", ..." } else { "" }, unused_advice(first))]
    Unused {
        /// The file.
        path: PathBuf,
        /// Name of the first unused tensor.
        first: String,
        /// Number of unused tensors.
        count: usize,
    },
    /// A file that requires an unsafe action, such as running code or leaving its directory.
    #[error("{}: refused: {what}", path.display())]
    Unsafe {
        /// The file.
        path: PathBuf,
        /// The action.
        what: String,
    },
    /// A known format or element type that is not supported.
    #[error("{}: {what}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The format or type.
        what: String,
    },
    /// A file operation that failed.
    #[error("{}: {error}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The error of the operating system.
        error: std::io::Error,
    },
    /// A revision that does not exist in its repository.
    #[error("{what}")]
    Revision {
        /// The repository and revision.
        id: String,
        /// Branches and tags of the repository.
        known: Vec<String>,
        /// The error message.
        what: String,
    },
    /// A repository that does not exist on the Hub, or that the token gives no access to.
    #[error("{id}: {what}")]
    Repository {
        /// The repository and revision.
        id: String,
        /// The answer of the Hub, and known copies.
        what: String,
    },
    /// A file that is not in the cache, while requests to the Hub are disabled.
    #[error("{0}")]
    Offline(String),
    /// Any other error while files are fetched, such as a network error, a wrong hash or a full disk.
    #[error("{0}")]
    Hub(pricket_hub::Error),
    /// An invalid tokenizer file, or a text that the tokenizer cannot encode.
    #[error("{origin}: {what}")]
    Tokenizer {
        /// The file.
        origin: String,
        /// Description of the fault.
        what: String,
    },
    /// A device that does not exist, or whose backend is not compiled in.
    #[error("{0}")]
    Device(String),
    /// A model that does not fit in free memory.
    #[error(
        "{what} needs about {} of memory, {} is free; load a smaller type, or allow it explicitly",
        gib(*needed),
        gib(*available)
    )]
    OutOfMemory {
        /// The model.
        what: String,
        /// Estimated memory in bytes.
        needed: u64,
        /// Free memory in bytes.
        available: u64,
    },
    /// A sequence longer than the context length that the model was trained for.
    #[error("{asked} positions asked for, the model was trained for {limit}; allow it explicitly to go beyond")]
    ContextExceeded {
        /// Number of positions requested.
        asked: usize,
        /// Trained context length (`max_position_embeddings`).
        limit: usize,
    },
    /// Activations that overflowed to infinity or NaN.
    #[error("{message}")]
    NonFinite {
        /// Index of the first block that overflowed, if a block did.
        layer: Option<usize>,
        /// The error message.
        message: String,
    },
    /// Work that was canceled by [`pricket_nn::Progress::cancelled`].
    #[error("cancelled")]
    Cancelled,
    /// An unknown name of a prompt format, an activation, a precision or a configuration key.
    #[error("unknown {what} {name:?}; {known}")]
    Unknown {
        /// Kind of the name, such as "precision".
        what: &'static str,
        /// The name.
        name: String,
        /// The known names, or why the name is refused.
        known: String,
    },
    /// A source that cannot be resolved, such as one with two revisions or a file with a revision.
    #[error("{0}")]
    Source(String),
    /// An option that is out of range, has no effect, or conflicts with another option.
    #[error("{0}")]
    Options(String),
    /// A malformed file or text: results of a sweep, a conversation, a prompt format.
    #[error("{origin}: {what}")]
    Malformed {
        /// The file, or a description of the text.
        origin: String,
        /// Description of the fault.
        what: String,
    },
    /// An output path that already exists or cannot be written.
    #[error("{}{what}", path.display())]
    Output {
        /// The file or directory.
        path: PathBuf,
        /// Description of the fault.
        what: &'static str,
    },
    /// Rows of results that do not contain what a table or curve needs.
    #[error("{0}")]
    Results(String),
    /// A text without tokens, or with a single token where at least two are needed.
    #[error("{0}")]
    Empty(&'static str),
    /// A checkpoint that is larger than the disk budget of a sweep.
    #[error("{id} takes {needed} bytes, more than the disk budget of {budget}")]
    Budget {
        /// The checkpoint.
        id: String,
        /// Size of the checkpoint in bytes.
        needed: u64,
        /// Disk budget in bytes.
        budget: u64,
    },
    /// Documents of a task that are missing or ambiguous.
    #[error("{0}")]
    Documents(String),
    /// An adapter that cannot be merged.
    #[error("{name}: {what}")]
    Adapter {
        /// The tensor.
        name: String,
        /// Why it cannot be merged.
        what: &'static str,
    },
    /// Any other error of texts and tasks.
    #[error("{0}")]
    Text(pricket_lm::Error),
    /// Any other error of a model, such as wrong token ids, shapes, taps or states.
    #[error("{0}")]
    Model(pricket_nn::Error),
    /// Any other error of adapters and training.
    #[cfg(feature = "train")]
    #[error("{0}")]
    Training(pricket_train::Error),
    /// A picture that cannot be drawn.
    #[cfg(feature = "plots")]
    #[error("{0}")]
    Picture(pricket_plots::Error),
    /// A tensor operation that failed.
    #[error(transparent)]
    Tensor(candle_core::Error),
}

fn holds(count: usize) -> String {
    format!("holds {}", pricket_weights::counted(count, "tensor"))
}

/// A number of tensors with its verb: "1 tensor is", "3 tensors are".
pub(crate) fn tensors(count: usize) -> String {
    format!("{} {}", pricket_weights::counted(count, "tensor"), if count == 1 { "is" } else { "are" })
}

fn unused_advice(name: &str) -> &'static str {
    if name.contains(".lora_") {
        "merge the LoRA adapter into the weights first"
    } else {
        "the configuration probably belongs to another model; allow unused weights to ignore them"
    }
}

fn gib(bytes: u64) -> String {
    let gib = bytes as f64 / f64::from(1u32 << 30);
    if gib >= 0.1 { format!("{gib:.1} GiB") } else { format!("{:.1} MiB", gib * 1024.0) }
}

impl From<pricket_weights::Error> for Error {
    fn from(e: pricket_weights::Error) -> Self {
        use pricket_weights::Error as W;
        let tensor = match &e {
            W::Missing { name, .. } | W::Shape { name, .. } | W::NotFloat { name, .. } => Some(name.clone()),
            _ => None,
        };
        match e {
            W::NotFound { path, what } | W::Ambiguous { path, what } => Error::NotFound { path, what },
            W::Refused { path, what } => Error::Unsafe { path, what },
            W::Unsupported { path, what } => Error::Unsupported { path, what },
            W::Io { path, source } => Error::Io { path, error: source },
            W::Candle { source, .. } => source.into(),
            error => Error::Corrupt { tensor, error },
        }
    }
}

impl From<pricket_hub::Error> for Error {
    fn from(e: pricket_hub::Error) -> Self {
        use pricket_hub::Error as H;
        match e {
            H::Input(what) => Error::Source(what),
            H::Io { path, source } => Error::Io { path, error: source },
            H::Cancelled => Error::Cancelled,
            H::Offline { .. } => Error::Offline(e.to_string()),
            other => Error::Hub(other),
        }
    }
}

impl From<pricket_nn::Error> for Error {
    fn from(e: pricket_nn::Error) -> Self {
        use pricket_nn::Error as Nn;
        match e {
            Nn::Weights(e) => e.into(),
            Nn::Candle(e) => Error::Tensor(e),
            Nn::Config { key, what } => Error::Refused { path: "config.json".into(), key, what },
            Nn::ContextExceeded { asked, limit } => Error::ContextExceeded { asked, limit },
            Nn::Cancelled => Error::Cancelled,
            other => Error::Model(other),
        }
    }
}

impl From<pricket_lm::Error> for Error {
    fn from(e: pricket_lm::Error) -> Self {
        use pricket_lm::Error as Lm;
        match e {
            Lm::Nn(e) => e.into(),
            Lm::Tokenizer { origin, what } => Error::Tokenizer { origin, what },
            Lm::NonFinite { layer, .. } => Error::NonFinite { layer, message: e.to_string() },
            other => Error::Text(other),
        }
    }
}

#[cfg(feature = "plots")]
impl From<pricket_plots::Error> for Error {
    fn from(e: pricket_plots::Error) -> Self {
        match e {
            pricket_plots::Error::Io { path, error } => Error::Io { path, error },
            other => Error::Picture(other),
        }
    }
}

impl From<candle_core::Error> for Error {
    fn from(e: candle_core::Error) -> Self {
        pricket_nn::Error::from(e).into()
    }
}

/// `Result` with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
