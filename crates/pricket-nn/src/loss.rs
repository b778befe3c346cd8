//! Cross-entropy fused with the head: `nll[i] = logsumexp(logits[i]) - logits[i][target[i]]`, where
//! `logits = logit_scale · head(hidden)`.
//!
//! Logits are computed for a block of positions at a time. With a frozen head the gradient is computed together with
//! the loss, so logits are computed once. With a trained head they are computed a second time in the backward pass.

use candle_core::Tensor;

use crate::known::known;
use crate::ops::{self, Matrix};
use crate::{Error, Linear, Result};

/// Number of positions whose logits are in memory at the same time.
const BLOCK: usize = 64;

/// Block size if the gradient is computed together with the loss, which reads the head twice for each block.
const GRADIENT_BLOCK: usize = 128;

/// Block size if the head is trained. Each block adds to a gradient as large as the weight.
const TRAINED_BLOCK: usize = 256;

/// Returns the negative log-likelihood of `targets` under `logit_scale · head(hidden)`: `[n]` in nats, in f32. `hidden`
/// is `[n, d]`.
///
/// Gradients flow to the hidden states and to a trained head. A trained bias or adapter of the head gets a gradient
/// too, but then all logits stay in memory for the backward pass.
///
/// # Errors
/// Returns [`Error::Input`] if the number of targets differs from `n`.
pub(crate) fn cross_entropy(hidden: &Tensor, head: &Linear, logit_scale: f64, targets: &[u32]) -> Result<Tensor> {
    let (n, _) = hidden.dims2()?;
    if n != targets.len() {
        return Err(Error::Input(format!("{} targets for {n} hidden states", targets.len())));
    }
    let loss = CrossEntropy { head: head.clone(), logit_scale, targets: targets.to_vec() };
    let adapted = head.adapters.iter().any(|adapter| adapter.track_op() || adapter.magnitude.is_some());
    if adapted || head.bias.as_ref().is_some_and(Tensor::track_op) {
        return loss.of(hidden);
    }
    if head.weight.track_op()
        && let Matrix::Dense(weight) = &head.weight
    {
        let nll = loss.frozen().of(&hidden.detach())?;
        return known(hidden, weight, Some(nll), move |hidden, grad| {
            let (of_hidden, of_weight) = loss.backward(hidden, grad)?;
            Ok((Some(of_hidden), of_weight))
        });
    }
    if !hidden.track_op() {
        return loss.of(hidden);
    }
    let (nll, of_hidden) = loss.with_gradient(&hidden.detach())?;
    known(hidden, &hidden.detach(), Some(nll), move |_, grad| {
        Ok((Some(of_hidden.broadcast_mul(&grad.unsqueeze(1)?.to_dtype(of_hidden.dtype())?)?), None))
    })
}

/// Inputs of the loss, except the hidden states.
struct CrossEntropy {
    head: Linear,
    logit_scale: f64,
    targets: Vec<u32>,
}

impl CrossEntropy {
    fn blocks(&self, size: usize) -> impl Iterator<Item = (usize, &[u32])> {
        self.targets.chunks(size).enumerate().map(move |(i, targets)| (i * size, targets))
    }

    /// Returns a copy that shares the weight and for which no gradient is tracked.
    fn frozen(&self) -> Self {
        Self { head: self.head.detached(), logit_scale: self.logit_scale, targets: self.targets.clone() }
    }

    fn logits(&self, hidden: &Tensor, at: usize, len: usize) -> Result<Tensor> {
        let logits = self.head.forward(&hidden.narrow(0, at, len)?)?.to_dtype(candle_core::DType::F32)?;
        if self.logit_scale == 1.0 { Ok(logits) } else { Ok((logits * self.logit_scale)?) }
    }

