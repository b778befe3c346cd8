//! Compares pricket with what the original implementations answered: one JSON line for each case, exit code 1 if any
//! fails. The numbers go through the path that `generate` takes with default settings.
//!
//! `cargo run --example parity -- tests/golden/models/neox-*`

mod cases;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

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
}

fn main() -> ExitCode {
    let args = Args::parse();
    let device = match pricket::device(&args.device) {
        Ok(device) => device,
        Err(e) => {
            eprintln!("error: {e}");
            return ExitCode::FAILURE;
        }
    };
    let mut failed = 0;
    for dir in &args.cases {
        let outcome = cases::run(dir, &device);
        println!("{}", outcome.to_json());
        failed += usize::from(!outcome.ok);
    }
    eprintln!("{} of {} cases passed", args.cases.len() - failed, args.cases.len());
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
