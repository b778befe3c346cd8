//! A family similar to LLaMA: RMS norms, rotary positions, separate query, key and value projections, grouped-query
//! attention with heads of width 10, a gated MLP and no biases.

use std::sync::Arc;

use candle_core::Tensor;
use pricket_nn::{
    Activation, Attention, Block, BlockPlan, CausalLm, Context, Decoder, Family, Layer, Mlp, Names, Norm, Qkv,
    Residual, Result, Rotary, Sizes, Weights, config, residual,
};
use serde::Deserialize;
use serde_json::Value;

/// The family `toy_gated`.
pub static GATED: &dyn Family = &Gated;

#[derive(Deserialize)]
struct Config {
    vocab: usize,
    width: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
}

#[derive(Clone, Debug)]
struct GatedBlock {
    norm_1: Norm,
    attention: Attention,
    norm_2: Norm,
    mlp: Mlp,
}

impl Block for GatedBlock {
    fn forward(&self, x: &Tensor, ctx: &mut Context) -> Result<Tensor> {
        let attention = self.attention.forward(&self.norm_1, x, ctx)?;
        let x = residual(x, &[&attention])?;
        residual(&x, &[&self.mlp.forward(&self.norm_2, &x, ctx)?])
    }

    fn layers(&mut self) -> Vec<Layer<'_>> {
        let norms = [&mut self.norm_1, &mut self.norm_2].map(Layer::from);
        norms.into_iter().chain(self.attention.layers()).chain(self.mlp.layers()).collect()
    }

    fn plan(&self) -> Option<BlockPlan<'_>> {
        let Self { norm_1, attention, norm_2, mlp } = self;
        Some(BlockPlan { norm_1, norm_2, attention, mlp, residual: Residual::Sequential })
    }
}

impl GatedBlock {
    fn load(&Config { width: d, heads, kv_heads, .. }: &Config, weights: &Weights) -> Result<Self> {
        let head_dim = 10;
        let linear = |name, inputs, outputs| weights.linear(name, inputs, outputs, false);
        let q = linear("q", d, heads * head_dim)?;
        Ok(Self {
            norm_1: weights.rms_norm("norm_1", d, 1e-6)?,
            attention: Attention {
                qkv: Qkv::Split(Box::new([
                    q,
                    linear("k", d, kv_heads * head_dim)?,
                    linear("v", d, kv_heads * head_dim)?,
                ])),
                out: linear("out", heads * head_dim, d)?,
                heads,
                kv_heads,
                head_dim,
                scale: 1.0 / (head_dim as f64).sqrt(),
                rotary: Some(Rotary { dims: head_dim, base: 10_000.0, factor: 1.0 }),
                alibi: None,
                clip: None,
                qk_norm: None,
            },
            norm_2: weights.rms_norm("norm_2", d, 1e-6)?,
            mlp: Mlp {
                gate: Some(linear("gate", d, 3 * d)?),
                up: linear("up", d, 3 * d)?,
                down: linear("down", 3 * d, d)?,
                activation: Activation::Silu,
            },
        })
    }
}

struct Gated;

impl Family for Gated {
    fn name(&self) -> &'static str {
        "toy-gated"
    }

    fn spellings(&self) -> (&'static [&'static str], &'static [&'static str]) {
        (&["toy_gated"], &[])
    }

    fn check(&self, config: &Value) -> Result<()> {
        config::parse::<Config>(config).map(drop)
    }

    fn load(&self, config: &Value, weights: &Weights) -> Result<Arc<dyn CausalLm>> {
        let config @ Config { vocab, width: d_model, layers, heads, kv_heads } = &config::parse(config)?;
        let embedding_and_head = weights.embedding_and_head("toy.embed", "head", *vocab, *d_model, false)?;
        let trunk = weights.pp("toy");
        let blocks: Result<_> = (0..*layers).map(|i| GatedBlock::load(config, &trunk.pp(i))).collect();
        let (blocks, norm) = (blocks?, trunk.rms_norm("norm", *d_model, 1e-6)?);
        let (family, head_dim, trained_length, context) = ("toy_gated", 10, 96, Some(96));
        let (d_model, heads, kv_heads, vocab) = (*d_model, *heads, *kv_heads, *vocab);
        let sizes = Sizes { family, d_model, heads, kv_heads, head_dim, vocab, trained_length, context };
        Ok(Arc::new(Decoder::new(sizes, embedding_and_head, blocks, norm, weights)))
    }

    fn names(&self) -> Names {
        Names { root: "toy", head: "head", ..Names::default() }
    }
}
