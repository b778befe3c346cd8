//! The errors of this crate.

use std::path::PathBuf;

/// An error of creating, drawing or saving a picture.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The number of panels, rows, tokens or similar parts is 0 or above the maximum.
    #[error("a picture of {found} {what}; expected 1 to {most}")]
    Count {
        /// Name of the parts, such as panels, rows or tokens.
        what: String,
        /// Number found.
        found: usize,
        /// Maximum number.
        most: usize,
    },
    /// A panel or heatmap has no value that can be drawn.
    #[error("there is no finite value of {axis:?} to draw")]
    NoData {
        /// Label of the vertical axis, or of a heatmap's color scale.
        axis: String,
    },
    /// A row of a table does not have one cell for each column.
    #[error("a row of {found} cells in a table of {columns} columns")]
    Row {
        /// Number of cells of the row.
        found: usize,
        /// Number of columns of the table.
        columns: usize,
    },
    /// A heatmap has more or fewer values than names.
    #[error("{found} {what} for {names} names")]
    Map {
        /// The values that are counted: rows of values, or values of a row.
        what: &'static str,
        /// Number of values found.
        found: usize,
        /// Number of names of rows or columns.
        names: usize,
    },
    /// The panel size is out of range.
    #[error("a panel of {width} by {height}; expected 200 by 150 to 4000 by 4000")]
    Size {
        /// Width in CSS pixels.
        width: u32,
        /// Height in CSS pixels.
        height: u32,
    },
    /// The extension of a file names no known format.
    #[error("{}: unknown picture format; expected .svg or .png, or .pdf with the feature pdf", path.display())]
    Extension {
        /// The file.
        path: PathBuf,
    },
    /// The plotting library failed.
    #[error("the picture could not be drawn: {0}")]
    Draw(String),
    /// The file could not be written.
    #[error("{}: {error}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The error of the operating system.
        error: std::io::Error,
    },
}

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
