//! Operations with a value computed beforehand and a custom backward pass, and early freeing of tensors that the
//! backward pass does not read.

use std::sync::{Mutex, PoisonError};

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::op::BackpropOp;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp2, InplaceOp1, Layout, MetalStorage, Result, Shape, Storage, Tensor,
};

use crate::Error;

/// Gradients of two arguments.
pub(crate) type Pair = (Option<Tensor>, Option<Tensor>);

/// Returns a tensor with the given value and a custom backward pass.
///
/// If `value` is `None`, the tensor holds zeros in the shape of `a`. The backward pass calls
/// `back(a, gradient of the value)`, which returns the gradients of `a` and `b`. candle panics if a tracked argument
/// gets no gradient.
///
/// # Errors
/// Returns an error if `value` is on another device than `a`.
pub(crate) fn known<F>(a: &Tensor, b: &Tensor, value: Option<Tensor>, back: F) -> crate::Result<Tensor>
where
    F: Fn(&Tensor, &Tensor) -> crate::Result<Pair> + Send + Sync + 'static,
{
    Ok(a.apply_op2(b, Known { value: Mutex::new(value), back })?)
}

struct Known<F> {
    /// Value, until the forward pass has copied it.
    value: Mutex<Option<Tensor>>,
    back: F,
}

impl<F> Known<F> {
    /// Returns the value as storage and shape. `a` is the storage of the first argument.
    fn on<S: BackendStorage>(&self, a: &S, at: &Layout, of: impl Fn(&Storage) -> Option<&S>) -> Result<(S, Shape)>
    where
        S::Device: BackendDevice<Storage = S>,
    {
        let Some(value) = self.value.lock().unwrap_or_else(PoisonError::into_inner).take() else {
            return Ok((a.device().zeros_impl(at.shape(), a.dtype())?, at.shape().clone()));
        };
        let (storage, layout) = value.storage_and_layout();
        let Some(storage) = of(&storage) else {
            candle_core::bail!("the known value is on another device than the input")
        };
        Ok((storage.try_clone(layout)?, value.shape().clone()))
    }
}

impl<F: Fn(&Tensor, &Tensor) -> crate::Result<Pair> + Send + Sync> CustomOp2 for Known<F> {
    fn name(&self) -> &'static str {
        "known"
    }

    fn cpu_fwd(&self, a: &CpuStorage, at: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.on(a, at, |storage| if let Storage::Cpu(storage) = storage { Some(storage) } else { None })
    }

    fn cuda_fwd(&self, a: &CudaStorage, at: &Layout, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.on(a, at, |storage| if let Storage::Cuda(storage) = storage { Some(storage) } else { None })
    }

    fn metal_fwd(&self, a: &MetalStorage, at: &Layout, _: &MetalStorage, _: &Layout) -> Result<(MetalStorage, Shape)> {
        self.on(a, at, |storage| if let Storage::Metal(storage) = storage { Some(storage) } else { None })
    }

    fn bwd(&self, a: &Tensor, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Pair> {
        (self.back)(a, &grad.detach()).map_err(|e| match e {
            Error::Candle(e) => e,
            e => candle_core::Error::Msg(e.to_string()),
        })
    }
}

/// Moves the values of `x` into a new tensor, so that freeing the new tensor frees the memory. `x` stays in the graph;
/// reading its values afterwards is an error or a panic.
///
/// A variable, or a view of a part of a tensor, is not moved: the result shares its values.
///
/// # Errors
/// Returns an error if the placeholder, a single zero, cannot be allocated.
pub(crate) fn moved(x: &Tensor) -> crate::Result<Tensor> {
    // A variable is read by other blocks and later steps, and a view shares its storage with other tensors.
    let is_whole = x.layout().contiguous_offsets() == Some((0, x.elem_count()));
    if x.is_variable() || !is_whole {
        return Ok(x.detach());
    }
    let moving = Move { taken: Mutex::new(None) };
    x.inplace_op1(&moving)?;
    let taken = moving.taken.into_inner().unwrap_or_else(PoisonError::into_inner);
    let storage = taken.ok_or_else(|| Error::Input("the tensor has no storage to move".into()))?;
    Ok(Tensor::from_storage(storage, x.shape(), BackpropOp::none(), false))
}

struct Move {
    taken: Mutex<Option<Storage>>,
}

impl Move {
    fn run<S: BackendStorage>(&self, storage: &mut S, of: impl Fn(S) -> Storage) -> Result<()>
    where
        S::Device: BackendDevice<Storage = S>,
    {
        let zero = storage.device().zeros_impl(&Shape::from(1), storage.dtype())?;
        *self.taken.lock().unwrap_or_else(PoisonError::into_inner) = Some(of(std::mem::replace(storage, zero)));
        Ok(())
    }
}

impl InplaceOp1 for Move {
    fn name(&self) -> &'static str {
        "move"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> Result<()> {
        self.run(storage, Storage::Cpu)
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, _: &Layout) -> Result<()> {
        self.run(storage, Storage::Cuda)
    }

    fn metal_fwd(&self, storage: &mut MetalStorage, _: &Layout) -> Result<()> {
        self.run(storage, Storage::Metal)
    }
}
