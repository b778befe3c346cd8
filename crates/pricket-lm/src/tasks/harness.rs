//! Task files of lm-evaluation-harness: YAML, with the semantics of version 0.4.13.
//!
//! No Python is executed. A file that names a Python function is rejected, unless a built-in task implements that
//! function.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use serde_json::Value;
use sha2::{Digest, Sha256};
use yaml_serde::Value as Yaml;

use super::builtin::{self, count_words};
use super::generation::{ExactMatch, Filter, Generation, Targets, python_regex};
use super::jinja::Templates;
use super::yaml;
use super::{Asked, Choices, Describe, Layout, Metric, Sampler, Task, TaskKind};
use crate::python::{literal_eval, text};

/// Maximum size of a task file or a Python module, in bytes. The largest file of the harness has 20 kB.
const MAX_FILE: u64 = 4 << 20;

/// Maximum number of files that a task consists of, including the task file.
const MAX_INCLUDES: usize = 32;

/// Keys that do not change the requests or the metrics.
const WITHOUT_EFFECT: [&str; 6] =
    ["task_alias", "tag", "group", "should_decontaminate", "doc_to_decontamination_query", "generation_kwargs"];

/// Key that has an effect only on tasks whose answers the model writes.
const GENERATION_KWARGS: &str = "generation_kwargs";

/// Values by key, each with the directory of the file that sets it.
type Keys = BTreeMap<String, (Yaml, PathBuf)>;

/// Python module of the harness whose functions a built-in task implements.
struct Module {
    name: &'static str,
    task: &'static str,
    sha256: &'static str,
    /// Whether other tasks also have a module of this name.
    is_common: bool,
    /// Values of the [`ASKS`] keys in the harness's own task file. A file with other values makes other requests.
    asks: &'static [(&'static str, &'static str)],
}

/// Keys that define the requests.
const ASKS: [&str; 5] = ["doc_to_text", "doc_to_target", "doc_to_choice", "process_docs", "process_results"];

const MODULES: [Module; 4] = [
    Module {
        name: "preprocess_winogrande",
        task: "winogrande",
        sha256: "e55327629264a98f1d383fda24645b6779afb53fa0bce2150042b9416b1ae006",
        is_common: false,
        asks: &[
            ("doc_to_text", "!function preprocess_winogrande.doc_to_text"),
            ("doc_to_target", "!function preprocess_winogrande.doc_to_target"),
            ("doc_to_choice", "!function preprocess_winogrande.doc_to_choice"),
        ],
    },
    Module {
        name: "preprocess_wikitext",
        task: "wikitext",
        sha256: "a44020374b172159bf5be80a64d2c4194c9d5c77284f696ac666361338c8da7d",
        is_common: false,
        asks: &[
            ("doc_to_text", ""),
            ("doc_to_target", "!function preprocess_wikitext.wikitext_detokenizer"),
            ("process_results", "!function preprocess_wikitext.process_results"),
        ],
    },
    Module {
        name: "utils",
        task: "hellaswag",
        sha256: "07d23b60b28f2a4f658dcf8440623a63fe6644854ce9b846a114dde980dc1214",
        is_common: true,
        asks: &[
            ("process_docs", "!function utils.process_docs"),
            ("doc_to_text", "{{query}}"),
            ("doc_to_target", "{{label}}"),
            ("doc_to_choice", "choices"),
        ],
    },
    Module {
        name: "utils",
        task: "drop",
        sha256: "a5782ee7d2e537968a5b83976195ae2b9b6e2a565a0bfb5c24d221b4d61a04f5",
        is_common: true,
        asks: &[
            ("process_docs", "!function utils.process_docs"),
            ("doc_to_text", "{{passage}} {{question}}"),
            ("doc_to_target", "{{ answer|join(',')}}"),
            ("process_results", "!function utils.process_results"),
        ],
    },
];

