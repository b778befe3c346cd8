use std::path::PathBuf;

/// The reasons for which a picture cannot be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Fewer than one or more than `most` of something.
    #[error("a picture of {found} {what}; expected 1 to {most}")]
    Count {
        /// Panels, rows, tokens.
        what: String,
        /// How many there are.
        found: usize,
        /// How many there may be.
        most: usize,
    },
    /// A panel without a value that has a place on its axes.
    #[error("there is no finite value of {axis:?} to draw")]
    Nothing {
        /// The label of the vertical axis.
        axis: String,
    },
    /// A row of a table that is not as long as the others.
    #[error("a row of {found} texts in a table of {columns} columns")]
    Row {
        /// Texts of the row.
        found: usize,
        /// Columns of the table.
        columns: usize,
    },
    /// A map with more or fewer values than names.
    #[error("{found} {what} for {names} names")]
    Map {
        /// What is counted.
        what: &'static str,
        /// How many there are.
        found: usize,
        /// Names of rows or columns.
        names: usize,
    },
    /// A panel that is too small or too large.
    #[error("a panel of {width} by {height}; expected 200 by 150 to 4000 by 4000")]
    Size {
        /// Its width.
        width: u32,
        /// Its height.
        height: u32,
    },
    /// A file name that says no format.
    #[error("{}: pictures are .svg or .png, and .pdf with the feature of that name", path.display())]
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
        /// What the system said.
        error: std::io::Error,
    },
}

/// `Result` with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
