use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use pricket_hub::{Error, Hub, ModelId, NoProgress, Phase, Settings};
use pricket_testhub::{Content, Fault, Repo, Request, TestHub};

use crate::{
    ID, TOKEN, Watch, assert_clean, assert_discreet, assert_same, by_path, fetch_all, noise, repo, serve, settings,
};

fn hub(server: &TestHub, cache: &Path) -> Hub {
    Hub::new(settings(server, cache))
}

#[test]
fn a_revision_comes_whole_and_is_not_asked_for_twice() {
    let (dir, content) = (tempfile::tempdir().unwrap(), repo(300_000));
    let server = serve(content.clone());
    let hub = hub(&server, dir.path());
    let watch = Watch::default();
    let snapshot = fetch_all(&hub, "owner/tiny@step1000", &watch).unwrap();
    assert_same(&snapshot.directory, &content, "step1000");
    assert_eq!(assert_clean(dir.path()), 5);
    let report = snapshot.report;
    assert_eq!((report.on_disk, report.repeated, report.received), (0, 0, report.total));
    assert_eq!(watch.done.load(Ordering::Relaxed), report.total);
    assert!(watch.notices.lock().unwrap().is_empty());
    let log = server.take_log();
    // The token goes to the Hub, and never to the host of the large files.
    assert!(log.iter().filter(|r| r.cdn).count() >= 5, "ranges are fetched from the other host");
    assert!(log.iter().filter(|r| r.cdn).all(|r| r.authorization.is_none()));
    assert!(log.iter().filter(|r| !r.cdn).all(|r| r.authorization.as_deref() == Some(&format!("Bearer {TOKEN}"))));
    // Each phase of each file, in order.
    for path in content.files("step1000").unwrap().keys() {
        let of: Vec<Phase> =
            watch.phases.lock().unwrap().iter().filter(|(p, _)| p == path).map(|(_, phase)| *phase).collect();
        assert_eq!(of, [Phase::Body, Phase::Hash, Phase::Rename], "{path}");
    }
    let pointer = snapshot.directory.join("nested/notes on it.txt");
    let target = std::fs::read_link(&pointer).unwrap();
    assert!(target.starts_with("../../../blobs"), "{}", target.display());
    assert_eq!(std::fs::read_to_string(dir.path().join("models--owner--tiny/refs/step1000")).unwrap(), snapshot.commit);
    // A branch needs one request, a commit none.
    assert_eq!(fetch_all(&hub, "owner/tiny@step1000", &NoProgress).unwrap().report.received, 0);
    assert_eq!(server.take_log().len(), 1);
    fetch_all(&hub, &format!("{ID}@{}", snapshot.commit), &NoProgress).unwrap();
    assert!(server.take_log().is_empty());
    // Files that another revision shares are linked, not fetched.
    let main = fetch_all(&hub, ID, &NoProgress).unwrap();
    assert_eq!((main.report.on_disk, main.report.received), (main.report.total, 0));
    let step0 = fetch_all(&hub, "owner/tiny@step0", &NoProgress).unwrap();
    assert_eq!(step0.report.received, 300_000 + 11);
}

#[test]
fn listings_come_in_pages() {
    let (dir, content) = (tempfile::tempdir().unwrap(), repo(1000));
    let server = serve(content.clone());
    server.page(2);
    let snapshot = fetch_all(&hub(&server, dir.path()), "owner/tiny@v1.0", &NoProgress).unwrap();
    assert_same(&snapshot.directory, &content, "main");
    assert_eq!(snapshot.files.len(), 5);
}

#[test]
fn every_branch_in_one_request() {
    let (dir, content) = (tempfile::tempdir().unwrap(), repo(10));
    let server = serve(content.clone());
    let refs = hub(&server, dir.path()).refs(&ID.parse().unwrap(), &NoProgress).unwrap();
    assert_eq!(server.take_log().len(), 1);
    assert_eq!(refs.branches.keys().collect::<Vec<_>>(), ["main", "step0", "step1", "step1000"]);
    assert_eq!(refs.commit("v1.0"), content.resolve("main"));
}

