//! The implementation of [`Family`] for MPT and MosaicGPT.

use std::sync::Arc;

use pricket_nn::config::Keys;
use pricket_nn::{
    Activation, CausalLm, Error, Family, GgmlLayout, Initialization, KnownTokenizer, Names, Result, ShapeOf, Weights,
};
use serde_json::{Value, json};

use crate::formats::{GGML, config_from_ggml, config_from_gguf, gguf_metadata};
use crate::keys::{ConfigClass, GGUF_KEYS, key_tables};
use crate::names::{GGUF, NAMES};
use crate::{Config, load};

/// The MPT family, including MosaicGPT.
pub static FAMILY: &dyn Family = &MptFamily;

struct MptFamily;

impl Family for MptFamily {
    fn name(&self) -> &'static str {
        "mpt"
    }

    fn spellings(&self) -> (&'static [&'static str], &'static [&'static str]) {
        (&["mpt", "mosaic_gpt"], &["MPTForCausalLM", "MptForCausalLM", "MosaicGPT"])
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

    fn keys(&self, config: &Value) -> Vec<Keys> {
        key_tables(config).to_vec()
    }

    fn class(&self, config: &Value) -> &'static str {
        let classes = self.spellings().1;
        let named = config["architectures"][0].as_str();
        match ConfigClass::of(config) {
            ConfigClass::MosaicGpt => "MosaicGPT",
            _ => classes.iter().find(|class| Some(**class) == named).unwrap_or(&classes[0]),
        }
    }

    fn set_activation(&self, config: &mut Value, activation: Activation) -> Result<()> {
        let approximate = match activation {
            Activation::GeluErf => "none",
            Activation::GeluTanh => "tanh",
            other => return Err(Error::Input(format!("activation {other:?}: MPT supports GELU only"))),
        };
        if !config["ffn_config"].is_object() {
            config["ffn_config"] = json!({});
        }
        config["ffn_config"]["ffn_act_fn"] = json!({"name": "gelu", "approximate": approximate});
        Ok(())
    }

    fn initialization(&self, config: &Value) -> Result<Initialization> {
        let Config { d_model, n_layers, .. } = Config::from_json(config)?;
        let (residual, mut init) = (&["out_proj.weight", "down_proj.weight"], config["init_config"].clone());
        // llm-foundry defines `neox_init_` as `small_init_` with this divisor of the residual projections.
        if init["name"] == "neox_init_" {
            init["name"] = "small_init_".into();
            init["init_div_is_residual"] = (n_layers as f64 / 10f64.sqrt()).into();
        }
        Initialization::from_init_config(&init, d_model, n_layers, residual)
    }

    fn gguf_architecture(&self) -> Option<&'static str> {
        Some("mpt")
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

    fn gguf_metadata(&self, config: &Value, holds: &dyn Fn(&str) -> bool) -> Result<Value> {
        gguf_metadata(config, holds("position_embd.weight"))
    }

    fn ggml_layouts(&self) -> &'static [GgmlLayout] {
        &GGML
    }

    fn config_from_ggml(&self, header: &Value, shape: ShapeOf<'_>) -> Result<Value> {
        config_from_ggml(header, shape)
    }

    /// MPT uses the tokenizer of GPT-NeoX-20B.
    fn ggml_tokenizer(&self) -> Option<KnownTokenizer> {
        let words = &[(0, "<|endoftext|>"), (2422, "Al"), (547, "ice")];
        Some(KnownTokenizer { repository: "EleutherAI/gpt-neox-20b", words, count: 50254 })
    }
}
