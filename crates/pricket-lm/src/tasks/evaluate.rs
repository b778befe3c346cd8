//! Evaluation of a task: prompts with few-shot examples, scoring, and aggregation of the metrics.

use pricket_nn::{CausalLm, Error as NnError};
use serde_json::{Value, json};

use super::generation::{self, Targets};
use super::{Asked, Layout, Metric, Sampler, Task};
use crate::loglikelihood::{Continuation, Loglikelihood, ScoreOptions, loglikelihoods};
use crate::python::Random;
use crate::{Error, Result, Tokenizer};

/// Number of documents scored together: enough to fill batches of similar length, few enough to keep in memory.
const TOGETHER: usize = 1024;

/// Options of [`evaluate`].
#[derive(Clone, Debug)]
pub struct EvalOptions {
    /// Number of few-shot examples before each question. Defaults to the number in the task's definition, usually 0.
    pub shots: Option<usize>,
    /// Random seed of the selection of examples. Defaults to 1234.
    pub seed: u32,
    /// Limit on the number of documents. Defaults to all documents.
    pub limit: Option<Limit>,
    /// Number of bootstrap draws for the standard error of a perplexity. Defaults to 100,000; 0 disables it.
    pub bootstrap: usize,
    /// Token that stands in for an empty context.
    pub prefix: u32,
    /// Ids of the tokens that end a written answer.
    pub end: Vec<u32>,
    /// Whether each document's requests and answers are kept in [`Outcome::samples`].
    pub samples: bool,
    /// Options for scoring continuations.
    pub score: ScoreOptions,
}

/// Limit on the number of documents of a task, counted from the first.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Limit {
    /// Number of documents, at least 1.
    Documents(usize),
    /// Share of all documents, above 0 and below 1. The resulting number is rounded up.
    Share(f64),
}

impl std::fmt::Display for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Limit::Documents(count) => count.fmt(f),
            Limit::Share(share) => share.fmt(f),
        }
    }
}

impl std::str::FromStr for Limit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(count) = text.parse().ok().filter(|&count| count > 0) {
            return Ok(Limit::Documents(count));
        }
        let share = text.parse().ok().filter(|share| (0.0..1.0).contains(share) && *share > 0.0);
        share
            .map(Limit::Share)
            .ok_or_else(|| format!("expected a number of documents or a share such as 0.5, found {text:?}"))
    }
}

impl Limit {
    fn is_possible(&self) -> bool {
        match *self {
            Limit::Documents(count) => count > 0,
            Limit::Share(share) => share > 0.0 && share < 1.0,
        }
    }

    /// Returns the limit as the number that the harness writes to its results.
    pub fn to_json(self) -> Value {
        match self {
            Limit::Documents(count) => json!(count),
            Limit::Share(share) => json!(share),
        }
    }
}

impl Default for EvalOptions {
    /// Returns the defaults of the harness: the task's own number of examples, seed 1234, 100,000 bootstrap draws.
    fn default() -> Self {
        Self {
            shots: None,
            seed: 1234,
            limit: None,
            bootstrap: 100_000,
            prefix: 0,
            end: Vec::new(),
            samples: false,
            score: ScoreOptions::default(),
        }
    }
}

/// Value of a metric with its standard error.
#[derive(Clone, Debug, PartialEq)]
pub struct Figure {
    /// Metric.
    pub metric: Metric,
    /// Name of the list of filters that the written answers went through; `none` for other tasks and without filters.
    pub filter: String,
    /// Value of the metric over all documents.
    pub value: f64,
    /// Standard error. `None` for a single document and for metrics that have no standard error.
    pub stderr: Option<f64>,
}

impl Figure {
    /// Returns the name of the metric, followed by a comma and the name of the filters if there are any.
    pub fn name(&self) -> String {
        figure_name(self.metric, &self.filter)
    }
}

pub(super) fn figure_name(metric: Metric, filter: &str) -> String {
    if filter == "none" { metric.name().into() } else { format!("{},{filter}", metric.name()) }
}

/// Requests, answers and scores of one document.
#[derive(Clone, Debug)]
pub struct Sample {
    /// Zero-based index of the document.
    pub id: usize,
    /// Document.
    pub document: Value,
    /// Index of the correct choice, or the text that was scored.
    pub target: Value,
    /// Context and continuation of each request.
    pub requests: Vec<(String, String)>,
    /// Log-likelihoods of the requests. A text of several windows has several.
    pub answers: Vec<Loglikelihood>,
    /// Written answers, for [`TaskKind::Generation`](super::TaskKind::Generation). Each list of filters has its own
    /// sample.
    pub written: Option<Written>,
    /// Contribution of the document to each metric.
    pub scores: Vec<(Metric, f64)>,
}

