//! Prompt formats of tuned models (models/prompts.toml), and the choice of the format for a model.

use std::path::Path;
use std::sync::OnceLock;

use pricket_lm::PromptFormat;
use pricket_weights::clip;
use serde::Deserialize;

use crate::loading::opened::Opened;
use crate::loading::small_files::read_small;
use crate::suites::cards::card_of;
use crate::{Error, Result};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    format: Vec<PromptFormat>,
}

fn parse(text: &str) -> Result<Vec<PromptFormat>, String> {
    let formats = toml::from_str::<File>(text).map_err(|e| e.to_string())?.format;
    formats.iter().try_for_each(PromptFormat::check).map_err(|e| e.to_string())?;
    Ok(formats)
}

/// Returns all named prompt formats.
///
/// ```
/// let names: Vec<_> = pricket::text::prompt_formats().iter().map(|format| format.name.as_str()).collect();
/// assert!(names.contains(&"chatml") && names.contains(&"incite-chat"));
/// ```
pub fn prompt_formats() -> &'static [PromptFormat] {
    static FORMATS: OnceLock<Vec<PromptFormat>> = OnceLock::new();
    FORMATS.get_or_init(|| {
        // The file is compiled in, and a test checks it.
        parse(include_str!("../../../../models/prompts.toml")).unwrap_or_else(|e| panic!("models/prompts.toml: {e}"))
    })
}

/// Returns the prompt format of a name, or the first format of a TOML file with the syntax of models/prompts.toml.
///
/// # Errors
/// Returns [`Error::Unknown`], which lists the names, if `name` is neither a format nor a file, and
/// [`Error::Malformed`] if the file is invalid.
pub fn prompt_format(name: &str) -> Result<PromptFormat> {
    if let Some(format) = prompt_formats().iter().find(|format| format.name == name) {
        return Ok(format.clone());
    }
    let path = Path::new(name);
    if !path.is_file() {
        let known: Vec<&str> = prompt_formats().iter().map(|format| format.name.as_str()).collect();
        return Err(Error::Unknown {
            what: "prompt format or file",
            name: name.into(),
            known: format!("expected one of {} or a TOML file", known.join(", ")),
        });
    }
    let wrong = |what: &dyn std::fmt::Display| Error::Malformed {
        origin: name.into(),
        what: what.to_string().trim_end().into(),
    };
    let text = String::from_utf8(read_small(path)?).map_err(|e| wrong(&e))?;
    let formats = parse(&text).map_err(|what| wrong(&what))?;
    formats.into_iter().next().ok_or_else(|| wrong(&"the file has no [[format]]"))
}

/// Chooses the format of a model and returns it with a note on the reason. Tried in this order: the model card, the key
/// `prompt_format` of config.json, the tokens of the tokenizer, and the card of the model in `_name_or_path`; otherwise
/// `plain`.
pub(crate) fn choose(opened: &Opened) -> (PromptFormat, Option<String>) {
    let Opened { provenance, config, .. } = opened;
    let known = |name: &str| prompt_formats().iter().find(|format| format.name == name);
    let by_card = || {
        let card = card_of(provenance.repo.as_deref()?)?;
        Some((known(&card.prompt)?, format!("named by the card of {}", card.id)))
    };
    let by_key = || Some((known(config["prompt_format"].as_str()?)?, "named by config.json".into()));
    let by_tokens = || {
        let tokenizer = opened.tokenizer.as_ref()?;
        let has_all = |format: &&PromptFormat| {
            !format.tokens.is_empty() && format.tokens.iter().all(|token| tokenizer.token_to_id(token).is_some())
        };
        let format = prompt_formats().iter().find(has_all)?;
        Some((format, format!("the tokenizer has {}", format.tokens.join(" "))))
    };
    let by_origin = || {
        let card = card_of(config["_name_or_path"].as_str()?)?;
        Some((known(&card.prompt)?, format!("config.json is derived from that of {}", card.id)))
    };
    let unknown = config["prompt_format"].as_str().filter(|name| known(name).is_none());
    let unknown = unknown.map(|name| format!("prompt format {}: named by config.json, but unknown", clip(name)));
    if let Some((format, why)) = by_card().or_else(by_key).or_else(by_tokens).or_else(by_origin) {
        let note = format!("prompt format {}: {why}", format.name);
        return (format.clone(), unknown.or(Some(note).filter(|_| format.name != "plain")));
    }
    let template = opened.chat_template.as_ref().map(|place| {
        format!(
            "prompt format plain: {place} is not evaluated; choose a format with --prompt-format or Conversation::with_format"
        )
    });
    (known("plain").expect("plain is there").clone(), unknown.or(template))
}
