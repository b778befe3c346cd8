//! What a user changes about a configuration.

use serde_json::Value;

use crate::loading::family::{knows, set_activation};
use crate::{Error, Result};

/// What a user changes about a configuration, before anything looks at it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Changes {
    /// Keys and their new values, `outer.inner` for a key inside an object.
    pub(crate) keys: Vec<(String, Value)>,
    /// Another activation function.
    pub(crate) activation_function: Option<String>,
}

impl Changes {
    /// Changes `config`, and refuses keys that its family does not know: they would have no effect.
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
    let known = "a change of it would have no effect".into();
    Error::Unknown { what: "key of this family's configuration", name: key.into(), known }
}

/// Sets a key, `outer.inner` for one inside another.
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