/// Reads a task file and the files that it includes.
pub(super) fn parse(path: &Path) -> Result<Task, String> {
    let mut seen = Vec::new();
    let mut keys = read(path, &mut seen)?;
    keys.retain(|_, (value, _)| *value != Yaml::Null);
    let computed = computed(&keys)?;
    if computed.is_some() {
        keys.retain(|key, _| !ASKS.contains(&key.as_str()));
    }
    let definition = seen.into_iter().map(|(_, text)| text).collect();
    let mut keys = Reader(keys);
    let task = keys.task(definition, computed)?;
    // An unknown key may change the results.
    match keys.0.keys().find(|key| !WITHOUT_EFFECT.contains(&key.as_str())) {
        Some(key) => Err(format!("{key}: this key is not supported")),
        None => Ok(task),
    }
}

fn small_file(path: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(MAX_FILE + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_FILE {
        return Err(std::io::Error::other(format!("the file exceeds the limit of {MAX_FILE} bytes")));
    }
    Ok(text)
}

/// Reads the keys of a file and of the files that it includes. The file's own keys take precedence.
fn read(path: &Path, seen: &mut Vec<(PathBuf, String)>) -> Result<Keys, String> {
    let whole = path.canonicalize().map_err(|e| e.to_string())?;
    if seen.iter().any(|(other, _)| *other == whole) || seen.len() >= MAX_INCLUDES {
        return Err(format!("include: {} includes itself, or the task has too many files", path.display()));
    }
    let text = small_file(path).map_err(|e| e.to_string())?;
    let parsed = yaml::parse(&text)?;
    // As in the harness, included paths are relative to the file itself, not to a symbolic link to it.
    let directory = whole.parent().unwrap_or(Path::new("")).to_owned();
    seen.push((whole, text));
    let Yaml::Mapping(mapping) = parsed else { return Err("expected a YAML mapping of keys".into()) };
    let mut own = Keys::new();
    let mut merged = Keys::new();
    for (key, value) in mapping {
        let Yaml::String(key) = key else { return Err(format!("expected strings as keys, found {}", shown(&key))) };
        if key != "include" {
            own.insert(key, (value, directory.clone()));
            continue;
        }
        let files = match value {
            Yaml::String(file) => vec![file],
            other => strings(&other).ok_or_else(|| format!("include: expected a path, found {}", shown(&other)))?,
        };
        for file in files {
            let mut included = read(&directory.join(&file), seen).map_err(|what| format!("include {file}: {what}"))?;
            included.remove("task_list");
            merged.extend(included);
        }
    }
    merged.extend(own);
    Ok(merged)
}

/// Returns the built-in task that implements the Python functions named in a file, or `None` if it names no function.
fn computed(keys: &Keys) -> Result<Option<Task>, String> {
    let named = keys.iter().find_map(|(key, (value, directory))| Some((key, function(value)?, directory)));
    let Some((key, function, directory)) = named else { return Ok(None) };
    let refused =
        |why: &str| Err(format!("{key}: !function {function} names a Python function, which is not executed{why}"));
    let module = function.rsplit_once('.').map_or("", |(module, _)| module);
    // The file must agree with a built-in task in all of these keys: they cannot be combined with other values.
    let said = |key: &str| match keys.get(key).map(|(value, _)| value) {
        Some(Yaml::Tagged(tagged)) => {
            format!("!{} {}", tagged.tag.to_string().trim_start_matches('!'), shown(&tagged.value).trim_matches('"'))
        }
        Some(value) => value.as_str().map_or_else(|| shown(value), str::to_owned),
        None => String::new(),
    };
    let agrees = |known: &&Module| known.asks.iter().all(|(key, value)| said(key) == *value);
    // Several tasks have a module of this name. The one that makes the same requests is meant.
    let named = || MODULES.iter().filter(|known| known.name == module);
    let Some(known) = named().find(agrees).or_else(|| named().next()) else { return refused("") };
    let file = directory.join(format!("{module}.py"));
    if !file.is_file() && known.is_common {
        let missing =
            format!("; to use the built-in task {}, put {} next to the task file", known.task, file.display());
        return refused(&missing);
    }
    if file.is_file() {
        let text = small_file(&file).map_err(|e| format!("{}: {e}", file.display()))?.replace("\r\n", "\n");
        let sha256 = Sha256::digest(text).iter().fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"));
        if sha256 != known.sha256 {
            let path = file.display();
            return refused(&format!(
                "; {path} differs from the file of lm-evaluation-harness 0.4.13 that the built-in task implements"
            ));
        }
    }
    let expected = |key: &str| known.asks.iter().find(|(known, _)| *known == key).map_or("", |(_, said)| said);
    if let Some(other) = ASKS.iter().find(|key| said(key) != expected(key)) {
        let (task, found) = (known.task, said(other));
        return refused(&format!("; {other} differs from the built-in task {task}: found {found:?}"));
    }
    Ok(builtin::task(known.task))
}

/// Returns the Python function that a value names (`!function module.name`).
fn function(value: &Yaml) -> Option<&str> {
    match value {
        Yaml::Tagged(tagged) if tagged.tag == "function" => tagged.value.as_str(),
        // Metrics and `fewshot_config` can contain functions.
        Yaml::Sequence(items) => items.iter().find_map(function),
        Yaml::Mapping(entries) => entries.values().find_map(function),
        _ => None,
    }
}

/// Keys of a task file. Each key is removed when it is read, so the remaining keys are unknown.
struct Reader(Keys);

impl Reader {
    fn take(&mut self, key: &str) -> Option<Yaml> {
        self.0.remove(key).map(|(value, _)| value)
    }

    fn text(&mut self, key: &str) -> Result<Option<String>, String> {
        let Some(value) = self.take(key) else { return Ok(None) };
        value.as_str().map(|text| Some(text.to_owned())).ok_or_else(|| unexpected(key, "a string", &value))
    }

    fn whole(&mut self, key: &str) -> Result<Option<usize>, String> {
        let Some(value) = self.take(key) else { return Ok(None) };
        value.as_u64().map(|n| Some(n as usize)).ok_or_else(|| unexpected(key, "a whole number", &value))
    }

    fn task(&mut self, definition: String, computed: Option<Task>) -> Result<Task, String> {
        if matches!(self.0.get("task"), Some((Yaml::Sequence(_), _))) {
            return Err("task: groups of tasks are not supported; pass the files of the tasks instead".into());
        }
        let name = self.text("task")?.ok_or("the key `task` is missing; expected the name of the task")?;
        let kind = self.kind()?;
        let (train, validation) = (self.text("training_split")?, self.text("validation_split")?);
        let test = self.text("test_split")?;
        let split = test.as_ref().or(validation.as_ref());
        let split = split.ok_or("no split to evaluate; set test_split or validation_split")?.clone();
        let config = self.take("fewshot_config");
        let Examples { first_n, split: of_config, samples } = Examples::new(config)?;
        let of_examples = self.text("fewshot_split")?;
        let of_examples = of_config.or(of_examples);
        // If the examples come from the evaluated split, the harness leaves out the document itself.
        let spare = of_examples == test;
        let examples_split = of_examples.or(train).or(validation).or(test);
        let repeats = self.whole("repeats")?;
        if kind != TaskKind::Generation && repeats.is_some_and(|repeats| repeats != 1) {
            return Err("repeats: expected 1, since repetitions do not change log-likelihoods".into());
        }
        let mut generation = Generation::default();
        let metrics = match self.take("metric_list") {
            None => computed.as_ref().map_or_else(|| kind.defaults().to_vec(), |computed| computed.metrics.clone()),
            Some(Yaml::Sequence(list)) => {
                let metric = |entry| metric(entry, kind, computed.as_ref(), &mut generation.exact_match);
                list.iter().map(metric).collect::<Result<_, _>>()?
            }
            Some(other) => return Err(unexpected("metric_list", "a list", &other)),
        };
        if kind == TaskKind::Generation {
            self.generation(&mut generation, repeats.unwrap_or(1))?;
        }
        let version = match self.take("metadata") {
            Some(Yaml::Mapping(metadata)) => metadata.get("version").map_or(Value::Null, json_of),
            _ => Value::Null,
        };
        let (files, can_fetch) = data_files(self.take("dataset_kwargs"))?;
        let (repo, config) = (self.text("dataset_path")?, self.text("dataset_name")?);
        let dataset = repo.filter(|_| can_fetch && files.is_none()).map(|repo| (repo, config));

        let mut templates = Templates::new()?;
        let mut field =
            |key: &'static str| self.take(key).map(|value| Field::new(key, value, &mut templates)).transpose();
        let description = field("description")?.filter(|field| !field.is_empty());
        let (text, target, choices) = (field("doc_to_text")?, field("doc_to_target")?, field("doc_to_choice")?);
        let templates = Arc::new(templates);
        let describe = description.map(|field| -> Describe {
            let templates = templates.clone();
            Arc::new(move |document| match field.of(&templates, document)? {
                Found::Text(text) => Ok(text),
                _ => Err("description: expected a string".into()),
            })
        });
        let layout = Layout {
            describe,
            target_delimiter: self.text("target_delimiter")?.unwrap_or_else(|| " ".into()),
            example_delimiter: self.text("fewshot_delimiter")?.unwrap_or_else(|| "\n\n".into()),
        };
        let ask = if let Some(computed) = computed {
            if kind != computed.kind || layout.target_delimiter != computed.layout.target_delimiter {
                let (name, delimiter) = (&computed.name, &computed.layout.target_delimiter);
                let kind = computed.kind.name();
                return Err(format!(
                    "the built-in task {name} supports only output_type {kind} and target_delimiter {delimiter:?}"
                ));
            }
            computed.ask
        } else {
            let is_choice = kind == TaskKind::MultipleChoice;
            if choices.is_some() != is_choice && kind != TaskKind::Generation {
                let what =
                    if is_choice { "the key is missing" } else { "only multiple_choice tasks can have this key" };
                return Err(format!("doc_to_choice: {what}"));
            }
            let target = target.ok_or("the key `doc_to_target` is missing")?;
            let text = text.ok_or("the key `doc_to_text` is missing")?;
            let delimiter = layout.target_delimiter.clone();
            let asker = Asker { templates, kind, text, target, choices, delimiter };
            Arc::new(move |document: &Value| asker.ask(document))
        };
        Ok(Task {
            sampler: if first_n { Sampler::First { spare } } else { Sampler::Random { spare } },
            shots: self.whole("num_fewshot")?,
            name,
            version,
            kind,
            metrics,
            split,
            examples_split,
            samples,
            generation: (kind == TaskKind::Generation).then(|| Arc::new(generation)),
            layout,
            files,
            dataset,
            definition,
            ask,
        })
    }
}

impl Reader {
    fn kind(&mut self) -> Result<TaskKind, String> {
        match self.text("output_type")?.as_deref().unwrap_or("generate_until") {
            "multiple_choice" => Ok(TaskKind::MultipleChoice),
            "loglikelihood" => Ok(TaskKind::Loglikelihood),
            "loglikelihood_rolling" => Ok(TaskKind::Perplexity),
            "generate_until" => Ok(TaskKind::Generation),
            other => {
                let kinds = "multiple_choice, loglikelihood, loglikelihood_rolling or generate_until";
                Err(format!("output_type: expected {kinds}, found {other}"))
            }
        }
    }

    /// Reads the keys of a task whose answers the model writes.
    fn generation(&mut self, generation: &mut Generation, repeats: usize) -> Result<(), String> {
        generation.set_repeats(repeats)?;
        // By default, the harness ends an answer where an example would end.
        let delimiter = self.0.get("fewshot_delimiter").and_then(|(value, _)| value.as_str());
        generation.until = vec![delimiter.unwrap_or("\n\n").to_owned()];
        if let Some(kwargs) = self.take(GENERATION_KWARGS) {
            generation.read_kwargs(&json_of(&kwargs))?;
        }
        let list = match self.take("filter_list") {
            None => return generation.check_filters(),
            Some(Yaml::Sequence(list)) => list,
            Some(other) => return Err(unexpected("filter_list", "a list", &other)),
        };
        generation.filters.clear();
        for entry in list {
            let entry = json_of(&entry);
            let (Some(name), Some(filters)) = (entry["name"].as_str(), entry["filter"].as_array()) else {
                return Err("filter_list: expected entries with a `name` and a list under `filter`".into());
            };
            let filters = filters.iter().map(Filter::read).collect::<Result<_, _>>()?;
            generation.filters.push((name.to_owned(), filters));
        }
        generation.check_filters()
    }
}

/// Source of the few-shot examples, from the key `fewshot_config`.
#[derive(Default)]
struct Examples {
    first_n: bool,
    split: Option<String>,
    samples: Option<Vec<Value>>,
}

impl Examples {
    fn new(config: Option<Yaml>) -> Result<Self, String> {
        let mut examples = Self::default();
        let entries = match config {
            None => return Ok(examples),
            Some(Yaml::Mapping(entries)) => entries,
            Some(other) => return Err(unexpected("fewshot_config", "a mapping", &other)),
        };
        for (key, value) in entries {
            match (key.as_str().unwrap_or_default(), value) {
                (_, Yaml::Null) => {}
                ("sampler", Yaml::String(name)) if name == "default" || name == "first_n" => {
                    examples.first_n = name == "first_n";
                }
                ("split", Yaml::String(split)) => examples.split = Some(split),
                ("samples", Yaml::Sequence(list)) => examples.samples = Some(list.iter().map(json_of).collect()),
                (key, value) => return Err(format!("fewshot_config.{key}: {} is not supported", shown(&value))),
            }
        }
        if examples.split.is_some() {
            examples.samples = None;
        }
        Ok(examples)
    }
}

/// Returns the files that `data_files` names for each split, and whether the other keys of `dataset_kwargs` can be
/// ignored.
#[allow(clippy::type_complexity, reason = "used once")]
fn data_files(kwargs: Option<Yaml>) -> Result<(Option<BTreeMap<String, Vec<PathBuf>>>, bool), String> {
    let entries = match kwargs {
        None => return Ok((None, true)),
        Some(Yaml::Mapping(entries)) => entries,
        Some(other) => return Err(unexpected("dataset_kwargs", "a mapping", &other)),
    };
    let (mut files, mut other) = (None, None);
    for (key, value) in entries {
        match key.as_str().unwrap_or_default() {
            "trust_remote_code" => {}
            "data_files" => {
                let paths = |value: &Yaml| {
                    let list = value.as_str().map(|path| vec![path.to_owned()]).or_else(|| strings(value));
                    let list = list.filter(|paths| !paths.iter().any(|path| path.contains(['*', '?', '['])));
                    list.map(|paths| paths.into_iter().map(PathBuf::from).collect::<Vec<_>>())
                        .ok_or_else(|| unexpected("dataset_kwargs.data_files", "paths without patterns", value))
                };
                files = Some(match &value {
                    Yaml::Mapping(splits) => splits
                        .iter()
                        .map(|(split, value)| Ok((split.as_str().unwrap_or_default().to_owned(), paths(value)?)))
                        .collect::<Result<_, String>>()?,
                    // Files without a split belong to the split `train`.
                    other => BTreeMap::from([("train".to_owned(), paths(other)?)]),
                });
            }
            key => other = Some(key.to_owned()),
        }
    }
    match (&files, &other) {
        (Some(_), Some(key)) => Err(format!("dataset_kwargs.{key}: not supported together with data_files")),
        _ => Ok((files, other.is_none())),
    }
}

/// Reads an entry of `metric_list`. The entry must describe the same computation and aggregation as the built-in
/// metric.
fn metric(
    entry: &Yaml,
    kind: TaskKind,
    computed: Option<&Task>,
    exact_match: &mut ExactMatch,
) -> Result<Metric, String> {
    let Yaml::Mapping(entries) = entry else {
        return Err(unexpected("metric_list", "a mapping for each metric", entry));
    };
    let name = entries.get("metric").and_then(Yaml::as_str).ok_or("metric_list: expected a name under `metric`")?;
    let of_task = computed.and_then(|task| task.metrics.iter().copied().find(|metric| metric.name() == name));
    let metric = of_task.map_or_else(|| Metric::named(name, kind), Ok).map_err(|e| format!("metric_list: {e}"))?;
    let mut option = |key: &str, value: &Yaml| -> Result<bool, String> {
        let options = match (key, value) {
            ("regexes_to_ignore", Yaml::Sequence(_)) => {
                let patterns = strings(value).ok_or_else(|| unexpected("regexes_to_ignore", "strings", value))?;
                let patterns = patterns.iter().map(|pattern| python_regex(pattern)).collect::<Result<_, _>>();
                exact_match.ignored = patterns.map_err(|e| format!("metric_list: {e}"))?;
                return Ok(true);
            }
            ("ignore_case", _) => &mut exact_match.ignore_case,
            ("ignore_punctuation", _) => &mut exact_match.ignore_punctuation,
            ("ignore_numbers", _) => &mut exact_match.ignore_numbers,
            _ => return Ok(*value == Yaml::Null || (key == "hf_evaluate" && value.as_bool() == Some(false))),
        };
        *options = value.as_bool().unwrap_or(false);
        Ok(value.as_bool().is_some())
    };
    for (key, value) in entries {
        let is_same = match key.as_str().unwrap_or_default() {
            // Weights matter only in groups of tasks.
            "metric" | "weight_by_size" => true,
            "aggregation" => value.as_str() == Some(metric.aggregation()),
            "higher_is_better" => value.as_bool() == Some(metric.higher_is_better()),
            key if metric == Metric::ExactMatch => option(key, value)?,
            _ => *value == Yaml::Null,
        };
        if !is_same {
            let found = shown(value);
            return Err(format!("metric_list: {name} with {}: {found} is not supported", shown(key)));
        }
    }
    Ok(metric)
}

/// Returns whether a string could be the name of a column.
fn is_name(text: &str) -> bool {
    let is_letter = |c: char| c.is_alphabetic() || c == '_';
    text.starts_with(is_letter) && text.chars().all(|c| is_letter(c) || c.is_numeric())
}

/// Key of the task file that yields a value for each document.
struct Field {
    key: &'static str,
    is: Is,
    /// Interpretation of the string for the previous documents: 0 if unknown, else [`COLUMN`] or [`LITERAL`].
    was: AtomicU8,
}

/// States of [`Field::was`].
const COLUMN: u8 = 1;
const LITERAL: u8 = 2;

enum Is {
    /// Name of a column, or a template.
    Text(String),
    Number(i64),
    List(Vec<Value>),
}

/// Value of a [`Field`] for one document.
enum Found {
    Text(String),
    Number(i64),
    List(Vec<Value>),
}

impl Field {
    fn new(key: &'static str, value: Yaml, templates: &mut Templates) -> Result<Self, String> {
        let is = match value {
            Yaml::String(source) => {
                templates.add(key, source.clone())?;
                Is::Text(source)
            }
            Yaml::Number(n) if n.is_i64() => Is::Number(n.as_i64().unwrap_or_default()),
            Yaml::Sequence(items) => Is::List(items.iter().map(json_of).collect()),
            Yaml::Mapping(entries) => Is::List(entries.values().map(json_of).collect()),
            other => return Err(unexpected(key, "a string, a number or a list", &other)),
        };
        Ok(Self { key, is, was: AtomicU8::new(0) })
    }

    fn is_empty(&self) -> bool {
        matches!(&self.is, Is::Text(source) if source.is_empty())
    }

    /// Records the interpretation and returns whether it differs from that of an earlier document.
    fn changed(&self, now: u8) -> bool {
        let before = self.was.swap(now, Ordering::Relaxed);
        before != 0 && before != now
    }

    fn of(&self, templates: &Templates, document: &Value) -> Result<Found, String> {
        match &self.is {
            Is::Number(n) => Ok(Found::Number(*n)),
            Is::List(items) => Ok(Found::List(items.clone())),
            Is::Text(source) => match document.get(source) {
                // The harness checks the columns of the whole dataset. Here only the current document is known.
                None if is_name(source) => {
                    let key = self.key;
                    Err(format!("{key}: no column {source:?}; write {{{{ \"{source}\" }}}} for a literal string"))
                }
                // The interpretation must be the same for all documents.
                found if !source.contains('{') && self.changed(if found.is_some() { COLUMN } else { LITERAL }) => {
                    Err(format!("{}: some documents have a column {source:?}, and others do not", self.key))
                }
                None => templates.render(self.key, document).map(Found::Text),
                Some(Value::String(text)) => Ok(Found::Text(text.clone())),
                Some(Value::Array(items)) => Ok(Found::List(items.clone())),
                Some(Value::Bool(flag)) => Ok(Found::Number((*flag).into())),
                Some(other) => other.as_i64().map(Found::Number).ok_or_else(|| {
                    format!("{}: expected a string, a whole number or a list under {source:?}, found {other}", self.key)
                }),
            },
        }
    }

    /// Returns whether the field is a template, rather than the name of a column, for this document.
    fn is_template(&self, document: &Value) -> bool {
        matches!(&self.is, Is::Text(source) if document.get(source).is_none())
    }
}

/// Builds the requests for a document from the fields of a task file.
struct Asker {
    templates: Arc<Templates>,
    kind: TaskKind,
    text: Field,
    target: Field,
    choices: Option<Field>,
    delimiter: String,
}

impl Asker {
    fn ask(&self, document: &Value) -> Result<Asked, String> {
        if self.kind == TaskKind::Generation {
            return self.question(document);
        }
        let Some(choices) = &self.choices else {
            let target = match self.found(&self.target, document)? {
                Found::Text(text) => text,
                Found::Number(n) => n.to_string(),
                Found::List(_) => return Err("doc_to_target: expected a string, found a list".into()),
            };
            return Ok(if self.kind == TaskKind::Perplexity {
                Asked::Text { words: count_words(&target), bytes: target.len(), text: target }
            } else {
                Asked::Continuation { context: self.context(document)?, continuation: target }
            });
        };
        let choices = match choices.of(&self.templates, document)? {
            Found::List(items) => Value::Array(items),
            Found::Text(text) => literal_eval(&text)
                .ok_or_else(|| format!("doc_to_choice: expected a list in Python syntax, found {text:?}"))?,
            Found::Number(n) => n.into(),
        };
        let choices = super::texts(&choices).filter(|texts| !texts.is_empty());
        let choices = choices.ok_or("doc_to_choice: expected a list of strings")?;
        let target = self.found(&self.target, document)?;
        let number = |n: i64| {
            let found = usize::try_from(n).ok().filter(|&n| n < choices.len());
            found.ok_or_else(|| format!("answer {n} is out of range for {} choices", choices.len()))
        };
        let position = |text: &str| {
            let found = choices.iter().position(|choice| choice == text);
            found.ok_or_else(|| format!("doc_to_target: {text:?} is not one of the choices {choices:?}"))
        };
        // If the question is a number, the choices are contexts and the target follows each of them.
        if let Found::Number(answer) = self.found(&self.text, document)? {
            let Found::Text(target) = target else { return Err("doc_to_target: expected a string".into()) };
            let answers = vec![number(answer)?];
            let continuations = vec![format!("{}{target}", self.delimiter)];
            let lengths = choices.iter().map(String::as_str).map(Into::into).collect();
            return Ok(Asked::Choices(Choices { contexts: choices, continuations, lengths, answers }));
        }
        let answers = match target {
            Found::Number(n) => vec![number(n)?],
            Found::Text(text) => vec![position(&text)?],
            Found::List(items) => {
                let numbers = items.iter().map(|item| item.as_i64().ok_or(item));
                let numbers: Result<Vec<i64>, &Value> = numbers.collect();
                let numbers =
                    numbers.map_err(|item| format!("doc_to_target: expected indices of choices, found {item}"))?;
                numbers.into_iter().map(number).collect::<Result<_, _>>()?
            }
        };
        Ok(Asked::Choices(Choices::new(vec![self.context(document)?], &self.delimiter, &choices, answers)))
    }

    /// Builds a question to answer in writing. The correct answers are a string, a list of strings, or a number of a
    /// choice.
    fn question(&self, document: &Value) -> Result<Asked, String> {
        let context = self.context(document)?;
        let targets = match (self.found(&self.target, document)?, &self.choices) {
            (Found::Number(n), Some(choices)) => {
                let Found::List(choices) = choices.of(&self.templates, document)? else {
                    return Err("doc_to_choice: expected a list of strings".into());
                };
                let choice = usize::try_from(n).ok().and_then(|n| choices.get(n));
                vec![text(choice.ok_or_else(|| format!("answer {n} is out of range for {} choices", choices.len()))?)]
            }
            (_, Some(_)) => return Err("doc_to_target: expected the number of a choice".into()),
            (Found::Number(n), None) => vec![n.to_string()],
            (Found::Text(text), None) => vec![text],
            (Found::List(items), None) => items.iter().map(text).collect(),
        };
        let example = targets.first().ok_or("doc_to_target: expected at least one correct answer")?.clone();
        Ok(Asked::Question { context, targets: Targets::Texts(targets), example })
    }

    /// Returns the value of a field, converting the output of a template as the harness does. Digits become a number if
    /// the task has choices. A list in Python syntax becomes a list in `doc_to_target`.
    fn found(&self, field: &Field, document: &Value) -> Result<Found, String> {
        let found = field.of(&self.templates, document)?;
        let Found::Text(text) = &found else { return Ok(found) };
        if !field.is_template(document) {
            return Ok(found);
        }
        if self.choices.is_some() && !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
            let number = text.parse().map_err(|e| format!("{}: {text}: {e}", field.key))?;
            return Ok(Found::Number(number));
        }
        if field.key == "doc_to_target"
            && text.starts_with('[')
            && let Some(Value::Array(items)) = literal_eval(text)
        {
            return Ok(Found::List(items));
        }
        Ok(found)
    }

    fn context(&self, document: &Value) -> Result<String, String> {
        match self.found(&self.text, document)? {
            Found::Text(text) => Ok(text),
            _ => Err("doc_to_text: expected a string".into()),
        }
    }
}

