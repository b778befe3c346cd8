//! The families, and which of them a configuration belongs to.

use std::sync::{PoisonError, RwLock};

use pricket_nn::config::{GENERIC, Keys};
use pricket_nn::{Activation, Error, Family, GgmlLayout, Names, Result, ShapeOf};
use serde_json::Value;

/// The families that pricket has: the one list of them.
fn own() -> [&'static dyn Family; 5] {
    [
        pricket_gpt_neox::FAMILY,
        pricket_mpt::FAMILY,
        pricket_redpajama_incite::FAMILY,
        pricket_llama::FAMILY,
        pricket_rwkv4::FAMILY,
    ]
}

/// Those that a program has added.
static ADDED: RwLock<Vec<&'static dyn Family>> = RwLock::new(Vec::new());

/// Adds a family of your own, for the rest of the program: its checkpoints are loaded, converted and inspected as those of the
/// other families are. It comes after them: what one of them claims stays theirs. See docs/adding-a-family.md.
pub fn add_family(family: &'static dyn Family) {
    let mut added = ADDED.write().unwrap_or_else(PoisonError::into_inner);
    if added.iter().all(|known| known.name() != family.name()) {
        added.push(family);
    }
}

/// Every family, those that were added last.
pub(crate) fn families() -> Vec<&'static dyn Family> {
    let added = ADDED.read().unwrap_or_else(PoisonError::into_inner);
    own().into_iter().chain(added.iter().copied()).collect()
}

/// The family of a configuration, which has none of the keys checked that are its own.
pub(crate) fn family_of(config: &Value) -> Result<&'static dyn Family> {
    let families = families();
    if let Some(family) = families.iter().find(|family| family.claims(config)) {
        return Ok(*family);
    }
    let list = |names: Vec<&str>, quote: &str| {
        names.iter().map(|name| format!("{quote}{name}{quote}")).collect::<Vec<_>>().join(", ")
    };
    let known = list(families.iter().flat_map(|family| family.spellings().0).copied().collect(), "\"");
    Err(match (config["model_type"].as_str(), config["architectures"][0].as_str()) {
        (Some(other), _) => {
            Error::config("model_type", format!("{other:?} is not a family of this zoo; expected one of {known}"))
        }
        (None, Some(other)) => {
            let classes = list(families.iter().flat_map(|family| family.spellings().1).copied().collect(), "");
            Error::config("architectures", format!("{other:?} is not of this zoo; expected one of {classes}"))
        }
        (None, None) => Error::config("model_type", format!("missing; expected one of {known}")),
    })
}

/// The family of a configuration, every key of which is implemented.
pub(crate) fn checked_family(config: &Value) -> Result<&'static dyn Family> {
    let family = family_of(config)?;
    check_form(config)?;
    family.check(config)?;
    Ok(family)
}

/// Removes `quantization_config` from the configuration of a checkpoint of bitsandbytes' 4-bit types, whose tensors say more.
pub(crate) fn remove_four_bit(config: &mut Value) {
    let quantized = &config["quantization_config"];
    let is_four_bit = quantized["quant_method"] == "bitsandbytes" && quantized["load_in_4bit"] == true;
    if let Some(config) = config.as_object_mut().filter(|_| is_four_bit) {
        config.remove("quantization_config");
    }
}

/// Refuses checkpoints that are no language model with weights of a known type, and says what they are.
fn check_form(config: &Value) -> Result<()> {
    let architecture = config["architectures"][0].as_str().unwrap_or_default();
    let heads = ["ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"];
    if heads.iter().any(|head| architecture.ends_with(head)) {
        let what =
            format!("{architecture:?} has a classification head in place of a language model's; load its base model");
        return Err(Error::config("architectures", what));
    }
    let quantized = &config["quantization_config"];
    if !quantized.is_null() {
        let method = quantized["quant_method"].as_str().unwrap_or("an unnamed method");
        let what = format!(
            "the weights are quantized by {method}, which is not read; load the original checkpoint, with --quantize to make it small"
        );
        return Err(Error::config("quantization_config", what));
    }
    Ok(())
}

