//! State, packed rows, taps and gradients.

use pricket::candle::{DType, Device, IndexOp, Tensor, Var};
use pricket::lm::loss;
use pricket::nn::{CacheType, State};
use pricket::{CausalLm, Context, Loader, Site, Taps};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::common::{small, small_config, worst};

pub(crate) fn any_config() -> impl Strategy<Value = Value> {
    prop_oneof![any_neox(), any_mpt(), any_llama(), any_rwkv(), any_toy()]
}

/// LLaMA configurations over the keys that change its output.
fn any_llama() -> impl Strategy<Value = Value> {
    let heads = prop::sample::select(vec![(4, 4), (4, 2), (3, 1)]);
    let head_dim = prop::sample::select(vec![Value::Null, json!(10), json!(16)]);
    (heads, head_dim, any::<bool>(), any::<bool>(), any::<bool>()).prop_map(
        |((heads, kv_heads), head_dim, attention_bias, mlp_bias, tied)| {
            let mut config = json!({
                "model_type": "llama", "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": heads,
                "num_key_value_heads": kv_heads, "intermediate_size": 40, "hidden_act": "silu", "attention_bias": attention_bias,
                "mlp_bias": mlp_bias, "tie_word_embeddings": tied, "max_position_embeddings": 96, "rms_norm_eps": 1e-5,
            });
            if !head_dim.is_null() {
                config["head_dim"] = head_dim;
            }
            config
        },
    )
}

/// RWKV configurations over its sizes.
fn any_rwkv() -> impl Strategy<Value = Value> {
    let widths = prop::sample::select(vec![(24, 24), (24, 40), (20, 16)]);
    (widths, any::<bool>()).prop_map(|((d, width), tied)| {
        json!({
            "model_type": "rwkv", "vocab_size": 61, "hidden_size": d, "attention_hidden_size": width, "intermediate_size": 36,
            "num_hidden_layers": 2, "context_length": 96, "tie_word_embeddings": tied,
        })
    })
}

/// Configurations of the two families that only tests have.
fn any_toy() -> impl Strategy<Value = Value> {
    let heads = prop::sample::select(vec![(4, 4), (4, 2), (3, 1)]);
    (any::<bool>(), heads).prop_map(|(gated, (heads, kv_heads))| {
        let kind = if gated { "toy_gated" } else { "toy_recurrent" };
        json!({"model_type": kind, "vocab": 61, "width": 24, "layers": 2, "heads": heads, "kv_heads": kv_heads})
    })
}

/// MPT configurations over the keys that change its output, in both of its spellings.
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

/// GPT-NeoX configurations over the keys that change its output.
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
    Context::new().with_state(State::new())
}

