//! Selection of the modules that an adapter changes, with the rules of PEFT's `tuners_utils.py`.

use fancy_regex::Regex;

use crate::config::{LoraConfig, Select};
use crate::{Error, Result};

/// The properties of a module that decide whether it is adapted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Named<'a> {
    /// Name on the Hub.
    pub(crate) name: &'a str,
    pub(crate) is_linear: bool,
    pub(crate) is_head: bool,
}

/// A [`LoraConfig`] with its patterns compiled.
pub(crate) struct Targets<'a> {
    config: &'a LoraConfig,
    chosen: Selector<'a>,
    exclude: Option<Selector<'a>>,
    save: Vec<Regex>,
    layer: Vec<Regex>,
    ranks: Vec<(Regex, usize)>,
    alphas: Vec<(Regex, f64)>,
}

/// A [`Select`] with its pattern compiled.
enum Selector<'a> {
    Names(&'a [String]),
    Pattern(Regex),
    AllLinear,
}

/// Compiles `whole`, the regular expression that PEFT builds from `pattern` for Python's `re.match`. Errors name
/// `pattern`.
fn compile(key: &str, pattern: &str, whole: &str) -> Result<Regex> {
    // The cause is on the last line of a message of several lines.
    let wrong = |e: fancy_regex::Error| {
        let what = e.to_string();
        Error::config(
            key,
            format!("{pattern:?} is not a valid regular expression: {}", what.lines().last().unwrap_or_default()),
        )
    };
    Regex::new(whole).map_err(wrong)
}

/// Returns whether a pattern matches. A match that needs too many steps is an error.
fn matches(key: &str, pattern: &Regex, name: &str) -> Result<bool> {
    pattern.is_match(name).map_err(|e| Error::config(key, format!("{:?} on {name}: {e}", pattern.as_str())))
}

/// Returns whether a name equals `end`, or ends in a dot and `end`.
fn ends_in(name: &str, end: &str) -> bool {
    name.strip_suffix(end).is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

impl<'a> Selector<'a> {
    fn new(key: &str, select: &'a Select) -> Result<Self> {
        Ok(match select {
            Select::Names(names) => Selector::Names(names),
            Select::Pattern(pattern) => Selector::Pattern(compile(key, pattern, &format!("^(?:{pattern})$"))?),
            Select::AllLinear => Selector::AllLinear,
        })
    }

    fn has(&self, key: &str, module: Named<'_>) -> Result<bool> {
        match self {
            Selector::Names(names) => Ok(names.iter().any(|end| ends_in(module.name, end))),
            Selector::Pattern(pattern) => matches(key, pattern, module.name),
            Selector::AllLinear => Ok(module.is_linear && !module.is_head),
        }
    }
}

impl<'a> Targets<'a> {
    pub(crate) fn new(config: &'a LoraConfig) -> Result<Self> {
        let named = |key: &str, pattern: &str| compile(key, pattern, &format!("^(?:(.*\\.)?({pattern})$)"));
        let save = |name: &String| compile("modules_to_save", name, &format!("^(?:(^|.*\\.){name}($|\\..*))"));
        let layer = |name: &String| compile("layers_pattern", name, &format!("^(?:.*\\.{name}\\.(\\d+)\\.)"));
        let patterns = config.layers_pattern.iter().map(layer).collect::<Result<Vec<_>>>()?;
        Ok(Self {
            config,
            chosen: Selector::new("target_modules", &config.targets)?,
            exclude: config.exclude.as_ref().map(|select| Selector::new("exclude_modules", select)).transpose()?,
            save: config.modules_to_save.iter().map(save).collect::<Result<_>>()?,
            layer: if patterns.is_empty() { vec![layer(&"[^.]*".to_owned())?] } else { patterns },
            ranks: config
                .rank_pattern
                .iter()
                .map(|(key, rank)| Ok((named("rank_pattern", key)?, *rank)))
                .collect::<Result<_>>()?,
            alphas: config
                .alpha_pattern
                .iter()
                .map(|(key, alpha)| Ok((named("alpha_pattern", key)?, *alpha)))
                .collect::<Result<_>>()?,
        })
    }

    /// Returns whether a module is adapted.
    pub(crate) fn has(&self, module: Named<'_>) -> Result<bool> {
        if let Some(exclude) = &self.exclude
            && exclude.has("exclude_modules", module)?
        {
            return Ok(false);
        }
        for save in &self.save {
            if matches("modules_to_save", save, module.name)? {
                return Ok(false);
            }
        }
        if !self.chosen.has("target_modules", module)? {
            return Ok(false);
        }
        match (&self.config.layers, &self.config.targets) {
            (Some(layers), Select::Names(names)) if !names.iter().any(|name| name == module.name) => {
                Ok(self.layer(module.name)?.is_some_and(|layer| layers.contains(&layer)))
            }
            (Some(layers), Select::AllLinear) => {
                Ok(self.layer(module.name)?.is_some_and(|layer| layers.contains(&layer)))
            }
            _ => Ok(true),
        }
    }

    /// Returns whether a module is trained in full.
    pub(crate) fn saves(&self, name: &str) -> bool {
        self.config.modules_to_save.iter().any(|end| name.ends_with(end.as_str()))
    }

    /// Returns whether the targets are a list of names that includes this module.
    pub(crate) fn names(&self, name: &str) -> bool {
        matches!(&self.chosen, Selector::Names(names) if names.iter().any(|end| ends_in(name, end)))
    }

    /// Returns the number of the block that a module is in, or `None` outside the blocks.
    fn layer(&self, name: &str) -> Result<Option<usize>> {
        for pattern in &self.layer {
            let found = pattern.captures(name);
            let found = found.map_err(|e| Error::config("layers_pattern", format!("on {name}: {e}")))?;
            if let Some(number) = found.and_then(|found| found.get(1)) {
                return Ok(number.as_str().parse().ok());
            }
        }
        Ok(None)
    }

    /// Returns the rank of a module.
    pub(crate) fn rank(&self, name: &str) -> Result<usize> {
        first("rank_pattern", &self.ranks, name, self.config.rank)
    }

    /// Returns the scale of a module's change.
    pub(crate) fn scale(&self, name: &str, rank: usize) -> Result<f64> {
        let alpha = first("alpha_pattern", &self.alphas, name, self.config.alpha)?;
        let rank = rank as f64;
        Ok(if self.config.rslora { alpha / rank.sqrt() } else { alpha / rank })
    }
}

/// Returns the value of the first pattern that matches, or `default`.
fn first<T: Copy>(key: &str, patterns: &[(Regex, T)], name: &str, default: T) -> Result<T> {
    for (pattern, value) in patterns {
        if matches(key, pattern, name)? {
            return Ok(*value);
        }
    }
    Ok(default)
}
