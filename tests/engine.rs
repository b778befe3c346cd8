//! The batching engine: requests that join and leave at any step, kept states, limits, and draft models.

use std::collections::BTreeMap;
use std::sync::Arc;

use pricket::candle::Tensor;
use pricket::lm::{
    Engine, EngineOptions, GenerateOptions, Generation, ModelId, Request, RequestId, SpeculationOptions, Update,
};
use pricket::nn::{Adapter, BlockType, PlainDecoder, Quantization, StepDecoder};
use pricket::{CausalLm, Context, SamplingParams};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::common::{small, small_loader};

/// Kinds of models with 61 tokens: attention with rotary positions, ALiBi, grouped keys, a recurrence.
fn kinds() -> [Value; 4] {
    let toy =
        |kind: &str| json!({"model_type": kind, "vocab": 61, "width": 24, "layers": 2, "heads": 4, "kv_heads": 2});
    let mpt = json!({
        "model_type": "mpt", "vocab_size": 61, "d_model": 24, "n_layers": 2, "n_heads": 3, "expansion_ratio": 2,
        "max_seq_len": 96, "attn_config": {"alibi": true, "attn_impl": "torch"}, "no_bias": true,
    });
    [json!({}), mpt, toy("toy_gated"), toy("toy_recurrent")]
}

/// Everything that a request got.
#[derive(Clone, Debug, Default, PartialEq)]
struct Got {
    ids: Vec<u32>,
    logprobs: Vec<u32>,
    scores: Vec<(usize, u64)>,
    logits: Vec<Vec<f32>>,
    /// Reason of the end, or the error.
    finish: Option<String>,
}

impl Got {
    fn add(&mut self, update: Update) {
        self.ids.extend(update.tokens.iter().map(|token| token.id));
        self.logprobs.extend(update.tokens.iter().map(|token| token.logprob.to_bits()));
        self.scores.extend(update.scores.iter().map(|score| (score.branch, score.logprob.to_bits())));
        self.logits.extend(update.logits);
        if let Some(finish) = update.finish {
            assert!(self.finish.is_none(), "the request ended twice");
            self.finish = Some(finish.map_or_else(|e| e.to_string(), |finish| format!("{finish:?}")));
        }
    }
}

/// Runs an engine until nothing is left.
fn drain(engine: &mut Engine, got: &mut BTreeMap<RequestId, Got>) {
    while let Some(updates) = engine.step().unwrap() {
        for update in updates {
            got.entry(update.request).or_default().add(update);
        }
    }
}

fn alone(model: &Arc<dyn CausalLm>, request: &Request) -> Got {
    let options = EngineOptions { step_tokens: Some(1000), prefix_memory: Some(0), ..Default::default() };
    let mut engine = Engine::new(Arc::clone(model), options).unwrap();
    let id = engine.submit(Request { model: ModelId::default(), ..request.clone() }).unwrap();
    let mut got = BTreeMap::new();
    drain(&mut engine, &mut got);
    got.remove(&id).unwrap_or_default()
}

/// A request whose prompt may begin like others: a part of one of three texts, then tokens of its own.
fn any_request(sampled: bool) -> impl Strategy<Value = Request> {
    let ids = (0u32..3, 0usize..40, prop::collection::vec(0u32..61, 1..12)).prop_map(|(text, shared, own)| {
        let shared = (0..shared as u32).map(|i| (i * (7 + 4 * text) + text * 13 + i / 5) % 61);
        shared.chain(own).collect::<Vec<u32>>()
    });
    let sampling = prop_oneof![
        2 => Just(SamplingParams::greedy()),
        1 => Just(SamplingParams { temperature: 0.9, top_p: 0.95, ..Default::default() }),
        1 => Just(SamplingParams { temperature: 1.3, repetition_penalty: 1.2, no_repeat_ngram_size: 3, ..Default::default() }),
    ];
    let branches = prop::collection::vec(prop::collection::vec(0u32..61, 1..6), 0..4);
    (ids, sampling, 0usize..14, any::<u64>(), -2i32..3, 0u8..4, branches).prop_map(
        move |(ids, sampling, max_tokens, seed, priority, kind, branches)| {
            let sampling = if sampled { sampling } else { SamplingParams::greedy() };
            let request = match kind {
                0 if !branches.is_empty() => Request::score_branches(ids, branches),
                1 => {
                    let from = 1 + seed as usize % ids.len();
                    Request::score(ids, from)
                }
                _ => {
                    let options =
                        GenerateOptions { max_tokens, sampling, seed, stop_ids: vec![17], ..Default::default() };
                    let score_from = (kind == 2).then_some(1);
                    Request { score_from, logits: true, ..Request::new(ids, options) }
                }
            };
            Request { priority, ..request }
        },
    )
}