/// What sets a configuration apart from the family that a card names; `None` if nothing does.
pub(crate) fn unlike(config: &Value, name: &str) -> Option<String> {
    match families().into_iter().find(|family| family.name() == name) {
        Some(family) => family.unlike(config),
        None => Some(format!("it is not of the family {name}")),
    }
}

/// The configuration of a checkpoint without config.json, if the shapes of its tensors tell it.
pub(crate) fn config_from_shapes(shape: ShapeOf<'_>) -> Option<Value> {
    families().iter().find_map(|family| family.config_from_shapes(shape))
}

/// Every header of legacy GGML files.
pub(crate) fn all_ggml_layouts() -> Vec<GgmlLayout> {
    families().iter().flat_map(|family| family.ggml_layouts()).copied().collect()
}

/// The family whose legacy GGML files have this header.
pub(crate) fn family_of_ggml(layout: &GgmlLayout) -> Result<&'static dyn Family> {
    let found = families().into_iter().find(|family| family.ggml_layouts().contains(layout));
    found.ok_or_else(|| Error::Input(format!("{}: a header of no family", layout.name)))
}

/// The family of a GGUF file.
pub(crate) fn family_of_gguf(metadata: &Value) -> Result<&'static dyn Family> {
    let named = metadata["general.architecture"].as_str();
    let families = families();
    let found = named.and_then(|named| families.iter().find(|family| family.gguf_architecture() == Some(named)));
    found.copied().ok_or_else(|| {
        let known = families.iter().filter_map(|family| Some(format!("{:?}", family.gguf_architecture()?)));
        let known = known.collect::<Vec<_>>().join(" or ");
        let what = match named {
            Some(other) => format!("{other:?} is not a family of this zoo; expected {known}"),
            None => format!("missing; expected {known}"),
        };
        Error::config("general.architecture", what)
    })
}

/// The configuration that GGUF metadata stand for.
pub(crate) fn config_from_gguf(metadata: &Value, shape: ShapeOf<'_>) -> Result<Value> {
    family_of_gguf(metadata)?.config_from_gguf(metadata, shape)
}

/// The keys of GGUF metadata that this program does not know.
pub(crate) fn unknown_gguf_keys(metadata: &Value) -> Vec<String> {
    let Ok(family) = family_of_gguf(metadata) else { return Vec::new() };
    let prefix = format!("{}.", family.gguf_architecture().unwrap_or_default());
    Keys::check_gguf(family.gguf_keys(), &prefix, metadata).unwrap_or_default()
}

/// Whether a tensor is the embedding or the head.
pub(crate) fn is_table(family: &dyn Family, canonical: &str) -> bool {
    ["token_embd.weight", "output.weight"].contains(&Names::spelled(canonical, family.gguf_names()).as_str())
}

/// Names another activation in a configuration: `gelu` by the error function, or `gelu_tanh`.
pub(crate) fn set_activation(config: &mut Value, name: &str) -> Result<()> {
    let activation = match name {
        "gelu" => Activation::GeluErf,
        "gelu_tanh" => Activation::GeluTanh,
        _ => {
            return Err(Error::Input(format!("{name:?} is no activation; there are gelu and gelu_tanh")));
        }
    };
    checked_family(config)?.set_activation(config, activation)
}

/// The tables of keys that a configuration may have; of every family where it does not say which.
fn tables(config: &Value) -> Vec<Keys> {
    if let Ok(family) = family_of(config) {
        return family.keys(config);
    }
    families().into_iter().flat_map(|family| family.keys(config)).chain([GENERIC]).collect()
}

/// Whether a key has a place in a configuration of this family.
pub(crate) fn knows(config: &Value, key: &str) -> bool {
    Keys::knows(&tables(config), key)
}

/// The keys of a configuration that no version of its class has.
pub(crate) fn unknown_keys(config: &Value) -> Vec<String> {
    Keys::check(&tables(config), config).unwrap_or_default()
}
