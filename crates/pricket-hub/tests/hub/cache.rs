use std::path::Path;
use std::time::{Duration, SystemTime};

use pricket_hub::{Cache, CachedRepo, Error, Hub, NoProgress};
use pricket_testhub::{Content, Repo, TestHub};

use crate::{ID, assert_clean, assert_same, fetch_all, noise, serve, settings};

/// Creates three training steps, each with its own weights. All share a tokenizer.
fn steps() -> Repo {
    let mut repo = Repo::default();
    for (i, step) in ["step0", "step1", "step2"].iter().enumerate() {
        let commit = repo.commit([
            ("pytorch_model.bin", Content::lfs(noise(i as u64, 50_000))),
            ("tokenizer.json", Content::text(noise(9, 10_000))),
        ]);
        repo.branch(step, &commit);
    }
    repo
}

fn fetched(dir: &Path) -> (TestHub, Repo, Hub) {
    let content = steps();
    let server = serve(content.clone());
    let hub = Hub::new(settings(&server, dir));
    for (i, step) in ["step0", "step1", "step2"].iter().enumerate() {
        let snapshot = fetch_all(&hub, &format!("{ID}@{step}"), &NoProgress).unwrap();
        age(dir, &snapshot.commit, 100 - i as u64);
    }
    (server, content, hub)
}

/// Sets the time of the last use of a commit to `hours` ago.
fn age(dir: &Path, commit: &str, hours: u64) {
    let path = dir.join("models--owner--tiny/.pricket").join(format!("{commit}.lock"));
    let time = SystemTime::now() - Duration::from_hours(hours);
    std::fs::File::options().write(true).open(path).unwrap().set_modified(time).unwrap();
}

fn only(cache: &Cache) -> CachedRepo {
    cache.repos().unwrap().pop().unwrap()
}

#[test]
fn what_is_there_is_listed_once() {
    let dir = tempfile::tempdir().unwrap();
    let (_server, ..) = fetched(dir.path());
    let cache = Cache::new(dir.path());
    let repo = only(&cache);
    assert_eq!((repo.repo.as_str(), repo.revisions.len(), repo.bytes), (ID, 3, 3 * 50_000 + 10_000));
    assert!(repo.revisions.iter().all(|r| r.files.len() == 2 && r.refs.len() == 1 && r.last_used.is_some()));
    assert!(Cache::new(dir.path().join("nothing")).repos().unwrap().is_empty());
}

#[test]
fn a_changed_byte_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let (_server, content, hub) = fetched(dir.path());
    let cache = Cache::new(dir.path());
    let verify = || cache.verify(&cache.repos().unwrap(), &NoProgress).unwrap();
    assert_eq!(verify().iter().filter(|file| file.is_good() == Some(true)).count(), 4);
    let blob =
        dir.path().join("models--owner--tiny/blobs").join(content.files("step1").unwrap()["pytorch_model.bin"].etag());
    let mut bytes = std::fs::read(&blob).unwrap();
    bytes[12_345] ^= 1;
    std::fs::write(&blob, bytes).unwrap();
    let bad: Vec<_> = verify().into_iter().filter(|file| file.is_good() == Some(false)).collect();
    assert!(bad.len() == 1 && bad[0].location == blob && bad[0].found.is_some(), "{bad:?}");
    // After the blob is deleted, its dangling links are reported and it is fetched again.
    std::fs::remove_file(&blob).unwrap();
    if cfg!(unix) {
        let missing: Vec<_> = verify().into_iter().filter(|file| file.is_good() == Some(false)).collect();
        assert!(missing.iter().all(pricket_hub::Verified::is_dangling) && !missing.is_empty(), "{missing:?}");
        assert!(missing.iter().all(|file| file.path == "pytorch_model.bin"), "{missing:?}");
    }
    let snapshot = fetch_all(&hub, "owner/tiny@step1", &NoProgress).unwrap();
    assert_eq!(snapshot.report.received, 50_000);
    assert_same(&snapshot.directory, &content, "step1");
}

