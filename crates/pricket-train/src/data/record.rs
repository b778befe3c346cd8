//! Records of training data, and their conversion to token ids.
//!
//! The keys of a record decide its form: `input_ids`, `messages`, `instruction` with `response`, `prompt` with
//! `completion`, or `text`. See [`Record`].

use pricket_lm::{PromptFormat, Role, Tokenizer, Turn};
use pricket_weights::clip;
use serde_json::Value;

use crate::{Error, Result, Sample};

/// A training example of a data file.
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
    /// `input_ids`: token ids. Ids whose entry in `labels` is -100 are not counted in the loss. Without `labels`, all
    /// are counted.
    Ids(Sample),
    /// `text`: all of it is counted in the loss.
    Text(String),
    /// `prompt` with `completion` or `response`, used verbatim. Only the response is counted in the loss.
    Pair {
        /// Text before the response.
        prompt: String,
        /// Text that the model learns to write.
        response: String,
    },
    /// `instruction`, `context` and `response`, as in the databricks-dolly-15k dataset, written in a prompt format.
    ///
    /// Only the response is counted in the loss.
    Instruction {
        /// The question.
        instruction: String,
        /// Text that the question refers to. May be empty.
        context: String,
        /// The answer.
        response: String,
    },
    /// `messages` with `role` and `content`, written in a prompt format. Only the assistant's messages are counted in
    /// the loss.
    Chat {
        /// The system text, if there is one.
        system: Option<String>,
        /// The turns after the system text. The last one is the assistant's.
        turns: Vec<Turn>,
    },
}

impl Record {
    /// Reads a record from a JSON object. The keys decide the form; unknown keys are ignored.
    ///
    /// # Errors
    /// Returns [`Error::Input`] with the keys if they match no form, or if a value is missing or has the wrong type.
    pub fn from_json(json: &Value) -> Result<Self> {
        let Some(object) = json.as_object() else { return Err(Error::Input("expected an object".into())) };
        let has = |key: &str| object.get(key).is_some_and(|value| !value.is_null());
        let text = |key: &str| match object.get(key) {
            Some(Value::String(text)) => Ok(text.clone()),
            None | Some(Value::Null) => Ok(String::new()),
            Some(other) => Err(Error::Input(format!("{key} is {}; expected a string", clip(&other.to_string())))),
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
            return Err(Error::Input("messages: expected at least one message of the assistant".into()));
        }
        Ok(Record::Chat { system, turns })
    }

    /// Returns the text before the first text that is counted in the loss.
    ///
    /// # Errors
    /// Returns the errors of [`PromptFormat::prompt`].
    pub fn prompt(&self, format: &PromptFormat) -> Result<String> {
        Ok(self.parts(format)?.into_iter().take_while(|(_, counts)| !counts).map(|(text, _)| text).collect())
    }

    /// Converts the record to token ids, with `end` after the response.
    ///
    /// Prompt and response are tokenized separately, as in llm-foundry. With a sentencepiece tokenizer they are
    /// tokenized together, because a separate response would begin with an extra space.
    ///
    /// # Errors
    /// Returns the errors of [`PromptFormat::prompt`]. Returns [`Error::NoResponse`] if all text that would be counted
    /// in the loss is blank, and [`Error::Input`] if the record is text and `tokenizer` is `None`.
    pub fn sample(&self, tokenizer: Option<&Tokenizer>, format: &PromptFormat, end: &[u32]) -> Result<Sample> {
        if let Record::Ids(sample) = self {
            return if sample.counted() == 0 { Err(Error::NoResponse) } else { Ok(sample.clone()) };
        }
        if self.is_blank() {
            return Err(Error::NoResponse);
        }
        let tokenizer =
            tokenizer.ok_or_else(|| Error::Input("text needs a tokenizer, and the model has none".into()))?;
        let mut ids: Vec<u32> = tokenizer.begin().into_iter().collect();
        let mut counts = vec![false; ids.len()];
        let mut whole = String::new();
        for (text, part_counts) in self.parts(format)? {
            let part = if tokenizer.has_text_start() {
                // Keep the ids that both tokenizations share. A token across the border belongs to the new part.
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
        // A prompt format may already end the turn with the end token.
        if !ids.ends_with(end) {
            counts.resize(counts.len() + end.len(), true);
            ids.extend_from_slice(end);
        }
        let sample = Sample::masked(ids, counts)?;
        if sample.counted() == 0 { Err(Error::NoResponse) } else { Ok(sample) }
    }

    /// Returns whether all text that would be counted in the loss is blank.
    fn is_blank(&self) -> bool {
        let is_blank = |text: &str| text.trim().is_empty();
        match self {
            Record::Ids(_) => false,
            Record::Text(text) => is_blank(text),
            Record::Pair { response, .. } | Record::Instruction { response, .. } => is_blank(response),
            Record::Chat { turns, .. } => {
                turns.iter().filter(|turn| turn.role == Role::Assistant).all(|turn| is_blank(&turn.content))
            }
        }
    }

    /// Returns the pieces of text in order, each with whether it is counted in the loss.
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
                            "later prompts do not repeat earlier turns unchanged; train on conversations of one turn";
                        return Err(Error::Input(format!("prompt format {}: {what}", format.name)));
                    };
                    // The end of the turn is counted too, so that the model learns to stop.
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

/// Returns the text between the start of the model's turn and its answer, and the text after the answer up to the end
/// of the first stop string.
fn around(format: &PromptFormat) -> (&str, &str) {
    let (before, after) = format.assistant.split_once("{text}").unwrap_or_default();
    let before = before.strip_prefix(&format.reply).unwrap_or_default();
    let stops = format.stop.iter().filter_map(|stop| Some(after.find(stop.as_str())? + stop.len()));
    (before, stops.min().map_or(after, |end| &after[..end]))
}
