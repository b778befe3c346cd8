//! Built-in tasks, as lm-evaluation-harness 0.4 defines them: the tasks that papers about these models report.

use std::sync::{Arc, LazyLock};

use regex::Regex;
use serde_json::Value;

use super::generation::{Generation, Targets};
use super::{Asked, Choices, Layout, Metric, Sampler, Task, TaskKind};
use crate::python::{capitalize, is_space};

pub(super) const NAMES: [&str; 9] =
    ["lambada_openai", "hellaswag", "piqa", "winogrande", "arc_easy", "arc_challenge", "sciq", "wikitext", "drop"];

const CHOICES: &[Metric] = &[Metric::Acc, Metric::AccNorm];

pub(super) fn task(name: &str) -> Option<Task> {
    type Plain = fn(&Value) -> Result<Asked, String>;
    let choices =
        |ask: Plain, has_test, repo, config| (TaskKind::MultipleChoice, CHOICES, ask, has_test, true, repo, config);
    let (kind, metrics, ask, has_test, has_train, repo, config) = match name {
        "lambada_openai" => (
            TaskKind::Loglikelihood,
            &[Metric::Perplexity, Metric::Acc][..],
            lambada as Plain,
            true,
            false,
            "EleutherAI/lambada_openai",
            Some("default"),
        ),
        "hellaswag" => choices(hellaswag, false, "Rowan/hellaswag", None),
        "piqa" => choices(piqa, false, "baber/piqa", None),
        "winogrande" => {
            let task = choices(winogrande, false, "allenai/winogrande", Some("winogrande_xl"));
            (task.0, &CHOICES[..1], task.2, task.3, task.4, task.5, task.6)
        }
        "arc_easy" => choices(arc, true, "allenai/ai2_arc", Some("ARC-Easy")),
        "arc_challenge" => choices(arc, true, "allenai/ai2_arc", Some("ARC-Challenge")),
        "sciq" => choices(sciq, true, "allenai/sciq", None),
        "wikitext" => (
            TaskKind::Perplexity,
            &[Metric::WordPerplexity, Metric::BytePerplexity, Metric::BitsPerByte][..],
            wikitext as Plain,
            true,
            true,
            "EleutherAI/wikitext_document_level",
            Some("wikitext-2-raw-v1"),
        ),
        "drop" => (
            TaskKind::Generation,
            &[Metric::Em, Metric::F1][..],
            drop_question as Plain,
            false,
            true,
            "EleutherAI/drop",
            None,
        ),
        _ => return None,
    };
    let version = match name {
        "wikitext" => 2.0,
        "drop" => 3.0,
        _ => 1.0,
    };
    let is_drop = name == "drop";
    let generation = || Generation { until: vec![".".into()], ..Generation::default() };
    let layout = Layout { target_delimiter: if is_drop { "" } else { " " }.into(), ..Layout::default() };
    Some(Task {
        name: name.into(),
        definition: format!("built-in {name} {version:?}"),
        version: version.into(),
        kind,
        metrics: metrics.to_vec(),
        split: if has_test { "test" } else { "validation" }.into(),
        examples_split: has_train.then(|| "train".into()),
        sampler: Sampler::Random { spare: !has_test },
        layout,
        samples: None,
        generation: is_drop.then(|| Arc::new(generation())),
        shots: None,
        files: None,
        dataset: Some((repo.into(), config.map(Into::into))),
        ask: Arc::new(ask),
    })
}

/// A question of DROP. The accepted answers are the answer and the validated answers, each as one or more spans.
fn drop_question(document: &Value) -> Result<Asked, String> {
    let spans = |number: &Value, spans: &Value, date: &Value, key: &str| -> Result<Vec<String>, String> {
        match number {
            Value::String(number) if number.is_empty() => {}
            Value::String(number) => return Ok(vec![number.clone()]),
            Value::Number(number) => return Ok(vec![number.to_string()]),
            other => return Err(wrong(&format!("{key}.number"), "a string or a number", other)),
        }
        let spans = texts(spans, &format!("{key}.spans"))?;
        if !spans.is_empty() {
            return Ok(spans);
        }
        let parts = ["day", "month", "year"].map(|part| text(date, part));
        let [day, month, year] = parts;
        Ok(vec![format!("{} {} {}", day?, month?, year?).trim_matches(is_space).to_owned()])
    };
    let answer = &document["answer"];
    let mut alternatives = vec![spans(&answer["number"], &answer["spans"], &answer["date"], "answer")?];
    let validated = &document["validated_answers"];
    for (i, number) in validated["number"].as_array().into_iter().flatten().enumerate() {
        let found = spans(number, &validated["spans"][i], &validated["date"][i], "validated_answers")?;
        if !alternatives.contains(&found) {
            alternatives.push(found);
        }
    }
    let context = format!("{} {}", text(document, "passage")?, text(document, "question")?);
    // In the harness, the answer of an example is the list of the names of the fields.
    let keys: Vec<&str> = answer.as_object().into_iter().flatten().map(|(key, _)| key.as_str()).collect();
    Ok(Asked::Question { context, targets: Targets::Spans(alternatives), example: keys.join(",") })
}

