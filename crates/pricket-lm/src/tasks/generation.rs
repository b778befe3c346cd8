//! Tasks whose answers the model writes: options, filters of the answers, and their scores.
//!
//! Everything follows lm-evaluation-harness 0.4.13, with Python's string functions.

use std::collections::BTreeSet;

use fancy_regex::Regex;
use pricket_nn::{CausalLm, Error as NnError, SamplingParams};
use serde_json::Value;

use super::Metric;
use crate::engine::{EngineOptions, GenerateOptions, Request, Scheduler};
use crate::loglikelihood::ScoreOptions;
use crate::python::{float, is_space};
use crate::{Error, Result, Tokenizer};

/// Default number of new tokens of an answer in the harness.
const MAX_TOKENS: usize = 256;

/// Maximum number of answers to one question.
const MAX_REPEATS: usize = 1024;

/// How answers are generated, filtered and scored.
#[derive(Clone, Debug)]
pub(crate) struct Generation {
    /// Strings that end an answer and are not part of it.
    pub(super) until: Vec<String>,
    pub(super) max_tokens: usize,
    pub(super) sampling: SamplingParams,
    /// Number of answers to each question.
    pub(super) repeats: usize,
    /// Lists of filters by name. Each list gives an answer, which is scored on its own.
    pub(super) filters: Vec<(String, Vec<Filter>)>,
    pub(super) exact_match: ExactMatch,
}

impl Default for Generation {
    fn default() -> Self {
        Self {
            until: Vec::new(),
            max_tokens: MAX_TOKENS,
            sampling: SamplingParams::greedy(),
            repeats: 1,
            filters: vec![("none".into(), vec![Filter::TakeFirst])],
            exact_match: ExactMatch::default(),
        }
    }
}

impl Generation {
    /// Reads `generation_kwargs` of a task file.
    ///
    /// # Errors
    /// Returns a message that names the key if a value is wrong or a key is not supported.
    pub(super) fn read_kwargs(&mut self, kwargs: &Value) -> Result<(), String> {
        let Some(entries) = kwargs.as_object() else {
            return Err(format!("generation_kwargs: expected a mapping, found {kwargs}"));
        };
        let (mut samples, mut temperature, mut most) = (None, None, [None; 4]);
        for (key, value) in entries {
            let wrong = |expected: &str| format!("generation_kwargs.{key}: expected {expected}, found {value}");
            let number = || value.as_f64().map(|x| x as f32).ok_or_else(|| wrong("a number"));
            match key.as_str() {
                _ if value.is_null() => {}
                "until" => {
                    let one = value.as_str().map(|text| vec![text.to_owned()]);
                    self.until =
                        one.or_else(|| super::texts(value)).ok_or_else(|| wrong("a string or a list of them"))?;
                }
                // Of several names, the first of this list counts.
                "max_gen_toks" | "max_new_tokens" | "max_tokens" | "max_completion_tokens" => {
                    let names = ["max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"];
                    let count = value.as_u64().filter(|&n| n > 0).ok_or_else(|| wrong("a whole number, at least 1"))?;
                    if let Some(at) = names.iter().position(|name| name == key) {
                        most[at] = Some(count as usize);
                    }
                }
                "do_sample" => samples = Some(value.as_bool().ok_or_else(|| wrong("true or false"))?),
                "temperature" => temperature = Some(number()?),
                "top_p" => self.sampling.top_p = number()?,
                "min_p" => self.sampling.min_p = number()?,
                "top_k" => {
                    self.sampling.top_k = value.as_u64().ok_or_else(|| wrong("a whole number"))? as usize;
                }
                "repetition_penalty" => self.sampling.repetition_penalty = number()?,
                _ => return Err(format!("generation_kwargs.{key}: this key is not supported")),
            }
        }
        self.max_tokens = most.into_iter().flatten().next().unwrap_or(self.max_tokens);
        let has_top_k = entries.contains_key("top_k");
        if samples.unwrap_or(temperature.unwrap_or(0.0) > 0.0) {
            self.sampling.temperature = temperature.unwrap_or(1.0);
            // The default of transformers.
            if !has_top_k {
                self.sampling.top_k = 50;
            }
        } else {
            // As in the harness, greedy decoding ignores the settings that only sampling has.
            let repetition_penalty = self.sampling.repetition_penalty;
            self.sampling = SamplingParams { repetition_penalty, ..SamplingParams::greedy() };
        }
        self.sampling.check().map_err(|e| format!("generation_kwargs: {e}"))
    }