    /// Computes the loss by plain operations, block by block.
    fn of(&self, hidden: &Tensor) -> Result<Tensor> {
        let mut out = Vec::with_capacity(self.targets.len().div_ceil(BLOCK));
        for (at, targets) in self.blocks(BLOCK) {
            out.push(nll_of(&self.logits(hidden, at, targets.len())?, targets)?);
        }
        match &out[..] {
            [] => Ok(Tensor::zeros(0, candle_core::DType::F32, hidden.device())?),
            _ => Ok(Tensor::cat(&out, 0)?),
        }
    }

    /// Returns the loss, `[n]`, and the gradient of the loss of each position, `[n, d]`.
    fn with_gradient(&self, hidden: &Tensor) -> Result<(Tensor, Tensor)> {
        let frozen = self.frozen();
        let (mut nll, mut of_hidden) = (Vec::new(), Vec::new());
        for (at, targets) in frozen.blocks(GRADIENT_BLOCK) {
            let logits = frozen.logits(hidden, at, targets.len())?;
            nll.push(nll_of(&logits, targets)?);
            let back = frozen.head.backward(&ops::probabilities(&logits)?, candle_core::DType::F32)?;
            // d nll / d hidden = Σ p[j] · W[j] - W[target], so the target's row of the head is subtracted.
            let hits = frozen.head.rows_of(targets, hidden.device())?;
            of_hidden.push(((back - hits)? * self.logit_scale)?.to_dtype(hidden.dtype())?);
        }
        if nll.is_empty() {
            return Ok((Tensor::zeros(0, candle_core::DType::F32, hidden.device())?, hidden.zeros_like()?));
        }
        Ok((Tensor::cat(&nll, 0)?, Tensor::cat(&of_hidden, 0)?))
    }

    /// Returns the gradient of the hidden states and, if the head is trained, of its weight.
    fn backward(&self, hidden: &Tensor, grad: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
        let (hidden, grad) = (hidden.detach(), grad.detach());
        let (frozen, is_trained) = (self.frozen(), self.head.weight.track_op());
        if self.targets.is_empty() {
            let of_weight = match &frozen.head.weight {
                Matrix::Dense(weight) if is_trained => Some(weight.zeros_like()?),
                _ => None,
            };
            return Ok((hidden.zeros_like()?, of_weight));
        }
        let (mut of_hidden, mut of_weight) = (Vec::new(), None);
        for (at, targets) in frozen.blocks(if is_trained { TRAINED_BLOCK } else { BLOCK }) {
            let logits = frozen.logits(&hidden, at, targets.len())?;
            let probabilities = ops::probabilities(&logits)?;
            let hits = Tensor::new(targets, hidden.device())?.unsqueeze(1)?;
            let minus_one = Tensor::full(-1f32, (targets.len(), 1), hidden.device())?;
            let of_logits = probabilities.scatter_add(&hits, &minus_one, 1)?;
            let of_logits = of_logits.broadcast_mul(&grad.narrow(0, at, targets.len())?.unsqueeze(1)?)?;
            let of_logits = (of_logits * self.logit_scale)?;
            of_hidden.push(frozen.head.backward(&of_logits, hidden.dtype())?);
            if is_trained {
                let block = hidden.narrow(0, at, targets.len())?.to_dtype(candle_core::DType::F32)?;
                let part = of_logits.t()?.matmul(&block)?;
                of_weight = Some(match of_weight {
                    Some(sum) => (sum + part)?,
                    None => part,
                });
            }
        }
        Ok((Tensor::cat(&of_hidden, 0)?, of_weight))
    }
}

/// Returns the negated log-probabilities of `targets`.
fn nll_of(logits: &Tensor, targets: &[u32]) -> Result<Tensor> {
    if ops::has_kernels(logits.device()) && !logits.track_op() {
        let nll: Vec<f32> = ops::logprobs(logits, targets)?.iter().map(|(_, logprob)| -*logprob as f32).collect();
        return Ok(Tensor::new(nll, logits.device())?);
    }
    let targets = Tensor::new(targets, logits.device())?.unsqueeze(1)?;
    Ok(ops::log_softmax(logits)?.gather(&targets, 1)?.squeeze(1)?.neg()?)
}
