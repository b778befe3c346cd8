//! The implementation of [`Family`] for LLaMA.

use std::sync::Arc;

use pricket_nn::config::{GENERIC, Keys};
use pricket_nn::{CausalLm, Family, GgmlLayout, Initialization, Names, Result, ShapeOf, Weights};
use serde_json::Value;

use crate::formats::{GGML, config_from_ggml, config_from_gguf, gguf_metadata};
use crate::keys::{GGUF_KEYS, KEYS};
use crate::names::{GGUF, NAMES, PAIRED};
use crate::{Config, load};

/// The LLaMA family.
pub static FAMILY: &dyn Family = &LlamaFamily;

struct LlamaFamily;

impl Family for LlamaFamily {
    fn name(&self) -> &'static str {
        "llama"
    }

    fn spellings(&self) -> (&'static [&'static str], &'static [&'static str]) {
        (&["llama"], &["LlamaForCausalLM", "LLaMAForCausalLM"])
    }

    fn check(&self, config: &Value) -> Result<()> {
        Config::from_json(config).map(drop)
    }

    fn load(&self, config: &Value, weights: &Weights) -> Result<Arc<dyn CausalLm>> {
        Ok(Arc::new(load(&Config::from_json(config)?, weights)?))
    }

    fn names(&self) -> Names {
        NAMES
    }

    fn keys(&self, _: &Value) -> Vec<Keys> {
        vec![KEYS, GENERIC]
    }

    /// The scheme of transformers: normal with the standard deviation `initializer_range`.
    fn initialization(&self, config: &Value) -> Result<Initialization> {
        Ok(Initialization::normal(config["initializer_range"].as_f64().unwrap_or(0.02)))
    }

    fn gguf_architecture(&self) -> Option<&'static str> {
        Some("llama")
    }

    fn gguf_names(&self) -> &'static [(&'static str, &'static str)] {
        GGUF
    }

    fn gguf_keys(&self) -> Keys {
        GGUF_KEYS
    }

    fn config_from_gguf(&self, metadata: &Value, shape: ShapeOf<'_>) -> Result<Value> {
        config_from_gguf(metadata, shape)
    }

    fn gguf_metadata(&self, config: &Value, _: &dyn Fn(&str) -> bool) -> Result<Value> {
        gguf_metadata(config)
    }

    fn paired_rows(&self, config: &Value) -> Result<Vec<(&'static str, usize)>> {
        let config = Config::from_json(config)?;
        Ok(PAIRED.into_iter().zip([config.num_attention_heads, config.kv_heads()]).collect())
    }

    fn ggml_layouts(&self) -> &'static [GgmlLayout] {
        &GGML
    }

    fn ggml_assumes(&self) -> Option<&'static str> {
        Some("rms_norm_eps 1e-6, rotary base 10000 and 2048 positions; change them with --set-config")
    }

    fn config_from_ggml(&self, header: &Value, shape: ShapeOf<'_>) -> Result<Value> {
        config_from_ggml(header, shape)
    }
}
