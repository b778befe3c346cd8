//! Fetches every file of a revision into the cache: `cargo run -p pricket-hub --example fetch -- owner/name@revision`.

use std::time::Instant;

use pricket_hub::{Hub, ModelId, Progress};

/// Prints notices to standard error.
struct Notices;

impl Progress for Notices {
    fn notice(&self, message: &str) {
        eprintln!("{message}");
    }
}

fn main() -> Result<(), pricket_hub::Error> {
    let id: ModelId = std::env::args().nth(1).unwrap_or_default().parse()?;
    let hub = Hub::from_env()?;
    let start = Instant::now();
    let commit = hub.resolve(&id, &Notices)?;
    let listing = hub.files(&id.repo, &commit, &Notices)?.files;
    let snapshot = hub.fetch(&id, &commit, &listing, &listing, &Notices)?;
    let (report, seconds) = (snapshot.report, start.elapsed().as_secs_f64());
    println!(
        "{}: {} bytes received of {} in {seconds:.2} s",
        snapshot.directory.display(),
        report.received,
        report.total
    );
    Ok(())
}
