use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Storage, Tensor, bail};
use half::{bf16, f16};

use crate::blocks::{Blocks, dequantise};
use crate::cpu::path;
use crate::integer::{self, Activations};
use crate::matrix::Matrix;
use crate::packed::Packed;
use crate::pool::{parallel, parallel_chunks, scratch, threads};
use crate::product::{self, Kind, PANEL, Product, Rows, Start};
use crate::shared::{Shared, f32_slice};

/// Up to here inner products of whole rows, each weight read once; beyond, panels and a blocked matrix product.
const FEW_ROWS: usize = 16;

/// Columns of a product that are summed before the next: a panel of them stays in the second-level cache.
const DEPTH: usize = 1024;

/// Panels that a task packs before it multiplies, so that activations are read once for all of them.
const PANELS: usize = 4;

/// A row-major matrix of weights as they are stored.
#[derive(Clone, Copy, Debug)]
pub enum Stored<'a> {
    /// 32-bit float.
    F32(&'a [f32]),
    /// IEEE half.
    F16(&'a [f16]),
    /// bfloat16.
    BF16(&'a [bf16]),
    /// Quantised.
    Blocks(&'a Blocks),
    /// Quantised, in the kernels' own order.
    Packed(&'a Packed),
}

impl Stored<'_> {
    fn len(&self) -> usize {
        match self {
            Stored::F32(w) => w.len(),
            Stored::F16(w) => w.len(),
            Stored::BF16(w) => w.len(),
            Stored::Blocks(w) => w.shape().0 * w.shape().1,
            Stored::Packed(w) => w.shape().0 * w.shape().1,
        }
    }

    /// Rows `[from, to)` of `k`, as numbers that the products read: in place, or widened into `buffer`.
    fn rows(&self, from: usize, to: usize, k: usize, buffer: &mut Vec<f32>) -> Rows {
        let whole = |at: *const u8, kind: Kind| {
            let rows = Rows { at, kind, stride: k };
            // SAFETY: the row is inside of the slice, whose length was compared with the shape.
            unsafe { rows.skip(from, 0) }
        };
        match self {
            Stored::F32(w) => whole(w.as_ptr().cast(), Kind::F32),
            Stored::F16(w) => whole(w.as_ptr().cast(), Kind::F16),
            Stored::BF16(w) => whole(w.as_ptr().cast(), Kind::BF16),
            Stored::Blocks(w) => {
                buffer.resize((to - from) * k, 0.0);
                let (kind, bytes) = (w.kind(), w.bytes());
                dequantise(kind, &bytes[kind.bytes(from * k)..kind.bytes(to * k)], buffer);
                Rows { at: buffer.as_ptr().cast(), kind: Kind::F32, stride: k }
            }
            Stored::Packed(w) => {
                buffer.resize((to - from) * k, 0.0);
                w.widen(from, to, buffer);
                Rows { at: buffer.as_ptr().cast(), kind: Kind::F32, stride: k }
            }
        }
    }
}

/// `y = x Wᵀ + b` for `x` of `[rows, in_features]` and `weight` of `[out_features, in_features]`, in f32.
///
/// Runs on the installed [`Pool`](crate::Pool).
///
/// # Panics
/// If a slice does not have the size that the others imply.
pub fn linear(
    x: &[f32],
    weight: Stored<'_>,
    bias: Option<&[f32]>,
    in_features: usize,
    out_features: usize,
    y: &mut [f32],
) {
    let (k, n) = (in_features, out_features);
    let rows = x.len().checked_div(k).unwrap_or(0);
    assert_eq!(x.len(), rows * k, "activations do not fill their rows");
    assert_eq!(weight.len(), n * k, "weight is not [out_features, in_features]");
    assert_eq!(y.len(), rows * n, "output is not [rows, out_features]");
    assert!(bias.is_none_or(|b| b.len() == n), "bias is not [out_features]");
    let (path, out) = (path(), Shared::new(y));
    if rows <= FEW_ROWS {
        let step = n.div_ceil(8 * threads()).clamp(8, 256);
        return parallel(n.div_ceil(step), |task| {
            scratch(|buffer| {
                let (from, to) = (task * step, ((task + 1) * step).min(n));
                let w = weight.rows(from, to, k, buffer);
                // SAFETY: sizes were compared above; columns [from, to) of `y` belong to this task alone.
                unsafe {
                    let bias = bias.map(|bias| bias.as_ptr().add(from));
                    product::inner_products(path, w.kind, w, to - from, k, x.as_ptr(), rows, bias, out.at(from), n);
                }
            });
        });
    }
    let panels = n.div_ceil(PANEL).div_ceil(4 * threads()).clamp(1, PANELS);
    let step = panels * PANEL;
    parallel(n.div_ceil(step), |task| {
        let (from, to) = (task * step, ((task + 1) * step).min(n));
        let mut buffer = Vec::new();
        let w = weight.rows(from, to, k, &mut buffer);
        scratch(|packed| {
            packed.resize(panels * PANEL * DEPTH.min(k), 0.0);
            for deep in (0..k).step_by(DEPTH) {
                let depth = DEPTH.min(k - deep);
                for (i, first) in (from..to).step_by(PANEL).enumerate() {
                    let panel = packed[i * PANEL * depth..][..PANEL * depth].as_mut_ptr();
                    // SAFETY: rows and columns are there, and a panel was just measured.
                    unsafe {
                        let w = w.skip(first - from, deep);
                        product::pack(path, w.kind, w, PANEL.min(to - first), depth, panel);
                    }
                }
                // Rows that stay in the first-level cache while every panel meets them.
                for row in (0..rows).step_by(12) {
                    for (i, first) in (from..to).step_by(PANEL).enumerate() {
                        // SAFETY: as above; columns [from, to) of `y` belong to this task alone.
                        unsafe {
                            let start = match bias {
                                _ if deep > 0 => Start::Output,
                                Some(bias) => Start::Row(bias.as_ptr().add(first)),
                                None => Start::Zero,
                            };
                            let product = Product {
                                a: x.as_ptr().add(row * k + deep),
                                a_stride: k,
                                rows: 12.min(rows - row),
                                b: packed[i * PANEL * depth..].as_ptr(),
                                b_stride: PANEL,
                                k: depth,
                                c: out.at(row * n + first),
                                c_stride: n,
                                columns: PANEL.min(to - first),
                                start,
                            };
                            product.run(path);
                        }
                    }
                }
            }
        });
    });
}

/// `x = y W` for `y` of `[rows, out_features]`: the gradient of [`linear`] with respect to its activations.
///
/// # Panics
/// As [`linear`].
pub fn linear_transposed(y: &[f32], weight: Stored<'_>, in_features: usize, out_features: usize, x: &mut [f32]) {
    let (k, n) = (in_features, out_features);
    let rows = y.len().checked_div(n).unwrap_or(0);
    assert_eq!(y.len(), rows * n, "gradients do not fill their rows");
    assert_eq!(weight.len(), n * k, "weight is not [out_features, in_features]");
    assert_eq!(x.len(), rows * k, "output is not [rows, in_features]");
    let path = path();
    // Weights of a step, widened, stay in the second-level cache.
    let step = ((512 << 10) / 4 / k.max(1)).clamp(8, 256);
    // Each task owns some rows of `x` and walks the weight: no two tasks add to one element.
    let share = rows.div_ceil(threads()).max(1);
    parallel_chunks(x, share * k, |i, x| {
        let rows = x.len() / k;
        let y = &y[i * share * n..][..rows * n];
        let (mut buffer, mut wide) = (Vec::new(), Vec::new());
        for from in (0..n).step_by(step) {
            let to = (from + step).min(n);
            let w = weight.rows(from, to, k, &mut buffer);
            // Rows end in a whole panel, whatever `k` is.
            let width = k.next_multiple_of(PANEL);
            wide.resize((to - from) * width, 0f32);
            // SAFETY: rows of `w` are there, those of `wide` were just made, and `x` and `y` were measured.
            unsafe {
                product::widen_to(path, w.kind, w, to - from, k, wide.as_mut_ptr(), width);
                for column in (0..k).step_by(PANEL) {
                    let product = Product {
                        a: y.as_ptr().add(from),
                        a_stride: n,
                        rows,
                        b: wide.as_ptr().add(column),
                        b_stride: width,
                        k: to - from,
                        c: x.as_mut_ptr().add(column),
                        c_stride: k,
                        columns: PANEL.min(k - column),
                        start: if from == 0 { Start::Zero } else { Start::Output },
                    };
                    product.run(path);
                }
            }
        }
    });
}

/// [`linear`] as a candle op over f32 activations that owns its weight, `[out, in]` in f32, f16, bf16 or blocks on the CPU.
///
/// The backward pass gives the gradient of the activations only: the weight is frozen, and candle's own matrix
/// product would compute and keep a gradient of its size.
#[derive(Debug)]
pub struct LinearOp {
    /// The weight, `[out_features, in_features]`, contiguous.
    pub weight: Matrix,
    /// The bias, `[out_features]`, f32.
    pub bias: Option<Tensor>,
    /// Round activations as ggml does before it multiplies.
    pub as_ggml: bool,
    /// Multiply with the weight instead of its transpose: the backward pass.
    pub transposed: bool,
}

impl LinearOp {
    fn with_weight<R>(&self, f: impl FnOnce(Stored<'_>) -> R) -> Result<R> {
        let weight = match &self.weight {
            Matrix::Dense(weight) => weight,
            Matrix::Blocks(blocks) => return Ok(f(Stored::Blocks(blocks))),
            Matrix::Packed(packed) => return Ok(f(Stored::Packed(packed))),
        };
        let (storage, layout) = weight.storage_and_layout();
        let Storage::Cpu(storage) = &*storage else { bail!("linear: the weight is not on the CPU") };
        let Some((start, end)) = layout.contiguous_offsets() else { bail!("linear: the weight is not contiguous") };
        Ok(f(match storage {
            CpuStorage::F32(w) => Stored::F32(&w[start..end]),
            CpuStorage::F16(w) => Stored::F16(&w[start..end]),
            CpuStorage::BF16(w) => Stored::BF16(&w[start..end]),
            other => bail!("linear: weights of type {:?} are not multiplied here", candle_dtype(other)),
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
            bail!("linear: activations {dims:?} do not end in {inner}");
        }
        let mut shape = dims.to_vec();
        shape[dims.len() - 1] = outer;
        let rounded = (self.as_ggml && !self.transposed).then(|| rounded(x, &self.weight)).flatten();
        let x = rounded.as_deref().unwrap_or(x);
        let mut y = vec![0f32; x.len() / inner.max(1) * outer];
        self.with_weight(|w| -> Result<()> {
            if self.transposed {
                linear_transposed(x, w, k, n, &mut y);
                return Ok(());
            }
            let bias = self.bias.as_ref().map(Tensor::storage_and_layout);
            let bias = match &bias {
                None => None,
                Some((bias, layout)) => {
                    let Storage::Cpu(bias) = &**bias else { bail!("linear: the bias is not on the CPU") };
                    Some(f32_slice("linear bias", bias, layout)?)
                }
            };
            match w {
                Stored::Packed(w) => {
                    let x = Activations::new(x, k, w.kind(), w.form(), self.as_ggml, path());
                    integer::multiply(&x, w, bias, &mut y, path());
                }
                w => linear(x, w, bias, k, n, &mut y),
            }
            Ok(())
        })??;
        Ok((CpuStorage::F32(y), shape.into()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let op = LinearOp { weight: self.weight.clone(), bias: None, as_ggml: false, transposed: !self.transposed };
        Ok(Some(grad.detach().contiguous()?.apply_op1_no_bwd(&op)?))
    }
}

/// Activations as ggml's products see them: in the type of f16 and bf16 weights, and as integers of 8 bits with a scale for
/// every 32 (every 256 for the types of 256) beside quantised ones. `None` where it leaves them as they are.
fn rounded(x: &[f32], weight: &Matrix) -> Option<Vec<f32>> {
    match weight {
        Matrix::Dense(weight) => match weight.dtype() {
            DType::F16 => Some(x.iter().map(|&x| f16::from_f32(x).to_f32()).collect()),
            DType::BF16 => Some(x.iter().map(|&x| bf16::from_f32(x).to_f32()).collect()),
            _ => None,
        },
        Matrix::Packed(_) => None,
        Matrix::Blocks(blocks) => {
            let width = blocks.kind().elements().max(32);
            let mut out = x.to_vec();
            for block in out.chunks_mut(width) {
                let most = block.iter().fold(0f32, |most, x| most.max(x.abs()));
                let d = most / 127.0;
                let inverse = if d > 0.0 { 1.0 / d } else { 0.0 };
                let d = if width == 32 { f16::from_f32(d).to_f32() } else { d };
                for x in block.iter_mut() {
                    *x = (*x * inverse).round() * d;
                }
            }
            Some(out)
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

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
            let y = x.apply_op1(LinearOp { weight: Matrix::Dense(w.clone()), bias: b.clone(), as_ggml: false, transposed: false }).unwrap();
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
    fn quantised_weights_are_multiplied_as_their_values() {
        use candle_core::quantized::{GgmlDType, QTensor};

        use crate::BlockType;

        let w = Tensor::randn(0f32, 1.0, (37, 256), &Device::Cpu).unwrap();
        for (kind, theirs) in [(BlockType::Q4_0, GgmlDType::Q4_0), (BlockType::Q6K, GgmlDType::Q6K)] {
            let bytes = QTensor::quantize(&w, theirs).unwrap().data().unwrap().into_owned();
            let blocks = Matrix::Blocks(Blocks::new(kind, 37, 256, bytes));
            let dense = blocks.to_dense(DType::F32, &Device::Cpu).unwrap();
            for rows in [1, 3, 20] {
                let x = Var::from_tensor(&Tensor::randn(0f32, 1.0, (rows, 256), &Device::Cpu).unwrap()).unwrap();
                let y = x
                    .apply_op1(LinearOp { weight: blocks.clone(), bias: None, as_ggml: false, transposed: false })
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
                as_ggml: false,
                transposed: false,
            })
            .unwrap();
        let grads = y.sum_all().unwrap().backward().unwrap();
        assert!(grads.get(&w).is_none() && grads.get(&x).is_some());
    }
}