/// Answers that the model wrote to a question.
#[derive(Clone, Debug, PartialEq)]
pub struct Written {
    /// All answers.
    pub answers: Vec<String>,
    /// Name of the list of filters.
    pub filter: String,
    /// The answer that the filters leave, which is scored.
    pub filtered: String,
}

/// Result of a task.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Name of the task.
    pub task: String,
    /// Version of the task, or an empty string if it has none.
    pub version: String,
    /// Number of few-shot examples before each question.
    pub shots: usize,
    /// Number of evaluated documents.
    pub documents: usize,
    /// Values of the metrics, in the order of the task.
    pub figures: Vec<Figure>,
    /// Number of requests whose context was truncated on the left to fit the context length.
    pub cut: usize,
    /// Requests and answers of each document. Empty unless [`EvalOptions::samples`] is set.
    pub samples: Vec<Sample>,
}

impl Outcome {
    /// Returns the value of a metric, or `None` if the task does not compute it.
    pub fn get(&self, metric: Metric) -> Option<f64> {
        self.figures.iter().find(|figure| figure.metric == metric).map(|figure| figure.value)
    }
}

/// Evaluates `task` on `documents`, with few-shot examples from `examples`.
///
/// Follows the rules of lm-evaluation-harness 0.4 and computes the same metrics. Random examples are drawn again for
/// each document, with Python's random number generator. Documents are read 1024 at a time to bound memory; a
/// [`Limit::Share`] reads all of them first.
///
/// # Errors
/// Returns [`Error::Input`] if a document does not fit the task, if there are no documents or too few examples, or if
/// an option is invalid. Returns an error if a document cannot be read, and the errors of [`loglikelihoods`].
pub fn evaluate(
    model: &dyn CausalLm,
    tokenizer: &Tokenizer,
    task: &Task,
    documents: impl IntoIterator<Item = Result<Value>>,
    examples: &[Value],
    options: &EvalOptions,
) -> Result<Outcome> {
    let mut shots = Shots::new(task, examples, options)?;
    options.score.check(model)?;
    if let Some(limit) = options.limit.filter(|limit| !limit.is_possible()) {
        return Err(Error::Input(format!("limit: expected at least 1 document or a share below 1, found {limit}")));
    }
    let mut documents = limited(documents.into_iter(), options.limit)?.peekable();
    let mut outcome = Outcome {
        task: task.name.clone(),
        version: task.version(),
        shots: task.shots(options.shots),
        documents: 0,
        figures: Vec::new(),
        cut: 0,
        samples: Vec::new(),
    };
    if task.generation.is_some() {
        return questions(model, tokenizer, task, &mut documents, shots, options, outcome);
    }
    let mut scores: Vec<Vec<(f64, f64)>> = vec![Vec::new(); task.metrics.len()];
    while documents.peek().is_some() {
        if options.score.progress.cancelled() {
            return Err(NnError::Cancelled.into());
        }
        let mut asked = Vec::new();
        let mut requests = Vec::new();
        for document in documents.by_ref().take(TOGETHER) {
            let (document, first) = (document?, requests.len());
            let number = outcome.documents + asked.len();
            let question = task.ask(&document, number)?;
            let described = task.layout.describe.as_ref().map(|describe| describe(&document)).transpose();
            let described = described.map_err(|what| task.wrong(number, &what))?.unwrap_or_default();
            let texts = texts_of(&question, &(described + &shots.draw(&document)?));
            for (context, continuation) in &texts {
                if let Asked::Text { text, .. } = &question {
                    requests.extend(options.score.windows(model, &tokenizer.encode(text)?, options.prefix)?);
                } else {
                    let encoded = Continuation::encode(tokenizer, options.prefix, context, continuation);
                    requests.push(encoded.map_err(|e| match e {
                        Error::Input(what) => task.wrong(number, &what),
                        e => e,
                    })?);
                }
            }
            asked.push((document, question, texts, first..requests.len()));
        }
        let answers = loglikelihoods(model, &requests, &options.score)?;
        outcome.cut += answers.iter().filter(|answer| answer.cut > 0).count();
        for (document, question, texts, range) in asked {
            let answers = &answers[range];
            let found = judge(&question, answers, &task.metrics);
            for (scores, score) in scores.iter_mut().zip(&found) {
                scores.push(*score);
            }
            if options.samples {
                outcome.samples.push(Sample {
                    id: outcome.documents,
                    document,
                    target: target_of(&question),
                    requests: texts,
                    answers: answers.to_vec(),
                    written: None,
                    scores: task.metrics.iter().copied().zip(found.iter().map(|score| score.0)).collect(),
                });
            }
            outcome.documents += 1;
        }
    }
    if outcome.documents == 0 {
        return Err(Error::Input(format!("task {}: no documents to evaluate", task.name)));
    }
    outcome.figures =
        task.metrics.iter().zip(&scores).map(|(&metric, scores)| figure(metric, "none", scores, options)).collect();
    Ok(outcome)
}

