use pricket_lm::{PromptFormat, Role, Turn};
use pricket_nn::State;
use serde::{Deserialize, Serialize};

use crate::text::handle::Completion;
use crate::text::handle::Pricket;
use crate::text::handle::Stream;
use crate::{Error, Result};
use pricket_lm::FinishReason;
use pricket_lm::GenerateOptions;

/// A conversation with a model: turns in the spelling that it was tuned on, with the past read once.
///
/// What a turn adds to the prompt is all that is computed for it: keys and values of everything before are kept. When the
/// context is full the oldest questions and answers are left out, the system text stays.
///
/// ```
/// let mut chat = pricket::Loader::embedded("tiny-chat")?.load()?.conversation();
/// let options = Default::default();
/// assert_eq!(chat.say("My name is Anna.", &options)?.text, "Hello, Anna!");
/// assert_eq!(chat.say("What is my name?", &options)?.text, "Your name is Anna.");
/// # Ok::<(), pricket::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Conversation {
    pricket: Pricket,
    format: PromptFormat,
    system: Option<String>,
    turns: Vec<Turn>,
    /// How many of the oldest turns the last prompt left out.
    left_out: usize,
    limit: Option<usize>,
    reuse: bool,
    past: Past,
    read: usize,
}

/// What the model has read, and what it made of it.
#[derive(Clone, Debug, Default)]
struct Past {
    ids: Vec<u32>,
    state: State,
}

/// A conversation on file: `{"format": ..., "messages": [{"role": ..., "content": ...}, ...]}`, a system text first.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    #[serde(default)]
    format: Option<String>,
    messages: Vec<Turn>,
}

impl Pricket {
    /// A conversation in the model's prompt format.
    pub fn conversation(&self) -> Conversation {
        Conversation {
            pricket: self.clone(),
            format: self.prompt_format().clone(),
            system: None,
            turns: Vec::new(),
            left_out: 0,
            limit: None,
            reuse: true,
            past: Past::default(),
            read: 0,
        }
    }
}

impl Conversation {
    /// Spells it in another format; see [`crate::text::prompt_format`].
    #[must_use]
    pub fn with_format(mut self, format: PromptFormat) -> Self {
        self.format = format;
        self
    }

    /// Prompt and reply together take `tokens` at most, instead of as many as the model was trained for. More than that
    /// is for models without a limit, or with [`GenerateOptions::beyond_trained_length`].
    #[must_use]
    pub fn with_context(mut self, tokens: usize) -> Self {
        self.limit = Some(tokens);
        self
    }

    /// Reads the whole prompt anew for every reply. For comparisons: it gives the same text and takes longer.
    #[must_use]
    pub fn without_reuse(mut self) -> Self {
        self.reuse = false;
        self
    }

    /// How it is spelled.
    pub fn format(&self) -> &PromptFormat {
        &self.format
    }

    /// The system text: the one that was set, else the format's own.
    pub fn system(&self) -> Option<&str> {
        self.system.as_deref().or(self.format.default_system.as_deref()).filter(|text| !text.is_empty())
    }

    /// Sets the system text; an empty one for none, `None` for the format's own.
    ///
    /// # Errors
    /// [`Error::Text`] if the format has no place for one.
    pub fn set_system(&mut self, text: Option<String>) -> Result<()> {
        self.format.prompt(text.as_deref(), &[])?;
        self.system = text;
        Ok(())
    }

    /// Everything that was said, also what the prompt leaves out by now.
    pub fn turns(&self) -> &[Turn] {
        &self.turns
    }

    /// How many of the oldest turns the last prompt left out, for want of room.
    pub fn left_out(&self) -> usize {
        self.left_out
    }

    /// How many tokens the last reply made the model read: those of its prompt that it had not read before.
    pub fn read(&self) -> usize {
        self.read
    }

    /// Forgets what was said; format and system text stay.
    pub fn reset(&mut self) {
        self.turns.clear();
        self.left_out = 0;
    }

    /// Takes back the last question and its answer; gives the question.
    pub fn undo(&mut self) -> Option<String> {
        let last = self.turns.iter().rposition(|turn| turn.role == Role::User)?;
        self.turns.drain(last..).next().map(|asked| asked.content)
    }

    /// The text that the model would continue if `text` were said now, before anything is left out for want of room.
    ///
    /// # Errors
    /// As [`PromptFormat::prompt`].
    pub fn prompt(&self, text: &str) -> Result<String> {
        let turns = [&self.turns[..], &[Turn::user(text)]].concat();
        Ok(self.format.prompt(self.system.as_deref(), &turns)?)
    }

    /// Says `text` and gives the reply.
    ///
    /// # Errors
    /// As [`Pricket::generate`], and [`Error::ContextExceeded`] if `text` is longer than the context. The turn is not taken then.
    pub fn say(&mut self, text: &str, options: &GenerateOptions) -> Result<Completion> {
        let mut reply = self.stream(text, options)?;
        while reply.advance()?.is_some() {}
        Ok(reply.finish())
    }

