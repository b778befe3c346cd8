//! A test server with repositories, and a cache, for tests of models by their ids.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use pricket::hub::Steps;
use pricket::hub::{Settings, Token};
use pricket::nn::NoProgress;
use pricket::suites::{Audit, AuditOptions, Checkpoints};
use pricket::{Hub, Loader};
use pricket_testhub::{Content, Repo, TestHub};
use serde_json::Value;

use crate::common::{root, tiny_steps};

pub(crate) const SUITE: &str = "test/tiny-neox";

pub(crate) fn suite() -> PathBuf {
    root().join("tests/golden/scoring/suite-tiny-neox")
}

pub(crate) fn case() -> Value {
    serde_json::from_slice(&std::fs::read(suite().join("case.json")).unwrap()).unwrap()
}

/// The file that a golden snapshot points to, also if a checkout turned links into plain text.
pub(crate) fn blob(pointer: &Path) -> PathBuf {
    let target = std::fs::read_link(pointer).unwrap_or_else(|_| std::fs::read_to_string(pointer).unwrap().into());
    suite().join("cache/models--test--tiny-neox/blobs").join(target.file_name().unwrap())
}

/// The branches of the golden suite with their directories.
pub(crate) fn snapshots() -> BTreeMap<String, PathBuf> {
    let folder = suite().join("cache/models--test--tiny-neox");
    let refs = std::fs::read_dir(folder.join("refs")).unwrap().flatten();
    refs.map(|entry| {
        let commit = std::fs::read_to_string(entry.path()).unwrap();
        (entry.file_name().into_string().unwrap(), folder.join("snapshots").join(commit))
    })
    .collect()
}

/// The golden suite as a repository.
pub(crate) fn suite_repo() -> Repo {
    let mut repo = Repo::default();
    for (branch, directory) in snapshots() {
        let files: Vec<(String, Content)> = std::fs::read_dir(&directory)
            .unwrap()
            .flatten()
            .map(|entry| {
                let name = entry.file_name().into_string().unwrap();
                let bytes = std::fs::read(blob(&entry.path())).unwrap();
                let large = Path::new(&name).extension().is_some_and(|e| e == "bin" || e == "safetensors");
                (name, if large { Content::lfs(bytes) } else { Content::text(bytes) })
            })
            .collect();
        let commit = repo.commit(files.iter().map(|(name, content)| (name.as_str(), content.clone())));
        repo.branch(&branch, &commit);
    }
    repo
}

/// The golden suite as a cache with links, as it was made.
pub(crate) fn suite_cache(into: &Path) {
    let (from, to) = (suite().join("cache/models--test--tiny-neox"), into.join("models--test--tiny-neox"));
    for folder in ["refs", "blobs"] {
        std::fs::create_dir_all(to.join(folder)).unwrap();
        for entry in std::fs::read_dir(from.join(folder)).unwrap().flatten() {
            std::fs::copy(entry.path(), to.join(folder).join(entry.file_name())).unwrap();
        }
    }
    for directory in snapshots().values() {
        let snapshot = to.join("snapshots").join(directory.file_name().unwrap());
        std::fs::create_dir_all(&snapshot).unwrap();
        for entry in std::fs::read_dir(directory).unwrap().flatten() {
            let target = Path::new("../../blobs").join(blob(&entry.path()).file_name().unwrap());
            #[cfg(unix)]
            std::os::unix::fs::symlink(target, snapshot.join(entry.file_name())).unwrap();
            // Where links need a privilege, the snapshots hold the files themselves.
            #[cfg(not(unix))]
            std::fs::copy(snapshot.join(target), snapshot.join(entry.file_name())).unwrap();
        }
    }
}

pub(crate) struct World {
    pub(crate) server: TestHub,
    pub(crate) cache: tempfile::TempDir,
}

impl World {
    pub(crate) fn new(repos: impl IntoIterator<Item = (&'static str, Repo)>) -> Self {
        let server = TestHub::start();
        for (id, repo) in repos {
            server.add(id, repo);
        }
        Self { server, cache: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn settings(&self) -> Settings {
        let mut settings = Settings::new(&self.server.url(), self.cache.path());
        settings.token = Some(Token::new("hf_secret").unwrap());
        settings
    }

    /// The environment of a program that uses this server and this cache.
    pub(crate) fn variables(&self) -> [(&'static str, String); 3] {
        let cache = self.cache.path().display().to_string();
        [("HF_ENDPOINT", self.server.url()), ("HF_HUB_CACHE", cache), ("HF_TOKEN", String::new())]
    }

    pub(crate) fn hub(&self) -> Hub {
        Hub::new(self.settings())
    }

    pub(crate) fn offline(&self) -> Hub {
        let mut settings = self.settings();
        settings.offline = true;
        Hub::new(settings)
    }

    pub(crate) fn loader(&self, id: &str) -> Loader {
        Loader::new(id).hub(self.hub()).threads(2)
    }

    pub(crate) fn checkpoints(&self, id: &str) -> Checkpoints {
        Checkpoints::on(&self.hub(), id, &NoProgress).unwrap()
    }

    pub(crate) fn audit(&self, id: &str) -> Audit {
        self.checkpoints(id).audit(&Steps::all(), AuditOptions::default(), &NoProgress).unwrap()
    }

    /// The bytes of large files sent so far.
    pub(crate) fn large_bytes(&self) -> u64 {
        self.server.take_log().iter().filter(|r| r.cdn).map(pricket_testhub::Request::sent).sum()
    }
}

pub(crate) fn only<'a>(files: impl IntoIterator<Item = (&'a str, Content)>) -> Repo {
    let mut repo = Repo::default();
    let commit = repo.commit(files);
    repo.branch("main", &commit);
    repo
}

/// The embedded model and some of its steps as a repository.
pub(crate) fn tiny_repo(steps: &[&str]) -> Repo {
    let mut repo = Repo::default();
    let commit = repo.commit_directory(&root().join("models/tiny")).unwrap();
    repo.branch("main", &commit);
    for step in steps {
        let commit = repo.commit_directory(&tiny_steps().join(step)).unwrap();
        repo.branch(step, &commit);
    }
    repo
}
