//! Configuration keys of rotary positions that several families share.

use serde::Deserialize;
use serde_json::{Value, json};

use crate::{Error, Result};

/// The object `rope_parameters` or `rope_scaling` of a config.json, with old and new key names.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
pub struct RopeParameters {
    /// `default` or `linear`; [`RopeParameters::divisor`] returns an error for others.
    pub rope_type: Option<String>,
    /// Older name of `rope_type`; some files have both.
    #[serde(rename = "type")]
    pub old_type: Option<String>,
    /// Base of the rotary frequencies.
    pub rope_theta: Option<f64>,
    /// Share of the rotated dimensions of a head, from 0 to 1.
    pub partial_rotary_factor: Option<f64>,
    /// Factor of linear scaling.
    pub factor: Option<f64>,
}

impl RopeParameters {
    /// Returns the object that applies, and its key. `rope_scaling` replaces `rope_parameters` as a whole. An empty
    /// object counts as missing, as in Python.
    pub fn chosen(scaling: Option<&Self>, parameters: Option<&Self>) -> Option<(&'static str, Self)> {
        let given = |rope: Option<&Self>| rope.filter(|rope| **rope != Self::default()).cloned();
        let scaling = given(scaling).map(|rope| ("rope_scaling", rope));
        scaling.or_else(|| given(parameters).map(|rope| ("rope_parameters", rope)))
    }

    /// Returns the base of the frequencies: `rope_theta` of the object, otherwise `flat`, otherwise 10,000.
    ///
    /// # Errors
    /// Returns [`Error::Config`] naming `key` if the base is not a positive number.
    pub fn base(&self, key: &str, flat: Option<f64>) -> Result<f64> {
        let base = self.rope_theta.or(flat).unwrap_or(10_000.0);
        if base.is_finite() && base > 0.0 {
            return Ok(base);
        }
        Err(Error::config(key, format!("base {base} is not a positive number")))
    }

    /// Returns the divisor of the positions: the factor of linear scaling, or 1.
    ///
    /// # Errors
    /// Returns [`Error::Config`] naming `key` if the type of scaling is not implemented or the factor is invalid.
    pub fn divisor(&self, key: &str) -> Result<f64> {
        match self.rope_type.as_deref().or(self.old_type.as_deref()) {
            None if self.factor.is_some() => Err(Error::config(key, "factor is set, but rope_type is missing")),
            None | Some("default") => Ok(1.0),
            Some("linear") => match self.factor {
                Some(factor) if factor.is_finite() && factor >= 1.0 => Ok(factor),
                other => {
                    let what = format!("linear scaling needs a factor of at least 1, found {other:?}");
                    Err(Error::config(key, what))
                }
            },
            Some(other) => Err(Error::config(key, format!("rope type {other:?} is not implemented"))),
        }
    }
}

/// Converts the rotary scaling in GGUF metadata to a `rope_scaling` object, following llama.cpp. `prefix` is the prefix
/// of the keys.
///
/// The type is linear if none is given. `rope.scaling.factor` has priority over the older `rope.scale_linear`. A factor
/// of 0 means no scaling.
pub fn gguf_rope_scaling(prefix: &str, metadata: &Value) -> Value {
    let at = |key: &str| &metadata[format!("{prefix}{key}")];
    let factor = [at("rope.scaling.factor"), at("rope.scale_linear")].into_iter().find_map(Value::as_f64);
    match (at("rope.scaling.type").as_str(), factor.filter(|factor| *factor != 0.0)) {
        (Some("none"), _) | (None | Some("linear"), None) => Value::Null,
        (kind, factor) => json!({"type": kind.unwrap_or("linear"), "factor": factor}),
    }
}
