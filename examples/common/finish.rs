//! How the examples write to a terminal, check what they are to write, and end.

use std::fmt::Arguments;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, bail};

/// One clear line and exit code 1 on an error. A reader that has seen enough, such as `head`, is no error.
pub(crate) fn finish(result: anyhow::Result<()>) -> ExitCode {
    let Err(e) = result else { return ExitCode::SUCCESS };
    if is_closed(&e) {
        return ExitCode::SUCCESS;
    }
    tell(format_args!("error: {}", format!("{e:#}").replace('\n', " ")));
    ExitCode::FAILURE
}

/// Whether an error is that nobody reads the output any more.
pub(crate) fn is_closed(e: &anyhow::Error) -> bool {
    e.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == ErrorKind::BrokenPipe)
}

/// Writes a line to stderr. If that is not possible, on a full disk or into a closed pipe, the work goes on without it.
pub(crate) fn tell(line: Arguments<'_>) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

/// Checks that a file can be written at `path`, before the work whose results it is for. `ends` are the extensions that it may
/// have; none for any.
#[allow(dead_code, reason = "not every example writes a file")]
pub(crate) fn check_output(path: &Path, ends: &[&str]) -> anyhow::Result<()> {
    let end = path.extension().map(|end| end.to_string_lossy().to_ascii_lowercase());
    if !ends.is_empty() && !ends.iter().any(|known| end.as_deref() == Some(known)) {
        bail!("{}: the name should end in .{}", path.display(), ends.join(" or ."));
    }
    let meta = std::fs::metadata(path).ok();
    if path.file_name().is_none() || meta.as_ref().is_some_and(std::fs::Metadata::is_dir) {
        bail!("{}: a directory, not a file to write", path.display());
    }
    if meta.is_some_and(|meta| !meta.is_file()) {
        // A terminal or a pipe.
        return Ok(());
    }
    let part = part_of(path);
    let made = std::fs::File::options().write(true).create_new(true).open(&part);
    let directory = part.parent().unwrap_or(Path::new(".")).display().to_string();
    made.map(drop).with_context(|| format!("{}: no file can be made in {directory:?}", path.display()))?;
    std::fs::remove_file(&part).with_context(|| part.display().to_string())
}

/// Writes a file that is there whole or not at all.
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

/// The hidden file that becomes `path` when it is whole.
fn part_of(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{}.part", std::process::id()))
}
