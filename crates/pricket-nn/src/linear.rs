//! Linear layers, the order of their rows, and what adapts them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::{DType, Tensor};

use crate::ops::{self, ActivationPrecision, Matrix};
use crate::{Activation, Embedding, Error, Result};

/// How the rows of a weight on file relate to the rows that the model multiplies with.
///
/// A fused query-key-value matrix is re-laid once, at load, so that there is one attention path. This type is the only
/// place that applies the order or undoes it, for gradients, adapters, merging and export.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RowOrder {
    /// As on file.
    #[default]
    AsStored,
    /// On file `[heads, 3, head_dim]`: each head's q, k and v side by side, as GPT-NeoX trains them. In memory
    /// `[3, heads, head_dim]`: Q, then K, then V.
    PerHead {
        /// Number of heads.
        heads: usize,
    },
    /// On file `[heads, head_dim / 2, 2]`: the two rows that rotary positions turn together side by side, as llama.cpp's files have
    /// queries and keys. In memory `[heads, 2, head_dim / 2]`: the first halves, then the second.
    Pairs {
        /// Number of heads.
        heads: usize,
    },
}

impl RowOrder {
    /// From the order on file to the order in memory; `tensor` is `[rows, ..]`.
    ///
    /// # Errors
    /// If the rows do not divide into heads.
    pub fn apply(self, tensor: &Tensor) -> Result<Tensor> {
        self.moved(tensor, false)
    }

    /// As [`RowOrder::apply`], of a matrix in any form.
    ///
    /// # Errors
    /// If the rows do not divide into heads.
    pub fn apply_to_matrix(self, matrix: Matrix) -> Result<Matrix> {
        self.move_matrix(matrix, false)
    }

    /// From the order in memory back to the order on file.
    ///
    /// # Errors
    /// If the rows do not divide into heads.
    pub fn undo(self, tensor: &Tensor) -> Result<Tensor> {
        self.moved(tensor, true)
    }

    /// As [`RowOrder::undo`], of a matrix in any form.
    ///
    /// # Errors
    /// If the rows do not divide into heads.
    pub fn undo_to_matrix(self, matrix: Matrix) -> Result<Matrix> {
        self.move_matrix(matrix, true)
    }

    /// The rows as `[outer, a, b, inner]` on file, which are `[outer, b, a, inner]` in memory; `None` if they stay as they are.
    fn parts(self, rows: usize) -> Result<Option<[usize; 3]>> {
        let (parts, count) = match self {
            RowOrder::AsStored => return Ok(None),
            RowOrder::PerHead { heads } => ([1, heads, 3], 3 * heads),
            RowOrder::Pairs { heads } => ([heads, rows / (2 * heads).max(1), 2], 2 * heads),
        };
        if count > 0 && rows.is_multiple_of(count) {
            return Ok(Some(parts));
        }
        Err(Error::Input(format!("{rows} rows do not divide into {count} equal parts, as their order says")))
    }

    fn moved(self, tensor: &Tensor, back: bool) -> Result<Tensor> {
        let rows = tensor.dim(0)?;
        let Some([outer, a, b]) = self.parts(rows)? else { return Ok(tensor.clone()) };
        let (a, b) = if back { (b, a) } else { (a, b) };
        let split = tensor.reshape((outer, a, b, tensor.elem_count() / (outer * a * b)))?;
        Ok(split.transpose(1, 2)?.contiguous()?.reshape(tensor.dims())?)
    }

    fn move_matrix(self, matrix: Matrix, back: bool) -> Result<Matrix> {
        match matrix {
            Matrix::Dense(tensor) => Ok(Matrix::Dense(self.moved(&tensor, back)?)),
            matrix if self == RowOrder::AsStored => Ok(matrix),
            Matrix::InPlace(matrix) => Ok(Matrix::Dense(self.moved(&matrix.to_tensor()?, back)?)),
            Matrix::FourBit(four_bit) => {
                let from = self.sources(four_bit.shape().0, back)?;
                Ok(Matrix::FourBit(four_bit.reordered(|row| from[row])))
            }
            Matrix::Packed(_) => Err(Error::Input("packed rows are in the model's order already".into())),
            Matrix::Blocks(blocks) => {
                let from = self.sources(blocks.shape().0, back)?;
                Ok(Matrix::Blocks(blocks.reordered(|row| from[row])))
            }
        }
    }