#[test]
fn errors_say_what_there_is() {
    let (dir, mut content) = (tempfile::tempdir().unwrap(), repo(10));
    content.private(TOKEN);
    let server = serve(content);
    let hub = hub(&server, dir.path());
    let error = fetch_all(&hub, "owner/tiny@step7", &NoProgress).unwrap_err();
    assert!(matches!(&error, Error::Revision { known, .. } if known.len() == 5), "{error}");
    assert!(error.to_string().contains("step1000"), "{error}");
    let error = fetch_all(&hub, "mosaicml/mpt-7b", &NoProgress).unwrap_err();
    assert!(matches!(error, Error::Repository { status: 401, .. }), "{error}");
    let mut others = settings(&server, dir.path());
    others.token = None;
    let error = fetch_all(&Hub::new(others.clone()), ID, &NoProgress).unwrap_err();
    assert!(error.to_string().contains("HF_TOKEN"), "{error}");
    others.offline = true;
    let error = fetch_all(&Hub::new(others), ID, &NoProgress).unwrap_err();
    assert!(matches!(error, Error::Offline { .. }), "{error}");
    // The server at this address has stopped.
    let (gone, cache) = (TestHub::start().url(), dir.path().join("other"));
    let mut nowhere = Settings::new(&gone, cache);
    nowhere.patience = settings(&server, dir.path()).patience;
    let error = fetch_all(&Hub::new(nowhere), ID, &NoProgress).unwrap_err();
    assert!(error.is_network(), "{error}");
}

#[test]
fn a_listing_that_leaves_the_repository_is_refused() {
    for path in ["../escape", "a/../../b", "/etc/passwd", "a\\..\\b", "a//b"] {
        let dir = tempfile::tempdir().unwrap();
        let mut content = Repo::default();
        let commit = content.commit([(path, Content::text("x"))]);
        content.branch("main", &commit);
        let error = fetch_all(&hub(&serve(content), dir.path()), ID, &NoProgress).unwrap_err();
        assert!(matches!(error, Error::Protocol { .. }), "{path}: {error}");
        assert_discreet(&error.to_string());
    }
}

#[test]
fn the_hubs_own_way_to_say_wait() {
    let (dir, content) = (tempfile::tempdir().unwrap(), repo(1000));
    let server = serve(content);
    server.misbehave(|r| (r.number == 0).then(|| Fault::RateLimit("\"api\";r=0;t=1".into())));
    let start = Instant::now();
    fetch_all(&hub(&server, dir.path()), ID, &NoProgress).unwrap();
    assert!(start.elapsed() >= Duration::from_secs(1));
}

/// A listing with a missing page must not count as complete.
#[test]
fn a_next_page_that_is_elsewhere_is_not_the_end() {
    for url in ["https://elsewhere.org/api/models/owner/tiny/tree/x?cursor=2", "ftp://x", "?cursor=2"] {
        let dir = tempfile::tempdir().unwrap();
        let server = serve(repo(1000));
        server.misbehave(move |r| r.target.contains("/tree/").then(|| Fault::NextPage(url.into())));
        let error = fetch_all(&hub(&server, dir.path()), ID, &NoProgress).unwrap_err();
        assert!(error.to_string().contains("next page"), "{url}: {error}");
    }
}

#[test]
fn one_redirect_serves_all_ranges() {
    let (dir, content) = (tempfile::tempdir().unwrap(), repo(1_000_000));
    let server = serve(content);
    let mut settings = settings(&server, dir.path());
    settings.ranges = 1;
    fetch_all(&Hub::new(settings), ID, &NoProgress).unwrap();
    let log = server.take_log();
    let asked = log.iter().filter(|r| r.target.contains("/resolve/") && r.target.contains("pytorch_model")).count();
    assert_eq!((asked, log.iter().filter(|r| r.cdn).count()), (1, 16));
    // When the signature expires, a new one is requested.
    let dir = tempfile::tempdir().unwrap();
    server.misbehave(|r| (r.cdn && r.number % 3 == 0).then_some(Fault::Status(403)));
    fetch_all(&hub(&server, dir.path()), ID, &NoProgress).unwrap();
}

