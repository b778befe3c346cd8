//! RWKV-4 (Peng et al. 2023, arXiv:2305.13048): the Pile and PilePlus checkpoints, saved as `RwkvForCausalLM` or by
//! BlinkDL/RWKV-LM.
//!
//! A decoder without attention. Each block mixes information over time by a recurrence, then over channels by a gated
//! MLP:
//!
//! ```text
//!  x ─┬─ LN1 ─ time mixing ─(+)─┬─ LN2 ─ channel mixing ─(+)─ x'        x of block 0: LN0 of the embedding
//!     └─────────────────────┘   └─────────────────────────┘
//!
//!  token shift:    x' = x[t] · mix + x[t-1] · (1 - mix), with a mix for each of k, v and r
//!  time mixing:    output(σ(r) · wkv(k, v)),  k = key(x'), v = value(x'), r = receptance(x')
//!  channel mixing: σ(r) · value(relu(k)²),    k = key(x'), r = receptance(x')
//! ```
//!
//! The state of a layer is the last position of both inputs and the three vectors of the `wkv` recurrence (see
//! [`pricket_nn::ops::wkv4`]), so memory does not grow with the length of the text. RWKV-LM halves the residual stream
//! every six layers to avoid overflow in f16. In f32 this is not needed, and this crate does not do it.
//!
//! ```
//! use std::sync::Arc;
//! use candle_core::Tensor;
//! use pricket_nn::{CausalLm, Context, Weights};
//! use pricket_rwkv4::{Config, NAMES, load};
//! use pricket_weights::{Dtype, Random};
//!
//! let config = Config::from_json(&serde_json::json!({"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2}))?;
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
mod names;

pub use config::{Config, KEYS};
pub use family::FAMILY;
pub use names::NAMES;

use candle_core::Tensor;
use pricket_nn::ops::{Gate, gated, mix};
use pricket_nn::{
    Activation, Block, Context, Decoder, Error, Layer, Linear, Norm, Result, Site, Sizes, Weights, residual,
};

/// An RWKV-4 model.
pub type Rwkv4 = Decoder<Rwkv4Block>;

/// One block: time mixing, then channel mixing, each after a layer norm and added to the residual stream.
#[derive(Clone, Debug)]
pub struct Rwkv4Block {
    ln1: Norm,
    attention: TimeMixing,
    ln2: Norm,
    feed_forward: ChannelMixing,
}

/// Time mixing: a recurrence over all previous positions.
#[derive(Clone, Debug)]
struct TimeMixing {
    /// Mixing factors of the token shift for keys, values and receptance, `[1, 1, d]` each.
    mixes: [Tensor; 3],
    key: Linear,
    value: Linear,
    receptance: Linear,
    time_decay: Tensor,
    time_first: Tensor,
    output: Linear,
}

/// Channel mixing: a gated MLP of a position and the one before it.
#[derive(Clone, Debug)]
struct ChannelMixing {
    /// Mixing factors of the token shift for keys and receptance, `[1, 1, d]` each.
    mixes: [Tensor; 2],
    key: Linear,
    receptance: Linear,
    value: Linear,
}

impl TimeMixing {
    fn forward(&self, norm: &Norm, x: &Tensor, ctx: &mut Context) -> Result<Tensor> {
        let (x, before) = ctx.token_shift(norm, x, "time shift")?;
        let [k, v, r] = &self.mixes;
        let k = self.key.forward(&mix(&x, &before, k)?)?;
        let v = self.value.forward(&mix(&x, &before, v)?)?;
        let r = self.receptance.forward(&mix(&x, &before, r)?)?;
        let wkv = ctx.wkv4(&k, &v, &self.time_decay, &self.time_first, "wkv")?;
        ctx.tap(Site::AttentionOut, self.output.forward(&gated(&r, &wkv, Gate::Sigmoid)?)?)
    }

    fn load(config: &Config, weights: &Weights) -> Result<Self> {
        let (d, width) = (config.hidden_size, config.attention_width());
        let linear = |name, inputs, outputs| weights.linear(name, inputs, outputs, false);
        let mix = |name: &str| weights.array(&format!("time_mix_{name}"), &[1, 1, d]);
        Ok(Self {
            mixes: [mix("key")?, mix("value")?, mix("receptance")?],
            key: linear("key", d, width)?,
            value: linear("value", d, width)?,
            receptance: linear("receptance", d, width)?,
            time_decay: weights.vector("time_decay", width)?,
            time_first: weights.vector("time_first", width)?,
            output: linear("output", width, d)?,
        })
    }
}

