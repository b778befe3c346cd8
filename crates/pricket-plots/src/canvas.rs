//! Colors, fonts and measures that all pictures share. Lengths are in CSS pixels.

use std::sync::OnceLock;

use plotters::backend::DrawingBackend;
use plotters::coord::Shift;
use plotters::drawing::DrawingArea;
use plotters::style::{FontStyle, IntoFont, RGBColor, TextStyle, register_font};

/// Colors of the curves: those of Okabe and Ito (2008), without the yellow, which is hard to see on white.
pub(super) const COLORS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 0, 0),
];

/// Color of the background.
pub(super) const WHITE: RGBColor = RGBColor(255, 255, 255);
/// Color of text and axes.
pub(super) const TEXT: RGBColor = RGBColor(51, 51, 51);
/// Name under which the font is registered.
pub(super) const FONT: &str = "sans-serif";
/// The font file, DejaVu Sans.
pub(super) const FONT_FILE: &[u8] = include_bytes!("DejaVuSans.ttf");
/// Size of the font.
pub(super) const FONT_SIZE: u32 = 13;
/// Width of gaps and margins.
pub(super) const GAP: u32 = 12;
/// Height of a line of text.
pub(super) const LINE: u32 = 22;

/// A drawing area in pixels.
pub(super) type Area<'a, B> = DrawingArea<B, Shift>;

/// Returns the width of a text at a font size.
pub(super) fn width_of(text: &str, letters: u32) -> u32 {
    let font = (FONT, f64::from(letters)).into_font();
    font.box_size(text).map_or(text.chars().count() as u32 * letters * 6 / 10, |(width, _)| width)
}

/// Registers the embedded font, so that no installed font is needed.
pub(super) fn ready() {
    static READY: OnceLock<()> = OnceLock::new();
    READY.get_or_init(|| {
        // Fails only if the font cannot be parsed, and the embedded one can.
        let _ = register_font(FONT, FontStyle::Normal, FONT_FILE);
    });
}

/// The result of a drawing operation.
pub(super) type Drawn<B> =
    std::result::Result<(), plotters::drawing::DrawingAreaErrorKind<<B as DrawingBackend>::ErrorType>>;

/// Returns the text style of a font size.
pub(super) fn letters(size: u32, unit: u32) -> TextStyle<'static> {
    TextStyle::from((FONT, f64::from(size * unit)).into_font()).color(&TEXT)
}
