//! Lists, fetches and audits the training steps of a model, and manages the cache.
//!
//! `cargo run --example checkpoints -- list EleutherAI/pythia-160m`

#[path = "common/bar.rs"]
mod bar;
#[path = "common/finish.rs"]
mod finish;
#[path = "common/size.rs"]
mod size;

use std::io::Write;
use std::process::ExitCode;
use std::time::SystemTime;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use pricket::Hub;
use pricket::candle::DType;
use pricket::hub::Steps;
use pricket::hub::{Cache, CachedRepo, RepoId};
use pricket::nn::Progress;
use pricket::suites::{Audit, AuditOptions, Checkpoints, KnownKind};
use pricket::weights::counted;
use serde_json::{Value, json};

/// List, fetch and audit the training steps of a model, and manage the cache. Without a command, lists the steps of the
/// embedded model tiny.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Print JSON instead of text
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

/// A model and a selection of its training steps.
#[derive(clap::Args, Clone)]
struct Which {
    /// A repository of the Hub, a name such as pythia-160m, or a directory with revisions/
    #[arg(default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny"))]
    model: String,
    /// Training steps, separated by commas: all, final, log (0, powers of two up to 512, then 1000, 2000, 4000, ...),
    /// numbers such as 0,512, or ranges FIRST..LAST:INTERVAL such as 0..143000:10000
    #[arg(long, short, default_value = "all")]
    steps: Steps,
}

#[derive(Subcommand)]
enum Command {
    /// List the training steps: commits, tokens seen, and steps that are missing or known to be wrong
    List {
        #[command(flatten)]
        which: Which,
        /// Also show the size of the weights of each step. Takes a request per step on the Hub
        #[arg(long)]
        sizes: bool,
    },
    /// Fetch training steps into the cache and verify their hashes. Interrupted downloads resume
    Fetch {
        #[command(flatten)]
        which: Which,
        /// Maximum size of the model commits in the cache that pricket fetched, such as 50GB. After each fetched
        /// training step, the least recently used commits are deleted [default: no limit]
        #[arg(long, value_name = "SIZE", value_parser = size::parse)]
        budget: Option<u64>,
    },
    /// Check the selected training steps and main. Finds missing steps, and steps that hold the weights of another
    /// step. The exit code is 3 if a finding is marked WRONG
    Audit {
        #[command(flatten)]
        which: Which,
        /// Also compare tensors where the hashes of files differ, because equal weights can have different headers.
        /// Takes a few requests per revision on the Hub. Always on for a directory
        #[arg(long, alias = "deep")]
        compare_tensors: bool,
    },
    /// Print the L2 norm of one tensor at each training step. Fetches only that tensor
    Norm {
        #[command(flatten)]
        which: Which,
        /// Name of the tensor
        #[arg(long, short, default_value = "gpt_neox.final_layer_norm.weight")]
        tensor: String,
    },
    /// List, verify or shrink the cache
    Cache {
        #[command(subcommand)]
        what: Option<CacheCommand>,
    },
    /// List the published models that pricket knows, or the training steps of one of them with their known problems.
    /// Needs no network
    Cards {
        /// Model whose training steps to list, such as pythia-2.8b [default: list all models]
        model: Option<String>,
    },
}

#[derive(Subcommand)]
enum CacheCommand {
    /// List repositories and commits with their sizes and times of last use
    List,
    /// Check the hash of every file. The exit code is 3 if a file is damaged
    Verify {
        /// Repository to check, such as EleutherAI/pythia-160m [default: all]
        repo: Option<RepoId>,
    },
    /// Delete the least recently used model commits that pricket fetched
    Evict {
        /// Maximum size to keep of the model commits that pricket fetched, such as 50GB
        #[arg(value_parser = size::parse)]
        budget: u64,
    },
}

/// Exit code if a check found a problem. Codes 1 and 2 stand for errors and wrong usage.
const WRONG: u8 = 3;

/// Formats a number of bytes, such as `1.25 GB`.
fn bytes(n: u64) -> String {
    match n as f64 {
        n if n >= 1e9 => format!("{:.2} GB", n / 1e9),
        n if n >= 1e6 => format!("{:.1} MB", n / 1e6),
        n => format!("{:.1} kB", n / 1e3),
    }
}

/// Standard output, as JSON if the field is true and as text otherwise.
struct Out(bool);

impl Out {
    /// Prints a JSON value, or the text written by `text`.
    fn put(&self, json: &Value, text: impl FnOnce(&mut dyn Write) -> std::io::Result<()>) -> anyhow::Result<()> {
        let mut out = std::io::stdout().lock();
        if self.0 {
            writeln!(out, "{json}")?;
        } else {
            text(&mut out)?;
        }
        Ok(())
    }
}

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(code) => code,
        Err(e) => finish::finish(Err(e)),
    }
}

