use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use pricket_hub::{Cache, Digest, Hub, NoProgress};
use pricket_testhub::{Fault, Repo, TestHub};
use serde_json::Value;

use crate::{ID, TOKEN, assert_clean, assert_same, fetch_all, repo, serve, settings};

/// Returns a Python interpreter with the current huggingface_hub. If it cannot be installed, fails in CI and prints a
/// message elsewhere.
fn python() -> Option<&'static Path> {
    static PYTHON: OnceLock<Option<PathBuf>> = OnceLock::new();
    let python = PYTHON.get_or_init(|| {
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("huggingface_hub");
        let python = directory.join("bin/python");
        let run = |command: &mut Command| match command.output() {
            Ok(output) if output.status.success() => Ok(()),
            Ok(output) => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
            Err(e) => Err(e.to_string()),
        };
        let install = || {
            if !python.is_file() {
                run(Command::new("python3").args(["-m", "venv"]).arg(&directory))?;
            }
            let pip =
                ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade", "huggingface_hub"];
            run(Command::new(&python).args(pip))
        };
        match install() {
            Ok(()) => Some(python),
            Err(e) if std::env::var_os("CI").is_some() => panic!("huggingface_hub cannot be installed: {e}"),
            Err(e) => {
                eprintln!("skipped: huggingface_hub cannot be installed: {e}");
                None
            }
        }
    });
    python.as_deref()
}

/// Runs client.py and returns its JSON output, or `None` if Python is not available.
fn client(server: &TestHub, cache: &Path, mode: &str, revision: &str, extra: &[(&str, &str)]) -> Option<Value> {
    let output = Command::new(python()?)
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hub/client.py"))
        .args([mode, ID, revision])
        .env("HF_ENDPOINT", server.url())
        .env("HF_HUB_CACHE", cache)
        .env("HF_HOME", cache.join("home"))
        .env("HF_TOKEN", TOKEN)
        .env("HF_HUB_DISABLE_TELEMETRY", "1")
        .env("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        .env("NO_PROXY", "127.0.0.1")
        .envs(extra.iter().copied())
        .output()
        .unwrap();
    assert!(output.status.success(), "{mode}: {}", String::from_utf8_lossy(&output.stderr));
    Some(serde_json::from_slice(&output.stdout).unwrap())
}

/// The files of a revision with their SHA-256, in the form that client.py prints.
fn expected(content: &Repo, revision: &str) -> BTreeMap<String, String> {
    let sha256 = Digest::Sha256(String::new());
    let files = content.files(revision).unwrap().iter();
    files.map(|(path, content)| (path.clone(), sha256.of(&content.bytes).hex().to_owned())).collect()
}

fn files(answer: &Value) -> BTreeMap<String, String> {
    serde_json::from_value(answer["files"].clone()).unwrap()
}

/// Python's client works with the test server, which shows that the server implements the protocol.
#[test]
fn the_server_is_what_python_takes_for_the_hub() {
    // Python resumes in units of 10 MiB.
    let (dir, mut content) = (tempfile::tempdir().unwrap(), repo(12 << 20));
    content.private(TOKEN);
    let server = serve(content.clone());
    server.page(2);
    let Some(answer) = client(&server, dir.path(), "download", "step1000", &[]) else { return };
    assert_eq!(files(&answer), expected(&content, "step1000"));
    let log = server.take_log();
    assert!(log.iter().filter(|r| r.cdn).count() == 1 && log.iter().any(|r| r.target.contains("/resolve-cache/")));
    let refs = client(&server, dir.path(), "refs", "", &[]).unwrap();
    let ours = Hub::new(settings(&server, dir.path())).refs(&ID.parse().unwrap(), &NoProgress).unwrap();
    assert_eq!(serde_json::from_value::<BTreeMap<String, String>>(refs["branches"].clone()).unwrap(), ours.branches);
    assert_eq!(serde_json::from_value::<BTreeMap<String, String>>(refs["tags"].clone()).unwrap(), ours.tags);
    // Offline, Python reads the cache that it wrote and sends no requests.
    server.take_log();
    let answer = client(&server, dir.path(), "offline", "step1000", &[("HF_HUB_OFFLINE", "1")]).unwrap();
    assert_eq!(files(&answer), expected(&content, "step1000"));
    assert!(server.take_log().is_empty());
    // After a truncated body, Python resumes with a range request.
    let dir = tempfile::tempdir().unwrap();
    let first = AtomicBool::new(true);
    server.misbehave(move |r| (r.cdn && first.swap(false, Ordering::Relaxed)).then_some(Fault::Truncate(11 << 20)));
    let answer = client(&server, dir.path(), "download", "main", &[]).unwrap();
    assert_eq!(files(&answer), expected(&content, "main"));
    let log = server.take_log();
    assert!(log.iter().any(|r| r.cdn && r.range.is_some_and(|(from, _)| from > 0)), "{log:?}");
}

#[test]
fn python_reads_what_we_write() {
    let content = repo(200_000);
    let server = serve(content.clone());
    for symlinks in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let mut settings = settings(&server, dir.path());
        settings.symlinks = symlinks;
        let hub = Hub::new(settings);
        for revision in ["step0", "step1000", "main"] {
            fetch_all(&hub, &format!("{ID}@{revision}"), &NoProgress).unwrap();
        }
        server.take_log();
        for revision in ["step0", "step1000", "main", content.resolve("step0").unwrap()] {
            let Some(answer) = client(&server, dir.path(), "offline", revision, &[("HF_HUB_OFFLINE", "1")]) else {
                return;
            };
            assert_eq!(files(&answer), expected(&content, revision), "{revision}");
        }
        assert!(server.take_log().is_empty());
        // Online, Python requests the metadata and fetches no file.
        let answer = client(&server, dir.path(), "download", "main", &[]).unwrap();
        assert_eq!(files(&answer), expected(&content, "main"));
        assert!(server.take_log().iter().all(|r| !r.is_body()));
        let scan = client(&server, dir.path(), "scan", "", &[]).unwrap();
        assert_eq!(scan["warnings"], serde_json::json!([]));
        assert_eq!(scan["revisions"].as_object().unwrap().len(), 3);
        // After an eviction, Python's scan still has no warnings.
        let cache = Cache::new(dir.path());
        assert_eq!(cache.evict(250_000, &NoProgress).unwrap().revisions.len(), 1 + usize::from(!symlinks));
        let scan = client(&server, dir.path(), "scan", "", &[]).unwrap();
        assert_eq!(scan["warnings"], serde_json::json!([]));
    }
}

