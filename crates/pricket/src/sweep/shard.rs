//! Shards: parts of a sweep for different machines.

use crate::{Error, Result};

/// Shard of a sweep: the checkpoints whose number modulo `count` equals `index`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    index: usize,
    count: usize,
}

impl Default for Shard {
    fn default() -> Self {
        Self { index: 0, count: 1 }
    }
}

impl Shard {
    /// Returns whether the checkpoint with this number, counted from 0, belongs to the shard.
    pub(crate) fn holds(&self, number: usize) -> bool {
        number % self.count == self.index
    }

    /// Creates shard `index` of `count`; `index` counts from 0.
    ///
    /// # Errors
    /// Returns [`Error::Options`] if `index` is not less than `count`.
    pub fn new(index: usize, count: usize) -> Result<Self> {
        if index >= count {
            return Err(Error::Options(format!("shard {index} of {count} does not exist; shards count from 0")));
        }
        Ok(Self { index, count })
    }

    /// Returns the shard of this process if it is a task of a Slurm array. Reads the environment variables
    /// `SLURM_ARRAY_TASK_ID`, `SLURM_ARRAY_TASK_MIN` and `SLURM_ARRAY_TASK_COUNT`.
    ///
    /// # Errors
    /// Returns [`Error::Options`] if a variable is not a number, or if the numbers are inconsistent.
    pub fn from_slurm() -> Result<Option<Self>> {
        let number = |name: &str| -> Result<Option<usize>> {
            let Ok(text) = std::env::var(name) else { return Ok(None) };
            text.parse().map(Some).map_err(|_| Error::Options(format!("{name} is {text:?}, not a number")))
        };
        let (Some(id), Some(count)) = (number("SLURM_ARRAY_TASK_ID")?, number("SLURM_ARRAY_TASK_COUNT")?) else {
            return Ok(None);
        };
        let first = number("SLURM_ARRAY_TASK_MIN")?.unwrap_or(0);
        Self::new(id.saturating_sub(first), count).map(Some)
    }
}

impl std::str::FromStr for Shard {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let parts = text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
        let (index, count) = parts.ok_or_else(|| Error::Unknown {
            what: "shard",
            name: text.into(),
            known: "expected INDEX/COUNT, such as 0/4 for the first of 4".into(),
        })?;
        Self::new(index, count)
    }
}
