//! Shows what this machine can do for pricket, a line for each part, with advice where something could be better.
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

/// Shows what this machine can do: instruction set, threads, speed, memory, devices, cache, token and network. The exit code is 1
/// if something has to be mended before pricket works.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Does not ask the Hub whether it is there
    #[arg(long)]
    offline: bool,
    /// CPU threads whose speed is measured [default: physical cores]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// One JSON object for each line instead of text
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(code) => code,
        Err(e) => finish::finish(Err(e)),
    }
}

/// A part of the machine.
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
    anyhow::ensure!((1..=1024).contains(&threads), "--threads: {threads}; from 1 to 1024 are possible");
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
        found.advise("PRICKET_KERNELS=off: every operation is candle's own, which is slow")
    } else if chosen < Isa::best() {
        found.advise(format!("PRICKET_CPU is {}: without it {} is used", chosen.name(), Isa::best().name()))
    } else {
        found
    }
}

fn cores(threads: usize) -> Finding {
    let there = std::thread::available_parallelism().map_or(1, usize::from);
    let found = Finding::new("threads", format!("{threads} by default, {there} granted to this process"));
    let theirs = pricket::candle::utils::get_num_threads();
    if theirs > threads {
        return found.advise(format!(
            "candle would start {theirs} of its own: set CANDLE_NUM_THREADS={threads} for programs of your own"
        ));
    }
    found
}

fn speed(threads: usize) -> Finding {
    const PART: &str = "speed";
    let bytes = pricket::loading::available_memory().map_or(256 << 20, |bytes| (bytes / 8).clamp(1 << 20, 512 << 20));
    let pool = match ops::Pool::new(threads) {
        Ok(pool) => pool,
        Err(e) => return Finding::broken(PART, format!("{threads} threads cannot be started: {e}")),
    };
    let (read, computed) =
        (rates::read_rate(bytes as usize, threads) / 1e9, pool.install(ops::multiply_add_rate) / 1e9);
    // The weights of a model of a billion parameters are read once for each token.
    let (q4, f16) = (read / 0.5625, read / 2.0);
    Finding::new(
        PART,
        format!(
            "reads {read:.0} GB/s, computes {computed:.0} GFLOP/s in f32: at most {q4:.0} tokens/s per billion parameters in q4_0, \
             {f16:.0} in f16"
        ),
    )
}

fn memory() -> Finding {
    const PART: &str = "memory";
    let Some(bytes) = pricket::loading::available_memory() else {
        return Finding::new(PART, "the system does not tell how much is free");
    };
    let largest = |dtype: Dtype| {
        let pythias = pricket::suites::cards().iter().filter(|card| card.suite == "Pythia");
        // A tenth more for the cache of keys and values, and for activations.
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
                format!("is there, moves {:.0} GB/s, computes {:.0} TFLOP/s in bf16", moved / 1e9, computed / 1e12),
            ),
            Err(e) => Finding::new(name, format!("is there, and its speed could not be measured: {e}")),
        },
        // Metal is for macOS, and so is not missed elsewhere.
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
        return Finding::broken(PART, what).advise("it cannot be written: name another directory with HF_HOME");
    }
    Finding::new(PART, what)
}

fn token() -> Finding {
    const PART: &str = "token";
    match Settings::from_env() {
        Ok(settings) if settings.token.is_some() => Finding::new(PART, "there is one"),
        Ok(_) => Finding::new(PART, "none").advise("public models need none; for private ones set HF_TOKEN"),
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
        return Finding::new(PART, format!("{endpoint} was not asked: offline"));
    }
    (settings.patience.connect, settings.patience.answer) = (Duration::from_secs(5), Duration::from_secs(10));
    settings.patience.tries = 1;
    let start = Instant::now();
    let asked = "EleutherAI/pythia-14m".parse().and_then(|repo| Hub::new(settings).refs(&repo, &NoProgress));
    let taken = start.elapsed().as_secs_f64();
    match asked {
        Ok(_) => Finding::new(PART, format!("{endpoint} answers in {taken:.1} s")),
        Err(e) => Finding::new(PART, format!("{endpoint}: {e}"))
            .advise("models that are in the cache or in a directory work without it (HF_HUB_OFFLINE=1)"),
    }
}
