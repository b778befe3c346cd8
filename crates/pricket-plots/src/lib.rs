//! Pictures as SVG, PNG or PDF: curves over training steps, tables, heatmaps and token probabilities.
//!
//! Curves can have error bands, and can be marked as published results, which are dashed. The colors are those of Okabe
//! and Ito, which people with any type of color vision can distinguish. Markers of different shapes distinguish the
//! curves as well.
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
mod heatmap;
#[cfg(feature = "pdf")]
mod pdf;
mod plain;
mod show;
mod text;

use std::io::Write;
use std::path::Path;

pub use error::{Error, Result};

/// A point of a curve.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// Position on the horizontal axis, such as a training step.
    pub step: f64,
    /// Position on the vertical axis.
    pub value: f64,
    /// Half the height of the error band, such as a standard error.
    pub error: Option<f64>,
}

impl Point {
    /// Creates a point without an error band.
    pub fn new(step: f64, value: f64) -> Self {
        Self { step, value, error: None }
    }
}

/// A curve, such as the values of one model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Curve {
    /// Name in the legend. Curves with the same name have the same color.
    pub label: String,
    /// Points in any order. Points that are not finite are omitted.
    pub points: Vec<Point>,
    /// Whether the values are published results of others, drawn with dashes and hollow markers.
    pub published: bool,
}

impl Curve {
    /// Creates a curve of measured values, drawn with a solid line.
    pub fn new(label: impl Into<String>, points: Vec<Point>) -> Self {
        Self { label: label.into(), points, published: false }
    }
}

/// Scale and label of a panel's horizontal axis.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum XAxis {
    /// Training steps on a logarithmic axis that also has a place for 0.
    #[default]
    Steps,
    /// A linear axis with this label, such as `layer` or `tokens`.
    Linear(String),
    /// A logarithmic axis with this label. Values that are not positive are omitted.
    Log(String),
    /// A categorical axis: the names of the values 0, 1, 2 and so on.
    Names(Vec<String>),
}

/// Position of the legend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Legend {
    /// Right of the panels.
    #[default]
    Right,
    /// Below the panels.
    Below,
    /// No legend.
    None,
}

/// Layout of a picture of curves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Title above all panels. Default: none.
    pub title: String,
    /// Width and height of a panel with its axes, in CSS pixels, from 200 by 150 to 4000 by 4000. Default: 440 by 330.
    pub panel: (u32, u32),
    /// Position of the legend. Default: right of the panels.
    pub legend: Legend,
}

impl Default for Layout {
    fn default() -> Self {
        Self { title: String::new(), panel: (440, 330), legend: Legend::Right }
    }
}

/// A panel of curves with common axes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Curves {
    /// Title above the panel.
    pub title: String,
    /// XAxis axis. Default: training steps.
    pub x: XAxis,
    /// Label of the vertical axis with its unit, such as `loss (nats per token)`.
    pub y: String,
    /// Whether the vertical axis is logarithmic. Values that are not positive are then omitted.
    pub log: bool,
    /// The curves.
    pub curves: Vec<Curve>,
}

impl Curves {
    /// Returns whether any point can be drawn: a finite one with a place on the axes.
    pub fn is_drawable(&self) -> bool {
        self.curves.iter().any(|curve| !draw::visible(curve, self).is_empty())
    }
}

/// A heatmap: a matrix of values drawn as colors.
///
/// With values of both signs, zero is white, positive values are blue, and negative values are orange. Without negative
/// values, the scale goes from white for the smallest to blue for the largest. Without positive values, it goes from
/// white for zero to orange.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Heatmap {
    /// Title above the map.
    pub title: String,
    /// Label of the horizontal axis, and the name of each column.
    pub x: (String, Vec<String>),
    /// Label of the vertical axis, and the name of each row from top to bottom.
    pub y: (String, Vec<String>),
    /// Values of each row. Values that are not finite are gray.
    pub values: Vec<Vec<f64>>,
    /// Label of the color scale, with its unit.
    pub unit: String,
}

