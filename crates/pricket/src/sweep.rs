//! Measurements over the training steps of models: [`Sweep`], result files, and curves drawn from them.

pub(crate) mod inputs;
pub(crate) mod measure;
pub(crate) mod results;
#[cfg(feature = "plots")]
pub(crate) mod rows;
pub(crate) mod run;
pub(crate) mod shard;

pub use measure::Measure;
#[cfg(feature = "plots")]
pub use rows::{CurveOptions, Row, csv, curves, read_rows, table};
pub use run::{Sweep, SweepSummary};
pub use shard::Shard;
