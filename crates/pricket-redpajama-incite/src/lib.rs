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
//! loads, and writes fluent nonsense; a converter that drops a key makes just that. [`unlike`] says so.
//!
//! The chat models were tuned on `<human>: ...` and `<bot>: ...`, neither of which is a token, so a reply ends where the
//! text `<human>` begins. The 7B models came out twice, as a preview (v0.1) and later, under other names, with other weights.
//!
//! ```
//! use pricket_redpajama_incite::{Config, unlike};
//! let mut json = serde_json::json!({
//!     "vocab_size": 50432, "hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 32,
//!     "intermediate_size": 10240, "rotary_pct": 1.0, "use_parallel_residual": false,
//! });
//! assert_eq!(unlike(&Config::from_json(&json)?), None);
//! json.as_object_mut().unwrap().remove("use_parallel_residual");
//! assert!(unlike(&Config::from_json(&json)?).unwrap().contains("use_parallel_residual"));
//! # Ok::<(), pricket_nn::Error>(())
//! ```

pub use pricket_gpt_neox::{Config, GptNeoX, NAMES, load};

/// What a configuration says that no RedPajama-INCITE model has; `None` if it can be one.
pub fn unlike(config: &Config) -> Option<String> {
    let rope = config.rope_parameters.as_ref().and_then(|rope| rope.partial_rotary_factor);
    let share = rope.or(config.rotary_pct).unwrap_or(0.25);
    if config.use_parallel_residual {
        return Some("use_parallel_residual is true, or absent, which is the same; RedPajama-INCITE's is false".into());
    }
    (share != 1.0).then(|| format!("a share of {share} of each head is rotated; in RedPajama-INCITE all of it is"))
}