    /// Sets the number of answers to each question.
    pub(super) fn set_repeats(&mut self, repeats: usize) -> Result<(), String> {
        if !(1..=MAX_REPEATS).contains(&repeats) {
            return Err(format!("repeats: expected 1 to {MAX_REPEATS}, found {repeats}"));
        }
        self.repeats = repeats;
        Ok(())
    }

    /// Checks that each list of filters gives one answer.
    pub(super) fn check_filters(&self) -> Result<(), String> {
        for (name, filters) in &self.filters {
            let count = filters.iter().try_fold(self.repeats, |count, filter| match filter {
                Filter::TakeFirst | Filter::MajorityVote => Ok(1),
                Filter::TakeFirstK(k) if *k > count => Err(format!(
                    "filter_list: {name} takes the first {k} answers of {count}; set repeats to at least {k}"
                )),
                Filter::TakeFirstK(k) => Ok(*k),
                _ => Ok(count),
            })?;
            if count != 1 {
                return Err(format!("filter_list: {name} keeps {count} answers; end it with take_first"));
            }
        }
        Ok(())
    }

    /// Writes answers to the contexts. Returns the answers of each.
    ///
    /// Contexts that leave no room for the answer are truncated on the left. `cut` counts them.
    pub(super) fn answers(
        &self,
        model: &dyn CausalLm,
        tokenizer: &Tokenizer,
        contexts: &[String],
        (prefix, end): (u32, &[u32]),
        options: &ScoreOptions,
        cut: &mut usize,
    ) -> Result<Vec<Vec<String>>> {
        let length = options.max_length(model);
        let Some(room) = length.checked_sub(self.max_tokens).filter(|&room| room > 0) else {
            let most = self.max_tokens;
            let what = format!("an answer of {most} tokens leaves no room for a question in {length} tokens");
            return Err(Error::Input(what));
        };
        let engine = EngineOptions { step_tokens: options.batch_tokens, ..EngineOptions::default() };
        let mut scheduler = Scheduler::new(model, &engine)?;
        let count = contexts.len() * self.repeats;
        let mut ids: Vec<Vec<u32>> = Vec::with_capacity(count);
        let mut prompt = Vec::new();
        // Submits the next request. Few wait at a time, to bound the memory.
        let mut submit = |scheduler: &mut Scheduler, ids: &mut Vec<Vec<u32>>| -> Result<()> {
            while ids.len() < count && scheduler.waiting() < 2 * engine.rows {
                let seed = (ids.len() % self.repeats) as u64;
                if seed == 0 {
                    prompt = tokenizer.encode_from_start(&contexts[ids.len() / self.repeats])?;
                    if prompt.is_empty() {
                        prompt.push(prefix);
                    }
                    *cut += usize::from(prompt.len() > room);
                    prompt.drain(..prompt.len().saturating_sub(room));
                }
                let options = GenerateOptions {
                    max_tokens: self.max_tokens,
                    sampling: self.sampling.clone(),
                    seed,
                    stop: self.until.clone(),
                    beyond_trained_length: options.beyond_trained_length,
                    ..GenerateOptions::default()
                };
                let request = Request {
                    eos: end.to_vec(),
                    vocab: Some(tokenizer.vocab_size()),
                    tokenizer: Some(tokenizer.clone()),
                    ..Request::new(prompt.clone(), options)
                };
                scheduler.submit(&[model], request)?;
                ids.push(Vec::new());
            }
            Ok(())
        };
        let mut ended = 0;
        options.progress.begin("answering", count as u64, "answers");
        let mut run = || -> Result<()> {
            loop {
                if options.progress.cancelled() {
                    return Err(NnError::Cancelled.into());
                }
                submit(&mut scheduler, &mut ids)?;
                let Some(updates) = scheduler.step(&[model], None)? else { return Ok(()) };
                for update in updates {
                    ids[update.request.0 as usize].extend(update.tokens.iter().map(|token| token.id));
                    ended += u64::from(update.finish.transpose()?.is_some());
                }
                options.progress.update(ended);
            }
        };
        let outcome = run();
        options.progress.end();
        outcome?;
        let text = |ids: &Vec<u32>| self.text(tokenizer, ids);
        Ok(ids.chunks(self.repeats).map(|answers| answers.iter().map(text).collect()).collect())
    }

