use pricket::candle::{DType, Device, IndexOp, Tensor};
use pricket::lm::loss;
use pricket::nn::ops;
use pricket::{Cache, CacheType, CausalLm, Context, Loader, Site, Taps};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::common::{small, small_config, worst};

pub(crate) fn any_config() -> impl Strategy<Value = Value> {
    prop_oneof![any_neox(), any_mpt()]
}

/// What changes the maths of an MPT model, in both of its own spellings.
fn any_mpt() -> impl Strategy<Value = Value> {
    let attention = ["multihead_attention", "multiquery_attention", "grouped_query_attention"];
    let attention = prop::sample::select(attention.to_vec());
    let clip = prop::sample::select(vec![Value::Null, json!(0.5), json!(3)]);
    let scale = prop::sample::select(vec![Value::Null, json!("inv_sqrt_d_model"), json!(0.7)]);
    let heads = prop::sample::select(vec![2, 4, 6, 12]);
    let switches = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    (switches, heads, attention, clip, scale).prop_map(|((alibi, bias, qk_ln, mosaic), heads, attention, clip, scale)| {
        let common = json!({
            "d_model": 24, "n_heads": heads, "n_layers": 2, "max_seq_len": 96, "no_bias": !bias, "logit_scale": scale,
        });
        let own = if mosaic {
            json!({
                "model_type": "mosaic_gpt", "architectures": ["MosaicGPT"], "mlp_ratio": 2, "alibi": alibi,
                "attn_qk_ln": qk_ln, "attn_clip_qkv": clip, "alibi_bias_max": 16,
            })
        } else {
            json!({
                "model_type": "mpt", "architectures": ["MPTForCausalLM"], "expansion_ratio": 1.5,
                "attn_config": {
                    "alibi": alibi, "qk_ln": qk_ln, "clip_qkv": clip, "attn_type": attention, "kv_n_heads": 2,
                    "softmax_scale": 0.3,
                },
            })
        };
        let mut config = common;
        config.as_object_mut().unwrap().extend(own.as_object().unwrap().clone());
        config
    })
}

/// What changes the maths of a GPT-NeoX model.
fn any_neox() -> impl Strategy<Value = Value> {
    let share = prop::sample::select(vec![0.0, 0.25, 0.5, 1.0]);
    let gelu = prop::sample::select(vec!["gelu", "gelu_fast"]);
    (any::<bool>(), any::<bool>(), any::<bool>(), share, gelu).prop_map(|(parallel, tied, bias, share, gelu)| {
        json!({
            "use_parallel_residual": parallel, "tie_word_embeddings": tied, "attention_bias": bias,
            "rotary_pct": share, "hidden_act": gelu,
        })
    })
}

fn random_ids(batch: usize, len: usize, seed: u64) -> Tensor {
    let ids = (0..(batch * len) as u64).map(|i| (((i + 1) * (2 * seed + 7919)) % 61) as u32);
    Tensor::from_iter(ids, &Device::Cpu).unwrap().reshape((batch, len)).unwrap()
}

fn logits(model: &dyn CausalLm, ids: &Tensor, ctx: &mut Context) -> Tensor {
    model.head(&model.hidden(ids, ctx).unwrap()).unwrap()
}

fn cached() -> Context {
    Context::new().with_cache(Cache::new())
}

