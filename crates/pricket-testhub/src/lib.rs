//! A local HTTP server for tests, which implements the part of the Hugging Face Hub's protocol that downloads need.
//!
//! Faults can be injected into its responses ([`TestHub::misbehave`]). The tests of pricket-hub run Python's
//! `huggingface_hub` against it to check the protocol.
//!
//! ```
//! use pricket_testhub::{Content, Repo, TestHub};
//! let hub = TestHub::start();
//! let mut repo = Repo::default();
//! let commit = repo.commit([("config.json", Content::text("{}"))]);
//! repo.branch("main", &commit);
//! hub.add("owner/name", repo);
//! assert!(hub.url().starts_with("http://127.0.0.1:"));
//! ```

mod fault;
mod repo;
mod server;

pub use fault::Fault;
pub use repo::{Content, Repo};
pub use server::{Request, TestHub};