fn unexpected(key: &str, expected: &str, found: &Yaml) -> String {
    format!("{key}: expected {expected}, found {}", shown(found))
}

/// Formats a value for a message, in at most 80 characters.
fn shown(value: &Yaml) -> String {
    json_of(value).to_string().chars().take(80).collect()
}

/// Returns the strings of a YAML sequence, or `None` if the value is anything else.
fn strings(value: &Yaml) -> Option<Vec<String>> {
    value.as_sequence()?.iter().map(|item| item.as_str().map(str::to_owned)).collect()
}

fn json_of(value: &Yaml) -> Value {
    match value {
        Yaml::Null => Value::Null,
        Yaml::Bool(flag) => (*flag).into(),
        Yaml::Number(n) => n.as_i64().map_or_else(|| n.as_f64().into(), Value::from),
        Yaml::String(text) => text.clone().into(),
        Yaml::Sequence(items) => items.iter().map(json_of).collect(),
        Yaml::Mapping(entries) => {
            let text = |key: &Yaml| key.as_str().map_or_else(|| json_of(key).to_string(), str::to_owned);
            Value::Object(entries.iter().map(|(key, value)| (text(key), json_of(value))).collect())
        }
        Yaml::Tagged(tagged) => format!("{} {}", tagged.tag, json_of(&tagged.value)).into(),
    }
}
