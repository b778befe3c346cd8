//! Progress bars, and stopping work on Ctrl-C.

use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use pricket::nn::Progress;

/// A progress bar on stderr. indicatif hides it if stderr is not a terminal.
#[derive(Default)]
pub(crate) struct Bar(Mutex<Option<ProgressBar>>);

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Handles Ctrl-C and requests to terminate: the first one cancels the work, so that no incomplete file is left.
///
/// A second one ends the program at once. Within the first second it is ignored, because some programs signal both a
/// process and its process group.
#[allow(dead_code, reason = "not every example runs for long")]
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
        let _ = writeln!(std::io::stderr(), "stopping; press Ctrl-C again to end at once");
    })?)
}

/// Progress without a bar that can still be canceled, for work in the background.
#[allow(dead_code, reason = "not every example works in the background")]
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
