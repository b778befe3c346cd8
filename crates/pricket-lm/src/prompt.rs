//! Prompt formats of chat models: templates that turn a conversation into the text of a prompt.

use serde::{Deserialize, Serialize};

use crate::{Error, Result, Tokenizer};

/// Role of the speaker of a turn in a conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Role {
    /// System text: instructions for the whole conversation.
    System,
    /// The user.
    User,
    /// The model.
    Assistant,
}

/// One turn of a conversation. The JSON form is the usual `{"role": "user", "content": "Hello"}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Turn {
    /// Role of the speaker.
    pub role: Role,
    /// Text of the turn.
    pub content: String,
}

impl Turn {
    /// Creates a turn of the user.
    pub fn user(content: impl Into<String>) -> Self {
        Self { role: Role::User, content: content.into() }
    }

    /// Creates a turn of the model.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self { role: Role::Assistant, content: content.into() }
    }
}

/// Prompt format of a chat model, read from TOML or JSON.
///
/// The prompt consists of `system`, the turns and `reply`, joined by `between`. In a template, `{text}` stands for the
/// text of the turn.
///
/// ```
/// use pricket_lm::{PromptFormat, Turn};
/// let format: PromptFormat = serde_json::from_str(
///     r#"{"name": "pair", "user": "Q: {text}", "assistant": "A: {text}", "reply": "A:", "between": "\n", "stop": ["\nQ:"]}"#,
/// )?;
/// let turns = [Turn::user("One?"), Turn::assistant("Yes."), Turn::user("Two?")];
/// assert_eq!(format.prompt(None, &turns)?, "Q: One?\nA: Yes.\nQ: Two?\nA:");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PromptFormat {
    /// Name of the format.
    pub name: String,
    /// Description of the format in one sentence.
    #[serde(default)]
    pub about: String,
    /// Source of the format, such as a model card.
    #[serde(default)]
    pub source: String,
    /// Tokens that the tokenizer of a model tuned on this format has.
    #[serde(default)]
    pub tokens: Vec<String>,
    /// Default system text.
    #[serde(default)]
    pub default_system: Option<String>,
    /// Template of the system text; `None` if the format does not support one.
    #[serde(default)]
    pub system: Option<String>,
    /// Template of a turn of the user.
    pub user: String,
    /// Template of a context that follows a question; `{text}` by default.
    #[serde(default)]
    pub context: Option<String>,
    /// Template of an earlier turn of the model.
    pub assistant: String,
    /// Beginning of the model's turn, which the model continues. Empty if the template of the last turn ends with it.
    #[serde(default)]
    pub reply: String,
    /// Separator between the system text, the turns and `reply`.
    #[serde(default)]
    pub between: String,
    /// Strings that end the model's turn, in addition to its end token: text, or the spelling of a special token.
    #[serde(default)]
    pub stop: Vec<String>,
    /// Whether replies keep the white space around them. By default it is removed.
    #[serde(default)]
    pub verbatim: bool,
    /// Whether the model was tuned on single questions and therefore makes little use of earlier turns.
    #[serde(default)]
    pub single_turn: bool,
}

/// Placeholder for the text of a turn in a template.
const TEXT: &str = "{text}";

impl PromptFormat {
    /// Checks the templates and stop strings.
    ///
    /// # Errors
    /// Returns [`Error::Input`], which names the key, if a template does not contain `{text}` exactly once, if
    /// `default_system` is set without `system`, or if a stop string is empty.
    pub fn check(&self) -> Result<()> {
        let templates = [
            ("user", Some(&self.user)),
            ("assistant", Some(&self.assistant)),
            ("system", self.system.as_ref()),
            ("context", self.context.as_ref()),
        ];
        for (key, template) in templates {
            if template.is_some_and(|template| template.matches(TEXT).count() != 1) {
                return Err(Error::Input(format!("prompt format {}: `{key}` needs {TEXT} exactly once", self.name)));
            }
        }
        if self.default_system.is_some() && self.system.is_none() {
            return Err(Error::Input(format!("prompt format {}: `default_system` requires `system`", self.name)));
        }
        if self.stop.iter().any(String::is_empty) {
            return Err(Error::Input(format!("prompt format {}: an empty `stop` would end every reply", self.name)));
        }
        Ok(())
    }

