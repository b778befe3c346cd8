//! The WKV recurrence of RWKV-4, with its gradient.

#![allow(clippy::undocumented_unsafe_blocks, reason = "arithmetic; its only condition is documented at the trait")]
#![allow(clippy::inline_always, reason = "it must be compiled with the instruction set of its caller")]

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};

use crate::cpu::detect::isa;
use crate::cpu::isa::by_isa;
use crate::cpu::lanes::{Floats, LANES};
use crate::cpu::pool::{parallel, zeros};
use crate::cpu::shared::{Shared, f32_slice};

/// Number of elements (positions times channels) below which the work stays on the calling thread.
const ALONE: usize = 8 << 10;

/// The WKV recurrence of RWKV-4 (Peng et al. 2023, arXiv:2305.13048, equation 16), over keys and values of
/// `[positions, channels]`, f32 and contiguous. In each channel, with `w = -e^decay`, a position gives an output and
/// then updates the state:
///
/// - `out_t = (num + e^(first + k_t) v_t) / (den + e^(first + k_t))`
/// - `num = e^w num + e^(k_t) v_t`
/// - `den = e^w den + e^(k_t)`
///
/// Numerator and denominator are kept divided by `e^max`, so that nothing overflows. The rows of the batch follow each
/// other. Each row has its own state, `[num, den, max]`.
///
/// Inputs: keys, values, and `[2, channels]` with the decays and the `first` of the channels. Output:
/// `[positions + 3 · rows, channels]`, the outputs of all positions and then the state of each row after its last
/// position.
///
/// The backward pass computes the gradients of keys, values, decays and `first` from the gradient of the positions'
/// outputs. States have no gradient.
#[derive(Clone, Debug)]
pub struct WkvOp {
    /// Number of positions of each row.
    pub lens: Vec<usize>,
    /// The initial states, `[rows, 3, channels]`.
    pub states: Vec<f32>,
}

/// Sixteen channels of a row: their place, and the distance between positions.
#[derive(Clone, Copy)]
struct Channels<'a> {
    k: &'a [f32],
    v: &'a [f32],
    /// Index of the first position's elements.
    from: usize,
    len: usize,
    stride: usize,
    /// Number of channels; the rest of the sixteen lanes are padding.
    width: usize,
    decay: [f32; LANES],
    first: [f32; LANES],
    /// Numerator, denominator and maximum.
    state: [[f32; LANES]; 3],
}

impl Channels<'_> {
    /// Loads the elements of position `t` of `x`.
    #[inline(always)]
    fn load(&self, x: &[f32], t: usize) -> [f32; LANES] {
        let at = self.from + t * self.stride;
        if let Some(whole) = x[at..].first_chunk::<LANES>().filter(|_| self.width == LANES) {
            return *whole;
        }
        let mut out = [0f32; LANES];
        out[..self.width].copy_from_slice(&x[at..at + self.width]);
        out
    }

    /// Writes the elements `x` of a position to index `at`.
    ///
    /// # Safety
    /// Nothing else accesses these elements.
    #[inline(always)]
    unsafe fn write(&self, out: Shared<'_, f32>, at: usize, x: [f32; LANES]) {
        // SAFETY: nothing else accesses these elements, as the caller promises.
        unsafe { out.slice(at, self.width) }.copy_from_slice(&x[..self.width]);
    }
}

#[inline(always)]
unsafe fn negative<L: Floats>(x: L::Float) -> L::Float {
    unsafe { L::mul(x, L::splat(-1.0)) }
}

/// Returns `e^(a - max)`, `e^(b - max)` and `max`, the maximum of `a` and `b`.
#[inline(always)]
unsafe fn shares<L: Floats>(a: L::Float, b: L::Float) -> (L::Float, L::Float, L::Float) {
    unsafe {
        let top = L::max(a, b);
        let less = negative::<L>(top);
        (L::exp(L::add(a, less)), L::exp(L::add(b, less)), top)
    }
}

