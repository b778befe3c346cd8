//! Prompts far beyond the trained length.

use std::sync::Arc;

use pricket::candle::{Device, IndexOp, Tensor};
use pricket::nn::State;
use pricket::weights::Dtype;
use pricket::weights::Random;
use pricket::{Context, Loader, Pricket};
use serde_json::json;

use crate::common::worst;

fn ids(count: usize, vocab: u32) -> Tensor {
    let ids: Vec<u32> = (0..count as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 7) % vocab).collect();
    Tensor::from_vec(ids, (1, count), &Device::Cpu).unwrap()
}

/// The logits of the last eight positions, read in chunks of `chunk` tokens into a cache, and the bytes of the cache.
fn cached(pricket: &Pricket, ids: &Tensor, chunk: usize) -> (Tensor, usize) {
    let (model, count) = (pricket.model(), ids.dim(1).unwrap());
    let mut ctx = Context::new().with_state(State::new());
    let mut last = Vec::new();
    // The last eight tokens are read one by one, as in decoding.
    let mut start = 0;
    while start < count {
        let len = if start < count - 8 { chunk.min(count - 8 - start) } else { 1 };
        let hidden = model.hidden(&ids.narrow(1, start, len).unwrap().contiguous().unwrap(), &mut ctx).unwrap();
        if start >= count - 8 {
            last.push(model.head(&hidden).unwrap());
        }
        start += len;
    }
    (Tensor::cat(&last, 1).unwrap(), ctx.state().unwrap().bytes())
}

/// The same logits from one pass without a cache.
fn uncached(pricket: &Pricket, ids: &Tensor) -> Tensor {
    let (model, count) = (pricket.model(), ids.dim(1).unwrap());
    let hidden = model.hidden(ids, &mut Context::new()).unwrap();
    model.head(&hidden.i((.., count - 8.., ..)).unwrap().contiguous().unwrap()).unwrap()
}

/// Compares both ways and prints the memory beyond weights and cache.
#[cfg(target_os = "linux")]
fn measure(pricket: &Pricket, count: usize) {
    use crate::memory::{peak_rss, rss};

    let ids = ids(count, pricket.info().vocab as u32);
    let before = rss();
    let start = std::time::Instant::now();
    let (end, cache) = cached(pricket, &ids, 512);
    let beside = peak_rss() as i64 - before as i64 - cache as i64;
    println!(
        "{count} tokens: cache {cache}, beside weights and cache {beside} bytes, {:.1} s",
        start.elapsed().as_secs_f64()
    );
    assert!(beside < 500_000_000, "{beside} bytes");
    let start = std::time::Instant::now();
    let off = worst(&end, &uncached(pricket, &ids));
    println!("cached and uncached differ by {off} at the end; uncached {:.1} s", start.elapsed().as_secs_f64());
    assert!(off < 1e-4, "{off}");
}

fn storywriter(d_model: usize) -> Pricket {
    let config = json!({
        "model_type": "mpt", "d_model": d_model, "n_heads": 8, "n_layers": 2, "vocab_size": 512, "max_seq_len": 65536,
        "no_bias": true, "attn_config": {"alibi": true, "alibi_bias_max": 16, "clip_qkv": 6},
    });
    Loader::from_store(config, Arc::new(Random::new(Dtype::F32, 7))).threads(2).load().unwrap()
}

/// Twice the context of any rotary model of the zoo, with every slope from 2^-2 to 2^-16.
#[test]
fn chunked_prefill_matches_one_pass() {
    let pricket = storywriter(64);
    let ids = ids(4500, 512);
    let off = worst(&cached(&pricket, &ids, 512).0, &uncached(&pricket, &ids));
    assert!(off < 1e-4, "{off}");
}

/// `cargo test --release --test tests -- --ignored --nocapture long::storywriter`
#[cfg(target_os = "linux")]
#[test]
#[ignore = "minutes"]
fn storywriter_reads_65536_tokens() {
    measure(&storywriter(256), 65_536);
}

/// `cargo test --release --test tests -- --ignored --nocapture long::mpt_1b`
#[cfg(target_os = "linux")]
#[test]
#[ignore = "ten minutes and 12 GB"]
fn mpt_1b_reads_10000_tokens() {
    let config = pricket::suites::published_config("mpt-1b").unwrap();
    let pricket = Loader::from_store(config, Arc::new(Random::new(Dtype::F32, 7))).threads(2).load().unwrap();
    measure(&pricket, 10_000);
}
