//! The implementation of [`Family`] for RWKV-4.

use std::sync::Arc;

use pricket_nn::config::{GENERIC, Keys};
use pricket_nn::{CausalLm, Error, Family, GgmlLayout, Init, Initialization, Names, Result, ShapeOf, Store, Weights};
use serde_json::Value;

use crate::config::KEYS;
use crate::names::NAMES;
use crate::{Config, formats, load};

/// The RWKV-4 family.
pub static FAMILY: &dyn Family = &Rwkv4Family;

struct Rwkv4Family;

impl Family for Rwkv4Family {
    fn name(&self) -> &'static str {
        "rwkv4"
    }

    fn spellings(&self) -> (&'static [&'static str], &'static [&'static str]) {
        (&["rwkv"], &["RwkvForCausalLM"])
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

    fn config_from_shapes(&self, shape: ShapeOf<'_>) -> Option<Value> {
        formats::config_from_shapes(shape)
    }

    fn ggml_layouts(&self) -> &'static [GgmlLayout] {
        &formats::GGML
    }

    fn config_from_ggml(&self, _: &Value, shape: ShapeOf<'_>) -> Result<Value> {
        let missing = || Error::config("emb.weight", "the file has no RWKV tensors");
        formats::config_from_shapes(shape).ok_or_else(missing)
    }

    fn ggml_tensors(&self, store: Arc<dyn Store>) -> Arc<dyn Store> {
        Arc::new(formats::FromRwkvCpp(store))
    }

    /// Token 2 is "!" in the tokenizer of these models. The published config.json files have the end token 0.
    fn mistaken_end_token(&self, config: &Value) -> Option<u32> {
        (config["vocab_size"] == formats::TOKENIZER.count).then_some(2)
    }

    fn initialization(&self, config: &Value) -> Result<Initialization> {
        let config = Config::from_json(config)?;
        let (layers, d, width) = (config.num_hidden_layers, config.hidden_size, config.attention_width());
        Ok(Initialization::named(move |name, shape| initial(name, shape, layers, d, width)))
    }
}

/// Initialization of BlinkDL/RWKV-LM (v4neo), with normal matrices of the same standard deviation instead of orthogonal
/// ones.
fn initial(name: &str, shape: &[usize], layers: usize, d: usize, width: usize) -> Option<Init> {
    let layer = name.split('.').skip_while(|part| *part != "blocks").nth(1).and_then(|n| n.parse::<usize>().ok());
    let layer = layer.unwrap_or(0) as f64;
    let (through, left) = (layer / (layers as f64 - 1.0).max(1.0), 1.0 - layer / layers as f64);
    let power = |power, offset| Init::Power { offset, scale: 1.0, power, span: d as f64 };
    let part = name.rsplit('.').find(|part| *part != "weight")?;
    let zero =
        ["attention.key", "attention.receptance", "attention.output", "feed_forward.value", "feed_forward.receptance"];
    Some(match part {
        "time_decay" => {
            Init::Power { offset: -5.0, scale: 8.0, power: 0.7 + 1.3 * through, span: (width as f64 - 1.0).max(1.0) }
        }
        "time_first" => Init::Zigzag { offset: 0.3f64.ln(), scale: 0.5 },
        "time_mix_value" => power(left, 0.3 * through),
        "time_mix_receptance" if name.contains("attention") => power(0.5 * left, 0.0),
        "time_mix_key" | "time_mix_receptance" => power(left, 0.0),
        "embeddings" => Init::Uniform { low: -1e-4, high: 1e-4 },
        _ if zero.iter().any(|end| name.ends_with(&format!("{end}.weight"))) => Init::Constant(0.0),
        _ => {
            // Standard deviation of the orthogonal matrices there: wide ones, and tall ones, which are scaled by the
            // square root of the ratio of rows to columns.
            let &[_, columns] = shape else { return None };
            Init::Normal { deviation: if part == "head" { 0.5 } else { 1.0 } / (columns as f64).sqrt() }
        }
    })
}
