//! What all kinds of pictures are drawn with: colors, letters, measures.

use std::sync::OnceLock;

use plotters::backend::DrawingBackend;
use plotters::coord::Shift;
use plotters::drawing::DrawingArea;
use plotters::style::{FontStyle, IntoFont, RGBColor, TextStyle, register_font};

/// Okabe and Ito 2008, without the yellow that white swallows.
pub(super) const COLORS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 0, 0),
];

pub(super) const WHITE: RGBColor = RGBColor(255, 255, 255);
pub(super) const TEXT: RGBColor = RGBColor(51, 51, 51);
pub(super) const FONT: &str = "sans-serif";
/// DejaVu Sans.
pub(super) const FONT_FILE: &[u8] = include_bytes!("DejaVuSans.ttf");
pub(super) const LETTERS: u32 = 13;
/// Room between things.
pub(super) const GAP: u32 = 12;
/// A line of text.
pub(super) const LINE: u32 = 22;

/// Where something is drawn.
pub(super) type Area<'a, B> = DrawingArea<B, Shift>;

/// The width of a text in letters of a size.
pub(super) fn width_of(text: &str, letters: u32) -> u32 {
    let font = (FONT, f64::from(letters)).into_font();
    font.box_size(text).map_or(text.chars().count() as u32 * letters * 6 / 10, |(width, _)| width)
}

/// The font of the pictures, which the machine need not have.
pub(super) fn ready() {
    static READY: OnceLock<()> = OnceLock::new();
    READY.get_or_init(|| {
        // The only failure is a font that cannot be read, and this one is tested.
        let _ = register_font(FONT, FontStyle::Normal, FONT_FILE);
    });
}

/// What comes of drawing.
pub(super) type Drawn<B> =
    std::result::Result<(), plotters::drawing::DrawingAreaErrorKind<<B as DrawingBackend>::ErrorType>>;

/// The style of letters of a size.
pub(super) fn letters(size: u32, unit: u32) -> TextStyle<'static> {
    TextStyle::from((FONT, f64::from(size * unit)).into_font()).color(&TEXT)
}
