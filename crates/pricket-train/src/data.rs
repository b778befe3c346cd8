//! Training data: records of a file, and samples with their statistics.

mod dataset;
mod packing;
mod record;

use std::path::Path;

use pricket_lm::{Documents, Place};

pub use dataset::{Dataset, DatasetOptions, Skipped, Statistics};
pub use packing::best_fit;
pub(crate) use packing::in_order;
pub use record::Record;

use crate::{Error, Result};

/// Reads the records of files, one file after the other, each with its place.
///
/// A file has JSON lines, one JSON array, or parquet rows, and may be compressed with gzip or Zstandard (see
/// [`Documents`]). Empty lines are skipped. All records are read before the function returns, so a file that changes
/// later does not affect them.
///
/// # Errors
/// Returns [`Error::Text`] with the place if a file cannot be read or a line is not valid JSON, [`Error::Data`] with
/// the place if a record has no known form, and [`Error::Input`] if the files have no records.
pub fn read_records<P: AsRef<Path>>(paths: &[P]) -> Result<Vec<(Place, Record)>> {
    let mut documents = Documents::open_all(paths)?;
    let mut out = Vec::new();
    while let Some(document) = documents.next() {
        let document = document?;
        let place = documents.place();
        match Record::from_json(&document) {
            Ok(record) => out.push((place, record)),
            Err(e) => return Err(Error::Data { place, what: e.to_string() }),
        }
    }
    if out.is_empty() {
        let names: Vec<String> = paths.iter().map(|path| path.as_ref().display().to_string()).collect();
        return Err(Error::Input(format!("{}: no records found", names.join(", "))));
    }
    Ok(out)
}