fn part(ids: &Tensor, from: usize, to: usize) -> Tensor {
    ids.narrow(1, from, to - from).unwrap().contiguous().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_split_through_the_cache_is_the_whole(
        config in any_config(), seed in 0u64..1000, batch in 1usize..3, mut cuts in prop::collection::vec(1usize..80, 0..5),
    ) {
        let model = small(&config, seed).model();
        let ids = random_ids(batch, 80, seed);
        let whole = logits(&*model, &ids, &mut Context::new());
        cuts.extend([0, 80]);
        cuts.sort_unstable();
        cuts.dedup();
        let mut ctx = cached();
        let parts: Vec<Tensor> = cuts.windows(2).map(|w| logits(&*model, &part(&ids, w[0], w[1]), &mut ctx)).collect();
        prop_assert!(worst(&Tensor::cat(&parts, 1).unwrap(), &whole) < 1e-5);
        prop_assert_eq!(ctx.position(), 80);
    }

    #[test]
    fn a_padded_batch_is_its_rows_alone(
        config in any_config(), seed in 0u64..1000, lens in prop::collection::vec(1usize..30, 2..5), more in 1usize..4,
    ) {
        let model = small(&config, seed).model();
        let longest = *lens.iter().max().unwrap();
        let rows: Vec<Tensor> = lens.iter().zip(0..).map(|(&len, i)| random_ids(1, len + more, seed + i)).collect();
        let padded: Vec<Tensor> = rows.iter().zip(&lens).map(|(row, &len)| {
            // What stands in the padding must not matter.
            let pad = Tensor::full(seed as u32 % 61, (1, longest - len), &Device::Cpu).unwrap();
            Tensor::cat(&[&pad, row], 1).unwrap()
        }).collect();
        let batch = Tensor::cat(&padded, 0).unwrap();
        let padding = lens.iter().map(|len| longest - len).collect();
        let mut ctx = cached().with_padding(padding);
        let first = logits(&*model, &part(&batch, 0, longest), &mut ctx);
        let rest = logits(&*model, &part(&batch, longest, longest + more), &mut ctx);
        let together = Tensor::cat(&[first, rest], 1).unwrap();
        for (i, (row, &len)) in rows.iter().zip(&lens).enumerate() {
            let alone = logits(&*model, row, &mut Context::new()).i(0).unwrap();
            let found = together.i(i).unwrap().narrow(0, longest - len, len + more).unwrap();
            prop_assert!(worst(&found, &alone) < 1e-5);
        }
    }

    #[test]
    fn truncating_and_going_on_is_starting_anew(seed in 0u64..1000, keep in 1usize..40, wrong in 1usize..30, more in 1usize..30) {
        let model = small(&json!({}), seed).model();
        let ids = random_ids(1, keep + more, seed);
        let whole = logits(&*model, &ids, &mut Context::new());
        let mut ctx = cached();
        logits(&*model, &part(&ids, 0, keep), &mut ctx);
        logits(&*model, &random_ids(1, wrong, seed + 1), &mut ctx);
        ctx.cache_mut().unwrap().truncate(keep);
        let rest = logits(&*model, &part(&ids, keep, keep + more), &mut ctx);
        prop_assert!(worst(&rest, &whole.narrow(1, keep, more).unwrap()) < 1e-5);
    }

    #[test]
    fn a_fork_leaves_its_parent_alone(seed in 0u64..1000, shared in 1usize..70, more in 1usize..20, parent_first: bool) {
        let model = small(&json!({}), seed).model();
        let ids = random_ids(1, shared, seed);
        let (a, b) = (random_ids(1, more, seed + 1), random_ids(1, more, seed + 2));
        let mut parent = cached();
        logits(&*model, &ids, &mut parent);
        let mut child = parent.fork();
        let (found_a, found_b) = if parent_first {
            let a = logits(&*model, &a, &mut parent);
            (a, logits(&*model, &b, &mut child))
        } else {
            let b = logits(&*model, &b, &mut child);
            (logits(&*model, &a, &mut parent), b)
        };
        for (tail, found) in [(a, found_a), (b, found_b)] {
            let whole = logits(&*model, &Tensor::cat(&[&ids, &tail], 1).unwrap(), &mut Context::new());
            prop_assert!(worst(&found, &whole.narrow(1, shared, more).unwrap()) < 1e-5);
        }
    }

    #[test]
    fn rotary_and_attention_equal_their_plain_twins(
        batch in 1usize..3, heads in 1usize..4, groups in 1usize..3, queries in 1usize..80, past in 0usize..50,
        dim in 1usize..20, pairs in 0usize..20, pad in 0usize..20,
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
        // Keys and values as they lie in a cache: a part of a longer buffer.
        let (k, v) = (randn(&[batch, kv, keys + 7, dim]), randn(&[batch, kv, keys + 7, dim]));
        let (k, v) = (k.narrow(2, 0, keys).unwrap(), v.narrow(2, 0, keys).unwrap());
        let padding: Vec<usize> = if pad == 0 { Vec::new() } else { (0..batch).map(|row| (pad * row).min(keys - 1)).collect() };
        // With ALiBi in half of the cases.
        let slopes = if pad % 2 == 0 { Vec::new() } else { pricket::nn::Alibi::new(heads, 8.0).slopes().to_vec() };
        let bias = ops::SharedBias::default();
        let scores = ops::Scores { scale: 0.3, slopes: &slopes, padding: &padding, bias: &bias };
        let fused = ops::attention(&q, &k, &v, scores).unwrap();
        let pattern = ops::attention_pattern(&q, &k, scores).unwrap();
        let plain = ops::attention_output(&pattern, &v).unwrap();
        prop_assert!(worst(&fused, &plain) < 2e-5);

        for dtype in [DType::F16, DType::BF16, DType::U8] {
            let width = if dtype == DType::U8 { ops::q8_row_bytes(dim) } else { dim };
            let stored = |x: &Tensor| {
                let stored = Tensor::zeros((batch, kv, keys + 7, width), dtype, &Device::Cpu).unwrap();
                ops::store(&stored, x, 0).unwrap();
                stored.narrow(2, 0, keys).unwrap()
            };
            let (kept_k, kept_v) = (stored(&k), stored(&v));
            let wide = ops::widened(&kept_v, dim, DType::F32).unwrap();
            // Half of the last bit of eight, of the largest of a block; and half of the last of the scale's eleven.
            let rounded = 0.5 / 127.0 + 1.002 / 2048.0;
            let largest = v.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
            prop_assert!(worst(&wide, &v) <= largest * rounded, "{dtype:?}: {}", worst(&wide, &v));
            let fused = ops::attention(&q, &kept_k, &kept_v, scores).unwrap();
            let plain = ops::attention_output(&ops::attention_pattern(&q, &kept_k, scores).unwrap(), &wide).unwrap();
            prop_assert!(worst(&fused, &plain) < 2e-5, "{dtype:?}: {}", worst(&fused, &plain));
        }
    }

    /// Against f64, also where the mean is a hundred times the deviation, and where there is no deviation at all.
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

/// The gradient reaches every parameter, and a step against it lowers the loss: nothing fused drops it on the way.
#[test]
fn gradients_reach_every_parameter_and_point_downhill() {
    for changes in [
        json!({"use_parallel_residual": true}),
        json!({"use_parallel_residual": false, "rotary_pct": 1.0}),
        json!({"tie_word_embeddings": true, "attention_bias": false, "hidden_act": "gelu_fast"}),
    ] {
        let store = std::sync::Arc::new(pricket::weights::Random::new(pricket::Dtype::F32, 3));
        let model = Loader::from_store(small_config(&changes), store).train().load().unwrap();
        let ids = random_ids(2, 20, 5);
        let before = loss(&*model.model(), &ids).unwrap();
        let grads = before.backward().unwrap();
        for parameter in model.parameters() {
            let grad = grads.get(&parameter.var).unwrap_or_else(|| panic!("{} has no gradient", parameter.name));
            let size = grad.abs().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(size > 0.0 && size.is_finite(), "{}: {size}", parameter.name);
            parameter.var.set(&(parameter.var.as_tensor() - (grad * 0.05).unwrap()).unwrap()).unwrap();
        }
        let after = loss(&*model.model(), &ids).unwrap().to_scalar::<f32>().unwrap();
        assert!(after < before.to_scalar::<f32>().unwrap(), "{after}");
    }
}

/// A frozen model passes gradients to what enters its residual stream, through every fused operation.
#[test]
fn gradients_pass_through_frozen_weights() {
    let changes = json!({"rotary_pct": 0.5});
    let frozen = small(&changes, 4).model();
    let store = std::sync::Arc::new(pricket::weights::Random::new(pricket::Dtype::F32, 4));
    let trained = Loader::from_store(small_config(&changes), store).train().load().unwrap().model();
    let x = pricket::candle::Var::randn(0f32, 1.0, (2, 9, 24), &Device::Cpu).unwrap();
    let run = |model: &dyn CausalLm| {
        let mut ctx = Context::new();
        let mut y = x.as_tensor().clone();
        for layer in 0..model.info().layers {
            y = model.block(layer, &y, &mut ctx).unwrap();
        }
        let logits = model.head(&model.finish(&y).unwrap()).unwrap();
        let score = logits.sqr().unwrap().sum_all().unwrap();
        score.backward().unwrap().get(&x).unwrap().clone()
    };
    let (a, b) = (run(&*frozen), run(&*trained));
    let size = b.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
    assert!(size > 0.0 && worst(&a, &b) < 1e-4 * size, "{} of {size}", worst(&a, &b));
}

#[test]
fn taps_record_and_edit_without_changing_what_they_do_not_touch() {
    let model = small(&json!({"use_parallel_residual": false}), 9).model();
    let ids = random_ids(2, 13, 1);
    let plain = model.hidden(&ids, &mut Context::new()).unwrap();
    let all = [
        Site::Embed,
        Site::ResidPre,
        Site::ResidMid,
        Site::ResidPost,
        Site::Query,
        Site::Key,
        Site::Value,
        Site::Pattern,
        Site::AttentionOut,
        Site::MlpOut,
        Site::FinalNorm,
    ];
    let taps = all.iter().fold(Taps::new(), |taps, &site| taps.record(site));
    let mut ctx = Context::new().with_taps(taps);
    let tapped = model.hidden(&ids, &mut ctx).unwrap();
    assert!(worst(&plain, &tapped) < 1e-5, "looking changes nothing");
    let recording = ctx.take_recording();
    assert_eq!(recording.iter().count(), 2 + 2 * 9);
    let get = |site, layer| recording.get(site, layer).unwrap();
    assert_eq!(get(Site::Pattern, 1).dims(), [2, 3, 13, 13]);
    assert_eq!(get(Site::Query, 0).dims(), [2, 3, 13, 8]);
    assert!(
        worst(&get(Site::Pattern, 0).sum(3).unwrap(), &Tensor::ones((2, 3, 13), DType::F32, &Device::Cpu).unwrap())
            < 1e-5
    );
    assert!(worst(get(Site::Embed, 0), get(Site::ResidPre, 0)) == 0.0);
    let mid = (get(Site::ResidPre, 1) + get(Site::AttentionOut, 1)).unwrap();
    assert!(worst(&mid, get(Site::ResidMid, 1)) < 1e-6);
    let post = (get(Site::ResidMid, 1) + get(Site::MlpOut, 1)).unwrap();
    assert!(worst(&post, get(Site::ResidPost, 1)) < 1e-6);
    assert!(worst(&tapped, get(Site::FinalNorm, 0)) == 0.0);

    // Patching the stream before layer 1 is running the rest of the model on the patch.
    let patch = Tensor::randn(0f32, 1.0, (2, 13, 24), &Device::Cpu).unwrap();
    let edit = patch.clone();
    let taps = Taps::new().edit(Site::ResidPre, move |layer, x| Ok(if layer == 1 { edit.clone() } else { x.clone() }));
    let patched = model.hidden(&ids, &mut Context::new().with_taps(taps)).unwrap();
    let rest = model.finish(&model.block(1, &patch, &mut Context::new()).unwrap()).unwrap();
    assert!(worst(&patched, &rest) < 1e-5);
}

#[test]
fn the_cache_grows_with_what_it_holds() {
    let model = small(&json!({"max_position_embeddings": 1 << 20}), 2).model();
    let mut ctx = cached();
    logits(&*model, &random_ids(1, 10, 1), &mut ctx);
    let per_position = model.info().cache_bytes_per_token() as usize;
    assert_eq!(ctx.cache().unwrap().bytes(), 64 * per_position);
    logits(&*model, &random_ids(1, 100, 1), &mut ctx);
    assert_eq!(ctx.cache().unwrap().bytes(), 128 * per_position);
}

#[test]
fn a_cache_in_half_precision_is_close() {
    let model = small(&json!({}), 2).model();
    let ids = random_ids(1, 30, 1);
    let whole = logits(&*model, &ids, &mut Context::new());
    for (kind, close) in [(CacheType::F16, 1e-3), (CacheType::BF16, 1e-2), (CacheType::Q8_0, 2e-2)] {
        let mut ctx = Context::new().with_cache(Cache::with_type(kind));
        let parts = [logits(&*model, &part(&ids, 0, 17), &mut ctx), logits(&*model, &part(&ids, 17, 30), &mut ctx)];
        let found = worst(&Tensor::cat(&parts, 1).unwrap(), &whole);
        assert!(found < close && found > 0.0, "{kind}: {found}");
    }
}

#[test]
fn positions_beyond_the_trained_length_are_refused_unless_asked_for() {
    let model = small(&json!({}), 2).model();
    let ids = random_ids(1, 97, 1);
    let error = model.hidden(&ids, &mut Context::new()).unwrap_err().to_string();
    assert!(error.contains("97") && error.contains("96"), "{error}");
    assert!(model.hidden(&ids, &mut Context::new().beyond_trained_length()).is_ok());
    // Padding takes no position.
    assert!(model.hidden(&ids, &mut Context::new().with_padding(vec![1])).is_ok());
}

#[test]
fn arguments_that_do_not_fit_are_errors() {
    let model = small(&json!({}), 2).model();
    assert!(model.hidden(&Tensor::new(&[[61u32]], &Device::Cpu).unwrap(), &mut Context::new()).is_err());
    assert!(model.hidden(&random_ids(2, 4, 0), &mut Context::new().with_padding(vec![1, 2, 3])).is_err());
    let request = pricket::lm::Request::greedy(vec![1, 61]);
    let error = pricket::lm::Generation::new(model.clone(), vec![request]).unwrap_err().to_string();
    assert!(error.contains("61"), "{error}");
    assert!(Context::new().with_padding(vec![1, 2]).select_rows(&[2]).is_err());
    let error = model.hidden(&random_ids(1, 4, 0), &mut Context::new().with_activations(DType::BF16)).unwrap_err();
    assert!(error.to_string().contains("bf16"), "{error}");
    let mut ctx = cached();
    logits(&*model, &random_ids(1, 4, 0), &mut ctx);
    let error = model.hidden(&random_ids(2, 4, 0), &mut ctx).unwrap_err().to_string();
    assert!(error.contains("the cache holds 1 rows"), "{error}");
}

#[test]
fn overflow_is_reported_with_its_layer() {
    // The second layer's output projection is infinite.
    struct Overflow(pricket::weights::Random);
    impl pricket::weights::Store for Overflow {
        fn names(&self) -> Vec<String> {
            self.0.names()
        }
        fn entry(&self, name: &str) -> Option<pricket::weights::Entry> {
            self.0.entry(name)
        }
        fn expect(&self, name: &str, shape: &[usize]) -> Option<pricket::weights::Entry> {
            self.0.expect(name, shape)
        }
        fn bytes(&self, name: &str) -> pricket::weights::Result<pricket::weights::Bytes<'_>> {
            let bytes = self.0.bytes(name)?.to_vec();
            let huge = name == "gpt_neox.layers.1.attention.dense.bias";
            Ok(if huge { f32::INFINITY.to_le_bytes().repeat(bytes.len() / 4) } else { bytes }.into())
        }
        fn origin(&self, name: &str) -> String {
            self.0.origin(name)
        }
    }
    let store = Overflow(pricket::weights::Random::new(pricket::Dtype::F32, 1));
    let model = Loader::from_store(small_config(&json!({})), std::sync::Arc::new(store)).load().unwrap();
    let mut generation = model.generation(vec![vec![1, 2, 3]], &pricket::GenerateOptions::default()).unwrap();
    let error = pricket::Error::from(generation.step().unwrap_err());
    assert!(matches!(error, pricket::Error::NonFinite { layer: Some(1), .. }), "{error}");
    assert!(error.to_string().contains("layer 1") && error.to_string().contains("f32"), "{error}");
    // Nor is it compared with a model that is in order, on either side.
    let (broken, sound) = (model.model(), small(&json!({}), 1).model());
    for (a, b) in [(&broken, &sound), (&sound, &broken)] {
        let error = pricket::lm::compare(&**a, &**b, &[1, 2, 3], 0, &pricket::ScoreOptions::default()).unwrap_err();
        assert!(matches!(error, pricket::lm::Error::NonFinite { layer: Some(1), .. }), "{error}");
    }
}

