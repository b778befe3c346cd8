//! The keys of rotary positions, which several families spell alike.

use serde::Deserialize;
use serde_json::{Value, json};

use crate::{Error, Result};

/// `rope_parameters` or `rope_scaling` of a config.json, in the old and the new spelling.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
pub struct RopeParameters {
    /// `default` or `linear`; [`RopeParameters::divisor`] refuses others.
    pub rope_type: Option<String>,
    /// The older spelling of `rope_type`; some files hold both.
    #[serde(rename = "type")]
    pub old_type: Option<String>,
    /// Base of the frequencies.
    pub rope_theta: Option<f64>,
    /// Share of the dimensions.
    pub partial_rotary_factor: Option<f64>,
    /// Of linear scaling.
    pub factor: Option<f64>,
}

impl RopeParameters {
    /// The one of two objects that counts, and its key: `rope_scaling`, if it is set, replaces `rope_parameters` whole. An empty
    /// object counts as none, as it does in Python.
    pub fn chosen(scaling: Option<&Self>, parameters: Option<&Self>) -> Option<(&'static str, Self)> {
        let given = |rope: Option<&Self>| rope.filter(|rope| **rope != Self::default()).cloned();
        let scaling = given(scaling).map(|rope| ("rope_scaling", rope));
        scaling.or_else(|| given(parameters).map(|rope| ("rope_parameters", rope)))
    }

    /// The base of the frequencies: its own, else `flat`, else 10,000.
    ///
    /// # Errors
    /// [`Error::Config`], naming `key`.
    pub fn base(&self, key: &str, flat: Option<f64>) -> Result<f64> {
        let base = self.rope_theta.or(flat).unwrap_or(10_000.0);
        if base.is_finite() && base > 0.0 {
            return Ok(base);
        }
        Err(Error::config(key, format!("base {base} is not a positive number")))
    }

    /// What positions are divided by: the factor of linear scaling, or 1.
    ///
    /// # Errors
    /// [`Error::Config`], naming `key`, for another kind of scaling.
    pub fn divisor(&self, key: &str) -> Result<f64> {
        match self.rope_type.as_deref().or(self.old_type.as_deref()) {
            None if self.factor.is_some() => Err(Error::config(key, "a factor without a type")),
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

/// The `rope_scaling` that GGUF metadata stand for, under keys that begin with `prefix`, as llama.cpp reads them: a factor is linear
/// unless a type says otherwise, the older key comes second, and 0 is none.
pub fn gguf_rope_scaling(prefix: &str, metadata: &Value) -> Value {
    let at = |key: &str| &metadata[format!("{prefix}{key}")];
    let factor = [at("rope.scaling.factor"), at("rope.scale_linear")].into_iter().find_map(Value::as_f64);
    match (at("rope.scaling.type").as_str(), factor.filter(|factor| *factor != 0.0)) {
        (Some("none"), _) | (None | Some("linear"), None) => Value::Null,
        (kind, factor) => json!({"type": kind.unwrap_or("linear"), "factor": factor}),
    }
}