/// Repositories that were removed from the Hub, such as those of MPT, still load from the cache.
#[test]
fn what_has_left_the_hub_is_still_in_the_cache() {
    let (dir, content) = (tempfile::tempdir().unwrap(), repo(1000));
    let server = serve(content.clone());
    fetch_all(&hub(&server, dir.path()), ID, &NoProgress).unwrap();
    server.misbehave(|r| (!r.cdn).then_some(Fault::Status(401)));
    let watch = Watch::default();
    assert_same(&fetch_all(&hub(&server, dir.path()), ID, &watch).unwrap().directory, &content, "main");
    assert!(watch.notices.lock().unwrap()[0].contains("using the cached"));
}

/// A fetch canceled between two files fails with `Cancelled`.
#[test]
fn cancelled_between_files_is_cancelled() {
    struct After(std::sync::atomic::AtomicBool);
    impl pricket_hub::Progress for After {
        fn phase(&self, _: &str, phase: Phase) {
            if phase == Phase::Rename {
                self.0.store(true, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(30));
            }
        }
        fn cancelled(&self) -> bool {
            self.0.load(Ordering::Relaxed)
        }
    }
    let (dir, content) = (tempfile::tempdir().unwrap(), repo(100_000));
    let server = serve(content);
    let mut settings = settings(&server, dir.path());
    settings.files = 1;
    let error = fetch_all(&Hub::new(settings), ID, &After(false.into())).unwrap_err();
    assert!(matches!(error, Error::Cancelled), "{error}");
    assert!(!dir.path().join("models--owner--tiny/refs/main").exists());
    assert_clean(dir.path());
}

/// A panic in a `Progress` must reach the caller and must not make the fetch hang.
#[test]
fn a_panic_in_a_listener_is_passed_on() {
    struct Panics(u64);
    impl pricket_hub::Progress for Panics {
        fn update(&self, done: u64) {
            assert!(done < self.0, "a bug of the listener");
        }
    }
    for at in [1, 10_000, 150_000, 250_000] {
        let (dir, content) = (tempfile::tempdir().unwrap(), repo(300_000));
        let server = serve(content.clone());
        let hub = hub(&server, dir.path());
        let attempt = std::panic::AssertUnwindSafe(|| drop(fetch_all(&hub, ID, &Panics(at))));
        let outcome = std::panic::catch_unwind(attempt);
        assert!(outcome.is_err());
        assert_same(&fetch_all(&hub, ID, &NoProgress).unwrap().directory, &content, "main");
    }
}

#[test]
fn nothing_is_written_outside_the_cache() {
    let dir = tempfile::tempdir().unwrap();
    let hub = hub(&serve(repo(10)), dir.path());
    let id: ModelId = ID.parse().unwrap();
    let digest = pricket_hub::Digest::from_hex(&"a".repeat(64));
    let file = |path: &str| pricket_hub::Listed::new(path, 1, digest.clone());
    let commit = "a".repeat(40);
    for (commit, file) in [("../../x", file("a")), (&commit, file("../../.bashrc")), (&commit, file("/etc/passwd"))] {
        let error = hub.fetch(&id, commit, std::slice::from_ref(&file), &[], &NoProgress).unwrap_err();
        assert!(matches!(error, Error::Input(_)), "{error}");
        assert!(hub.cached(&id.repo, commit, &file).is_none());
    }
    let bad = pricket_hub::Listed::new("a", 1, Some(pricket_hub::Digest::Sha256("../../x".into())));
    assert!(matches!(hub.fetch(&id, &commit, &[bad], &[], &NoProgress).unwrap_err(), Error::Input(_)));
}

#[test]
fn names_that_no_file_system_has_are_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let mut content = Repo::default();
    let commit =
        content.commit([("c:d", Content::text("x")), ("new\nline", Content::text("y")), ("fine", Content::text("z"))]);
    content.branch("main", &commit);
    content.branch("odd@name", &commit);
    let snapshot = fetch_all(&hub(&serve(content), dir.path()), ID, &NoProgress).unwrap();
    assert_eq!(snapshot.files.iter().map(|file| file.path.as_str()).collect::<Vec<_>>(), ["fine"]);
}