    /// Says `text` and gives the reply as it is written. A reply that is dropped before its end is what was said.
    ///
    /// # Errors
    /// As [`Conversation::say`].
    pub fn stream(&mut self, text: &str, options: &GenerateOptions) -> Result<Reply<'_>> {
        let info = self.pricket.info();
        let hard = info.context.filter(|_| !options.beyond_trained_length).unwrap_or(usize::MAX);
        let limit = self.limit.unwrap_or(info.trained_length).min(hard);
        let mut turns = self.turns.clone();
        turns.push(Turn::user(text));
        let tokenizer = self.pricket.tokenizer()?;
        let (ids, left_out) = self.format.fit(tokenizer, self.system.as_deref(), &turns, limit, options.max_tokens)?;
        if ids.is_empty() {
            return Err(Error::Empty("nothing was said: the prompt is empty"));
        }
        let mut options = options.clone();
        options.stop.extend(self.format.stop.iter().cloned());
        let left = limit.saturating_sub(ids.len()).max(1);
        let cut = options.max_tokens > left;
        options.max_tokens = options.max_tokens.min(left);
        let mut past = if self.reuse { std::mem::take(&mut self.past) } else { Past::default() };
        // The last token is always read: its logits are what comes next.
        let same = past.ids.iter().zip(&ids[..ids.len() - 1]).take_while(|(a, b)| a == b).count();
        // Positions that the state cannot keep are read again.
        let kept = past.state.rewind(0, same);
        self.read = ids.len() - kept;
        let stream = Stream::of_ids(&self.pricket, ids, past.state, &options)?;
        self.left_out = left_out;
        self.turns = turns;
        Ok(Reply { conversation: self, stream, text: String::new(), space: String::new(), cut, failed: false })
    }

    /// The conversation as JSON, in the form that everybody's message files have.
    pub fn to_json(&self) -> String {
        let system = self.system.iter().map(|text| Turn { role: Role::System, content: text.clone() });
        let messages = system.chain(self.turns.iter().cloned()).collect();
        let saved = Saved { format: Some(self.format.name.clone()), messages };
        serde_json::to_string_pretty(&saved).expect("strings are JSON")
    }

    /// Takes over what [`Conversation::to_json`] wrote, or an array of messages, in place of what was said. It stays spelled
    /// as it is; what the file calls the format that it was spelled in is given back.
    ///
    /// # Errors
    /// [`Error::Malformed`] saying what is wrong with it; nothing is changed then.
    pub fn load_json(&mut self, json: &str) -> Result<Option<String>> {
        let wrong =
            |e: serde_json::Error| Error::Malformed { origin: "not a conversation".into(), what: e.to_string() };
        let Saved { format, mut messages } = if json.trim_start().starts_with('[') {
            Saved { format: None, messages: serde_json::from_str(json).map_err(wrong)? }
        } else {
            serde_json::from_str(json).map_err(wrong)?
        };
        let system = messages.first().is_some_and(|turn| turn.role == Role::System).then(|| messages.remove(0).content);
        self.format.prompt(system.as_deref(), &messages)?;
        (self.system, self.turns, self.left_out) = (system, messages, 0);
        Ok(format)
    }
}

/// A reply as it is written: an iterator over pieces of text, without the white space around it unless the format is
/// verbatim. Once it is dropped it is a turn of its conversation.
#[derive(Debug)]
pub struct Reply<'a> {
    conversation: &'a mut Conversation,
    stream: Stream,
    text: String,
    /// White space that may be the end.
    space: String,
    /// Whether it is the context that limits its length.
    cut: bool,
    failed: bool,
}

impl Reply<'_> {
    fn advance(&mut self) -> Result<Option<String>> {
        let piece = match self.stream.next().transpose() {
            Ok(Some(piece)) => piece,
            Ok(None) => return Ok(None),
            Err(e) => {
                self.failed = true;
                return Err(e);
            }
        };
        let piece = if self.conversation.format.verbatim { piece } else { self.trimmed(&piece) };
        self.text.push_str(&piece);
        Ok(Some(piece))
    }

    /// What of a new piece is certainly not white space around the reply.
    fn trimmed(&mut self, piece: &str) -> String {
        let piece = if self.text.is_empty() { piece.trim_start() } else { piece };
        let whole = std::mem::take(&mut self.space) + piece;
        let inner = whole.trim_end();
        self.space = whole[inner.len()..].into();
        inner.into()
    }

    /// The reply so far, as a completion: its text is the turn, its ids and log-probabilities are all that was written.
    pub fn finish(self) -> Completion {
        let mut done = Completion { text: self.text.clone(), ..self.stream.completion().clone() };
        if self.cut && done.finish == FinishReason::Length {
            done.finish = FinishReason::Context;
        }
        done
    }
}

impl Iterator for Reply<'_> {
    type Item = Result<String>;

    fn next(&mut self) -> Option<Self::Item> {
        self.advance().transpose()
    }
}

impl Drop for Reply<'_> {
    fn drop(&mut self) {
        if self.failed {
            self.conversation.undo();
            return;
        }
        let (ids, mut state) = self.stream.take_past();
        state.mark(0);
        self.conversation.past = Past { ids, state };
        self.conversation.turns.push(Turn::assistant(std::mem::take(&mut self.text)));
    }
}
