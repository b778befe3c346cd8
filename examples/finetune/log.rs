//! The log of a run (log.jsonl), its output on the terminal, and the picture of the loss.

use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};
#[cfg(feature = "plots")]
use pricket::notebook::LossCurve;
use pricket::train::StepReport;
use serde_json::{Value, json};

use crate::common::write_whole;

/// Writes each step to log.jsonl and to stdout, and shows a progress bar on a terminal.
pub(crate) struct Log {
    path: PathBuf,
    file: File,
    bar: ProgressBar,
    json: bool,
    total: u64,
    first: u64,
    tokens: usize,
    start: Instant,
}

impl Log {
    /// Opens the log in a directory. Lines of steps after `steps` are removed, because these steps will be repeated.
    pub(crate) fn open(directory: &Path, steps: u64, total: u64, json: bool) -> anyhow::Result<Self> {
        let path = directory.join("log.jsonl");
        if let Ok(text) = std::fs::read_to_string(&path) {
            let is_kept =
                |line: &&str| steps > 0 && parse(line).is_some_and(|line| line["step"].as_u64() <= Some(steps));
            let kept: String = text.lines().filter(is_kept).flat_map(|line| [line, "\n"]).collect();
            write_whole(&path, &kept)?;
        }
        let file = File::options().create(true).append(true).open(&path)?;
        let bar = ProgressBar::new(total).with_position(steps);
        bar.set_style(
            ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len}")
                .unwrap_or_else(|_| ProgressStyle::default_bar()),
        );
        Ok(Self { path, file, bar, json, total, first: steps, tokens: 0, start: Instant::now() })
    }

    /// Records a training step.
    pub(crate) fn step(&mut self, report: &StepReport) -> anyhow::Result<()> {
        self.tokens += report.tokens;
        let seconds = self.start.elapsed().as_secs_f64();
        let rate = self.tokens as f64 / seconds;
        let memory = pricket::loading::used_memory();
        let mut line = json!({
            "step": report.step, "loss": report.loss, "lr": report.lr, "grad_norm": report.grad_norm,
            "tokens": report.tokens, "counted": report.counted, "tokens_per_second": rate, "memory": memory,
        });
        if let Some(loss) = report.eval_loss {
            line["eval_loss"] = json!(loss);
        }
        writeln!(self.file, "{line}")?;
        let left = seconds / (report.step - self.first) as f64 * (self.total - report.step) as f64;
        let memory = memory.map_or_else(String::new, |bytes| format!(", {}", size(bytes)));
        let status = format!("{rate:.0} tokens/s, {} left{memory}", duration(left));
        self.bar.set_message(format!("loss {:.4}, {status}", report.loss));
        self.bar.set_position(report.step);
        if self.json {
            self.print(&line.to_string());
            return Ok(());
        }
        let is_shown = report.step.is_multiple_of((self.total / 50).max(1)) || report.step == self.total;
        if is_shown || report.eval_loss.is_some() {
            let evaluation = report.eval_loss.map_or_else(String::new, |loss| format!("  evaluation {loss:.4}"));
            self.print(&format!(
                "step {}/{}  loss {:.4}{evaluation}  lr {:.2e}  gradient {:.3}  {status}",
                report.step, self.total, report.loss, report.lr, report.grad_norm
            ));
        }
        Ok(())
    }

    /// Records the evaluation before the first step.
    pub(crate) fn evaluation(&mut self, loss: f64) -> anyhow::Result<()> {
        let line = json!({"step": 0, "eval_loss": loss});
        writeln!(self.file, "{line}")?;
        self.print(&if self.json { line.to_string() } else { format!("before training  evaluation {loss:.4}") });
        Ok(())
    }

    /// Prints a line to stdout. A visible progress bar is redrawn below it. Errors are ignored: a reader that ends, such
    /// as `head`, must not end the training.
    fn print(&self, line: &str) {
        self.bar.suspend(|| drop(writeln!(std::io::stdout().lock(), "{line}")));
    }

    /// Ends the progress bar, and draws the losses of the log into loss.svg.
    pub(crate) fn finish(&self) -> anyhow::Result<()> {
        if std::io::stderr().is_terminal() {
            self.bar.finish_and_clear();
        }
        #[cfg(feature = "plots")]
        picture(&self.path)?;
        Ok(())
    }
}

/// Draws the losses of a log into loss.svg beside it.
#[cfg(feature = "plots")]
fn picture(log: &Path) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(log)?;
    let mut curve = LossCurve::default();
    for line in text.lines().filter_map(parse) {
        let Some(step) = line["step"].as_u64() else { continue };
        match (line["loss"].as_f64(), line["eval_loss"].as_f64()) {
            (Some(loss), evaluation) => curve.add(step, loss, evaluation),
            (None, Some(loss)) => curve.add_evaluation(step, loss),
            (None, None) => {}
        }
    }
    if let Ok(picture) = curve.picture() {
        write_whole(&log.with_file_name("loss.svg"), picture.svg()?)?;
    }
    Ok(())
}

/// Parses a line of the log. Incomplete lines give `None`.
fn parse(line: &str) -> Option<Value> {
    serde_json::from_str(line).ok()
}

/// Formats a number of bytes, such as `1.23 GB` or `45.6 MB`.
pub(crate) fn size(bytes: u64) -> String {
    if bytes < 1_000_000_000 {
        format!("{:.1} MB", bytes as f64 / 1e6)
    } else {
        format!("{:.2} GB", bytes as f64 / 1e9)
    }
}

/// Formats a duration, such as `3 min 20 s`.
pub(crate) fn duration(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{s} s"),
        (0, m, s) => format!("{m} min {s} s"),
        (h, m, _) => format!("{h} h {m} min"),
    }
}