/// A branch moves to a new commit only when all files of the commit are there.
#[test]
fn an_interrupted_update_leaves_the_branch_where_it_was() {
    let (dir, mut content) = (tempfile::tempdir().unwrap(), repo(300_000));
    let server = serve(content.clone());
    let hub = hub(&server, dir.path());
    let before = fetch_all(&hub, ID, &NoProgress).unwrap();
    let commit =
        content.commit([("config.json", Content::text("{}")), ("pytorch_model.bin", Content::lfs(noise(50, 300_000)))]);
    content.branch("main", &commit);
    server.add(ID, content.clone());
    let watch = Watch { cancel_at: Some(100_000), ..Watch::default() };
    assert!(fetch_all(&hub, ID, &watch).is_err());
    let mut offline = hub.settings().clone();
    offline.offline = true;
    let after = fetch_all(&Hub::new(offline), ID, &NoProgress).unwrap();
    assert_eq!(after.commit, before.commit);
    assert_eq!(fetch_all(&hub, ID, &NoProgress).unwrap().commit, commit);
}

#[test]
fn an_interrupted_download_goes_on_where_it_was() {
    const SIZE: usize = 6 << 20;
    const NEAR: u64 = SIZE as u64 - 5;
    let content = repo(SIZE);
    for (cut, seed) in [(10_000, 0), (1 << 20, 1), (3_333_333, 2), (SIZE as u64 - 500_000, 3), (NEAR, 3)] {
        let dir = tempfile::tempdir().unwrap();
        let server = serve(content.clone());
        let mut settings = settings(&server, dir.path());
        settings.range_bytes = [1 << 20, 64 << 10, 777_777, 32 << 20][seed];
        let hub = Hub::new(settings);
        let watch = Watch { cancel_at: Some(cut), ..Watch::default() };
        match fetch_all(&hub, ID, &watch) {
            Err(error) => assert!(matches!(error, Error::Cancelled), "{error}"),
            // This close to the end, the last read may complete the file before cancellation is checked.
            Ok(whole) => {
                assert!(cut == NEAR, "not canceled at {cut}");
                assert_same(&whole.directory, &content, "main");
            }
        }
        let reached = watch.done.load(Ordering::Relaxed);
        assert!(assert_clean(dir.path()) <= 5);
        let sent: u64 = server.take_log().iter().filter(|r| r.is_body()).map(Request::sent).sum();
        // A new server, because requests of the interrupted fetch may still reach the old one.
        let again = serve(content.clone());
        let mut settings = crate::settings(&again, dir.path());
        settings.range_bytes = hub.settings().range_bytes;
        let snapshot = fetch_all(&Hub::new(settings), ID, &NoProgress).unwrap();
        assert_same(&snapshot.directory, &content, "main");
        let report = snapshot.report;
        assert!(report.on_disk >= reached, "{report:?} after {reached}");
        assert_eq!(report.received + report.on_disk, report.total);
        let asked: u64 = again.take_log().iter().filter(|r| r.is_body()).map(Request::sent).sum();
        assert_eq!(asked, report.received, "bytes on disk are not sent again");
        assert!(sent >= reached);
    }
}

/// After the server stalls or drops the connection, received bytes are not requested again.
#[test]
fn a_dropped_connection_costs_nothing() {
    for fault in [Fault::Truncate(30_000), Fault::Stall(30_000), Fault::WrongLength(500), Fault::NoLength] {
        let (dir, content) = (tempfile::tempdir().unwrap(), repo(200_000));
        let server = serve(content.clone());
        let planned = fault.clone();
        server.misbehave(move |r| (r.is_body() && r.number % 2 == 0).then(|| planned.clone()));
        let snapshot = fetch_all(&hub(&server, dir.path()), ID, &NoProgress).unwrap();
        assert_same(&snapshot.directory, &content, "main");
        assert_eq!((snapshot.report.received, snapshot.report.repeated), (snapshot.report.total, 0), "{fault:?}");
    }
}

#[test]
fn a_server_without_ranges_is_taken_as_it_is() {
    let (dir, content) = (tempfile::tempdir().unwrap(), repo(300_000));
    let server = serve(content.clone());
    server.misbehave(|r| r.is_body().then_some(Fault::IgnoreRange));
    let snapshot = fetch_all(&hub(&server, dir.path()), ID, &NoProgress).unwrap();
    assert_same(&snapshot.directory, &content, "main");
    assert_clean(dir.path());
}

