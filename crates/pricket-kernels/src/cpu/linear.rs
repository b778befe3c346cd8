//! Linear layers as candle operations: `y = x Wᵀ + b`, with a frozen weight of any stored type or a trained f32 weight.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, DType, Device, Layout, Result, Shape, Storage, Tensor, bail};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::cpu::dense::{Gemm, blocked, linear_transposed};
use crate::cpu::detect::isa;
use crate::cpu::gelu::GeluOp;
use crate::cpu::operands::{Begin, Left, Right, Stored};
use crate::cpu::pool::zeros;
use crate::cpu::quantized_activations::QuantizedActivations;
use crate::cpu::quantized_gemm;
use crate::cpu::shared::f32_slice;
use crate::matrix::Matrix;

/// Precision of activations in products with a frozen weight, on the CPU. Sums are always in f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ActivationPrecision {
    /// Activations stay f32; the logits are those of f32 weights.
    #[default]
    F32,
    /// Activations and weights are rounded to bfloat16, as in torch's bfloat16 products, where the processor has such
    /// products. With many rows that is AVX-512 BF16 for float weights, and AMX for quantized weights too. With few
    /// rows it applies to bfloat16 weights only. Elsewhere the same as `F32`.
    BF16,
    /// Activations are rounded as in ggml. For packed weights they become 8-bit integers with a scale for every 32 of
    /// them (256 for weight types with 256-element blocks). For f16 and bf16 weights they are rounded to the type of
    /// the weight.
    Q8,
}

/// [`linear`](crate::linear) as a candle operation over f32 activations. It owns its weight,
/// `[out_features, in_features]`, in f32, f16, bf16 or quantized blocks, on the CPU.
///
/// The backward pass computes the gradient of the activations only, because the weight is frozen. Candle's own matrix
/// product would also compute and keep a gradient of the size of the weight.
#[derive(Clone, Debug)]
pub struct LinearOp {
    /// The weight, `[out_features, in_features]`, contiguous.
    pub weight: Matrix,
    /// The bias, `[out_features]`, f32.
    pub bias: Option<Tensor>,
    /// Precision of the activations.
    pub activations: ActivationPrecision,
    /// Multiplies by the weight instead of its transpose. Used in the backward pass.
    pub transposed: bool,
    /// Function applied to the result. With one, the operation has no backward pass.
    pub then: Option<GeluOp>,
}

impl LinearOp {
    fn with_weight<R>(&self, f: impl FnOnce(Stored<'_>) -> R) -> Result<R> {
        let weight = match &self.weight {
            Matrix::Dense(weight) => weight,
            Matrix::Blocks(blocks) => return Ok(f(Stored::Blocks(blocks))),
            Matrix::FourBit(matrix) => return Ok(f(Stored::FourBit(matrix))),
            Matrix::Packed(packed) => return Ok(f(Stored::Packed(packed))),
            Matrix::InPlace(matrix) => return matrix.with_stored(f),
        };
        let (storage, layout) = weight.storage_and_layout();
        let Storage::Cpu(storage) = &*storage else { bail!("linear: expected a weight on the CPU") };
        let Some((start, end)) = layout.contiguous_offsets() else { bail!("linear: expected a contiguous weight") };
        Ok(f(match storage {
            CpuStorage::F32(w) => Stored::F32(&w[start..end]),
            CpuStorage::F16(w) => Stored::F16(&w[start..end]),
            CpuStorage::BF16(w) => Stored::BF16(&w[start..end]),
            other => bail!("linear: weights of type {:?} are not supported", candle_dtype(other)),
        }))
    }
}

fn candle_dtype(storage: &CpuStorage) -> DType {
    use candle_core::backend::BackendStorage;
    storage.dtype()
}

impl CustomOp1 for LinearOp {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = f32_slice("linear", storage, layout)?;
        let (n, k) = self.weight.shape()?;
        let (inner, outer) = if self.transposed { (n, k) } else { (k, n) };
        let dims = layout.dims();
        if dims.last() != Some(&inner) {
            bail!("linear: expected activations of [.., {inner}], got {dims:?}");
        }
        if let Some(bias) = self.bias.as_ref().filter(|bias| bias.dims() != [n]) {
            bail!("linear: a bias of shape {:?} does not fit a weight of [{n}, {k}]", bias.dims());
        }
        let mut shape = dims.to_vec();
        shape[dims.len() - 1] = outer;
        let rounded = (self.activations == ActivationPrecision::Q8 && !self.transposed)
            .then(|| rounded(x, &self.weight))
            .flatten();
        let x = rounded.as_deref().unwrap_or(x);
        let mut y = zeros(x.len() / inner.max(1) * outer);
        self.with_weight(|w| -> Result<()> {
            if self.transposed {
                linear_transposed(x, w, k, n, &mut y);
                return Ok(());
            }
            let bias = self.bias.as_ref().map(Tensor::storage_and_layout);
            let bias = match &bias {
                None => None,
                Some((bias, layout)) => {
                    let Storage::Cpu(bias) = &**bias else { bail!("linear: expected a bias on the CPU") };
                    Some(f32_slice("linear bias", bias, layout)?)
                }
            };
            #[cfg(target_arch = "x86_64")]
            if self.activations == ActivationPrecision::BF16 {
                let product = Gemm::new(x, w, bias, (k, n), &mut y).then(self.then);
                if product.run_bf16().is_none() {
                    return Ok(());
                }
            }
            match w {
                Stored::Packed(w) => {
                    let x = QuantizedActivations::new(
                        x,
                        k,
                        w.kind(),
                        w.form(),
                        self.activations == ActivationPrecision::Q8,
                        isa(),
                    );
                    quantized_gemm::multiply(&x, w, bias, self.then, &mut y, isa());
                }
                w => Gemm::new(x, w, bias, (k, n), &mut y).then(self.then).run(),
            }
            Ok(())
        })??;
        Ok((CpuStorage::F32(y), shape.into()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        if self.then.is_some() {
            bail!("linear: the backward pass does not support a function of the result");
        }
        let op = LinearOp {
            weight: self.weight.clone(),
            bias: None,
            activations: ActivationPrecision::F32,
            transposed: !self.transposed,
            then: None,
        };
        Ok(Some(grad.detach().contiguous()?.apply_op1_no_bwd(&op)?))
    }
}

/// [`linear`](crate::linear) as a candle operation over f32 activations and a trained f32 weight,
/// `[out_features, in_features]`. The values are those of [`LinearOp`]; the backward pass computes the gradients of
/// both operands.
#[derive(Clone, Copy, Debug)]
pub struct TrainedLinearOp;

impl CustomOp2 for TrainedLinearOp {
    fn name(&self) -> &'static str {
        "trained-linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_at: &Layout,
        weight: &CpuStorage,
        weight_at: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, weight) = (f32_slice("linear", x, x_at)?, f32_slice("linear weight", weight, weight_at)?);
        let (&[n, k], dims) = (weight_at.dims(), x_at.dims()) else {
            bail!("linear: expected a weight of [out, in], got {:?}", weight_at.dims())
        };
        if dims.last() != Some(&k) {
            bail!("linear: expected activations of [.., {k}], got {dims:?}");
        }
        let mut shape = dims.to_vec();
        shape[dims.len() - 1] = n;
        let mut y = zeros(x.len() / k.max(1) * n);
        Gemm::new(x, Stored::F32(weight), None, (k, n), &mut y).run();
        Ok((CpuStorage::F32(y), shape.into()))
    }

