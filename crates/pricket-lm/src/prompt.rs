use serde::{Deserialize, Serialize};

use crate::{Error, Result, Tokenizer};

/// Who says a turn of a conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Role {
    /// What the model is told about the conversation.
    System,
    /// The one who asks.
    User,
    /// The model.
    Assistant,
}

/// Something said, spelled as everybody's message files spell it: `{"role": "user", "content": "Hello"}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Turn {
    /// Who says it.
    pub role: Role,
    /// What is said.
    pub content: String,
}

impl Turn {
    /// A turn of the one who asks.
    pub fn user(content: impl Into<String>) -> Self {
        Self { role: Role::User, content: content.into() }
    }

    /// A turn of the model.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self { role: Role::Assistant, content: content.into() }
    }
}

/// How the text of a conversation looks to a model that was tuned on conversations: data, read from TOML or JSON.
///
/// The prompt is `system`, the turns and `reply`, joined by `between`; `{text}` in a template stands for what is said.
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
    /// What it is called.
    pub name: String,
    /// What it is, in a sentence.
    #[serde(default)]
    pub about: String,
    /// Where its spelling comes from.
    #[serde(default)]
    pub source: String,
    /// Tokens that a tokenizer has if the model was tuned for this format.
    #[serde(default)]
    pub tokens: Vec<String>,
    /// The system text where none is given.
    #[serde(default)]
    pub default_system: Option<String>,
    /// The template of a system text, if there is a place for one.
    #[serde(default)]
    pub system: Option<String>,
    /// The template of a turn of the one who asks.
    pub user: String,
    /// The template of a question's context, which follows the question; `{text}` by default.
    #[serde(default)]
    pub context: Option<String>,
    /// The template of a turn of the model, as a part of the past.
    pub assistant: String,
    /// What the model continues: the beginning of its turn. Empty if the last turn's template has it.
    #[serde(default)]
    pub reply: String,
    /// What stands between the pieces.
    #[serde(default)]
    pub between: String,
    /// What ends the model's turn beside its end token: text, or the spelling of a special token.
    #[serde(default)]
    pub stop: Vec<String>,
    /// Whether replies are taken as they are rather than without the white space around them.
    #[serde(default)]
    pub verbatim: bool,
    /// Whether the model was tuned on single questions, so that it makes less of what was said before.
    #[serde(default)]
    pub single_turn: bool,
}

/// Where the text of a turn goes.
const TEXT: &str = "{text}";

impl PromptFormat {
    /// Says what is wrong with the templates.
    ///
    /// # Errors
    /// [`Error::Input`] naming the key.
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
            return Err(Error::Input(format!("prompt format {}: a `default_system` needs a `system`", self.name)));
        }
        if self.stop.iter().any(String::is_empty) {
            return Err(Error::Input(format!("prompt format {}: an empty `stop` would end every reply", self.name)));
        }
        Ok(())
    }

    /// The text that the model continues. `system` is the system text: the format's own for `None`, none at all for an
    /// empty one.
    ///
    /// # Errors
    /// [`Error::Input`] for a system text where the format has no place for one, or one among the turns.
    pub fn prompt(&self, system: Option<&str>, turns: &[Turn]) -> Result<String> {
        self.check()?;
        let mut pieces = Vec::with_capacity(turns.len() + 2);
        if let Some(text) = system.or(self.default_system.as_deref()).filter(|text| !text.is_empty()) {
            let template = self.system.as_ref().ok_or_else(|| {
                Error::Input(format!("the prompt format {} has no place for a system text", self.name))
            })?;
            pieces.push(template.replacen(TEXT, text, 1));
        }
        for turn in turns {
            let template = match turn.role {
                Role::User => &self.user,
                Role::Assistant => &self.assistant,
                Role::System => {
                    return Err(Error::Input("a system text comes before the turns, not among them".into()));
                }
            };
            pieces.push(template.replacen(TEXT, &turn.content, 1));
        }
        if !self.reply.is_empty() {
            pieces.push(self.reply.clone());
        }
        Ok(pieces.join(&self.between))
    }

    /// A question with a context that belongs to it, as the text of one turn.
    pub fn with_context(&self, question: &str, context: &str) -> String {
        if context.is_empty() {
            return question.to_owned();
        }
        let context = self.context.as_ref().map_or_else(|| context.to_owned(), |own| own.replacen(TEXT, context, 1));
        format!("{question}{}{context}", self.between)
    }

    /// The ids of the prompt, and how many of the oldest turns it leaves out so that `limit` ids have room for `reserve`
    /// more: whole questions with their answers, never the system text or the last turn.
    ///
    /// What is left out grows in steps of a quarter of the room, so that most prompts of a growing conversation begin as
    /// the one before and need not be read anew. It depends on nothing but the turns.
    ///
    /// # Errors
    /// [`Error::Input`] if even the last turn alone is too long; as [`PromptFormat::prompt`].
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
        // A short limit is shared between the past and the reply.
        let room = limit.saturating_sub(reserve.min(limit / 2));
        if whole.len() <= room {
            return Ok((whole, 0));
        }
        let step = (room / 4).max(1);
        let goal = whole.len().saturating_sub((whole.len() - room).next_multiple_of(step));
        let questions: Vec<usize> = (1..turns.len()).filter(|&i| turns[i].role == Role::User).collect();
        // Fewer turns are fewer ids: the first question from which on there are `most` at most.
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
            "the last turn and the system text are {alone} tokens, more than a context of {limit} holds that leaves {reply} \
             for the reply"
        )))
    }
}
