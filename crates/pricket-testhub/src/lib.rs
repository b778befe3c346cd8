//! A real HTTP server that speaks the part of the Hugging Face Hub's protocol that a client of models needs, and that can
//! be told to speak it badly. For tests; Python's own client is what proves it right.
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