    /// For each row in memory its row on file, or with `back` the reverse.
    ///
    /// # Errors
    /// If the rows do not divide into heads.
    pub(crate) fn sources(self, rows: usize, back: bool) -> Result<Vec<usize>> {
        let Some([outer, a, b]) = self.parts(rows)? else { return Ok((0..rows).collect()) };
        let (a, b) = if back { (b, a) } else { (a, b) };
        let inner = rows / (outer * a * b);
        let source = |row: usize| {
            let (i, rest) = (row % inner, row / inner);
            let (at_a, rest) = (rest % a, rest / a);
            let (at_b, at_outer) = (rest % b, rest / b);
            ((at_outer * a + at_a) * b + at_b) * inner + i
        };
        Ok((0..rows).map(source).collect())
    }
}

/// A low-rank change to a linear layer (Hu et al. 2021, arXiv:2106.09685): `y += scale · (x Aᵀ) Bᵀ`.
///
/// With a magnitude it is DoRA's (Liu et al. 2024, arXiv:2402.09353): each row of `W + scale · B A` is given that length. The length
/// that it has otherwise is held constant in the gradient.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Adapter {
    /// `[rank, inputs]`.
    pub a: Tensor,
    /// `[outputs, rank]`, in the order of rows in which the model multiplies: [`RowOrder::apply`] brings one from a file there.
    pub b: Tensor,
    /// Multiplies the product; `alpha / rank` in PEFT's terms.
    pub scale: f64,
    /// `[outputs]`, in the same order.
    pub magnitude: Option<Tensor>,
    /// Of the input of the product.
    pub dropout: Option<Dropout>,
}

impl Adapter {
    /// An adapter without magnitude and dropout.
    pub fn new(a: Tensor, b: Tensor, scale: f64) -> Self {
        Self { a, b, scale, magnitude: None, dropout: None }
    }

    /// Whether a gradient is collected for a part of it.
    pub fn track_op(&self) -> bool {
        self.a.track_op() || self.b.track_op() || self.magnitude.as_ref().is_some_and(Tensor::track_op)
    }

    fn detached(&self) -> Self {
        let magnitude = self.magnitude.as_ref().map(Tensor::detach);
        Self { a: self.a.detach(), b: self.b.detach(), magnitude, ..self.clone() }
    }
}

/// Sets a share of elements to zero and scales the others up, by numbers that depend on seed, step and place only: a pass that is
/// repeated drops the same ones.
#[derive(Clone, Debug)]
pub struct Dropout {
    /// The share, from 0 to below 1.
    pub rate: f64,
    /// Of the run.
    pub seed: u64,
    /// Tells layers apart.
    pub site: u64,
    /// The step, counted from 1 and shared by all layers of a model; at 0 nothing is dropped.
    pub step: Arc<AtomicU64>,
}

impl Dropout {
    /// Whether anything is dropped.
    pub(crate) fn is_active(&self) -> bool {
        self.rate > 0.0 && self.step.load(Ordering::Relaxed) > 0
    }

    /// `x` with some elements zero.
    ///
    /// # Errors
    /// What candle says.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        if !self.is_active() {
            return Ok(x.clone());
        }
        let step = self.step.load(Ordering::Relaxed);
        // SplitMix64 (Steele et al. 2014) of a counter: a stream for each seed, step and site.
        let mix = |mut z: u64| {
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        };
        let stream = mix(self.seed ^ mix(step ^ mix(self.site)));
        let (kept, scale) = (1.0 - self.rate, (1.0 / (1.0 - self.rate)) as f32);
        let keeps = |i: u64| {
            (mix(stream.wrapping_add(i.wrapping_mul(0x9e37_79b9_7f4a_7c15))) >> 11) as f64 * 2f64.powi(-53) < kept
        };
        let mask: Vec<f32> = (0..x.elem_count() as u64).map(|i| if keeps(i) { scale } else { 0.0 }).collect();
        Ok((x * Tensor::from_vec(mask, x.shape(), x.device())?.to_dtype(x.dtype())?)?)
    }
}

