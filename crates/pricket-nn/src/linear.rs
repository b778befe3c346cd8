//! Linear layers, the order of their rows, and low-rank adapters.
//!
//! A linear layer computes `y = x Wᵀ + b`. Each adapter adds `scale · (x Aᵀ) Bᵀ`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::{DType, Tensor};

use crate::ops::{self, ActivationPrecision, Matrix};
use crate::{Activation, Embedding, Error, Result};

/// Order of the rows of a weight in a file, relative to their order in the model.
///
/// Loading reorders the rows of a fused query-key-value matrix once, so that attention needs only one code path. Only
/// this type applies and undoes the order, for gradients, adapters, merging and export.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RowOrder {
    /// The same order in the file and in the model.
    #[default]
    AsStored,
    /// `[heads, 3, head_dim]` in the file: q, k and v of a head side by side, as GPT-NeoX trains them.
    /// `[3, heads, head_dim]` in the model: Q, then K, then V.
    PerHead {
        /// Number of heads.
        heads: usize,
    },
    /// `[heads, head_dim / 2, 2]` in the file: the two rows of a rotary pair side by side, as llama.cpp's files store
    /// queries and keys. `[heads, 2, head_dim / 2]` in the model: for each head the first rows of all pairs, then the
    /// second rows.
    Pairs {
        /// Number of heads.
        heads: usize,
    },
}

impl RowOrder {
    /// Reorders `tensor`, `[rows, ..]`, from the order in the file to the order in the model.
    ///
    /// # Errors
    /// Returns [`Error::Input`] if the number of rows is not a multiple of the number of heads and parts.
    pub fn apply(self, tensor: &Tensor) -> Result<Tensor> {
        self.moved(tensor, false)
    }

    /// Reorders a matrix in any storage from the order in the file to the order in the model.
    ///
    /// # Errors
    /// Returns [`Error::Input`] if the number of rows is not a multiple of the number of heads and parts, or if the
    /// matrix is packed.
    pub fn apply_to_matrix(self, matrix: Matrix) -> Result<Matrix> {
        self.move_matrix(matrix, false)
    }

    /// Reorders `tensor`, `[rows, ..]`, from the order in the model back to the order in the file.
    ///
    /// # Errors
    /// Returns [`Error::Input`] if the number of rows is not a multiple of the number of heads and parts.
    pub fn undo(self, tensor: &Tensor) -> Result<Tensor> {
        self.moved(tensor, true)
    }

    /// Reorders a matrix in any storage from the order in the model back to the order in the file.
    ///
    /// # Errors
    /// Returns [`Error::Input`] if the number of rows is not a multiple of the number of heads and parts, or if the
    /// matrix is packed.
    pub fn undo_to_matrix(self, matrix: Matrix) -> Result<Matrix> {
        self.move_matrix(matrix, true)
    }

