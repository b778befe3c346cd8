//! Training data: JSON lines of several forms, and what becomes of a record.

use std::io::{BufRead, BufReader};
use std::path::Path;

use pricket_lm::{PromptFormat, Role, Tokenizer, Turn};
use pricket_weights::clip;
use serde_json::Value;

use crate::{Error, Result, Sample};

/// Longest line that is read.
const MAX_LINE: usize = 64 << 20;

/// A training example, as data files have it.
///
/// ```
/// use pricket_train::Record;
/// let record = Record::from_json(&serde_json::json!({"prompt": "1 + 1 =", "completion": " 2"}))?;
/// assert!(matches!(record, Record::Pair { .. }));
/// # Ok::<(), pricket_train::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Record {
    /// `input_ids`, tokenized before; those count whose place in `labels` is not -100, or all.
    Ids(Sample),
    /// `text`: all of it counts.
    Text(String),
    /// `prompt` with `completion` or `response`, verbatim; the second counts.
    Pair {
        /// Text before the response.
        prompt: String,
        /// Text that the model learns to write.
        response: String,
    },
    /// `instruction`, `context` and `response`, as Dolly's 15,000; spelled by a prompt format.
    Instruction {
        /// The question.
        instruction: String,
        /// A text that the question is about; may be empty.
        context: String,
        /// The answer, which counts.
        response: String,
    },
    /// `messages` with `role` and `content`; spelled by a prompt format. What the assistant says counts.
    Chat {
        /// The system text, if there is one.
        system: Option<String>,
        /// The turns after it, which end with one of the assistant.
        turns: Vec<Turn>,
    },
}

impl Record {
    /// The keys decide the form; unknown keys are ignored.
    ///
    /// # Errors
    /// [`Error::Input`] naming the keys, if they are those of no form or have other values than texts.
    pub fn from_json(json: &Value) -> Result<Self> {
        let Some(object) = json.as_object() else { return Err(Error::Input("expected an object".into())) };
        let has = |key: &str| object.get(key).is_some_and(|value| !value.is_null());
        let text = |key: &str| match object.get(key) {
            Some(Value::String(text)) => Ok(text.clone()),
            None | Some(Value::Null) => Ok(String::new()),
            Some(other) => Err(Error::Input(format!("{key} is {}; expected a text", clip(&other.to_string())))),
        };
        if has("input_ids") {
            return Self::ids(json);
        }
        if has("messages") {
            return Self::chat(&json["messages"]);
        }
        if has("instruction") {
            let answer = ["response", "output"].into_iter().find(|key| has(key));
            let answer = answer.ok_or_else(|| Error::Input("instruction without response".into()))?;
            let context = if has("context") { "context" } else { "input" };
            return Ok(Record::Instruction {
                instruction: text("instruction")?,
                context: text(context)?,
                response: text(answer)?,
            });
        }
        if has("prompt") {
            let answer = ["completion", "response"].into_iter().find(|key| has(key));
            let answer = answer.ok_or_else(|| Error::Input("prompt without completion".into()))?;
            return Ok(Record::Pair { prompt: text("prompt")?, response: text(answer)? });
        }
        if has("text") {
            return Ok(Record::Text(text("text")?));
        }
        let keys = object.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
        let forms = "input_ids; messages; instruction with response; prompt with completion; or text";
        Err(Error::Input(format!("expected {forms}; found {}", clip(&keys))))
    }

    fn ids(json: &Value) -> Result<Self> {
        let wrong = |key: &str| Error::Input(format!("{key}: expected a list of token ids"));
        let list = |key: &str| -> Result<Option<Vec<i64>>> {
            let Some(list) = json.get(key).filter(|list| !list.is_null()) else { return Ok(None) };
            let numbers = list.as_array().ok_or_else(|| wrong(key))?.iter().map(Value::as_i64);
            numbers.collect::<Option<_>>().map(Some).ok_or_else(|| wrong(key))
        };
        let ids = list("input_ids")?.unwrap_or_default();
        let whole = ids.iter().map(|&id| u32::try_from(id)).collect::<Result<Vec<_>, _>>();
        let whole = whole.map_err(|_| wrong("input_ids"))?;
        let Some(labels) = list("labels")? else { return Ok(Record::Ids(Sample::new(whole)?)) };
        let is_its_own = |(label, id): (&i64, &i64)| *label == -100 || label == id;
        if labels.len() != ids.len() || !labels.iter().zip(&ids).all(is_its_own) {
            return Err(Error::Input("labels: expected -100 or the id at the same place of input_ids".into()));
        }
        Ok(Record::Ids(Sample::masked(whole, labels.iter().map(|label| *label != -100).collect())?))
    }

    fn chat(messages: &Value) -> Result<Self> {
        let wrong = || Error::Input("messages: expected a list of objects with role and content".into());
        let (mut system, mut turns) = (None, Vec::<Turn>::new());
        for (i, message) in messages.as_array().ok_or_else(wrong)?.iter().enumerate() {
            let content = message["content"].as_str().ok_or_else(wrong)?.to_owned();
            match message["role"].as_str().ok_or_else(wrong)? {
                "system" if i == 0 => system = Some(content),
                "user" | "human" => turns.push(Turn::user(content)),
                "assistant" | "gpt" => turns.push(Turn::assistant(content)),
                role => {
                    let what = format!("messages: message {} has role {}", i + 1, clip(role));
                    return Err(Error::Input(format!("{what}; expected system first, then user and assistant")));
                }
            }
        }
        while turns.last().is_some_and(|turn| turn.role == Role::User) {
            turns.pop();
        }
        if turns.is_empty() {
            return Err(Error::Input("messages: the assistant says nothing".into()));
        }
        Ok(Record::Chat { system, turns })
    }