    /// Returns the text of an answer, up to the first of the strings that end it.
    fn text(&self, tokenizer: &Tokenizer, ids: &[u32]) -> String {
        let mut text = tokenizer.decode_text(ids);
        let end = self.until.iter().filter(|stop| !stop.is_empty()).filter_map(|stop| text.find(stop.as_str())).min();
        text.truncate(end.unwrap_or(text.len()));
        text
    }
}

/// Filter of the answers to one question.
#[derive(Clone, Debug)]
pub(crate) enum Filter {
    TakeFirst,
    TakeFirstK(usize),
    /// Keeps the most frequent answer; of equally frequent ones the first.
    MajorityVote,
    RemoveWhitespace,
    Lowercase,
    Uppercase,
    /// Replaces each answer by a match of a pattern.
    Regex {
        pattern: Regex,
        group_select: i64,
        fallback: String,
    },
    /// Replaces each answer by its value in a table.
    Map {
        table: Vec<(String, String)>,
        default: String,
    },
}

impl Filter {
    /// Reads a filter of a task file.
    pub(super) fn read(value: &Value) -> Result<Self, String> {
        let name = value["function"].as_str().ok_or("filter_list: expected a name under `function`")?;
        let refuse = |what: &str| Err(format!("filter_list: {name}: {what}"));
        let known: &[&str] = match name {
            "regex" => &["regex_pattern", "group_select", "fallback"],
            "map" => &["mapping_dict", "default_value"],
            "take_first_k" => &["k"],
            _ => &[],
        };
        let keys = value.as_object().into_iter().flatten().map(|(key, _)| key.as_str());
        if let Some(key) = keys.filter(|key| *key != "function").find(|key| !known.contains(key)) {
            return refuse(&format!("the key {key} is not supported"));
        }
        let text = |key: &str, default: &str| match &value[key] {
            Value::Null => Ok(default.to_owned()),
            Value::String(text) => Ok(text.clone()),
            other => Err(format!("filter_list: {name}: {key}: expected a string, found {other}")),
        };
        Ok(match name {
            "take_first" => Filter::TakeFirst,
            "take_first_k" => match value["k"].as_u64() {
                Some(k) if k > 0 => Filter::TakeFirstK(k as usize),
                _ => return refuse("k: expected a whole number, at least 1"),
            },
            "majority_vote" => Filter::MajorityVote,
            "remove_whitespace" => Filter::RemoveWhitespace,
            "lowercase" => Filter::Lowercase,
            "uppercase" => Filter::Uppercase,
            "regex" => Filter::Regex {
                pattern: python_regex(&text("regex_pattern", r"#### (\-?[0-9\.\,]+)")?)?,
                group_select: value["group_select"].as_i64().unwrap_or(0),
                fallback: text("fallback", "[invalid]")?,
            },
            "map" => {
                let empty = serde_json::Map::new();
                let entries = value["mapping_dict"].as_object().unwrap_or(&empty);
                let plain = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                let table = entries.iter().map(|(key, value)| (key.clone(), plain(value))).collect();
                // Python's `None` as a text, which is how the score compares it.
                let default =
                    if value["default_value"].is_null() { "None".into() } else { plain(&value["default_value"]) };
                Filter::Map { table, default }
            }
            _ => return refuse("this filter is not supported"),
        })
    }