fn any_options() -> impl Strategy<Value = EngineOptions> {
    (1usize..9, 1usize..50, any::<bool>(), prop::option::of(0u64..60_000)).prop_map(
        |(rows, step_tokens, is_limited, prefix_memory)| EngineOptions {
            rows,
            step_tokens: Some(step_tokens),
            // The largest request of all takes 64 positions, of at most 768 bytes, or nine recurrent states.
            memory: is_limited.then_some(120_000),
            prefix_memory,
        },
    )
}

/// A plan of arrivals: how many steps to run before each request, and whether it is canceled after a few more.
type Arrivals = Vec<(Request, usize, Option<usize>)>;

fn arrivals(sampled: bool) -> impl Strategy<Value = Arrivals> {
    prop::collection::vec((any_request(sampled), 0usize..3, prop::option::weighted(0.15, 0usize..6)), 1..14)
}

/// Runs the arrivals, and checks limits on the way. Returns what each request got, or `None` if it was canceled.
fn run(model: &Arc<dyn CausalLm>, options: &EngineOptions, arrivals: &Arrivals) -> Vec<Option<Got>> {
    let mut engine = Engine::new(Arc::clone(model), options.clone()).unwrap();
    let mut got: BTreeMap<RequestId, Got> = BTreeMap::new();
    let mut cancels: Vec<(RequestId, usize)> = Vec::new();
    let mut ids = Vec::new();
    let step = |engine: &mut Engine, got: &mut BTreeMap<RequestId, Got>, cancels: &mut Vec<(RequestId, usize)>| {
        for (id, left) in cancels.iter_mut() {
            if *left == 0 {
                engine.cancel(*id);
            }
            *left = left.saturating_sub(1);
        }
        let updates = engine.step().unwrap();
        if let Some(limit) = options.memory {
            assert!(engine.state_bytes() <= limit, "{} of {limit} bytes", engine.state_bytes());
        }
        assert!(engine.running() <= options.rows);
        let is_done = updates.is_none();
        for update in updates.into_iter().flatten() {
            got.entry(update.request).or_default().add(update);
        }
        is_done
    };
    for (request, wait, cancel) in arrivals {
        for _ in 0..*wait {
            step(&mut engine, &mut got, &mut cancels);
        }
        let id = engine.submit(request.clone()).unwrap();
        cancels.extend(cancel.map(|after| (id, after)));
        ids.push(id);
    }
    let mut steps = 0;
    while !step(&mut engine, &mut got, &mut cancels) {
        steps += 1;
        assert!(steps < 5000, "the engine does not end: {engine:?}");
    }
    assert_eq!((engine.running(), engine.waiting()), (0, 0));
    ids.iter().map(|id| got.remove(id).filter(|got| got.finish.as_deref() != Some("Unfinished"))).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// With a fixed order of summation, all results have the bits that they have alone.
    #[test]
    fn in_a_fixed_order_every_request_gets_the_bits_it_gets_alone(
        kind in 0usize..4, stored in 0usize..3, options in any_options(), arrivals in arrivals(true),
    ) {
        let loader = small_loader(&kinds()[kind], 5).deterministic(true);
        let loader = match stored {
            1 => loader.cache(pricket::nn::CacheType::F16),
            2 if kind == 0 => loader.quantize(Quantization { weights: BlockType::Q8_0, embeddings_and_head: None }),
            _ => loader,
        };
        let model = loader.load().unwrap().model();
        for ((request, ..), got) in arrivals.iter().zip(run(&model, &options, &arrivals)) {
            if let Some(got) = got {
                prop_assert_eq!(got, alone(&model, request));
            }
        }
    }

    /// Without one, greedy texts are the same up to a place where two tokens are almost equally likely, and scores up to
    /// rounding.
    #[test]
    fn every_request_gets_the_text_it_gets_alone(
        kind in 0usize..4, own_decoder: bool, options in any_options(), arrivals in arrivals(false),
    ) {
        let model = small(&kinds()[kind], 5).model();
        let with_decoder: Arc<dyn CausalLm> = if own_decoder { Arc::new(WithDecoder(Arc::clone(&model))) } else { Arc::clone(&model) };
        for ((request, ..), got) in arrivals.iter().zip(run(&with_decoder, &options, &arrivals)) {
            let Some(got) = got else { continue };
            let alone = alone(&model, request);
            prop_assert_eq!(got.scores.len(), alone.scores.len());
            for (got, alone) in got.scores.iter().zip(&alone.scores) {
                prop_assert_eq!(got.0, alone.0);
                prop_assert!((f64::from_bits(got.1) - f64::from_bits(alone.1)).abs() < 1e-4);
            }
            let same = got.ids.iter().zip(&alone.ids).take_while(|(a, b)| a == b).count();
            if same < got.ids.len().max(alone.ids.len()) {
                let mut logits = alone.logits[same].clone();
                logits.sort_by(|a, b| b.total_cmp(a));
                prop_assert!(logits[0] - logits[1] < 1e-3, "{:?} {:?}", got.ids, alone.ids);
            } else {
                prop_assert_eq!(&got.finish, &alone.finish);
            }
        }
    }

    /// Drafts of another model, which are mostly wrong, and drafts of the model itself, which are mostly right, never
    /// change a text.
    #[test]
    fn drafts_never_change_a_text(
        kind in 0usize..4, draft_kind in 0usize..4, is_itself: bool, own_decoder: bool, tokens in 1usize..8,
        options in any_options(), arrivals in arrivals(true),
    ) {
        let loader = |kind: usize, seed| small_loader(&kinds()[kind], seed).deterministic(true).load().unwrap().model();
        let model = loader(kind, 5);
        let draft = if is_itself { Arc::clone(&model) } else { loader(draft_kind, 6) };
        let with_decoder: Arc<dyn CausalLm> = if own_decoder { Arc::new(WithDecoder(Arc::clone(&model))) } else { Arc::clone(&model) };
        let speculation = SpeculationOptions { tokens, adaptive: false };
        let options = EngineOptions { memory: None, ..options };
        let mut engine = Engine::new(with_decoder, options).unwrap().with_draft(draft, speculation).unwrap();
        let mut got = BTreeMap::new();
        let ids: Vec<RequestId> = arrivals.iter().map(|(request, ..)| engine.submit(request.clone()).unwrap()).collect();
        drain(&mut engine, &mut got);
        for ((request, ..), id) in arrivals.iter().zip(ids) {
            let (got, alone) = (&got[&id], alone(&model, request));
            prop_assert_eq!(&got.ids, &alone.ids);
            prop_assert_eq!(&got.finish, &alone.finish);
        }
        let found = engine.speculation().unwrap();
        prop_assert!(found.accepted <= found.drafted);
        if is_itself && found.drafted > 30 {
            prop_assert!(found.acceptance() > 0.3, "{:?}", found);
        }
    }
}

