//! A linear layer with a low-rank adapter (LoRA, Hu et al. 2021, arXiv:2106.09685) as one candle operation.

use candle_core::{CpuStorage, CustomOp1, CustomOp3, Layout, Result, Shape, Storage, Tensor, bail};

use crate::cpu::dense::blocked;
use crate::cpu::gelu::GeluOp;
use crate::cpu::linear::{LinearOp, outer_product, with_slices};
use crate::cpu::operands::{Begin, Left, Right, Stored};
use crate::cpu::pool::zeros;
use crate::cpu::shared::f32_slice;

/// A linear layer with a low-rank adapter: `y = x Wᵀ + b + s (x Aᵀ) Bᵀ`, over f32 activations.
///
/// `A` is `[rank, inputs]` and `B` is `[outputs, rank]`, both in f32. The backward pass computes the gradients of `x`,
/// `A` and `B`. With an activation function `f` of the input, `f(x)` takes the place of `x`. It is computed again in
/// the backward pass rather than kept.
#[derive(Debug)]
pub struct LoraOp {
    /// The frozen layer: `W` and `b`.
    pub base: LinearOp,
    /// The activation function `f` of the input.
    pub of: Option<GeluOp>,
    /// The factor `s` of the adapter.
    pub scale: f32,
    /// Whether to compute the result. If false, the result is zeros and no products are computed: for callers that need
    /// the backward pass only.
    pub has_value: bool,
}

/// Sizes of the operands.
struct Sizes {
    rows: usize,
    inputs: usize,
    outputs: usize,
    rank: usize,
}

impl LoraOp {
    fn sizes(&self, x: &Layout, a: &Layout, b: &Layout) -> Result<Sizes> {
        let (outputs, inputs) = self.base.weight.shape()?;
        match (x.dims().last(), a.dims(), b.dims()) {
            (Some(&k), &[rank, across], &[down, low]) if (k, across, down, low) == (inputs, inputs, outputs, rank) => {
                Ok(Sizes { rows: x.shape().elem_count() / inputs.max(1), inputs, outputs, rank })
            }
            _ => bail!(
                "lora: x {:?}, a {:?} and b {:?} do not fit a weight of [{outputs}, {inputs}]",
                x.dims(),
                a.dims(),
                b.dims()
            ),
        }
    }

    /// Returns `s x Aᵀ`, `[rows, rank]`.
    fn low(&self, x: &[f32], a: &[f32], of: &Sizes) -> Vec<f32> {
        let mut low = zeros(of.rows * of.rank);
        let left = Left { at: x, row: of.inputs, column: 1 };
        blocked(left, of.rows, Right::Rows(Stored::F32(a)), (of.inputs, of.rank), Begin::Zero, None, &mut low);
        for low in &mut low {
            *low *= self.scale;
        }
        low
    }
}

impl CustomOp3 for LoraOp {
    fn name(&self) -> &'static str {
        "lora"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_at: &Layout,
        a: &CpuStorage,
        a_at: &Layout,
        b: &CpuStorage,
        b_at: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let of = self.sizes(x_at, a_at, b_at)?;
        if !self.has_value {
            let mut shape = x_at.dims().to_vec();
            shape[x_at.dims().len() - 1] = of.outputs;
            // Zeroed pages that are never written take no memory.
            return Ok((CpuStorage::F32(vec![0.0; of.rows * of.outputs]), shape.into()));
        }
        let (a, b) = (f32_slice("lora a", a, a_at)?, f32_slice("lora b", b, b_at)?);
        let input = match self.of {
            Some(gelu) => Some(CpuStorage::F32(gelu.of(f32_slice("lora", x, x_at)?))),
            None => None,
        };
        let (x, x_at) = match &input {
            Some(input) => (input, &Layout::contiguous(x_at.shape())),
            None => (x, x_at),
        };
        let (base, shape) = self.base.cpu_fwd(x, x_at)?;
        let CpuStorage::F32(mut y) = base else { bail!("lora: expected an f32 product") };
        let x = f32_slice("lora", x, x_at)?;
        let low = self.low(x, a, &of);
        let left = Left { at: &low, row: of.rank, column: 1 };
        blocked(left, of.rows, Right::Rows(Stored::F32(b)), (of.rank, of.outputs), Begin::Output, None, &mut y);
        Ok((CpuStorage::F32(y), shape))
    }

    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let of = self.sizes(x.layout(), a.layout(), b.layout())?;
        let (rows, rank) = (of.rows, of.rank);
        let grad = grad.detach().contiguous()?;
        with_slices([&x.detach().contiguous()?, a, b, &grad], |[x_at, a_at, b_at, g]| {
            // s g B, which the gradients of both A and x need.
            let mut back = zeros(rows * rank);
            let left = Left { at: g, row: of.outputs, column: 1 };
            blocked(left, rows, Right::Columns(Stored::F32(b_at)), (of.outputs, rank), Begin::Zero, None, &mut back);
            for back in &mut back {
                *back *= self.scale;
            }

            let input = self.of.map(|gelu| gelu.of(x_at));
            let own = input.as_deref().unwrap_or(x_at);
            let of_a = outer_product((&back, rank), (own, of.inputs), rows)?;
            let of_b = outer_product((g, of.outputs), (&self.low(own, a_at, &of), rank), rows)?;
            drop(input);
            let of_x = x.track_op().then(|| -> Result<Tensor> {
                let transposed = LinearOp { transposed: true, bias: None, then: None, ..self.base.clone() };
                let (storage, layout) = grad.storage_and_layout();
                let Storage::Cpu(storage) = &*storage else { bail!("lora: expected a gradient on the CPU") };
                let (CpuStorage::F32(mut of_x), _) = transposed.cpu_fwd(storage, layout)? else {
                    bail!("lora: expected an f32 product")
                };
                let left = Left { at: &back, row: rank, column: 1 };
                let right = Right::Columns(Stored::F32(a_at));
                blocked(left, rows, right, (rank, of.inputs), Begin::Output, None, &mut of_x);
                if let Some(gelu) = self.of {
                    gelu.back(x_at, &mut of_x);
                }
                Tensor::from_vec(of_x, x.shape(), x.device())
            });
            Ok((of_x.transpose()?, Some(of_a), Some(of_b)))
        })
    }
}