    fn apply(&self, mut answers: Vec<String>) -> Result<Vec<String>, String> {
        let each = |answers: &[String], f: fn(&str) -> String| answers.iter().map(|answer| f(answer)).collect();
        match self {
            Filter::TakeFirst => answers.truncate(1),
            Filter::TakeFirstK(k) => answers.truncate(*k),
            Filter::MajorityVote => {
                let count = |answer: &String| answers.iter().filter(|other| *other == answer).count();
                // The first of the most frequent answers: `max_by_key` would return the last.
                let most = answers.iter().map(count).max().unwrap_or(0);
                let first = answers.iter().find(|answer| count(answer) == most).cloned();
                answers = first.into_iter().collect();
            }
            Filter::RemoveWhitespace => answers = each(&answers, |answer| answer.trim_matches(is_space).to_owned()),
            Filter::Lowercase => answers = each(&answers, str::to_lowercase),
            Filter::Uppercase => answers = each(&answers, str::to_uppercase),
            Filter::Regex { pattern, group_select, fallback } => {
                for answer in &mut answers {
                    *answer = matched(pattern, answer, *group_select)?.unwrap_or_else(|| fallback.clone());
                }
            }
            Filter::Map { table, default } => {
                for answer in &mut answers {
                    let found = table.iter().find(|(key, _)| key == answer).map(|(_, value)| value);
                    *answer = found.unwrap_or(default).clone();
                }
            }
        }
        Ok(answers)
    }
}

/// Applies a list of filters, which gives one answer.
pub(super) fn filtered(filters: &[Filter], answers: &[String]) -> Result<String, String> {
    let answers = filters.iter().try_fold(answers.to_vec(), |answers, filter| filter.apply(answers))?;
    answers.into_iter().next().ok_or_else(|| "the filters leave no answer".to_owned())
}

/// Returns the match number `select` of a pattern, counted from the end if it is negative: the first group that is not
/// empty, or the whole match if the pattern has no groups. Returns `None` if nothing matches.
fn matched(pattern: &Regex, text: &str, select: i64) -> Result<Option<String>, String> {
    let found = pattern.captures_iter(text).collect::<Result<Vec<_>, _>>().map_err(|e| format!("filter regex: {e}"))?;
    if found.is_empty() {
        return Ok(None);
    }
    let count = found.len();
    let at = usize::try_from(if select < 0 { select + count as i64 } else { select });
    let Some(captures) = at.ok().and_then(|at| found.get(at)) else {
        return Err(format!("filter regex: match {select} of an answer with {count} matches"));
    };
    let groups: Vec<&str> = captures.iter().skip(1).map(|group| group.map_or("", |group| group.as_str())).collect();
    let found = match groups[..] {
        [] => Some(captures.get(0).map_or("", |whole| whole.as_str())),
        [only] => Some(only),
        _ => groups.iter().copied().find(|group| !group.is_empty()),
    };
    Ok(found.map(|text| text.trim_matches(is_space).to_owned()))
}

/// Compiles a pattern of Python's `re`.
///
/// # Errors
/// Returns a message if the pattern is invalid or has syntax that only Python knows.
pub(super) fn python_regex(pattern: &str) -> Result<Regex, String> {
    let (mut out, mut chars, mut in_class) = (String::with_capacity(pattern.len()), pattern.chars().peekable(), false);
    let is_multi_line = pattern.contains("(?m") || pattern.contains("(?sm") || pattern.contains("(?im");
    while let Some(c) = chars.next() {
        match c {
            '\\' => match chars.next() {
                // The end of the text, which other languages write in lower case.
                Some('Z') if !in_class => out.push_str(r"\z"),
                next => {
                    out.push('\\');
                    out.extend(next);
                }
            },
            '[' if !in_class => {
                in_class = true;
                out.push('[');
                out.extend(chars.next_if_eq(&'^'));
                // At the start of a class, the bracket is an element.
                if chars.next_if_eq(&']').is_some() {
                    out.push_str(r"\]");
                }
            }
            ']' if in_class => {
                in_class = false;
                out.push(']');
            }
            // Inside a class, Python takes these characters literally.
            '[' | '&' | '~' if in_class => out.extend(['\\', c]),
            // In Python, `$` also matches before a line break at the end of the text.
            '$' if !in_class && !is_multi_line => out.push_str(r"(?=\n?\z)"),
            other => out.push(other),
        }
    }
    Regex::new(&out).map_err(|e| format!("the pattern {pattern:?}: {e}"))
}

/// Options of the metric `exact_match`.
#[derive(Clone, Debug, Default)]
pub(crate) struct ExactMatch {
    pub(super) ignored: Vec<Regex>,
    pub(super) ignore_case: bool,
    pub(super) ignore_punctuation: bool,
    pub(super) ignore_numbers: bool,
}