/// `y = x Wᵀ + b`, and what adapters add. A frozen weight stays as it is stored and is never widened whole.
#[derive(Clone, Debug)]
pub struct Linear {
    pub(crate) name: Arc<str>,
    pub(crate) weight: Matrix,
    pub(crate) bias: Option<Tensor>,
    pub(crate) precision: ActivationPrecision,
    pub(crate) rows: RowOrder,
    pub(crate) adapters: Vec<Adapter>,
    /// Of the rows of the weight, squared, where an adapter has a magnitude.
    pub(crate) lengths: Option<Tensor>,
}

impl Linear {
    /// The head `name` that multiplies with the table of an embedding: a tied head, from one copy.
    pub fn tied(embedding: &Embedding, name: &str) -> Self {
        Self::new(name, embedding.weight.clone(), None, embedding.precision, RowOrder::AsStored)
    }

    /// A layer over a weight `[outputs, inputs]`, without a bias, that computes in f32.
    pub fn over(name: &str, weight: Matrix) -> Self {
        Self::new(name, weight, None, ActivationPrecision::F32, RowOrder::AsStored)
    }

    pub(crate) fn new(
        name: &str,
        weight: Matrix,
        bias: Option<Tensor>,
        precision: ActivationPrecision,
        rows: RowOrder,
    ) -> Self {
        Self { name: name.into(), weight, bias, precision, rows, adapters: Vec::new(), lengths: None }
    }

    /// Its canonical name, without `.weight`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The weight, `[outputs, inputs]`, in the model's order of rows.
    pub fn weight(&self) -> &Matrix {
        &self.weight
    }

    /// The bias, `[outputs]`, in the model's order of rows.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// How its rows relate to those on the Hub, which adapters and gradients are written in. A file may have them in the model's
    /// order already.
    pub fn rows(&self) -> RowOrder {
        self.rows
    }

    /// The adapters.
    pub fn adapters(&self) -> &[Adapter] {
        &self.adapters
    }

    /// The same layer over the same weight with other adapters. What they add is summed.
    ///
    /// # Errors
    /// [`Error::Input`] for an adapter of other sizes.
    pub fn with_adapters(&self, adapters: Vec<Adapter>) -> Result<Self> {
        let (outputs, inputs) = self.weight.shape()?;
        for Adapter { a, b, magnitude, .. } in &adapters {
            let rank = a.dims().first().copied().unwrap_or(0);
            let fits = a.dims() == [rank, inputs] && b.dims() == [outputs, rank];
            if !fits || magnitude.as_ref().is_some_and(|magnitude| magnitude.dims() != [outputs]) {
                return Err(Error::Input(format!(
                    "{}: an adapter of {:?} and {:?}; expected [rank, {inputs}] and [{outputs}, rank]",
                    self.name,
                    a.dims(),
                    b.dims()
                )));
            }
        }
        let has_magnitude = adapters.iter().any(|adapter| adapter.magnitude.is_some());
        let lengths = has_magnitude.then(|| squared_lengths(&self.weight)).transpose()?;
        Ok(Self { adapters, lengths, ..self.clone() })
    }

    /// The same layer with another weight, in the model's order of rows, and no adapters.
    ///
    /// # Errors
    /// [`Error::Input`] for a weight of other sizes.
    pub fn with_weight(&self, weight: Matrix) -> Result<Self> {
        let (expected, found) = (self.weight.shape()?, weight.shape()?);
        if expected != found {
            return Err(Error::Input(format!("{}: a weight of {found:?}, expected {expected:?}", self.name)));
        }
        Ok(Self { weight, adapters: Vec::new(), lengths: None, ..self.clone() })
    }

    /// The same layer with another bias, in the model's order of rows.
    ///
    /// # Errors
    /// [`Error::Input`] for a bias of another size.
    pub fn with_bias(&self, bias: Option<Tensor>) -> Result<Self> {
        let (outputs, _) = self.weight.shape()?;
        if let Some(bias) = bias.as_ref().filter(|bias| bias.dims() != [outputs]) {
            return Err(Error::Input(format!("{}: a bias of {:?}, expected [{outputs}]", self.name, bias.dims())));
        }
        Ok(Self { bias, ..self.clone() })
    }

