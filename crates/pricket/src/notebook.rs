//! Output for notebooks: pictures and tables as cell values, text streamed in whole lines, progress without a terminal.
//!
//! The evcxr kernel displays a value by calling its method `evcxr_display`. It displays one item of each content type
//! per cell; [`Picture::of_pictures`] combines several pictures. If a cell's output ends in the middle of a line, evcxr
//! waits forever, so all functions here print whole lines. See `docs/notebooks.md`.
//!
//! ```
//! use pricket::notebook::{next_tokens, stream, tokens};
//! use pricket::GenerateOptions;
//!
//! let pricket = pricket::tiny()?;
//! stream(&pricket, "The President of the", &GenerateOptions { max_tokens: 12, ..Default::default() })?;
//! let picture = tokens(&pricket.logprobs("The people of the United States")?)?;
//! assert!(picture.svg()?.contains("United"));
//! next_tokens(&pricket, "The United", 5)?; // displayed if it is the last value of a cell
//! # Ok::<(), pricket::Error>(())
//! ```

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use pricket_nn::Progress;

use crate::text::handle::{Completion, Pricket};
use crate::{Error, Result};
use pricket_lm::Comparison;
use pricket_lm::{GenerateOptions, ScoredToken};
#[cfg(feature = "train")]
use pricket_plots::{Curve, Curves, Layout, Point, XAxis};
use pricket_plots::{Picture, Table};

/// Maximum number of rows of a table. A final row gives the number of omitted rows.
const ROWS: usize = 200;

/// Values that a notebook displays as a table. If the trait is in scope (the prelude exports it), the last value of a
/// cell is displayed.
pub trait Tabular {
    /// Returns the table.
    fn table(&self) -> Table;

    /// Shows the table as the value of a notebook's cell.
    fn evcxr_display(&self) {
        self.table().evcxr_display();
    }
}

fn table(columns: &[&str], rows: Vec<Vec<String>>) -> Table {
    Table { title: String::new(), columns: columns.iter().map(|&name| name.to_owned()).collect(), rows }
}

fn pairs(pairs: Vec<(&str, String)>) -> Table {
    table(&["", "value"], pairs.into_iter().map(|(name, value)| vec![name.to_owned(), value]).collect())
}

impl Tabular for [ScoredToken] {
    fn table(&self) -> Table {
        let row = |token: &ScoredToken| {
            let (logprob, greedy) = (token.logprob, if token.is_greedy { "yes" } else { "no" });
            let probability = format!("{:.4}", logprob.exp());
            vec![format!("{:?}", token.text), token.id.to_string(), format!("{logprob:.4}"), probability, greedy.into()]
        };
        let mut rows: Vec<Vec<String>> = self.iter().take(ROWS).map(row).collect();
        if self.len() > ROWS {
            rows.push(vec![
                format!("{} more", self.len() - ROWS),
                String::new(),
                String::new(),
                String::new(),
                String::new(),
            ]);
        }
        table(&["token", "id", "log-probability", "probability", "top-1"], rows)
    }
}

#[cfg(feature = "train")]
impl Tabular for pricket_train::Statistics {
    fn table(&self) -> Table {
        let [shortest, median, most, longest] = self.lengths;
        pairs(vec![
            ("examples", self.samples.to_string()),
            ("tokens", self.tokens.to_string()),
            ("counted in the loss", self.counted.to_string()),
            ("shortest, median, longest", format!("{shortest}, {median}, {longest}")),
            ("95 % of the lengths up to", most.to_string()),
            ("truncated", self.truncated.count.to_string()),
            ("left out: prompt too long", self.too_long.count.to_string()),
            ("left out: empty response", self.blank.count.to_string()),
            ("duplicates", self.duplicates.count.to_string()),
        ])
    }
}