/// Evaluates a task whose answers the model writes. `outcome` is empty.
fn questions(
    model: &dyn CausalLm,
    tokenizer: &Tokenizer,
    task: &Task,
    documents: &mut dyn Iterator<Item = Result<Value>>,
    mut shots: Shots<'_>,
    options: &EvalOptions,
    mut outcome: Outcome,
) -> Result<Outcome> {
    let generation = task.generation.as_deref().cloned().unwrap_or_default();
    let mut scores = vec![vec![Vec::new(); task.metrics.len()]; generation.filters.len()];
    loop {
        if options.score.progress.cancelled() {
            return Err(NnError::Cancelled.into());
        }
        let (mut asked, mut contexts) = (Vec::new(), Vec::new());
        for document in documents.take(TOGETHER) {
            let (document, number) = (document?, outcome.documents + asked.len());
            let Asked::Question { context, targets, .. } = task.ask(&document, number)? else {
                return Err(task.wrong(number, "expected a question to answer in writing"));
            };
            let described = task.layout.describe.as_ref().map(|describe| describe(&document)).transpose();
            let described = described.map_err(|what| task.wrong(number, &what))?.unwrap_or_default();
            contexts.push(described + &shots.draw(&document)? + &context);
            asked.push((document, targets));
        }
        if asked.is_empty() {
            break;
        }
        let ends = (options.prefix, &options.end[..]);
        let answers = generation.answers(model, tokenizer, &contexts, ends, &options.score, &mut outcome.cut)?;
        for (((document, targets), context), answers) in asked.into_iter().zip(contexts).zip(answers) {
            let number = outcome.documents;
            for ((name, filters), scores) in generation.filters.iter().zip(&mut scores) {
                let scored = generation::filtered(filters, &answers).and_then(|answer| {
                    let found = generation::scores(&generation, &answer, &targets, &task.metrics)?;
                    Ok((answer, found))
                });
                let (filtered, found) = scored.map_err(|what| task.wrong(number, &what))?;
                for (scores, score) in scores.iter_mut().zip(&found) {
                    scores.push(*score);
                }
                if options.samples {
                    outcome.samples.push(Sample {
                        id: number,
                        document: document.clone(),
                        target: match &targets {
                            Targets::Texts(texts) if texts.len() == 1 => json!(texts[0]),
                            Targets::Texts(texts) => json!(texts),
                            Targets::Spans(spans) => json!(spans),
                        },
                        requests: vec![(context.clone(), String::new())],
                        answers: Vec::new(),
                        written: Some(Written { answers: answers.clone(), filter: name.clone(), filtered }),
                        scores: task.metrics.iter().copied().zip(found.iter().map(|score| score.0)).collect(),
                    });
                }
            }
            outcome.documents += 1;
        }
    }
    if outcome.documents == 0 {
        return Err(Error::Input(format!("task {}: no documents to evaluate", task.name)));
    }
    for ((name, _), scores) in generation.filters.iter().zip(&scores) {
        let figures = task.metrics.iter().zip(scores).map(|(&metric, scores)| figure(metric, name, scores, options));
        outcome.figures.extend(figures);
    }
    Ok(outcome)
}

/// Applies a limit to the documents. A share needs their total number, so it reads all of them first.
fn limited<'a>(
    documents: impl Iterator<Item = Result<Value>> + 'a,
    limit: Option<Limit>,
) -> Result<Box<dyn Iterator<Item = Result<Value>> + 'a>> {
    Ok(match limit {
        None => Box::new(documents),
        Some(Limit::Documents(count)) => Box::new(documents.take(count)),
        Some(Limit::Share(share)) => {
            let all = documents.collect::<Result<Vec<Value>>>()?;
            let count = (all.len() as f64 * share).ceil() as usize;
            Box::new(all.into_iter().take(count).map(Ok))
        }
    })
}

