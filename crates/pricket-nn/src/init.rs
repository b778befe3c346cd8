//! Initial values of the weights of a model that is trained from scratch.

use std::sync::Arc;

use serde_json::Value;

use crate::{Error, Result};

/// Distribution or formula of the initial values of a tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// A constant.
    Constant(f64),
    /// Normal random numbers with mean 0.
    Normal {
        /// Standard deviation.
        deviation: f64,
    },
    /// Uniform random numbers.
    Uniform {
        /// Lower bound.
        low: f64,
        /// Upper bound.
        high: f64,
    },
    /// `offset + scale · (i / span)^power` for element `i` of the last dimension.
    Power {
        /// Value at element 0.
        offset: f64,
        /// Factor of the power.
        scale: f64,
        /// Exponent.
        power: f64,
        /// Divisor of the index.
        span: f64,
    },
    /// `offset`, `offset + scale`, `offset - scale`, repeated along the last dimension.
    Zigzag {
        /// First value.
        offset: f64,
        /// Difference of the second and the third value from the first.
        scale: f64,
    },
}

impl Init {
    /// Divides the values by `by`.
    fn divided(self, by: f64) -> Self {
        match self {
            Init::Constant(number) => Init::Constant(number / by),
            Init::Normal { deviation } => Init::Normal { deviation: deviation / by },
            Init::Uniform { low, high } => Init::Uniform { low: low / by, high: high / by },
            other => other,
        }
    }
}

/// Initialization scheme of a model: weights of norms are 1, biases are 0, and matrices follow a rule.
///
/// ```
/// use pricket_nn::{Init, Initialization};
/// let scheme = Initialization::small(128, 4, &["dense.weight"]);
/// assert_eq!(scheme.of("layers.0.norm.weight", &[128]), Init::Constant(1.0));
/// assert_eq!(scheme.of("layers.0.up.weight", &[512, 128]), Init::Normal { deviation: (2.0f64 / (5.0 * 128.0)).sqrt() });
/// ```
#[derive(Clone, Debug)]
pub struct Initialization {
    rule: Rule,
    /// Initial values of embeddings, if they differ from the rule.
    embeddings: Option<Init>,
    /// Name suffixes of the matrices whose output is added to the residual stream, and the divisor of their values.
    residual: (&'static [&'static str], f64),
}

/// Rule by name and shape; `None` selects the default.
type ByName = dyn Fn(&str, &[usize]) -> Option<Init> + Send + Sync;

#[derive(Clone)]
enum Rule {
    Fixed(Init),
    /// A rule by name and shape.
    Named(Arc<ByName>),
    /// Normal or uniform with the standard deviation `gain / sqrt(inputs)` (He et al. 2015, arXiv:1502.01852).
    Kaiming {
        gain: f64,
        is_uniform: bool,
    },
}

impl std::fmt::Debug for Rule {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Rule::Fixed(init) => write!(f, "Fixed({init:?})"),
            Rule::Named(_) => f.write_str("Named"),
            Rule::Kaiming { gain, is_uniform } => write!(f, "Kaiming({gain}, {is_uniform})"),
        }
    }
}

/// Name suffixes of the tables of tokens and positions.
const EMBEDDINGS: [&str; 4] = ["embed_in.weight", "wte.weight", "wpe.weight", "embed.weight"];

impl Initialization {
    /// Returns a scheme with normal matrices and tables of one standard deviation.
    pub fn normal(deviation: f64) -> Self {
        Self { rule: Rule::Fixed(Init::Normal { deviation }), embeddings: None, residual: (&[], 1.0) }
    }

    /// Returns a scheme with a rule by canonical name and shape. If the rule returns `None`, weights of norms are 1,
    /// and biases and matrices are 0.
    pub fn named(rule: impl Fn(&str, &[usize]) -> Option<Init> + Send + Sync + 'static) -> Self {
        Self { rule: Rule::Named(Arc::new(rule)), embeddings: None, residual: (&[], 1.0) }
    }

