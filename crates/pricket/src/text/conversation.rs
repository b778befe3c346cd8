//! Conversations: turns in a prompt format, over a state that is reused from turn to turn.

use pricket_lm::{Engine, EngineOptions, PromptFormat, Role, Speculation, SpeculationOptions, Turn};
use serde::{Deserialize, Serialize};

use crate::text::handle::Completion;
use crate::text::handle::Pricket;
use crate::text::handle::Stream;
use crate::{Error, Result};
use pricket_lm::FinishReason;
use pricket_lm::GenerateOptions;

/// A conversation with a model, in the prompt format that the model was tuned for.
///
/// The state of earlier turns is kept, so each turn computes only the tokens that it adds. When the context is full,
/// the oldest turns are left out of the prompt; the system text stays.
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
    /// Number of oldest turns that the last prompt left out.
    left_out: usize,
    limit: Option<usize>,
    reuse: bool,
    /// Engine that keeps the state after the last reply; `None` before the first one.
    engine: Option<Engine>,
    draft: Option<(Pricket, SpeculationOptions)>,
    read: usize,
}

/// JSON form of a conversation: `{"format": ..., "messages": [{"role": ..., "content": ...}, ...]}`. The system text,
/// if any, is the first message.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    #[serde(default)]
    format: Option<String>,
    messages: Vec<Turn>,
}

impl Pricket {
    /// Starts a conversation in the model's prompt format.
    pub fn conversation(&self) -> Conversation {
        Conversation {
            pricket: self.clone(),
            format: self.prompt_format().clone(),
            system: None,
            turns: Vec::new(),
            left_out: 0,
            limit: None,
            reuse: true,
            engine: None,
            draft: None,
            read: 0,
        }
    }
}

impl Conversation {
    /// Sets the prompt format; see [`crate::text::prompt_format`].
    #[must_use]
    pub fn with_format(mut self, format: PromptFormat) -> Self {
        self.format = format;
        self
    }

    /// Limits prompt and reply together to `tokens`. The default is the length that the model was trained for. A larger
    /// limit requires a model without a context limit, or [`GenerateOptions::beyond_trained_length`].
    #[must_use]
    pub fn with_context(mut self, tokens: usize) -> Self {
        self.limit = Some(tokens);
        self
    }

    /// Reads the whole prompt again for every reply, for comparisons. The text is the same and takes longer.
    #[must_use]
    pub fn without_reuse(mut self) -> Self {
        self.reuse = false;
        self
    }

    /// Speeds replies up with a draft model: a much smaller model with the same tokenizer. The texts do not change.
    #[must_use]
    pub fn with_draft(mut self, draft: &Pricket, options: SpeculationOptions) -> Self {
        self.draft = Some((draft.clone(), options));
        self.engine = None;
        self
    }

    /// Returns the prompt format.
    pub fn format(&self) -> &PromptFormat {
        &self.format
    }

    /// Returns the system text, or the default of the prompt format if none is set.
    pub fn system(&self) -> Option<&str> {
        self.system.as_deref().or(self.format.default_system.as_deref()).filter(|text| !text.is_empty())
    }

    /// Sets the system text. An empty string means none; `None` means the default of the prompt format.
    ///
    /// # Errors
    /// Returns [`Error::Text`] if the prompt format has no place for a system text.
    pub fn set_system(&mut self, text: Option<String>) -> Result<()> {
        self.format.prompt(text.as_deref(), &[])?;
        self.system = text;
        Ok(())
    }

    /// Returns all turns, including those that the prompt leaves out.
    pub fn turns(&self) -> &[Turn] {
        &self.turns
    }

    /// Returns the number of oldest turns that the last prompt left out because the context was full.
    pub fn left_out(&self) -> usize {
        self.left_out
    }

    /// Returns the number of prompt tokens that the model read for the last reply. Tokens kept in the state do not
    /// count.
    pub fn read(&self) -> usize {
        self.read
    }

    /// Returns the measurements of speculative decoding, if there is a draft model and a reply has ended.
    pub fn speculation(&self) -> Option<Speculation> {
        self.engine.as_ref()?.speculation()
    }

    /// Removes all turns. Prompt format and system text stay.
    pub fn reset(&mut self) {
        self.turns.clear();
        self.left_out = 0;
    }

    /// Removes the last user turn and everything after it. Returns its text.
    pub fn undo(&mut self) -> Option<String> {
        let last = self.turns.iter().rposition(|turn| turn.role == Role::User)?;
        self.turns.drain(last..).next().map(|asked| asked.content)
    }

    /// Returns the prompt for the user turn `text`, before turns are left out to fit the context.
    ///
    /// # Errors
    /// Returns the errors of [`PromptFormat::prompt`].
    pub fn prompt(&self, text: &str) -> Result<String> {
        let turns = [&self.turns[..], &[Turn::user(text)]].concat();
        Ok(self.format.prompt(self.system.as_deref(), &turns)?)
    }