/// A model whose own decoder is the plain one.
struct WithDecoder(Arc<dyn CausalLm>);

impl CausalLm for WithDecoder {
    fn info(&self) -> &pricket::nn::ModelInfo {
        self.0.info()
    }
    fn embed(&self, ids: &Tensor, ctx: &mut Context) -> pricket::nn::Result<Tensor> {
        self.0.embed(ids, ctx)
    }
    fn block(&self, i: usize, x: &Tensor, ctx: &mut Context) -> pricket::nn::Result<Tensor> {
        self.0.block(i, x, ctx)
    }
    fn finish(&self, x: &Tensor) -> pricket::nn::Result<Tensor> {
        self.0.finish(x)
    }
    fn head(&self, hidden: &Tensor) -> pricket::nn::Result<Tensor> {
        self.0.head(hidden)
    }
    fn nll(&self, hidden: &Tensor, targets: &[u32]) -> pricket::nn::Result<Tensor> {
        self.0.nll(hidden, targets)
    }
    fn step_decoder(&self) -> Option<Box<dyn StepDecoder>> {
        Some(Box::new(PlainDecoder::new(Arc::clone(&self.0))))
    }
    fn map_layers(
        &self,
        f: &mut dyn FnMut(pricket::nn::Layer<'_>) -> pricket::nn::Result<()>,
    ) -> pricket::nn::Result<Arc<dyn CausalLm>> {
        self.0.map_layers(f)
    }
    fn on_threads(&self, work: &mut dyn FnMut()) {
        self.0.on_threads(work);
    }
}

fn few(ids: Vec<u32>, max_tokens: usize) -> Request {
    Request::new(ids, GenerateOptions { max_tokens, ..Default::default() })
}

#[test]
fn a_common_beginning_is_read_once() {
    for kind in kinds() {
        let model = small(&kind, 3).model();
        let text: Vec<u32> = (0..40).map(|i| i * 11 % 61).collect();
        let mut engine = Engine::new(Arc::clone(&model), EngineOptions::default()).unwrap();
        let mut got = BTreeMap::new();
        // Ten samples of one prompt: its last token is read by each of them, the others by one.
        for seed in 0..10 {
            let sampling = SamplingParams::unchanged();
            let options = GenerateOptions { max_tokens: 1, sampling, seed, ..Default::default() };
            engine.submit(Request::new(text.clone(), options)).unwrap();
        }
        drain(&mut engine, &mut got);
        assert_eq!(engine.tokens_read(), 39 + 10, "{kind}");
        // A later prompt that goes on from there. A recurrence was marked at the end of the prompt.
        let before = engine.tokens_read();
        engine.submit(few([&text[..], &[1, 2, 3]].concat(), 1)).unwrap();
        drain(&mut engine, &mut got);
        assert_eq!(engine.tokens_read() - before, 3, "{kind}");
        // Continuations of one context, and contexts with a common beginning.
        let (mut engine, mut got) = (Engine::new(model, EngineOptions::default()).unwrap(), BTreeMap::new());
        engine.submit(Request::score_branches(text.clone(), vec![vec![1], vec![2, 3], vec![4, 5, 6]])).unwrap();
        engine.submit(Request::score_branches([&text[..], &[9]].concat(), vec![vec![7, 8]])).unwrap();
        drain(&mut engine, &mut got);
        assert_eq!(engine.tokens_read(), 40 + 1 + 2 + 2, "{kind}");
    }
}

#[test]
fn a_low_priority_waits_and_does_not_starve() {
    let model = small(&json!({}), 2).model();
    let mut engine = Engine::new(model, EngineOptions { rows: 2, ..Default::default() }).unwrap();
    let submit = |engine: &mut Engine, priority| engine.submit(Request { priority, ..few(vec![1, 2, 3], 2) }).unwrap();
    let (low, high) = (submit(&mut engine, -1), submit(&mut engine, 0));
    let mut ended = Vec::new();
    // More requests arrive than the engine can serve.
    while !ended.contains(&low) {
        for _ in 0..3 {
            submit(&mut engine, 0);
        }
        for update in engine.step().unwrap().unwrap() {
            if update.finish.is_some() {
                ended.push(update.request);
            }
        }
        assert!(ended.len() < 100, "the request with the low priority starves");
    }
    let place = |id| ended.iter().position(|&ended| ended == id).unwrap();
    assert!(place(low) > place(high) + 20, "{} requests went before it", place(low));
}

/// The model with an adapter on each linear layer.
fn adapted(base: &Arc<dyn CausalLm>, scale: f64) -> Arc<dyn CausalLm> {
    let mut add = |linear: &pricket::nn::Linear| {
        let (outputs, inputs) = linear.weight().shape()?;
        let seeded = |rows: usize, columns: usize| -> pricket::nn::Result<Tensor> {
            let numbers = (0..rows * columns).map(|i| ((i * 7919 % 101) as f32 - 50.0) / 200.0);
            Ok(Tensor::from_iter(numbers, &pricket::candle::Device::Cpu)?.reshape((rows, columns))?)
        };
        linear.with_adapters(vec![Adapter::new(seeded(2, inputs)?, seeded(outputs, 2)?, scale)])
    };
    base.map_linears(&mut add).unwrap()
}

#[test]
fn adapters_differ_by_request() {
    let base = small(&json!({}), 2).model();
    let adapted = adapted(&base, 1.0);
    let mut engine = Engine::new(Arc::clone(&base), EngineOptions::default()).unwrap();
    let model = engine.add_model(Arc::clone(&adapted));
    let request = |model, i: u32| Request { model, ..few((0..20).map(|j| (j * 5 + i) % 61).collect(), 8) };
    let requests: Vec<Request> =
        (0..6).map(|i| request(if i % 2 == 0 { ModelId::default() } else { model }, i / 4)).collect();
    let ids: Vec<RequestId> = requests.iter().map(|request| engine.submit(request.clone()).unwrap()).collect();
    let mut got = BTreeMap::new();
    drain(&mut engine, &mut got);
    for (i, (request, id)) in requests.iter().zip(ids).enumerate() {
        assert_eq!(got[&id].ids, alone(if i % 2 == 0 { &base } else { &adapted }, request).ids);
    }
    assert_ne!(got[&RequestId(0)].ids, got[&RequestId(1)].ids);
    let stranger = Engine::new(base, EngineOptions::default()).unwrap().submit(request(model, 0)).unwrap_err();
    assert!(stranger.to_string().contains("does not belong to this engine"), "{stranger}");
}

#[test]
fn impossible_requests_are_refused() {
    let model = small(&json!({}), 2).model();
    let options = EngineOptions { memory: Some(30_000), ..Default::default() };
    let mut engine = Engine::new(Arc::clone(&model), options).unwrap();
    for (request, expected) in [
        (few(vec![], 1), "the prompt is empty"),
        (few(vec![61], 1), "token 61 is outside the model's vocabulary of 61"),
        (few(vec![1; 97], 1), "97"),
        (few(vec![1; 40], 50), "limited to 30000 bytes"),
        (Request::score(vec![1, 2], 0), "score_from: expected 1 to 2, found 0"),
        (Request::score(vec![1, 2], 3), "score_from: expected 1 to 2, found 3"),
        (Request::score_branches(vec![1], vec![vec![]]), "a continuation to score is empty"),
        (Request { branches: vec![vec![1]], ..few(vec![1], 3) }, "set max_tokens to 0"),
        (
            Request::new(vec![1], GenerateOptions { stop: vec!["a".into()], ..Default::default() }),
            "stop strings need a tokenizer",
        ),
    ] {
        let said = engine.submit(request).unwrap_err().to_string();
        assert!(said.contains(expected), "{said}");
    }
    assert!(engine.step().unwrap().is_none());
    let said = Engine::new(Arc::clone(&model), EngineOptions { rows: 0, ..Default::default() }).unwrap_err();
    assert_eq!(said.to_string(), "rows: expected at least 1, found 0");
    let said = engine.with_draft(model, SpeculationOptions { tokens: 8, adaptive: true }).unwrap_err();
    assert_eq!(said.to_string(), "draft tokens: expected 1 to 7, found 8");
}

/// The request whose logits overflow ends with the error. The others go on.
#[test]
fn a_request_that_overflows_fails_alone() {
    let model = small(&json!({}), 2).model();
    let broken = Arc::new(Overflows(Arc::clone(&model)));
    let mut engine = Engine::new(broken, EngineOptions::default()).unwrap();
    let requests = [few(vec![1, 2, 3], 5), few(vec![60, 2], 5), Request::score(vec![4, 60, 7], 1), few(vec![5], 5)];
    for request in &requests {
        engine.submit(request.clone()).unwrap();
    }
    let mut got = BTreeMap::new();
    drain(&mut engine, &mut got);
    for (i, request) in requests.iter().enumerate() {
        let got = &got[&RequestId(i as u64)];
        if request.ids.contains(&60) {
            assert!(got.finish.as_ref().unwrap().contains("not finite"), "{:?}", got.finish);
        } else {
            assert_eq!(got.ids, alone(&model, request).ids);
        }
    }
}

/// A model whose hidden states overflow at the token 60.
struct Overflows(Arc<dyn CausalLm>);

impl CausalLm for Overflows {
    fn info(&self) -> &pricket::nn::ModelInfo {
        self.0.info()
    }
    fn embed(&self, ids: &Tensor, ctx: &mut Context) -> pricket::nn::Result<Tensor> {
        let bad = ids.eq(60u32)?.to_dtype(pricket::candle::DType::F32)?.unsqueeze(2)?;
        let bad = (bad * 3e38)?;
        // Zero for the other tokens, so that their rows do not change.
        Ok(self.0.embed(ids, ctx)?.broadcast_add(&(&bad * &bad)?)?)
    }
    fn block(&self, i: usize, x: &Tensor, ctx: &mut Context) -> pricket::nn::Result<Tensor> {
        self.0.block(i, x, ctx)
    }
    fn finish(&self, x: &Tensor) -> pricket::nn::Result<Tensor> {
        self.0.finish(x)
    }
    fn head(&self, hidden: &Tensor) -> pricket::nn::Result<Tensor> {
        self.0.head(hidden)
    }
    fn nll(&self, hidden: &Tensor, targets: &[u32]) -> pricket::nn::Result<Tensor> {
        self.0.nll(hidden, targets)
    }
    fn map_layers(
        &self,
        f: &mut dyn FnMut(pricket::nn::Layer<'_>) -> pricket::nn::Result<()>,
    ) -> pricket::nn::Result<Arc<dyn CausalLm>> {
        self.0.map_layers(f)
    }
}

/// Tokens sampled with drafts of another model have the probabilities of the model.
#[test]
fn sampling_with_drafts_follows_the_distribution_of_the_model() {
    const DRAWS: usize = 6000;
    let model = small(&json!({}), 2).model();
    let draft = adapted(&model, 0.3);
    let sampling = SamplingParams { temperature: 0.7, top_k: 12, ..Default::default() };
    let prompt = vec![4, 8, 15, 16, 23, 42];
    let requests = (0..DRAWS as u64).map(|seed| {
        let options = GenerateOptions { max_tokens: 3, sampling: sampling.clone(), seed, ..Default::default() };
        Request::new(prompt.clone(), options)
    });
    let speculation = SpeculationOptions { tokens: 1, adaptive: false };
    let mut generation =
        Generation::new(Arc::clone(&model), requests.collect()).unwrap().with_draft(draft, speculation).unwrap();
    let mut texts = vec![Vec::new(); DRAWS];
    while let Some(tokens) = generation.step().unwrap() {
        for token in tokens {
            texts[token.row].push(token.id);
        }
    }
    // The second token, for each first token that is frequent enough.
    let mut counts: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    for text in &texts {
        counts.entry(text[0]).or_insert_with(|| vec![0; 61])[text[1] as usize] += 1;
    }
    let (mut statistic, mut freedom) = (0.0, 0.0);
    for (first, counts) in counts {
        let total: usize = counts.iter().sum();
        let request = Request { logits: true, ..few([&prompt[..], &[first]].concat(), 1) };
        let mut scores = alone(&model, &request).logits.remove(0);
        sampling.process(&mut scores, &[], 0);
        let sum: f64 = scores.iter().map(|&x| f64::from(x).exp()).sum();
        // Rare tokens are counted together.
        let (mut rare, mut rare_expected, mut cells) = (0.0, 0.0, 0.0);
        for (score, &count) in scores.iter().zip(&counts) {
            let expected = f64::from(*score).exp() / sum * total as f64;
            if expected >= 8.0 {
                statistic += (count as f64 - expected).powi(2) / expected;
                cells += 1.0;
            } else {
                rare += count as f64;
                rare_expected += expected;
            }
        }
        if rare_expected >= 8.0 {
            statistic += (rare - rare_expected).powi(2) / rare_expected;
            cells += 1.0;
        }
        freedom += f64::max(cells - 1.0, 0.0);
    }
    // Beyond five standard deviations of the chi-squared distribution. Seeds are fixed, so chance plays no part.
    assert!(freedom > 50.0 && (statistic - freedom).abs() < 5.0 * (2.0 * freedom).sqrt(), "{statistic} of {freedom}");
    let found = generation.speculation().unwrap();
    assert!(found.drafted > 5000 && (0.1..0.9).contains(&found.acceptance()), "{found:?}");
}

/// Memory of the process does not grow with the number of requests.
#[cfg(target_os = "linux")]
#[test]
fn a_hundred_thousand_requests_leave_nothing() {
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "engine::child_serves_requests", "--nocapture"])
        .env("PRICKET_CHILD_ENGINE", "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let grown = text.split("GROWN ").nth(1).and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    let grown = grown.unwrap_or_else(|| panic!("{text}\n{}", String::from_utf8_lossy(&output.stderr)));
    // 90,000 requests would leave 8 MiB at 93 bytes each.
    assert!(grown < 8 << 20, "{grown} bytes more after 90,000 requests");
}

#[cfg(target_os = "linux")]
#[test]
fn child_serves_requests() {
    if std::env::var_os("PRICKET_CHILD_ENGINE").is_none() {
        return;
    }
    let config = json!({"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8});
    let model = small_loader(&config, 1).threads(1).load().unwrap().model();
    let options = EngineOptions { step_tokens: Some(256), prefix_memory: Some(100_000), ..Default::default() };
    let mut engine = Engine::new(model, options).unwrap();
    let resident = || {
        let status = std::fs::read_to_string("/proc/self/statm").unwrap();
        status.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 4096
    };
    let (mut ended, mut submitted, mut before) = (0, 0u32, 0);
    while ended < 100_000 {
        while engine.waiting() < 100 && submitted < 100_000 {
            let request = few(vec![submitted % 61, submitted / 61 % 61, submitted % 7], (submitted % 3) as usize);
            let id = engine.submit(request).unwrap();
            submitted += 1;
            if submitted.is_multiple_of(10) {
                engine.cancel(id);
            }
        }
        for update in engine.step().unwrap().unwrap() {
            ended += usize::from(update.finish.is_some());
        }
        if before == 0 && ended > 10_000 {
            before = resident();
        }
    }
    assert_eq!((engine.running(), engine.waiting()), (0, 0));
    assert!(engine.step().unwrap().is_none());
    assert!(engine.state_bytes() <= 100_000);
    println!("GROWN {}", resident().saturating_sub(before));
}

/// Prompts with a common beginning are read in few passes, also if no state may be kept and each request ends with its
/// first token.
#[test]
fn prompts_that_begin_alike_are_read_in_few_steps() {
    for own_decoder in [false, true] {
        let plain = small(&json!({}), 2).model();
        let model: Arc<dyn CausalLm> =
            if own_decoder { Arc::new(WithDecoder(Arc::clone(&plain))) } else { Arc::clone(&plain) };
        let prompt = |i: u32| [&(0..20).collect::<Vec<u32>>()[..], &[30 + i, 5]].concat();
        for max_tokens in [1, 4] {
            let options = EngineOptions { prefix_memory: Some(0), ..Default::default() };
            let mut engine = Engine::new(Arc::clone(&model), options).unwrap();
            for i in 0..20 {
                engine.submit(few(prompt(i), max_tokens)).unwrap();
            }
            let (mut steps, mut got) = (0, BTreeMap::new());
            while let Some(updates) = engine.step().unwrap() {
                steps += 1;
                for update in updates {
                    got.entry(update.request).or_insert_with(Got::default).add(update);
                }
            }
            assert!(steps <= max_tokens + 2, "{steps} steps for {max_tokens} tokens");
            assert_eq!(engine.prompt_tokens_read(), 22 + 19 * 2);
            for i in 0..20 {
                assert_eq!(got[&RequestId(i)].ids, alone(&plain, &few(prompt(i as u32), max_tokens)).ids);
            }
        }
    }
}

/// States from passes with taps are not used without them, and every prompt is seen in full.
#[test]
fn taps_see_whole_prompts_and_leave_no_states() {
    use pricket::{Site, Taps};
    let model = small(&json!({}), 2).model();
    let request = || few((0..20).collect(), 6);
    let plain = alone(&model, &request());
    let with_decoder: Arc<dyn CausalLm> = Arc::new(WithDecoder(Arc::clone(&model)));
    for model in [model, with_decoder] {
        let mut engine = Engine::new(model, EngineOptions::default()).unwrap();
        let run = |engine: &mut Engine| {
            let id = engine.submit(request()).unwrap();
            let mut got = BTreeMap::new();
            drain(engine, &mut got);
            got.remove(&id).unwrap().ids
        };
        assert_eq!(run(&mut engine), plain.ids);
        engine.set_taps(Some(Taps::new().edit(Site::ResidPost, |_, x| Ok((x * -1.0)?))));
        let steered = run(&mut engine);
        assert_ne!(steered, plain.ids);
        engine.set_taps(None);
        assert_eq!(run(&mut engine), plain.ids);
        // Taps can be set while requests run.
        engine.submit(few(vec![1, 2, 3], 8)).unwrap();
        engine.submit(few(vec![4, 2, 3, 5], 8)).unwrap();
        engine.step().unwrap();
        engine.set_taps(Some(Taps::new().record(Site::ResidPost)));
        engine.step().unwrap();
        assert_eq!(engine.take_recording().spans().len(), 2);
        let mut got = BTreeMap::new();
        drain(&mut engine, &mut got);
        assert!(got.values().all(|got| got.finish.as_deref() == Some("Length")));
    }
}

/// A request beyond the table of learned positions fails when it gets there. The others go on.
#[test]
fn a_request_beyond_the_learned_positions_fails_alone() {
    let config = json!({
        "model_type": "mpt", "vocab_size": 61, "d_model": 24, "n_layers": 1, "n_heads": 3, "expansion_ratio": 2,
        "max_seq_len": 24, "learned_pos_emb": true, "attn_config": {"alibi": false, "attn_impl": "torch"}, "no_bias": true,
    });
    let model = small(&config, 4).model();
    let mut engine = Engine::new(Arc::clone(&model), EngineOptions::default()).unwrap();
    let options = GenerateOptions { max_tokens: usize::MAX, beyond_trained_length: true, ..Default::default() };
    let long = engine.submit(Request::new(vec![1; 20], options)).unwrap();
    let short = engine.submit(few(vec![3, 4], 15)).unwrap();
    let mut got = BTreeMap::new();
    drain(&mut engine, &mut got);
    assert_eq!(got[&long].ids.len(), 5);
    assert!(got[&long].finish.as_ref().unwrap().contains("24"), "{:?}", got[&long].finish);
    assert_eq!(got[&short].ids, alone(&model, &few(vec![3, 4], 15)).ids);
}

/// The row that shares a short beginning with a long one takes no more memory than it needs.
#[test]
fn a_shared_beginning_does_not_bring_the_room_of_its_source() {
    let config = json!({"max_position_embeddings": 2048});
    let model = small(&config, 4).model();
    let per_position = model.info().cache_bytes_per_token();
    let options = EngineOptions { memory: Some(per_position * (1088 + 2 * 64)), ..Default::default() };
    let mut engine = Engine::new(model, options.clone()).unwrap();
    engine.submit(few((0..1024).map(|i| i % 61).collect(), 60)).unwrap();
    (0..4).for_each(|_| drop(engine.step().unwrap()));
    for i in 0..4 {
        engine.submit(few((0..30).chain([40 + i]).collect(), 20)).unwrap();
    }
    while engine.step().unwrap().is_some() {
        assert!(engine.state_bytes() <= options.memory.unwrap(), "{} bytes", engine.state_bytes());
    }
}