#[test]
fn loading_can_be_cancelled_and_watched() {
    use std::sync::atomic::{AtomicU64, Ordering};
    #[derive(Default)]
    struct Watch {
        total: AtomicU64,
        done: AtomicU64,
        stop_at: u64,
    }
    impl pricket::Progress for Watch {
        fn begin(&self, _: &str, total: u64, unit: &str) {
            assert_eq!(unit, "bytes");
            self.total.store(total, Ordering::Relaxed);
        }
        fn update(&self, done: u64) {
            self.done.store(done, Ordering::Relaxed);
        }
        fn cancelled(&self) -> bool {
            self.done.load(Ordering::Relaxed) >= self.stop_at
        }
    }
    let whole = std::sync::Arc::new(Watch { stop_at: u64::MAX, ..Watch::default() });
    Loader::tiny().progress(whole.clone()).load().unwrap();
    let (done, total) = (whole.done.load(Ordering::Relaxed), whole.total.load(Ordering::Relaxed));
    assert_eq!((done, total), (2 * 1_317_632, 2 * 1_317_632));
    let cut = std::sync::Arc::new(Watch { stop_at: total / 2, ..Watch::default() });
    assert!(matches!(Loader::tiny().progress(cut.clone()).load(), Err(pricket::Error::Cancelled)));
    assert!(cut.done.load(Ordering::Relaxed) < total);
}
