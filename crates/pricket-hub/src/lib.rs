//! Downloads of model checkpoints from the Hugging Face Hub: ids, revisions, training steps, verified files and the
//! shared cache.
//!
//! | item | purpose |
//! |---|---|
//! | [`ModelId`], [`Steps`] | names of revisions and selections of training steps: `owner/name@step3000`, `0..143000:10000` |
//! | [`Hub::refs`], [`Hub::files`] | every branch with its commit in one request; the files of a commit with their hashes |
//! | [`Hub::fetch`] | parallel, resumable and verified download into the cache that Python's `huggingface_hub` also uses |
//! | [`Hub::read`] | a byte range of a remote file, without downloading the file |
//! | [`Cache`] | listing, verifying and evicting cached files |
//!
//! A file gets its final name only after its length and hash match the listing of the commit. Interrupted downloads
//! resume. A branch is resolved to a commit once, so a snapshot never mixes files of two commits. The token is sent to
//! the Hub and to no other host. This crate does not read tensors.
//!
//! ```no_run
//! use pricket_hub::{Hub, ModelId, NoProgress};
//! let hub = Hub::from_env()?;
//! let id: ModelId = "EleutherAI/pythia-70m@step3000".parse()?;
//! let commit = hub.resolve(&id, &NoProgress)?;
//! let listing = hub.files(&id.repo, &commit, &NoProgress)?;
//! let wanted: Vec<_> = listing.files.iter().filter(|file| file.path.ends_with(".json")).cloned().collect();
//! let snapshot = hub.fetch(&id, &commit, &wanted, &listing.files, &NoProgress)?;
//! println!("{}: {} bytes received", snapshot.directory.display(), snapshot.report.received);
//! # Ok::<(), pricket_hub::Error>(())
//! ```

#![cfg_attr(docsrs, feature(doc_cfg))]

mod address;
mod cache;
mod digest;
mod error;
mod fetch;
mod file;
#[cfg(feature = "http")]
mod forward;
mod http;
mod hub;
mod id;
mod layout;
mod ledger;
mod listing;
mod lock;
#[cfg(feature = "http")]
mod network;
mod part;
mod platform;
mod records;
mod settings;
mod step_name;
mod steps;

pub use cache::{Cache, CachedFile, CachedRepo, CachedRevision, Evicted, Verified};
pub use digest::Digest;
pub use error::{Error, Result};
pub use fetch::{InUse, Report, Snapshot};
pub use hub::{Hub, Listing, Refs};
pub use id::{ModelId, RepoId, is_commit};
pub use listing::Listed;
pub use pricket_progress::{NoProgress, Phase, Progress};
pub use settings::{Patience, Settings, Token};
pub use step_name::step_of;
pub use steps::Steps;