    /// Returns `[outer, a, b]`: the rows are `[outer, a, b, inner]` in the file and `[outer, b, a, inner]` in the
    /// model. Returns `None` if the order is the same.
    fn parts(self, rows: usize) -> Result<Option<[usize; 3]>> {
        let (parts, count) = match self {
            RowOrder::AsStored => return Ok(None),
            RowOrder::PerHead { heads } => ([1, heads, 3], 3 * heads),
            RowOrder::Pairs { heads } => ([heads, rows / (2 * heads).max(1), 2], 2 * heads),
        };
        if count > 0 && rows.is_multiple_of(count) {
            return Ok(Some(parts));
        }
        Err(Error::Input(format!("{rows} rows cannot be reordered; expected a multiple of {count}")))
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
                let from = self.source_rows(four_bit.shape().0, back)?;
                Ok(Matrix::FourBit(four_bit.reordered(|row| from[row])))
            }
            Matrix::Packed(_) => Err(Error::Input("the rows of a packed matrix cannot be reordered".into())),
            Matrix::Blocks(blocks) => {
                let from = self.source_rows(blocks.shape().0, back)?;
                Ok(Matrix::Blocks(blocks.reordered(|row| from[row])))
            }
        }
    }

    /// Returns, for each row in the model, its index in the file. With `back`, returns the index in the model for each
    /// row in the file.
    ///
    /// # Errors
    /// Returns [`Error::Input`] if the number of rows is not a multiple of the number of heads and parts.
    pub(crate) fn source_rows(self, rows: usize, back: bool) -> Result<Vec<usize>> {
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

/// Low-rank adapter of a linear layer (LoRA, Hu et al. 2021, arXiv:2106.09685): `y += scale · (x Aᵀ) Bᵀ`.
///
/// With a magnitude it is a DoRA adapter (Liu et al. 2024, arXiv:2402.09353): each row of `W + scale · B A` is scaled
/// to the length that `magnitude` gives. The gradient treats the length before scaling as a constant.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Adapter {
    /// The matrix A, `[rank, inputs]`.
    pub a: Tensor,
    /// The matrix B, `[outputs, rank]`, in the model's row order. [`RowOrder::apply`] converts one from the order in a
    /// file.
    pub b: Tensor,
    /// Factor of the product; `alpha / rank` in PEFT.
    pub scale: f64,
    /// Magnitude of DoRA, `[outputs]`, in the model's row order.
    pub magnitude: Option<Tensor>,
    /// Dropout of the input of the adapter.
    pub dropout: Option<Dropout>,
}

impl Adapter {
    /// Returns an adapter without magnitude and dropout.
    pub fn new(a: Tensor, b: Tensor, scale: f64) -> Self {
        Self { a, b, scale, magnitude: None, dropout: None }
    }

    /// Returns whether a gradient is tracked for `a`, `b` or the magnitude.
    pub fn track_op(&self) -> bool {
        self.a.track_op() || self.b.track_op() || self.magnitude.as_ref().is_some_and(Tensor::track_op)
    }

    fn detached(&self) -> Self {
        let magnitude = self.magnitude.as_ref().map(Tensor::detach);
        Self { a: self.a.detach(), b: self.b.detach(), magnitude, ..self.clone() }
    }
}

/// Dropout: sets a share of the elements to zero and divides the others by `1 - rate`.
///
/// The random numbers depend only on the seed, the training step, the site and the index of the element. A repeated
/// pass therefore drops the same elements.
#[derive(Clone, Debug)]
pub struct Dropout {
    /// Share of the elements that are dropped, at least 0 and below 1.
    pub rate: f64,
    /// Random seed of the training run.
    pub seed: u64,
    /// Number that differs between layers, so that they drop different elements.
    pub site: u64,
    /// Training step, counted from 1 and shared by all layers of a model. At 0 nothing is dropped.
    pub step: Arc<AtomicU64>,
}

impl Dropout {
    /// Returns whether elements are dropped at the current training step.
    pub(crate) fn is_active(&self) -> bool {
        self.rate > 0.0 && self.step.load(Ordering::Relaxed) > 0
    }

    /// Returns `x` with the dropped elements set to zero and the others scaled.
    ///
    /// # Errors
    /// Returns an error if a tensor operation fails.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        if !self.is_active() {
            return Ok(x.clone());
        }
        let step = self.step.load(Ordering::Relaxed);
        // SplitMix64 (Steele et al. 2014) of a counter, with one random stream for each seed, training step and site.
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

/// Linear layer with optional adapters: `y = x Wᵀ + b`, plus the output of each adapter.
///
/// A frozen weight keeps its stored type. On the CPU a product converts it in parts, never as a whole.
#[derive(Clone, Debug)]
pub struct Linear {
    pub(crate) name: Arc<str>,
    pub(crate) weight: Matrix,
    pub(crate) bias: Option<Tensor>,
    pub(crate) precision: ActivationPrecision,
    pub(crate) rows: RowOrder,
    pub(crate) adapters: Vec<Adapter>,
    /// Squared lengths of the rows of the weight, if an adapter has a magnitude.
    pub(crate) lengths: Option<Tensor>,
}

impl Linear {
    /// Returns the head `name` tied to `embedding`. Both share one copy of the table.
    pub fn tied(embedding: &Embedding, name: &str) -> Self {
        Self::new(name, embedding.weight.clone(), None, embedding.precision, RowOrder::AsStored)
    }

