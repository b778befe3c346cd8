//! The implementation of [`Family`] for GPT-NeoX.

use std::sync::Arc;

use pricket_nn::config::{GENERIC, Keys};
use pricket_nn::{
    Activation, CausalLm, Error, Family, FusedRows, GgmlLayout, Initialization, KnownTokenizer, Names, Result, ShapeOf,
    Weights,
};
use serde_json::Value;

use crate::formats::{GGML, config_from_ggml, config_from_gguf, gguf_metadata};
use crate::keys::{GGUF_KEYS, KEYS};
use crate::names::{GGUF, NAMES};
use crate::{Config, load};

/// The GPT-NeoX family.
pub static FAMILY: &dyn Family = &GptNeoXFamily;

struct GptNeoXFamily;

impl Family for GptNeoXFamily {
    fn name(&self) -> &'static str {
        "gpt-neox"
    }

    fn spellings(&self) -> (&'static [&'static str], &'static [&'static str]) {
        (&["gpt_neox"], &["GPTNeoXForCausalLM"])
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

    fn set_activation(&self, config: &mut Value, activation: Activation) -> Result<()> {
        config["hidden_act"] = match activation {
            Activation::GeluErf => "gelu".into(),
            Activation::GeluTanh => "gelu_pytorch_tanh".into(),
            other => return Err(Error::Input(format!("activation {other:?}: GPT-NeoX supports GELU only"))),
        };
        Ok(())
    }

    fn initialization(&self, config: &Value) -> Result<Initialization> {
        let Config { hidden_size, num_hidden_layers, .. } = Config::from_json(config)?;
        Ok(Initialization::small(hidden_size, num_hidden_layers, &["dense.weight", "dense_4h_to_h.weight"]))
    }

    fn gguf_architecture(&self) -> Option<&'static str> {
        Some("gptneox")
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

    /// Until May 2024, llama.cpp's converter kept q, k and v of each head side by side. Later versions write all of Q,
    /// then K, then V.
    fn gguf_rows(&self, metadata: &Value, version: u32) -> FusedRows {
        if metadata["pricket.qkv_order"] == "split" {
            return FusedRows::Stated;
        }
        let (model_order_is_likely, why) = if version < 3 {
            (false, "the file is of version 1 or 2")
        } else if metadata["tokenizer.ggml.pre"].is_null() {
            (false, "the file has no tokenizer.ggml.pre, so it was converted before May 2024")
        } else {
            (true, "the file has tokenizer.ggml.pre, as files converted since May 2024 have")
        };
        FusedRows::Unknown { model_order_is_likely, why }
    }

    fn gguf_repeats_tied_head(&self) -> bool {
        true
    }

    fn ggml_layouts(&self) -> &'static [GgmlLayout] {
        &GGML
    }

    fn config_from_ggml(&self, header: &Value, shape: ShapeOf<'_>) -> Result<Value> {
        config_from_ggml(header, shape)
    }

    fn ggml_tokenizer(&self) -> Option<KnownTokenizer> {
        let words = &[(0, "<|endoftext|>"), (2422, "Al"), (547, "ice")];
        Some(KnownTokenizer { repository: "EleutherAI/gpt-neox-20b", words, count: 50254 })
    }
}
