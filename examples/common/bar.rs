//! Progress as a terminal shows it.

use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use pricket::nn::Progress;

/// A progress bar on stderr; indicatif hides it where that is no terminal.
#[derive(Default)]
pub(crate) struct Bar(Mutex<Option<ProgressBar>>);

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// From now on Ctrl-C, and a request to terminate, cancel the work, so that nothing half-written is left. A second one ends the program
/// at once, unless it comes within a second: other programs signal a process and its group together.
#[allow(dead_code, reason = "not every example works long")]
pub(crate) fn interruptible() -> anyhow::Result<()> {
    static FIRST: OnceLock<Instant> = OnceLock::new();
    Ok(ctrlc::set_handler(|| {
        if INTERRUPTED.swap(true, Ordering::Relaxed) {
            if FIRST.get().is_some_and(|first| first.elapsed() > Duration::from_secs(1)) {
                std::process::exit(130);
            }
            return;
        }
        let _ = FIRST.set(Instant::now());
        let _ = writeln!(std::io::stderr(), "stopping; once more ends the program at once");
    })?)
}

/// Shows nothing, and stops work that was interrupted: for what goes on beside the work that is shown.
#[allow(dead_code, reason = "not every example does two things at once")]
pub(crate) struct Hidden;

impl Progress for Hidden {
    fn cancelled(&self) -> bool {
        INTERRUPTED.load(Ordering::Relaxed)
    }
}

impl Bar {
    fn bar(&self) -> MutexGuard<'_, Option<ProgressBar>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Progress for Bar {
    fn begin(&self, what: &str, total: u64, unit: &str) {
        let style = if unit == "bytes" {
            "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec}"
        } else {
            "{msg} {wide_bar} {pos}/{len} {per_sec} {eta}"
        };
        let bar = ProgressBar::new(total).with_message(what.to_owned());
        bar.set_style(ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()));
        *self.bar() = Some(bar);
    }

    fn notice(&self, message: &str) {
        match &*self.bar() {
            Some(bar) if !bar.is_hidden() => bar.println(message),
            _ if std::io::stderr().is_terminal() => drop(writeln!(std::io::stderr(), "{message}")),
            _ => {}
        }
    }

    fn update(&self, done: u64) {
        if let Some(bar) = &*self.bar() {
            bar.set_position(done);
        }
    }

    fn cancelled(&self) -> bool {
        INTERRUPTED.load(Ordering::Relaxed)
    }

    fn end(&self) {
        if let Some(bar) = self.bar().take() {
            bar.finish_and_clear();
        }
    }
}
