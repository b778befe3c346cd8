//! Parts of a block that are computed in the backward pass only.
//!
//! Gradient checkpointing computes a block a second time to go back through it. Where nothing else in the block depends on the value
//! of its attention or its MLP, that part is left out at first: it is computed when the gradient of its value is known, and what it
//! has held is freed before the next part is computed.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};

use crate::known::{known, moved};
use crate::{Error, Result};

/// The gradients of variables that deferred parts have found.
#[derive(Clone, Debug, Default)]
pub(crate) struct Deferred {
    found: Arc<Mutex<Vec<GradStore>>>,
    /// Tensors whose values the backward pass does not read.
    unread: Arc<Mutex<Vec<Tensor>>>,
}

impl Deferred {
    /// Goes back from `y`, whose gradient is `grad`, and through what was deferred.
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

    /// Returns zeros in the place of `part(x)`, which is computed with `ctx` when its gradient is known. `part` returns a tensor of
    /// the shape of `x`. `is_last_reader` says that nothing else reads the values of `x` in the backward pass.
    pub(crate) fn defer<C, F>(&self, x: &Tensor, is_last_reader: bool, ctx: C, part: F) -> Result<Tensor>
    where
        C: Send + 'static,
        F: Fn(&Tensor, &mut C) -> Result<Tensor> + Send + Sync + 'static,
    {
        // The part may depend on variables where `x` does not.
        let variable = Var::from_tensor(&Tensor::zeros((), x.dtype(), x.device())?)?.into_inner();
        let (all, ctx) = (self.clone(), Mutex::new(ctx));
        let zeros = known(x, &variable.clone(), None, move |x, grad| {
            let nothing = Some(variable.zeros_like()?);
            let mut ctx = ctx.lock().unwrap_or_else(PoisonError::into_inner);
            let is_tracked = x.track_op();
            // The part's own backward pass ends here.
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
            // candle has summed it into a tensor of its own.
            let mut found = backward_from(&y, moved(grad)?)?;
            let of_x = found.remove(&x);
            all.found.lock().unwrap_or_else(PoisonError::into_inner).push(found);
            if is_tracked && of_x.is_none() {
                return Err(Error::Input("a part of a block does not depend on its input".into()));
            }
            Ok((of_x, nothing))
        })?;
        self.release_later(&zeros);
        Ok(zeros)
    }

    /// Frees the memory of `x` when the backward pass begins, because it does not read its values.
    pub(crate) fn release_later(&self, x: &Tensor) {
        self.unread.lock().unwrap_or_else(PoisonError::into_inner).push(x.clone());
    }
}

fn take<T>(list: &Mutex<Vec<T>>) -> Vec<T> {
    std::mem::take(&mut *list.lock().unwrap_or_else(PoisonError::into_inner))
}

/// The gradients of what `y` depends on, where that of `y` is `grad`.
fn backward_from(y: &Tensor, grad: Tensor) -> Result<GradStore> {
    let value = Tensor::zeros((), y.dtype(), y.device())?;
    let grad = Mutex::new(Some(grad));
    let end = known(y, &value.clone(), Some(value), move |_, _| {
        // Given away rather than copied, so that it is freed as soon as it was used.
        Ok((grad.lock().unwrap_or_else(PoisonError::into_inner).take(), None))
    })?;
    Ok(end.backward()?)
}