fn bits(x: &Tensor) -> Vec<u32> {
    x.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

fn part(ids: &Tensor, from: usize, to: usize) -> Tensor {
    ids.narrow(1, from, to - from).unwrap().contiguous().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn cached_passes_match_one_pass(
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
        prop_assert_eq!(ctx.position(0), 80);
    }

    /// Packed rows of any length, in any number of passes over any of the rows, with and without state, match single
    /// rows.
    #[test]
    fn packed_rows_match_single_rows(
        config in any_config(), seed in 0u64..1000, lens in prop::collection::vec(1usize..30, 2..5),
        shares in prop::collection::vec(prop::collection::vec(0usize..12, 5), 0..4),
    ) {
        let model = small(&config, seed).model();
        let rows: Vec<Tensor> = (0..).zip(&lens).map(|(i, &len)| random_ids(1, len, seed + i)).collect();
        let alone: Vec<Tensor> = rows.iter().map(|row| logits(&*model, row, &mut Context::new())).collect();

        let all = Tensor::cat(&rows, 1).unwrap();
        let mut ctx = Context::new().with_packed(&lens);
        let hidden = model.hidden(&all, &mut ctx).unwrap();
        let together = model.head(&hidden).unwrap();
        let last = model.head(&ctx.last_positions(&hidden).unwrap()).unwrap();
        let mut at = 0;
        for (i, (alone, &len)) in alone.iter().zip(&lens).enumerate() {
            prop_assert!(worst(&together.narrow(1, at, len).unwrap(), alone) < 1e-5);
            prop_assert!(worst(&last.narrow(0, i, 1).unwrap(), &alone.i(0).unwrap().narrow(0, len - 1, 1).unwrap()) < 1e-5);
            at += len;
        }

        // The same in passes over some tokens of some rows, then over the rest.
        let mut ctx = cached();
        ctx.state_mut().unwrap().add_rows(lens.len());
        let mut read = vec![0; lens.len()];
        for share in shares.iter().chain([&vec![30; 5]]) {
            let takes = (0..lens.len()).map(|i| (i, share[i].min(lens[i] - read[i])));
            // In another order than that of the rows.
            let takes: Vec<(usize, usize)> = takes.filter(|take| take.1 > 0).rev().collect();
            if takes.is_empty() {
                continue;
            }
            let ids: Vec<Tensor> = takes.iter().map(|&(i, n)| part(&rows[i], read[i], read[i] + n)).collect();
            ctx.pack_rows(&takes);
            let found = logits(&*model, &Tensor::cat(&ids, 1).unwrap(), &mut ctx);
            let mut at = 0;
            for (i, n) in takes {
                let expected = alone[i].narrow(1, read[i], n).unwrap();
                prop_assert!(worst(&found.narrow(1, at, n).unwrap(), &expected) < 1e-5);
                read[i] += n;
                at += n;
            }
        }
        prop_assert_eq!(read, lens);
    }

    /// Rows join, leave, move and are copied. Each continues as if it were alone.
    #[test]
    fn rows_are_joined_and_selected_in_any_order(
        config in any_config(), seed in 0u64..1000, lens in prop::collection::vec(1usize..20, 1..4),
        joined in prop::collection::vec(1usize..20, 1..3), order in prop::collection::vec(0usize..100, 1..6),
    ) {
        let model = small(&config, seed).model();
        let rows: Vec<Tensor> = (0..).zip(lens.iter().chain(&joined)).map(|(i, &len)| random_ids(1, len, seed + i)).collect();
        let read = |rows: &[Tensor]| {
            let mut ctx = cached();
            ctx.pack(&rows.iter().map(|row| row.dims()[1]).collect::<Vec<_>>());
            logits(&*model, &Tensor::cat(rows, 1).unwrap(), &mut ctx);
            ctx
        };
        let (mut ctx, mut other) = (read(&rows[..lens.len()]), read(&rows[lens.len()..]));
        ctx.state_mut().unwrap().extend(std::mem::take(other.state_mut().unwrap()));
        let order: Vec<usize> = order.iter().map(|at| at % rows.len()).collect();
        ctx.select_rows(&order).unwrap();
        // Copies of a row continue with different tokens.
        let tails: Vec<Tensor> = (0..order.len() as u64).map(|i| random_ids(1, 3, seed + 100 + i)).collect();
        let found = logits(&*model, &Tensor::cat(&tails, 0).unwrap(), &mut ctx);
        for (i, (row, tail)) in order.iter().zip(&tails).enumerate() {
            let whole = logits(&*model, &Tensor::cat(&[&rows[*row], tail], 1).unwrap(), &mut Context::new());
            let expected = whole.narrow(1, rows[*row].dims()[1], 3).unwrap();
            prop_assert!(worst(&found.narrow(0, i, 1).unwrap(), &expected) < 1e-5);
        }
    }

    /// A replayed block gives the same bits, records nothing and does not change the state.
    #[test]
    fn a_replay_changes_nothing(config in any_config(), seed in 0u64..1000, lens in prop::collection::vec(1usize..20, 1..4), stateful: bool) {
        let model = small(&config, seed).model();
        let mut ctx = if stateful { cached() } else { Context::new() };
        if stateful {
            ctx.pack(&lens);
            logits(&*model, &random_ids(1, lens.iter().sum(), seed), &mut ctx);
        }
        let mut ctx = ctx.with_taps(Taps::new().record(Site::ResidPost).record(Site::MlpOut));
        let ids = random_ids(1, lens.iter().sum(), seed + 1);
        let run = |ctx: &mut Context, replaying: bool| {
            ctx.pack(&lens);
            let mut x = model.embed(&ids, ctx).unwrap();
            for layer in 0..2 {
                let y = model.block(layer, &x, ctx).unwrap();
                if replaying {
                    let again = model.block(layer, &x, &mut ctx.replay().unwrap()).unwrap();
                    assert_eq!(bits(&again), bits(&y));
                }
                x = y;
            }
            let count = ctx.take_recording().iter().count();
            ctx.commit();
            (x, count)
        };
        let mut twin = ctx.fork().with_taps(Taps::new().record(Site::ResidPost).record(Site::MlpOut));
        let ((a, recorded), (b, expected)) = (run(&mut ctx, true), run(&mut twin, false));
        prop_assert_eq!((bits(&a), recorded), (bits(&b), expected));
        let bytes = |ctx: &Context| ctx.state().map(|state| (state.bytes(), state.len(0), state.rows()));
        prop_assert_eq!(bytes(&ctx), bytes(&twin));
        // The next pass continues from the same state.
        let (a, b) = (run(&mut ctx, true).0, run(&mut twin, false).0);
        prop_assert_eq!(bits(&a), bits(&b));
        prop_assert!(!stateful || ctx.replay().is_err(), "the positions have become past");
    }

    #[test]
    fn truncating_and_continuing_matches_a_fresh_state(seed in 0u64..1000, keep in 1usize..40, wrong in 1usize..30, more in 1usize..30) {
        let model = small(&json!({}), seed).model();
        let ids = random_ids(1, keep + more, seed);
        let whole = logits(&*model, &ids, &mut Context::new());
        let mut ctx = cached();
        logits(&*model, &part(&ids, 0, keep), &mut ctx);
        logits(&*model, &random_ids(1, wrong, seed + 1), &mut ctx);
        prop_assert_eq!(ctx.state_mut().unwrap().rewind(0, keep), keep);
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

    /// The gradient of a packed batch is the sum of the gradients of its rows.
    #[test]
    fn packed_rows_have_the_gradients_of_the_rows(config in any_config(), seed in 0u64..1000, lens in prop::collection::vec(2usize..20, 2..4)) {
        small(&config, 0);
        let store = std::sync::Arc::new(pricket::weights::Random::new(pricket::weights::Dtype::F32, seed));
        let pricket = Loader::from_store(small_config(&config), store).train().threads(2).load().unwrap();
        let model = pricket.model();
        let rows: Vec<Tensor> = (0..).zip(&lens).map(|(i, &len)| random_ids(1, len, seed + i)).collect();
        let nll = |ids: &Tensor, lens: &[usize]| {
            let hidden = model.hidden(ids, &mut Context::new().with_packed(lens)).unwrap().squeeze(0).unwrap();
            let targets = vec![seed as u32 % 61; ids.dims()[1]];
            model.nll(&hidden, &targets).unwrap().sum_all().unwrap()
        };
        let together = nll(&Tensor::cat(&rows, 1).unwrap(), &lens).backward().unwrap();
        let alone: Vec<_> = rows.iter().map(|row| nll(row, &[row.dims()[1]]).backward().unwrap()).collect();
        for parameter in pricket.parameters() {
            let sum = alone.iter().map(|grads| grads.get(&parameter.var).unwrap().clone());
            let sum = sum.reduce(|a, b| (a + b).unwrap()).unwrap();
            let found = together.get(&parameter.var).unwrap();
            let largest = sum.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
            prop_assert!(worst(found, &sum) < 1e-5 + 1e-3 * largest, "{}: {}", parameter.name, worst(found, &sum));
        }
    }
}

/// The gradient reaches every parameter, and a step against it lowers the loss. No fused operation drops it.
#[test]
fn gradients_reach_every_parameter_and_point_downhill() {
    for changes in [
        json!({"use_parallel_residual": true}),
        json!({"use_parallel_residual": false, "rotary_pct": 1.0}),
        json!({"tie_word_embeddings": true, "attention_bias": false, "hidden_act": "gelu_fast"}),
    ] {
        let store = std::sync::Arc::new(pricket::weights::Random::new(pricket::weights::Dtype::F32, 3));
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

/// A frozen model passes gradients to the inputs of its residual stream, through every fused operation.
#[test]
fn gradients_pass_through_frozen_weights() {
    let changes = json!({"rotary_pct": 0.5});
    let frozen = small(&changes, 4).model();
    let store = std::sync::Arc::new(pricket::weights::Random::new(pricket::weights::Dtype::F32, 4));
    let trained = Loader::from_store(small_config(&changes), store).train().load().unwrap().model();
    let x = Var::randn(0f32, 1.0, (2, 9, 24), &Device::Cpu).unwrap();
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
fn taps_change_only_the_tensors_that_they_edit() {
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

    // Replacing the stream before layer 1 equals running the rest of the model on the replacement.
    let patch = Tensor::randn(0f32, 1.0, (2, 13, 24), &Device::Cpu).unwrap();
    let edit = patch.clone();
    let taps = Taps::new().edit(Site::ResidPre, move |layer, x| Ok(if layer == 1 { edit.clone() } else { x.clone() }));
    let patched = model.hidden(&ids, &mut Context::new().with_taps(taps)).unwrap();
    let rest = model.finish(&model.block(1, &patch, &mut Context::new()).unwrap()).unwrap();
    assert!(worst(&patched, &rest) < 1e-5);
}

#[test]
fn the_cache_grows_with_its_positions() {
    let model = small(&json!({"max_position_embeddings": 1 << 20}), 2).model();
    let mut ctx = cached();
    logits(&*model, &random_ids(1, 10, 1), &mut ctx);
    let per_position = model.info().cache_bytes_per_token() as usize;
    assert_eq!(ctx.state().unwrap().bytes(), 64 * per_position);
    logits(&*model, &random_ids(1, 100, 1), &mut ctx);
    assert_eq!(ctx.state().unwrap().bytes(), 128 * per_position);
}

#[test]
fn a_cache_in_half_precision_is_close() {
    let model = small(&json!({}), 2).model();
    let ids = random_ids(1, 30, 1);
    let whole = logits(&*model, &ids, &mut Context::new());
    for (kind, close) in [(CacheType::F16, 1e-3), (CacheType::BF16, 1e-2), (CacheType::Q8_0, 2e-2)] {
        let mut ctx = Context::new().with_state(State::with_type(kind));
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
    // Each row of a packed pass begins at its own position.
    assert!(model.hidden(&ids, &mut Context::new().with_packed(&[90, 7])).is_ok());
    let error = model.hidden(&random_ids(1, 99, 1), &mut Context::new().with_packed(&[2, 97])).unwrap_err().to_string();
    assert!(error.contains("97") && error.contains("96"), "{error}");
}

#[test]
fn arguments_that_do_not_fit_are_errors() {
    let model = small(&json!({}), 2).model();
    // A refused pass adds no rows and leaves no packing behind.
    let mut ctx = cached();
    logits(&*model, &random_ids(1, 4, 0), &mut ctx);
    ctx.pack_rows(&[(1, 97)]);
    assert!(model.hidden(&random_ids(1, 97, 0), &mut ctx).is_err());
    ctx.pack_rows(&[(1 << 40, 4)]);
    assert!(model.hidden(&random_ids(1, 4, 0), &mut ctx).is_err());
    ctx.pack_rows(&[(1, 2)]);
    assert!(model.hidden(&Tensor::new(&[[1u32, 61]], &Device::Cpu).unwrap(), &mut ctx).is_err());
    assert_eq!((ctx.state().unwrap().rows(), ctx.position(0)), (1, 4));
    logits(&*model, &random_ids(1, 4, 1), &mut ctx);
    assert_eq!(ctx.position(0), 8);
    // Positions of an unfinished pass do not count as past, and the next pass uses its own packing.
    let mut ctx = Context::new();
    let x = model.embed(&random_ids(1, 8, 0), &mut ctx).unwrap();
    ctx.pack(&[3, 5]);
    let packed = model.block(1, &x, &mut ctx).unwrap();
    let rows = [(0, 3), (3, 5)].map(|(from, len)| {
        model.block(1, &x.narrow(1, from, len).unwrap().contiguous().unwrap(), &mut Context::new()).unwrap()
    });
    assert!(worst(&packed, &Tensor::cat(&rows, 1).unwrap()) < 1e-5);
    assert!(model.hidden(&Tensor::new(&[[61u32]], &Device::Cpu).unwrap(), &mut Context::new()).is_err());
    for (rows, named) in
        [(&[(0, 3), (1, 2)][..], "[1, 5]"), (&[(0, 2), (0, 2)], "distinct"), (&[(0, 4), (1, 0)], "at least one")]
    {
        let mut ctx = Context::new();
        ctx.pack_rows(rows);
        let error = model.hidden(&random_ids(1, 4, 0), &mut ctx).unwrap_err().to_string();
        assert!(error.contains(named), "{error}");
    }
    let request = pricket::lm::Request::new(vec![1, 61], pricket::GenerateOptions::default());
    let error = pricket::lm::Generation::new(model.clone(), vec![request]).unwrap_err().to_string();
    assert!(error.contains("61"), "{error}");
    assert!(cached().select_rows(&[0]).is_err());
    let error = model.hidden(&random_ids(1, 4, 0), &mut Context::new().with_compute_dtype(DType::BF16)).unwrap_err();
    assert!(error.to_string().contains("bf16"), "{error}");
    let mut ctx = cached();
    logits(&*model, &random_ids(1, 4, 0), &mut ctx);
    let error = model.hidden(&random_ids(2, 4, 0), &mut ctx).unwrap_err().to_string();
    assert!(error.contains("the state holds 1 rows"), "{error}");
}

#[test]
fn overflow_is_reported_with_its_layer() {
    // The output projection of the second layer is infinite.
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
    let store = Overflow(pricket::weights::Random::new(pricket::weights::Dtype::F32, 1));
    let model = Loader::from_store(small_config(&json!({})), std::sync::Arc::new(store)).load().unwrap();
    let mut generation = model.generation(vec![vec![1, 2, 3]], &pricket::GenerateOptions::default()).unwrap();
    let error = pricket::Error::from(generation.step().unwrap_err());
    assert!(matches!(error, pricket::Error::NonFinite { layer: Some(1), .. }), "{error}");
    assert!(error.to_string().contains("layer 1") && error.to_string().contains("f32"), "{error}");
    // A comparison with a sound model fails too, on either side.
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
    impl pricket::nn::Progress for Watch {
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