fn text<'a>(document: &'a Value, key: &str) -> Result<&'a str, String> {
    document[key].as_str().ok_or_else(|| wrong(key, "a string", &document[key]))
}

fn texts(value: &Value, key: &str) -> Result<Vec<String>, String> {
    let list = value.as_array().ok_or_else(|| wrong(key, "a list of strings", value))?;
    list.iter().map(|x| x.as_str().map(str::to_owned).ok_or_else(|| wrong(key, "a list of strings", x))).collect()
}

/// Reads the index of a choice, given as a number or as a string of digits.
fn number(document: &Value, key: &str) -> Result<usize, String> {
    let value = &document[key];
    let number = value.as_u64().or_else(|| value.as_str().and_then(|text| text.trim().parse().ok()));
    number.map(|n| n as usize).ok_or_else(|| wrong(key, "the index of a choice", value))
}

fn wrong(key: &str, expected: &str, found: &Value) -> String {
    let found: String = found.to_string().chars().take(60).collect();
    format!("expected {expected} under {key:?}, found {found}")
}

fn choices(context: String, choices: &[String], answer: usize) -> Result<Asked, String> {
    if answer >= choices.len() {
        return Err(format!("answer {answer} is out of range for {} choices", choices.len()));
    }
    Ok(Asked::Choices(Choices::new(vec![context], " ", choices, vec![answer])))
}

/// LAMBADA: predicts the last word of a passage (Paperno et al. 2016, arXiv:1606.06031). Uses OpenAI's version of the
/// texts.
fn lambada(document: &Value) -> Result<Asked, String> {
    let text = text(document, "text")?;
    let (context, word) = text.rsplit_once(' ').unwrap_or(("", text));
    Ok(Asked::Continuation { context: context.into(), continuation: format!(" {word}") })
}

/// HellaSwag: chooses the continuation of a described situation (Zellers et al. 2019, arXiv:1905.07830).
fn hellaswag(document: &Value) -> Result<Asked, String> {
    // Bracketed text is an artifact of WikiHow.
    static BRACKETS: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"\[.*?\]").expect("a pattern"));
    let cleaned = |text: &str| {
        let text = text.trim_matches(is_space).replace(" [title]", ". ");
        BRACKETS.replace_all(&text, "").replace("  ", " ")
    };
    let (activity, a, b) = (text(document, "activity_label")?, text(document, "ctx_a")?, text(document, "ctx_b")?);
    let endings: Vec<String> = texts(&document["endings"], "endings")?.iter().map(|x| cleaned(x)).collect();
    choices(cleaned(&format!("{activity}: {a} {}", capitalize(b))), &endings, number(document, "label")?)
}

/// PIQA: chooses the solution of an everyday physical problem (Bisk et al. 2020, arXiv:1911.11641).
fn piqa(document: &Value) -> Result<Asked, String> {
    let solutions = [text(document, "sol1")?.to_owned(), text(document, "sol2")?.to_owned()];
    choices(format!("Question: {}\nAnswer:", text(document, "goal")?), &solutions, number(document, "label")?)
}

/// WinoGrande: chooses the option that fills a blank (Sakaguchi et al. 2020, arXiv:1907.10641). Each option is scored
/// by the likelihood of the text after the blank (Trinh and Le 2018, arXiv:1806.02847).
fn winogrande(document: &Value) -> Result<Asked, String> {
    let sentence = text(document, "sentence")?;
    let (before, after) =
        sentence.split_once('_').ok_or_else(|| format!("the sentence {sentence:?} has no blank (_)"))?;
    let contexts = [text(document, "option1")?, text(document, "option2")?].map(|option| format!("{before}{option}"));
    let answer = match text(document, "answer")? {
        "1" => 0,
        "2" => 1,
        other => return Err(format!("the answer is {other:?}; expected \"1\" or \"2\"")),
    };
    Ok(Asked::Choices(Choices {
        lengths: contexts.iter().map(|context| context.as_str().into()).collect(),
        contexts: contexts.to_vec(),
        continuations: vec![format!(" {}", after.trim_matches(is_space))],
        answers: vec![answer],
    }))
}

