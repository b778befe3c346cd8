//! Pictures of a sweep, as SVG or PNG: curves over training with error bands and published figures, and tables.
//!
//! Colours are those of Okabe and Ito, which stay apart for every kind of colour vision; shapes of markers and dashes say the
//! same again.
//!
//! ```
//! use pricket_plots::{Curve, Curves, Picture, Point};
//! let points = vec![Point::new(0.0, 10.8), Point::new(1.0, 10.8), Point::new(512.0, 6.1), Point::new(1000.0, 4.4)];
//! let curves = Curves { y: "loss".into(), curves: vec![Curve::new("pythia-70m", points)], ..Curves::default() };
//! let svg = Picture::of_curves(vec![curves])?.svg()?;
//! assert!(svg.starts_with("<svg") && svg.contains("pythia-70m"));
//! # Ok::<(), pricket_plots::Error>(())
//! ```

mod axis;
mod canvas;
mod draw;
mod error;
mod plain;
mod show;
mod text;

use std::io::Write;
use std::path::Path;

pub use error::{Error, Result};

/// A measured value at a training step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// Training steps; 0 has a place of its own on the logarithmic axis.
    pub step: f64,
    /// The value.
    pub value: f64,
    /// Half the height of the band around it, such as a standard error.
    pub error: Option<f64>,
}

impl Point {
    /// A value without a band.
    pub fn new(step: f64, value: f64) -> Self {
        Self { step, value, error: None }
    }
}

/// The values of one model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Curve {
    /// Its name in the legend. Curves of one name have one colour.
    pub label: String,
    /// In any order; those that are not finite are left out.
    pub points: Vec<Point>,
    /// Whether others have published it: dashes and hollow markers.
    pub published: bool,
}

impl Curve {
    /// A curve of our own.
    pub fn new(label: impl Into<String>, points: Vec<Point>) -> Self {
        Self { label: label.into(), points, published: false }
    }
}

/// A panel of curves over training steps on a logarithmic axis.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Curves {
    /// Above the panel.
    pub title: String,
    /// What the vertical axis shows.
    pub y: String,
    /// Whether that axis is logarithmic too; values that are not positive are left out then.
    pub log: bool,
    /// What is drawn.
    pub curves: Vec<Curve>,
}

impl Curves {
    /// Whether there is a value that has a place on the axes.
    pub fn is_drawable(&self) -> bool {
        self.curves.iter().any(|curve| !draw::visible(curve, self.log).is_empty())
    }
}

/// Rows and columns of figures.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Table {
    /// Above the table.
    pub title: String,
    /// Names of the columns; that of the rows' names first.
    pub columns: Vec<String>,
    /// Texts of each row, as many as there are columns.
    pub rows: Vec<Vec<String>>,
}

/// Something that can be looked at.
#[derive(Clone, PartialEq)]
pub struct Picture {
    content: Content,
    size: (u32, u32),
}

impl std::fmt::Debug for Picture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (width, height) = self.size;
        write!(f, "Picture({width} x {height})")
    }
}

#[derive(Clone, Debug, PartialEq)]
enum Content {
    Curves(Vec<Curves>),
    Table(Table),
    /// Texts and their probabilities.
    Tokens(Vec<(String, f64)>),
    Bars(Vec<(String, f64)>),
    Stack(Vec<Picture>),
}

/// Texts that can be looked at.
fn shown(what: &str, texts: Vec<(String, f64)>, most: usize) -> Result<Vec<(String, f64)>> {
    if texts.is_empty() || texts.len() > most {
        return Err(Error::Count { what: what.into(), found: texts.len(), most });
    }
    Ok(texts.into_iter().map(|(text, p)| (text::visible_text(&text), p)).collect())
}

/// What a picture may have of panels, rows and columns.
const MOST: usize = 200;