#[cfg(feature = "train")]
impl Tabular for pricket_train::TrainMemory {
    fn table(&self) -> Table {
        let size = |bytes: u64| format!("{:.1} MB", bytes as f64 / 1e6);
        pairs(vec![
            ("trained parameters", size(self.parameters)),
            ("gradients", size(self.gradients)),
            ("optimizer", size(self.optimizer)),
            ("inputs of the blocks", size(self.block_inputs)),
            ("activations", size(self.activations)),
            ("head and loss", size(self.head)),
            ("total without the base model", size(self.total())),
            ("tokens per micro-batch", self.micro_batch_tokens.to_string()),
        ])
    }
}

impl Tabular for Completion {
    fn table(&self) -> Table {
        let logprobs = self.logprobs.iter().map(|&logprob| f64::from(logprob));
        let count = self.logprobs.len();
        let mean = if count == 0 { "-".into() } else { format!("{:.4}", logprobs.sum::<f64>() / count as f64) };
        pairs(vec![
            ("text", format!("{:?}", self.text)),
            ("end", self.finish.to_string()),
            ("prompt tokens", self.prompt_ids.len().to_string()),
            ("generated tokens", self.ids.len().to_string()),
            ("mean log-probability", mean),
        ])
    }
}

impl Tabular for Comparison {
    fn table(&self) -> Table {
        pairs(vec![
            ("tokens", self.tokens.to_string()),
            ("perplexity of the reference", format!("{:.4}", self.reference_perplexity)),
            ("perplexity", format!("{:.4}", self.perplexity)),
            ("KL divergence (nats per token)", format!("{:.6}", self.kl_divergence)),
            ("largest KL divergence", format!("{:.4}", self.worst_kl_divergence)),
            ("top-1 agreement", format!("{:.2} %", 100.0 * self.top_1_agreement)),
        ])
    }
}

impl Pricket {
    /// Prints a one-line description of the model as the value of a notebook cell.
    pub fn evcxr_display(&self) {
        let info = self.info();
        println!(
            "{}: {} layers of {}, {} heads, {} tokens, {} parameters in {}",
            info.family, info.layers, info.d_model, info.heads, info.vocab, info.parameters, info.dtype
        );
    }
}

/// Draws the tokens of a text, shaded by their probability. `scored` is the result of [`Pricket::logprobs`].
///
/// # Errors
/// Returns [`Error::Picture`] if there are no tokens.
pub fn tokens(scored: &[ScoredToken]) -> Result<Picture> {
    let tokens = scored.iter().map(|token| (token.text.clone(), f64::from(token.logprob).exp()));
    Ok(Picture::of_tokens(tokens.collect())?)
}

