//! The settings of an adapter: reading and writing PEFT's adapter_config.json.

use serde_json::{Map, Value, json};

use crate::{Error, Result};

/// A selection of modules by name.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Select {
    /// Modules whose name equals one of these, or ends in a dot and one of these.
    Names(Vec<String>),
    /// Modules whose full name matches this regular expression, in Python's syntax.
    Pattern(String),
    /// All linear layers except the head.
    AllLinear,
}

/// Biases that are trained together with an adapter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Bias {
    /// No biases.
    #[default]
    None,
    /// All biases of the model.
    All,
    /// The biases of the adapted layers.
    LoraOnly,
}

/// Initial values of a new adapter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Initial {
    /// A is uniform between `±1/sqrt(inputs)` and B is zero, so the model is unchanged at first.
    #[default]
    Kaiming,
    /// A is normal with standard deviation `1/rank` and B is zero.
    Gaussian,
    /// A and B are uniform, so the model changes at once. For tests.
    Random,
}

/// Settings of a LoRA adapter (Hu et al. 2021, arXiv:2106.09685), as in PEFT's `LoraConfig`.
///
/// ```
/// use pricket_train::LoraConfig;
/// let config = LoraConfig { rank: 16, alpha: 32.0, ..LoraConfig::default() };
/// assert_eq!(config.to_json()["target_modules"], "all-linear");
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// `r`: rank of the change. Default: 8.
    pub rank: usize,
    /// `lora_alpha`: the change is multiplied by `alpha / rank`. Default: 16.
    pub alpha: f64,
    /// `lora_dropout`: dropout rate of the adapter's input, from 0 to below 1. Default: 0.
    pub dropout: f64,
    /// `target_modules`: layers that are adapted. Default: all linear layers except the head.
    pub targets: Select,
    /// `exclude_modules`: layers that are not adapted even if `targets` selects them.
    pub exclude: Option<Select>,
    /// `layers_to_transform`: numbers of the blocks that are adapted, counted from 0. All blocks if `None`.
    pub layers: Option<Vec<usize>>,
    /// `layers_pattern`: name of the module list whose index is the block number, such as `layers`. Any name if empty.
    pub layers_pattern: Vec<String>,
    /// `rank_pattern`: ranks of single modules, by name, end of a name, or regular expression. The first match is used.
    pub rank_pattern: Vec<(String, usize)>,
    /// `alpha_pattern`: `lora_alpha` of single modules, by name, end of a name, or regular expression. The first match
    /// is used.
    pub alpha_pattern: Vec<(String, f64)>,
    /// `use_rslora`: the change is multiplied by `alpha / sqrt(rank)` (Kalajdzievski 2023, arXiv:2312.03732).
    pub rslora: bool,
    /// `use_dora`: also trains the magnitude of each row, as DoRA does (Liu et al. 2024, arXiv:2402.09353).
    pub dora: bool,
    /// `modules_to_save`: modules that are trained in full and stored with the adapter.
    pub modules_to_save: Vec<String>,
    /// `bias`: biases that are trained.
    pub bias: Bias,
    /// `init_lora_weights`: initial values.
    pub initial: Initial,
    /// `base_model_name_or_path`: repository or path of the base model.
    pub base: Option<String>,
    /// `revision`: revision of the base model.
    pub revision: Option<String>,
    /// `task_type`: not interpreted, written back unchanged.
    pub task_type: Option<String>,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            rank: 8,
            alpha: 16.0,
            dropout: 0.0,
            targets: Select::AllLinear,
            exclude: None,
            layers: None,
            layers_pattern: Vec::new(),
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            rslora: false,
            dora: false,
            modules_to_save: Vec::new(),
            bias: Bias::None,
            initial: Initial::Kaiming,
            base: None,
            revision: None,
            task_type: Some("CAUSAL_LM".into()),
        }
    }
}

/// Keys that do not affect what an existing adapter computes.
const NEUTRAL: [&str; 9] = [
    "peft_type",
    "peft_version",
    "auto_mapping",
    "inference_mode",
    "megatron_core",
    "qalora_group_size",
    "fan_in_fan_out",
    "runtime_config",
    "loftq_config",
];

/// Initializations that change only the adapter. Others (`pissa`, `olora`, `loftq`, `corda`) also change the base
/// weights.
const HARMLESS_INITIAL: [&str; 3] = ["gaussian", "eva", "orthogonal"];