    /// The same layer over the same numbers, for which no gradient is collected. Variables that change change it too.
    #[must_use]
    pub fn detached(&self) -> Self {
        let adapters = self.adapters.iter().map(Adapter::detached).collect();
        let bias = self.bias.as_ref().map(Tensor::detach);
        Self { weight: self.weight.detached(), bias, adapters, ..self.clone() }
    }

    /// The weight with its adapters merged into it, in f32: `W + Σ scale · B A`, its rows of the adapters' lengths.
    ///
    /// # Errors
    /// What candle says.
    pub fn merged(&self) -> Result<Tensor> {
        let device = self.adapters.first().map_or(candle_core::Device::Cpu, |adapter| adapter.a.device().clone());
        let weight = self.weight.to_dense(DType::F32, &device)?;
        let mut merged = weight.clone();
        for adapter in &self.adapters {
            let Adapter { a, b, scale, magnitude, .. } = &adapter.detached();
            let change = (b.to_dtype(DType::F32)?.matmul(&a.to_dtype(DType::F32)?)? * *scale)?;
            let delta = match magnitude {
                Some(magnitude) => {
                    let whole = (&weight + change)?;
                    let lengths = whole.sqr()?.sum_keepdim(1)?.sqrt()?;
                    let magnitude = magnitude.to_dtype(DType::F32)?.unsqueeze(1)?;
                    (whole.broadcast_mul(&magnitude.broadcast_div(&lengths)?)? - &weight)?
                }
                None => change,
            };
            merged = (merged + delta)?;
        }
        Ok(merged)
    }

