use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pricket_hub::{Cache, Hub, NoProgress, Phase, Progress};
use pricket_testhub::{Repo, Request, TestHub};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::{ID, assert_clean, assert_same, fetch_all, repo, serve, settings};

const KILLS: usize = 100;
const IN_EACH_PHASE: usize = 10;
const SIZE: usize = 2 << 20;

/// Writes the current phase as a letter, then sleeps, so that short phases can be hit by a kill.
struct Narrate(Duration);

impl Progress for Narrate {
    fn update(&self, done: u64) {
        let mut out = std::io::stdout().lock();
        let _ = write!(out, "{done};");
        let _ = out.flush();
    }

    fn phase(&self, _: &str, phase: Phase) {
        tell(match phase {
            Phase::Body => 'b',
            Phase::Hash => 'h',
            _ => 'r',
        });
        std::thread::sleep(self.0);
    }
}

fn tell(letter: char) {
    let mut out = std::io::stdout().lock();
    let _ = write!(out, "{letter}");
    let _ = out.flush();
}

/// The fetch that other tests start as a separate process.
#[test]
#[ignore = "started by the other tests"]
fn child() {
    let var = |name: &str| std::env::var(name).unwrap();
    let mut settings = pricket_hub::Settings::new(&var("HUB_TEST_URL"), var("HUB_TEST_CACHE"));
    settings.range_bytes = 128 << 10;
    let dwell = Duration::from_millis(var("HUB_TEST_DWELL").parse().unwrap());
    tell('m');
    std::thread::sleep(dwell);
    fetch_all(&Hub::new(settings), ID, &Narrate(dwell)).unwrap();
    tell('e');
}

fn start(server: &TestHub, cache: &Path, dwell: u64) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "processes::child", "--ignored", "--nocapture", "--test-threads", "1"])
        .env("HUB_TEST_URL", server.url())
        .env("HUB_TEST_CACHE", cache)
        .env("HUB_TEST_DWELL", dwell.to_string())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Skips the output of the test harness up to the first letter.
fn begun(child: &mut Child) -> BufReader<std::process::ChildStdout> {
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut line = Vec::new();
    while !String::from_utf8_lossy(&line).contains("processes::child ... ") {
        let mut byte = [0];
        out.read_exact(&mut byte).unwrap();
        line.push(byte[0]);
    }
    out
}

/// Kills a download at a moment. Returns its last phase letter and the highest byte count that it reported.
fn kill_after(server: &TestHub, cache: &Path, moment: Duration) -> (char, u64) {
    let mut child = start(server, cache, 3);
    let mut out = begun(&mut child);
    std::thread::sleep(moment);
    child.kill().unwrap();
    child.wait().unwrap();
    let mut told = String::new();
    out.read_to_string(&mut told).unwrap();
    // The last number may be cut off.
    let numbers = told.split(|c: char| !c.is_ascii_digit() && c != ';').flat_map(|text| text.split_inclusive(';'));
    let done = numbers.filter_map(|text| text.strip_suffix(';')?.parse().ok()).max().unwrap_or(0);
    (told.chars().rfind(|letter| "mbhre".contains(*letter)).unwrap_or('m'), done)
}

/// Fetches the rest and asserts that the `had` bytes of the killed process are not fetched again.
fn whole(content: &Repo, hub: &Hub, had: u64) {
    let snapshot = fetch_all(hub, ID, &NoProgress).unwrap();
    assert_same(&snapshot.directory, content, "main");
    assert_eq!(snapshot.report.received + snapshot.report.on_disk, snapshot.report.total);
    assert!(snapshot.report.on_disk >= had, "{had} were there: {:?}", snapshot.report);
}

/// Kills downloads (SIGKILL) at random moments of every phase. The next run completes and verifies the files.
#[test]
fn killed_at_a_hundred_moments() {
    let content = repo(SIZE);
    let server = serve(content.clone());
    let undisturbed = {
        let dir = tempfile::tempdir().unwrap();
        let mut child = start(&server, dir.path(), 3);
        let out = begun(&mut child);
        let start = Instant::now();
        let last = out.split(b'e').next().unwrap().unwrap();
        assert!(!last.is_empty());
        let time = start.elapsed();
        child.wait().unwrap();
        time
    };
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let mut seen = std::collections::BTreeMap::from([('m', 0), ('b', 0), ('h', 0), ('r', 0), ('e', 0)]);
    let mut kills = 0;
    while kills < KILLS || "mbhr".chars().any(|phase| seen[&phase] < IN_EACH_PHASE) {
        assert!(kills < 10 * KILLS, "too few kills in some phase: {seen:?}");
        let dir = tempfile::tempdir().unwrap();
        let moment = undisturbed.mul_f64(rng.random_range(0.0..1.0));
        let (phase, had) = kill_after(&server, dir.path(), moment);
        *seen.get_mut(&phase).unwrap() += 1;
        assert_clean(dir.path());
        let hub = Hub::new(settings(&server, dir.path()));
        whole(&content, &hub, had);
        let cache = Cache::new(dir.path());
        let verified = cache.verify(&cache.repos().unwrap(), &NoProgress).unwrap();
        assert!(verified.len() == 5 && verified.iter().all(|file| file.is_good() == Some(true)), "{verified:?}");
        kills += 1;
    }
    println!("{kills} kills over {undisturbed:?}: {seen:?} (metadata, body, hash, rename, after the end)");
}

/// A download that is killed repeatedly still completes.
#[test]
fn killed_until_it_is_done() {
    let content = repo(SIZE);
    let server = serve(content.clone());
    let dir = tempfile::tempdir().unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let mut most = 0;
    for _ in 0..10 {
        let (_, had) = kill_after(&server, dir.path(), Duration::from_millis(rng.random_range(0..25)));
        most = most.max(had);
        assert_clean(dir.path());
    }
    whole(&content, &Hub::new(settings(&server, dir.path())), most);
}

#[test]
fn four_processes_fetch_each_blob_once() {
    let content = repo(SIZE);
    let server = serve(content.clone());
    let dir = tempfile::tempdir().unwrap();
    let children: Vec<Child> = (0..4).map(|_| start(&server, dir.path(), 1)).collect();
    for child in children {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    }
    assert_clean(dir.path());
    let bodies: u64 = server.take_log().iter().filter(|r| r.is_body()).map(Request::sent).sum();
    let total: u64 = content.files("main").unwrap().values().map(|content| content.bytes.len() as u64).sum();
    assert_eq!(bodies, total, "every byte is sent once");
    whole(&content, &Hub::new(settings(&server, dir.path())), total);
}