/// Intermediate values of a position, which the backward pass also needs.
struct Step<F> {
    /// `e^(max - top)` and `e^(first + k - top)`, where `top` is the larger exponent.
    old: F,
    new: F,
    top: F,
    /// The denominator divided by `e^top`.
    den: F,
    out: F,
}

#[inline(always)]
unsafe fn step<L: Floats>(state: &[L::Float; 3], first: L::Float, k: L::Float, v: L::Float) -> Step<L::Float> {
    unsafe {
        let [num, den, max] = *state;
        let (old, new, top) = shares::<L>(max, L::add(first, k));
        let den = L::madd(old, den, new);
        let out = L::div(L::madd(old, num, L::mul(new, v)), den);
        Step { old, new, top, den, out }
    }
}

/// Updates the state with a position. Returns the factors of the previous state and of the position in the new state.
#[inline(always)]
unsafe fn advance<L: Floats>(state: &mut [L::Float; 3], w: L::Float, k: L::Float, v: L::Float) -> (L::Float, L::Float) {
    unsafe {
        let [num, den, max] = *state;
        let (old, new, top) = shares::<L>(L::add(max, w), k);
        *state = [L::madd(old, num, L::mul(new, v)), L::madd(old, den, new), top];
        (old, new)
    }
}

#[inline(always)]
unsafe fn forward<L: Floats>(at: Channels<'_>, out: Shared<'_, f32>, after: [usize; 3]) {
    unsafe {
        let (w, first) = (L::floats(at.decay.as_ptr()), L::floats(at.first.as_ptr()));
        let [num, den, max] = &at.state;
        let mut state = [L::floats(num.as_ptr()), L::floats(den.as_ptr()), L::floats(max.as_ptr())];
        let mut edge = [0f32; LANES];
        for t in 0..at.len {
            let (k, v) = (at.load(at.k, t), at.load(at.v, t));
            let (k, v) = (L::floats(k.as_ptr()), L::floats(v.as_ptr()));
            L::store(edge.as_mut_ptr(), step::<L>(&state, first, k, v).out);
            at.write(out, at.from + t * at.stride, edge);
            advance::<L>(&mut state, w, k, v);
        }
        for (x, place) in state.into_iter().zip(after) {
            L::store(edge.as_mut_ptr(), x);
            at.write(out, place, edge);
        }
    }
}

/// Writes the gradients of keys and values, and those of `w` and `first` summed over the row, to the four places of
/// `out`.
#[inline(always)]
unsafe fn backward<L: Floats>(at: Channels<'_>, grad: &[f32], out: Shared<'_, f32>, places: [usize; 4]) {
    unsafe {
        let (w, first) = (L::floats(at.decay.as_ptr()), L::floats(at.first.as_ptr()));
        let zero = L::splat(0.0);
        let [num, den, max] = &at.state;
        let mut state = [L::floats(num.as_ptr()), L::floats(den.as_ptr()), L::floats(max.as_ptr())];
        // Derivatives of the numerator and of the denominator by `w`, divided by `e^max` as these are.
        let (mut num_w, mut den_w) = (zero, zero);
        let (mut of_w, mut of_first) = (zero, zero);
        // The forward pass again: keeps each position's output, its gradient divided by the denominator, and its
        // largest exponent.
        let mut kept: Vec<[L::Float; 3]> = Vec::with_capacity(at.len);
        for t in 0..at.len {
            let (k, v, g) = (at.load(at.k, t), at.load(at.v, t), at.load(grad, t));
            let (k, v, g) = (L::floats(k.as_ptr()), L::floats(v.as_ptr()), L::floats(g.as_ptr()));
            let Step { old, new, top, den, out } = step::<L>(&state, first, k, v);
            let share = L::div(g, den);
            // d out / d first = e^(first + k) (v - out) / den
            let own = L::mul(share, L::mul(new, L::add(v, negative::<L>(out))));
            of_first = L::add(of_first, own);
            // d out / d w = (num_w - out den_w) / den
            let by_w = L::madd(negative::<L>(out), den_w, num_w);
            of_w = L::madd(L::mul(share, old), by_w, of_w);
            kept.push([out, share, top]);
            let before = state;
            let (old, _) = advance::<L>(&mut state, w, k, v);
            num_w = L::mul(old, L::add(num_w, before[0]));
            den_w = L::mul(old, L::add(den_w, before[1]));
        }
        // The backward pass: gradients of numerator and denominator from the outputs of later positions, divided by
        // `e^top`.
        let (mut num, mut den, mut top) = (zero, zero, L::splat(-1e38));
        let mut edge = [0f32; LANES];
        for (t, [given, share, largest]) in kept.into_iter().enumerate().rev() {
            let (k, v) = (at.load(at.k, t), at.load(at.v, t));
            let (k, v) = (L::floats(k.as_ptr()), L::floats(v.as_ptr()));
            let own = L::mul(share, L::exp(L::add(L::add(first, k), negative::<L>(largest))));
            let later = L::exp(L::add(k, top));
            let position = at.from + t * at.stride;
            let of_k = L::madd(later, L::madd(v, num, den), L::mul(own, L::add(v, negative::<L>(given))));
            L::store(edge.as_mut_ptr(), of_k);
            at.write(out, places[0] + position, edge);
            L::store(edge.as_mut_ptr(), L::madd(later, num, own));
            at.write(out, places[1] + position, edge);
            let (old, new, largest) = shares::<L>(L::add(top, w), negative::<L>(largest));
            let share = L::mul(new, share);
            num = L::madd(old, num, share);
            den = L::madd(old, den, negative::<L>(L::mul(share, given)));
            top = largest;
        }
        for (x, place) in [of_w, of_first].into_iter().zip(&places[2..]) {
            L::store(edge.as_mut_ptr(), x);
            at.write(out, *place, edge);
        }
    }
}

