//! RedPajama-INCITE: 3B and 7B decoders with the GPT-NeoX architecture, in base, instruct and chat versions, by
//! Together and others (2023).
//!
//! The checkpoints are `GPTNeoXForCausalLM` and are loaded by `pricket-gpt-neox`. Their configuration differs from
//! Pythia's:
//!
//! | | Pythia | RedPajama-INCITE |
//! |---|---|---|
//! | residual | parallel: `x + mlp(norm(x)) + attention(norm(x))` | sequential: `h = x + attention(norm(x))`, then `h + mlp(norm(h))` |
//! | rotary | a quarter of the dimensions of each head | all dimensions |
//! | vocabulary | padded to 50,304 to 50,688 | padded to 50,432 |
//!
//! INCITE-3B and Pythia-2.8b have the same number of layers, width and heads. The weights of one therefore load with
//! the configuration of the other, but the model generates nonsense. A converter that drops a key causes this.
//! [`FAMILY`] reports it in [`Family::unlike`].
//!
//! The chat models were tuned on turns that start with `<human>:` and `<bot>:`. Neither is a single token, so a reply
//! ends at the text `<human>`. The 7B models were released twice, first as a preview (v0.1) and later under other names
//! with other weights.
//!
//! ```
//! use pricket_redpajama_incite::FAMILY;
//! let mut json = serde_json::json!({
//!     "vocab_size": 50432, "hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 32,
//!     "intermediate_size": 10240, "rotary_pct": 1.0, "use_parallel_residual": false, "model_type": "gpt_neox",
//! });
//! assert_eq!(FAMILY.unlike(&json), None);
//! json.as_object_mut().unwrap().remove("use_parallel_residual");
//! assert!(FAMILY.unlike(&json).unwrap().contains("use_parallel_residual"));
//! # Ok::<(), pricket_nn::Error>(())
//! ```

use std::sync::Arc;

pub use pricket_gpt_neox::{Config, GptNeoX, NAMES, load};
use pricket_nn::{CausalLm, Family, Names, Result, Weights};
use serde_json::Value;

/// The RedPajama-INCITE family. It claims no configuration, because GPT-NeoX claims them all. [`Family::unlike`] checks
/// whether one can belong to a RedPajama-INCITE model.
pub static FAMILY: &dyn Family = &InciteFamily;

struct InciteFamily;

impl Family for InciteFamily {
    fn name(&self) -> &'static str {
        "redpajama-incite"
    }

    fn spellings(&self) -> (&'static [&'static str], &'static [&'static str]) {
        (&[], &[])
    }

    fn check(&self, config: &Value) -> Result<()> {
        pricket_gpt_neox::FAMILY.check(config)
    }

    fn load(&self, config: &Value, weights: &Weights) -> Result<Arc<dyn CausalLm>> {
        pricket_gpt_neox::FAMILY.load(config, weights)
    }

    fn names(&self) -> Names {
        NAMES
    }

    fn unlike(&self, config: &Value) -> Option<String> {
        let read = Config::from_json(config).ok().filter(|_| pricket_gpt_neox::FAMILY.claims(config));
        read.map_or_else(|| Some(format!("it does not belong to the family {}", self.name())), |config| unlike(&config))
    }
}

/// Returns a setting that no RedPajama-INCITE model has, or `None` if the configuration can belong to one.
fn unlike(config: &Config) -> Option<String> {
    let rope = config.rope_parameters.as_ref().and_then(|rope| rope.partial_rotary_factor);
    let share = rope.or(config.rotary_pct).unwrap_or(0.25);
    if config.use_parallel_residual {
        return Some(
            "use_parallel_residual is true (the default if absent); RedPajama-INCITE models have false".into(),
        );
    }
    (share != 1.0)
        .then(|| format!("the rotated share of a head is {share}; RedPajama-INCITE models rotate all dimensions"))
}