#[test]
fn wrong_bytes_never_get_the_name() {
    for fault in [Fault::Corrupt(7), Fault::ErrorPageOfLength, Fault::LyingRange] {
        let (dir, content) = (tempfile::tempdir().unwrap(), repo(100_000));
        let server = serve(content.clone());
        let planned = fault.clone();
        server.misbehave(move |r| r.is_body().then(|| planned.clone()));
        let error = fetch_all(&hub(&server, dir.path()), ID, &NoProgress).unwrap_err();
        assert!(matches!(error, Error::Mismatch { .. } | Error::Network { .. }), "{fault:?}: {error}");
        assert_discreet(&error.to_string());
        assert_clean(dir.path());
        let weights = content.files("main").unwrap()["pytorch_model.bin"].etag().to_owned();
        assert!(!dir.path().join("models--owner--tiny/blobs").join(weights).exists());
        assert!(!dir.path().join("models--owner--tiny/refs/main").exists(), "no branch names an incomplete snapshot");
        // After the faults end, the fetch succeeds. Bytes received in vain count as repeated.
        let bad_once = std::sync::atomic::AtomicBool::new(true);
        let again = fault.clone();
        server.misbehave(move |r| (r.cdn && bad_once.swap(false, Ordering::Relaxed)).then(|| again.clone()));
        let watch = Watch::default();
        let snapshot = fetch_all(&hub(&server, dir.path()), ID, &watch).unwrap();
        assert_same(&snapshot.directory, &content, "main");
        assert!(snapshot.report.repeated >= 1, "{fault:?}: {:?}", snapshot.report);
        assert!(!watch.notices.lock().unwrap().is_empty());
    }
}

#[test]
fn the_server_says_when_to_come_back() {
    let (dir, content) = (tempfile::tempdir().unwrap(), repo(1000));
    let server = serve(content);
    let planned = std::sync::atomic::AtomicBool::new(true);
    server.misbehave(move |_| planned.swap(false, Ordering::Relaxed).then(|| Fault::TooMany("0.4".into())));
    let start = Instant::now();
    fetch_all(&hub(&server, dir.path()), ID, &NoProgress).unwrap();
    assert!(start.elapsed() >= Duration::from_millis(400));
    // Longer than `longest_asked`.
    server.misbehave(|_| Some(Fault::TooMany("3600".into())));
    let error = fetch_all(&hub(&server, dir.path()), ID, &NoProgress).err();
    // The cache has the branch, so the fetch succeeds. Without a cache the error gives the wait.
    assert!(error.is_none());
    let error = fetch_all(&hub(&server, &dir.path().join("empty")), ID, &NoProgress).unwrap_err();
    assert!(error.to_string().contains("3600 s"), "{error}");
}

#[test]
fn cancelling_does_not_wait_for_a_silent_server() {
    let (dir, content) = (tempfile::tempdir().unwrap(), repo(500_000));
    let server = serve(content);
    server.misbehave(|r| r.cdn.then_some(Fault::Stall(100)));
    let mut settings = settings(&server, dir.path());
    settings.patience.stall = Duration::from_mins(1);
    let watch = Watch { cancel_at: Some(5_200), ..Watch::default() };
    let start = Instant::now();
    let error = fetch_all(&Hub::new(settings), ID, &watch).unwrap_err();
    assert!(matches!(error, Error::Cancelled), "{error}");
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
}

#[test]
fn the_branch_that_moves_does_not_mix_files() {
    let (dir, content) = (tempfile::tempdir().unwrap(), repo(100_000));
    let server = serve(content.clone());
    let elsewhere = content.resolve("step0").unwrap().to_owned();
    server.misbehave(move |r| (r.number == 2).then(|| Fault::MoveMain(elsewhere.clone())));
    let snapshot = fetch_all(&hub(&server, dir.path()), ID, &NoProgress).unwrap();
    assert_eq!(Some(&*snapshot.commit), content.resolve("main"));
    assert_same(&snapshot.directory, &content, "main");
}

