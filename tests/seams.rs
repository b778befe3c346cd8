//! The interfaces of families, decoders, training and adapters, with families that only tests have.

use std::sync::Arc;

use pricket::candle::{DType, Device, IndexOp, Tensor, Var};
use pricket::lm::{
    Continuation, GenerateOptions, Generation, Request, ScoreOptions, loglikelihoods, loss, token_logprobs,
};
use pricket::loading::Precision;
use pricket::nn::ops::{self, Matrix};
use pricket::nn::{
    Adapter, Admission, Attention, Linear, Mlp, ModelPlan, Norm, PlainDecoder, Qkv, Residual, RowStep, StepDecoder,
};
use pricket::nn::{BlockType, Quantization, State};
use pricket::weights::Dtype;
use pricket::{CausalLm, Context, Loader, SamplingParams};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::common::{small, small_config, worst};
use crate::properties::any_config;

const TOYS: [&str; 2] = ["toy_gated", "toy_recurrent"];

fn toy(kind: &str) -> Arc<dyn CausalLm> {
    let config = json!({"model_type": kind, "vocab": 61, "width": 24, "layers": 2, "heads": 4, "kv_heads": 2});
    small(&config, 5).model()
}

fn row(len: usize, seed: u64) -> Vec<u32> {
    (0..len as u64).map(|i| ((i + 3) * (seed * 2 + 7919) % 61) as u32).collect()
}

fn request(ids: Vec<u32>, sampling: &SamplingParams, seed: u64) -> Request {
    Request::new(ids, GenerateOptions { max_tokens: 9, sampling: sampling.clone(), seed, ..Default::default() })
}

fn generated(model: &Arc<dyn CausalLm>, requests: Vec<Request>) -> Vec<Vec<u32>> {
    let mut rows = vec![Vec::new(); requests.len()];
    let mut generation = Generation::new(Arc::clone(model), requests).unwrap();
    while let Some(tokens) = generation.step().unwrap() {
        for token in tokens {
            rows[token.row].push(token.id);
        }
    }
    rows
}

#[test]
fn an_added_family_generates_in_ragged_batches() {
    for kind in TOYS {
        let model = toy(kind);
        for sampling in [SamplingParams::greedy(), SamplingParams { temperature: 0.8, ..SamplingParams::default() }] {
            // Some prompts are longer than one chunk of prefill.
            let prompts: Vec<Vec<u32>> = [1, 30, 7, 64].iter().zip(1..).map(|(&len, seed)| row(len, seed)).collect();
            let requests =
                |ids: &[Vec<u32>]| ids.iter().zip(0..).map(|(ids, i)| request(ids.clone(), &sampling, i)).collect();
            let together = generated(&model, requests(&prompts));
            for (i, ids) in prompts.iter().enumerate() {
                let alone = generated(&model, vec![request(ids.clone(), &sampling, i as u64)]);
                assert_eq!(together[i], alone[0], "{kind}, row {i}");
                assert_eq!(alone[0].len(), 9);
            }
        }
    }
}