/// Returns the context and continuation of each request of a question. `before` holds the description and the examples.
fn texts_of(question: &Asked, before: &str) -> Vec<(String, String)> {
    match question {
        Asked::Text { text, .. } => vec![(String::new(), text.clone())],
        Asked::Question { context, .. } => vec![(format!("{before}{context}"), String::new())],
        Asked::Continuation { context, continuation } => vec![(format!("{before}{context}"), continuation.clone())],
        Asked::Choices(choices) => {
            let (contexts, continuations) = (&choices.contexts, &choices.continuations);
            (0..contexts.len().max(continuations.len()))
                .map(|i| {
                    let context = &contexts[i.min(contexts.len() - 1)];
                    (format!("{before}{context}"), continuations[i.min(continuations.len() - 1)].clone())
                })
                .collect()
        }
    }
}

fn target_of(question: &Asked) -> Value {
    match question {
        // With several contexts, the harness reports the continuation as the target and the contexts as the choices.
        Asked::Choices(choices) if choices.contexts.len() > 1 => {
            json!(
                choices
                    .continuations
                    .first()
                    .map(|continuation| continuation.strip_prefix(' ').unwrap_or(continuation))
            )
        }
        Asked::Choices(choices) => match choices.answers[..] {
            [answer] => json!(answer),
            ref answers => json!(answers),
        },
        Asked::Continuation { continuation, .. } | Asked::Question { example: continuation, .. } => {
            json!(continuation)
        }
        Asked::Text { text, .. } => json!(text),
    }
}

/// Returns the contribution of a document to each metric, as a value and its weight.
fn judge(question: &Asked, answers: &[Loglikelihood], metrics: &[Metric]) -> Vec<(f64, f64)> {
    let likeliest = |weight: &dyn Fn(usize) -> f64| {
        let mut best = 0;
        for (i, answer) in answers.iter().enumerate() {
            // Ties go to the first choice.
            if answer.sum / weight(i) > answers[best].sum / weight(best) {
                best = i;
            }
        }
        best
    };
    let right = |choice: usize, answers: &[usize]| f64::from(u8::from(answers.contains(&choice)));
    let total: f64 = answers.iter().map(|answer| answer.sum).sum();
    let of = |metric: &Metric| match (metric, question) {
        (Metric::Acc, Asked::Choices(choices)) => (right(likeliest(&|_| 1.0), &choices.answers), 1.0),
        (Metric::AccNorm, Asked::Choices(choices)) => {
            (right(likeliest(&|i| choices.lengths[i].chars as f64), &choices.answers), 1.0)
        }
        (Metric::AccBytes, Asked::Choices(choices)) => {
            (right(likeliest(&|i| choices.lengths[i].bytes as f64), &choices.answers), 1.0)
        }
        (Metric::Acc, _) => (f64::from(u8::from(answers.iter().all(|answer| answer.is_greedy))), 1.0),
        (Metric::WordPerplexity, Asked::Text { words, .. }) => (total, *words as f64),
        (Metric::BytePerplexity | Metric::BitsPerByte, Asked::Text { bytes, .. }) => (total, *bytes as f64),
        _ => (total, 1.0),
    };
    metrics.iter().map(of).collect()
}

fn figure(metric: Metric, filter: &str, scores: &[(f64, f64)], options: &EvalOptions) -> Figure {
    let values: Vec<f64> = scores.iter().map(|score| score.0).collect();
    let weighted = || values.iter().sum::<f64>() / scores.iter().map(|score| score.1).sum::<f64>();
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let (value, stderr) = match metric {
        metric if metric.is_mean() => (mean, Some(deviation(&values) / n.sqrt())),
        Metric::Perplexity => ((-mean).exp(), bootstrap(&values, options.bootstrap)),
        Metric::WordPerplexity | Metric::BytePerplexity => ((-weighted()).exp(), None),
        _ => (-weighted() / std::f64::consts::LN_2, None),
    };
    Figure { metric, filter: filter.into(), value, stderr: stderr.filter(|_| values.len() > 1) }
}

/// Returns the sample standard deviation, with the divisor `n - 1`.
fn deviation(values: &[f64]) -> f64 {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    (values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0)).sqrt()
}

/// Returns the bootstrap standard error of a perplexity: the standard deviation over samples drawn with replacement. As
/// in the harness, each seed yields 1000 draws.
fn bootstrap(values: &[f64], draws: usize) -> Option<f64> {
    if draws == 0 {
        return None;
    }
    let each = draws.min(1000);
    let seeds = draws / each;
    let of_seed = |seed: usize| -> Vec<f64> {
        let mut random = Random::new(seed as u32);
        (0..each)
            .map(|_| {
                let sum: f64 = (0..values.len()).map(|_| values[random.choice(values.len())]).sum();
                (-sum / values.len() as f64).exp()
            })
            .collect()
    };
    let threads: usize = std::thread::available_parallelism().map_or(1, usize::from).min(seeds);
    let share = seeds.div_ceil(threads);
    let of_seeds =
        |worker: usize| -> Vec<f64> { (worker * share..seeds.min((worker + 1) * share)).flat_map(&of_seed).collect() };
    let found: Vec<f64> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|worker| {
                scope.spawn({
                    let of_seeds = &of_seeds;
                    move || of_seeds(worker)
                })
            })
            .collect();
        workers.into_iter().flat_map(|worker| worker.join().unwrap_or_default()).collect()
    });
    Some(deviation(&found))
}