impl Picture {
    /// Panels of curves with one legend.
    ///
    /// # Errors
    /// [`Error::Count`] or [`Error::Nothing`] if there is nothing to draw.
    pub fn of_curves(panels: Vec<Curves>) -> Result<Self> {
        if panels.is_empty() || panels.len() > MOST {
            return Err(Error::Count { what: "panels".into(), found: panels.len(), most: MOST });
        }
        if let Some(panel) = panels.iter().find(|panel| !panel.is_drawable()) {
            return Err(Error::Nothing { axis: panel.y.clone() });
        }
        let size = draw::size_of_curves(&panels);
        Ok(Self { content: Content::Curves(panels), size })
    }

    /// A table.
    ///
    /// # Errors
    /// [`Error::Count`] if it has no rows, [`Error::Row`] if rows are not as long as there are columns.
    pub fn of_table(table: Table) -> Result<Self> {
        let (rows, columns) = (table.rows.len(), table.columns.len());
        for (what, found) in [("rows of a table", rows), ("columns of a table", columns)] {
            if found == 0 || found > MOST {
                return Err(Error::Count { what: what.into(), found, most: MOST });
            }
        }
        if let Some(row) = table.rows.iter().find(|row| row.len() != columns) {
            return Err(Error::Row { found: row.len(), columns });
        }
        let size = draw::size_of_table(&table);
        Ok(Self { content: Content::Table(table), size })
    }

    /// Texts of tokens in their order, each shaded by its probability.
    ///
    /// # Errors
    /// [`Error::Count`] if there are none, or too many to look at.
    pub fn of_tokens(tokens: Vec<(String, f64)>) -> Result<Self> {
        let tokens = shown("tokens", tokens, 20 * MOST)?;
        let size = text::size_of_tokens(&tokens);
        Ok(Self { content: Content::Tokens(tokens), size })
    }

    /// A bar for each text, as long as its probability is beside the largest.
    ///
    /// # Errors
    /// [`Error::Count`] if there are none, or too many to look at.
    pub fn of_bars(bars: Vec<(String, f64)>) -> Result<Self> {
        let bars = shown("bars", bars, MOST)?;
        let size = text::size_of_bars(&bars);
        Ok(Self { content: Content::Bars(bars), size })
    }

    /// Several pictures, one below the other.
    ///
    /// # Errors
    /// [`Error::Count`] if there are none, or too many to look at.
    pub fn of_pictures(pictures: &[Picture]) -> Result<Self> {
        if pictures.is_empty() || pictures.len() > MOST {
            return Err(Error::Count { what: "pictures".into(), found: pictures.len(), most: MOST });
        }
        let width = pictures.iter().map(|picture| picture.size.0).max().unwrap_or(0);
        let size = (width, pictures.iter().map(|picture| picture.size.1).sum());
        Ok(Self { content: Content::Stack(pictures.to_vec()), size })
    }

    /// As SVG.
    ///
    /// # Errors
    /// [`Error::Draw`] with what the plotting library says.
    pub fn svg(&self) -> Result<String> {
        draw::svg(&self.content, self.size)
    }

    /// As PNG, twice as many pixels as the SVG has units.
    ///
    /// # Errors
    /// As [`Picture::svg`].
    pub fn png(&self) -> Result<Vec<u8>> {
        draw::png(&self.content, self.size)
    }

    /// Writes it, as what the extension of `path` says: `.svg` or `.png`. A file that is there is replaced when the new one is
    /// whole.
    ///
    /// # Errors
    /// [`Error::Extension`] for another one, [`Error::Io`] if the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let bytes = match path.extension().and_then(|e| e.to_str()).map(str::to_ascii_lowercase).as_deref() {
            Some("svg") => self.svg()?.into_bytes(),
            Some("png") => self.png()?,
            _ => return Err(Error::Extension { path: path.into() }),
        };
        let io = |error: std::io::Error| Error::Io { path: path.into(), error };
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{}.part", std::process::id()));
        let part = path.with_file_name(name);
        let write = || {
            let mut file = std::fs::File::create(&part)?;
            file.write_all(&bytes)?;
            file.sync_data()?;
            std::fs::rename(&part, path)
        };
        write().map_err(|error| {
            let _ = std::fs::remove_file(&part);
            io(error)
        })
    }
}