#[test]
fn an_added_family_scores_and_rewinds() {
    for kind in TOYS {
        let model = toy(kind);
        // Contexts with several continuations, and one with a single continuation.
        let context = |i: u64| row(5 + i as usize, i);
        let requests: Vec<Continuation> = (0..4)
            .flat_map(|i| {
                (1..4).map(move |n| Continuation { context: context(i), ids: row(n as usize, 50 + 7 * i + n) })
            })
            .chain([Continuation { context: context(9), ids: row(4, 99) }])
            .collect();
        let found = loglikelihoods(&*model, &requests, &ScoreOptions::default()).unwrap();
        for (Continuation { context, ids }, found) in requests.iter().zip(found) {
            let scored = token_logprobs(&*model, &[&context[..], ids].concat()).unwrap();
            let sum: f64 = scored[context.len() - 1..].iter().map(|token| f64::from(token.logprob)).sum();
            assert!((found.sum - sum).abs() < 1e-4, "{kind}: {} and {sum}", found.sum);
        }

        let read = |ids: &[u32], ctx: &mut Context| {
            let ids = Tensor::new(ids, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
            model.head(&model.hidden(&ids, ctx).unwrap()).unwrap()
        };
        let ids = row(20, 3);
        let mut ctx = Context::new().with_state(State::new());
        read(&ids[..12], &mut ctx);
        ctx.state_mut().unwrap().mark(0);
        let copy = ctx.fork();
        read(&row(5, 77), &mut ctx);
        // A recurrence rewinds to the mark, attention to any position.
        let kept = ctx.state_mut().unwrap().rewind(0, 15);
        assert_eq!(kept, if kind == "toy_recurrent" { 12 } else { 15 });
        assert_eq!(ctx.state_mut().unwrap().rewind(0, 12), 12);
        let fresh = read(&ids, &mut Context::new()).narrow(1, 12, 8).unwrap();
        for mut ctx in [ctx, copy] {
            assert!(worst(&read(&ids[12..], &mut ctx), &fresh) < 1e-5, "{kind}");
        }
        let mut ctx = Context::new().with_state(State::new());
        read(&ids[..12], &mut ctx);
        let kept = ctx.state_mut().unwrap().rewind(0, 7);
        assert_eq!(kept, if kind == "toy_recurrent" { 0 } else { 7 }, "nothing was marked");
        assert!(worst(&read(&ids[kept..], &mut ctx).narrow(1, 12 - kept, 8).unwrap(), &fresh) < 1e-5, "{kind}");
    }
}

/// Taps see the pass over the prompts and every step. An edit steers the text.
#[test]
fn a_generation_is_recorded_and_steered() {
    use pricket::{Site, Taps};
    let model = toy("toy_gated");
    let requests =
        || [3, 8].iter().zip(1..).map(|(&len, seed)| request(row(len, seed), &SamplingParams::greedy(), 0)).collect();
    let plain = generated(&model, requests());
    let taps = Taps::new().record(Site::ResidPost);
    let mut generation = Generation::new(Arc::clone(&model), requests()).unwrap().with_taps(taps);
    let mut lens = Vec::new();
    while generation.step().unwrap().is_some() {
        let recording = generation.take_recording();
        assert_eq!(recording.spans().len(), 2);
        lens.push(recording.get(Site::ResidPost, 1).unwrap().dims()[1]);
    }
    assert_eq!(lens, [&[11][..], &[2; 8]].concat());
    let zero = Taps::new().edit(Site::ResidPost, |_, x| Ok(x.zeros_like()?));
    let mut generation = Generation::new(Arc::clone(&model), requests()).unwrap().with_taps(zero);
    let mut steered = vec![Vec::new(); 2];
    while let Some(tokens) = generation.step().unwrap() {
        for token in tokens {
            steered[token.row].push(token.id);
        }
    }
    assert_ne!(steered, plain);
    assert_eq!(steered[0], steered[1], "nothing of the prompts is left");
}

#[test]
fn an_unsupported_tap_of_a_recurrence_is_refused_by_name() {
    let taps = pricket::Taps::new().record(pricket::Site::Pattern);
    let ids = Tensor::new(&[[1u32, 2]], &Device::Cpu).unwrap();
    let error = toy("toy_recurrent").hidden(&ids, &mut Context::new().with_taps(taps)).unwrap_err().to_string();
    assert!(error.contains("Pattern") && error.contains("ResidMid"), "{error}");
}

/// Computes a model from its plan with plain operations, in one pass over one row.
struct Interpreter<'a>(&'a ModelPlan<'a>);

impl Interpreter<'_> {
    fn logits(&self, ids: &[u32]) -> Tensor {
        let plan = self.0;
        let gather =
            |table: &Matrix, ids: &[u32]| table.gather(&Tensor::new(ids, &Device::Cpu).unwrap(), DType::F32).unwrap();
        let mut x = gather(plan.embed.weight(), ids);
        if let Some(table) = plan.learned_positions {
            x = (x + gather(table.weight(), &(0..ids.len() as u32).collect::<Vec<_>>())).unwrap();
        }
        x = plan.embed_norm.map_or(x.clone(), |norm| Self::norm(norm, &x)).unsqueeze(0).unwrap();
        for block in &plan.blocks {
            let attention = Self::attention(block.attention, &Self::norm(block.norm_1, &x));
            let mlp = |x: &Tensor| Self::mlp(block.mlp, &Self::norm(block.norm_2, x));
            x = match block.residual {
                Residual::Parallel => (&x + (attention + mlp(&x)).unwrap()).unwrap(),
                Residual::Sequential => {
                    let middle = (&x + attention).unwrap();
                    (&middle + mlp(&middle)).unwrap()
                }
            };
        }
        (Self::linear(plan.head, &Self::norm(plan.final_norm, &x)) * plan.logit_scale).unwrap()
    }

    fn norm(norm: &Norm, x: &Tensor) -> Tensor {
        match norm {
            Norm::Layer { weight, bias, eps, .. } => ops::plain_layer_norm(x, weight, bias, *eps).unwrap(),
            Norm::Rms { weight, eps, .. } => ops::plain_rms_norm(x, weight, *eps).unwrap(),
        }
    }

    fn linear(linear: &Linear, x: &Tensor) -> Tensor {
        ops::plain_linear(x, linear.weight(), linear.bias()).unwrap()
    }

    fn mlp(mlp: &Mlp, x: &Tensor) -> Tensor {
        let up = Self::linear(&mlp.up, x);
        let hidden = match &mlp.gate {
            Some(gate) => (mlp.activation.forward(&Self::linear(gate, x)).unwrap() * up).unwrap(),
            None => mlp.activation.forward(&up).unwrap(),
        };
        Self::linear(&mlp.down, &hidden)
    }

    fn attention(attention: &Attention, x: &Tensor) -> Tensor {
        let &Attention { heads, kv_heads, head_dim, scale, .. } = attention;
        let (b, t, _) = x.dims3().unwrap();
        let parts = match &attention.qkv {
            Qkv::Split(split) => split.each_ref().map(|linear| Self::linear(linear, x)),
            Qkv::Fused(fused) => {
                let (all, q, kv) = (Self::linear(fused, x), heads * head_dim, kv_heads * head_dim);
                [(0, q), (q, kv), (q + kv, kv)].map(|(from, len)| all.narrow(2, from, len).unwrap())
            }
        };
        let [mut q, mut k, v] = parts.map(|x| attention.clip.map_or(x.clone(), |clip| x.clamp(-clip, clip).unwrap()));
        if let Some((of_q, of_k)) = &attention.qk_norm {
            (q, k) = (Self::norm(of_q, &q), Self::norm(of_k, &k));
        }
        let split = |x: &Tensor, heads: usize| x.reshape((b, t, heads, head_dim)).unwrap();
        let (q, k, v) = (split(&q, heads), split(&k, kv_heads), split(&v, kv_heads).transpose(1, 2).unwrap());
        let (q, k) = match &attention.rotary {
            Some(rotary) => {
                let angles: Vec<f32> = (0..t)
                    .flat_map(|p| (0..rotary.dims / 2).map(move |i| (p, i)))
                    .map(|(p, i)| {
                        (p as f64 / rotary.factor * rotary.base.powf(-2.0 * i as f64 / rotary.dims as f64)) as f32
                    })
                    .collect();
                let angles = Tensor::from_vec(angles, (1, t, rotary.dims / 2), &Device::Cpu).unwrap();
                let (cos, sin) = (angles.cos().unwrap(), angles.sin().unwrap());
                (ops::plain_rotary(&q, &cos, &sin).unwrap(), ops::plain_rotary(&k, &cos, &sin).unwrap())
            }
            None => (q.transpose(1, 2).unwrap(), k.transpose(1, 2).unwrap()),
        };
        let slopes = attention.alibi.as_ref().map_or(&[][..], |alibi| alibi.slopes());
        let bias = ops::attention_bias(slopes, 0, t, &Device::Cpu).unwrap();
        let pattern = ops::attention_pattern(&q, &k.contiguous().unwrap(), scale, bias.as_ref()).unwrap();
        Self::linear(&attention.out, &ops::attention_output(&pattern, &v).unwrap())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_plan_describes_the_whole_model(config in any_config(), seed in 0u64..1000, len in 1usize..40) {
        let model = small(&config, seed).model();
        let ids = row(len, seed);
        let input = Tensor::new(&ids[..], &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let expected = model.head(&model.hidden(&input, &mut Context::new()).unwrap()).unwrap();
        let plan = model.plan();
        prop_assert_eq!(plan.is_none(), config["model_type"] == "toy_recurrent" || config["model_type"] == "rwkv");
        if let Some(plan) = plan {
            prop_assert!(worst(&Interpreter(&plan).logits(&ids), &expected) < 2e-5);
        }
    }

    /// The fused loss and its gradients equal those of the complete logits.
    #[test]
    fn the_blockwise_loss_matches_the_plain_loss(config in any_config(), seed in 0u64..1000, batch in 1usize..4, len in 2usize..90, trained: bool) {
        small(&config, 0);
        let store = Arc::new(pricket::weights::Random::new(Dtype::F32, seed));
        let loader = Loader::from_store(small_config(&config), store).threads(2);
        let pricket = if trained { loader.train() } else { loader }.load().unwrap();
        let model = pricket.model();
        let ids: Vec<u32> = (0..batch as u64).flat_map(|i| row(len, seed + i)).collect();
        let ids = Tensor::from_vec(ids, (batch, len), &Device::Cpu).unwrap();
        let hidden = Var::from_tensor(&model.hidden(&ids, &mut Context::new()).unwrap().flatten_to(1).unwrap().detach()).unwrap();
        let targets = row(batch * len, seed + 9);
        let fused = model.nll(&hidden, &targets).unwrap();
        let logprobs = ops::log_softmax(&model.head(&hidden).unwrap()).unwrap();
        let at = Tensor::new(&targets[..], &Device::Cpu).unwrap().unsqueeze(1).unwrap();
        let plain = logprobs.gather(&at, 1).unwrap().squeeze(1).unwrap().neg().unwrap();
        prop_assert!(worst(&fused, &plain) < 2e-5);
        // Each position has its own weight.
        let weights = Tensor::randn(0f32, 1.0, batch * len, &Device::Cpu).unwrap();
        let grads = |nll: &Tensor| (nll * &weights).unwrap().sum_all().unwrap().backward().unwrap();
        let (a, b) = (grads(&fused), grads(&plain));
        prop_assert!(worst(a.get(&hidden).unwrap(), b.get(&hidden).unwrap()) < 2e-5);
        for parameter in pricket.parameters() {
            let (a, b) = (a.get(&parameter.var), b.get(&parameter.var));
            prop_assert_eq!(a.is_some(), b.is_some(), "{}", parameter.name);
            if let (Some(a), Some(b)) = (a, b) {
                prop_assert!(worst(a, b) < 1e-3, "{}: {}", parameter.name, worst(a, b));
            }
        }
        // The whole model, from the tokens to the loss.
        if trained {
            let grads = loss(&*model, &ids).unwrap().backward().unwrap();
            prop_assert!(pricket.parameters().iter().all(|parameter| grads.get(&parameter.var).is_some()));
        }
    }

    /// An adapter changes the output like a change of the weights, and does not change the base model.
    #[test]
    fn an_adapter_adds_its_product(config in any_config(), seed in 0u64..1000, rank in 1usize..5) {
        let model = small(&config, seed).model();
        let ids = Tensor::new(row(12, seed), &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let logits = |model: &Arc<dyn CausalLm>| model.head(&model.hidden(&ids, &mut Context::new()).unwrap()).unwrap();
        let before = logits(&model);
        let mut names = Vec::new();
        // Low-rank changes that differ by layer and seed, as adapters and merged into dense layers.
        let parts = |linear: &Linear, count: f64, seed: f64| -> pricket::nn::Result<Adapter> {
            let (outputs, inputs) = linear.weight().shape()?;
            let wave = |rows: usize, columns: usize, step: f64| {
                let x = Tensor::arange(0u32, (rows * columns) as u32, &Device::Cpu)?.to_dtype(DType::F32)?;
                (x.affine(step * seed, count)?.sin()? * 0.2)?.reshape((rows, columns))
            };
            Ok(Adapter::new(wave(rank, inputs, 0.7)?, wave(outputs, rank, 1.3)?, 0.5))
        };
        let adapted = |seed: f64, merged: bool, names: &mut Vec<String>| {
            let mut count = 0.0;
            model.map_linears(&mut |linear| {
                names.push(linear.name().to_owned());
                count += 1.0;
                let adapter = parts(linear, count, seed)?;
                if !merged {
                    return linear.with_adapters(vec![adapter]);
                }
                let dense = linear.weight().to_dense(DType::F32, &Device::Cpu)?;
                let change = (adapter.b.matmul(&adapter.a)? * 0.5)?;
                linear.with_weight(Matrix::Dense((dense + change)?))
            }).unwrap()
        };
        let (one, merged, other) = (adapted(1.0, false, &mut names), adapted(1.0, true, &mut names), adapted(2.0, false, &mut names));
        prop_assert!(worst(&logits(&one), &before) > 1e-4);
        let largest = before.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
        prop_assert!(worst(&logits(&one), &logits(&merged)) < 1e-4 * largest.max(1.0));
        prop_assert!(worst(&logits(&one), &logits(&other)) > 1e-4);
        prop_assert_eq!(worst(&logits(&model), &before), 0.0);
        let distinct: std::collections::BTreeSet<&String> = names.iter().collect();
        prop_assert_eq!(distinct.len() * 3, names.len(), "every layer has a name of its own");
        let error = model.map_linears(&mut |linear| {
            let zeros = |rows, columns| Tensor::zeros((rows, columns), DType::F32, &Device::Cpu);
            linear.with_adapters(vec![Adapter::new(zeros(2, 1)?, zeros(1, 2)?, 1.0)])
        }).err().unwrap().to_string();
        prop_assert!(error.contains("[rank, "), "{}", error);
    }

    /// Rows that join and leave, with several tokens at a time, give the results of single rows.
    #[test]
    fn a_step_decoder_treats_rows_independently(
        config in any_config(), seed in 0u64..1000, lens in prop::collection::vec(2usize..20, 2..5), chunk in 1usize..6,
    ) {
        let model = small(&config, seed).model();
        let rows: Vec<Vec<u32>> = lens.iter().zip(0..).map(|(&len, i)| row(len, seed + i)).collect();
        let mut decoder = PlainDecoder::new(Arc::clone(&model));
        let sampling = SamplingParams::greedy();
        let admission = |ids: &[u32], state: State| {
            Admission { state, ids: ids.to_vec(), prompt_len: ids.len(), sampling: sampling.clone(), vocab: None }
        };
        let one = || {
            let mut state = State::new();
            state.add_rows(1);
            state
        };
        let expected: Vec<Vec<usize>> = rows.iter().map(|ids| {
            let ids = Tensor::new(&ids[..], &Device::Cpu).unwrap().unsqueeze(0).unwrap();
            let logits = model.head(&model.hidden(&ids, &mut Context::new()).unwrap()).unwrap();
            logits.i(0).unwrap().to_vec2::<f32>().unwrap().iter().map(|row| ops::argmax(row)).collect()
        }).collect();
        let mut places = vec![None; rows.len()];
        let mut read = vec![0; rows.len()];
        // One row joins at each step. The loop ends when all rows have been read.
        for step in 0.. {
            if step < rows.len() {
                places[step] = Some(decoder.admit(admission(&rows[step], one())).unwrap());
            }
            let takes: Vec<(usize, usize)> = (0..rows.len()).filter(|&i| places[i].is_some())
                .map(|i| (i, chunk.min(rows[i].len() - read[i]))).collect();
            if takes.is_empty() {
                break;
            }
            let draws = vec![0.0; chunk];
            let steps: Vec<RowStep<'_>> = takes.iter().map(|&(i, n)| RowStep {
                row: places[i].unwrap(), tokens: &rows[i][read[i]..read[i] + n], draws: &draws[..n],
            }).collect();
            for (choices, &(i, n)) in decoder.step(&steps).unwrap().iter().zip(&takes) {
                for (j, choice) in choices.iter().enumerate() {
                    prop_assert_eq!(choice.id as usize, expected[i][read[i] + j]);
                }
                read[i] += n;
                if read[i] == rows[i].len() {
                    let state = decoder.release(places[i].take().unwrap()).unwrap();
                    prop_assert_eq!(state.len(0), rows[i].len());
                }
            }
        }
        let gone = decoder.admit(admission(&rows[0], one())).unwrap();
        decoder.release(gone).unwrap();
        let error = decoder.step(&[RowStep { row: gone, tokens: &[1], draws: &[0.0] }]).unwrap_err().to_string();
        prop_assert!(error.contains("not in the batch"), "{}", error);
    }
}

/// Compares gradients with finite differences: every part of every adapter, with and without magnitudes, and the loss
/// through an adapted head.
#[test]
fn adapters_have_gradients() {
    for (kind, with_magnitude) in
        [("gpt_neox", false), ("gpt_neox", true), ("toy_gated", true), ("toy_recurrent", false)]
    {
        let config = json!({"model_type": kind, "vocab": 61, "width": 24, "layers": 2, "heads": 4, "kv_heads": 2});
        let model = small(&config, 6).model();
        let mut vars: Vec<(String, Var)> = Vec::new();
        let adapted = model
            .map_linears(&mut |linear| {
                let (outputs, inputs) = linear.weight().shape()?;
                let mut var = |name: &str, shape: &[usize], mean: f32| {
                    let var = Var::randn(mean, 0.2, shape, &Device::Cpu)?;
                    vars.push((format!("{}.{name}", linear.name()), var.clone()));
                    Ok::<_, pricket::nn::Error>(var.as_tensor().clone())
                };
                let mut adapter = Adapter::new(var("a", &[3, inputs], 0.0)?, var("b", &[outputs, 3], 0.0)?, 0.7);
                if with_magnitude {
                    adapter.magnitude = Some(var("magnitude", &[outputs], 1.0)?);
                }
                linear.with_adapters(vec![adapter])
            })
            .unwrap();
        let ids = Tensor::new(row(14, 2), &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let value = || f64::from(loss(&*adapted, &ids).unwrap().to_scalar::<f32>().unwrap());
        let grads = loss(&*adapted, &ids).unwrap().backward().unwrap();
        for (name, var) in vars.iter().filter(|(name, _)| !name.contains("layers.0")) {
            let grad = grads.get(var).unwrap_or_else(|| panic!("{kind}: {name} has no gradient")).clone();
            // With magnitudes, the norm of a row is held constant. Only the gradient of the magnitude is exact.
            if with_magnitude && !name.ends_with("magnitude") {
                continue;
            }
            let (before, norm) =
                (var.as_tensor().copy().unwrap(), grad.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap());
            let step = (&grad * (2e-3 / f64::from(norm.sqrt().max(1e-9)))).unwrap();
            var.set(&(&before + &step).unwrap()).unwrap();
            let up = value();
            var.set(&(&before - &step).unwrap()).unwrap();
            let down = value();
            var.set(&before).unwrap();
            let expected = f64::from((&grad * &step).unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap());
            let found = (up - down) / 2.0;
            assert!((found - expected).abs() < 3e-6 + 0.02 * expected.abs(), "{kind}: {name}: {found} and {expected}");
        }
    }
}

/// Several tokens are tried at once and rewound. Samples and penalties equal those of single tokens.
#[test]
fn a_decoder_rewinds_tokens_that_were_tried() {
    for kind in TOYS {
        let model = toy(kind);
        let mut decoder = PlainDecoder::new(Arc::clone(&model));
        let sampling = SamplingParams { temperature: 0.7, repetition_penalty: 1.3, ..SamplingParams::default() };
        let ids = row(6, 4);
        let admit = |decoder: &mut PlainDecoder| {
            let mut state = State::new();
            state.add_rows(1);
            let (ids, sampling) = (ids.clone(), sampling.clone());
            decoder.admit(Admission { state, prompt_len: ids.len(), ids, sampling, vocab: Some(60) }).unwrap()
        };
        let step = |decoder: &mut PlainDecoder, row, tokens: &[u32]| {
            let draws: Vec<f64> = (0..tokens.len()).map(|i| 0.37 + 0.1 * i as f64).collect();
            decoder.step(&[RowStep { row, tokens, draws: &draws }]).unwrap().remove(0)
        };
        let place = admit(&mut decoder);
        step(&mut decoder, place, &ids);
        let one_by_one: Vec<u32> = [9u32, 10, 11]
            .iter()
            .zip([0.37, 0.47, 0.57])
            .map(|(&token, draw)| {
                decoder.push(place, token).unwrap();
                decoder.step(&[RowStep { row: place, tokens: &[token], draws: &[draw] }]).unwrap()[0][0].id
            })
            .collect();
        let place = admit(&mut decoder);
        step(&mut decoder, place, &ids);
        let tried = step(&mut decoder, place, &[9, 10, 11]);
        assert_eq!(tried.iter().map(|choice| choice.id).collect::<Vec<_>>(), one_by_one, "{kind}");
        let kept = decoder.rewind(place, 7).unwrap();
        assert_eq!(kept, if kind == "toy_recurrent" { 0 } else { 7 });
        let again = step(&mut decoder, place, &[&ids[..], &[9, 12]].concat()[kept..]);
        assert!(again.iter().all(|choice| choice.logprob.is_finite() && choice.id < 60));
    }
}

/// The gradient passes through a quantized head and through a scaled head.
#[test]
fn the_loss_has_a_gradient_beside_quantized_weights() {
    let store = || Arc::new(pricket::weights::Random::new(Dtype::F32, 4));
    for changes in [json!({"hidden_size": 64, "num_attention_heads": 4}), mpt_scaled()] {
        let wanted = Quantization { weights: BlockType::Q8_0, embeddings_and_head: Some(BlockType::Q8_0) };
        let loader = Loader::from_store(small_config(&changes), store()).threads(2);
        let model = loader.quantize(wanted).load().unwrap().model();
        let d = model.info().d_model;
        let hidden = Var::randn(0f32, 1.0, (70, d), &Device::Cpu).unwrap();
        let targets = row(70, 1);
        let nll = model.nll(&hidden, &targets).unwrap();
        let grad = nll.sum_all().unwrap().backward().unwrap().get(&hidden).unwrap().clone();
        // Compared with a step in a random direction.
        let step = Tensor::randn(0f32, 1e-2, (70, d), &Device::Cpu).unwrap();
        let at = |sign: f64| {
            let moved = (hidden.as_tensor() + (&step * sign).unwrap()).unwrap();
            model
                .nll(&moved, &targets)
                .unwrap()
                .to_dtype(DType::F64)
                .unwrap()
                .sum_all()
                .unwrap()
                .to_scalar::<f64>()
                .unwrap()
        };
        let expected = (at(1.0) - at(-1.0)) / 2.0;
        let found = (grad * step).unwrap().to_dtype(DType::F64).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
        assert!((found - expected).abs() < 1e-3 + 1e-3 * expected.abs(), "{found} and {expected}");
    }
}

fn mpt_scaled() -> Value {
    json!({
        "model_type": "mpt", "architectures": ["MPTForCausalLM"], "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 96,
        "expansion_ratio": 2, "logit_scale": 0.3, "no_bias": true, "attn_config": {"alibi": true},
    })
}

#[test]
fn weights_are_trained_by_name_and_never_quantized() {
    use pricket::nn::{LoadOptions, Storage, Trainable, Weights};
    let config = small_config(&json!({}));
    let load = |storage: Storage, trainable: Trainable, dtype: Dtype| {
        let store = Arc::new(pricket::weights::Random::new(dtype, 4));
        let options = LoadOptions { storage, trainable, ..LoadOptions::default() };
        let weights = Weights::new(store, pricket_gpt_neox::NAMES, options);
        pricket_gpt_neox::FAMILY.load(&config, &weights).map(|model| (model, weights.parameters()))
    };
    let names = Trainable::Names(vec!["attention.dense.weight".into(), "embed_out.weight".into()]);
    let (model, parameters) = load(Storage::AsStored, names, Dtype::F16).unwrap();
    let mut found: Vec<&str> = parameters.iter().map(|parameter| parameter.name.as_str()).collect();
    found.sort_unstable();
    let dense = |i: usize| format!("gpt_neox.layers.{i}.attention.dense.weight");
    assert_eq!(found, ["embed_out.weight", &dense(0), &dense(1)]);
    let ids = Tensor::new(&[[1u32, 2, 3, 4]], &Device::Cpu).unwrap();
    let grads = loss(&*model, &ids).unwrap().backward().unwrap();
    assert!(parameters.iter().all(|parameter| grads.get(&parameter.var).is_some()));
    let misspelled =
        LoadOptions { trainable: Trainable::Names(vec!["attention.dens.weight".into()]), ..LoadOptions::default() };
    let store = Arc::new(pricket::weights::Random::new(Dtype::F32, 4));
    let weights = Weights::new(store, pricket_gpt_neox::NAMES, misspelled);
    pricket_gpt_neox::FAMILY.load(&config, &weights).unwrap();
    assert!(weights.check_trainable().unwrap_err().to_string().contains("attention.dens.weight"));
    let blocks =
        Storage::Quantize(Quantization { weights: BlockType::Q8_0, embeddings_and_head: Some(BlockType::Q8_0) });
    let config = small_config(&json!({"hidden_size": 64, "num_attention_heads": 4}));
    let store = Arc::new(pricket::weights::Random::new(Dtype::F32, 4));
    let options = LoadOptions { storage: blocks, trainable: Trainable::All, ..LoadOptions::default() };
    let weights = Weights::new(store, pricket_gpt_neox::NAMES, options);
    let error = pricket_gpt_neox::FAMILY.load(&config, &weights).err().unwrap().to_string();
    assert!(error.contains("q8_0") && error.contains("embed_in"), "{error}");
    // The same configuration loads with f32 precision.
    assert!(
        Loader::from_store(config, Arc::new(pricket::weights::Random::new(Dtype::F32, 4)))
            .precision(Precision::F32)
            .load()
            .is_ok()
    );
}
