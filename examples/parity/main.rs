//! Compares pricket with stored outputs of the original implementations. Prints one JSON line for each case. The
//! computation is the one that `generate` uses with default settings.
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

/// Compare pricket with stored outputs of the original implementations. Prints one JSON line per case. The exit code is
/// 1 if a case fails.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Directories of golden cases, each with a case.json
    #[arg(required = true, value_name = "CASE_DIR")]
    cases: Vec<PathBuf>,
    /// Device: cpu, cuda, cuda:N or metal
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Type of the weights: auto (on the CPU the type in the file, on a GPU f32), f32, bf16 or f16. With bf16 and f16,
    /// only logits are compared, with wider tolerances
    #[arg(long, default_value = "auto")]
    dtype: Precision,
}

fn main() -> ExitCode {
    finish::finish(run(&Args::parse()))
}

fn run(args: &Args) -> anyhow::Result<()> {
    let device = pricket::loading::device(&args.device)?;
    let precision = match args.dtype {
        // The references were computed in f32.
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