impl ChannelMixing {
    fn forward(&self, norm: &Norm, x: &Tensor, ctx: &mut Context) -> Result<Tensor> {
        let (x, before) = ctx.token_shift(norm, x, "channel shift")?;
        let [k, r] = &self.mixes;
        let k = Activation::SquaredRelu.forward(&self.key.forward(&mix(&x, &before, k)?)?)?;
        let r = self.receptance.forward(&mix(&x, &before, r)?)?;
        ctx.tap(Site::MlpOut, gated(&r, &self.value.forward(&k)?, Gate::Sigmoid)?)
    }

    fn load(config: &Config, weights: &Weights) -> Result<Self> {
        let (d, hidden) = (config.hidden_size, config.mlp_width());
        let linear = |name, inputs, outputs| weights.linear(name, inputs, outputs, false);
        let mix = |name: &str| weights.array(&format!("time_mix_{name}"), &[1, 1, d]);
        Ok(Self {
            mixes: [mix("key")?, mix("receptance")?],
            key: linear("key", d, hidden)?,
            receptance: linear("receptance", d, d)?,
            value: linear("value", hidden, d)?,
        })
    }
}

impl Block for Rwkv4Block {
    fn forward(&self, x: &Tensor, ctx: &mut Context) -> Result<Tensor> {
        // h = x + time_mixing(LN1(x)), then h + channel_mixing(LN2(h))
        let time = self.attention.forward(&self.ln1, x, ctx)?;
        let x = ctx.tap(Site::ResidMid, residual(x, &[&time])?)?;
        let channels = self.feed_forward.forward(&self.ln2, &x, ctx)?;
        residual(&x, &[&channels])
    }

    fn has(&self, site: Site) -> bool {
        !matches!(site, Site::Query | Site::Key | Site::Value | Site::Pattern)
    }

    fn layers(&mut self) -> Vec<Layer<'_>> {
        let TimeMixing { key, value, receptance, output, .. } = &mut self.attention;
        let time = [key, value, receptance, output].map(Layer::from);
        let ChannelMixing { key, receptance, value, .. } = &mut self.feed_forward;
        let channels = [key, receptance, value].map(Layer::from);
        let norms = [&mut self.ln1, &mut self.ln2].map(Layer::from);
        norms.into_iter().chain(time).chain(channels).collect()
    }
}

impl Rwkv4Block {
    fn load(config: &Config, weights: &Weights) -> Result<Self> {
        refuse(names::FOREIGN, weights)?;
        let (d, eps) = (config.hidden_size, config.layer_norm_epsilon);
        Ok(Self {
            ln1: weights.layer_norm("ln1", d, eps, true)?,
            attention: TimeMixing::load(config, &weights.pp("attention"))?,
            ln2: weights.layer_norm("ln2", d, eps, true)?,
            feed_forward: ChannelMixing::load(config, &weights.pp("feed_forward"))?,
        })
    }
}

/// Returns an error if the checkpoint has a weight of another RWKV version.
fn refuse(foreign: &[(&str, &str)], weights: &Weights) -> Result<()> {
    match foreign.iter().find(|(name, _)| weights.holds(name)) {
        Some((name, what)) => {
            Err(Error::config(*name, format!("a weight of {what}, which is not implemented; only RWKV-4 is")))
        }
        None => Ok(()),
    }
}

/// Loads the model that `config` describes.
///
/// # Errors
/// Returns an error if a tensor is missing, if its shape does not match the configuration, or if the checkpoint is of
/// another RWKV version.
pub fn load(config: &Config, weights: &Weights) -> Result<Rwkv4> {
    refuse(names::FOREIGN_TRUNK, weights)?;
    let (vocab, d) = (config.vocab_size, config.hidden_size);
    let trunk = weights.pp("rwkv");
    let embedding_and_head =
        weights.embedding_and_head("rwkv.embeddings", "head", vocab, d, config.tie_word_embeddings)?;
    let layers = trunk.pp("blocks");
    let first = layers.pp(0).layer_norm("pre_ln", d, config.layer_norm_epsilon, true)?;
    let blocks: Result<_> = (0..config.num_hidden_layers).map(|i| Rwkv4Block::load(config, &layers.pp(i))).collect();
    // The final norm always has PyTorch's default epsilon, unlike the other norms.
    let (blocks, norm) = (blocks?, trunk.layer_norm("ln_out", d, 1e-5, true)?);
    let (family, trained_length) = ("rwkv", config.context_length);
    let (d_model, heads, kv_heads, head_dim) = (d, 1, 0, config.attention_width());
    let sizes = Sizes { family, d_model, heads, kv_heads, head_dim, vocab, trained_length, context: None };
    // Each layer stores the last position of both inputs, and for each channel a numerator, a denominator and an
    // exponent.
    let state = config.num_hidden_layers * (2 * d + 3 * head_dim);
    Ok(Decoder::new(sizes, embedding_and_head, blocks, norm, weights)
        .with_embed_norm(first)
        .with_recurrent_state(state))
}
