//! Allocations of a decoding step.

use std::alloc::{GlobalAlloc, Layout, System};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use pricket::nn::{BlockType, Quantization};
use pricket::weights::Dtype;
use pricket::weights::Random;
use pricket::{GenerateOptions, Loader};

/// The system's allocator with a count of the allocations. It counts only in a child process that runs this test.
struct Counting;

/// Decoding steps that are counted together.
const STEPS: usize = 16;

static COUNTING: AtomicBool = AtomicBool::new(false);
static COUNT: AtomicUsize = AtomicUsize::new(0);
static LARGE: AtomicUsize = AtomicUsize::new(0);
/// Size in bytes above which an allocation is large.
static FROM: AtomicUsize = AtomicUsize::new(usize::MAX);

impl Counting {
    fn note(size: usize) {
        if COUNTING.load(Ordering::Relaxed) {
            COUNT.fetch_add(1, Ordering::Relaxed);
            if size > FROM.load(Ordering::Relaxed) {
                LARGE.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

#[allow(unsafe_code, reason = "an allocator is unsafe by its trait; this one forwards every call")]
// SAFETY: every call goes to the system's allocator with the arguments of the caller.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::note(layout.size());
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        Self::note(layout.size());
        // SAFETY: the caller keeps the contract of `alloc_zeroed`.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        Self::note(size);
        // SAFETY: the caller keeps the contract of `realloc`.
        unsafe { System.realloc(at, layout, size) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A step makes at most eight allocations for each operation. Only the logits are larger than 4 KiB plus the widest row
/// of activations.
#[test]
fn a_decoding_step_allocates_little() {
    let run = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "allocations::child_decodes", "--nocapture"])
        .env("PRICKET_CHILD_ALLOCATIONS", "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&run.stdout);
    let rows: Vec<Vec<usize>> = text
        .lines()
        .filter_map(|line| line.split_once("STEP "))
        .map(|(_, numbers)| numbers.split_whitespace().map(|n| n.parse().unwrap()).collect())
        .collect();
    assert_eq!(rows.len(), 3, "{text}{}", String::from_utf8_lossy(&run.stderr));
    for row in rows {
        let [count, large, layers] = row[..] else { panic!("{row:?}") };
        // Each layer: two norms, four products, two rotations, two writes to the cache, attention and a sum. Once:
        // embedding, norm and head.
        let operations = 12 * layers + 3;
        println!("{count} allocations for {operations} operations, {large} large");
        assert!(count <= 8 * operations, "{count} allocations for {operations} operations");
        // The logits exist three times: as output of the head, as kept by the step, and as returned to the caller.
        assert!(large <= 3, "{large} large allocations");
    }
}

#[test]
fn child_decodes() {
    if std::env::var_os("PRICKET_CHILD_ALLOCATIONS").is_none() {
        return;
    }
    let config = pricket::suites::published_config("160m").unwrap();
    for kind in [None, Some(BlockType::Q4_0), Some(BlockType::Q8_0)] {
        let mut loader = Loader::from_store(config.clone(), Arc::new(Random::new(Dtype::F16, 0))).threads(2);
        if let Some(kind) = kind {
            loader = loader.quantize(Quantization { weights: kind, embeddings_and_head: Some(kind) });
        }
        let model = loader.load().unwrap();
        let options = GenerateOptions { max_tokens: 48, stop_at_eos: false, ..Default::default() };
        let mut generation = model.generation(vec![vec![1, 2, 3]], &options).unwrap();
        (0..8).for_each(|_| drop(generation.step().unwrap()));
        FROM.store(4096 + 4 * 4 * model.info().d_model, Ordering::Relaxed);
        COUNT.store(0, Ordering::Relaxed);
        LARGE.store(0, Ordering::Relaxed);
        COUNTING.store(true, Ordering::Relaxed);
        (0..STEPS).for_each(|_| drop(generation.step().unwrap()));
        COUNTING.store(false, Ordering::Relaxed);
        let mean = |n: &AtomicUsize| n.load(Ordering::Relaxed).div_ceil(STEPS);
        println!("STEP {} {} {}", mean(&COUNT), mean(&LARGE), model.info().layers);
    }
}
