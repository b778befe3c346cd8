//! Conversion of SVG pictures to PDF.

use std::sync::Arc;

use svg2pdf::usvg::{Options, Tree, fontdb};

use crate::canvas::FONT_FILE;
use crate::{Error, Result};

/// Converts an SVG picture to a PDF with one page of the same size.
pub(crate) fn pdf(svg: &str) -> Result<Vec<u8>> {
    let mut fonts = fontdb::Database::new();
    fonts.load_font_data(FONT_FILE.to_vec());
    fonts.set_sans_serif_family("DejaVu Sans");
    let options = Options { fontdb: Arc::new(fonts), ..Options::default() };
    let tree = Tree::from_str(svg, &options).map_err(|e| Error::Draw(e.to_string()))?;
    // The unit of the SVG is a CSS pixel, of which an inch has 96.
    let page = svg2pdf::PageOptions { dpi: 96.0 };
    svg2pdf::to_pdf(&tree, svg2pdf::ConversionOptions::default(), page).map_err(|e| Error::Draw(e.to_string()))
}
