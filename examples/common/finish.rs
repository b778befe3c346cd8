//! How the examples end.

use std::io::ErrorKind;
use std::process::ExitCode;

/// One clear line and exit code 1 on an error. A reader that has seen enough, such as `head`, is no error.
pub(crate) fn finish(result: anyhow::Result<()>) -> ExitCode {
    let Err(e) = result else { return ExitCode::SUCCESS };
    if e.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == ErrorKind::BrokenPipe) {
        return ExitCode::SUCCESS;
    }
    eprintln!("error: {}", format!("{e:#}").replace('\n', " "));
    ExitCode::FAILURE
}
