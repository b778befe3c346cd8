//! Compares pricket with what the original implementations answered: one JSON line for each case, exit code 1 if any
//! fails. The numbers go through the path that `generate` takes with default settings.
//!
//! `cargo run --example parity -- tests/golden/models/neox-*`

mod cases;
#[path = "../common/finish.rs"]
mod finish;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use pricket::loading::Precision;

/// Compares pricket with stored answers of the original implementations.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Directories with a case.json
    #[arg(required = true, value_name = "CASE_DIR")]
    cases: Vec<PathBuf>,
    /// Where to compute: cpu, cuda, cuda:N or metal
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Type of the weights: auto (as stored on the CPU, f32 on a GPU), f32, or bf16 or f16, which have bounds of their own for
    /// logits
    #[arg(long, default_value = "auto")]
    dtype: Precision,
}

fn main() -> ExitCode {
    finish::finish(run(&Args::parse()))
}

fn run(args: &Args) -> anyhow::Result<()> {
    let device = pricket::loading::device(&args.device)?;
    let precision = match args.dtype {
        // What the references computed in.
        Precision::Auto if !device.is_cpu() => Precision::F32,
        precision => precision,
    };
    let setup = cases::Setup { device, precision };
    let mut out = std::io::stdout().lock();
    let mut failed = 0;
    for dir in &args.cases {
        let outcome = cases::run(dir, &setup);
        writeln!(out, "{}", outcome.to_json())?;
        failed += usize::from(!outcome.ok);
    }
    anyhow::ensure!(failed == 0, "{failed} of {} cases failed", args.cases.len());
    finish::tell(format_args!("{} cases passed", args.cases.len()));
    Ok(())
}
