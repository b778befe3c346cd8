//! GPT-NeoX: Pythia (Biderman et al. 2023, arXiv:2304.01373), GPT-NeoX-20B (Black et al. 2022, arXiv:2204.06745) and
//! all other checkpoints of `GPTNeoXForCausalLM`.
//!
//! A decoder with layer norms, rotary positions on a share of the dimensions of each head, fused query-key-value
//! projections and a GELU MLP:
//!
//! ```text
//!  use_parallel_residual: true (Pythia)          false (RedPajama-INCITE)
//!
//!        x ─┬─ LN1 ─ attention ─┐                x ─┬─ LN1 ─ attention ─(+)─┬─ LN2 ─ MLP ─(+)─ x'
//!           ├─ LN2 ─── MLP ─────(+)─ x'             └────────────────────┘  └─────────────┘
//!           └───────────────────┘
//! ```
//!
//! All settings that affect the forward pass come from config.json. None are guessed from shapes or names.
//!
//! ```
//! use std::sync::Arc;
//! use candle_core::Tensor;
//! use pricket_gpt_neox::{Config, NAMES, load};
//! use pricket_nn::{CausalLm, Context, Weights};
//! use pricket_weights::{Dtype, Random};
//!
//! let config = Config::from_json(&serde_json::json!({
//!     "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
//!     "intermediate_size": 128, "hidden_act": "gelu", "max_position_embeddings": 64,
//! }))?;
//! let weights = Weights::as_stored(Arc::new(Random::new(Dtype::F16, 0)), NAMES);
//! let model = load(&config, &weights)?;
//! let ids = Tensor::new(&[[1u32, 2, 3]], weights.device())?;
//! let hidden = model.hidden(&ids, &mut Context::new())?;
//! assert_eq!(model.head(&hidden)?.dims(), [1, 3, 96]);
//! # Ok::<(), pricket_nn::Error>(())
//! ```

mod config;
mod family;
mod formats;
mod keys;
mod names;

pub use config::Config;
pub use family::FAMILY;
pub use keys::{GGUF_KEYS, KEYS};
pub use names::NAMES;

use candle_core::Tensor;
use pricket_nn::{
    Attention, Block, BlockPlan, Context, Decoder, Layer, Mlp, Norm, Qkv, Residual, Result, RowOrder, Site, Sizes,
    Weights, residual,
};

/// A GPT-NeoX model.
pub type GptNeoX = Decoder<GptNeoXBlock>;

/// One block: two norms, attention and MLP, with a parallel or a sequential residual.
#[derive(Clone, Debug)]
pub struct GptNeoXBlock {
    input_layernorm: Norm,
    attention: Attention,
    post_attention_layernorm: Norm,
    mlp: Mlp,
    use_parallel_residual: bool,
}

impl Block for GptNeoXBlock {
    fn forward(&self, x: &Tensor, ctx: &mut Context) -> Result<Tensor> {
        let attention = self.attention.forward(&self.input_layernorm, x, ctx)?;
        if self.use_parallel_residual {
            // x + mlp(LN2(x)) + attention(LN1(x))
            let mlp = self.mlp.forward(&self.post_attention_layernorm, x, ctx)?;
            return residual(x, &[&mlp, &attention]);
        }
        // h = x + attention(LN1(x)), then h + mlp(LN2(h))
        let x = ctx.tap(Site::ResidMid, residual(x, &[&attention])?)?;
        let mlp = self.mlp.forward(&self.post_attention_layernorm, &x, ctx)?;
        residual(&x, &[&mlp])
    }

    fn has(&self, site: Site) -> bool {
        site != Site::ResidMid || !self.use_parallel_residual
    }

    fn layers(&mut self) -> Vec<Layer<'_>> {
        let norms = [&mut self.input_layernorm, &mut self.post_attention_layernorm].map(Layer::from);
        norms.into_iter().chain(self.attention.layers()).chain(self.mlp.layers()).collect()
    }

    fn plan(&self) -> Option<BlockPlan<'_>> {
        Some(BlockPlan {
            norm_1: &self.input_layernorm,
            norm_2: &self.post_attention_layernorm,
            attention: &self.attention,
            mlp: &self.mlp,
            residual: if self.use_parallel_residual { Residual::Parallel } else { Residual::Sequential },
        })
    }
}

impl GptNeoXBlock {
    fn load(config: &Config, weights: &Weights) -> Result<Self> {
        let (d, hidden, heads, eps) =
            (config.hidden_size, config.intermediate_size, config.num_attention_heads, config.layer_norm_eps);
        let (attention, mlp) = (weights.pp("attention"), weights.pp("mlp"));
        let bias = config.attention_bias;
        let head_dim = d / heads;
        Ok(Self {
            input_layernorm: weights.layer_norm("input_layernorm", d, eps, true)?,
            attention: Attention {
                qkv: Qkv::Fused(attention.linear_in_order(
                    "query_key_value",
                    d,
                    3 * d,
                    bias,
                    RowOrder::PerHead { heads },
                )?),
                out: attention.linear("dense", d, d, bias)?,
                heads,
                kv_heads: heads,
                head_dim,
                scale: 1.0 / (head_dim as f64).sqrt(),
                rotary: config.rotary()?,
                alibi: None,
                clip: None,
                qk_norm: None,
            },
            post_attention_layernorm: weights.layer_norm("post_attention_layernorm", d, eps, true)?,
            mlp: Mlp {
                gate: None,
                up: mlp.linear("dense_h_to_4h", d, hidden, true)?,
                down: mlp.linear("dense_4h_to_h", hidden, d, true)?,
                activation: config.activation()?,
            },
            use_parallel_residual: config.use_parallel_residual,
        })
    }
}

/// Loads the model that `config` describes.
///
/// # Errors
/// Returns an error if a tensor is missing or its shape does not match the configuration.
pub fn load(config: &Config, weights: &Weights) -> Result<GptNeoX> {
    let (vocab, d) = (config.vocab_size, config.hidden_size);
    let trunk = weights.pp("gpt_neox");
    let embedding_and_head =
        weights.embedding_and_head("gpt_neox.embed_in", "embed_out", vocab, d, config.tie_word_embeddings)?;
    let layers = trunk.pp("layers");
    let blocks: Result<_> = (0..config.num_hidden_layers).map(|i| GptNeoXBlock::load(config, &layers.pp(i))).collect();
    let blocks = blocks?;
    let norm = trunk.layer_norm("final_layer_norm", d, config.layer_norm_eps, true)?;
    let heads = config.num_attention_heads;
    let trained_length = config.max_position_embeddings;
    let context = Some(trained_length);
    let (family, head_dim) = ("gpt_neox", d / heads);
    let sizes = Sizes { family, d_model: d, heads, kv_heads: heads, head_dim, vocab, trained_length, context };
    Ok(Decoder::new(sizes, embedding_and_head, blocks, norm, weights))
}
