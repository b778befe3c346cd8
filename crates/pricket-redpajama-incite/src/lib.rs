//! RedPajama-INCITE: 3B and 7B decoders in the GPT-NeoX architecture, base, instruct and chat, by Together and others in 2023.
//!
//! They are `GPTNeoXForCausalLM` and are loaded as that: the configuration says what is different from Pythia.
//!
//! | | Pythia | RedPajama-INCITE |
//! |---|---|---|
//! | residual | parallel: `x + mlp(norm(x)) + attention(norm(x))` | sequential: `h = x + attention(norm(x))`, `h + mlp(norm(h))` |
//! | rotary | a quarter of each head's dimensions | all of them |
//! | vocabulary | padded to 50,304 to 50,688 | padded to 50,432 |
//!
//! INCITE-3B and Pythia-2.8b have the same layers, width and heads. A configuration of the one over the weights of the other
//! loads, and writes fluent nonsense; a converter that drops a key makes just that. [`FAMILY`] says so.
//!
//! The chat models were tuned on `<human>: ...` and `<bot>: ...`, neither of which is a token, so a reply ends where the
//! text `<human>` begins. The 7B models came out twice, as a preview (v0.1) and later, under other names, with other weights.
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

/// RedPajama-INCITE, as the rest of pricket sees it. It claims no configuration: all of them are GPT-NeoX's. It knows which of
/// those can be its own.
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
        read.map_or_else(|| Some(format!("it is not of the family {}", self.name())), |config| unlike(&config))
    }
}

/// What a configuration says that no RedPajama-INCITE model has; `None` if it can be one.
fn unlike(config: &Config) -> Option<String> {
    let rope = config.rope_parameters.as_ref().and_then(|rope| rope.partial_rotary_factor);
    let share = rope.or(config.rotary_pct).unwrap_or(0.25);
    if config.use_parallel_residual {
        return Some("use_parallel_residual is true, or absent, which is the same; RedPajama-INCITE's is false".into());
    }
    (share != 1.0).then(|| format!("a share of {share} of each head is rotated; in RedPajama-INCITE all of it is"))
}
