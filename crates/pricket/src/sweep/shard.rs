//! Shares of a sweep among machines.

use crate::{Error, Result};

/// A share of the work: the checkpoints whose number leaves `index` when divided by `count`.
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
    /// Whether the checkpoint of a number, from 0 on, is in this share.
    pub(crate) fn holds(&self, number: usize) -> bool {
        number % self.count == self.index
    }

    /// Share `index` of `count`, from 0 on.
    ///
    /// # Errors
    /// [`Error::Options`] if there is no such share.
    pub fn new(index: usize, count: usize) -> Result<Self> {
        if index >= count {
            return Err(Error::Options(format!("share {index} of {count}: they are counted from 0")));
        }
        Ok(Self { index, count })
    }

    /// The share of a task of a Slurm array (`SLURM_ARRAY_TASK_ID`, `_MIN`, `_COUNT`), if this process is one.
    ///
    /// # Errors
    /// [`Error::Options`] if the variables are no numbers, or do not fit each other.
    pub fn from_slurm() -> Result<Option<Self>> {
        let number = |name: &str| -> Result<Option<usize>> {
            let Ok(text) = std::env::var(name) else { return Ok(None) };
            text.parse().map(Some).map_err(|_| Error::Options(format!("{name} is {text:?}, no number")))
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
            what: "share",
            name: text.into(),
            known: "0/4 is the first of 4".into(),
        })?;
        Self::new(index, count)
    }
}
