//! Selections of training steps.

use std::collections::BTreeSet;
use std::str::FromStr;

use crate::{Error, Result};

/// Maximum number of steps in a range with a stride, far more than any suite has.
const MOST: u64 = 1 << 20;

/// A selection of training steps.
///
/// | text | steps |
/// |---|---|
/// | `all` | all existing steps |
/// | `final` | the last step |
/// | `log` | 0, 1, 2, 4, ... 512, then 1000, 2000, 4000, ... |
/// | `512` | step 512 |
/// | `0..143000:10000` | existing steps among 0, 10000, 20000, ... 140000 (`first..last:stride`, `last` included if the stride reaches it) |
/// | `1000..5000` | all existing steps from 1000 to 5000, both included |
///
/// Commas join several selections. `all`, `final`, `log` and ranges choose among the existing steps. A single number
/// must exist.
///
/// ```
/// use pricket_hub::Steps;
/// let existing = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000, 2000, 3000, 4000];
/// let steps: Steps = "final,0..3000:1000".parse()?;
/// assert_eq!(steps.select(&existing)?, [0, 1000, 2000, 3000, 4000]);
/// assert_eq!("log".parse::<Steps>()?.select(&existing)?.len(), 14);
/// assert!("7".parse::<Steps>()?.select(&existing).is_err());
/// # Ok::<(), pricket_hub::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Steps(Vec<Part>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    All,
    Final,
    Log,
    One(u64),
    Range { first: u64, last: u64, by: Option<u64> },
}

impl Steps {
    /// Selects all existing steps.
    pub fn all() -> Self {
        Self(vec![Part::All])
    }

    /// Returns the selected steps of `existing`, in ascending order.
    ///
    /// # Errors
    /// Returns [`Error::Input`] if a single number does not exist, or if nothing is selected.
    pub fn select(&self, existing: &[u64]) -> Result<Vec<u64>> {
        let last = existing.iter().max().copied();
        let mut chosen = BTreeSet::new();
        for part in &self.0 {
            match *part {
                Part::One(step) if !existing.contains(&step) => {
                    let mut near: Vec<u64> = existing.to_vec();
                    near.sort_unstable_by_key(|other| other.abs_diff(step));
                    near.truncate(3);
                    near.sort_unstable();
                    let near: Vec<String> = near.iter().map(u64::to_string).collect();
                    let nearest =
                        if near.is_empty() { String::new() } else { format!("; the nearest are {}", near.join(", ")) };
                    let what = format!("step {step} does not exist{nearest}");
                    return Err(Error::Input(what));
                }
                Part::One(step) => {
                    chosen.insert(step);
                }
                _ => chosen.extend(existing.iter().copied().filter(|&step| part.takes(step, last))),
            }
        }
        if chosen.is_empty() {
            return Err(Error::Input("the selection matches no existing training step".into()));
        }
        Ok(chosen.into_iter().collect())
    }

    /// Returns the steps of a selection that has only numbers and ranges with a stride, whether they exist or not.
    /// Returns `None` if any part depends on the existing steps.
    pub fn expand(&self) -> Option<Vec<u64>> {
        let mut out = BTreeSet::new();
        for part in &self.0 {
            match *part {
                Part::One(step) => {
                    out.insert(step);
                }
                Part::Range { first, last, by: Some(by) } => {
                    out.extend((first..=last).step_by(usize::try_from(by).ok()?).take(MOST as usize));
                }
                _ => return None,
            }
        }
        Some(out.into_iter().collect())
    }
}

impl Part {
    /// Returns whether this part selects `step`.
    fn takes(self, step: u64, final_step: Option<u64>) -> bool {
        match self {
            Part::All => true,
            Part::Final => Some(step) == final_step,
            Part::Log => {
                step == 0
                    || (step <= 512 && step.is_power_of_two())
                    || (step.is_multiple_of(1000) && (step / 1000).is_power_of_two())
            }
            Part::One(one) => step == one,
            Part::Range { first, last, by } => {
                (first..=last).contains(&step) && by.is_none_or(|by| (step - first).is_multiple_of(by))
            }
        }
    }
}

impl FromStr for Steps {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let part = |part: &str| -> Option<Part> {
            Some(match part.trim() {
                "all" => Part::All,
                "final" => Part::Final,
                "log" => Part::Log,
                part => {
                    let number = |text: &str| text.strip_prefix("step").unwrap_or(text).parse::<u64>().ok();
                    let Some((first, rest)) = part.split_once("..") else { return Some(Part::One(number(part)?)) };
                    let (last, by) = match rest.split_once(':') {
                        Some((last, by)) => (last, Some(number(by).filter(|&by| by > 0)?)),
                        None => (rest, None),
                    };
                    let (first, last) = (number(first)?, number(last)?);
                    if first > last || (last - first) / by.unwrap_or(1).max(1) > MOST && by.is_some() {
                        return None;
                    }
                    Part::Range { first, last, by }
                }
            })
        };
        let parts: Option<Vec<Part>> = text.split(',').map(part).collect();
        parts.map(Self).ok_or_else(|| {
            Error::Input(format!(
                "{text:?} is not a selection of training steps; expected all, final, log, numbers or ranges such as 0..143000:10000, separated by commas"
            ))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::step_of;

    #[test]
    fn the_154_steps_of_pythia() {
        let steps: Steps = "0,1,2,4,8,16,32,64,128,256,512,1000..143000:1000".parse().unwrap();
        let all = steps.expand().unwrap();
        assert_eq!(all.len(), 154);
        let log = "log".parse::<Steps>().unwrap().select(&all).unwrap();
        assert_eq!(&log[8..], [128, 256, 512, 1000, 2000, 4000, 8000, 16000, 32000, 64000, 128_000]);
        assert_eq!("0..143000:10000".parse::<Steps>().unwrap().select(&all).unwrap().len(), 15);
        assert_eq!("final".parse::<Steps>().unwrap().select(&all).unwrap(), [143_000]);
        assert_eq!("step512, 1000".parse::<Steps>().unwrap().select(&all).unwrap(), [512, 1000]);
        for bad in ["", "x", "1..", "5..1", "0..9:0", "1,,2", "-1", "0..18446744073709551615:1"] {
            assert!(bad.parse::<Steps>().is_err(), "{bad}");
        }
        assert_eq!(
            (step_of("step0"), step_of("step012"), step_of("main"), step_of("step")),
            (Some(0), None, None, None)
        );
    }
}