    /// Returns the scheme of GPT-NeoX.
    ///
    /// The standard deviation is `sqrt(2 / 5d)` (Nguyen and Salazar 2019, arXiv:1910.05895). It is
    /// `2 / (layers · sqrt(d))` for the matrices in `residual`, whose output is added to the residual stream (Wang and
    /// Komatsuzaki 2021).
    pub fn small(d: usize, layers: usize, residual: &'static [&'static str]) -> Self {
        let (d, layers) = (d as f64, layers as f64);
        let deviation = (2.0 / (5.0 * d)).sqrt();
        let rule = Rule::Fixed(Init::Normal { deviation });
        Self { rule, embeddings: None, residual: (residual, deviation * layers * d.sqrt() / 2.0) }
    }

    /// Returns the scheme of an llm-foundry `init_config`: `kaiming_normal_`, `kaiming_uniform_`, `baseline_` or
    /// `small_init_`.
    ///
    /// # Errors
    /// Returns [`Error::Config`] naming the key if a value is missing or not implemented.
    pub fn from_init_config(
        config: &Value,
        d: usize,
        layers: usize,
        residual: &'static [&'static str],
    ) -> Result<Self> {
        let number = |key: &str| config[key].as_f64();
        let gain = match config["init_nonlinearity"].as_str().unwrap_or("relu") {
            "relu" => 2f64.sqrt(),
            "linear" | "sigmoid" => 1.0,
            "tanh" => 5.0 / 3.0,
            "leaky_relu" => (2.0f64 / (1.0 + 1e-4)).sqrt(),
            other => return Err(Error::config("init_config.init_nonlinearity", format!("{other} is not implemented"))),
        };
        if config["fan_mode"].as_str().is_some_and(|mode| mode != "fan_in") {
            return Err(Error::config("init_config.fan_mode", format!("{}; expected fan_in", config["fan_mode"])));
        }
        let small = (2.0 / (5.0 * d as f64)).sqrt();
        let name = config["name"].as_str().unwrap_or("kaiming_normal_");
        let rule = match name {
            "kaiming_normal_" | "kaiming_uniform_" => Rule::Kaiming { gain, is_uniform: name == "kaiming_uniform_" },
            "baseline_" => {
                let deviation = number("init_std")
                    .ok_or_else(|| Error::config("init_config.init_std", "baseline_ needs a number"))?;
                Rule::Fixed(Init::Normal { deviation })
            }
            "small_init_" => Rule::Fixed(Init::Normal { deviation: small }),
            other => return Err(Error::config("init_config.name", format!("{other} is not implemented"))),
        };
        let layers = layers as f64;
        let by = match &config["init_div_is_residual"] {
            Value::Null | Value::Bool(true) => (2.0 * layers).sqrt(),
            Value::Bool(false) => 1.0,
            other => other.as_f64().filter(|by| *by > 0.0).ok_or_else(|| {
                Error::config("init_config.init_div_is_residual", format!("{other}; expected true, false or a number"))
            })?,
        };
        let limits = &config["emb_init_uniform_lim"];
        let embeddings = match (number("emb_init_std"), limits) {
            (Some(deviation), _) => Some(Init::Normal { deviation }),
            (None, Value::Null) => None,
            (None, limits) => {
                let pair = (limits[0].as_f64(), limits[1].as_f64());
                match (limits.as_f64(), pair) {
                    (Some(limit), _) => Some(Init::Uniform { low: -limit, high: limit }),
                    (None, (Some(low), Some(high))) => Some(Init::Uniform { low, high }),
                    _ => return Err(Error::config("init_config.emb_init_uniform_lim", "expected 1 or 2 numbers")),
                }
            }
        };
        Ok(Self { rule, embeddings, residual: (residual, by) })
    }

    /// Returns the initial values of the tensor with the canonical name `name`.
    pub fn of(&self, name: &str, shape: &[usize]) -> Init {
        if let Rule::Named(rule) = &self.rule
            && let Some(init) = rule(name, shape)
        {
            return init;
        }
        let &[_, inputs] = shape else {
            return Init::Constant(if name.ends_with(".weight") { 1.0 } else { 0.0 });
        };
        if let Some(embeddings) = self.embeddings.filter(|_| EMBEDDINGS.iter().any(|end| name.ends_with(end))) {
            return embeddings;
        }
        let spread = |deviation: f64, is_uniform: bool| {
            let limit = deviation * 3f64.sqrt();
            if is_uniform { Init::Uniform { low: -limit, high: limit } } else { Init::Normal { deviation } }
        };
        let init = match &self.rule {
            Rule::Fixed(init) => *init,
            Rule::Named(_) => Init::Constant(0.0),
            Rule::Kaiming { gain, is_uniform } => spread(gain / (inputs as f64).sqrt(), *is_uniform),
        };
        let (ends, by) = self.residual;
        if ends.iter().any(|end| name.ends_with(end)) { init.divided(by) } else { init }
    }
}
