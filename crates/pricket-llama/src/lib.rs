//! LLaMA (Touvron et al. 2023, arXiv:2302.13971) and OpenLLaMA (Geng and Liu 2023, openlm-research/open_llama): the
//! checkpoints of `LlamaForCausalLM`.
//!
//! A decoder with RMS norms, rotary positions, optional grouped-query attention and a SiLU-gated MLP:
//!
//! ```text
//!  x ─┬─ RMS norm ─ attention ─(+)─┬─ RMS norm ─ gated MLP ─(+)─ x'
//!     └────────────────────────┘   └────────────────────────┘
//! ```
//!
//! All settings that affect the forward pass come from config.json. Later models also use the name LLaMA; keys of
//! theirs that are not implemented give an error that names the key.
//!
//! ```
//! use std::sync::Arc;
//! use candle_core::Tensor;
//! use pricket_llama::{Config, NAMES, load};
//! use pricket_nn::{CausalLm, Context, Weights};
//! use pricket_weights::{Dtype, Random};
//!
//! let config = Config::from_json(&serde_json::json!({
//!     "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
//!     "intermediate_size": 80, "hidden_act": "silu", "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
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
    Activation, Attention, Block, BlockPlan, Context, Decoder, Layer, Mlp, Norm, Qkv, Residual, Result, Site, Sizes,
    Weights, residual,
};

/// A LLaMA model.
pub type Llama = Decoder<LlamaBlock>;

/// One block: attention, then a gated MLP, each after an RMS norm and added to the residual stream.
#[derive(Clone, Debug)]
pub struct LlamaBlock {
    input_layernorm: Norm,
    self_attn: Attention,
    post_attention_layernorm: Norm,
    mlp: Mlp,
}

impl Block for LlamaBlock {
    fn forward(&self, x: &Tensor, ctx: &mut Context) -> Result<Tensor> {
        // h = x + attention(norm(x)), then h + mlp(norm(h))
        let attention = self.self_attn.forward(&self.input_layernorm, x, ctx)?;
        let x = ctx.tap(Site::ResidMid, residual(x, &[&attention])?)?;
        let mlp = self.mlp.forward(&self.post_attention_layernorm, &x, ctx)?;
        residual(&x, &[&mlp])
    }

    fn layers(&mut self) -> Vec<Layer<'_>> {
        let norms = [&mut self.input_layernorm, &mut self.post_attention_layernorm].map(Layer::from);
        norms.into_iter().chain(self.self_attn.layers()).chain(self.mlp.layers()).collect()
    }

    fn plan(&self) -> Option<BlockPlan<'_>> {
        Some(BlockPlan {
            norm_1: &self.input_layernorm,
            norm_2: &self.post_attention_layernorm,
            attention: &self.self_attn,
            mlp: &self.mlp,
            residual: Residual::Sequential,
        })
    }
}

impl LlamaBlock {
    fn load(config: &Config, weights: &Weights) -> Result<Self> {
        let (d, hidden, eps) = (config.hidden_size, config.intermediate_size, config.rms_norm_eps);
        let (heads, kv_heads, head_dim) = (config.num_attention_heads, config.kv_heads(), config.head_dim());
        let (attention, mlp) = (weights.pp("self_attn"), weights.pp("mlp"));
        let projection = |name, heads| attention.linear(name, d, heads * head_dim, config.attention_bias);
        Ok(Self {
            input_layernorm: weights.rms_norm("input_layernorm", d, eps)?,
            self_attn: Attention {
                qkv: Qkv::Split(Box::new([
                    projection("q_proj", heads)?,
                    projection("k_proj", kv_heads)?,
                    projection("v_proj", kv_heads)?,
                ])),
                out: attention.linear("o_proj", heads * head_dim, d, config.attention_bias)?,
                heads,
                kv_heads,
                head_dim,
                scale: 1.0 / (head_dim as f64).sqrt(),
                rotary: Some(config.rotary()?),
                alibi: None,
                clip: None,
                qk_norm: None,
            },
            post_attention_layernorm: weights.rms_norm("post_attention_layernorm", d, eps)?,
            mlp: Mlp {
                gate: Some(mlp.linear("gate_proj", d, hidden, config.mlp_bias)?),
                up: mlp.linear("up_proj", d, hidden, config.mlp_bias)?,
                down: mlp.linear("down_proj", hidden, d, config.mlp_bias)?,
                activation: Activation::Silu,
            },
        })
    }
}

/// Loads the model that `config` describes.
///
/// # Errors
/// Returns an error if a tensor is missing or its shape does not match the configuration.
pub fn load(config: &Config, weights: &Weights) -> Result<Llama> {
    let (vocab, d) = (config.vocab_size, config.hidden_size);
    let trunk = weights.pp("model");
    let embedding_and_head =
        weights.embedding_and_head("model.embed_tokens", "lm_head", vocab, d, config.tie_word_embeddings)?;
    let layers = trunk.pp("layers");
    let blocks: Result<_> = (0..config.num_hidden_layers).map(|i| LlamaBlock::load(config, &layers.pp(i))).collect();
    let (blocks, norm) = (blocks?, trunk.rms_norm("norm", d, config.rms_norm_eps)?);
    let (family, heads, kv_heads) = ("llama", config.num_attention_heads, config.kv_heads());
    let (head_dim, trained_length) = (config.head_dim(), config.trained_length()?);
    let context = Some(trained_length);
    let sizes = Sizes { family, d_model: d, heads, kv_heads, head_dim, vocab, trained_length, context };
    Ok(Decoder::new(sizes, embedding_and_head, blocks, norm, weights))
}