/// A table of texts.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Table {
    /// Title above the table.
    pub title: String,
    /// Names of all columns, including that of the row names.
    pub columns: Vec<String>,
    /// Cells of each row, one for each column.
    pub rows: Vec<Vec<String>>,
}

/// A picture that can be saved as SVG, PNG or PDF, or shown in a notebook.
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

/// The content of a picture.
#[derive(Clone, Debug, PartialEq)]
enum Content {
    Curves(Vec<Curves>, Layout),
    Heatmap(Heatmap),
    Table(Table),
    /// Texts of tokens and their probabilities.
    Tokens(Vec<(String, f64)>),
    /// Labels of bars and their probabilities.
    Bars(Vec<(String, f64)>),
    /// Pictures from top to bottom.
    Stack(Vec<Picture>),
}

/// Checks the number of texts, and escapes their control characters.
fn shown(what: &str, texts: Vec<(String, f64)>, most: usize) -> Result<Vec<(String, f64)>> {
    if texts.is_empty() || texts.len() > most {
        return Err(Error::Count { what: what.into(), found: texts.len(), most });
    }
    Ok(texts.into_iter().map(|(text, p)| (text::visible_text(&text), p)).collect())
}

/// Maximum number of panels, rows, columns, bars or stacked pictures.
const MAX_ITEMS: usize = 200;

impl Picture {
    /// Creates a picture of panels with curves and one legend, in the default layout.
    ///
    /// # Errors
    /// Returns the errors of [`Picture::of_curves_in`].
    pub fn of_curves(panels: Vec<Curves>) -> Result<Self> {
        Self::of_curves_in(panels, &Layout::default())
    }

    /// Creates a picture of panels with curves and one legend, in this layout.
    ///
    /// # Errors
    /// Returns [`Error::Count`] if there are no panels or too many, [`Error::NoData`] if a panel has no point to draw,
    /// and [`Error::Size`] if the panel size is out of range.
    pub fn of_curves_in(panels: Vec<Curves>, layout: &Layout) -> Result<Self> {
        let (width, height) = layout.panel;
        if !(200..=4000).contains(&width) || !(150..=4000).contains(&height) {
            return Err(Error::Size { width, height });
        }
        if panels.is_empty() || panels.len() > MAX_ITEMS {
            return Err(Error::Count { what: "panels".into(), found: panels.len(), most: MAX_ITEMS });
        }
        if let Some(panel) = panels.iter().find(|panel| !panel.is_drawable()) {
            return Err(Error::NoData { axis: panel.y.clone() });
        }
        let size = draw::size_of_curves(&panels, layout);
        Ok(Self { content: Content::Curves(panels, layout.clone()), size })
    }

    /// Creates a picture of a table.
    ///
    /// # Errors
    /// Returns [`Error::Count`] if it has no rows or columns, or too many. Returns [`Error::Row`] if a row does not
    /// have one cell for each column.
    pub fn of_table(table: Table) -> Result<Self> {
        let (rows, columns) = (table.rows.len(), table.columns.len());
        for (what, found) in [("rows of a table", rows), ("columns of a table", columns)] {
            if found == 0 || found > MAX_ITEMS {
                return Err(Error::Count { what: what.into(), found, most: MAX_ITEMS });
            }
        }
        if let Some(row) = table.rows.iter().find(|row| row.len() != columns) {
            return Err(Error::Row { found: row.len(), columns });
        }
        let size = draw::size_of_table(&table);
        Ok(Self { content: Content::Table(table), size })
    }

