//! Checks the machine: instruction set, threads, speed, memory, devices, cache, token and network. Prints one line for
//! each, with advice.
//!
//! `cargo run --example doctor`

#[path = "common/finish.rs"]
mod finish;
#[path = "common/rates.rs"]
mod rates;

use std::io::Write;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use pricket::Hub;
use pricket::hub::{NoProgress, Settings};
use pricket::nn::ops::{self, Isa};
use pricket::weights::Dtype;
use serde_json::json;

/// Check the machine: instruction set, threads, speed, memory, devices, cache, token and network. The exit code is 1 if
/// a problem keeps pricket from working.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Do not connect to the Hub
    #[arg(long)]
    offline: bool,
    /// Number of CPU threads for the speed measurement, from 1 to 1024 [default: number of physical cores]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Print one JSON object per check instead of text
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(code) => code,
        Err(e) => finish::finish(Err(e)),
    }
}

/// The result of a check.
struct Finding {
    part: &'static str,
    is_broken: bool,
    what: String,
    advice: Option<String>,
}

impl Finding {
    fn new(part: &'static str, what: impl Into<String>) -> Self {
        Self { part, is_broken: false, what: what.into(), advice: None }
    }

    fn broken(part: &'static str, what: impl Into<String>) -> Self {
        Self { is_broken: true, ..Self::new(part, what) }
    }

    fn advise(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }
}

fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let threads = args.threads.unwrap_or_else(pricket::loading::default_threads);
    anyhow::ensure!((1..=1024).contains(&threads), "--threads is {threads}; expected 1 to 1024");
    let checks: [&dyn Fn() -> Finding; 9] = [
        &instructions,
        &|| cores(threads),
        &|| speed(threads),
        &memory,
        &|| device("cuda"),
        &|| device("metal"),
        &cache,
        &token,
        &|| network(args.offline),
    ];
    let mut out = std::io::stdout().lock();
    let mut is_broken = false;
    for check in checks {
        let Finding { part, is_broken: broken, what, advice } = check();
        is_broken |= broken;
        if args.json {
            writeln!(out, "{}", json!({ "part": part, "ok": !broken, "what": what, "advice": advice }))?;
            continue;
        }
        let advice = advice.map_or(String::new(), |advice| format!("; {advice}"));
        writeln!(out, "{} {part:12} {what}{advice}", if broken { "x" } else { " " })?;
        out.flush()?;
    }
    Ok(if is_broken { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn instructions() -> Finding {
    const PART: &str = "instructions";
    let (chosen, kernels) = match (ops::cpu_isa(), ops::kernels_are_on()) {
        (Ok(chosen), Ok(kernels)) => (chosen, kernels),
        (Err(e), _) | (_, Err(e)) => return Finding::broken(PART, e),
    };
    let names: Vec<&str> = Isa::available().map(Isa::name).collect();
    let found = Finding::new(PART, format!("{} of {}", chosen.name(), names.join(", ")));
    if !kernels {
        found.advise("PRICKET_KERNELS=off is set: every operation uses candle's slower kernels")
    } else if chosen < Isa::best() {
        found.advise(format!("PRICKET_CPU={} is set: unset it to use {}", chosen.name(), Isa::best().name()))
    } else {
        found
    }
}

fn cores(threads: usize) -> Finding {
    let there = std::thread::available_parallelism().map_or(1, usize::from);
    let found = Finding::new("threads", format!("{threads} by default; this process may use {there}"));
    let theirs = pricket::candle::utils::get_num_threads();
    if theirs > threads {
        return found.advise(format!(
            "candle's own operations use {theirs} threads: set CANDLE_NUM_THREADS={threads} for your programs"
        ));
    }
    found
}

fn speed(threads: usize) -> Finding {
    const PART: &str = "speed";
    let bytes = pricket::loading::available_memory().map_or(256 << 20, |bytes| (bytes / 8).clamp(1 << 20, 512 << 20));
    let pool = match ops::Pool::new(threads) {
        Ok(pool) => pool,
        Err(e) => return Finding::broken(PART, format!("cannot start {threads} threads: {e}")),
    };
    let (read, computed) =
        (rates::read_rate(bytes as usize, threads) / 1e9, pool.install(ops::multiply_add_rate) / 1e9);
    // Each token reads every weight once: q4_0 has 0.5625 bytes per weight, f16 has 2.
    let (q4, f16) = (read / 0.5625, read / 2.0);
    Finding::new(
        PART,
        format!(
            "memory bandwidth {read:.0} GB/s, {computed:.0} GFLOP/s in f32; a model of a billion parameters decodes at most \
             {q4:.0} tokens/s in q4_0, {f16:.0} in f16"
        ),
    )
}

fn memory() -> Finding {
    const PART: &str = "memory";
    let Some(bytes) = pricket::loading::available_memory() else {
        return Finding::new(PART, "unknown: the system does not report free memory");
    };
    let largest = |dtype: Dtype| {
        let pythias = pricket::suites::cards().iter().filter(|card| card.suite == "Pythia");
        // A tenth is added for the KV cache and activations.
        let fits = pythias.filter(|card| dtype.bytes(card.parameters as usize) as f64 * 1.1 < bytes as f64);
        let name = |card: &pricket::suites::Card| card.id.split('/').next_back().unwrap_or_default().to_owned();
        fits.rev().max_by_key(|card| card.parameters).map_or_else(|| "none".to_owned(), name)
    };
    let what = format!("{:.1} GB are free", bytes as f64 / 1e9);
    let q4 = Dtype::Block(pricket::nn::BlockType::Q4_0);
    Finding::new(PART, what).advise(format!(
        "the largest Pythia that fits: {} in f16, {} in q4_0",
        largest(Dtype::F16),
        largest(q4)
    ))
}

fn device(name: &'static str) -> Finding {
    match pricket::loading::device(name) {
        Ok(device) => match rates::device_rates(&device) {
            Ok((moved, computed)) => Finding::new(
                name,
                format!("available, memory bandwidth {:.0} GB/s, {:.0} TFLOP/s in bf16", moved / 1e9, computed / 1e12),
            ),
            Err(e) => Finding::new(name, format!("available, but its speed could not be measured: {e}")),
        },
        // A missing device is not a problem: pricket also runs on the CPU.
        Err(e) => Finding::new(name, e.to_string()),
    }
}

fn cache() -> Finding {
    const PART: &str = "cache";
    let hub = match Hub::from_env() {
        Ok(hub) => hub,
        Err(e) => return Finding::broken(PART, e.to_string()),
    };
    let cache = hub.cache();
    let root = cache.root().display().to_string();
    let repos = match cache.repos() {
        Ok(repos) => repos,
        Err(e) => return Finding::broken(PART, format!("{root}: {e}")),
    };
    let held: u64 = repos.iter().map(|repo| repo.bytes).sum();
    let free = cache.free_space().map_or(String::new(), |free| format!(", {:.1} GB free", free as f64 / 1e9));
    let what = format!("{root}: {} models and datasets, {:.1} GB{free}", repos.len(), held as f64 / 1e9);
    let there = cache.root().ancestors().find(|path| path.is_dir());
    let is_readonly = there.and_then(|path| path.metadata().ok()).is_some_and(|meta| meta.permissions().readonly());
    if is_readonly {
        return Finding::broken(PART, what).advise("the directory is read-only: set HF_HOME to another one");
    }
    Finding::new(PART, what)
}

fn token() -> Finding {
    const PART: &str = "token";
    match Settings::from_env() {
        Ok(settings) if settings.token.is_some() => Finding::new(PART, "set"),
        Ok(_) => Finding::new(PART, "not set").advise("public models need no token; for private models set HF_TOKEN"),
        Err(e) => Finding::broken(PART, e.to_string()),
    }
}

fn network(is_offline: bool) -> Finding {
    const PART: &str = "network";
    let mut settings = match Settings::from_env() {
        Ok(settings) => settings,
        Err(e) => return Finding::broken(PART, e.to_string()),
    };
    let endpoint = settings.endpoint.clone();
    if settings.offline || is_offline {
        return Finding::new(PART, format!("not checked because of offline mode: {endpoint}"));
    }
    (settings.patience.connect, settings.patience.answer) = (Duration::from_secs(5), Duration::from_secs(10));
    settings.patience.tries = 1;
    let start = Instant::now();
    let asked = "EleutherAI/pythia-14m".parse().and_then(|repo| Hub::new(settings).refs(&repo, &NoProgress));
    let taken = start.elapsed().as_secs_f64();
    match asked {
        Ok(_) => Finding::new(PART, format!("{endpoint} answers in {taken:.1} s")),
        Err(e) => Finding::new(PART, format!("{endpoint}: {e}"))
            .advise("models in the cache or in a directory work without network; set HF_HUB_OFFLINE=1"),
    }
}