by_isa! {
    /// # Safety
    /// No other thread accesses the places of these channels.
    unsafe fn dispatch(at: Channels<'_>, out: Shared<'_, f32>, after: [usize; 3]) = forward
}

by_isa! {
    /// # Safety
    /// No other thread accesses the places of these channels.
    unsafe fn dispatch_back(at: Channels<'_>, grad: &[f32], out: Shared<'_, f32>, places: [usize; 4]) = backward
}

impl WkvOp {
    /// Calls `f` for every sixteen channels of every row, with the row, the first channel and the [`Channels`].
    fn each(
        &self,
        (k, k_at): (&[f32], &Layout),
        (v, v_at): (&[f32], &Layout),
        rates: &[f32],
        f: impl Fn(usize, usize, Channels<'_>) + Sync,
    ) -> Result<()> {
        let &[n, d] = k_at.dims() else { bail!("wkv: expected [positions, channels], got {:?}", k_at.dims()) };
        let rows = self.lens.len();
        if v_at.dims() != [n, d]
            || self.lens.iter().sum::<usize>() != n
            || (rates.len(), self.states.len()) != (2 * d, rows * 3 * d)
        {
            bail!("wkv: keys {:?}, values {:?}, rates and states do not fit {rows} rows", k_at.dims(), v_at.dims());
        }
        let starts: Vec<usize> = self
            .lens
            .iter()
            .scan(0, |at, len| {
                *at += len;
                Some(*at - len)
            })
            .collect();
        let parts = d.div_ceil(LANES);
        let one = |task: usize| {
            let (row, c) = (task / parts, task % parts * LANES);
            let width = LANES.min(d - c);
            let lanes = |x: &[f32], at: usize| -> [f32; LANES] {
                std::array::from_fn(|i| if i < width { x[at + i] } else { 0.0 })
            };
            let at = Channels {
                k,
                v,
                from: starts[row] * d + c,
                len: self.lens[row],
                stride: d,
                width,
                decay: lanes(rates, c).map(|decay| -decay.exp()),
                first: lanes(rates, d + c),
                state: std::array::from_fn(|part| lanes(&self.states, (row * 3 + part) * d + c)),
            };
            f(row, c, at);
        };
        if n * d < ALONE {
            (0..rows * parts).for_each(one);
        } else {
            parallel(rows * parts, one);
        }
        Ok(())
    }
}

impl CustomOp3 for WkvOp {
    fn name(&self) -> &'static str {
        "wkv"
    }