#[test]
fn a_full_disk_is_noticed_before_anything_is_fetched() {
    let dir = tempfile::tempdir().unwrap();
    let server = serve(repo(10));
    let hub = hub(&server, dir.path());
    let id: ModelId = ID.parse().unwrap();
    let commit = hub.resolve(&id, &NoProgress).unwrap();
    let listing = hub.files(&id.repo, &commit, &NoProgress).unwrap().files;
    let mut huge = listing.clone();
    huge[3].size = 1 << 60;
    server.take_log();
    let error = hub.fetch(&id, &commit, &huge, &listing, &NoProgress).unwrap_err();
    assert!(matches!(error, Error::NoSpace { needed, available, .. } if needed > available), "{error}");
    assert!(server.take_log().is_empty());
}

#[test]
fn a_part_of_a_file_without_the_file() {
    let (dir, content) = (tempfile::tempdir().unwrap(), repo(300_000));
    let server = serve(content.clone());
    let hub = hub(&server, dir.path());
    let id: ModelId = ID.parse().unwrap();
    let commit = hub.resolve(&id, &NoProgress).unwrap();
    let file = by_path(&hub.files(&id.repo, &commit, &NoProgress).unwrap().files, "pytorch_model.bin");
    let bytes = noise(1, 300_000);
    server.take_log();
    for range in [0..10, 299_990..300_000, 1234..200_000, 5..5, 0..300_000] {
        let found = hub.read(&id.repo, &commit, &file, range.clone(), &NoProgress).unwrap();
        assert!(found == bytes[range.start as usize..range.end as usize], "{range:?}");
    }
    let sent: u64 = server.take_log().iter().filter(|r| r.cdn).map(Request::sent).sum();
    assert_eq!(sent, 10 + 10 + 200_000 - 1234 + 300_000);
    assert!(hub.read(&id.repo, &commit, &file, 0..300_001, &NoProgress).is_err());
    server.misbehave(|r| r.cdn.then_some(Fault::IgnoreRange));
    let error = hub.read(&id.repo, &commit, &file, 5..10, &NoProgress).unwrap_err();
    assert!(error.to_string().contains("range requests"), "{error}");
    server.misbehave(|r| (r.cdn && r.number % 2 == 0).then_some(Fault::Truncate(3)));
    assert_eq!(hub.read(&id.repo, &commit, &file, 5..10, &NoProgress).unwrap(), &bytes[5..10]);
    assert!(!dir.path().join("models--owner--tiny/blobs").exists());
}

/// Proxies and mirrors refuse unknown requests with various statuses. Then the revision is requested by its name, and
/// each file is described by a HEAD request.
#[test]
fn a_server_that_lists_nothing_is_read_all_the_same() {
    for status in [400, 403, 404, 405, 501] {
        for refused in [&["/refs"][..], &["/tree/"], &["/refs", "/tree/"]] {
            let (dir, content) = (tempfile::tempdir().unwrap(), repo(100_000));
            let server = serve(content.clone());
            server.misbehave(move |request| {
                refused.iter().any(|part| request.target.contains(part)).then_some(Fault::Status(status))
            });
            let hub = Hub::new(settings(&server, dir.path()));
            let start = std::time::Instant::now();
            let snapshot = fetch_all(&hub, ID, &NoProgress).unwrap_or_else(|e| panic!("{status} {refused:?}: {e}"));
            assert_same(&snapshot.directory, &content, &snapshot.commit);
            assert!(start.elapsed().as_secs() < 5, "{status} must not be retried");
            let id = ID.parse::<pricket_hub::ModelId>().unwrap();
            let refs = hub.refs_or_main(&id.repo, &NoProgress).unwrap();
            assert_eq!(refs.branches.get("main"), Some(&snapshot.commit), "{status} {refused:?}");
        }
        // A missing revision and a missing repository still give their errors.
        let dir = tempfile::tempdir().unwrap();
        let server = serve(repo(1000));
        server.misbehave(move |request| request.target.contains("/refs").then_some(Fault::Status(status)));
        let hub = Hub::new(settings(&server, dir.path()));
        let missing = hub.resolve(&format!("{ID}@nowhere").parse().unwrap(), &NoProgress).unwrap_err();
        assert!(matches!(missing, Error::Revision { .. }), "{missing}");
        assert!(hub.resolve(&"nobody/nothing".parse().unwrap(), &NoProgress).is_err());
    }
}
