//! MPT: decoders with ALiBi attention, layers without biases, a GELU MLP, and a head tied to the embedding.
//! A configuration may select learned positions, biases or a separate head instead.
//!
//! ```text
//!  x ──┬── norm_1 ── attn ──+──┬── norm_2 ── ffn ──+── x'
//!      └────────────────────┘  └───────────────────┘
//! ```
//!
//! Three classes are supported: llm-foundry's `MPTForCausalLM` (the published 7b, 7b-8k, storywriter and 30b),
//! transformers' native `MptForCausalLM`, and their predecessor `MosaicGPT` (mpt-1b). They differ in configuration keys
//! and tensor names. In addition, MosaicGPT's ALiBi slopes differ from those of the other two classes if the number of
//! heads is not a power of two. transformers ignores `alibi_bias_max` and fails beyond `max_seq_len`. This crate uses
//! `alibi_bias_max` and has no maximum length with ALiBi.
//!
//! Sources: llm-foundry v0.1 to v0.3 (`models/mpt`), mosaicml/examples v0.0.4, Press et al. 2022 (arXiv:2108.12409).
//!
//! ```
//! use std::sync::Arc;
//! use candle_core::{Device, Tensor};
//! use pricket_mpt::Config;
//! use pricket_nn::{CausalLm, Context, Weights};
//! use pricket_weights::{Dtype, Random};
//!
//! let config = Config::from_json(&serde_json::json!({
//!     "architectures": ["MPTForCausalLM"], "d_model": 16, "n_heads": 2, "n_layers": 2, "vocab_size": 32, "no_bias": true,
//!     "attn_config": {"alibi": true},
//! }))?;
//! let weights = Weights::as_stored(Arc::new(Random::new(Dtype::F32, 0)), pricket_mpt::NAMES);
//! let model = pricket_mpt::load(&config, &weights)?;
//! let ids = Tensor::new(&[[1u32, 2, 3]], &Device::Cpu)?;
//! let hidden = model.hidden(&ids, &mut Context::new())?;
//! assert_eq!(model.head(&hidden)?.dims(), [1, 3, 32]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod config;
mod family;
mod formats;
mod keys;
mod names;

use candle_core::Tensor;
use pricket_nn::{
    Attention, Block, BlockPlan, Context, Decoder, Layer, Mlp, Norm, Qkv, Residual, Result, Site, Sizes, Weights,
    residual,
};

pub use config::{AttentionConfig, Config};
pub use family::FAMILY;
pub use keys::{GGUF_KEYS, KEYS, MOSAIC_GPT_KEYS};
pub use names::NAMES;

/// An MPT model.
pub type Mpt = Decoder<MptBlock>;

/// One block: attention, then an MLP, each after a layer norm and added to the residual stream.
#[derive(Clone, Debug)]
pub struct MptBlock {
    norm_1: Norm,
    attn: Attention,
    norm_2: Norm,
    ffn: Mlp,
}

impl Block for MptBlock {
    fn forward(&self, x: &Tensor, ctx: &mut Context) -> Result<Tensor> {
        // h = x + attn(norm_1(x)), then h + ffn(norm_2(h))
        let attention = self.attn.forward(&self.norm_1, x, ctx)?;
        let x = ctx.tap(Site::ResidMid, residual(x, &[&attention])?)?;
        let ffn = self.ffn.forward(&self.norm_2, &x, ctx)?;
        residual(&x, &[&ffn])
    }

    fn layers(&mut self) -> Vec<Layer<'_>> {
        let norms = [&mut self.norm_1, &mut self.norm_2].map(Layer::from);
        norms.into_iter().chain(self.attn.layers()).chain(self.ffn.layers()).collect()
    }

    fn plan(&self) -> Option<BlockPlan<'_>> {
        let Self { norm_1, attn, norm_2, ffn } = self;
        Some(BlockPlan { norm_1, norm_2, attention: attn, mlp: ffn, residual: Residual::Sequential })
    }
}

impl MptBlock {
    fn load(config: &Config, alibi: bool, weights: &Weights) -> Result<Self> {
        let (d, hidden, heads) = (config.d_model, config.hidden(), config.n_heads);
        let (kv_heads, head_dim) = (config.kv_heads()?, d / heads);
        let (bias, eps) = (config.has_bias(), config.eps());
        let (attn, ffn) = (weights.pp("attn"), weights.pp("ffn"));
        let qk_norm = |name, width| {
            config.attn_config.qk_ln.then(|| attn.layer_norm(name, width, config.qk_eps(), bias)).transpose()
        };
        Ok(Self {
            norm_1: weights.layer_norm("norm_1", d, eps, bias)?,
            attn: Attention {
                qkv: Qkv::Fused(attn.linear("Wqkv", d, d + 2 * kv_heads * head_dim, config.has_attention_bias())?),
                out: attn.linear("out_proj", d, d, bias)?,
                heads,
                kv_heads,
                head_dim,
                scale: config.attn_config.softmax_scale.unwrap_or(1.0 / (head_dim as f64).sqrt()),
                rotary: None,
                alibi: alibi.then(|| config.alibi()),
                clip: config.attn_config.clip_qkv,
                qk_norm: qk_norm("q_ln", d)?.zip(qk_norm("k_ln", kv_heads * head_dim)?),
            },
            norm_2: weights.layer_norm("norm_2", d, eps, bias)?,
            ffn: Mlp {
                gate: None,
                up: ffn.linear("up_proj", d, hidden, bias)?,
                down: ffn.linear("down_proj", hidden, d, bias)?,
                activation: config.activation()?,
            },
        })
    }
}

/// Loads the model that `config` describes.
///
/// # Errors
/// Returns an error if a tensor is missing or its shape does not match the configuration.
pub fn load(config: &Config, weights: &Weights) -> Result<Mpt> {
    let (vocab, d) = (config.vocab_size, config.d_model);
    let trunk = weights.pp("transformer");
    // If `attn_config.alibi` is absent, ALiBi is used unless the checkpoint has learned positions.
    let alibi = config.attn_config.alibi.unwrap_or_else(|| !trunk.holds("wpe.weight"));
    let learned = !alibi && config.learned_pos_emb;
    let embedding_and_head =
        weights.embedding_and_head("transformer.wte", "lm_head", vocab, d, config.tie_word_embeddings)?;
    let positions = learned.then(|| trunk.embedding("wpe", config.max_seq_len, d)).transpose()?;
    let layers = trunk.pp("blocks");
    let blocks: Result<_> = (0..config.n_layers).map(|i| MptBlock::load(config, alibi, &layers.pp(i))).collect();
    let blocks = blocks?;
    let norm = trunk.layer_norm("norm_f", d, config.eps(), config.has_bias())?;
    // ALiBi has no maximum length; learned positions do.
    let trained_length = config.max_seq_len;
    let context = (!alibi).then_some(trained_length);
    let (heads, kv_heads) = (config.n_heads, config.kv_heads()?);
    let head_dim = d / heads;
    let sizes = Sizes { family: "mpt", d_model: d, heads, kv_heads, head_dim, vocab, trained_length, context };
    let model = Decoder::new(sizes, embedding_and_head, blocks, norm, weights);
    Ok(model.with_positions(positions).with_logit_scale(config.logit_scale()?))
}