    fn cpu_fwd(
        &self,
        k: &CpuStorage,
        k_at: &Layout,
        v: &CpuStorage,
        v_at: &Layout,
        rates: &CpuStorage,
        rates_at: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (keys, values) = (f32_slice("wkv keys", k, k_at)?, f32_slice("wkv values", v, v_at)?);
        let rates = f32_slice("wkv rates", rates, rates_at)?;
        let (rows, d) = (self.lens.len(), rates.len() / 2);
        let n = keys.len() / d.max(1);
        let mut out = zeros((n + 3 * rows) * d);
        let shared = Shared::new(&mut out);
        self.each((keys, k_at), (values, v_at), rates, |row, c, at| {
            let after = std::array::from_fn(|part| (n + 3 * row + part) * d + c);
            // SAFETY: the channels of a row belong to one task.
            unsafe { dispatch(isa(), at, shared, after) };
        })?;
        Ok((CpuStorage::F32(out), (n + 3 * rows, d).into()))
    }

    fn bwd(
        &self,
        k: &Tensor,
        v: &Tensor,
        rates: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (n, d) = k.dims2()?;
        let [decay, first] = [0, 1].map(|i| rates.detach().get(i));
        let (decay, first) = (decay?, first?);
        let rates = Tensor::stack(&[&decay, &first], 0)?.flatten_all()?.to_vec1()?;
        let op = WkvBackwardOp { of: self.clone(), rates };
        let grad = grad.detach().narrow(0, 0, n)?.contiguous()?;
        let all = k.detach().contiguous()?.apply_op3_no_bwd(&v.detach().contiguous()?, &grad, &op)?;
        let rows = self.lens.len();
        let by_rate = all.narrow(0, 2 * n, 2 * rows)?.reshape((rows, 2, d))?.sum(0)?;
        // The derivative of w = -e^decay by decay is w.
        let of_decay = (by_rate.get(0)? * decay.exp()?.neg()?)?;
        let of_rates = Tensor::stack(&[of_decay, by_rate.get(1)?], 0)?;
        Ok((Some(all.narrow(0, 0, n)?), Some(all.narrow(0, n, n)?), Some(of_rates)))
    }
}

/// The gradients of [`WkvOp`]: `[2 · positions + 2 · rows, channels]`, those of keys, then those of values, then for
/// each row those of `w` and of `first`.
#[derive(Debug)]
struct WkvBackwardOp {
    of: WkvOp,
    rates: Vec<f32>,
}

impl CustomOp3 for WkvBackwardOp {
    fn name(&self) -> &'static str {
        "wkv-backward"
    }

    fn cpu_fwd(
        &self,
        k: &CpuStorage,
        k_at: &Layout,
        v: &CpuStorage,
        v_at: &Layout,
        grad: &CpuStorage,
        grad_at: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (keys, values) = (f32_slice("wkv keys", k, k_at)?, f32_slice("wkv values", v, v_at)?);
        let grad = f32_slice("wkv gradient", grad, grad_at)?;
        let (rows, d) = (self.of.lens.len(), self.rates.len() / 2);
        let n = keys.len() / d.max(1);
        if grad.len() != n * d {
            bail!("wkv: a gradient of shape {:?} does not fit keys of {:?}", grad_at.dims(), k_at.dims());
        }
        let mut out = zeros((2 * n + 2 * rows) * d);
        let shared = Shared::new(&mut out);
        self.of.each((keys, k_at), (values, v_at), &self.rates, |row, c, at| {
            let places = [0, n * d, (2 * n + 2 * row) * d + c, (2 * n + 2 * row + 1) * d + c];
            // SAFETY: the channels of a row belong to one task.
            unsafe { dispatch_back(isa(), at, grad, shared, places) };
        })?;
        Ok((CpuStorage::F32(out), (2 * n + 2 * rows, d).into()))
    }
}