#[test]
fn the_least_recently_used_go_first() {
    let dir = tempfile::tempdir().unwrap();
    let (_server, content, hub) = fetched(dir.path());
    let cache = Cache::new(dir.path());
    assert!(cache.evict(160_000, &NoProgress).unwrap().revisions.is_empty());
    // Using step0 makes step1 the oldest.
    let used = fetch_all(&hub, "owner/tiny@step0", &NoProgress).unwrap();
    drop(used);
    let evicted = cache.evict(110_000, &NoProgress).unwrap();
    assert_eq!(
        evicted.revisions.iter().map(|(_, c)| c.as_str()).collect::<Vec<_>>(),
        [content.resolve("step1").unwrap()]
    );
    assert_eq!((evicted.freed, evicted.left), (50_000, 110_000));
    let repo = only(&cache);
    assert_eq!((repo.revisions.len(), repo.bytes), (2, 110_000));
    assert!(repo.revisions.iter().all(|r| r.files.len() == 2), "shared blobs stay");
    assert_clean(dir.path());
    assert!(!dir.path().join("models--owner--tiny/refs/step1").exists());
    let mut offline = hub.settings().clone();
    offline.offline = true;
    let offline = Hub::new(offline);
    assert!(matches!(fetch_all(&offline, "owner/tiny@step1", &NoProgress), Err(Error::Offline { .. })));
    assert_same(&fetch_all(&offline, "owner/tiny@step2", &NoProgress).unwrap().directory, &content, "step2");
    // An evicted commit can be fetched again.
    assert_same(&fetch_all(&hub, "owner/tiny@step1", &NoProgress).unwrap().directory, &content, "step1");
}

#[cfg(unix)] // The test creates a symbolic link.
#[test]
fn what_is_used_or_foreign_stays() {
    let dir = tempfile::tempdir().unwrap();
    let (_server, content, hub) = fetched(dir.path());
    let cache = Cache::new(dir.path());
    // Commits of another program: of the same repository, of another model and of a dataset.
    let blob = content.files("step0").unwrap()["pytorch_model.bin"].etag();
    let theirs = dir.path().join("models--owner--tiny/snapshots").join("a".repeat(40));
    std::fs::create_dir_all(&theirs).unwrap();
    std::os::unix::fs::symlink(format!("../../blobs/{blob}"), theirs.join("pytorch_model.bin")).unwrap();
    for other in ["models--their--llama", "datasets--their--data"] {
        let snapshot = dir.path().join(other).join("snapshots").join("b".repeat(40));
        std::fs::create_dir_all(&snapshot).unwrap();
        std::fs::write(snapshot.join("model.safetensors"), noise(5, 1000)).unwrap();
    }
    let in_use = fetch_all(&hub, "owner/tiny@step2", &NoProgress).unwrap();
    let evicted = cache.evict(0, &NoProgress).unwrap();
    assert_eq!((evicted.revisions.len(), evicted.in_use.len(), evicted.freed), (2, 1, 50_000));
    assert_same(&in_use.directory, &content, "step2");
    assert!(theirs.join("pytorch_model.bin").exists());
    assert!(dir.path().join("models--their--llama/snapshots").join("b".repeat(40)).join("model.safetensors").exists());
    assert_clean(dir.path());
    drop(in_use);
    assert_eq!(cache.evict(0, &NoProgress).unwrap().revisions.len(), 1);
    assert!(theirs.join("pytorch_model.bin").exists());
    // The listing includes the repositories of the other program.
    assert_eq!(cache.repos().unwrap().len(), 3);
}

#[test]
fn without_links_the_files_are_there_themselves() {
    let dir = tempfile::tempdir().unwrap();
    let content = steps();
    let server = serve(content.clone());
    let mut settings = settings(&server, dir.path());
    settings.symlinks = false;
    let hub = Hub::new(settings.clone());
    for step in ["step0", "step1", "step0"] {
        let snapshot = fetch_all(&hub, &format!("{ID}@{step}"), &NoProgress).unwrap();
        assert_same(&snapshot.directory, &content, step);
        assert!(snapshot.directory.join("tokenizer.json").symlink_metadata().unwrap().is_file());
    }
    settings.offline = true;
    let snapshot = fetch_all(&Hub::new(settings), "owner/tiny@step1", &NoProgress).unwrap();
    assert_same(&snapshot.directory, &content, "step1");
    let cache = Cache::new(dir.path());
    let verified = cache.verify(&cache.repos().unwrap(), &NoProgress).unwrap();
    assert!(verified.len() == 4 && verified.iter().all(|file| file.is_good() == Some(true)));
    let evicted = cache.evict(60_000, &NoProgress).unwrap();
    assert_eq!((evicted.revisions.len(), evicted.freed, evicted.left), (1, 60_000, 60_000));
}