    /// Returns the prompt, which the model continues. `system` is the system text: `None` selects the default of the
    /// format, and an empty string omits the system text.
    ///
    /// # Errors
    /// Returns [`Error::Input`] if the format does not support a system text, if a turn has [`Role::System`], or if
    /// [`PromptFormat::check`] fails.
    pub fn prompt(&self, system: Option<&str>, turns: &[Turn]) -> Result<String> {
        self.check()?;
        let mut pieces = Vec::with_capacity(turns.len() + 2);
        if let Some(text) = system.or(self.default_system.as_deref()).filter(|text| !text.is_empty()) {
            let template = self.system.as_ref().ok_or_else(|| {
                Error::Input(format!("the prompt format {} does not support a system text", self.name))
            })?;
            pieces.push(template.replacen(TEXT, text, 1));
        }
        for turn in turns {
            let template = match turn.role {
                Role::User => &self.user,
                Role::Assistant => &self.assistant,
                Role::System => {
                    return Err(Error::Input("a system text must precede the turns".into()));
                }
            };
            pieces.push(template.replacen(TEXT, &turn.content, 1));
        }
        if !self.reply.is_empty() {
            pieces.push(self.reply.clone());
        }
        Ok(pieces.join(&self.between))
    }

    /// Returns the text of one turn with a question and its context. An empty context is omitted.
    pub fn with_context(&self, question: &str, context: &str) -> String {
        if context.is_empty() {
            return question.to_owned();
        }
        let context = self.context.as_ref().map_or_else(|| context.to_owned(), |own| own.replacen(TEXT, context, 1));
        format!("{question}{}{context}", self.between)
    }

    /// Returns the ids of the prompt and the number of oldest turns that it omits to fit.
    ///
    /// `limit` is the context length in tokens. The prompt leaves `reserve` tokens of it for the reply, but at most
    /// half of it. Questions are omitted together with their answers; the system text and the last turn are always
    /// kept.
    ///
    /// The omitted part grows in steps of a quarter of the space for the prompt. Most prompts of a growing conversation
    /// therefore begin like the previous one, and the model does not read that part again. The number depends only on
    /// the arguments.
    ///
    /// # Errors
    /// Returns [`Error::Input`] if the system text and the last turn are too long together, and the errors of
    /// [`PromptFormat::prompt`] and [`Tokenizer::encode_prompt`].
    pub fn fit(
        &self,
        tokenizer: &Tokenizer,
        system: Option<&str>,
        turns: &[Turn],
        limit: usize,
        reserve: usize,
    ) -> Result<(Vec<u32>, usize)> {
        let ids = |first: usize| tokenizer.encode_prompt(&self.prompt(system, &turns[first..])?);
        let whole = ids(0)?;
        // With a short limit, the prompt and the reply get half of it each.
        let room = limit.saturating_sub(reserve.min(limit / 2));
        if whole.len() <= room {
            return Ok((whole, 0));
        }
        let step = (room / 4).max(1);
        let goal = whole.len().saturating_sub((whole.len() - room).next_multiple_of(step));
        let questions: Vec<usize> = (1..turns.len()).filter(|&i| turns[i].role == Role::User).collect();
        // Binary search for the first question from which the prompt has at most `most` ids: fewer turns give fewer
        // ids.
        let first = |most: usize| -> Result<usize> {
            let (mut low, mut high) = (0, questions.len());
            while low < high {
                let middle = usize::midpoint(low, high);
                if ids(questions[middle])?.len() > most { low = middle + 1 } else { high = middle }
            }
            Ok(low)
        };
        let found = questions.get(first(goal)?).or(questions.get(first(room)?));
        if let Some(&first) = found {
            return Ok((ids(first)?, first));
        }
        let (alone, reply) = (ids(turns.len().saturating_sub(1))?.len(), limit - room);
        Err(Error::Input(format!(
            "the last turn and the system text have {alone} tokens, too many for a context of {limit} tokens of which \
             {reply} are kept for the reply"
        )))
    }
}