    fn bwd(&self, x: &Tensor, weight: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (x, weight, grad) = (x.detach(), weight.detach(), grad.detach().contiguous()?);
        let (n, k) = weight.dims2()?;
        let op = LinearOp {
            weight: Matrix::Dense(weight),
            bias: None,
            activations: ActivationPrecision::F32,
            transposed: true,
            then: None,
        };
        let of_x = grad.apply_op1_no_bwd(&op)?;
        let rows = x.elem_count() / k.max(1);
        let of_weight = with_slices([&grad, &x.contiguous()?], |[g, x]| outer_product((g, n), (x, k), rows))?;
        Ok((Some(of_x), Some(of_weight)))
    }
}

/// Calls `f` with the elements of contiguous f32 tensors on the CPU.
pub(crate) fn with_slices<const N: usize, R>(
    tensors: [&Tensor; N],
    f: impl FnOnce([&[f32]; N]) -> Result<R>,
) -> Result<R> {
    let storages = tensors.map(Tensor::storage_and_layout);
    let mut slices = [&[][..]; N];
    for (slice, (storage, layout)) in slices.iter_mut().zip(&storages) {
        let Storage::Cpu(storage) = &**storage else { bail!("linear: expected operands on the CPU") };
        *slice = f32_slice("linear", storage, layout)?;
    }
    f(slices)
}

/// Returns `lᵀ r` for `l` of `[rows, down]` and `r` of `[rows, across]`, each given with its width. Used for the
/// gradient of a weight.
pub(crate) fn outer_product((l, down): (&[f32], usize), (r, across): (&[f32], usize), rows: usize) -> Result<Tensor> {
    if across < down {
        // Only the left factor is transposed for the product, so it should be the smaller one.
        return outer_product((r, across), (l, down), rows)?.t()?.contiguous();
    }
    let mut sum = zeros(down * across);
    let left = Left { at: l, row: 1, column: down };
    blocked(left, down, Right::Columns(Stored::F32(r)), (rows, across), Begin::Zero, None, &mut sum);
    Tensor::from_vec(sum, (down, across), &Device::Cpu)
}

