//! Downloads from a local HTTP server that implements the protocol of the Hub and can inject faults.

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use pricket_hub::{Digest, Error, Hub, Listed, ModelId, Phase, Progress, Result, Settings, Snapshot, Token};
use pricket_testhub::{Content, Repo, TestHub};

/// Listing, verifying, evicting and reading the cache offline.
mod cache;

/// Ids, errors, tokens, listings and resumed downloads.
mod downloads;

/// A thousand random schedules of faults.
mod faults;

/// Killed processes, and processes that fetch the same files.
mod processes;

/// Python's client on the same server and cache.
#[cfg(unix)] // On Windows a virtual environment has another layout.
mod python;

pub(crate) const ID: &str = "owner/tiny";
pub(crate) const TOKEN: &str = "hf_do_not_tell";

/// Returns random bytes, so that no part of a file equals another.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    use rand::{RngCore, SeedableRng};
    let mut bytes = vec![0; len];
    rand_chacha::ChaCha8Rng::seed_from_u64(seed).fill_bytes(&mut bytes);
    bytes
}

/// Creates a repository with `main`, three training steps and a tag. Its weights have `size` bytes.
pub(crate) fn repo(size: usize) -> Repo {
    let mut repo = Repo::default();
    let files = |seed: u64| {
        [
            ("config.json", Content::text(format!("{{\"step\": {seed}}}"))),
            ("empty.txt", Content::text("")),
            ("nested/notes on it.txt", Content::text(noise(7, 100))),
            ("pytorch_model.bin", Content::lfs(noise(seed, size))),
            ("tokenizer.json", Content::text(noise(8, 5_000))),
        ]
    };
    for (step, seed) in [("step0", 0), ("step1", 0), ("step1000", 1), ("main", 1)] {
        let commit = repo.commit(files(seed));
        repo.branch(step, &commit);
        if step == "main" {
            repo.tag("v1.0", &commit);
        }
    }
    repo
}

pub(crate) fn serve(repo: Repo) -> TestHub {
    let server = TestHub::start();
    server.add(ID, repo);
    server
}

/// Settings with timeouts of milliseconds and small ranges.
pub(crate) fn settings(server: &TestHub, cache: &Path) -> Settings {
    let mut settings = Settings::new(&server.url(), cache);
    settings.token = Some(Token::new(TOKEN).unwrap());
    settings.range_bytes = 64 << 10;
    let patience = &mut settings.patience;
    patience.stall = Duration::from_millis(150);
    patience.answer = Duration::from_millis(300);
    patience.pause = Duration::from_millis(1);
    patience.longest_pause = Duration::from_millis(4);
    patience.longest_asked = Duration::from_millis(1500);
    settings
}

/// Fetches all files of a revision into the cache.
pub(crate) fn fetch_all(hub: &Hub, id: &str, progress: &dyn Progress) -> Result<Snapshot> {
    let id: ModelId = id.parse()?;
    let commit = hub.resolve(&id, progress)?;
    let listing = hub.files(&id.repo, &commit, progress)?.files;
    hub.fetch(&id, &commit, &listing, &listing, progress)
}

/// Asserts that a snapshot holds the files of the repository.
pub(crate) fn assert_same(snapshot: &Path, repo: &Repo, revision: &str) {
    let files = repo.files(revision).unwrap();
    for (path, content) in files {
        let found = std::fs::read(snapshot.join(path)).unwrap_or_else(|e| panic!("{path}: {e}"));
        assert!(found == *content.bytes, "{path} differs");
    }
}

/// Asserts that every blob has the hash in its name and that no link dangles. Returns the number of blobs.
pub(crate) fn assert_clean(cache: &Path) -> usize {
    let mut blobs = 0;
    let folder = cache.join("models--owner--tiny");
    for entry in std::fs::read_dir(folder.join("blobs")).into_iter().flatten().flatten() {
        let name = entry.file_name().into_string().unwrap();
        if let Some(digest) = Digest::from_hex(&name) {
            blobs += 1;
            assert_eq!(digest.of(&std::fs::read(entry.path()).unwrap()), digest, "{name} has another hash");
        } else {
            assert!(name.ends_with(".pricket-part"), "{name} is neither a blob nor a part");
        }
    }
    for entry in std::fs::read_dir(folder.join("snapshots")).into_iter().flatten().flatten() {
        for file in walk(&entry.path()) {
            assert!(file.exists(), "{} is a dangling link", file.display());
        }
    }
    blobs
}

pub(crate) fn walk(dir: &Path) -> Vec<std::path::PathBuf> {
    let mut out = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        if entry.file_type().unwrap().is_dir() { out.extend(walk(&entry.path())) } else { out.push(entry.path()) }
    }
    out
}

/// Records all reports, and cancels after `cancel_at` bytes.
#[derive(Default)]
pub(crate) struct Watch {
    pub(crate) done: AtomicU64,
    pub(crate) total: AtomicU64,
    pub(crate) notices: Mutex<Vec<String>>,
    pub(crate) phases: Mutex<Vec<(String, Phase)>>,
    pub(crate) cancel_at: Option<u64>,
}

impl Progress for Watch {
    fn begin(&self, _: &str, total: u64, _: &str) {
        self.total.store(total, Ordering::Relaxed);
    }

    fn update(&self, done: u64) {
        let total = self.total.load(Ordering::Relaxed);
        assert!(done <= total, "{done} of {total}");
        self.done.store(done, Ordering::Relaxed);
    }

    fn phase(&self, file: &str, phase: Phase) {
        self.phases.lock().unwrap().push((file.into(), phase));
    }

    fn notice(&self, message: &str) {
        assert_discreet(message);
        self.notices.lock().unwrap().push(message.into());
    }

    fn cancelled(&self) -> bool {
        self.cancel_at.is_some_and(|at| self.done.load(Ordering::Relaxed) >= at)
    }
}

/// Asserts that a message is one line without secrets.
pub(crate) fn assert_discreet(message: &str) {
    assert!(!message.contains(TOKEN) && !message.contains("Signature"), "{message}");
    assert!(!message.contains('\n') && !message.is_empty(), "{message}");
}

pub(crate) fn assert_good_error(error: &Error) {
    assert_discreet(&error.to_string());
}

pub(crate) fn by_path(files: &[Listed], path: &str) -> Listed {
    files.iter().find(|file| file.path == path).unwrap().clone()
}
