//! Compares fused operations with their plain twins and with their definitions in f64.

use pricket::candle::{DType, Device, Tensor, Var};
use pricket::nn::CacheType;
use pricket::nn::ops;
use proptest::prelude::*;

use crate::common::worst;

/// An operation (`false`) or its plain twin (`true`).
type Op<'a> = &'a dyn Fn(bool) -> Tensor;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn rotary_and_attention_equal_their_plain_twins(
        batch in 1usize..3, heads in 1usize..4, groups in 1usize..3, queries in 1usize..80, past in 0usize..50,
        dim in 1usize..20, pairs in 0usize..20, odd: bool,
    ) {
        let (kv, keys, dim) = (heads, past + queries, 2 * dim);
        let heads = heads * groups;
        let randn = |shape: &[usize]| Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap();

        let pairs = pairs.min(dim / 2).max(1);
        let x = randn(&[batch, queries, heads + 3, dim]).narrow(2, 1, heads).unwrap();
        let (cos, sin) = (randn(&[1, queries, pairs]), randn(&[1, queries, pairs]));
        let turned = ops::rotary(&x, &cos, &sin).unwrap();
        prop_assert!(worst(&turned, &ops::plain_rotary(&x, &cos, &sin).unwrap()) < 1e-5);

        let q = randn(&[batch, heads, queries, dim]);
        // Keys and values as in a cache: part of a longer buffer.
        let (k, v) = (randn(&[batch, kv, keys + 7, dim]), randn(&[batch, kv, keys + 7, dim]));
        let (k, v) = (k.narrow(2, 0, keys).unwrap(), v.narrow(2, 0, keys).unwrap());
        // Half of the cases use ALiBi.
        let slopes = if odd { Vec::new() } else { pricket::nn::Alibi::new(heads, 8.0).slopes().to_vec() };
        let scores = ops::Scores { scale: 0.3, slopes: &slopes };
        let bias = ops::attention_bias(&slopes, past, queries, &Device::Cpu).unwrap();
        let rows = |k: &Tensor, v: &Tensor, kv: bool| (0..batch).map(|row| ops::AttentionRow {
            keys: k.clone(), values: v.clone(), at: if kv { (2 * row, 2 * row + 1) } else { (row, row) }, first: 0, len: keys, queries,
        }).collect::<Vec<_>>();
        let fused = ops::attention(&q, rows(&k, &v, false), scores).unwrap();
        let plain = ops::attention_output(&ops::attention_pattern(&q, &k, 0.3, bias.as_ref()).unwrap(), &v).unwrap();
        prop_assert!(worst(&fused, &plain) < 2e-5);

        for kind in [CacheType::F16, CacheType::BF16, CacheType::Q8_0] {
            // Each row as the state stores it, keys first.
            let kept: Vec<Tensor> = (0..batch).map(|row| kind.stored(&k, &v, row).unwrap()).collect();
            let wide = |at: usize| {
                let rows = kept.iter().map(|kept| ops::widened(&kept.narrow(0, at, 1).unwrap(), dim, DType::F32).unwrap());
                Tensor::cat(&rows.collect::<Vec<_>>(), 0).unwrap()
            };
            let (wide_k, wide_v) = (wide(0), wide(1));
            // The bound is half of the last of eight bits, relative to the largest value of a block, plus half of the
            // last of the eleven bits of the scale.
            let rounded = 0.5 / 127.0 + 1.002 / 2048.0;
            let largest = v.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
            prop_assert!(worst(&wide_v, &v) <= largest * rounded, "{kind}: {}", worst(&wide_v, &v));
            let kept = Tensor::cat(&kept, 0).unwrap();
            let fused = ops::attention(&q, rows(&kept, &kept, true), scores).unwrap();
            let pattern = ops::attention_pattern(&q, &wide_k, 0.3, bias.as_ref()).unwrap();
            let plain = ops::attention_output(&pattern, &wide_v).unwrap();
            prop_assert!(worst(&fused, &plain) < 2e-5, "{kind}: {}", worst(&fused, &plain));
        }
    }

    /// Attention of packed rows: values and gradients of the kernel and of plain operations row by row.
    #[test]
    fn attention_and_its_plain_twin_have_one_gradient(
        lens in prop::collection::vec(1usize..90, 1..4), kv in 1usize..3, groups in 1usize..3, dim in 1usize..40, odd: bool,
    ) {
        let (heads, time) = (kv * groups, lens.iter().sum::<usize>());
        let var = |heads: usize| Var::randn(0f32, 1.0, (1, time, heads, dim), &Device::Cpu).unwrap();
        let (q, k, v) = (var(heads), var(kv), var(kv));
        // Strided, as after splitting the heads.
        let split = |x: &Var| x.as_tensor().transpose(1, 2).unwrap();
        let slopes = if odd { Vec::new() } else { pricket::nn::Alibi::new(heads, 8.0).slopes().to_vec() };
        let scores = ops::Scores { scale: 0.3, slopes: &slopes };
        let mut at = 0;
        let spans: Vec<(usize, usize, usize)> = lens.iter().map(|&len| { at += len; (0, at - len, len) }).collect();
        let fused = ops::self_attention(&split(&q), &split(&k), &split(&v), spans.clone(), scores).unwrap();
        let plain = spans.iter().map(|&(_, from, len)| {
            let own = |x: &Var| split(x).narrow(2, from, len).unwrap();
            let bias = ops::attention_bias(&slopes, 0, len, &Device::Cpu).unwrap();
            let pattern = ops::attention_pattern(&own(&q), &own(&k), 0.3, bias.as_ref()).unwrap();
            ops::attention_output(&pattern, &own(&v)).unwrap()
        });
        let plain = Tensor::cat(&plain.collect::<Vec<_>>(), 1).unwrap();
        prop_assert!(worst(&fused, &plain) < 2e-5);
        let weights = Tensor::randn(0f32, 1.0, plain.shape(), &Device::Cpu).unwrap();
        let grads = |y: &Tensor| (y * &weights).unwrap().sum_all().unwrap().backward().unwrap();
        let (a, b) = (grads(&fused), grads(&plain));
        for x in [&q, &k, &v] {
            prop_assert!(worst(a.get(x).unwrap(), b.get(x).unwrap()) < 5e-5, "{}", worst(a.get(x).unwrap(), b.get(x).unwrap()));
        }
    }

    #[test]
    fn norms_and_products_have_the_gradients_of_their_plain_twins(rows in 1usize..9, dim in 2usize..300, wide in 1usize..80) {
        let var = |shape: &[usize]| Var::randn(0.3f32, 1.0, shape, &Device::Cpu).unwrap();
        let (x, w, b, m) = (var(&[rows, dim]), var(&[dim]), var(&[dim]), var(&[wide, dim]));
        let matrix = ops::Matrix::Dense(m.as_tensor().clone());
        let pairs = [
            (ops::layer_norm(&x, &w, &b, 1e-5).unwrap(), ops::plain_layer_norm(&x, &w, &b, 1e-5).unwrap()),
            (ops::rms_norm(&x, &w, 1e-5).unwrap(), ops::plain_rms_norm(&x, &w, 1e-5).unwrap()),
            (ops::linear(&x, &matrix, None, ops::ActivationPrecision::F32).unwrap(), ops::plain_linear(&x, &matrix, None).unwrap()),
            (
                ops::activate(&x, pricket::nn::Activation::GeluErf).unwrap(),
                pricket::nn::Activation::GeluErf.forward(&x).unwrap(),
            ),
        ];
        for (i, (fused, plain)) in pairs.iter().enumerate() {
            prop_assert!(worst(fused, plain) < 1e-4, "{i}");
            let weights = Tensor::randn(0f32, 1.0, plain.shape(), &Device::Cpu).unwrap();
            let grads = |y: &Tensor| (y * &weights).unwrap().sum_all().unwrap().backward().unwrap();
            let (fused, plain) = (grads(fused), grads(plain));
            for x in [&x, &w, &b, &m] {
                prop_assert_eq!(fused.get(x).is_some(), plain.get(x).is_some());
                if let (Some(a), Some(b)) = (fused.get(x), plain.get(x)) {
                    prop_assert!(worst(a, b) < 2e-4, "{i}: {}", worst(a, b));
                }
            }
        }
    }

    /// Compared with f64.
    #[test]
    fn rms_norm_and_its_plain_twin_are_exact(rows in 1usize..9, dim in 1usize..3000, mean in -50f32..50.0) {
        let (w, x) = (
            Tensor::randn(0f32, 1.0, dim, &Device::Cpu).unwrap(),
            Tensor::randn(mean, 0.5, (rows, dim), &Device::Cpu).unwrap(),
        );
        let exact: Vec<f32> = x.to_vec2::<f32>().unwrap().iter().flat_map(|row| {
            let square = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / dim as f64;
            row.iter().map(move |&x| (f64::from(x) / (square + 1e-6).sqrt()) as f32).collect::<Vec<_>>()
        }).collect();
        let exact = Tensor::from_vec(exact, (rows, dim), &Device::Cpu).unwrap().broadcast_mul(&w).unwrap();
        prop_assert!(worst(&ops::rms_norm(&x, &w, 1e-6).unwrap(), &exact) < 3e-6);
        prop_assert!(worst(&ops::plain_rms_norm(&x, &w, 1e-6).unwrap(), &exact) < 3e-5);
    }

    #[test]
    fn gates_and_mixes_and_their_gradients_are_those_of_their_twins(rows in 1usize..40, d in 1usize..40, silu: bool, loud: bool) {
        // The inputs are bounded, so the rounding is bounded: outputs are at most bound², and so is a gate times x·(1 −
        // sigmoid(x)) in its derivative.
        let bound = if loud { 30f32 } else { 1.0 };
        let rand = |shape: &[usize], bound: f32| Var::rand(-bound, bound, shape, &Device::Cpu).unwrap();
        let (x, y) = (rand(&[rows, d], bound), rand(&[rows, d], bound));
        let (mix, weight) = (rand(&[1, 1, d], 1.0), rand(&[rows, d], 1.0));
        let gate = if silu { ops::Gate::Silu } else { ops::Gate::Sigmoid };
        let gated = |plain| if plain { ops::plain_gated(&x, &y, gate) } else { ops::gated(&x, &y, gate) }.unwrap();
        let mixed = |plain| {
            let (x, y) = (x.reshape((1, rows, d)).unwrap(), y.reshape((1, rows, d)).unwrap());
            if plain { ops::plain_mix(&x, &y, &mix) } else { ops::mix(&x, &y, &mix) }.unwrap().squeeze(0).unwrap()
        };
        for (op, vars) in [(&gated as Op<'_>, vec![&x, &y]), (&mixed as Op<'_>, vec![&x, &y, &mix])] {
            prop_assert!(worst(&op(false), &op(true)) < 1e-6 * bound * bound);
            let grads = |plain| (op(plain) * weight.as_tensor()).unwrap().sum_all().unwrap().backward().unwrap();
            let (fused, plain) = (grads(false), grads(true));
            for var in vars {
                let (fused, plain) = (fused.get(var).unwrap(), plain.get(var).unwrap());
                prop_assert!(worst(fused, plain) < 1e-6 * bound * bound * rows as f32);
            }
        }
    }

    #[test]
    fn the_gradients_of_wkv_are_those_of_its_twin(lens in prop::collection::vec(1usize..30, 1..4), d in 1usize..40, loud: bool) {
        // Exponents are k − t·exp(decay), and their rounding grows with their size. Both are bounded.
        let (n, bound) = (lens.iter().sum::<usize>(), if loud { 30.0 } else { 2.0 });
        let rand = |shape: &[usize], bound: f32| Var::rand(-bound, bound, shape, &Device::Cpu).unwrap();
        let (k, v, decay, first) = (rand(&[n, d], bound), rand(&[n, d], 1.0), rand(&[d], 1.0), rand(&[d], 1.0));
        let weight = rand(&[n, d], 1.0);
        let start = Tensor::rand(0.5f32, 1.0, (3, d), &Device::Cpu).unwrap();
        let before = vec![start; lens.len()];
        let grads = |plain: bool| {
            let op = if plain { ops::plain_wkv4 } else { ops::wkv4 };
            let (out, after) = op(&k, &v, &decay, &first, &lens, &before).unwrap();
            assert!(after.iter().all(|state| !state.track_op()));
            (out * weight.as_tensor()).unwrap().sum_all().unwrap().backward().unwrap()
        };
        let (fused, plain) = (grads(false), grads(true));
        for var in [&k, &v, &decay, &first] {
            // With rows of one position there is no decay, so it has no gradient.
            let (fused, plain) = (fused.get(var).unwrap(), plain.get(var).cloned());
            let plain = &plain.unwrap_or_else(|| var.zeros_like().unwrap());
            let largest = plain.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
            prop_assert!(worst(fused, plain) < 2e-5 * largest.max(1.0), "{} of {largest}", worst(fused, plain));
        }
    }

    /// RWKV's recurrence by the kernel, by plain operations, and by its definition in f64.
    #[test]
    fn wkv_and_its_plain_twin_follow_the_definition(
        lens in prop::collection::vec(1usize..9, 1..4), d in 1usize..130, large: bool,
    ) {
        let n: usize = lens.iter().sum();
        let randn = |std: f32, shape: &[usize]| Tensor::randn(0f32, std, shape, &Device::Cpu).unwrap();
        // Includes keys whose exponentials overflow f32.
        let (k, v) = (randn(if large { 200.0 } else { 1.0 }, &[n, d]), randn(1.0, &[n, d]));
        let (decay, first) = (randn(1.0, &[d]), randn(1.0, &[d]));
        let start = vec![ops::wkv4_initial_state(d, &Device::Cpu).unwrap(); lens.len()];
        let fused = ops::wkv4(&k, &v, &decay, &first, &lens, &start).unwrap();
        let plain = ops::plain_wkv4(&k, &v, &decay, &first, &lens, &start).unwrap();
        prop_assert!(worst(&fused.0, &plain.0) < 1e-4);
        for (a, b) in fused.1.iter().zip(&plain.1) {
            prop_assert!(worst(a, b) < 1e-3);
        }
        if !large {
            let (k, v) = (k.to_vec2::<f32>().unwrap(), v.to_vec2::<f32>().unwrap());
            let (decay, first) = (decay.to_vec1::<f32>().unwrap(), first.to_vec1::<f32>().unwrap());
            let (mut exact, mut at) = (Vec::new(), 0);
            for len in lens {
                for t in at..at + len {
                    exact.extend((0..d).map(|c| {
                        let weight = |i: usize| {
                            let power = if i == t { first[c] } else { (t - 1 - i) as f32 * -decay[c].exp() };
                            f64::from(power + k[i][c]).exp()
                        };
                        let sum: f64 = (at..=t).map(|i| weight(i) * f64::from(v[i][c])).sum();
                        (sum / (at..=t).map(weight).sum::<f64>()) as f32
                    }));
                }
                at += len;
            }
            prop_assert!(worst(&fused.0, &Tensor::from_vec(exact, (n, d), &Device::Cpu).unwrap()) < 1e-4);
        }
    }

    /// Compared with f64, also where the mean is a hundred times the deviation and where the deviation is zero.
    #[test]
    fn norm_and_its_plain_twin_are_exact(rows in 1usize..9, dim in 1usize..3000, mean in -50f32..50.0, flat: bool) {
        let randn = |mean: f32, std: f32, shape: &[usize]| Tensor::randn(mean, std, shape, &Device::Cpu).unwrap();
        let (w, b) = (randn(0.0, 1.0, &[dim]), randn(0.0, 1.0, &[dim]));
        let x = randn(mean, if flat { 0.0 } else { 0.5 }, &[rows, dim]);
        let fused = ops::layer_norm(&x, &w, &b, 1e-5).unwrap();
        let exact: Vec<f64> = x.to_vec2::<f32>().unwrap().iter().flat_map(|row| {
            let row: Vec<f64> = row.iter().map(|&x| f64::from(x)).collect();
            let mean = row.iter().sum::<f64>() / dim as f64;
            let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / dim as f64;
            row.into_iter().map(move |x| (x - mean) / (variance + 1e-5).sqrt())
        }).collect();
        let exact = Tensor::from_vec(exact, (rows, dim), &Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
        let exact = exact.broadcast_mul(&w).unwrap().broadcast_add(&b).unwrap();
        let plain = ops::plain_layer_norm(&x, &w, &b, 1e-5).unwrap();
        prop_assert!(worst(&fused, &exact) < 3e-5, "fused: {}", worst(&fused, &exact));
        prop_assert!(worst(&plain, &exact) < 3e-5, "plain: {}", worst(&plain, &exact));
    }
}