    /// Adds the user turn `text` and returns the reply.
    ///
    /// # Errors
    /// Returns the errors of [`Pricket::generate`], and [`Error::ContextExceeded`] if `text` is longer than the
    /// context. The turn is not added then.
    pub fn say(&mut self, text: &str, options: &GenerateOptions) -> Result<Completion> {
        let mut reply = self.stream(text, options)?;
        while reply.advance()?.is_some() {}
        Ok(reply.finish())
    }

    /// Adds the user turn `text` and returns the reply as a stream of text. If the stream is dropped early, the text so
    /// far is the reply.
    ///
    /// # Errors
    /// Returns the errors of [`Conversation::say`].
    pub fn stream(&mut self, text: &str, options: &GenerateOptions) -> Result<Reply<'_>> {
        let info = self.pricket.info();
        let hard = info.context.filter(|_| !options.beyond_trained_length).unwrap_or(usize::MAX);
        let limit = self.limit.unwrap_or(info.trained_length).min(hard);
        let mut turns = self.turns.clone();
        turns.push(Turn::user(text));
        let tokenizer = self.pricket.tokenizer()?;
        let (ids, left_out) = self.format.fit(tokenizer, self.system.as_deref(), &turns, limit, options.max_tokens)?;
        if ids.is_empty() {
            return Err(Error::Empty("the prompt is empty"));
        }
        let mut options = options.clone();
        options.stop.extend(self.format.stop.iter().cloned());
        let left = limit.saturating_sub(ids.len()).max(1);
        let cut = options.max_tokens > left;
        options.max_tokens = options.max_tokens.min(left);
        let engine = match self.engine.take().filter(|_| self.reuse) {
            Some(engine) => engine,
            None => self.new_engine()?,
        };
        let request = self.pricket.request(ids, &options);
        let stream = Stream::new(&self.pricket, engine, request)?.as_reply();
        self.left_out = left_out;
        self.turns = turns;
        let before = stream.prompt_tokens_read();
        let stream = Some(stream);
        Ok(Reply { conversation: self, stream, before, text: String::new(), space: String::new(), cut, failed: false })
    }

    /// Creates an engine that keeps the states of the last two replies.
    fn new_engine(&self) -> Result<Engine> {
        let info = self.pricket.info();
        let longest = self.limit.unwrap_or(info.trained_length) as u64;
        let kept = if self.reuse { 2 * info.cache_bytes_per_token() * longest + 64 * info.state_bytes } else { 0 };
        let engine = self.pricket.engine(EngineOptions { prefix_memory: Some(kept), ..EngineOptions::default() })?;
        match &self.draft {
            Some((draft, options)) => self.pricket.with_draft(engine, draft, *options),
            None => Ok(engine),
        }
    }

    /// Returns the conversation as JSON, with the usual list of `role` and `content`.
    pub fn to_json(&self) -> String {
        let system = self.system.iter().map(|text| Turn { role: Role::System, content: text.clone() });
        let messages = system.chain(self.turns.iter().cloned()).collect();
        let saved = Saved { format: Some(self.format.name.clone()), messages };
        serde_json::to_string_pretty(&saved).expect("strings are JSON")
    }

    /// Replaces system text and turns by those of a JSON text: the output of [`Conversation::to_json`], or an array of
    /// messages. The prompt format does not change. Returns the name of the prompt format in the JSON text, if any.
    ///
    /// # Errors
    /// Returns [`Error::Malformed`] if the text is not a conversation. The conversation is then unchanged.
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

/// A reply as it is generated: an iterator over pieces of text. White space around the reply is removed unless the
/// prompt format is verbatim. Dropping it adds the reply to the conversation.
#[derive(Debug)]
pub struct Reply<'a> {
    conversation: &'a mut Conversation,
    /// Taken when the reply is dropped.
    stream: Option<Stream>,
    /// Number of prompt tokens that the engine had read before the reply.
    before: u64,
    text: String,
    /// White space that is held back because it may be at the end of the reply.
    space: String,
    /// Whether the context limits the length of the reply.
    cut: bool,
    failed: bool,
}

impl Reply<'_> {
    fn advance(&mut self) -> Result<Option<String>> {
        let piece = match self.stream.as_mut().and_then(Iterator::next).transpose() {
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

    /// Returns the part of a new piece that is certainly not white space around the reply.
    fn trimmed(&mut self, piece: &str) -> String {
        let piece = if self.text.is_empty() { piece.trim_start() } else { piece };
        let whole = std::mem::take(&mut self.space) + piece;
        let inner = whole.trim_end();
        self.space = whole[inner.len()..].into();
        inner.into()
    }

    /// Ends the reply and returns it as a completion. `text` is the turn; `ids` and `logprobs` cover all generated
    /// tokens.
    pub fn finish(self) -> Completion {
        let completion = self.stream.as_ref().expect("the stream is taken only on drop").completion().clone();
        let mut done = Completion { text: self.text.clone(), ..completion };
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
        let Some(stream) = self.stream.take() else { return };
        self.conversation.read = (stream.prompt_tokens_read() - self.before) as usize;
        if self.failed {
            self.conversation.undo();
            return;
        }
        self.conversation.engine = Some(stream.into_engine());
        self.conversation.turns.push(Turn::assistant(std::mem::take(&mut self.text)));
    }
}
