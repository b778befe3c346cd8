//! Files of a sweep's results: lines of JSON, of which those of a measure belong together.

use std::path::Path;

use serde_json::Value;

use crate::{Error, Result};

/// What a file holds.
#[derive(Default)]
pub(crate) struct Results {
    /// Rows of measures that were written to their end.
    pub(crate) rows: Vec<Value>,
    /// Bytes up to the end of the last of them.
    pub(crate) whole: usize,
    /// Rows of a measure that was broken off.
    pub(crate) torn: usize,
}

/// The rows of a file whose bytes are `text`. A run that was killed while it wrote leaves a line without an end, or a measure without
/// its last row.
pub(crate) fn parse(path: &Path, text: &[u8]) -> Result<Results> {
    let (mut results, mut at, mut pending) = (Results::default(), 0, Vec::new());
    for (number, line) in text.split_inclusive(|&byte| byte == b'\n').enumerate() {
        at += line.len();
        if line.last() != Some(&b'\n') {
            results.torn += 1;
            break;
        }
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let wrong = |e: serde_json::Error| {
            let what = e.to_string();
            let what = what.split(" at line ").next().unwrap_or_default();
            Error::Input(format!("{}, line {}: not a row of a sweep: {what}", path.display(), number + 1))
        };
        let row: Value = pricket_weights::parse_json(line).map_err(wrong)?;
        let last = row["part"][0] == row["part"][1];
        pending.push(row);
        if last {
            results.whole = at;
            results.rows.append(&mut pending);
        }
    }
    results.torn += pending.len();
    Ok(results)
}
