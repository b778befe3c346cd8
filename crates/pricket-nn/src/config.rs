//! Helpers for reading and checking a config.json.

mod rope;

use pricket_weights::clip;
use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

pub use rope::{RopeParameters, gguf_rope_scaling};

use crate::{Error, Result};

/// Deserializes the configuration of a family. Ignores unknown keys.
///
/// # Errors
/// Returns [`Error::Config`] naming the key if a value is missing or has the wrong type.
pub fn parse<C: DeserializeOwned>(json: &Value) -> Result<C> {
    serde_path_to_error::deserialize(json).map_err(|e| {
        let (path, what) = (e.path().to_string(), e.inner().to_string());
        Error::config(if path == "." { "the file".into() } else { path }, what)
    })
}

/// Returns the number of rows of a tensor, to get a size that the header of a file does not have.
///
/// # Errors
/// Returns [`Error::Config`] naming the tensor if it does not exist.
pub fn rows(shape: &dyn Fn(&str) -> Option<Vec<usize>>, name: &str) -> Result<usize> {
    let found = shape(name).and_then(|shape| shape.first().copied());
    found.ok_or_else(|| Error::config(name, "the file has no such tensor"))
}

/// Checks that a size is between 1 and `limit`, before it is used in a product or an allocation.
///
/// # Errors
/// Returns [`Error::Config`] naming the key if it is not.
pub fn plausible(key: &str, value: usize, limit: usize) -> Result<()> {
    if (1..=limit).contains(&value) {
        return Ok(());
    }
    Err(Error::config(key, format!("{value} is not between 1 and {limit}")))
}

/// Checks that `divisor` divides `number`, such as a number of heads and a width. `of` is the key of `number`.
///
/// # Errors
/// Returns [`Error::Config`] naming the key of the divisor if it does not.
pub fn divides(key: &str, divisor: usize, of: &str, number: usize) -> Result<()> {
    if divisor > 0 && number.is_multiple_of(divisor) {
        return Ok(());
    }
    Err(Error::config(key, format!("{divisor} does not divide {of} {number}")))
}

/// Checks that a size, if it is given, has the value that follows from other sizes.
///
/// # Errors
/// Returns [`Error::Config`] naming the key if it does not.
pub fn only(key: &str, value: Option<usize>, expected: usize) -> Result<()> {
    match value.filter(|value| *value != expected) {
        Some(value) => Err(Error::config(key, format!("{value} is not implemented; only {expected} is"))),
        None => Ok(()),
    }
}

/// Checks that an epsilon, if it is given, is between 0 and 1.
///
/// # Errors
/// Returns [`Error::Config`] naming the key if it is not.
pub fn epsilon(key: &str, value: Option<f64>) -> Result<()> {
    match value.filter(|eps| !(*eps > 0.0 && *eps < 1.0)) {
        Some(value) => Err(Error::config(key, format!("{value} is not between 0 and 1"))),
        None => Ok(()),
    }
}

/// Checks that a number, if it is given, is positive and finite.
///
/// # Errors
/// Returns [`Error::Config`] naming the key if it is not.
pub fn positive(key: &str, value: Option<f64>) -> Result<()> {
    match value.filter(|value| !(value.is_finite() && *value > 0.0)) {
        Some(value) => Err(Error::config(key, format!("{value} is not a positive number"))),
        None => Ok(()),
    }
}

/// Deserializes `null` as the default value. For `#[serde(deserialize_with)]`.
///
/// # Errors
/// Returns the error of deserializing the type.
pub fn null_as_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(from: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

/// Deserializes a whole number, which may be written as a float. For `#[serde(deserialize_with)]`.
///
/// # Errors
/// Returns an error if the value is not a whole number.
pub fn whole<'de, D: Deserializer<'de>>(from: D) -> Result<usize, D::Error> {
    let value = Value::deserialize(from)?;
    let float = || value.as_f64().filter(|x| x.fract() == 0.0 && (0.0..9e15).contains(x)).map(|x| x as u64);
    let whole = value.as_u64().or_else(float).and_then(|x| usize::try_from(x).ok());
    whole.ok_or_else(|| D::Error::custom(format!("{value} is not a whole number")))
}

/// Deserializes a limit. 0, `false`, `null` and infinity mean no limit, as in Python code that tests the value for
/// truth. For `#[serde(deserialize_with)]`.
///
/// # Errors
/// Returns an error if the value is not a number.
pub fn limit<'de, D: Deserializer<'de>>(from: D) -> Result<Option<f64>, D::Error> {
    match Value::deserialize(from)? {
        Value::Null | Value::Bool(false) => Ok(None),
        Value::String(text) if text == "Infinity" => Ok(None),
        value => match value.as_f64() {
            Some(limit) => Ok(Some(limit).filter(|limit| *limit != 0.0)),
            None => Err(D::Error::custom(format!("{value} is not a number"))),
        },
    }
}

/// Keys of a configuration class in all its released versions. A key inside an object is written `outer.inner`.
#[derive(Clone, Copy, Debug)]
pub struct Keys {
    /// Keys that the family reads.
    pub read: &'static [&'static str],
    /// Keys that do not affect a forward pass, including all keys inside them.
    pub neutral: &'static [&'static str],
    /// Keys whose effect is not implemented, and the values, as JSON, at which they have no effect. `null` never has an
    /// effect. Every element of a list is checked.
    pub only: &'static [(&'static str, &'static [&'static str])],
}