    /// Returns a layer with the weight `[outputs, inputs]`, without a bias, and with f32 activations.
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

    /// Returns the canonical name without `.weight`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the weight, `[outputs, inputs]`, in the model's row order.
    pub fn weight(&self) -> &Matrix {
        &self.weight
    }

    /// Returns the bias, `[outputs]`, in the model's row order.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// Returns the row order of the layer in checkpoints on the Hub. Adapters and gradients are saved in that order.
    /// The file that was loaded may already use the model's order.
    pub fn rows(&self) -> RowOrder {
        self.rows
    }

    /// Returns the adapters.
    pub fn adapters(&self) -> &[Adapter] {
        &self.adapters
    }

    /// Returns a layer that shares this weight and has other adapters. The outputs of all adapters are added.
    ///
    /// # Errors
    /// Returns [`Error::Input`] if the shapes of an adapter do not match the weight.
    pub fn with_adapters(&self, adapters: Vec<Adapter>) -> Result<Self> {
        let (outputs, inputs) = self.weight.shape()?;
        for Adapter { a, b, magnitude, .. } in &adapters {
            let rank = a.dims().first().copied().unwrap_or(0);
            let fits = a.dims() == [rank, inputs] && b.dims() == [outputs, rank];
            if !fits || magnitude.as_ref().is_some_and(|magnitude| magnitude.dims() != [outputs]) {
                return Err(Error::Input(format!(
                    "{}: adapter of shapes {:?} and {:?}; expected [rank, {inputs}] and [{outputs}, rank]",
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

    /// Returns a copy of the layer with another weight, in the model's row order, and without adapters.
    ///
    /// # Errors
    /// Returns [`Error::Input`] if the weight has another shape.
    pub fn with_weight(&self, weight: Matrix) -> Result<Self> {
        let (expected, found) = (self.weight.shape()?, weight.shape()?);
        if expected != found {
            return Err(Error::Input(format!("{}: weight of shape {found:?}; expected {expected:?}", self.name)));
        }
        Ok(Self { weight, adapters: Vec::new(), lengths: None, ..self.clone() })
    }

    /// Returns a copy of the layer with another bias, in the model's row order, or without one.
    ///
    /// # Errors
    /// Returns [`Error::Input`] if the bias has another shape.
    pub fn with_bias(&self, bias: Option<Tensor>) -> Result<Self> {
        let (outputs, _) = self.weight.shape()?;
        if let Some(bias) = bias.as_ref().filter(|bias| bias.dims() != [outputs]) {
            return Err(Error::Input(format!("{}: bias of shape {:?}; expected [{outputs}]", self.name, bias.dims())));
        }
        Ok(Self { bias, ..self.clone() })
    }

    /// Returns a copy of the layer for which no gradient is tracked. It shares the values: updating a variable also
    /// changes the copy.
    #[must_use]
    pub fn detached(&self) -> Self {
        let adapters = self.adapters.iter().map(Adapter::detached).collect();
        let bias = self.bias.as_ref().map(Tensor::detach);
        Self { weight: self.weight.detached(), bias, adapters, ..self.clone() }
    }

    /// Returns the weight with the adapters merged into it, in f32: `W + Σ scale · B A`. The rows of DoRA adapters are
    /// scaled to their magnitudes.
    ///
    /// # Errors
    /// Returns an error if a tensor operation fails.
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

    /// Applies the layer to `x`, `[.., inputs]`. Returns `[.., outputs]`.
    ///
    /// # Errors
    /// Returns an error if the last dimension of `x` is not `inputs`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_or_zeros(x, true)
    }

    /// [`Linear::forward`] for a caller that may need only gradients. If `has_value` is false, the result may be zeros,
    /// which saves the product.
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

    /// [`Linear::forward_or_zeros`] of `activation(x)`. The fused operation does not keep `activation(x)` for the
    /// backward pass.
    pub(crate) fn forward_of(&self, x: &Tensor, activation: Activation, has_value: bool) -> Result<Tensor> {
        match self.low_rank(x, Some(activation), has_value)? {
            Some(y) => Ok(y),
            None => self.forward_or_zeros(&ops::activate(x, activation)?, has_value),
        }
    }

    /// Computes the layer and its adapter in one fused operation. Returns `None` if no fused operation supports them.
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

    /// Returns the output of an adapter, which is added to `base = x Wᵀ`.
    fn change(&self, adapter: &Adapter, x: &Tensor, base: &Tensor) -> Result<Tensor> {
        let Adapter { a, b, scale, magnitude, dropout } = adapter;
        let product =
            |x: &Tensor, w: &Tensor| ops::linear(x, &Matrix::Dense(w.clone()), None, ActivationPrecision::F32);
        let dropped = dropout.as_ref().map(|dropout| dropout.apply(x)).transpose()?;
        let is_dropped = dropped.as_ref().is_some_and(|dropped| dropped.id() != x.id());
        let x = dropped.as_ref().unwrap_or(x);
        let change = (product(&product(x, a)?, b)? * *scale)?;
        let (Some(magnitude), Some(lengths)) = (magnitude, &self.lengths) else { return Ok(change) };
        // |w + s b a|² of each row, computed without the full product of b and a.
        let (a, b) = (a.detach(), b.detach());
        let across = (ops::linear(&a, &self.weight.detached(), None, ActivationPrecision::F32)?.t()? * &b)?.sum(1)?;
        let own = (b.matmul(&a.matmul(&a.t()?)?)? * &b)?.sum(1)?;
        let squared = ((lengths + (across * (2.0 * *scale))?)? + (own * (*scale * *scale))?)?;
        let factor = (magnitude / squared.sqrt()?.detach())?.to_dtype(base.dtype())?;
        // Like PEFT, the magnitude scales the base product of the dropped input.
        let base = if is_dropped { ops::linear(x, &self.weight, None, self.precision)? } else { base.clone() };
        let more = base.broadcast_mul(&(&factor - 1.0)?)?;
        Ok((more + change.broadcast_mul(&factor)?)?)
    }

    /// Returns the gradient of the input, in `dtype`, given the gradient of the output. Supports adapters without a
    /// magnitude only.
    pub(crate) fn backward(&self, grad: &Tensor, dtype: DType) -> Result<Tensor> {
        let mut back = ops::linear_transposed(grad, &self.weight)?;
        for Adapter { a, b, scale, .. } in &self.adapters {
            let low = grad.to_dtype(b.dtype())?.matmul(b)?.matmul(a)?;
            back = (&back + (low.to_dtype(back.dtype())? * *scale)?)?;
        }
        Ok(back.to_dtype(dtype)?)
    }

    /// Returns rows of the weight with adapters merged, in f32. Supports adapters without a magnitude only.
    pub(crate) fn rows_of(&self, rows: &[u32], device: &candle_core::Device) -> Result<Tensor> {
        let rows = Tensor::new(rows, device)?;
        let mut out = self.weight.gather(&rows, DType::F32)?;
        for Adapter { a, b, scale, .. } in &self.adapters {
            let low = b.index_select(&rows, 0)?.matmul(a)?.to_dtype(DType::F32)?;
            out = (out + (low * *scale)?)?;
        }
        Ok(out)
    }

    /// Applies the layer, then an activation.
    pub(crate) fn forward_then(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        if !self.adapters.is_empty() {
            return ops::activate(&self.forward(x)?, activation);
        }
        ops::linear_then(x, &self.weight, self.bias.as_ref(), activation, self.precision)
    }
}

/// Returns the squared length of each row in f32. Converts 256 rows at a time.
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

/// Embedding and head of a model, loaded by [`Weights::embedding_and_head`](crate::Weights::embedding_and_head).
#[derive(Clone, Debug)]
pub struct EmbeddingAndHead {
    /// Table of token vectors.
    pub embed: Embedding,
    /// Projection to logits.
    pub head: Linear,
    /// Whether the head shares the table of `embed`.
    pub is_tied: bool,
}