#[test]
fn we_read_what_python_writes() {
    let content = repo(200_000);
    let server = serve(content.clone());
    for copies in ["0", "1"] {
        let dir = tempfile::tempdir().unwrap();
        let extra = [("HF_HUB_DISABLE_SYMLINKS", copies)];
        if client(&server, dir.path(), "download", "step0", &extra).is_none() {
            return;
        }
        server.take_log();
        let mut settings = settings(&server, dir.path());
        // Online, no file is fetched again.
        let snapshot = fetch_all(&Hub::new(settings.clone()), "owner/tiny@step0", &NoProgress).unwrap();
        assert_eq!((snapshot.report.received, snapshot.report.on_disk), (0, snapshot.report.total));
        assert!(server.take_log().iter().all(|r| !r.is_body()));
        settings.offline = true;
        let hub = Hub::new(settings);
        for revision in ["step0", content.resolve("step0").unwrap()] {
            let snapshot = fetch_all(&hub, &format!("{ID}@{revision}"), &NoProgress).unwrap();
            assert_same(&snapshot.directory, &content, "step0");
        }
        // A commit that Python fetched is not evicted.
        let evicted = Cache::new(dir.path()).evict(0, &NoProgress).unwrap();
        assert!(evicted.revisions.is_empty() && evicted.freed == 0);
        assert_clean(dir.path());
        assert!(server.take_log().is_empty());
    }
}

/// When Python and pricket fetch the same file at the same time, one waits for the other.
#[test]
fn python_and_we_share_the_locks() {
    let content = repo(8 << 20);
    let server = serve(content.clone());
    let dir = tempfile::tempdir().unwrap();
    if python().is_none() {
        return;
    }
    std::thread::scope(|scope| {
        let theirs = scope.spawn(|| client(&server, dir.path(), "download", "main", &[]).unwrap());
        while !dir.path().join(".locks").exists() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let ours = fetch_all(&Hub::new(settings(&server, dir.path())), ID, &NoProgress).unwrap();
        assert_same(&ours.directory, &content, "main");
        assert_eq!(files(&theirs.join().unwrap()), expected(&content, "main"));
    });
    let large: u64 = server.take_log().iter().filter(|r| r.cdn).map(pricket_testhub::Request::sent).sum();
    assert_eq!(large, 8 << 20, "the large file is sent once");
}
