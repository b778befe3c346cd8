use std::path::PathBuf;

/// Everything that can go wrong, as a caller would tell it apart.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Nothing is there: a path, a revision, a tokenizer.
    #[error("{}: {what}", path.display())]
    NotFound {
        /// Where we looked.
        path: PathBuf,
        /// What was looked for.
        what: String,
    },
    /// A configuration that asks for something impossible or not implemented.
    #[error("{}: {key}: {what}", path.display())]
    Refused {
        /// The config.json.
        path: PathBuf,
        /// The key.
        key: String,
        /// What was found and what was expected.
        what: String,
    },
    /// Weights or metadata that contradict themselves, or are not what the configuration implies.
    #[error("{error}")]
    Corrupt {
        /// The tensor, where it is one.
        tensor: Option<String>,
        /// The file and what is wrong with it. Not a `source`: a chain of causes would say it twice.
        error: pricket_weights::Error,
    },
    /// Weights of the family that the configuration has no use for. [`crate::Loader::allow_unused`] loads the rest.
    #[error("{}: {} that this configuration has no use for ({first}{}); {}", path.display(), holds(*count),
        if *count > 1 { ", ..." } else { "" }, unused_advice(first))]
    Unused {
        /// The file.
        path: PathBuf,
        /// The first of them.
        first: String,
        /// How many there are.
        count: usize,
    },
    /// A file that asks for what is never done: running code, leaving its directory.
    #[error("{}: refused: {what}", path.display())]
    Unsafe {
        /// The file.
        path: PathBuf,
        /// What it asked for.
        what: String,
    },
    /// A format or element type that is known and not read.
    #[error("{}: {what}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The format or type.
        what: String,
    },
    /// The system would not read a file.
    #[error("{}: {error}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What it said.
        error: std::io::Error,
    },
    /// A repository that is there, and has no such revision.
    #[error("{what}")]
    Revision {
        /// What was asked for.
        id: String,
        /// Branches and tags that are there.
        known: Vec<String>,
        /// The same in words.
        what: String,
    },
    /// A repository that the Hub does not show, with what is known of it.
    #[error("{id}: {what}")]
    Repository {
        /// What was asked for.
        id: String,
        /// What the Hub said, and where else to look.
        what: String,
    },
    /// Something is not in the cache and the Hub may not be asked.
    #[error("{0}")]
    Offline(String),
    /// Anything else between a repository and its files: the network, a wrong hash, a full disk.
    #[error("{0}")]
    Hub(pricket_hub::Error),
    /// The tokenizer file, or a text that it cannot take.
    #[error("{origin}: {what}")]
    Tokenizer {
        /// The file.
        origin: String,
        /// What is wrong.
        what: String,
    },
    /// A device that is not there or was not built in.
    #[error("{0}")]
    Device(String),
    /// The model does not fit in the memory that is free.
    #[error(
        "{what} needs about {} of memory, {} is free; load a smaller type, or allow it explicitly",
        gib(*needed),
        gib(*available)
    )]
    OutOfMemory {
        /// What was to be loaded.
        what: String,
        /// Bytes estimated.
        needed: u64,
        /// Bytes free.
        available: u64,
    },
    /// More positions than the model was trained for.
    #[error("{asked} positions asked for, the model was trained for {limit}; allow it explicitly to go beyond")]
    ContextExceeded {
        /// Positions that the call would reach.
        asked: usize,
        /// `max_position_embeddings`.
        limit: usize,
    },
    /// The model's numbers overflowed.
    #[error("{message}")]
    NonFinite {
        /// The first layer that did, if it was one.
        layer: Option<usize>,
        /// The whole story.
        message: String,
    },
    /// A [`pricket_nn::Progress`] asked to stop.
    #[error("cancelled")]
    Cancelled,
    /// A name that stands for nothing: a format, an activation, a metric, a key of a configuration.
    #[error("{name:?} is no {what}; {known}")]
    Unknown {
        /// What was looked for.
        what: &'static str,
        /// The name.
        name: String,
        /// What can be asked for.
        known: String,
    },
    /// A source that cannot be resolved: two revisions, a revision of a file, a model that is not fetched.
    #[error("{0}")]
    Source(String),
    /// An option that is out of range, that has no effect, or that another one excludes.
    #[error("{0}")]
    Options(String),
    /// A file or text that is not what it should be: results of a sweep, a conversation, a prompt format.
    #[error("{origin}: {what}")]
    Malformed {
        /// The file, or what the text should be.
        origin: String,
        /// What is wrong.
        what: String,
    },
    /// An output that is in the way, or cannot be written.
    #[error("{}{what}", path.display())]
    Output {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
    },
    /// Rows of results that do not make the table or curves asked for.
    #[error("{0}")]
    Results(String),
    /// A text without a token, or one of a single token where each is scored given those before it.
    #[error("{0}")]
    Empty(&'static str),
    /// A checkpoint that takes more bytes than the disk budget of a sweep.
    #[error("{id} takes {needed} bytes, more than the disk budget of {budget}")]
    Budget {
        /// The checkpoint.
        id: String,
        /// Its bytes.
        needed: u64,
        /// The budget in bytes.
        budget: u64,
    },
    /// Documents of a task that cannot be found or told apart.
    #[error("{0}")]
    Documents(String),
    /// An adapter that cannot be merged.
    #[error("{name}: {what}")]
    Adapter {
        /// The tensor.
        name: String,
        /// Why not.
        what: &'static str,
    },
    /// Anything else that concerns texts and tasks.
    #[error("{0}")]
    Text(pricket_lm::Error),
    /// Anything else that concerns a model: token ids, shapes, taps, states.
    #[error("{0}")]
    Model(pricket_nn::Error),
    /// Anything else that concerns adapters and training.
    #[cfg(feature = "train")]
    #[error("{0}")]
    Training(pricket_train::Error),
    /// A picture that cannot be made.
    #[cfg(feature = "plots")]
    #[error("{0}")]
    Picture(pricket_plots::Error),
    /// An operation on tensors.
    #[error(transparent)]
    Tensor(candle_core::Error),
}

fn holds(count: usize) -> String {
    format!("it holds {}", pricket_weights::counted(count, "tensor"))
}

/// A number of tensors, in words.
pub(crate) fn tensors(count: usize) -> String {
    format!("{} {}", pricket_weights::counted(count, "tensor"), if count == 1 { "is" } else { "are" })
}

fn unused_advice(name: &str) -> &'static str {
    if name.contains(".lora_") {
        "merge the LoRA adapter into the weights first"
    } else {
        "the configuration is probably not theirs; allow unused weights to leave them out"
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