/// Rounds activations to the type of an f16 or bf16 weight, as ggml does. Returns `None` if they stay as they are, or
/// if the product rounds them itself.
fn rounded(x: &[f32], weight: &Matrix) -> Option<Vec<f32>> {
    match weight.dtype()? {
        DType::F16 => {
            let (mut halves, mut wide) = (vec![f16::ZERO; x.len()], vec![0f32; x.len()]);
            halves.convert_from_f32_slice(x);
            halves.convert_to_f32_slice(&mut wide);
            Some(wide)
        }
        DType::BF16 => Some(x.iter().map(|&x| bf16::from_f32(x).to_f32()).collect()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;

    fn twin(x: &Tensor, w: &Tensor, b: Option<&Tensor>) -> Tensor {
        let y = x.broadcast_matmul(&w.to_dtype(DType::F32).unwrap().t().unwrap()).unwrap();
        b.map_or(y.clone(), |b| y.broadcast_add(b).unwrap())
    }

    fn worst(a: &Tensor, b: &Tensor) -> f32 {
        (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(48))]
        #[test]
        fn equals_its_plain_twin(rows in 1usize..40, k in 1usize..150, n in 1usize..150, kind in 0usize..3, bias: bool) {
            let dtype = [DType::F32, DType::F16, DType::BF16][kind];
            let x = Tensor::randn(0f32, 1.0, (rows, k), &Device::Cpu).unwrap();
            let w = Tensor::randn(0f32, 1.0, (n, k), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
            let b = bias.then(|| Tensor::randn(0f32, 1.0, n, &Device::Cpu).unwrap());
            let x = Var::from_tensor(&x).unwrap();
            let y = x.apply_op1(LinearOp { weight: Matrix::Dense(w.clone()), bias: b.clone(), activations: ActivationPrecision::F32, transposed: false, then: None }).unwrap();
            let reference = twin(&x, &w, b.as_ref());
            proptest::prop_assert!(worst(&y, &reference) < 2e-4);

            let cotangent = Tensor::randn(0f32, 1.0, (rows, n), &Device::Cpu).unwrap();
            let gradient = |y: &Tensor| {
                let loss = (y * &cotangent).unwrap().sum_all().unwrap();
                loss.backward().unwrap().get(&x).unwrap().clone()
            };
            proptest::prop_assert!(worst(&gradient(&y), &gradient(&reference)) < 2e-4);
        }
    }

    #[test]
    fn a_bias_of_another_length_is_refused() {
        let weight = Tensor::zeros((40, 32), DType::F32, &Device::Cpu).unwrap();
        for (rows, activations) in
            [1, 4, 64].into_iter().zip([ActivationPrecision::F32, ActivationPrecision::BF16, ActivationPrecision::Q8])
        {
            for dtype in [DType::F32, DType::F16, DType::BF16] {
                let bias = Tensor::zeros(39, DType::F32, &Device::Cpu).unwrap();
                let weight = Matrix::Dense(weight.to_dtype(dtype).unwrap());
                let op = LinearOp { weight, bias: Some(bias), activations, transposed: false, then: None };
                let x = Tensor::zeros((rows, 32), DType::F32, &Device::Cpu).unwrap();
                let said = x.apply_op1(op).unwrap_err().to_string();
                assert!(said.contains("a bias of shape [39] does not fit a weight of [40, 32]"), "{said}");
            }
        }
    }

    #[test]
    fn quantized_weights_are_multiplied_as_their_values() {
        use candle_core::quantized::{GgmlDType, QTensor};

        use crate::{BlockType, Blocks};

        let w = Tensor::randn(0f32, 1.0, (37, 256), &Device::Cpu).unwrap();
        for (kind, theirs) in [(BlockType::Q4_0, GgmlDType::Q4_0), (BlockType::Q6K, GgmlDType::Q6K)] {
            let bytes = QTensor::quantize(&w, theirs).unwrap().data().unwrap().into_owned();
            let blocks = Matrix::Blocks(Blocks::new(kind, 37, 256, bytes));
            let dense = blocks.to_dense(DType::F32, &Device::Cpu).unwrap();
            for rows in [1, 3, 20] {
                let x = Var::from_tensor(&Tensor::randn(0f32, 1.0, (rows, 256), &Device::Cpu).unwrap()).unwrap();
                let y = x
                    .apply_op1(LinearOp {
                        weight: blocks.clone(),
                        bias: None,
                        activations: ActivationPrecision::F32,
                        transposed: false,
                        then: None,
                    })
                    .unwrap();
                let reference = twin(&x, &dense, None);
                assert!(worst(&y, &reference) < 2e-4);
                let gradient = |y: &Tensor| y.sum_all().unwrap().backward().unwrap().get(&x).unwrap().clone();
                assert!(worst(&gradient(&y), &gradient(&reference)) < 2e-4);
            }
        }
    }

    #[test]
    fn the_backward_pass_keeps_no_gradient_of_the_weight() {
        let w = Var::from_tensor(&Tensor::ones((3, 2), DType::F32, &Device::Cpu).unwrap()).unwrap();
        let x = Var::from_tensor(&Tensor::ones((1, 2), DType::F32, &Device::Cpu).unwrap()).unwrap();
        let y = x
            .apply_op1(LinearOp {
                weight: Matrix::Dense(w.as_tensor().clone()),
                bias: None,
                activations: ActivationPrecision::F32,
                transposed: false,
                then: None,
            })
            .unwrap();
        let grads = y.sum_all().unwrap().backward().unwrap();
        assert!(grads.get(&w).is_none() && grads.get(&x).is_some());
    }
}
