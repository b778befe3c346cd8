//! Instruction sets, threads, rounded activations.

#[cfg(target_os = "linux")]
use std::collections::BTreeSet;
#[cfg(target_os = "linux")]
use std::process::Stdio;

use pricket::nn::ops::ActivationPrecision;
use pricket::nn::{BlockType, CacheType, Quantization};
use pricket::{GenerateOptions, Loader};

use crate::common::{directories_with, example, root};

/// Every golden case passes with each instruction set of this processor.
#[test]
fn every_instruction_set_passes_the_golden_cases() {
    let kinds = ["models", "files", "scoring"].map(|kind| root().join("tests/golden").join(kind));
    let cases: Vec<_> = kinds.iter().flat_map(|kind| directories_with(kind, "case.json")).collect();
    for path in ["scalar", "neon", "avx2", "avx512", "amx"] {
        let mut command = example("parity");
        let output = command.args(&cases).env("PRICKET_CPU", path).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        // A missing instruction set is refused by name. All other tests use the best one.
        if path != "scalar" && said.contains("this processor has") {
            continue;
        }
        assert!(output.status.success(), "{path}: {said}");
    }
}

/// The plain twins, which run where there are no kernels, pass too.
#[test]
fn the_plain_twins_pass_the_golden_cases() {
    let kinds = ["models", "files", "scoring"].map(|kind| root().join("tests/golden").join(kind));
    let cases: Vec<_> = kinds.iter().flat_map(|kind| directories_with(kind, "case.json")).collect();
    let output = example("parity").args(&cases).env("PRICKET_KERNELS", "off").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    let output = example("generate").args(["-n", "1"]).env("PRICKET_KERNELS", "none").output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("PRICKET_KERNELS is \"none\"; expected on or off"), "{said}");
}

#[test]
fn an_unknown_instruction_set_is_refused() {
    let output = example("generate").args(["-n", "1"]).env("PRICKET_CPU", "mmx").output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("PRICKET_CPU is \"mmx\"; it can be scalar"), "{said}");
}

/// Generation starts neither candle's nor rayon's threads. All work runs on pricket's own pool.
#[cfg(target_os = "linux")]
#[test]
fn no_other_thread_pool_starts() {
    let mut command = example("bench");
    command.args(["--shape", "14m", "--threads", "3", "--prefill", "512", "--decode", "16", "--new-tokens", "64"]);
    let mut child = command.args(["--runs", "30"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let mut seen = BTreeSet::new();
    while child.try_wait().unwrap().is_none() {
        // Threads start and end while they are listed.
        let tasks = std::fs::read_dir(format!("/proc/{}/task", child.id())).into_iter().flatten().flatten();
        seen.extend(tasks.filter_map(|task| {
            let name = std::fs::read_to_string(task.path().join("comm")).ok()?;
            let id = task.file_name().to_string_lossy().into_owned();
            Some((name.trim().to_owned(), id))
        }));
        std::thread::yield_now();
    }
    assert!(child.wait().unwrap().success());
    let names: Vec<&str> = seen.iter().map(|(name, _)| name.as_str()).collect();
    let ours = names.iter().filter(|name| name.starts_with("pricket-")).count();
    assert_eq!(ours, 2, "{names:?}");
    assert!(!names.iter().any(|name| name.contains("candle") || name.contains("rayon")), "{names:?}");
}

/// Rounded activations and caches change little: the divergence of the next-token probabilities from those of f32, over
/// a text from the training data.
#[test]
fn rounded_activations_and_caches_stay_close() {
    let text = "My fellow citizens, the people of the United States have called me to the office of their President, and I \
                come before you to take the oath that the Constitution prescribes.";
    let probabilities = |loader: Loader| {
        let model = loader.threads(2).load().unwrap();
        let ids = model.encode(text).unwrap();
        // Token by token, so that keys and values pass through the cache.
        let mut rows = Vec::new();
        for end in 1..ids.len() {
            let options = GenerateOptions { max_tokens: 1, ..Default::default() };
            let mut generation = model.generation(vec![ids[..end].to_vec()], &options).unwrap();
            generation.step().unwrap();
            let logits = &generation.logits()[0];
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f64 = logits.iter().map(|x| f64::from(x - max).exp()).sum();
            rows.push(logits.iter().map(|x| f64::from(x - max) - sum.ln()).collect::<Vec<f64>>());
        }
        rows
    };
    let divergence = |exact: &[Vec<f64>], rounded: &[Vec<f64>]| {
        let row = |(p, q): (&Vec<f64>, &Vec<f64>)| p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
        exact.iter().zip(rounded).map(row).sum::<f64>() / exact.len() as f64
    };
    let tiny = || Loader::embedded("tiny").unwrap();
    let exact = probabilities(tiny());
    for (what, loader, allowed) in [
        ("f16 cache", tiny().cache(CacheType::F16), 1e-5),
        // bfloat16 has eight significant bits.
        ("bf16 cache", tiny().cache(CacheType::BF16), 1e-3),
        ("q8_0 cache", tiny().cache(CacheType::Q8_0), 1e-3),
        ("bf16", tiny().activations(ActivationPrecision::BF16), 1e-3),
        ("q8", tiny().activations(ActivationPrecision::Q8), 1e-4),
    ] {
        let found = divergence(&exact, &probabilities(loader));
        println!("{what}: {found:.2e}");
        assert!(found.abs() < allowed, "{what}: {found}");
    }
    for kind in [BlockType::Q4_0, BlockType::Q5_1, BlockType::Q8_0] {
        let quantized = || tiny().quantize(Quantization { weights: kind, embeddings_and_head: Some(kind) });
        let exact = probabilities(quantized());
        let found = divergence(&exact, &probabilities(quantized().activations(ActivationPrecision::Q8)));
        println!("q8 beside {kind}: {found:.2e}");
        assert!(found.abs() < 1e-3, "{kind}: {found}");
    }
}
