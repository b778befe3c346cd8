use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use pricket_hub::{Hub, NoProgress};
use pricket_testhub::{Fault, Request};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::{ID, Watch, assert_clean, assert_good_error, assert_same, fetch_all, repo, serve, settings};

const SCHEDULES: u64 = 1000;
const SIZE: usize = 200_000;

fn fault(rng: &mut ChaCha8Rng, elsewhere: &str) -> Fault {
    let at = rng.random_range(0..70_000);
    match rng.random_range(0..21) {
        0 => Fault::Truncate(at),
        1 => Fault::Stall(at),
        2 => Fault::Silence,
        3 => Fault::Trickle(Duration::from_millis(rng.random_range(1..30))),
        4 => Fault::WrongLength(rng.random_range(-2000..2000)),
        5 => Fault::Status(*[500, 502, 503, 504, 408].get(rng.random_range(0..5)).unwrap()),
        6 => Fault::Status(*[400, 401, 403, 404, 410, 416, 418].get(rng.random_range(0..7)).unwrap()),
        7 => Fault::TooMany(format!("0.0{}", rng.random_range(0..5))),
        8 => Fault::TooMany("9000".into()),
        9 => Fault::ErrorPage,
        10 => Fault::ErrorPageOfLength,
        11 => Fault::Corrupt(at),
        12 => Fault::RedirectLoop,
        13 => Fault::RedirectChain,
        14 => Fault::IgnoreRange,
        15 => Fault::OtherRange,
        16 => Fault::LyingRange,
        17 => Fault::WrongTotal,
        18 => [Fault::NoLength, Fault::Packed][rng.random_range(0..2)].clone(),
        19 => Fault::Close,
        _ => Fault::MoveMain(elsewhere.into()),
    }
}

/// The result of a schedule.
struct Ran {
    complete: bool,
    repeated: u64,
}

fn run(seed: u64) -> Ran {
    let (dir, content) = (tempfile::tempdir().unwrap(), repo(SIZE));
    let server = serve(content.clone());
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    // Faults are rare to nearly constant. Some schedules end after a number of requests, some never do.
    let share = [0.02, 0.1, 0.3, 0.6, 0.95][rng.random_range(0..5)];
    let storm = if rng.random_bool(0.8) { rng.random_range(1..60) } else { u64::MAX };
    let elsewhere = content.resolve("step0").unwrap().to_owned();
    let plan = Mutex::new(rng.clone());
    server.misbehave(move |request| {
        let mut rng = plan.lock().unwrap();
        (request.number < storm && rng.random_bool(share)).then(|| fault(&mut rng, &elsewhere))
    });
    let mut settings = settings(&server, dir.path());
    settings.patience.stall = Duration::from_millis(40);
    settings.patience.answer = Duration::from_millis(80);
    settings.range_bytes = [16 << 10, 64 << 10, 1 << 20][rng.random_range(0..3)];
    settings.ranges = rng.random_range(1..5);
    settings.files = rng.random_range(1..5);
    let hub = Hub::new(settings);
    let watch = Watch::default();
    let result = fetch_all(&hub, ID, &watch);
    assert_clean(dir.path());
    let ran = match &result {
        Ok(snapshot) => {
            assert_same(&snapshot.directory, &content, &snapshot.commit);
            let report = snapshot.report;
            assert_eq!(report.received + report.on_disk, report.total + report.repeated, "{report:?}");
            let sent: u64 = server.take_log().iter().filter(|r| r.is_body()).map(Request::sent).sum();
            assert!(report.received <= sent, "{report:?}, {sent} sent");
            Ran { complete: true, repeated: report.repeated }
        }
        Err(error) => {
            assert_good_error(error);
            Ran { complete: false, repeated: 0 }
        }
    };
    drop(result);
    // Without faults, the fetch resumes from the files on disk and succeeds.
    server.behave();
    server.take_log();
    let snapshot = fetch_all(&hub, ID, &NoProgress).unwrap();
    assert_same(&snapshot.directory, &content, &snapshot.commit);
    assert_clean(dir.path());
    ran
}

/// Every schedule ends with verified files or one clear error, and never with a wrong file under a final name.
#[test]
fn a_thousand_schedules_of_faults() {
    let (next, complete, repeated) = (AtomicU64::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        // More threads than cores, because they mostly wait.
        for _ in 0..16 {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= SCHEDULES {
                        return;
                    }
                    let ran = std::panic::catch_unwind(|| run(seed)).unwrap_or_else(|_| panic!("schedule {seed}"));
                    complete.fetch_add(ran.complete.into(), Ordering::Relaxed);
                    repeated.fetch_add((ran.repeated > 0).into(), Ordering::Relaxed);
                }
            });
        }
    });
    let (complete, repeated) = (complete.into_inner(), repeated.into_inner());
    println!("{complete} of {SCHEDULES} schedules completed, {repeated} of them fetched something twice");
    // If nearly all or nearly no schedules complete, the faults are too weak or too strong.
    assert!((100..900).contains(&complete), "{complete}");
    assert!(repeated > 10, "{repeated}");
}
