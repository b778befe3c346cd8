//! Exit codes, messages on stderr, and safe writing of output files.

use std::fmt::Arguments;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, bail};

/// Returns the exit code of a result. An error is written to stderr as one line and gives exit code 1.
///
/// A closed pipe is not an error: the reader, such as `head`, needs no more output.
pub(crate) fn finish(result: anyhow::Result<()>) -> ExitCode {
    let Err(e) = result else { return ExitCode::SUCCESS };
    if is_closed(&e) {
        return ExitCode::SUCCESS;
    }
    tell(format_args!("error: {}", format!("{e:#}").replace('\n', " ")));
    ExitCode::FAILURE
}

/// Returns whether an error means that the reader has closed the output.
pub(crate) fn is_closed(e: &anyhow::Error) -> bool {
    e.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == ErrorKind::BrokenPipe)
}

/// Writes a line to stderr. Errors are ignored: a full disk or a closed pipe must not stop the work.
pub(crate) fn tell(line: Arguments<'_>) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

/// Checks that a file can be written to `path`, before the work that produces its content.
///
/// `ends` are the allowed extensions. If it is empty, any extension is allowed.
#[allow(dead_code, reason = "not every example writes a file")]
pub(crate) fn check_output(path: &Path, ends: &[&str]) -> anyhow::Result<()> {
    let end = path.extension().map(|end| end.to_string_lossy().to_ascii_lowercase());
    if !ends.is_empty() && !ends.iter().any(|known| end.as_deref() == Some(known)) {
        bail!("{}: expected a file name that ends in .{}", path.display(), ends.join(" or ."));
    }
    let meta = std::fs::metadata(path).ok();
    if path.file_name().is_none() || meta.as_ref().is_some_and(std::fs::Metadata::is_dir) {
        bail!("{}: is a directory; expected a file name", path.display());
    }
    if meta.is_some_and(|meta| !meta.is_file()) {
        // A terminal or a pipe needs no temporary file.
        return Ok(());
    }
    let part = part_of(path);
    let made = std::fs::File::options().write(true).create_new(true).open(&part);
    let directory = part.parent().unwrap_or(Path::new(".")).display().to_string();
    made.map(drop).with_context(|| format!("{}: cannot create a file in {directory:?}", path.display()))?;
    std::fs::remove_file(&part).with_context(|| part.display().to_string())
}

/// Writes a file completely or not at all: it is written under a temporary name and then renamed.
#[allow(dead_code, reason = "not every example writes a file")]
pub(crate) fn write_whole(path: &Path, text: impl AsRef<[u8]>) -> anyhow::Result<()> {
    if std::fs::metadata(path).is_ok_and(|meta| !meta.is_file()) {
        return std::fs::write(path, &text).with_context(|| path.display().to_string());
    }
    let part = part_of(path);
    let written = std::fs::write(&part, &text).and_then(|()| std::fs::rename(&part, path));
    if written.is_err() {
        std::fs::remove_file(&part).ok();
    }
    written.with_context(|| path.display().to_string())
}

/// Returns the path of the temporary file that is renamed to `path`.
fn part_of(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{}.part", std::process::id()))
}