    /// Creates a picture of a heatmap.
    ///
    /// # Errors
    /// Returns [`Error::Count`] if it has no rows or columns, or too many. Returns [`Error::Map`] if the number of
    /// values differs from the number of names. Returns [`Error::NoData`] if no value is finite.
    pub fn of_heatmap(map: Heatmap) -> Result<Self> {
        let columns = map.x.1.len();
        for (what, found) in [("rows of a heatmap", map.y.1.len()), ("columns of a heatmap", columns)] {
            if found == 0 || found > MAX_ITEMS {
                return Err(Error::Count { what: what.into(), found, most: MAX_ITEMS });
            }
        }
        if map.values.len() != map.y.1.len() {
            return Err(Error::Map { what: "rows of values", found: map.values.len(), names: map.y.1.len() });
        }
        if let Some(row) = map.values.iter().find(|row| row.len() != columns) {
            return Err(Error::Map { what: "values of a row", found: row.len(), names: columns });
        }
        if !map.values.iter().flatten().any(|value| value.is_finite()) {
            return Err(Error::NoData { axis: map.unit });
        }
        let size = heatmap::size(&map);
        Ok(Self { content: Content::Heatmap(map), size })
    }

    /// Creates a picture of a text: its tokens in order, each shaded by its probability.
    ///
    /// # Errors
    /// Returns [`Error::Count`] if there are no tokens or too many.
    pub fn of_tokens(tokens: Vec<(String, f64)>) -> Result<Self> {
        let tokens = shown("tokens", tokens, 20 * MAX_ITEMS)?;
        let size = text::size_of_tokens(&tokens);
        Ok(Self { content: Content::Tokens(tokens), size })
    }

    /// Creates a picture with a bar for each text. The length of a bar is its probability relative to the largest one.
    ///
    /// # Errors
    /// Returns [`Error::Count`] if there are no bars or too many.
    pub fn of_bars(bars: Vec<(String, f64)>) -> Result<Self> {
        let bars = shown("bars", bars, MAX_ITEMS)?;
        let size = text::size_of_bars(&bars);
        Ok(Self { content: Content::Bars(bars), size })
    }

    /// Creates a picture of several pictures, from top to bottom.
    ///
    /// # Errors
    /// Returns [`Error::Count`] if there are no pictures or too many.
    pub fn of_pictures(pictures: &[Picture]) -> Result<Self> {
        if pictures.is_empty() || pictures.len() > MAX_ITEMS {
            return Err(Error::Count { what: "pictures".into(), found: pictures.len(), most: MAX_ITEMS });
        }
        let width = pictures.iter().map(|picture| picture.size.0).max().unwrap_or(0);
        let size = (width, pictures.iter().map(|picture| picture.size.1).sum());
        Ok(Self { content: Content::Stack(pictures.to_vec()), size })
    }

    /// Returns the picture as SVG.
    ///
    /// # Errors
    /// Returns [`Error::Draw`] if the plotting library fails.
    pub fn svg(&self) -> Result<String> {
        draw::svg(&self.content, self.size)
    }

    /// Returns the picture as PNG with two pixels for each unit of the SVG, at 192 pixels per inch.
    ///
    /// # Errors
    /// Returns the errors of [`Picture::svg`], and [`Error::Count`] if the picture has too many pixels.
    pub fn png(&self) -> Result<Vec<u8>> {
        draw::png(&self.content, self.size)
    }

    /// Returns the picture as PDF with an embedded font.
    ///
    /// # Errors
    /// Returns the errors of [`Picture::svg`].
    #[cfg(feature = "pdf")]
    pub fn pdf(&self) -> Result<Vec<u8>> {
        pdf::pdf(&self.svg()?)
    }

    /// Writes the picture to a file. Its extension gives the format: `.svg`, `.png` or, with the feature `pdf`, `.pdf`.
    ///
    /// An existing file is replaced only after the new one is complete.
    ///
    /// # Errors
    /// Returns [`Error::Extension`] if the extension is another one, and [`Error::Io`] if the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let bytes = match path.extension().and_then(|e| e.to_str()).map(str::to_ascii_lowercase).as_deref() {
            Some("svg") => self.svg()?.into_bytes(),
            Some("png") => self.png()?,
            #[cfg(feature = "pdf")]
            Some("pdf") => self.pdf()?,
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
