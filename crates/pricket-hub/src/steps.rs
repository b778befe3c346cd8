use std::collections::BTreeSet;
use std::str::FromStr;

use crate::{Error, Result};

/// More steps than any suite has; a selection is a list that somebody typed.
const MOST: u64 = 1 << 20;

/// A selection of training steps.
///
/// | text | steps |
/// |---|---|
/// | `all` | all there are |
/// | `final` | the last |
/// | `log` | 0, 1, 2, 4, ... 512, then 1000, 2000, 4000, ... |
/// | `512` | that one |
/// | `0..143000:10000` | those from the first number to the second, both included, that are a multiple of the third away from the first |
/// | `1000..5000` | all there are in between |
///
/// Several are joined with commas. `all`, `final`, `log` and ranges choose among the steps that exist; a number must exist.
///
/// ```
/// use pricket_hub::Steps;
/// let there_are = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000, 2000, 3000, 4000];
/// let steps: Steps = "final,0..3000:1000".parse()?;
/// assert_eq!(steps.select(&there_are)?, [0, 1000, 2000, 3000, 4000]);
/// assert_eq!("log".parse::<Steps>()?.select(&there_are)?.len(), 14);
/// assert!("7".parse::<Steps>()?.select(&there_are).is_err());
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
    /// All there are.
    pub fn all() -> Self {
        Self(vec![Part::All])
    }

    /// The steps chosen among `existing`, ascending.
    ///
    /// # Errors
    /// [`Error::Input`] for a number that does not exist, or if nothing is chosen.
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
                    let what = format!("there is no step {step}{nearest}");
                    return Err(Error::Input(what));
                }
                Part::One(step) => {
                    chosen.insert(step);
                }
                _ => chosen.extend(existing.iter().copied().filter(|&step| part.takes(step, last))),
            }
        }
        if chosen.is_empty() {
            return Err(Error::Input("no step is selected".into()));
        }
        Ok(chosen.into_iter().collect())
    }

    /// The steps that numbers and ranges with a stride name by themselves, whatever exists; `None` with any other part.
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
                "{text:?} selects no steps; use all, final, log, numbers, and ranges such as 0..143000:10000, with commas"
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
