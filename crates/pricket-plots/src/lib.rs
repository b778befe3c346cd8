//! Pictures as SVG, PNG or PDF: curves over training with error bands and published figures, tables, maps of colors, shaded tokens.
//!
//! Colors are those of Okabe and Ito, which stay apart for every kind of color vision; shapes of markers and dashes say the
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
mod heatmap;
#[cfg(feature = "pdf")]
mod pdf;
mod plain;
mod show;
mod text;

use std::io::Write;
use std::path::Path;

pub use error::{Error, Result};

/// A measured value at a training step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// The place on the horizontal axis: training steps, mostly.
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
    /// Its name in the legend. Curves of one name have one color.
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

/// What the horizontal axis of a panel shows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Horizontal {
    /// Training steps, on a logarithmic axis on which 0 has a place.
    #[default]
    Steps,
    /// A quantity on a linear axis, with its label: `layer`, `tokens`.
    Linear(String),
    /// A quantity on a logarithmic axis, with its label; values that are not positive are left out.
    Log(String),
    /// Texts, one for each of the values 0, 1, ..
    Names(Vec<String>),
}

/// Where the names of the curves stand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Legend {
    /// Right of the panels.
    #[default]
    Right,
    /// Below the panels.
    Below,
    /// Nowhere.
    None,
}

/// How panels of curves are laid out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Above all panels; none by default.
    pub title: String,
    /// Width and height of a panel, axes included, in CSS pixels; 440 by 330 by default, from 200 by 150 to 4000 by 4000.
    pub panel: (u32, u32),
    /// Where the names of the curves stand; right of the panels by default.
    pub legend: Legend,
}

impl Default for Layout {
    fn default() -> Self {
        Self { title: String::new(), panel: (440, 330), legend: Legend::Right }
    }
}

/// A panel of curves, over training steps unless it says otherwise.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Curves {
    /// Above the panel.
    pub title: String,
    /// What the horizontal axis shows.
    pub x: Horizontal,
    /// What the vertical axis shows, with its unit: `loss (nats per token)`.
    pub y: String,
    /// Whether that axis is logarithmic too; values that are not positive are left out then.
    pub log: bool,
    /// What is drawn.
    pub curves: Vec<Curve>,
}

impl Curves {
    /// Whether there is a value that has a place on the axes.
    pub fn is_drawable(&self) -> bool {
        self.curves.iter().any(|curve| !draw::visible(curve, self).is_empty())
    }
}

/// A value for each pair of a row and a column, as a color.
///
/// Where there are both signs, zero is white, positive values are blue and negative ones orange. Values of one sign go from white, for the
/// smallest or for zero where none is positive, to blue or orange.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Heatmap {
    /// Above the map.
    pub title: String,
    /// What the columns are, below them, and the name of each.
    pub x: (String, Vec<String>),
    /// What the rows are, left of them, and the name of each; the first is the topmost.
    pub y: (String, Vec<String>),
    /// The values, row after row; those that are not finite stay gray.
    pub values: Vec<Vec<f64>>,
    /// What the values are, with their unit.
    pub unit: String,
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
    Curves(Vec<Curves>, Layout),
    Heatmap(Heatmap),
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
    /// As [`Picture::of_curves_in`].
    pub fn of_curves(panels: Vec<Curves>) -> Result<Self> {
        Self::of_curves_in(panels, &Layout::default())
    }

    /// Panels of curves, laid out in another way.
    ///
    /// # Errors
    /// [`Error::Count`] or [`Error::Nothing`] if there is nothing to draw; [`Error::Size`] for a panel that is too small or too large.
    pub fn of_curves_in(panels: Vec<Curves>, layout: &Layout) -> Result<Self> {
        let (width, height) = layout.panel;
        if !(200..=4000).contains(&width) || !(150..=4000).contains(&height) {
            return Err(Error::Size { width, height });
        }
        if panels.is_empty() || panels.len() > MOST {
            return Err(Error::Count { what: "panels".into(), found: panels.len(), most: MOST });
        }
        if let Some(panel) = panels.iter().find(|panel| !panel.is_drawable()) {
            return Err(Error::Nothing { axis: panel.y.clone() });
        }
        let size = draw::size_of_curves(&panels, layout);
        Ok(Self { content: Content::Curves(panels, layout.clone()), size })
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

    /// A map of colors.
    ///
    /// # Errors
    /// [`Error::Count`] if it has no rows or columns, or too many; [`Error::Map`] if there are not as many values as names;
    /// [`Error::Nothing`] if no value is finite.
    pub fn of_heatmap(map: Heatmap) -> Result<Self> {
        let columns = map.x.1.len();
        for (what, found) in [("rows of a map", map.y.1.len()), ("columns of a map", columns)] {
            if found == 0 || found > MOST {
                return Err(Error::Count { what: what.into(), found, most: MOST });
            }
        }
        if map.values.len() != map.y.1.len() {
            return Err(Error::Map { what: "rows of values", found: map.values.len(), names: map.y.1.len() });
        }
        if let Some(row) = map.values.iter().find(|row| row.len() != columns) {
            return Err(Error::Map { what: "values of a row", found: row.len(), names: columns });
        }
        if !map.values.iter().flatten().any(|value| value.is_finite()) {
            return Err(Error::Nothing { axis: map.unit });
        }
        let size = heatmap::size(&map);
        Ok(Self { content: Content::Heatmap(map), size })
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

    /// As PNG with two pixels for each unit of the SVG, 192 to the inch.
    ///
    /// # Errors
    /// As [`Picture::svg`].
    pub fn png(&self) -> Result<Vec<u8>> {
        draw::png(&self.content, self.size)
    }

    /// As PDF, its letters embedded.
    ///
    /// # Errors
    /// As [`Picture::svg`].
    #[cfg(feature = "pdf")]
    pub fn pdf(&self) -> Result<Vec<u8>> {
        pdf::pdf(&self.svg()?)
    }

    /// Writes it, as what the extension of `path` says: `.svg`, `.png` or, with the feature `pdf`, `.pdf`. A file that is there is replaced when the new one is
    /// whole.
    ///
    /// # Errors
    /// [`Error::Extension`] for another one, [`Error::Io`] if the file cannot be written.
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
