//! Samples made from records, with statistics about lengths, truncation and duplicates.

use std::collections::HashMap;

use pricket_lm::{Place, PromptFormat, Tokenizer};

use crate::random::{number_of, shuffled};
use crate::{Error, Record, Result, Sample};

/// How records become samples.
#[derive(Clone, Debug)]
pub struct DatasetOptions {
    /// Prompt format of instructions and conversations.
    pub format: PromptFormat,
    /// Token ids after each response, usually the end token.
    pub end: Vec<u32>,
    /// Maximum number of token ids of a sample, at least 2. Longer samples are truncated.
    pub max_length: usize,
    /// Leaves out samples that repeat an earlier one.
    pub drop_duplicates: bool,
}

/// A kind of sample that deserves a warning: how many there are, and the place of the first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Skipped {
    /// Number of samples.
    pub count: usize,
    /// Place of the first one.
    pub first: Option<Place>,
}

impl Skipped {
    fn add(&mut self, place: &Place) {
        self.count += 1;
        self.first.get_or_insert_with(|| place.clone());
    }
}

/// Statistics of a [`Dataset`]. Lengths are in token ids, after truncation.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Statistics {
    /// Number of samples.
    pub samples: usize,
    /// Number of token ids.
    pub tokens: usize,
    /// Number of token ids that are counted in the loss.
    pub counted: usize,
    /// Shortest, median, 95th percentile and longest length.
    pub lengths: [usize; 4],
    /// Samples truncated to the maximum length.
    pub truncated: Skipped,
    /// Token ids removed by truncation.
    pub removed: usize,
    /// Samples left out because no counted id is within the maximum length.
    pub too_long: Skipped,
    /// Samples left out because their response is blank.
    pub blank: Skipped,
    /// Samples that repeat an earlier one.
    pub duplicates: Skipped,
    /// Place of the sample that the first duplicate repeats.
    pub repeated: Option<Place>,
}

/// Samples of training data, in the order of the records.
///
/// ```
/// use pricket_train::{Dataset, DatasetOptions, Record};
/// # use pricket_lm::{Place, PromptFormat};
/// # let format: PromptFormat = serde_json::from_value(serde_json::json!({
/// #     "name": "plain", "about": "", "user": "{text}\n", "assistant": "{text}\n", "reply": ""}))?;
/// let record = Record::from_json(&serde_json::json!({"input_ids": [5, 6, 7, 8]}))?;
/// let place = Place { path: "data.jsonl".into(), unit: "line", number: 1 };
/// let options = DatasetOptions { format, end: Vec::new(), max_length: 3, drop_duplicates: false };
/// let dataset = Dataset::new(&[(place, record)], None, &options)?;
/// assert_eq!(dataset.samples[0].ids(), [5, 6, 7]);
/// assert_eq!((dataset.statistics.truncated.count, dataset.statistics.removed), (1, 1));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Dataset {
    /// The samples.
    pub samples: Vec<Sample>,
    /// Their statistics.
    pub statistics: Statistics,
}

impl Dataset {
    /// Converts records to samples. Samples without a response are left out and counted in the statistics.
    ///
    /// # Errors
    /// Returns [`Error::Data`] with the place if a record cannot be converted, and [`Error::Input`] if `max_length` is
    /// below 2 or no sample is left.
    pub fn new(records: &[(Place, Record)], tokenizer: Option<&Tokenizer>, options: &DatasetOptions) -> Result<Self> {
        if options.max_length < 2 {
            return Err(Error::Input(format!("the maximum length is {}; expected 2 or more", options.max_length)));
        }
        let (mut samples, mut statistics) = (Vec::new(), Statistics::default());
        let mut seen: HashMap<Sample, usize> = HashMap::new();
        for (i, (place, record)) in records.iter().enumerate() {
            let whole = match record.sample(tokenizer, &options.format, &options.end) {
                Ok(whole) => whole,
                Err(Error::NoResponse) => {
                    statistics.blank.add(place);
                    continue;
                }
                Err(e) => return Err(Error::Data { place: place.clone(), what: e.to_string() }),
            };
            let len = whole.ids().len();
            let sample = whole.truncated(options.max_length);
            if sample.counted() == 0 {
                statistics.too_long.add(place);
                continue;
            }
            if len > options.max_length {
                statistics.truncated.add(place);
                statistics.removed += len - options.max_length;
            }
            if let Some(&earlier) = seen.get(&sample) {
                statistics.duplicates.add(place);
                statistics.repeated.get_or_insert_with(|| records[earlier].0.clone());
                if options.drop_duplicates {
                    continue;
                }
            } else {
                seen.insert(sample.clone(), i);
            }
            samples.push(sample);
        }
        if samples.is_empty() {
            let (blank, long) = (statistics.blank.count, statistics.too_long.count);
            let what = format!(
                "none of {} records can be used: {blank} have no response, and in {long} the response begins after the \
                 maximum length of {} token ids",
                records.len(),
                options.max_length
            );
            return Err(Error::Input(what));
        }
        let mut out = Self { samples, statistics };
        out.measure();
        Ok(out)
    }

    /// Computes the statistics of lengths.
    fn measure(&mut self) {
        let mut lens: Vec<usize> = self.samples.iter().map(|sample| sample.ids().len()).collect();
        lens.sort_unstable();
        let last = lens.len().saturating_sub(1);
        let at = |part: f64| lens.get((part * last as f64).round() as usize).copied().unwrap_or(0);
        self.statistics.lengths = [at(0.0), at(0.5), at(0.95), at(1.0)];
        self.statistics.samples = self.samples.len();
        self.statistics.tokens = lens.iter().sum();
        self.statistics.counted = self.samples.iter().map(Sample::counted).sum();
    }

    /// Takes `count` samples out at random, for evaluation. Equal samples and seeds give equal results.
    ///
    /// # Errors
    /// Returns [`Error::Input`] if this would leave no sample for training.
    pub fn split(&mut self, count: usize, seed: u64) -> Result<Vec<Sample>> {
        let all = self.samples.len();
        if count >= all {
            return Err(Error::Input(format!("{count} of {all} samples are for evaluation; leave one for training")));
        }
        let mut is_taken = vec![false; all];
        for &i in &shuffled(number_of("evaluation", seed), all)[..count] {
            is_taken[i] = true;
        }
        let (mut kept, mut taken) = (Vec::new(), Vec::new());
        for (sample, is_taken) in std::mem::take(&mut self.samples).into_iter().zip(is_taken) {
            if is_taken { taken.push(sample) } else { kept.push(sample) }
        }
        self.samples = kept;
        self.measure();
        Ok(taken)
    }

    /// Returns how many of `samples` are also samples of this dataset.
    pub fn shared(&self, samples: &[Sample]) -> usize {
        let known: std::collections::HashSet<&Sample> = self.samples.iter().collect();
        samples.iter().filter(|sample| known.contains(sample)).count()
    }
}
