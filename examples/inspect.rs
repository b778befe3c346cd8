//! Shows the content of a checkpoint: format, configuration, tensors, parameters and memory. Reads headers only.
//!
//! `cargo run --example inspect -- models/tiny`

#[path = "common/finish.rs"]
mod finish;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use pricket::Source;
use pricket::loading::Inspection;
use pricket::weights::counted;
use serde_json::json;

/// Show the content of a checkpoint: format, tensors, parameters and memory. The exit code is 1 if it is damaged.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// A repository of the Hub (of the weight files, only the headers are fetched), a directory in Hub layout, or a
    /// weight file
    #[arg(default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny"))]
    path: PathBuf,
    /// Same as PATH, as a flag like that of the other examples
    #[arg(long, short, conflicts_with = "path")]
    model: Option<PathBuf>,
    /// Revision to show, such as step3000: a branch, tag or commit of a repository, or a subdirectory of revisions/ in
    /// a directory
    #[arg(long)]
    revision: Option<String>,
    /// Name of the weight file to show, if the repository or directory has several
    #[arg(long, value_name = "NAME")]
    file: Option<String>,
    /// Omit metadata and the list of tensors
    #[arg(long, short)]
    brief: bool,
    /// Number of positions for the memory estimate [default: the model's context]
    #[arg(long)]
    context: Option<usize>,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    finish::finish(run(&Args::parse()))
}

fn run(args: &Args) -> anyhow::Result<()> {
    let mut source = Source::new(args.model.as_ref().unwrap_or(&args.path));
    if let Some(revision) = &args.revision {
        source = source.revision(revision);
    }
    if let Some(file) = &args.file {
        source = source.file(file);
    }
    let found = pricket::inspect(source)?;
    let mut out = std::io::stdout().lock();
    if args.json {
        print_json(&mut out, &found, args)?;
    } else {
        print_text(&mut out, &found, args)?;
    }
    Ok(())
}

/// Returns the number of positions and the estimated memory of the model when loaded.
fn estimate(found: &Inspection, context: Option<usize>) -> Option<(usize, pricket::loading::Estimate)> {
    let info = found.info.as_ref()?;
    let context = context.or(info.context).unwrap_or(2048);
    Some((context, pricket::loading::Estimate::new(info.clone(), context)))
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

fn print_text(out: &mut impl Write, found: &Inspection, args: &Args) -> anyhow::Result<()> {
    writeln!(out, "file        {}", found.file.display())?;
    writeln!(out, "format      {}", found.describe)?;
    let (weights, buffers): (Vec<_>, Vec<_>) = found.tensors.iter().partition(|t| !t.is_buffer);
    let bytes = |tensors: &[&pricket::loading::TensorInfo]| tensors.iter().map(|t| t.bytes()).sum::<u64>();
    writeln!(out, "tensors     {} of {}", weights.len(), mib(bytes(&weights)))?;
    for (i, found) in found.types().iter().enumerate() {
        let label = if i == 0 { "types" } else { "" };
        let (tensors, size, bits) = (counted(found.tensors, "tensor"), mib(found.bytes), found.bits());
        writeln!(out, "{label:11} {:5} {tensors}, {size}, {bits:.2} bits per element", found.dtype.to_string())?;
    }
    if !buffers.is_empty() {
        writeln!(out, "buffers     {} of {}, not read", buffers.len(), mib(bytes(&buffers)))?;
    }
    if let Some(info) = &found.info {
        writeln!(out, "family      {}", info.family)?;
        writeln!(out, "parameters  {}", info.parameters)?;
        let beyond = if info.context.is_none() { " and beyond" } else { "" };
        let context = format!("{}{beyond}", info.trained_length);
        writeln!(
            out,
            "shape       {} layers of {}, {} heads of {}, vocabulary {}, context {context}",
            info.layers, info.d_model, info.heads, info.head_dim, info.vocab
        )?;
    }
    let whose = if found.metadata.is_some() { "in the file" } else { "in a separate file" };
    writeln!(out, "tokenizer   {}", if found.has_tokenizer { whose } else { "none" })?;
    if let Some((context, estimate)) = estimate(found, args.context) {
        let (weights, cache) = (mib(estimate.weights), mib(estimate.cache));
        writeln!(
            out,
            "memory      {} for {context} positions: weights {weights}, cache {cache}",
            mib(estimate.total())
        )?;
    }
    for warning in &found.warnings {
        writeln!(out, "warning     {warning}")?;
    }
    if !args.brief {
        if let Some(metadata) = found.metadata.as_ref().and_then(|metadata| metadata.as_object()) {
            writeln!(out)?;
            for (key, value) in metadata {
                writeln!(out, "{key} = {}", pricket::weights::clip(&value.to_string()))?;
            }
        }
        writeln!(out)?;
        let width = found.tensors.iter().map(|t| t.name.len()).max().unwrap_or(0);
        for tensor in &found.tensors {
            let note = if tensor.is_buffer { "  buffer" } else { "" };
            writeln!(out, "{:width$}  {:5} {:?}{note}", tensor.name, tensor.dtype.to_string(), tensor.shape)?;
        }
    }
    Ok(())
}

fn print_json(out: &mut impl Write, found: &Inspection, args: &Args) -> anyhow::Result<()> {
    let tensor = |t: &pricket::loading::TensorInfo| json!({"name": t.name, "dtype": t.dtype.to_string(), "shape": t.shape, "bytes": t.bytes(), "file": t.file, "buffer": t.is_buffer});
    let mut object = json!({
        "file": found.file, "format": found.describe, "config": found.config, "metadata": found.metadata, "warnings": found.warnings,
        "tokenizer": found.has_tokenizer, "tensors": found.tensors.len(),
        "provenance": found.provenance.to_json(),
    });
    if let Some(info) = &found.info {
        object["family"] = json!(info.family);
        object["parameters"] = json!(info.parameters);
    }
    let types = found.types();
    let summary = |t: &pricket::loading::TypeSummary| json!({"dtype": t.dtype.to_string(), "tensors": t.tensors, "elements": t.elements, "bytes": t.bytes, "bits": t.bits()});
    object["types"] = types.iter().map(summary).collect();
    if let Some((context, estimate)) = estimate(found, args.context) {
        object["memory"] = json!({
            "context": context, "total": estimate.total(), "weights": estimate.weights, "cache": estimate.cache,
            "workspace": estimate.workspace,
        });
    }
    if !args.brief {
        object["tensors"] = found.tensors.iter().map(tensor).collect();
    }
    writeln!(out, "{object}")?;
    Ok(())
}
