//! Tasks of one's own: a small TOML with templates in the language that the harness's tasks are written in.

use std::sync::Arc;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, UndefinedBehavior};
use serde::Deserialize;
use serde_json::Value;

use super::builtin::count_words;
use super::{Asked, Choices, Metric, Task, TaskKind};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    name: String,
    kind: Kind,
    #[serde(default = "one")]
    version: f64,
    /// What is given: a template.
    #[serde(default)]
    text: String,
    /// An expression that is a list of texts.
    choices: Option<String>,
    /// An expression that is the number of the right choice, or its text.
    answer: Option<String>,
    /// What is scored: a template.
    target: Option<String>,
    /// Stands before every choice.
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
    let (kind, all) = match file.kind {
        Kind::MultipleChoice => (TaskKind::MultipleChoice, &[Metric::Acc, Metric::AccNorm][..]),
        Kind::Loglikelihood => (TaskKind::Loglikelihood, &[Metric::Perplexity, Metric::Acc][..]),
        Kind::Perplexity => {
            (TaskKind::Perplexity, &[Metric::WordPerplexity, Metric::BytePerplexity, Metric::BitsPerByte][..])
        }
    };
    let metric = |name: &String| {
        let names = || all.iter().map(|metric| metric.name()).collect::<Vec<_>>().join(", ");
        let found = all.iter().copied().find(|metric| metric.name() == name);
        found.ok_or_else(|| format!("metrics: {name:?} is none of {}, which this kind has", names()))
    };
    let metrics = match &file.metrics {
        Some(names) => names.iter().map(metric).collect::<Result<_, _>>()?,
        None => all.to_vec(),
    };
    let missing = |key: &str| format!("a task of this kind needs {key}");
    let mut templates = Environment::new();
    // A key that no document has is a mistake, not an empty text.
    templates.set_undefined_behavior(UndefinedBehavior::Strict);
    let syntax = SyntaxConfig::builder().keep_trailing_newline(true).build();
    templates.set_syntax(syntax.map_err(|e| e.to_string())?);
    templates.add_template_owned("text", file.text).map_err(|e| format!("text: {e:#}"))?;
    match file.kind {
        Kind::MultipleChoice => {
            for (key, source) in [("choices", &file.choices), ("answer", &file.answer)] {
                let source = source.as_ref().ok_or_else(|| missing(key))?;
                templates.compile_expression(source).map_err(|e| format!("{key}: {e:#}"))?;
            }
        }
        Kind::Loglikelihood | Kind::Perplexity => {
            let target = file.target.clone().ok_or_else(|| missing("target"))?;
            templates.add_template_owned("target", target).map_err(|e| format!("target: {e:#}"))?;
        }
    }
    let asked = Asker {
        templates,
        kind: file.kind,
        choices: file.choices.unwrap_or_default(),
        answer: file.answer.unwrap_or_default(),
        delimiter: file.delimiter,
    };
    Ok(Task {
        definition: text.to_owned(),
        name: file.name,
        version: file.version,
        kind,
        metrics,
        has_test: file.split == Split::Test,
        has_train: file.examples,
        dataset: file.dataset.map(|dataset| (dataset.repo, dataset.config)),
        ask: Arc::new(move |document| asked.ask(document)),
    })
}

struct Asker {
    templates: Environment<'static>,
    kind: Kind,
    choices: String,
    answer: String,
    delimiter: String,
}

impl Asker {
    fn render(&self, name: &str, document: &Value) -> Result<String, String> {
        let template = self.templates.get_template(name).map_err(|e| format!("{name}: {e:#}"))?;
        template.render(minijinja::Value::from(Serde(document))).map_err(|e| format!("{name}: {e:#}"))
    }

    fn evaluate(&self, key: &str, source: &str, document: &Value) -> Result<Value, String> {
        let expression = self.templates.compile_expression(source).map_err(|e| format!("{key}: {e:#}"))?;
        let value = expression.eval(minijinja::Value::from(Serde(document))).map_err(|e| format!("{key}: {e:#}"))?;
        serde_json::to_value(value).map_err(|e| format!("{key}: {e}"))
    }

    fn ask(&self, document: &Value) -> Result<Asked, String> {
        match self.kind {
            Kind::Perplexity => {
                let text = self.render("target", document)?;
                let (words, bytes) = (count_words(&text), text.len());
                Ok(Asked::Text { text, words, bytes })
            }
            Kind::Loglikelihood => Ok(Asked::Continuation {
                context: self.render("text", document)?,
                continuation: self.render("target", document)?,
            }),
            Kind::MultipleChoice => {
                let found = self.evaluate("choices", &self.choices, document)?;
                let texts: Option<Vec<String>> = found
                    .as_array()
                    .map(|list| list.iter().map(|choice| choice.as_str().map(str::to_owned)).collect())
                    .unwrap_or_default();
                let texts = texts.ok_or_else(|| format!("choices: expected a list of texts, found {found}"))?;
                let found = self.evaluate("answer", &self.answer, document)?;
                let answer = match &found {
                    Value::String(text) => texts.iter().position(|choice| choice == text).or_else(|| text.parse().ok()),
                    other => other.as_u64().map(|n| n as usize),
                };
                let answer = answer.filter(|&answer| answer < texts.len());
                let answer = answer.ok_or_else(|| format!("answer: {found} is none of {} choices", texts.len()))?;
                Ok(Asked::Choices(Choices {
                    contexts: vec![self.render("text", document)?],
                    continuations: texts.iter().map(|choice| format!("{}{choice}", self.delimiter)).collect(),
                    lengths: texts.iter().map(|choice| choice.chars().count()).collect(),
                    answer,
                }))
            }
        }
    }
}