/// ARC: questions from school science examinations (Clark et al. 2018, arXiv:1803.05457).
fn arc(document: &Value) -> Result<Asked, String> {
    let labels = texts(&document["choices"]["label"], "choices.label")?;
    let key = text(document, "answerKey")?;
    let answer = labels.iter().position(|label| label == key);
    let answer = answer.ok_or_else(|| format!("the answer is {key:?}; expected one of {labels:?}"))?;
    let options = texts(&document["choices"]["text"], "choices.text")?;
    choices(format!("Question: {}\nAnswer:", text(document, "question")?), &options, answer)
}

/// SciQ: science questions, each with a supporting passage (Welbl et al. 2017, arXiv:1707.06209).
fn sciq(document: &Value) -> Result<Asked, String> {
    let options = ["distractor1", "distractor2", "distractor3", "correct_answer"];
    let options: Vec<String> =
        options.iter().map(|key| text(document, key).map(str::to_owned)).collect::<Result<_, _>>()?;
    let support = text(document, "support")?.trim_start_matches(is_space);
    choices(format!("{support}\nQuestion: {}\nAnswer:", text(document, "question")?), &options, 3)
}

/// WikiText: scores whole pages of Wikipedia (Merity et al. 2016, arXiv:1609.07843). The text is the detokenized page.
/// The numbers of words and bytes are those of the page before detokenization.
fn wikitext(document: &Value) -> Result<Asked, String> {
    let page = text(document, "page")?;
    Ok(Asked::Text { text: detokenized(page), words: count_words(page), bytes: page.len() })
}

/// Counts the pieces between runs of spaces: the length of Python's `re.split(r"\s+", text)`.
pub(super) fn count_words(text: &str) -> usize {
    let mut runs = 0;
    let mut before = false;
    for c in text.chars() {
        let space = is_space(c);
        runs += usize::from(space && !before);
        before = space;
    }
    runs + 1
}

fn detokenized(page: &str) -> String {
    static PATTERNS: LazyLock<[(Regex, &str); 6]> = LazyLock::new(|| {
        [
            (r"/' [0-9]/", "/'[0-9]/"),
            (r"\([\s\x1c-\x1f]*([^\)]*?)[\s\x1c-\x1f]*\)", "(${1})"),
            (r"\[[\s\x1c-\x1f]*([^\]]*?)[\s\x1c-\x1f]*\]", "[${1}]"),
            (r"\{[\s\x1c-\x1f]*([^}]*?)[\s\x1c-\x1f]*\}", "{${1}}"),
            (r#""[\s\x1c-\x1f]*([^"]*?)[\s\x1c-\x1f]*""#, r#""${1}""#),
            (r"'[\s\x1c-\x1f]*([^']*?)[\s\x1c-\x1f]*'", "'${1}'"),
        ]
        .map(|(pattern, with)| (Regex::new(pattern).expect("a pattern"), with))
    });
    let replaced = |text: String, pairs: &[(&str, &str)]| pairs.iter().fold(text, |text, (a, b)| text.replace(a, b));
    let pattern = |text: String, i: usize| PATTERNS[i].0.replace_all(&text, PATTERNS[i].1).into_owned();
    let text = pattern(page.replace("s '", "s'"), 0);
    let marks = [
        (" @-@ ", "-"),
        (" @,@ ", ","),
        (" @.@ ", "."),
        (" : ", ": "),
        (" ; ", "; "),
        (" . ", ". "),
        (" ! ", "! "),
        (" ? ", "? "),
        (" , ", ", "),
    ];
    let text = (1..6).fold(replaced(text, &marks), pattern);
    let rest = [
        ("= = = =", "===="),
        ("= = =", "==="),
        ("= =", "=="),
        (" \u{b0} ", "\u{b0}"),
        (" \n", "\n"),
        ("\n ", "\n"),
        (" N ", " 1 "),
        (" 's", "'s"),
    ];
    replaced(text, &rest)
}
