//! The layers of a model by role, for code that computes the model in another way than its family does, such as a
//! decoder with its own kernels or a split over devices. A plan refers to the layers of the model and copies nothing.

use crate::{Attention, Embedding, Linear, Mlp, Norm};

/// Layers of a model whose blocks are attention and an MLP.
#[derive(Clone, Debug)]
pub struct ModelPlan<'a> {
    /// Table of token vectors.
    pub embed: &'a Embedding,
    /// Table of learned position vectors, added to the token vectors.
    pub learned_positions: Option<&'a Embedding>,
    /// Norm of the sum of token and position vectors.
    pub embed_norm: Option<&'a Norm>,
    /// Blocks, first to last.
    pub blocks: Vec<BlockPlan<'a>>,
    /// Norm after the last block.
    pub final_norm: &'a Norm,
    /// Projection to logits.
    pub head: &'a Linear,
    /// Whether the head shares the table of `embed`.
    pub is_tied: bool,
    /// Factor of the logits.
    pub logit_scale: f64,
}

/// Layers of a block.
#[derive(Clone, Copy, Debug)]
pub struct BlockPlan<'a> {
    /// Norm before attention.
    pub norm_1: &'a Norm,
    /// Norm before the MLP.
    pub norm_2: &'a Norm,
    /// Attention, applied to the output of `norm_1`.
    pub attention: &'a Attention,
    /// MLP, applied to the output of `norm_2`.
    pub mlp: &'a Mlp,
    /// Residual connections.
    pub residual: Residual,
}

/// Residual connections of attention and MLP in a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Residual {
    /// `x + mlp(norm_2(x)) + attention(norm_1(x))`.
    Parallel,
    /// `h = x + attention(norm_1(x))`, then `h + mlp(norm_2(h))`.
    Sequential,
}