    /// The text before the first id that counts.
    ///
    /// # Errors
    /// As [`PromptFormat::prompt`].
    pub fn prompt(&self, format: &PromptFormat) -> Result<String> {
        Ok(self.parts(format)?.into_iter().take_while(|(_, counts)| !counts).map(|(text, _)| text).collect())
    }

    /// The record as token ids. Prompt and response are tokenized apart, as llm-foundry does, but for sentencepiece, which would put a space
    /// between them; `end` follows the response.
    ///
    /// # Errors
    /// As [`PromptFormat::prompt`]; [`Error::Input`] if nothing counts, or for text without a tokenizer.
    pub fn sample(&self, tokenizer: Option<&Tokenizer>, format: &PromptFormat, end: &[u32]) -> Result<Sample> {
        if let Record::Ids(sample) = self {
            return Ok(sample.clone());
        }
        let tokenizer =
            tokenizer.ok_or_else(|| Error::Input("text needs a tokenizer, and the model has none".into()))?;
        let mut ids: Vec<u32> = tokenizer.begin().into_iter().collect();
        let mut counts = vec![false; ids.len()];
        let mut whole = String::new();
        for (text, part_counts) in self.parts(format)? {
            let part = if tokenizer.has_text_start() {
                // What the text so far has in common with the longer one stays; a token across the border is the part's.
                whole.push_str(&text);
                let all = tokenizer.encode_prompt(&whole)?;
                let common = ids.iter().zip(&all).take_while(|(a, b)| a == b).count();
                ids.truncate(common);
                counts.truncate(common);
                all[common..].to_vec()
            } else {
                tokenizer.encode(&text)?
            };
            counts.resize(counts.len() + part.len(), part_counts);
            ids.extend(part);
        }
        // A format may have ended the turn with the end token already.
        if !ids.ends_with(end) {
            counts.resize(counts.len() + end.len(), true);
            ids.extend_from_slice(end);
        }
        let sample = Sample::masked(ids, counts)?;
        if sample.counted() == 0 {
            return Err(Error::Input("the response is empty".into()));
        }
        Ok(sample)
    }

    /// Pieces of text, and whether they count.
    fn parts(&self, format: &PromptFormat) -> Result<Vec<(String, bool)>> {
        match self {
            Record::Ids(_) => Ok(Vec::new()),
            Record::Text(text) => Ok(vec![(text.clone(), true)]),
            Record::Pair { prompt, response } => Ok(vec![(prompt.clone(), false), (response.clone(), true)]),
            Record::Instruction { instruction, context, response } => {
                let question = format.with_context(instruction, context);
                let prompt = format.prompt(None, &[Turn::user(question)])?;
                Ok(vec![(prompt, false), (format!("{}{response}", around(format).0), true)])
            }
            Record::Chat { system, turns } => {
                let (mut parts, mut done) = (Vec::new(), String::new());
                for (i, turn) in turns.iter().enumerate().filter(|(_, turn)| turn.role == Role::Assistant) {
                    let prompt = format.prompt(system.as_deref(), &turns[..i])?;
                    let Some(more) = prompt.strip_prefix(&done) else {
                        let what =
                            "answers are not a part of the conversation that follows, so it cannot be trained on";
                        return Err(Error::Input(format!("prompt format {}: {what}", format.name)));
                    };
                    // The model learns to write the end of its turn too.
                    let (before, end) = around(format);
                    let said = format!("{before}{}{end}", turn.content);
                    parts.push((more.to_owned(), false));
                    parts.push((said.clone(), true));
                    done = format!("{prompt}{said}");
                }
                Ok(parts)
            }
        }
    }
}

/// Text between the beginning of the model's turn and its answer, and text that ends the turn, up to the first stop string.
fn around(format: &PromptFormat) -> (&str, &str) {
    let (before, after) = format.assistant.split_once("{text}").unwrap_or_default();
    let before = before.strip_prefix(&format.reply).unwrap_or_default();
    let stops = format.stop.iter().filter_map(|stop| Some(after.find(stop.as_str())? + stop.len()));
    (before, stops.min().map_or(after, |end| &after[..end]))
}

/// Reads a file of JSON lines; empty lines are passed over.
///
/// # Errors
/// [`Error::Data`] with the line, [`Error::Io`] if the file cannot be read.
pub fn read_records(path: impl AsRef<Path>) -> Result<Vec<Record>> {
    let path = path.as_ref();
    let file = std::fs::File::open(path).map_err(Error::io(path))?;
    let (mut out, mut reader, mut line) = (Vec::new(), BufReader::new(file), Vec::new());
    for number in 1.. {
        line.clear();
        let wrong = |what: String| Error::Data { path: path.into(), line: number, what: clip(&what) };
        let mut limited = std::io::Read::take(&mut reader, MAX_LINE as u64 + 1);
        if limited.read_until(b'\n', &mut line).map_err(Error::io(path))? == 0 {
            break;
        }
        if line.len() > MAX_LINE {
            return Err(wrong(format!("is longer than {} MiB", MAX_LINE >> 20)));
        }
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let json = serde_json::from_slice(&line).map_err(|e| wrong(format!("is not JSON: {e}")))?;
        out.push(Record::from_json(&json).map_err(|e| wrong(e.to_string()))?);
    }
    if out.is_empty() {
        return Err(Error::Input(format!("{}: the file has no records", path.display())));
    }
    Ok(out)
}