/// Few-shot examples.
struct Shots<'a> {
    count: usize,
    sampler: Sampler,
    random: Random,
    /// Documents to choose from, each with its text as an example.
    pool: Vec<(&'a Value, String)>,
}

impl<'a> Shots<'a> {
    fn new(task: &'a Task, examples: &'a [Value], options: &EvalOptions) -> Result<Self> {
        let count = task.shots(options.shots);
        let mut pool = Vec::new();
        if count > 0 {
            if task.kind == super::TaskKind::Perplexity {
                return Err(Error::Input(format!(
                    "task {}: scoring of whole texts takes no few-shot examples",
                    task.name
                )));
            }
            for (number, document) in task.samples.as_deref().unwrap_or(examples).iter().enumerate() {
                let example = example(task, &task.ask(document, number)?).map_err(|what| task.wrong(number, what))?;
                pool.push((document, example));
            }
            let spare = matches!(task.sampler, Sampler::Random { spare: true } | Sampler::First { spare: true });
            let wanted = count + usize::from(spare);
            if pool.len() < wanted {
                let found = pool.len();
                return Err(Error::Input(format!(
                    "task {}: {count} examples need at least {wanted} documents to choose from, found {found}",
                    task.name
                )));
            }
        }
        Ok(Self { count, sampler: task.sampler, random: Random::new(options.seed), pool })
    }

    /// Returns the text of the examples before a document.
    fn draw(&mut self, document: &Value) -> Result<String> {
        if self.count == 0 {
            return Ok(String::new());
        }
        let chosen = match self.sampler {
            Sampler::First { spare } => {
                let others = (0..self.pool.len()).filter(|&i| !spare || self.pool[i].0 != document);
                self.enough(others.take(self.count).collect())?
            }
            Sampler::Random { spare: false } => self.random.sample(self.pool.len(), self.count),
            Sampler::Random { spare: true } => self.draw_others(document)?,
        };
        Ok(chosen.iter().map(|&i| self.pool[i].1.as_str()).collect())
    }

    /// Returns an error if there are fewer than `count` examples.
    fn enough(&self, found: Vec<usize>) -> Result<Vec<usize>> {
        if found.len() >= self.count {
            return Ok(found);
        }
        let (count, found) = (self.count, found.len());
        Err(Error::Input(format!("expected {count} examples other than the question, found {found}")))
    }

    /// Draws one more example than needed and leaves out the document itself.
    fn draw_others(&mut self, document: &Value) -> Result<Vec<usize>> {
        let drawn = self.random.sample(self.pool.len(), self.count + 1);
        let others: Vec<usize> = drawn.into_iter().filter(|&i| self.pool[i].0 != document).take(self.count).collect();
        if others.len() == self.count {
            return Ok(others);
        }
        // The document occurs more than once in the pool: draw again from the other documents.
        let rest = self.enough((0..self.pool.len()).filter(|&i| self.pool[i].0 != document).collect())?;
        Ok(self.random.sample(rest.len(), self.count).into_iter().map(|i| rest[i]).collect())
    }
}

/// Returns the text of a few-shot example: a question with its answer.
fn example(task: &Task, question: &Asked) -> Result<String, &'static str> {
    let Layout { target_delimiter, example_delimiter, .. } = &task.layout;
    let text = match question {
        Asked::Text { text, .. } => text.clone(),
        // As in the harness: an empty answer gets no delimiters. An answer that begins with a space still gets the
        // target delimiter before it.
        Asked::Continuation { context, continuation } | Asked::Question { context, example: continuation, .. }
            if continuation.is_empty() =>
        {
            return Ok(context.clone());
        }
        Asked::Continuation { context, continuation } | Asked::Question { context, example: continuation, .. } => {
            format!("{context}{target_delimiter}{continuation}")
        }
        Asked::Choices(choices) => {
            let &[answer] = &choices.answers[..] else { return Err("an example has several correct answers") };
            let at = |list: &[String]| list[answer.min(list.len() - 1)].clone();
            at(&choices.contexts) + &at(&choices.continuations)
        }
    };
    Ok(text + example_delimiter)
}
