//! The configuration of RWKV-4.

use pricket_nn::Result;
use pricket_nn::config::{GENERIC, Keys, epsilon, parse, plausible};
use serde::Deserialize;

/// Keys of `RwkvConfig` in transformers 4.29 to 5.24. `rescale_every` halves the residual stream to avoid overflow in
/// f16; f32 does not need it.
pub const KEYS: Keys = Keys {
    read: &[
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "attention_hidden_size",
        "intermediate_size",
        "layer_norm_epsilon",
        "context_length",
        "tie_word_embeddings",
    ],
    neutral: &["rescale_every", "max_position_embeddings"],
    only: &[("num_attention_heads", &[]), ("head_size", &[]), ("head_size_divisor", &[])],
};

/// Keys of an RWKV-4 config.json that affect the forward pass, with the defaults of transformers.
#[derive(Clone, Debug, Deserialize)]
pub struct Config {
    /// Number of rows of the embedding and the head.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Width of time mixing; `hidden_size` if absent.
    #[serde(default)]
    pub attention_hidden_size: Option<usize>,
    /// Width of channel mixing; `4 · hidden_size` if absent.
    #[serde(default)]
    pub intermediate_size: Option<usize>,
    /// Epsilon, added to the variance in every norm except the final one.
    #[serde(default = "eps")]
    pub layer_norm_epsilon: f64,
    /// Number of positions for which the model was trained; not a limit.
    #[serde(default = "context_length")]
    pub context_length: usize,
    /// Whether the head shares the table of the embedding.
    #[serde(default)]
    pub tie_word_embeddings: bool,
}

fn eps() -> f64 {
    1e-5
}

fn context_length() -> usize {
    1024
}

impl Config {
    /// Reads and checks a config.json.
    ///
    /// # Errors
    /// Returns [`pricket_nn::Error::Config`] naming the key if a value is missing, invalid or not implemented.
    pub fn from_json(json: &serde_json::Value) -> Result<Self> {
        let config: Self = parse(json)?;
        plausible("vocab_size", config.vocab_size, 1 << 24)?;
        plausible("hidden_size", config.hidden_size, 1 << 17)?;
        plausible("num_hidden_layers", config.num_hidden_layers, 1 << 12)?;
        plausible("attention_hidden_size", config.attention_width(), 1 << 17)?;
        plausible("intermediate_size", config.mlp_width(), 1 << 20)?;
        plausible("context_length", config.context_length, 1 << 32)?;
        epsilon("layer_norm_epsilon", Some(config.layer_norm_epsilon))?;
        Keys::check(&[KEYS, GENERIC], json)?;
        Ok(config)
    }

    /// Returns the width of time mixing.
    pub fn attention_width(&self) -> usize {
        self.attention_hidden_size.unwrap_or(self.hidden_size)
    }

    /// Returns the width of channel mixing.
    pub fn mlp_width(&self) -> usize {
        self.intermediate_size.unwrap_or(4 * self.hidden_size)
    }
}

#[cfg(test)]
mod tests {
    use pricket_nn::Error;
    use serde_json::json;

    use super::*;

    #[test]
    fn absent_and_null_sizes_follow_from_the_width() {
        let config = json!({"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": null});
        let config = Config::from_json(&config).unwrap();
        assert_eq!((config.attention_width(), config.mlp_width(), config.context_length), (32, 128, 1024));
        let later = json!({"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "head_size": 64});
        assert!(matches!(Config::from_json(&later), Err(Error::Config { key, .. }) if key == "head_size"));
    }
}