impl Keys {
    /// Returns whether one of the tables has `key` or keys inside it.
    pub fn knows(tables: &[Self], key: &str) -> bool {
        let inside = format!("{key}.");
        let outside = |known: &str| key.strip_prefix(known).is_some_and(|rest| rest.starts_with('.'));
        tables.iter().any(|keys| {
            let of_object = keys.all().any(|known| known == key || known.starts_with(&inside));
            of_object || keys.neutral.iter().any(|known| outside(known))
        })
    }

    fn all(&self) -> impl Iterator<Item = &'static str> {
        self.read.iter().chain(self.neutral).copied().chain(self.only.iter().map(|(key, _)| *key))
    }

    /// Checks every key of a configuration. Returns the keys that are in no table.
    ///
    /// # Errors
    /// Returns [`Error::Config`] naming the first key whose effect is not implemented.
    pub fn check(tables: &[Self], json: &Value) -> Result<Vec<String>> {
        let mut unknown = Vec::new();
        Self::check_object(tables, "", json, &mut unknown)?;
        Ok(unknown)
    }

    /// Checks the GGUF metadata whose keys start with `prefix`. Returns the keys that are not in `table`. The width of
    /// a head must be `embedding_length` divided by `attention.head_count`.
    ///
    /// # Errors
    /// Returns [`Error::Config`] naming the first key whose effect is not implemented.
    pub fn check_gguf(table: Self, prefix: &str, metadata: &Value) -> Result<Vec<String>> {
        let number = |key: &str| metadata[format!("{prefix}{key}")].as_u64();
        let width = number("embedding_length").zip(number("attention.head_count")).map(|(d, heads)| d / heads.max(1));
        for key in ["attention.key_length", "attention.value_length"] {
            if let (Some(found), Some(width)) = (number(key), width)
                && found != width
            {
                let what =
                    format!("{found} is not implemented; only {width} is, which is embedding_length / head_count");
                return Err(Error::config(format!("{prefix}{key}"), what));
            }
        }
        let own = metadata.as_object().into_iter().flatten();
        let own = own.filter_map(|(key, value)| Some((key.strip_prefix(prefix)?.to_owned(), value.clone()))).collect();
        let checked = Self::check(&[table], &Value::Object(own));
        checked.map(|unknown| unknown.iter().map(|key| format!("{prefix}{key}")).collect()).map_err(|e| match e {
            Error::Config { key, what } => Error::config(format!("{prefix}{key}"), what),
            other => other,
        })
    }

    fn check_object(tables: &[Self], prefix: &str, json: &Value, unknown: &mut Vec<String>) -> Result<()> {
        for (name, value) in json.as_object().into_iter().flatten() {
            let key = format!("{prefix}{name}");
            let is_listed = |list: &[&str]| list.contains(&key.as_str());
            // An object inside a configuration may itself be a configuration with the generic keys.
            let inside = format!("{key}.");
            let has_inner = tables.iter().any(|keys| keys.all().any(|known| known.starts_with(&inside)));
            let only = tables.iter().flat_map(|keys| keys.only).find(|(known, _)| *known == key || known == name);
            let is_free = tables.iter().any(|keys| is_listed(keys.read) || is_listed(keys.neutral));
            if has_inner && value.is_object() {
                Self::check_object(tables, &format!("{key}."), value, unknown)?;
                continue;
            }
            if value.is_null() || is_free {
                continue;
            }
            if let Some((_, neutral)) = only {
                let is_neutral = |value: &Value| neutral.iter().any(|text| is_same(text, value));
                let fits = is_neutral(value) || value.as_array().is_some_and(|list| list.iter().all(is_neutral));
                if !fits {
                    let expected = if neutral.is_empty() { "null".to_owned() } else { neutral.join(" or ") };
                    return Err(Error::config(key, format!("{value} is not implemented; only {expected} is")));
                }
            } else if !GENERIC.neutral.contains(&name.as_str()) {
                unknown.push(clip(&key));
            }
        }
        Ok(())
    }
}