/// Draws the `count` most probable tokens after a prompt as bars.
///
/// # Errors
/// Returns the errors of [`Pricket::generate`].
pub fn next_tokens(pricket: &Pricket, prompt: &str, count: usize) -> Result<Picture> {
    let ids = pricket.encode_prompt(prompt)?;
    let mut generation = pricket.generation(vec![ids], &GenerateOptions { max_tokens: 1, ..Default::default() })?;
    generation.step()?;
    let logits = generation.logits().first().ok_or_else(|| Error::Empty("there is no next token"))?;
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f64> = logits.iter().map(|&logit| f64::from(logit - most).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by(|&a, &b| weights[b].total_cmp(&weights[a]));
    let bar = |&id: &usize| Ok((format!("{:?}", pricket.tokenizer()?.decode_part(&[id as u32])), weights[id] / sum));
    Ok(Picture::of_bars(order.iter().take(count).map(bar).collect::<Result<Vec<_>>>()?)?)
}

/// Continues a prompt and prints prompt and continuation as they are generated, in whole lines of about 80 characters.
///
/// # Errors
/// Returns the errors of [`Pricket::stream`].
pub fn stream(pricket: &Pricket, prompt: &str, options: &GenerateOptions) -> Result<Completion> {
    let mut lines = Lines::default();
    lines.push(prompt);
    let mut stream = pricket.stream(prompt, options)?;
    let outcome = stream.try_for_each(|piece| piece.map(|piece| lines.push(&piece)));
    // Also after an error, so that the text so far is visible.
    lines.end();
    outcome.map(|()| stream.into_completion())
}

/// A buffer that prints text in whole lines.
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

    /// Returns the first full line and the text after it.
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

/// Progress printed as lines of text, one for every tenth of the work, with the estimated time left. evcxr cannot
/// change a printed line, so there is no moving bar.
#[derive(Debug)]
pub struct PrintedProgress {
    work: Mutex<(String, u64, String, Instant)>,
    told: AtomicU64,
}

impl Default for PrintedProgress {
    fn default() -> Self {
        Self { work: Mutex::new((String::new(), 0, String::new(), Instant::now())), told: AtomicU64::new(0) }
    }
}

impl Progress for PrintedProgress {
    fn begin(&self, what: &str, total: u64, unit: &str) {
        if let Ok(mut work) = self.work.lock() {
            *work = (what.into(), total, unit.into(), Instant::now());
        }
        self.told.store(0, Ordering::Relaxed);
    }

    fn update(&self, done: u64) {
        let Ok(work) = self.work.lock() else { return };
        let (what, total, unit, start) = &*work;
        let tenth = (10 * done).checked_div(*total).unwrap_or(0);
        if tenth > self.told.fetch_max(tenth, Ordering::Relaxed) {
            let left = start.elapsed().as_secs_f64() * total.saturating_sub(done) as f64 / done.max(1) as f64;
            let bar = "#".repeat(tenth.min(10) as usize);
            println!("{what} [{bar:10}] {done} of {total} {unit}, {left:.0} s left");
        }
    }

    fn notice(&self, message: &str) {
        println!("{message}");
    }

    fn end(&self) {}
}

/// The losses of a training run: printed while it trains, and drawn as a picture.
///
/// evcxr displays pictures at the end of a cell, so the curve of a running cell is text: a line with a bar for every
/// twentieth of the run and for every evaluation.
///
/// ```
/// use pricket::notebook::LossCurve;
/// let mut curve = LossCurve::new(100);
/// curve.add(1, 6.0, None);
/// curve.add(100, 0.2, Some(0.3)); // prints: step 100 of 100  loss 0.20  evaluation 0.30  ##
/// assert!(curve.picture()?.svg()?.contains("evaluation"));
/// # Ok::<(), pricket::Error>(())
/// ```
#[cfg(feature = "train")]
#[derive(Clone, Debug, Default)]
pub struct LossCurve {
    total: u64,
    training: Vec<Point>,
    evaluation: Vec<Point>,
}

#[cfg(feature = "train")]
impl LossCurve {
    /// Maximum number of points of the training curve. Each is the mean of several steps.
    const POINTS: usize = 100;

    /// Creates an empty curve of a run of `total` training steps.
    pub fn new(total: u64) -> Self {
        Self { total, ..Self::default() }
    }

    /// Adds a training step, and prints it if it is a twentieth of the run, the first or last step, or was evaluated.
    pub fn push(&mut self, report: &pricket_train::StepReport) {
        self.add(report.step, report.loss, report.eval_loss);
    }

    /// Adds the losses of a training step, as [`LossCurve::push`] does.
    pub fn add(&mut self, step: u64, loss: f64, eval_loss: Option<f64>) {
        self.training.push(Point::new(step as f64, loss));
        if let Some(loss) = eval_loss {
            self.add_evaluation(step, loss);
        }
        let is_shown = step == 1 || step == self.total || step.is_multiple_of((self.total / 20).max(1));
        if self.total > 0 && (is_shown || eval_loss.is_some()) {
            let (total, width) = (self.total, self.total.to_string().len());
            let evaluation = eval_loss.map_or_else(String::new, |loss| format!("  evaluation {loss:.2}"));
            let most = self.training.iter().map(|point| point.value).fold(f64::MIN_POSITIVE, f64::max);
            let bar = "#".repeat((50.0 * loss / most).round() as usize);
            println!("step {step:width$} of {total}  loss {loss:.2}{evaluation:18}  {bar}");
        }
    }

    /// Adds an evaluation without printing it, such as the one before the first step.
    pub fn add_evaluation(&mut self, step: u64, loss: f64) {
        self.evaluation.push(Point::new(step as f64, loss));
    }

    /// Draws the training and the evaluation loss over the training steps.
    ///
    /// # Errors
    /// Returns [`Error::Picture`] if there are no losses.
    pub fn picture(&self) -> Result<Picture> {
        let mean = |points: &[Point]| {
            let of = |value: fn(&Point) -> f64| points.iter().map(value).sum::<f64>() / points.len() as f64;
            Point::new(of(|point| point.step), of(|point| point.value))
        };
        let training = self.training.chunks(self.training.len().div_ceil(Self::POINTS).max(1)).map(mean).collect();
        let curves = [("training", training), ("evaluation", self.evaluation.clone())];
        let curves = curves.into_iter().filter(|(_, points)| !points.is_empty());
        let panel = Curves {
            x: XAxis::Linear("training step".into()),
            y: "loss (nats per token)".into(),
            curves: curves.map(|(label, points)| Curve::new(label, points)).collect(),
            ..Curves::default()
        };
        let layout = Layout { panel: (640, 400), ..Layout::default() };
        Ok(Picture::of_curves_in(vec![panel], &layout)?)
    }

    /// Shows the picture as the value of a notebook's cell.
    pub fn evcxr_display(&self) {
        match self.picture() {
            Ok(picture) => picture.evcxr_display(),
            Err(e) => println!("{e}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{GenerateOptions, Lines, Tabular};
    use crate::plots::{Curve, Curves, Picture, Point};

    /// Every value has a text form in addition to its picture or table.
    #[test]
    fn values_are_shown_as_tables_and_as_text() {
        let tiny = crate::loading::load::tiny().unwrap();
        let scored = tiny.score("The <b> & the people", &crate::ScoreOptions::default()).unwrap();
        let (text, html) = (scored.table().text(), scored.table().html());
        assert_eq!(text.lines().count(), scored.len() + 1);
        assert!(text.starts_with("token") && text.contains("log-probability"), "{text}");
        assert!(html.starts_with("<table>") && html.contains("&lt;") && !html.contains("<b>"), "{html}");
        assert_eq!(vec![scored[0].clone(); 250].table().rows.len(), 201);
        let options = GenerateOptions { max_tokens: 3, ..Default::default() };
        let text = tiny.generate("The people of the United", &options).unwrap().table().text();
        assert!(
            text.contains("ended by the maximum number of tokens") && text.contains("generated tokens      3"),
            "{text}"
        );
        let text = tiny.compare(&tiny, "The people", &crate::ScoreOptions::default()).unwrap().table().text();
        assert!(text.contains("top-1 agreement                 100.00 %"), "{text}");
        let curve = Curve::new("tiny", vec![Point::new(64.0, 4.5), Point::new(0.0, 7.5), Point::new(1.0, f64::NAN)]);
        let panel = Curves { y: "loss".into(), curves: vec![curve], ..Curves::default() };
        let picture = Picture::of_curves(vec![panel]).unwrap();
        assert_eq!(picture.text(), "loss\n  tiny: 2 points, 7.5000 at step 0 to 4.5000 at step 64");
        assert!(super::tokens(&scored).unwrap().text().contains("probability"));
    }

    #[test]
    fn lines_are_whole() {
        let mut lines = Lines::default();
        lines.push(&"word ".repeat(30));
        assert!(lines.0.len() <= 80 && lines.split().is_none(), "{:?}", lines.0);
        lines.push("\nanother\nand");
        assert_eq!(lines.0, "and");
        // A word longer than a line is not broken; the text after it is.
        lines.push(&"x".repeat(200));
        assert_eq!(lines.0.len(), 203);
        lines.push(" and more");
        assert_eq!(lines.0, "and more");
        // A long line is broken even if it ends with a newline.
        let long = "word ".repeat(40) + "\n";
        let (line, _) = Lines(long).split().unwrap();
        assert!(line.len() <= 80, "{line}");
    }
}