fn run(args: Args) -> anyhow::Result<ExitCode> {
    let out = Out(args.json);
    let which = || Which { model: concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny").into(), steps: Steps::all() };
    match args.command.unwrap_or_else(|| Command::List { which: which(), sizes: false }) {
        Command::List { which, sizes } => list(&which, sizes, &out),
        Command::Fetch { which, budget } => fetch(&which, budget, &out),
        Command::Audit { which, compare_tensors } => {
            let options = AuditOptions::default().deep(compare_tensors);
            let audit = pricket::checkpoints(&which.model)?.audit(&which.steps, options, &bar::Bar::default())?;
            print_audit(&audit, &out)?;
            Ok(if audit.is_alarming() { WRONG.into() } else { ExitCode::SUCCESS })
        }
        Command::Norm { which, tensor } => norm(&which, &tensor, &out),
        Command::Cache { what } => cache(what.unwrap_or(CacheCommand::List), &out),
        Command::Cards { model: None } => cards(&out),
        Command::Cards { model: Some(model) } => card(&model, &out),
    }
}

fn list(which: &Which, sizes: bool, out: &Out) -> anyhow::Result<ExitCode> {
    let mut found = pricket::checkpoints(&which.model)?;
    if sizes {
        found.fetch_sizes(&which.steps, &bar::Bar::default())?;
    }
    let chosen = found.select(&which.steps)?;
    let json = json!({
        "model": found.model, "main": found.main.as_ref().map(pricket::suites::Checkpoint::to_json),
        "checkpoints": chosen.iter().map(|c| c.to_json()).collect::<Vec<_>>(),
    });
    out.put(&json, |out| {
        for checkpoint in &chosen {
            let commit = checkpoint.commit.as_deref().map_or("", |commit| &commit[..10]);
            let tokens =
                checkpoint.tokens.map_or(String::new(), |tokens| format!("{:.1}B tokens", tokens as f64 / 1e9));
            let size = checkpoint.bytes.map_or(String::new(), bytes);
            let state = if checkpoint.present { "" } else { "missing " };
            let note = if checkpoint.known_bad { checkpoint.known.join("; ") } else { String::new() };
            let line = format!("{:12} {commit:10} {tokens:>14} {size:>10}  {state}{note}", checkpoint.revision);
            writeln!(out, "{}", line.trim_end())?;
        }
        if let Some(commit) = found.main.as_ref().and_then(|main| main.commit.as_deref()) {
            writeln!(out, "{:12} {}", "main", &commit[..10])?;
        }
        let there = chosen.iter().filter(|checkpoint| checkpoint.present).count();
        let known = if found.card.is_some() { "" } else { "; the model has no card" };
        writeln!(out, "{there} of {} of {} are available{known}", counted(chosen.len(), "step"), found.model)
    })?;
    Ok(ExitCode::SUCCESS)
}

fn fetch(which: &Which, budget: Option<u64>, out: &Out) -> anyhow::Result<ExitCode> {
    let found = pricket::checkpoints(&which.model)?;
    let chosen = found.select(&which.steps)?;
    if found.is_local() {
        let json = json!({ "model": found.model, "on_disk": chosen.len() });
        out.put(&json, |out| writeln!(out, "{} is a directory with {}", found.model, counted(chosen.len(), "step")))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut failed = false;
    for checkpoint in chosen {
        let fetched = match found.fetch(checkpoint, &bar::Bar::default()) {
            Ok(fetched) => fetched,
            Err(pricket::Error::Cancelled) => return Err(pricket::Error::Cancelled.into()),
            // A missing step does not stop the others from being fetched.
            Err(e) => {
                failed = true;
                finish::tell(format_args!("error: {e}"));
                if out.0 {
                    out.put(&json!({ "revision": checkpoint.revision, "error": e.to_string() }), |_| Ok(()))?;
                }
                continue;
            }
        };
        for warning in &fetched.warnings {
            finish::tell(format_args!("warning: {warning}"));
        }
        let report = fetched.report;
        let json = json!({
            "provenance": fetched.provenance.to_json(), "bytes": report.total, "on_disk": report.on_disk,
            "received": report.received, "repeated": report.repeated,
        });
        out.put(&json, |out| {
            let repeated =
                if report.repeated > 0 { format!(", {} of it twice", bytes(report.repeated)) } else { String::new() };
            let (received, total, directory) =
                (bytes(report.received), bytes(report.total), fetched.directory.display());
            writeln!(out, "{:12} {received} of {total} received{repeated}  {directory}", checkpoint.revision)
        })?;
        // `fetched` protects its files from eviction, so it is dropped first.
        drop(fetched);
        if let Some(budget) = budget {
            Hub::from_env()?.cache().evict(budget, &pricket::hub::NoProgress)?;
        }
    }
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Returns the known problems of a checkpoint, to be appended to a message.
fn known(checkpoint: &pricket::suites::Checkpoint) -> String {
    if checkpoint.known.is_empty() { String::new() } else { format!(": {}", checkpoint.known.join("; ")) }
}

fn print_audit(audit: &Audit, out: &Out) -> anyhow::Result<()> {
    out.put(&audit.to_json(), |out| {
        for revision in &audit.revisions {
            let hash = revision.weights.first().and_then(|(_, digest)| digest.as_ref());
            let hash = hash.map_or("-", |digest| digest.hex().get(..12).unwrap_or("-"));
            let (file, more) = match &revision.weights[..] {
                [] => ("", String::new()),
                [(file, _)] => (file.as_str(), String::new()),
                [(file, _), rest @ ..] => (file.as_str(), format!(" and {} more", rest.len())),
            };
            let twins: Vec<&str> = audit
                .identical
                .iter()
                .filter(|group| group.contains(&revision.revision))
                .flatten()
                .filter(|other| **other != revision.revision)
                .map(String::as_str)
                .take(4)
                .collect();
            let same = if twins.is_empty() { String::new() } else { format!("  = {}", twins.join(", ")) };
            writeln!(out, "{:12} {hash}  {file}{more}{same}", revision.revision)?;
        }
        writeln!(out)?;
        for finding in &audit.findings {
            let sources =
                if finding.sources.is_empty() { String::new() } else { format!(" ({})", finding.sources.join(", ")) };
            writeln!(out, "{} {}{sources}", if finding.alarming { "WRONG:" } else { "fine: " }, finding.words)?;
        }
        let wrong = audit.findings.iter().filter(|finding| finding.alarming).count();
        let (revisions, wrong) = (counted(audit.revisions.len(), "revision"), counted(wrong, "problem"));
        writeln!(out, "{revisions} of {} checked, {wrong} found", audit.model)
    })
}

fn norm(which: &Which, tensor: &str, out: &Out) -> anyhow::Result<ExitCode> {
    let found: Checkpoints = pricket::checkpoints(&which.model)?;
    let chosen = found.select(&which.steps)?;
    let bar = bar::Bar::default();
    bar.begin("reading", chosen.len() as u64, "steps");
    let read = || -> anyhow::Result<ExitCode> {
        let mut code = ExitCode::SUCCESS;
        for (done, checkpoint) in chosen.into_iter().enumerate() {
            bar.update(done as u64);
            if !checkpoint.present {
                finish::tell(format_args!("error: {} is missing{}", checkpoint.revision, known(checkpoint)));
                code = ExitCode::FAILURE;
                continue;
            }
            if checkpoint.known_bad {
                finish::tell(format_args!("warning: {}{}", checkpoint.revision, known(checkpoint)));
            }
            let tensors = found.tensors(checkpoint)?;
            if !tensors.names().any(|name| name == tensor) {
                let names: Vec<&str> = tensors.names().collect();
                let last = tensor.rsplit('.').next().unwrap_or_default();
                // A large model has hundreds of tensors, so those with the same last part are listed first.
                let (alike, others): (Vec<&str>, Vec<&str>) = names.iter().partition(|name| name.ends_with(last));
                let shown: Vec<&str> = alike.into_iter().chain(others).take(24).collect();
                let more = names.len().saturating_sub(shown.len());
                let more = if more > 0 { format!(" and {more} more") } else { String::new() };
                anyhow::bail!(
                    "{}: no tensor {tensor:?}; expected one of {}{more}",
                    checkpoint.revision,
                    shown.join(", ")
                );
            }
            let values = tensors.read(tensor)?;
            let norm = values.to_dtype(DType::F32)?.sqr()?.sum_all()?.sqrt()?.to_scalar::<f32>()?;
            let json = json!({
                "revision": checkpoint.revision, "step": checkpoint.step, "tensor": tensor, "shape": values.dims(),
                "norm": norm, "known": checkpoint.known, "provenance": tensors.provenance().to_json(),
            });
            out.put(&json, |out| writeln!(out, "{:12} {norm:.6}", checkpoint.revision))?;
        }
        Ok(code)
    };
    let code = read();
    bar.end();
    code
}

fn cache(what: CacheCommand, out: &Out) -> anyhow::Result<ExitCode> {
    let cache = Hub::from_env()?.cache();
    let quiet = pricket::hub::NoProgress;
    match what {
        CacheCommand::List => {
            let repos = cache.repos()?;
            let json: Vec<Value> = repos.iter().map(repo_json).collect();
            out.put(&json!({ "cache": cache.root(), "repos": json }), |out| list_cache(&cache, &repos, out))?;
        }
        CacheCommand::Verify { repo } => {
            let mut repos = cache.repos()?;
            repos.retain(|known| repo.as_ref().is_none_or(|wanted| known.repo == *wanted));
            if let (Some(wanted), true) = (&repo, repos.is_empty()) {
                anyhow::bail!("{wanted} is not in {}", cache.root().display());
            }
            let bar = bar::Bar::default();
            let verified = cache.verify(&repos, &bar)?;
            bar.end();
            let bad: Vec<_> = verified.iter().filter(|file| file.is_good() == Some(false)).collect();
            let unknown = verified.iter().filter(|file| file.is_good().is_none()).count();
            let damaged: Vec<Value> = bad
                .iter()
                .map(|file| json!({ "repo": file.repo.as_str(), "path": file.path, "file": file.location }))
                .collect();
            let json = json!({ "files": verified.len(), "damaged": damaged, "of_unknown_hash": unknown });
            out.put(&json, |out| {
                for file in &bad {
                    let (repo, path, location) = (&file.repo, &file.path, file.location.display());
                    if file.is_dangling() {
                        writeln!(out, "MISSING {repo} {path}: {location} is a broken link; fetch the file again")?;
                    } else {
                        writeln!(out, "DAMAGED {repo} {path}: {location}; delete the file and fetch it again")?;
                    }
                }
                let good = verified.len() - bad.len() - unknown;
                writeln!(
                    out,
                    "{} intact, {} damaged or missing, {unknown} without a known hash",
                    counted(good, "file"),
                    bad.len()
                )
            })?;
            return Ok(if bad.is_empty() { ExitCode::SUCCESS } else { WRONG.into() });
        }
        CacheCommand::Evict { budget } => {
            let evicted = cache.evict(budget, &quiet)?;
            let name = |(repo, commit): &(RepoId, String)| format!("{repo}@{commit}");
            let (gone, in_use): (Vec<String>, Vec<String>) =
                (evicted.revisions.iter().map(name).collect(), evicted.in_use.iter().map(name).collect());
            let json = json!({ "evicted": gone, "freed": evicted.freed, "left": evicted.left, "in_use": in_use });
            out.put(&json, |out| {
                gone.iter().try_for_each(|name| writeln!(out, "evicted {name}"))?;
                in_use.iter().try_for_each(|name| writeln!(out, "kept because it is in use: {name}"))?;
                writeln!(out, "{} freed; pricket's files take {}", bytes(evicted.freed), bytes(evicted.left))
            })?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn repo_json(repo: &CachedRepo) -> Value {
    let revisions: Vec<Value> = repo
        .revisions
        .iter()
        .map(|revision| {
            let used = revision.last_used.and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
            json!({
                "commit": revision.commit, "refs": revision.refs, "files": revision.files.len(),
                "bytes": revision.files.iter().map(|file| file.bytes).sum::<u64>(), "last_used": used.map(|t| t.as_secs()),
            })
        })
        .collect();
    json!({ "repo": repo.repo.as_str(), "bytes": repo.bytes, "partial_bytes": repo.partial_bytes, "revisions": revisions })
}

fn list_cache(cache: &Cache, repos: &[CachedRepo], out: &mut dyn Write) -> std::io::Result<()> {
    for repo in repos {
        let partial = if repo.partial_bytes > 0 {
            format!(", {} of it unfinished", bytes(repo.partial_bytes))
        } else {
            String::new()
        };
        writeln!(out, "{}  {}{partial}", repo.repo, bytes(repo.bytes))?;
        for revision in &repo.revisions {
            let size: u64 = revision.files.iter().map(|file| file.bytes).sum();
            let used = revision.last_used.and_then(|time| time.elapsed().ok());
            let used = used.map_or("not fetched by pricket".into(), |time| {
                format!("used {:.1} h ago", time.as_secs_f64() / 3600.0)
            });
            let commit = revision.commit.get(..10).unwrap_or(&revision.commit);
            writeln!(out, "  {commit}  {:>10}  {used}  {}", bytes(size), revision.refs.join(", "))?;
        }
    }
    writeln!(out, "{} in {}", bytes(repos.iter().map(|repo| repo.bytes).sum()), cache.root().display())
}

/// Prints the card of a published model: its good steps, and its known problems. Needs no network.
fn card(model: &str, out: &Out) -> anyhow::Result<ExitCode> {
    let pasted =
        model.strip_prefix("https://huggingface.co/").map(|path| path.split('/').take(2).collect::<Vec<_>>().join("/"));
    let model = pasted.as_deref().unwrap_or(model).trim_end_matches('/');
    let known = || pricket::suites::cards().iter().map(|card| card.id.as_str()).collect::<Vec<_>>().join(", ");
    let card = pricket::suites::card(model)
        .with_context(|| format!("unknown model {model:?}; expected one of {}", known()))?;
    let steps = card.checkpoints.as_ref().map(pricket::suites::StepPattern::steps).unwrap_or_default();
    let of_kind = |kind: KnownKind| card.known.iter().filter(move |known| known.kind == kind);
    let bad: Vec<u64> = card
        .known
        .iter()
        .filter(|known| known.kind != KnownKind::Odd)
        .flat_map(|known| known.steps.iter().copied())
        .collect();
    let good: Vec<u64> = steps.iter().copied().filter(|step| !bad.contains(step)).collect();
    let rows = |kind: KnownKind| -> Vec<Value> {
        of_kind(kind).map(|known| json!({ "steps": known.steps, "what": known.what, "source": known.source })).collect()
    };
    let kinds = [
        ("wrong", KnownKind::Wrong),
        ("suspect", KnownKind::Suspect),
        ("missing", KnownKind::Missing),
        ("odd", KnownKind::Odd),
    ];
    let mut json = json!({
        "id": card.id, "suite": card.suite, "license": card.license, "note": card.note, "gone": card.gone,
        "revision": card.checkpoints.as_ref().map(|pattern| pattern.revision.clone()), "good": good, "source": card.source,
    });
    for (name, kind) in kinds {
        json[name] = json!(rows(kind));
    }
    out.put(&json, |out| {
        writeln!(out, "{}: {}, license {}", card.id, card.suite, card.license)?;
        for text in card.note.iter().chain(card.gone.iter()) {
            writeln!(out, "{text}")?;
        }
        if steps.is_empty() {
            writeln!(out, "no training steps were published")?;
        } else {
            writeln!(out, "good     {} of {}: {}", good.len(), counted(steps.len(), "step"), ranges(&good))?;
        }
        for (name, kind) in kinds {
            for known in of_kind(kind) {
                writeln!(out, "{name:8} {}: {} ({})", ranges(&known.steps), known.what, known.source)?;
            }
        }
        Ok(())
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Formats numbers, with evenly spaced ones as ranges: `0, 1, 2, 4, 1000..143000:1000`.
fn ranges(numbers: &[u64]) -> String {
    let (mut out, mut rest) = (Vec::new(), numbers);
    while let [first, tail @ ..] = rest {
        let by = tail.first().map_or(0, |second| second - first);
        let run = 1 + tail.iter().zip(1..).take_while(|&(n, i)| *n == first + i * by).count();
        if run > 3 {
            out.push(format!("{first}..{}:{by}", rest[run - 1]));
            rest = &rest[run..];
        } else {
            out.push(first.to_string());
            rest = tail;
        }
    }
    out.join(", ")
}

/// Prints the cards of all known models.
fn cards(out: &Out) -> anyhow::Result<ExitCode> {
    let cards = pricket::suites::cards();
    let json: Vec<Value> = cards
        .iter()
        .map(|card| {
            json!({
                "id": card.id, "suite": card.suite, "family": card.family, "size": card.size, "license": card.license,
                "parameters": card.parameters, "prompt": card.prompt, "aliases": card.aliases, "gone": card.gone,
                "mirrors": card.mirrors, "note": card.note, "non_commercial": card.non_commercial,
                "checkpoints": card.checkpoints.as_ref().map(|steps| steps.steps().len()),
            })
        })
        .collect();
    out.put(&json!(json), |out| {
        for card in cards {
            let steps = card.checkpoints.as_ref().map_or(String::new(), |steps| counted(steps.steps().len(), "step"));
            let gone = card.gone.as_ref().map_or(String::new(), |month| format!("gone since {month}"));
            let line = format!("{:50} {:>14} {:16} {steps:10} {gone}", card.id, card.parameters, card.license);
            writeln!(out, "{}", line.trim_end())?;
        }
        writeln!(out, "{}", counted(cards.len(), "model"))
    })?;
    Ok(ExitCode::SUCCESS)
}
