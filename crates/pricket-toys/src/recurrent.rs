//! A family similar to RWKV-4, without attention: a token shift, the WKV recurrence and an MLP with a squared ReLU.

use std::sync::Arc;

use candle_core::Tensor;
use pricket_nn::{
    Activation, Block, CausalLm, Context, Decoder, Family, Layer, Linear, Names, Norm, Result, Site, Sizes, Weights,
    config, residual,
};
use serde::Deserialize;
use serde_json::Value;

/// The family `toy_recurrent`.
pub static RECURRENT: &dyn Family = &Recurrent;

#[derive(Deserialize)]
struct Config {
    vocab: usize,
    width: usize,
    layers: usize,
}

#[derive(Clone, Debug)]
struct RecurrentBlock {
    norm_1: Norm,
    key: Linear,
    value: Linear,
    decay: Tensor,
    first: Tensor,
    out: Linear,
    norm_2: Norm,
    up: Linear,
    down: Linear,
}

impl Block for RecurrentBlock {
    fn forward(&self, x: &Tensor, ctx: &mut Context) -> Result<Tensor> {
        let (normed, before) = ctx.token_shift(&self.norm_1, x, "time shift")?;
        let (k, v) = (self.key.forward(&before)?, self.value.forward(&normed)?);
        let mixed = self.out.forward(&ctx.wkv4(&k, &v, &self.decay, &self.first, "wkv")?)?;
        let x = ctx.tap(Site::ResidMid, residual(x, &[&mixed])?)?;
        let (normed, before) = ctx.token_shift(&self.norm_2, &x, "channel shift")?;
        let hidden = Activation::SquaredRelu.forward(&self.up.forward(&((normed + before)? * 0.5)?)?)?;
        residual(&x, &[&ctx.tap(Site::MlpOut, self.down.forward(&hidden)?)?])
    }

    fn has(&self, site: Site) -> bool {
        !matches!(site, Site::Query | Site::Key | Site::Value | Site::Pattern | Site::AttentionOut)
    }

    fn layers(&mut self) -> Vec<Layer<'_>> {
        let linears = [&mut self.key, &mut self.value, &mut self.out, &mut self.up, &mut self.down];
        linears.map(Layer::from).into_iter().chain([&mut self.norm_1, &mut self.norm_2].map(Layer::from)).collect()
    }
}

impl RecurrentBlock {
    fn load(d: usize, weights: &Weights) -> Result<Self> {
        Ok(Self {
            norm_1: weights.layer_norm("norm_1", d, 1e-5, true)?,
            key: weights.linear("key", d, d, false)?,
            value: weights.linear("value", d, d, false)?,
            decay: weights.vector("time_decay", d)?,
            first: weights.vector("time_first", d)?,
            out: weights.linear("out", d, d, false)?,
            norm_2: weights.layer_norm("norm_2", d, 1e-5, true)?,
            up: weights.linear("up", d, 4 * d, false)?,
            down: weights.linear("down", 4 * d, d, false)?,
        })
    }
}

struct Recurrent;

impl Family for Recurrent {
    fn name(&self) -> &'static str {
        "toy-recurrent"
    }

    fn spellings(&self) -> (&'static [&'static str], &'static [&'static str]) {
        (&["toy_recurrent"], &[])
    }

    fn check(&self, config: &Value) -> Result<()> {
        config::parse::<Config>(config).map(drop)
    }

    fn load(&self, config: &Value, weights: &Weights) -> Result<Arc<dyn CausalLm>> {
        let Config { vocab, width: d_model, layers } = config::parse(config)?;
        let embedding_and_head = weights.embedding_and_head("toy.embed", "head", vocab, d_model, false)?;
        let trunk = weights.pp("toy");
        let embed_norm = trunk.layer_norm("embed_norm", d_model, 1e-5, true)?;
        let blocks: Result<_> = (0..layers).map(|i| RecurrentBlock::load(d_model, &trunk.pp(i))).collect();
        let (blocks, norm) = (blocks?, trunk.layer_norm("norm", d_model, 1e-5, true)?);
        let (family, heads, kv_heads, head_dim) = ("toy_recurrent", 1, 0, d_model);
        let sizes = Sizes { family, d_model, heads, kv_heads, head_dim, vocab, trained_length: 96, context: None };
        let model = Decoder::new(sizes, embedding_and_head, blocks, norm, weights).with_embed_norm(embed_norm);
        // Two saved positions and the three parts of the recurrence in each layer.
        Ok(Arc::new(model.with_recurrent_state(layers * 5 * d_model)))
    }

    fn names(&self) -> Names {
        Names { root: "toy", head: "head", ..Names::default() }
    }
}