/// Turning links off must not move blobs that earlier snapshots link to.
#[test]
fn turning_links_off_breaks_no_link() {
    let dir = tempfile::tempdir().unwrap();
    let (_server, content, hub) = fetched(dir.path());
    std::fs::remove_dir_all(dir.path().join("models--owner--tiny/snapshots").join(content.resolve("step1").unwrap()))
        .unwrap();
    let mut settings = hub.settings().clone();
    settings.symlinks = false;
    let snapshot = fetch_all(&Hub::new(settings), "owner/tiny@step1", &NoProgress).unwrap();
    assert_same(&snapshot.directory, &content, "step1");
    assert!(snapshot.directory.join("tokenizer.json").symlink_metadata().unwrap().is_file());
    assert_clean(dir.path());
    assert_same(&fetch_all(&hub, "owner/tiny@step0", &NoProgress).unwrap().directory, &content, "step0");
}

/// A commit that Python fetched is not evicted, even after pricket adds a file to it.
#[test]
fn a_file_added_does_not_make_a_commit_ours() {
    let dir = tempfile::tempdir().unwrap();
    let (_server, content, hub) = fetched(dir.path());
    std::fs::remove_dir_all(dir.path().join("models--owner--tiny/.pricket")).unwrap();
    let commit = content.resolve("step1").unwrap();
    std::fs::remove_file(dir.path().join("models--owner--tiny/snapshots").join(commit).join("tokenizer.json")).unwrap();
    assert_same(&fetch_all(&hub, "owner/tiny@step1", &NoProgress).unwrap().directory, &content, "step1");
    let evicted = Cache::new(dir.path()).evict(0, &NoProgress).unwrap();
    assert!(evicted.revisions.is_empty(), "{evicted:?}");
}

/// The next eviction finishes one that was killed.
#[test]
fn an_eviction_that_was_killed_is_finished() {
    let dir = tempfile::tempdir().unwrap();
    let (_server, content, hub) = fetched(dir.path());
    let folder = dir.path().join("models--owner--tiny");
    let commit = content.resolve("step1").unwrap();
    std::fs::rename(folder.join("snapshots").join(commit), folder.join(".pricket").join(format!("going-{commit}")))
        .unwrap();
    let cache = Cache::new(dir.path());
    let evicted = cache.evict(1 << 30, &NoProgress).unwrap();
    assert_eq!((evicted.freed, evicted.revisions.len()), (50_000, 0));
    assert_eq!(only(&cache).bytes, 110_000);
    assert_same(&fetch_all(&hub, "owner/tiny@step0", &NoProgress).unwrap().directory, &content, "step0");
}

#[test]
fn unfinished_files_go_first_of_all() {
    let dir = tempfile::tempdir().unwrap();
    let (server, content, hub) = fetched(dir.path());
    let mut bigger = content.clone();
    let commit = bigger.commit([("pytorch_model.bin", Content::lfs(noise(77, 400_000)))]);
    bigger.branch("main", &commit);
    server.add(ID, bigger);
    let watch = crate::Watch { cancel_at: Some(100_000), ..Default::default() };
    assert!(fetch_all(&hub, ID, &watch).is_err());
    let cache = Cache::new(dir.path());
    let repo = only(&cache);
    assert!(repo.partial_bytes >= 100_000, "{repo:?}");
    let evicted = cache.evict(160_000, &NoProgress).unwrap();
    assert!(evicted.revisions.is_empty() && evicted.freed >= 100_000, "{evicted:?}");
    assert_eq!(only(&cache).partial_bytes, 0);
}

/// A read-only cache of another user.
#[test]
fn a_cache_that_cannot_be_written_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let (_server, content, hub) = fetched(dir.path());
    // Permissions do not stop the superuser, so a file in place of the folder makes writing fail.
    let marks = dir.path().join("models--owner--tiny/.pricket");
    std::fs::remove_dir_all(&marks).unwrap();
    std::fs::write(&marks, "not a folder").unwrap();
    let mut offline = hub.settings().clone();
    offline.offline = true;
    for hub in [hub, Hub::new(offline)] {
        assert_same(&fetch_all(&hub, "owner/tiny@step2", &NoProgress).unwrap().directory, &content, "step2");
    }
}
