//! Deferred computation of parts of a block in the backward pass, which lowers the peak memory of gradient
//! checkpointing.
//!
//! Gradient checkpointing computes each block a second time to obtain its gradients. If nothing else in the block
//! depends on the output of attention or the MLP, that part is deferred: it runs when the gradient of its output is
//! known, and its intermediate tensors are freed before the next part runs.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};

use crate::known::{known, moved};
use crate::{Error, Result};

/// Gradients of variables found by deferred parts, and tensors to free when the backward pass starts.
#[derive(Clone, Debug, Default)]
pub(crate) struct Deferred {
    found: Arc<Mutex<Vec<GradStore>>>,
    /// Tensors whose values the backward pass does not read.
    unread: Arc<Mutex<Vec<Tensor>>>,
}

impl Deferred {
    /// Returns the gradients of all variables on which `y` depends, including those in deferred parts. `grad` is the
    /// gradient of `y`.
    pub(crate) fn backward(&self, y: &Tensor, grad: Tensor) -> Result<GradStore> {
        for tensor in take(&self.unread) {
            drop(moved(&tensor)?);
        }
        let mut all = backward_from(y, grad)?;
        for found in take(&self.found) {
            all.extend(found)?;
        }
        Ok(all)
    }

    /// Returns zeros instead of `part(x, ctx)`, which runs in the backward pass when the gradient of its output is
    /// known.
    ///
    /// `part` returns a tensor of the shape of `x`. `is_last_reader` is true if nothing else reads the values of `x` in
    /// the backward pass.
    pub(crate) fn defer<C, F>(&self, x: &Tensor, is_last_reader: bool, ctx: C, part: F) -> Result<Tensor>
    where
        C: Send + 'static,
        F: Fn(&Tensor, &mut C) -> Result<Tensor> + Send + Sync + 'static,
    {
        // A tracked argument makes candle call the backward pass even if only the part, and not `x`, depends on
        // variables.
        let variable = Var::from_tensor(&Tensor::zeros((), x.dtype(), x.device())?)?.into_inner();
        let (all, ctx) = (self.clone(), Mutex::new(ctx));
        let zeros = known(x, &variable.clone(), None, move |x, grad| {
            let nothing = Some(variable.zeros_like()?);
            let mut ctx = ctx.lock().unwrap_or_else(PoisonError::into_inner);
            let is_tracked = x.track_op();
            // A new variable ends the backward pass of the part at `x`.
            let x = if is_tracked && !x.is_variable() {
                let values = if is_last_reader { moved(x)? } else { x.detach() };
                Var::from_tensor(&values)?.into_inner()
            } else {
                x.clone()
            };
            let y = part(&x, &mut ctx)?;
            if !y.track_op() {
                return Ok((None, nothing));
            }
            // candle has summed the gradient into a new tensor, so it can be moved.
            let mut found = backward_from(&y, moved(grad)?)?;
            let of_x = found.remove(&x);
            all.found.lock().unwrap_or_else(PoisonError::into_inner).push(found);
            if is_tracked && of_x.is_none() {
                return Err(Error::Input(
                    "the output of a deferred part of a block does not depend on its input".into(),
                ));
            }
            Ok((of_x, nothing))
        })?;
        self.release_later(&zeros);
        Ok(zeros)
    }

    /// Frees the memory of `x` when the backward pass starts, which must not read its values.
    pub(crate) fn release_later(&self, x: &Tensor) {
        self.unread.lock().unwrap_or_else(PoisonError::into_inner).push(x.clone());
    }
}

fn take<T>(list: &Mutex<Vec<T>>) -> Vec<T> {
    std::mem::take(&mut *list.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Returns the gradients of all variables on which `y` depends. `grad` is the gradient of `y`.
fn backward_from(y: &Tensor, grad: Tensor) -> Result<GradStore> {
    let value = Tensor::zeros((), y.dtype(), y.device())?;
    let grad = Mutex::new(Some(grad));
    let end = known(y, &value.clone(), Some(value), move |_, _| {
        // Moved instead of copied, so that it is freed right after its use.
        Ok((grad.lock().unwrap_or_else(PoisonError::into_inner).take(), None))
    })?;
    Ok(end.backward()?)
}