/// Returns whether a value equals the JSON `text`; `1` and `1.0` are equal.
fn is_same(text: &str, value: &Value) -> bool {
    let Ok(expected) = serde_json::from_str::<Value>(text) else { return false };
    match (expected.as_f64(), value.as_f64()) {
        (Some(expected), Some(value)) => expected == value,
        _ => expected == *value,
    }
}

/// Keys of transformers' `PretrainedConfig`, versions 4.19 to 5.24. Every configuration may have them.
pub const GENERIC: Keys = Keys {
    read: &["tie_word_embeddings"],
    neutral: &[
        "_name_or_path",
        "name_or_path",
        "_commit_hash",
        "architectures",
        "model_type",
        "auto_map",
        "custom_pipelines",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "use_bfloat16",
        "torchscript",
        "xla_device",
        "return_dict",
        "use_return_dict",
        "output_hidden_states",
        "output_attentions",
        "_output_attentions",
        "tie_last_hidden_states",
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "finetuning_task",
        "tokenizer_class",
        "prefix",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "sep_token_id",
        "unk_token_id",
        "decoder_start_token_id",
        "task_specific_params",
        "chunk_size_feed_forward",
        "cross_attention_hidden_size",
        "tie_encoder_decoder",
        "tf_legacy_loss",
        "is_decoder",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "_attn_implementation_autoset",
        "experts_implementation",
        "_experts_implementation",
        "_experts_implementation_internal",
        "gradient_checkpointing",
        "_gradient_checkpointing",
        "distributed_config",
        "_is_quantized",
        "_auto_class",
        "_pre_quantization_dtype",
        "_post_init_done",
        "ignore_keys_at_rope_validation",
        "base_model_tp_plan",
        "base_model_pp_plan",
        "base_model_ep_plan",
        "base_model_fsdp_plan",
        "keys_to_ignore_at_inference",
        "attribute_map",
        "sub_configs",
        "max_length",
        "max_new_tokens",
        "min_length",
        "do_sample",
        "early_stopping",
        "num_beams",
        "num_beam_groups",
        "diversity_penalty",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "repetition_penalty",
        "length_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "num_return_sequences",
        "output_scores",
        "return_dict_in_generate",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "remove_invalid_values",
        "exponential_decay_length_penalty",
        "suppress_tokens",
        "begin_suppress_tokens",
        "epsilon_cutoff",
        "eta_cutoff",
        "encoder_repetition_penalty",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "assistant_lookbehind",
        "target_lookbehind",
        "use_cache",
        "initializer_range",
        "tokenizer_name",
        "prompt_format",
    ],
    only: &[
        ("quantization_config", &[]),
        ("compression_config", &[]),
        ("pruned_heads", &["{}"]),
        ("is_encoder_decoder", &["false"]),
        ("add_cross_attention", &["false"]),
        ("is_causal", &["true"]),
        ("sliding_window", &[]),
        ("attention_chunk_size", &[]),
        ("layer_types", &["\"full_attention\""]),
        ("kv_sharing_modes", &[]),
        ("num_kv_shared_layers", &["0"]),
        ("per_layer_config", &["{}"]),
        ("use_bidirectional_attention", &["false"]),
    ],
};

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn keys_are_read_neutral_refused_or_unknown() {
        const OWN: Keys = Keys {
            read: &["width", "part.scale"],
            neutral: &["init"],
            only: &[("part.window", &["-1"]), ("kinds", &["\"full\""]), ("part.tuning.scale", &["0"])],
        };
        let check = |json: &Value| Keys::check(&[OWN, GENERIC], json);
        let fine = json!({
            "width": 3, "init": {"a": {"b": 1}}, "part": {"scale": 2, "window": -1.0, "tuning": {"scale": 0.0}, "torch_dtype": "x"},
            "kinds": ["full", "full"], "use_cache": true, "quantization_config": null, "odd": 1, "part2": {"x": 1},
        });
        assert_eq!(check(&fine).unwrap(), ["odd", "part2"]);
        for (bad, key) in [
            (json!({"part": {"window": 128}}), "part.window"),
            (json!({"part": {"tuning": {"scale": 0.1}}}), "part.tuning.scale"),
            (json!({"part": {"is_causal": false}}), "part.is_causal"),
            (json!({"kinds": ["full", "sliding"]}), "kinds"),
            (json!({"quantization_config": {"bits": 4}}), "quantization_config"),
        ] {
            let error = check(&bad).unwrap_err().to_string();
            assert!(error.contains(&format!(" {key}: ")), "{error}");
        }
        for (key, known) in
            [("width", true), ("part", true), ("part.window", true), ("init.a", true), ("part.x", false), ("w", false)]
        {
            assert_eq!(Keys::knows(&[OWN], key), known, "{key}");
        }
    }
}
