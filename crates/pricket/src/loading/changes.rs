//! Changes to the configuration that the user requests.

use serde_json::Value;

use crate::loading::family::{knows, set_activation};
use crate::{Error, Result};

/// Changes to the configuration, applied before it is checked.
#[derive(Clone, Debug, Default)]
pub(crate) struct Changes {
    /// Keys and their new values; `outer.inner` names a key inside an object.
    pub(crate) keys: Vec<(String, Value)>,
    /// Name of the activation function to use instead of the configured one.
    pub(crate) activation_function: Option<String>,
}

impl Changes {
    /// Applies the changes to `config`. Refuses keys that the family does not know, because they would have no effect.
    pub(crate) fn apply(&self, config: &mut Value) -> Result<()> {
        for (key, value) in &self.keys {
            set(config, key, value.clone())?;
        }
        if let Some((key, _)) = self.keys.iter().find(|(key, _)| !knows(config, key)) {
            return Err(no_key(key));
        }
        match &self.activation_function {
            Some(name) => Ok(set_activation(config, name)?),
            None => Ok(()),
        }
    }
}

fn no_key(key: &str) -> Error {
    let known = "setting it would have no effect for this model family".into();
    Error::Unknown { what: "configuration key", name: key.into(), known }
}

/// Sets a key; `outer.inner` names a key inside an object.
fn set(config: &mut Value, key: &str, value: Value) -> Result<()> {
    let mut at = config;
    for part in key.split('.') {
        if !(at.is_object() || at.is_null()) {
            return Err(no_key(key));
        }
        at = &mut at[part];
    }
    *at = value;
    Ok(())
}