    /// `[.., inputs]` to `[.., outputs]`.
    ///
    /// # Errors
    /// If the last dimension of `x` is not this layer's input.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_or_zeros(x, true)
    }

    /// As [`Linear::forward`]; without `has_value` for a caller who only goes back through it, and gets zeros where that saves work.
    pub(crate) fn forward_or_zeros(&self, x: &Tensor, has_value: bool) -> Result<Tensor> {
        match &self.adapters[..] {
            [] if has_value => return ops::linear(x, &self.weight, self.bias.as_ref(), self.precision),
            [] => return ops::linear_backward_only(x, &self.weight, self.bias.as_ref()),
            _ => {}
        }
        if let Some(y) = self.low_rank(x, None, has_value)? {
            return Ok(y);
        }
        let base = ops::linear(x, &self.weight, None, self.precision)?;
        let mut y = base.clone();
        for adapter in &self.adapters {
            y = (y + self.change(adapter, x, &base)?)?;
        }
        match &self.bias {
            Some(bias) => Ok(y.broadcast_add(&bias.to_dtype(y.dtype())?)?),
            None => Ok(y),
        }
    }

    /// [`Linear::forward_or_zeros`] of `activation(x)`, which is not kept for the backward pass where there is an operation for it.
    pub(crate) fn forward_of(&self, x: &Tensor, activation: Activation, has_value: bool) -> Result<Tensor> {
        match self.low_rank(x, Some(activation), has_value)? {
            Some(y) => Ok(y),
            None => self.forward_or_zeros(&ops::activate(x, activation)?, has_value),
        }
    }

    /// The layer with its adapter in one operation, if there is one for it.
    fn low_rank(&self, x: &Tensor, of: Option<Activation>, has_value: bool) -> Result<Option<Tensor>> {
        match &self.adapters[..] {
            [Adapter { a, b, scale, magnitude: None, dropout }]
                if dropout.as_ref().is_none_or(|dropout| !dropout.is_active()) =>
            {
                let base = (&self.weight, self.bias.as_ref());
                ops::lora(x, base, (a, b, *scale), of, self.precision, has_value)
            }
            _ => Ok(None),
        }
    }

    /// What an adapter adds to `base`, `x Wᵀ`.
    fn change(&self, adapter: &Adapter, x: &Tensor, base: &Tensor) -> Result<Tensor> {
        let Adapter { a, b, scale, magnitude, dropout } = adapter;
        let product =
            |x: &Tensor, w: &Tensor| ops::linear(x, &Matrix::Dense(w.clone()), None, ActivationPrecision::F32);
        let dropped = dropout.as_ref().map(|dropout| dropout.apply(x)).transpose()?;
        let is_dropped = dropped.as_ref().is_some_and(|dropped| dropped.id() != x.id());
        let x = dropped.as_ref().unwrap_or(x);
        let change = (product(&product(x, a)?, b)? * *scale)?;
        let (Some(magnitude), Some(lengths)) = (magnitude, &self.lengths) else { return Ok(change) };
        // |w + s b a|² of each row, without the product of b and a.
        let (a, b) = (a.detach(), b.detach());
        let across = (ops::linear(&a, &self.weight.detached(), None, ActivationPrecision::F32)?.t()? * &b)?.sum(1)?;
        let own = (b.matmul(&a.matmul(&a.t()?)?)? * &b)?.sum(1)?;
        let squared = ((lengths + (across * (2.0 * *scale))?)? + (own * (*scale * *scale))?)?;
        let factor = (magnitude / squared.sqrt()?.detach())?.to_dtype(base.dtype())?;
        // As PEFT: dropout is of all that is scaled.
        let base = if is_dropped { ops::linear(x, &self.weight, None, self.precision)? } else { base.clone() };
        let more = base.broadcast_mul(&(&factor - 1.0)?)?;
        Ok((more + change.broadcast_mul(&factor)?)?)
    }

    /// The gradient of the input, given that of the output, where no adapter has a magnitude. In `dtype`, which is the input's.
    pub(crate) fn backward(&self, grad: &Tensor, dtype: DType) -> Result<Tensor> {
        let mut back = ops::linear_transposed(grad, &self.weight)?;
        for Adapter { a, b, scale, .. } in &self.adapters {
            let low = grad.to_dtype(b.dtype())?.matmul(b)?.matmul(a)?;
            back = (&back + (low.to_dtype(back.dtype())? * *scale)?)?;
        }
        Ok(back.to_dtype(dtype)?)
    }

    /// Rows of the weight as it is multiplied with, adapters included, in f32; where no adapter has a magnitude.
    pub(crate) fn rows_of(&self, rows: &[u32], device: &candle_core::Device) -> Result<Tensor> {
        let rows = Tensor::new(rows, device)?;
        let mut out = self.weight.gather(&rows, DType::F32)?;
        for Adapter { a, b, scale, .. } in &self.adapters {
            let low = b.index_select(&rows, 0)?.matmul(a)?.to_dtype(DType::F32)?;
            out = (out + (low * *scale)?)?;
        }
        Ok(out)
    }

    /// [`Linear::forward`], then an activation.
    pub(crate) fn forward_then(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        if !self.adapters.is_empty() {
            return ops::activate(&self.forward(x)?, activation);
        }
        ops::linear_then(x, &self.weight, self.bias.as_ref(), activation, self.precision)
    }
}

/// The squared length of each row, in f32, a part of the rows at a time.
fn squared_lengths(weight: &Matrix) -> Result<Tensor> {
    let (rows, _) = weight.shape()?;
    let device = match weight {
        Matrix::Dense(weight) => weight.device().clone(),
        Matrix::Blocks(_) | Matrix::Packed(_) | Matrix::FourBit(_) | Matrix::InPlace(_) => candle_core::Device::Cpu,
    };
    let part = |from: usize| -> Result<Tensor> {
        let ids = Tensor::arange(from as u32, rows.min(from + 256) as u32, &device)?;
        Ok(weight.gather(&ids, DType::F32)?.sqr()?.sum(1)?)
    };
    let parts = (0..rows).step_by(256).map(part).collect::<Result<Vec<_>>>()?;
    Ok(Tensor::cat(&parts, 0)?.detach())
}

/// The embedding and the head of a model; see [`Weights::embedding_and_head`](crate::Weights::embedding_and_head).
#[derive(Clone, Debug)]
pub struct EmbeddingAndHead {
    /// Token vectors.
    pub embed: Embedding,
    /// To logits.
    pub head: Linear,
    /// Whether the head is the table of `embed`.
    pub is_tied: bool,
}
