//! Reading the examples, and describing them before the run starts.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use pricket::lm::{Place, Tokenizer};
use pricket::train::{Dataset, DatasetOptions, Recipe, Record, Sample, Skipped, Statistics, best_fit, read_records};
use pricket::weights::counted;
use pricket::{Hub, Pricket};

use crate::common::{Bar, tell};

/// Maximum number of characters of each part of the printed example.
const SHOWN: usize = 600;

/// Returns the files of `--data` or `--eval-data`: files themselves, or fetched from the Hub.
pub(crate) fn files(names: &[String], split: &str) -> anyhow::Result<Vec<PathBuf>> {
    let mut out = Vec::new();
    for name in names {
        let path = Path::new(name);
        let ends = ["jsonl", "json", "parquet", "gz", "zst", "ndjson"];
        let is_file = path.exists() || path.extension().is_some_and(|end| ends.iter().any(|known| end == *known));
        let id = name.strip_prefix("datasets/").unwrap_or(name).split([':', '@']).next().unwrap_or_default();
        let is_id = id.split('/').count() == 2 && !name.starts_with(['.', '/']);
        if is_file || !is_id {
            ensure!(!path.is_dir(), "{name}: is a directory; expected a file or a dataset of the Hub");
            out.push(path.to_owned());
        } else {
            let fetched = pricket::text::fetch_dataset(name, split, &Hub::from_env()?, &Bar::default());
            out.extend(fetched.with_context(|| format!("{name}: no such file; tried as a dataset of the Hub"))?);
        }
    }
    Ok(out)
}

/// The samples of a run.
pub(crate) struct Data {
    pub(crate) training: Dataset,
    pub(crate) evaluation: Vec<Sample>,
    options: DatasetOptions,
}

impl Data {
    /// Converts the examples of the recipe to samples.
    pub(crate) fn new(recipe: &Recipe, pricket: &Pricket, records: &[(Place, Record)]) -> anyhow::Result<Self> {
        let mut options = pricket.dataset_options();
        if let Some(name) = recipe.prompt_format.as_deref().filter(|name| *name != "auto") {
            options.format = pricket::text::prompt_format(name)?;
        }
        let limit = pricket.info().context.unwrap_or(usize::MAX);
        options.max_length = recipe.max_length.unwrap_or(options.max_length);
        options.drop_duplicates = recipe.drop_duplicates;
        ensure!(options.max_length >= 2, "--max-length is {}; expected 2 or more", options.max_length);
        ensure!(options.max_length <= limit, "--max-length is {}; the model's context is {limit}", options.max_length);
        if let Some(pack) = recipe.pack {
            let is_default = recipe.max_length.is_none();
            ensure!(
                is_default || options.max_length <= pack,
                "--max-length is {}, but --pack is {pack}",
                options.max_length
            );
            options.max_length = options.max_length.min(pack);
        }
        if recipe.no_end_token {
            options.end.clear();
        }
        let tokenizer = pricket.tokenizer().ok();
        let mut training = Dataset::new(records, tokenizer, &options).context("--data")?;
        let evaluation = match recipe.eval_examples {
            Some(count) if count > 0 => training.split(count, recipe.seed)?,
            _ if !recipe.eval_data.is_empty() => {
                let files = self::files(&recipe.eval_data, recipe.eval_split.as_deref().unwrap_or("validation"))?;
                let dataset = Dataset::new(&read_records(&files)?, tokenizer, &options).context("--eval-data")?;
                warn(&dataset.statistics, &options, "evaluation: ");
                dataset.samples
            }
            _ => Vec::new(),
        };
        Ok(Self { training, evaluation, options })
    }

    /// Prints statistics, warnings, and the first example with its loss mask.
    pub(crate) fn describe(&self, tokenizer: Option<&Tokenizer>, pack: Option<usize>) {
        let statistics = &self.training.statistics;
        let [shortest, median, most, longest] = statistics.lengths;
        tell(format_args!(
            "{}, {} ({} counted in the loss); lengths {shortest} to {longest}, median {median}, 95 % up to {most}; \
             prompt format {}",
            counted(statistics.samples, "example"),
            counted(statistics.tokens, "token"),
            statistics.counted,
            self.options.format.name
        ));
        if let Some(capacity) = pack {
            let lens: Vec<usize> = self.training.samples.iter().map(|sample| sample.ids().len()).collect();
            let packs = best_fit(&lens, capacity).len();
            let full = 100.0 * statistics.tokens as f64 / (packs * capacity) as f64;
            tell(format_args!("{} of at most {capacity} tokens, {full:.1} % full", counted(packs, "pack")));
        }
        if !self.evaluation.is_empty() {
            let shared = self.training.shared(&self.evaluation);
            tell(format_args!("{} for evaluation", counted(self.evaluation.len(), "example")));
            if shared > 0 {
                tell(format_args!("warning: {} for evaluation also used for training", counted(shared, "example")));
            }
        }
        warn(statistics, &self.options, "");
        if let (Some(tokenizer), Some(sample)) = (tokenizer, self.training.samples.first()) {
            show(sample, tokenizer);
        }
    }
}

/// Prints a warning for each kind of example that was changed, left out or repeated. `of` begins each warning.
fn warn(statistics: &Statistics, options: &DatasetOptions, of: &str) {
    let tell_of = |skipped: &Skipped, what: &str| {
        if let Some(first) = &skipped.first {
            tell(format_args!("warning: {of}{} {what}; the first is {first}", counted(skipped.count, "example")));
        }
    };
    let (limit, removed) = (options.max_length, counted(statistics.removed, "token"));
    tell_of(&statistics.truncated, &format!("truncated to {limit} tokens ({removed} removed)"));
    tell_of(&statistics.too_long, &format!("left out, because the prompt alone has {limit} tokens or more"));
    tell_of(&statistics.blank, "left out, because the response is empty");
    let kept = if options.drop_duplicates { "left out" } else { "kept; --drop-duplicates leaves them out" };
    let repeated = statistics.repeated.as_ref().map(|place| format!(" (it repeats {place})")).unwrap_or_default();
    if let Some(first) = &statistics.duplicates.first {
        let count = counted(statistics.duplicates.count, "duplicate");
        tell(format_args!("warning: {of}{count} {kept}; the first is {first}{repeated}"));
    }
}

/// Prints an example. Lines that begin with `>` are counted in the loss.
fn show(sample: &Sample, tokenizer: &Tokenizer) {
    tell(format_args!(
        "first example, {} of {} counted in the loss (lines marked >):",
        sample.counted(),
        counted(sample.ids().len(), "token")
    ));
    for (ids, is_counted) in sample.runs() {
        let text = tokenizer.decode_part(ids);
        let mark = if is_counted { '>' } else { '|' };
        let characters = text.chars().count();
        let (head, tail): (String, String) = if characters > SHOWN {
            (text.chars().take(SHOWN / 2).collect(), text.chars().skip(characters - SHOWN / 2).collect())
        } else {
            (text, String::new())
        };
        let lines = |text: &str| {
            for line in text.lines() {
                tell(format_args!("  {mark} {line}"));
            }
        };
        lines(&head);
        if !tail.is_empty() {
            tell(format_args!("  {mark} ... {} characters ...", characters - SHOWN));
            lines(&tail);
        }
    }
}