impl ExactMatch {
    fn normalized(&self, text: &str) -> Result<String, String> {
        let mut text = text.to_owned();
        for pattern in &self.ignored {
            let replaced = pattern.try_replacen(&text, 0, "").map_err(|e| format!("exact_match: {e}"))?;
            text = replaced.into_owned();
        }
        if self.ignore_case {
            text = text.to_lowercase();
        }
        if self.ignore_punctuation {
            text.retain(|c| !c.is_ascii_punctuation());
        }
        if self.ignore_numbers {
            text.retain(|c| !c.is_ascii_digit());
        }
        Ok(text)
    }

    /// Returns whether an answer is equal to one of the targets.
    fn is_met(&self, answer: &str, targets: &[String]) -> Result<bool, String> {
        let answer = self.normalized(answer)?;
        for target in targets {
            if self.normalized(target)? == answer {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Correct answers to a question.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Targets {
    /// Texts, one of which the answer has to be.
    Texts(Vec<String>),
    /// Alternatives of one or more spans each, as in DROP.
    Spans(Vec<Vec<String>>),
}

/// Returns the score of an answer for each of `metrics`.
pub(super) fn scores(
    generation: &Generation,
    answer: &str,
    targets: &Targets,
    metrics: &[Metric],
) -> Result<Vec<(f64, f64)>, String> {
    let both = match targets {
        Targets::Spans(alternatives) => alternatives
            .iter()
            .filter(|spans| spans.first().is_some_and(|span| !span.trim_matches(is_space).is_empty()))
            .map(|spans| drop_scores(answer, spans))
            .fold((0.0, 0.0), |best: (f64, f64), (em, f1)| (best.0.max(em), best.1.max(f1))),
        Targets::Texts(texts) => (f64::from(u8::from(generation.exact_match.is_met(answer, texts)?)), 0.0),
    };
    Ok(metrics.iter().map(|metric| (if *metric == Metric::F1 { both.1 } else { both.0 }, 1.0)).collect())
}

/// Returns exact match and F1 of an answer to a question of DROP (Dua et al. 2019, arXiv:1903.00161).
fn drop_scores(answer: &str, spans: &[String]) -> (f64, f64) {
    let bag = |text: &str| -> BTreeSet<String> { words(text).map(str::to_owned).collect() };
    let answer = normalized_span(answer);
    let spans: Vec<String> = spans.iter().map(|span| normalized_span(span)).collect();
    let exact = spans.len() == 1 && spans[0] == answer;
    let found = bag(&answer);
    let numbers =
        |bag: &BTreeSet<String>| bag.iter().filter(|word| float(word).is_some()).cloned().collect::<BTreeSet<_>>();
    let f1 = |span: &String| {
        let gold = bag(span);
        let wanted = numbers(&gold);
        if !wanted.is_empty() && wanted.is_disjoint(&numbers(&found)) {
            return 0.0;
        }
        let common = gold.intersection(&found).count() as f64;
        let share = |bag: &BTreeSet<String>| if bag.is_empty() { 1.0 } else { common / bag.len() as f64 };
        let (precision, recall) = (share(&found), share(&gold));
        if precision == 0.0 && recall == 0.0 { 0.0 } else { 2.0 * precision * recall / (precision + recall) }
    };
    // There is one answer, so it is aligned with the span that it fits best.
    let best = spans.iter().map(f1).fold(0.0, f64::max);
    let mean = best / spans.len().max(1) as f64;
    (f64::from(u8::from(exact)), (mean * 100.0).round_ties_even() / 100.0)
}

/// Splits a text at white space, as Python does.
fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(is_space).filter(|word| !word.is_empty())
}

/// Lowercases an answer of DROP, removes punctuation and articles, and writes numbers as Python writes a float.
fn normalized_span(text: &str) -> String {
    let token = |token: &str| {
        let token = token.to_lowercase();
        let token: String =
            if float(&token).is_some() { token } else { token.chars().filter(|c| !c.is_ascii_punctuation()).collect() };
        let token = float(&token).map_or(token, crate::python::float_repr);
        let token = without_articles(&token);
        words(&token).collect::<Vec<_>>().join(" ")
    };
    let tokens: Vec<String> = text.split([' ', '-']).map(token).filter(|token| !token.is_empty()).collect();
    tokens.join(" ").trim_matches(is_space).to_owned()
}

/// Replaces the words a, an and the by spaces. Letters, digits and underscores belong to a word.
fn without_articles(text: &str) -> String {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let end = rest.find(|c| is_word(c) != is_word(first)).unwrap_or(rest.len());
        let (part, after) = rest.split_at(end);
        out.push_str(if ["a", "an", "the"].contains(&part) { " " } else { part });
        rest = after;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_mean_what_they_mean_in_python() {
        let sub = |pattern: &str, text: &str| python_regex(pattern).unwrap().replace_all(text, "").into_owned();
        // A final line break, a class with a bracket, a look-behind.
        assert_eq!(sub(r"\.$", "18.\n"), "18\n");
        assert_eq!(sub(r"(?s).*#### ", "a\nb #### 7"), "7");
        assert_eq!(sub(r"[$[\]]", "a$[b]"), "ab");
        assert_eq!(sub(r"[]$]", "a]$b"), "ab");
        assert_eq!(sub(r"(?<=x)\d+\Z", "1x23"), "1x");
        assert_eq!(sub(r"[(\[]([A-D])[)\]]", "x [B] (C) y"), "x   y");
        assert_eq!(sub(r"[[](\d+)$", "[12 [34"), "[12 ");
        assert_eq!(sub(r"[^]a]+", "]bc]a"), "]]a");
        assert!(python_regex("(").is_err());
    }

    #[test]
    fn filters_choose_as_the_harness_does() {
        let read = |json: Value| Filter::read(&json).unwrap();
        let one = |filter: Filter, answer: &str| filtered(&[filter], &[answer.to_owned()]);
        let flexible = || {
            read(
                serde_json::json!({"function": "regex", "group_select": -1, "regex_pattern": "(-?[$0-9.,]{2,})|(-?[0-9]+)"}),
            )
        };
        assert_eq!(one(flexible(), "It is 5, then 1,234.").unwrap(), "1,234.");
        assert_eq!(one(flexible(), "none").unwrap(), "[invalid]");
        let strict =
            read(serde_json::json!({"function": "regex", "regex_pattern": r"#### (\-?[0-9\.\,]+)", "fallback": "?"}));
        assert_eq!(one(strict.clone(), "a #### -12 #### 3").unwrap(), "-12");
        assert_eq!(one(strict, "12").unwrap(), "?");
        let third = read(serde_json::json!({"function": "regex", "group_select": 2, "regex_pattern": "[0-9]"}));
        assert_eq!(one(third.clone(), "1 2 3").unwrap(), "3");
        assert!(one(third, "1 2").unwrap_err().contains("match 2 of an answer with 2 matches"));
        let vote = [Filter::RemoveWhitespace, Filter::MajorityVote, Filter::TakeFirst];
        let answers = ["b", "a ", " a", "b", "c"].map(str::to_owned);
        assert_eq!(filtered(&vote, &answers).unwrap(), "b");
        for (wrong, said) in [
            (serde_json::json!({"function": "custom"}), "custom: this filter is not supported"),
            (serde_json::json!({"function": "regex", "flags": 1}), "regex: the key flags is not supported"),
            (serde_json::json!({"function": "take_first_k"}), "k: expected a whole number, at least 1"),
        ] {
            assert!(Filter::read(&wrong).unwrap_err().contains(said));
        }
    }

    #[test]
    fn answers_of_drop_are_normalized_and_compared() {
        assert_eq!(normalized_span("The  Chicago-Bears, 1,234 (a lot) 3"), "chicago bears 1234.0 lot 3.0");
        assert_eq!(normalized_span("an a. the"), "");
        let spans = |list: &[&str]| list.iter().map(|&text| text.to_owned()).collect::<Vec<_>>();
        assert_eq!(drop_scores("the Bears", &spans(&["Bears"])), (1.0, 1.0));
        assert_eq!(drop_scores("Chicago Bears", &spans(&["Bears"])), (0.0, 0.67));
        assert_eq!(drop_scores("Chicago Bears", &spans(&["Bears", "Chicago Bears"])), (0.0, 0.5));
        assert_eq!(drop_scores("7 yards", &spans(&["8 yards"])), (0.0, 0.0));
        assert_eq!(drop_scores("", &spans(&["8"])), (0.0, 0.0));
    }
}
