//! What every family needs when it reads a config.json.

use serde::de::DeserializeOwned;

use crate::{Error, Result};

/// Reads the keys of a family's configuration; unknown keys are left alone.
///
/// # Errors
/// [`Error::Config`], naming the key.
pub fn parse<C: DeserializeOwned>(json: &serde_json::Value) -> Result<C> {
    serde_path_to_error::deserialize(json).map_err(|e| {
        let (path, what) = (e.path().to_string(), e.inner().to_string());
        Error::config(if path == "." { "the file".into() } else { path }, what)
    })
}

/// Refuses sizes that no checkpoint has, before anything is multiplied or allocated.
///
/// # Errors
/// [`Error::Config`], naming the key.
pub fn plausible(key: &str, value: usize, limit: usize) -> Result<()> {
    if (1..=limit).contains(&value) {
        return Ok(());
    }
    Err(Error::config(key, format!("{value} is not between 1 and {limit}")))
}
