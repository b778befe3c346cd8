//! The layers of a model as a list, for those who compute with them in another way than its family does: a decoder with kernels
//! of its own, or a split over devices. References to the layers themselves, not a second description.

use crate::{Attention, Embedding, Linear, Mlp, Norm};

/// The layers of a model whose blocks are attention and an MLP.
#[derive(Clone, Debug)]
pub struct ModelPlan<'a> {
    /// Token vectors.
    pub embed: &'a Embedding,
    /// Vectors of positions, added to those of tokens.
    pub learned_positions: Option<&'a Embedding>,
    /// Applied to the sum.
    pub embed_norm: Option<&'a Norm>,
    /// The blocks, first to last.
    pub blocks: Vec<BlockPlan<'a>>,
    /// Applied after the last block.
    pub final_norm: &'a Norm,
    /// To logits.
    pub head: &'a Linear,
    /// Whether the head is the table of `embed`.
    pub is_tied: bool,
    /// Multiplies the logits.
    pub logit_scale: f64,
}

/// The layers of a block.
#[derive(Clone, Copy, Debug)]
pub struct BlockPlan<'a> {
    /// Read by attention.
    pub norm_1: &'a Norm,
    /// Read by the MLP.
    pub norm_2: &'a Norm,
    /// Over `norm_1`.
    pub attention: &'a Attention,
    /// Over `norm_2`.
    pub mlp: &'a Mlp,
    /// What the MLP reads, and what is added up.
    pub residual: Residual,
}

/// How attention and MLP are added to the residual stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Residual {
    /// `x + mlp(norm_2(x)) + attention(norm_1(x))`.
    Parallel,
    /// `h = x + attention(norm_1(x))`, then `h + mlp(norm_2(h))`.
    Sequential,
}