impl LoraConfig {
    /// Reads the settings from the JSON of an adapter_config.json.
    ///
    /// # Errors
    /// Returns [`Error::Config`] with the key if a value is invalid or a setting is not implemented.
    pub fn from_json(config: &Value) -> Result<Self> {
        let object = config.as_object().ok_or_else(|| Error::config("(all)", "expected an object"))?;
        let kind = object.get("peft_type").and_then(Value::as_str).unwrap_or("LORA");
        if kind != "LORA" {
            return Err(Error::config("peft_type", format!("{kind} is not implemented; expected LORA")));
        }
        let mut keys = Keys { object, read: Vec::new() };
        let out = Self {
            rank: keys.number("r", 8.0)? as usize,
            alpha: keys.number("lora_alpha", 8.0)?,
            dropout: keys.number("lora_dropout", 0.0)?,
            targets: keys.select("target_modules")?.ok_or_else(|| {
                Error::config(
                    "target_modules",
                    "null: expected a list of modules, a regular expression or \"all-linear\"",
                )
            })?,
            exclude: keys.select("exclude_modules")?,
            layers: keys.layers()?,
            layers_pattern: keys.names("layers_pattern")?,
            rank_pattern: keys.pattern("rank_pattern")?.into_iter().map(|(key, rank)| (key, rank as usize)).collect(),
            alpha_pattern: keys.pattern("alpha_pattern")?,
            rslora: keys.flag("use_rslora")?,
            dora: keys.flag("use_dora")?,
            modules_to_save: keys.names("modules_to_save")?,
            bias: match keys.text("bias")?.as_deref() {
                None | Some("none") => Bias::None,
                Some("all") => Bias::All,
                Some("lora_only") => Bias::LoraOnly,
                Some(other) => {
                    return Err(Error::config("bias", format!("{other:?}; expected none, all or lora_only")));
                }
            },
            initial: keys.initial()?,
            base: keys.text("base_model_name_or_path")?,
            revision: keys.text("revision")?,
            task_type: keys.text("task_type")?,
        };
        keys.refuse_others()?;
        out.check()?;
        Ok(out)
    }

    /// Returns the settings as the JSON of an adapter_config.json.
    ///
    /// Keys of newer PEFT releases are written only if they are used. PEFT 0.6 and later read the file. DoRA needs PEFT
    /// 0.9, and `exclude_modules` needs 0.14.
    pub fn to_json(&self) -> Value {
        let select = |select: &Select| match select {
            Select::Names(names) => json!(names),
            Select::Pattern(pattern) => json!(pattern),
            Select::AllLinear => json!("all-linear"),
        };
        let mut out = json!({
            "alpha_pattern": self.alpha_pattern.iter().map(|(key, alpha)| (key.clone(), whole(*alpha))).collect::<Map<_, _>>(),
            "auto_mapping": null,
            "base_model_name_or_path": self.base,
            "bias": match self.bias {
                Bias::None => "none",
                Bias::All => "all",
                Bias::LoraOnly => "lora_only",
            },
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": match self.initial {
                Initial::Kaiming => json!(true),
                Initial::Gaussian => json!("gaussian"),
                Initial::Random => json!(false),
            },
            "layers_pattern": if self.layers_pattern.is_empty() { Value::Null } else { json!(self.layers_pattern) },
            "layers_to_transform": self.layers,
            "lora_alpha": whole(self.alpha),
            "lora_dropout": self.dropout,
            "modules_to_save": if self.modules_to_save.is_empty() { Value::Null } else { json!(self.modules_to_save) },
            "peft_type": "LORA",
            "r": self.rank,
            "rank_pattern": self.rank_pattern.iter().map(|(key, rank)| (key.clone(), json!(rank))).collect::<Map<_, _>>(),
            "revision": self.revision,
            "target_modules": select(&self.targets),
            "task_type": self.task_type,
            "use_rslora": self.rslora,
        });
        if self.dora {
            out["use_dora"] = json!(true);
        }
        if let Some(exclude) = &self.exclude {
            out["exclude_modules"] = select(exclude);
        }
        out
    }

    pub(crate) fn check(&self) -> Result<()> {
        let ranks = self.rank_pattern.iter().map(|(_, rank)| *rank);
        if let Some(rank) = ranks.chain([self.rank]).find(|rank| !(1..=65_536).contains(rank)) {
            return Err(Error::config("r", format!("{rank}; expected a rank from 1 to 65,536")));
        }
        if self.layers.is_some() && matches!(self.targets, Select::Pattern(_)) {
            let what = "cannot be combined with a regular expression in target_modules; give a list of names";
            return Err(Error::config("layers_to_transform", what));
        }
        let alphas = self.alpha_pattern.iter().map(|(_, alpha)| *alpha);
        if let Some(alpha) = alphas.chain([self.alpha]).find(|alpha| !alpha.is_finite()) {
            return Err(Error::config("lora_alpha", format!("{alpha}; expected a number")));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return Err(Error::config(
                "lora_dropout",
                format!("{}; expected a number from 0 to below 1", self.dropout),
            ));
        }
        Ok(())
    }
}

/// Converts a number to JSON. PEFT writes whole numbers without a decimal point.
fn whole(number: f64) -> Value {
    if number.fract() == 0.0 && number.abs() < 1e15 { json!(number as i64) } else { json!(number) }
}

/// The keys of an adapter_config.json, and the keys read so far.
struct Keys<'a> {
    object: &'a Map<String, Value>,
    read: Vec<&'static str>,
}