/// [`LinearOp`] with zeros as its result: for callers that need the backward pass only.
#[derive(Debug)]
pub struct BackwardOnlyOp(pub LinearOp);

impl CustomOp1 for BackwardOnlyOp {
    fn name(&self) -> &'static str {
        "linear-backward-only"
    }

    fn cpu_fwd(&self, x: &CpuStorage, at: &Layout) -> Result<(CpuStorage, Shape)> {
        f32_slice("linear", x, at)?;
        let (outputs, inputs) = self.0.weight.shape()?;
        let mut shape = at.dims().to_vec();
        let Some(last) = shape.last_mut().filter(|last| **last == inputs) else {
            bail!("linear: expected activations of [.., {inputs}], got {:?}", at.dims())
        };
        *last = outputs;
        let count = shape.iter().product();
        Ok((CpuStorage::F32(vec![0.0; count]), shape.into()))
    }

    fn bwd(&self, x: &Tensor, y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        self.0.bwd(x, y, grad)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::*;
    use crate::{ActivationPrecision, Gelu, Matrix};

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(32))]
        #[test]
        fn equals_its_plain_twin(rows in 1usize..70, k in 1usize..90, n in 1usize..90, rank in 1usize..20, bias: bool, gelu: bool) {
            let random = |shape: (usize, usize)| Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap();
            let (w, g) = (random((n, k)), random((rows, n)));
            let bias = bias.then(|| random((1, n)).squeeze(0).unwrap());
            let [x, a, b] = [(rows, k), (rank, k), (n, rank)].map(|shape| Var::from_tensor(&random(shape)).unwrap());
            let base = LinearOp {
                weight: Matrix::Dense(w.clone()), bias: bias.clone(), activations: ActivationPrecision::F32, transposed: false, then: None,
            };
            let of = gelu.then_some(GeluOp { form: Gelu::Tanh, as_ggml: false });
            let op = |has_value| LoraOp { base: base.clone(), of, scale: 0.5, has_value };
            let found = x.apply_op3(&a, &b, op(true)).unwrap();
            let input = if gelu { x.gelu().unwrap() } else { x.as_tensor().clone() };
            let low = input.matmul(&a.t().unwrap()).unwrap().matmul(&b.t().unwrap()).unwrap();
            let plain = (input.matmul(&w.t().unwrap()).unwrap() + (low * 0.5).unwrap()).unwrap();
            let plain = bias.map_or(plain.clone(), |bias| plain.broadcast_add(&bias).unwrap());
            let worst = |a: &Tensor, b: &Tensor| {
                (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap()
            };
            proptest::prop_assert!(worst(&found, &plain) < 1e-3);
            let gradients = |y: &Tensor| (y * &g).unwrap().sum_all().unwrap().backward().unwrap();
            let expected = gradients(&plain);
            for y in [found, x.apply_op3(&a, &b, op(false)).unwrap()] {
                let found = gradients(&y);
                for var in [&x, &a, &b] {
                    proptest::prop_assert!(worst(found.get(var).unwrap(), expected.get(var).unwrap()) < 2e-3);
                }
            }
            let only = BackwardOnlyOp(base.clone());
            let (of_only, of_all) = (gradients(&x.apply_op1(only).unwrap()), gradients(&x.apply_op1(base.clone()).unwrap()));
            proptest::prop_assert_eq!(worst(of_only.get(&x).unwrap(), of_all.get(&x).unwrap()), 0.0);
        }
    }

    #[test]
    fn operands_that_do_not_fit_are_refused() {
        let zeros = |shape: (usize, usize)| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
        let base = LinearOp {
            weight: Matrix::Dense(zeros((3, 4))),
            bias: None,
            activations: ActivationPrecision::F32,
            transposed: false,
            then: None,
        };
        let op = LoraOp { base, of: None, scale: 1.0, has_value: true };
        assert!(zeros((2, 4)).apply_op3_no_bwd(&zeros((2, 5)), &zeros((3, 2)), &op).is_err());
        assert!(zeros((2, 4)).apply_op3_no_bwd(&zeros((2, 4)), &zeros((3, 1)), &op).is_err());
        assert!(zeros((2, 4)).apply_op3_no_bwd(&zeros((2, 4)), &zeros((3, 2)), &op).is_ok());
    }
}
