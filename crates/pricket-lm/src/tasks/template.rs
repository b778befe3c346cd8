//! Task files in TOML, with templates in the language of lm-evaluation-harness.

use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;

use super::builtin::count_words;
use super::generation::{Generation, Targets};
use super::jinja::Templates;
use super::{Asked, Choices, Layout, Metric, Sampler, Task, TaskKind};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    name: String,
    kind: Kind,
    #[serde(default = "one")]
    version: f64,
    /// Template of the context.
    #[serde(default)]
    text: String,
    /// Expression for the list of choices.
    choices: Option<String>,
    /// Expression for the index or the text of the correct choice, or for the text or the texts that a written answer
    /// has to be.
    answer: Option<String>,
    /// Strings that end a written answer.
    until: Option<Vec<String>>,
    /// Maximum number of tokens of a written answer.
    max_tokens: Option<usize>,
    /// Template of the scored text.
    target: Option<String>,
    /// Text before each choice.
    #[serde(default = "space")]
    delimiter: String,
    metrics: Option<Vec<String>>,
    dataset: Option<Dataset>,
    #[serde(default = "validation")]
    split: Split,
    #[serde(default)]
    examples: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Dataset {
    repo: String,
    config: Option<String>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    MultipleChoice,
    Loglikelihood,
    Perplexity,
    Generation,
}

#[derive(Deserialize, PartialEq)]
#[serde(rename_all = "snake_case")]
enum Split {
    Validation,
    Test,
}

fn one() -> f64 {
    1.0
}

fn space() -> String {
    " ".into()
}

fn validation() -> Split {
    Split::Validation
}

pub(super) fn parse(text: &str) -> Result<Task, String> {
    let file: File = toml::from_str(text).map_err(|e| e.to_string())?;
    let kind = match file.kind {
        Kind::MultipleChoice => TaskKind::MultipleChoice,
        Kind::Loglikelihood => TaskKind::Loglikelihood,
        Kind::Perplexity => TaskKind::Perplexity,
        Kind::Generation => TaskKind::Generation,
    };
    if kind != TaskKind::Generation && (file.until.is_some() || file.max_tokens.is_some()) {
        return Err("until and max_tokens have an effect only with the kind generation".into());
    }
    let mut generation = Generation::default();
    generation.until = file.until.unwrap_or_else(|| vec!["\n\n".into()]);
    generation.max_tokens = file.max_tokens.unwrap_or(generation.max_tokens);
    if generation.max_tokens == 0 {
        return Err("max_tokens: expected at least 1, found 0".into());
    }
    let metrics = match &file.metrics {
        Some(names) => names
            .iter()
            .map(|name| Metric::named(name, kind))
            .collect::<Result<_, _>>()
            .map_err(|e| format!("metrics: {e}"))?,
        None => kind.defaults().to_vec(),
    };
    let missing = |key: &str| format!("the key {key} is missing; tasks of this kind require it");
    let mut templates = Templates::new()?;
    templates.add("text", file.text)?;
    match file.kind {
        Kind::MultipleChoice => {
            for (key, source) in [("choices", &file.choices), ("answer", &file.answer)] {
                templates.check(key, source.as_ref().ok_or_else(|| missing(key))?)?;
            }
        }
        Kind::Generation => templates.check("answer", file.answer.as_ref().ok_or_else(|| missing("answer"))?)?,
        Kind::Loglikelihood | Kind::Perplexity => {
            templates.add("target", file.target.clone().ok_or_else(|| missing("target"))?)?;
        }
    }
    let asked = Asker {
        templates,
        kind,
        choices: file.choices.unwrap_or_default(),
        answer: file.answer.unwrap_or_default(),
        delimiter: file.delimiter,
    };
    let has_test = file.split == Split::Test;
    Ok(Task {
        definition: text.to_owned(),
        name: file.name,
        version: file.version.into(),
        kind,
        metrics,
        split: if has_test { "test" } else { "validation" }.into(),
        examples_split: file.examples.then(|| "train".into()),
        sampler: Sampler::Random { spare: !has_test },
        layout: Layout::default(),
        samples: None,
        generation: (kind == TaskKind::Generation).then(|| Arc::new(generation)),
        shots: None,
        files: None,
        dataset: file.dataset.map(|dataset| (dataset.repo, dataset.config)),
        ask: Arc::new(move |document| asked.ask(document)),
    })
}

struct Asker {
    templates: Templates,
    kind: TaskKind,
    choices: String,
    answer: String,
    delimiter: String,
}

impl Asker {
    fn ask(&self, document: &Value) -> Result<Asked, String> {
        match self.kind {
            TaskKind::Perplexity => {
                let text = self.templates.render("target", document)?;
                let (words, bytes) = (count_words(&text), text.len());
                Ok(Asked::Text { text, words, bytes })
            }
            TaskKind::Loglikelihood => Ok(Asked::Continuation {
                context: self.templates.render("text", document)?,
                continuation: self.templates.render("target", document)?,
            }),
            TaskKind::Generation => {
                let found = self.templates.evaluate("answer", &self.answer, document)?;
                let one = found.as_str().map(|text| vec![text.to_owned()]);
                let targets = one.or_else(|| super::texts(&found)).filter(|texts| !texts.is_empty());
                let targets = targets.ok_or_else(|| format!("answer: expected a string or strings, found {found}"))?;
                let (context, example) = (self.templates.render("text", document)?, targets[0].clone());
                Ok(Asked::Question { context, targets: Targets::Texts(targets), example })
            }
            TaskKind::MultipleChoice => {
                let found = self.templates.evaluate("choices", &self.choices, document)?;
                let texts = super::texts(&found)
                    .ok_or_else(|| format!("choices: expected a list of strings, found {found}"))?;
                let found = self.templates.evaluate("answer", &self.answer, document)?;
                let answer = match &found {
                    Value::String(text) => texts.iter().position(|choice| choice == text).or_else(|| text.parse().ok()),
                    other => other.as_u64().map(|n| n as usize),
                };
                let answer = answer.filter(|&answer| answer < texts.len());
                let answer =
                    answer.ok_or_else(|| format!("answer: {found} is not one of the {} choices", texts.len()))?;
                let context = self.templates.render("text", document)?;
                Ok(Asked::Choices(Choices::new(vec![context], &self.delimiter, &texts, vec![answer])))
            }
        }
    }
}
