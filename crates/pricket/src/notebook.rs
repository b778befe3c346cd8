//! What a notebook shows: pictures as the value of a cell, text that streams by whole lines, progress without a terminal.
//!
//! The kernel evcxr shows a value by its method `evcxr_display`, and of each kind of content one thing a cell: put several
//! pictures together with [`Picture::of_pictures`]. It waits for ever for a cell that ends in the middle of a line, so nothing
//! here prints part of one. See `docs/notebooks.md`.
//!
//! ```
//! use pricket::notebook::{next_tokens, stream, tokens};
//! use pricket::GenerateOptions;
//!
//! let pricket = pricket::tiny()?;
//! stream(&pricket, "The President of the", &GenerateOptions { max_tokens: 12, ..Default::default() })?;
//! let picture = tokens(&pricket.logprobs("The people of the United States")?)?;
//! assert!(picture.svg()?.contains("United"));
//! next_tokens(&pricket, "The United", 5)?; // as the last value of a cell it is shown
//! # Ok::<(), pricket::Error>(())
//! ```

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use pricket_nn::Progress;

use crate::handle::{Completion, GenerateOptions, Pricket, ScoredToken};
use crate::plots::Picture;
use crate::{Error, Result};

impl Picture {
    /// Shows it as the value of a notebook's cell.
    pub fn evcxr_display(&self) {
        match self.svg() {
            Ok(svg) => println!("EVCXR_BEGIN_CONTENT image/svg+xml\n{svg}\nEVCXR_END_CONTENT"),
            Err(e) => println!("{e}"),
        }
    }
}

impl Pricket {
    /// Says in a line what it is, as the value of a notebook's cell.
    pub fn evcxr_display(&self) {
        let info = self.info();
        println!(
            "{}: {} layers of {}, {} heads, {} tokens, {} parameters in {}",
            info.family, info.layers, info.d_model, info.heads, info.vocab, info.parameters, info.dtype
        );
    }
}

/// The tokens of a text, each shaded by how probable the model thought it: of [`Pricket::logprobs`].
///
/// # Errors
/// [`Error::Input`] if there are none.
pub fn tokens(scored: &[ScoredToken]) -> Result<Picture> {
    Picture::of_tokens(scored.iter().map(|token| (token.text.clone(), f64::from(token.logprob).exp())).collect())
}

/// The `count` likeliest tokens after a prompt, as bars.
///
/// # Errors
/// As [`Pricket::generate`].
pub fn next_tokens(pricket: &Pricket, prompt: &str, count: usize) -> Result<Picture> {
    let ids = pricket.prompt_ids(prompt)?;
    let mut generation = pricket.generation(vec![ids], &GenerateOptions { max_tokens: 1, ..Default::default() })?;
    generation.step()?;
    let logits = generation.logits().first().ok_or_else(|| Error::Input("there is no next token".into()))?;
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f64> = logits.iter().map(|&logit| f64::from(logit - most).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by(|&a, &b| weights[b].total_cmp(&weights[a]));
    let bar = |&id: &usize| Ok((format!("{:?}", pricket.decode(&[id as u32])?), weights[id] / sum));
    Picture::of_bars(order.iter().take(count).map(bar).collect::<Result<Vec<_>>>()?)
}

/// Continues a prompt and prints prompt and continuation as they come, by whole lines of about 80 characters.
///
/// # Errors
/// As [`Pricket::stream`].
pub fn stream(pricket: &Pricket, prompt: &str, options: &GenerateOptions) -> Result<Completion> {
    let mut lines = Lines::default();
    lines.push(prompt);
    let mut stream = pricket.stream(prompt, options)?;
    let outcome = stream.try_for_each(|piece| piece.map(|piece| lines.push(&piece)));
    // Also after an error: what was written by then is there to be read.
    lines.end();
    outcome.map(|()| stream.into_completion())
}

/// Text on its way to whole lines.
#[derive(Default)]
struct Lines(String);

impl Lines {
    const WIDTH: usize = 80;

    fn push(&mut self, text: &str) {
        self.0.push_str(text);
        while let Some((line, rest)) = self.split() {
            println!("{line}");
            self.0 = rest;
        }
    }

    /// A line that is full, and what comes after it.
    fn split(&self) -> Option<(String, String)> {
        let width = self.0.char_indices().nth(Self::WIDTH).map_or(self.0.len(), |(at, _)| at);
        let parted = |at: usize| Some((self.0[..at].into(), self.0[at + 1..].into()));
        if let Some(at) = self.0[..width].find('\n') {
            return parted(at);
        }
        if width == self.0.len() {
            return None;
        }
        // A word that is longer than a line stays whole.
        let before = self.0[..width].rfind(' ').filter(|&at| at > 0);
        parted(before.or_else(|| Some(width + self.0[width..].find([' ', '\n'])?))?)
    }

    fn end(&mut self) {
        if !self.0.is_empty() {
            println!("{}", std::mem::take(&mut self.0));
        }
    }
}

/// A progress of long work in lines of text, one for every tenth of it: a notebook has no terminal to draw a bar on.
#[derive(Debug, Default)]
pub struct PrintedProgress {
    work: Mutex<(String, u64, String)>,
    told: AtomicU64,
}

impl Progress for PrintedProgress {
    fn begin(&self, what: &str, total: u64, unit: &str) {
        if let Ok(mut work) = self.work.lock() {
            *work = (what.into(), total, unit.into());
        }
        self.told.store(0, Ordering::Relaxed);
    }

    fn update(&self, done: u64) {
        let Ok(work) = self.work.lock() else { return };
        let (what, total, unit) = &*work;
        let tenth = (10 * done).checked_div(*total).unwrap_or(0);
        if tenth > self.told.fetch_max(tenth, Ordering::Relaxed) {
            println!("{what}: {done} of {total} {unit}");
        }
    }

    fn notice(&self, message: &str) {
        println!("{message}");
    }

    fn end(&self) {}
}

#[cfg(test)]
mod tests {
    use super::Lines;

    #[test]
    fn lines_are_whole() {
        let mut lines = Lines::default();
        lines.push(&"word ".repeat(30));
        assert!(lines.0.len() <= 80 && lines.split().is_none(), "{:?}", lines.0);
        lines.push("\nanother\nand");
        assert_eq!(lines.0, "and");
        // A word without an end is no reason to break it; what comes after it is broken again.
        lines.push(&"x".repeat(200));
        assert_eq!(lines.0.len(), 203);
        lines.push(" and more");
        assert_eq!(lines.0, "and more");
        // A line that is too long is broken before its end is looked for.
        let long = "word ".repeat(40) + "\n";
        let (line, _) = Lines(long).split().unwrap();
        assert!(line.len() <= 80, "{line}");
    }
}