impl<'a> Keys<'a> {
    /// Returns the value of `key`, or `None` if it is null or missing.
    fn get(&mut self, key: &'static str) -> Option<&'a Value> {
        self.read.push(key);
        self.object.get(key).filter(|value| !value.is_null())
    }

    fn number(&mut self, key: &'static str, default: f64) -> Result<f64> {
        let Some(value) = self.get(key) else { return Ok(default) };
        let number = value.as_f64().filter(|number| key != "r" || (number.fract() == 0.0 && *number > 0.0));
        number.ok_or_else(|| Error::config(key, format!("{value}; expected a number")))
    }

    fn flag(&mut self, key: &'static str) -> Result<bool> {
        let Some(value) = self.get(key) else { return Ok(false) };
        value.as_bool().ok_or_else(|| Error::config(key, format!("{value}; expected true or false")))
    }

    fn text(&mut self, key: &'static str) -> Result<Option<String>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let text = value.as_str().map(str::to_owned);
        text.map(Some).ok_or_else(|| Error::config(key, format!("{value}; expected a string")))
    }

    /// Reads a list of names. A single string is read as a list of one name.
    fn names(&mut self, key: &'static str) -> Result<Vec<String>> {
        let Some(value) = self.get(key) else { return Ok(Vec::new()) };
        let wrong = || Error::config(key, format!("{value}; expected a list of names"));
        if let Some(name) = value.as_str() {
            return Ok(vec![name.to_owned()]);
        }
        let names = value.as_array().ok_or_else(wrong)?.iter();
        names.map(|name| name.as_str().map(str::to_owned).ok_or_else(wrong)).collect()
    }

    fn select(&mut self, key: &'static str) -> Result<Option<Select>> {
        Ok(match self.get(key) {
            None => None,
            Some(Value::String(name)) if name.eq_ignore_ascii_case("all-linear") => Some(Select::AllLinear),
            Some(Value::String(pattern)) => Some(Select::Pattern(pattern.clone())),
            Some(_) => Some(Select::Names(self.names(key)?)),
        })
    }

    fn layers(&mut self) -> Result<Option<Vec<usize>>> {
        let Some(value) = self.get("layers_to_transform") else { return Ok(None) };
        let wrong = || Error::config("layers_to_transform", format!("{value}; expected a list of block numbers"));
        let number = |value: &Value| value.as_u64().map(|number| number as usize).ok_or_else(wrong);
        let layers = match value.as_array() {
            Some(list) => list.iter().map(number).collect::<Result<Vec<_>>>()?,
            None => vec![number(value)?],
        };
        Ok(Some(layers).filter(|layers| !layers.is_empty()))
    }

    fn pattern(&mut self, key: &'static str) -> Result<Vec<(String, f64)>> {
        let Some(value) = self.get(key) else { return Ok(Vec::new()) };
        let wrong = || Error::config(key, format!("{value}; expected an object of module names with numbers"));
        let entries = value.as_object().ok_or_else(wrong)?.iter();
        let number = |value: &Value| value.as_f64().filter(|number| key != "rank_pattern" || number.fract() == 0.0);
        entries.map(|(key, value)| Ok((key.clone(), number(value).ok_or_else(wrong)?))).collect()
    }

    fn initial(&mut self) -> Result<Initial> {
        let value = self.get("init_lora_weights");
        match (value, value.and_then(Value::as_str)) {
            (None | Some(Value::Bool(true)), _) => Ok(Initial::Kaiming),
            (Some(Value::Bool(false)), _) => Ok(Initial::Random),
            (_, Some("gaussian")) => Ok(Initial::Gaussian),
            (_, Some(name)) if HARMLESS_INITIAL.contains(&name) => Ok(Initial::Kaiming),
            (Some(value), _) => Err(Error::config(
                "init_lora_weights",
                format!(
                    "{value} changes the base weights, which is not implemented; convert the adapter to LoRA with PEFT"
                ),
            )),
        }
    }

    /// Returns an error if a key is set that is not implemented.
    fn refuse_others(&self) -> Result<()> {
        let is_unset = |value: &Value| match value {
            Value::Null | Value::Bool(false) => true,
            Value::Array(list) => list.is_empty(),
            Value::Object(object) => object.is_empty(),
            Value::Bool(true) | Value::Number(_) | Value::String(_) => false,
        };
        // PEFT reads these keys only when it creates an adapter.
        let is_of_initial = |key: &str| matches!(key, "eva_config" | "lora_ga_config");
        let is_known = |key: &str| self.read.contains(&key) || NEUTRAL.contains(&key) || is_of_initial(key);
        match self.object.iter().find(|(key, value)| !is_known(key) && !is_unset(value)) {
            Some((key, value)) => Err(Error::config(key.as_str(), format!("{value} is not implemented"))),
            None => Ok(()),
        }
    }
}
