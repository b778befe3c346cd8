//! The Hugging Face Hub as a place of training steps: ids and revisions, verified downloads, the shared cache.
//!
//! | | |
//! |---|---|
//! | [`ModelId`], [`Steps`] | what is meant: `owner/name@step3000`, `0..143000:10000` |
//! | [`Hub`] | what is there: [`Hub::refs`] maps every branch to its commit in one request, [`Hub::files`] lists a commit with hashes |
//! | [`Hub::fetch`] | getting it: resumed, verified, in parallel, into the cache that Python's `huggingface_hub` uses too |
//! | [`Hub::read`] | a part of a file, without the file |
//! | [`Cache`] | what is here: sizes, hashes, and room for more |
//!
//! A file gets its final name when its length and hash are those that the commit lists, and not before. What was
//! interrupted, by whatever, is gone on with. A branch is resolved to a commit once, so that files of two states of a branch
//! never meet. The token goes to the Hub and to no other host. Nothing here knows what a tensor is.
//!
//! ```no_run
//! use pricket_hub::{Hub, ModelId, Quiet};
//! let hub = Hub::from_env()?;
//! let id: ModelId = "EleutherAI/pythia-70m@step3000".parse()?;
//! let commit = hub.resolve(&id, &Quiet)?;
//! let listing = hub.files(&id.repo, &commit, &Quiet)?;
//! let wanted: Vec<_> = listing.files.iter().filter(|file| file.path.ends_with(".json")).cloned().collect();
//! let snapshot = hub.fetch(&id, &commit, &wanted, &listing.files, &Quiet)?;
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
