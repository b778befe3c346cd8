//! Drawing of heatmaps.

use plotters::backend::DrawingBackend;
use plotters::element::Rectangle;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{Color, RGBColor};

use super::Heatmap;
use super::canvas::{Area, COLORS, Drawn, FONT_SIZE, GAP, LINE, WHITE, letters, ready, width_of};

/// Height of a row.
const ROW: u32 = 24;
/// Minimum width of a column.
const NARROWEST: u32 = 30;
/// Width of the color scale, and of its numbers.
const SCALE: (u32, u32) = (14, 70);
/// Color of values that are not finite.
const GRAY: RGBColor = RGBColor(215, 215, 215);

/// Returns the width of the row names, the width of a column, and the height above the map.
fn measures(map: &Heatmap) -> (u32, u32, u32) {
    ready();
    let widest = |names: &[String]| names.iter().map(|name| width_of(name, FONT_SIZE - 1)).max().unwrap_or(0);
    let head = if map.title.is_empty() { GAP } else { LINE + GAP };
    let rows = widest(&map.y.1).max(width_of(&map.y.0, FONT_SIZE)) + 2 * GAP;
    (rows, (widest(&map.x.1) + GAP / 2).max(NARROWEST), head)
}

/// Returns the width and height of a heatmap.
pub(super) fn size(map: &Heatmap) -> (u32, u32) {
    let (rows, column, head) = measures(map);
    let unit = width_of(&map.unit, FONT_SIZE - 1).max(SCALE.1);
    let width = rows + column * map.x.1.len() as u32 + 2 * GAP + SCALE.0 + unit + GAP;
    let title = rows + width_of(&map.title, FONT_SIZE + 2) + GAP;
    (width.max(title), head + LINE + ROW * map.y.1.len().max(3) as u32 + 2 * LINE + GAP)
}

/// Returns the smallest and the largest finite value.
fn ends(map: &Heatmap) -> (f64, f64) {
    let finite = map.values.iter().flatten().copied().filter(|value| value.is_finite());
    finite.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)))
}

/// Returns the color of a value on a scale from `low` to `high`.
fn color(value: f64, (low, high): (f64, f64)) -> RGBColor {
    if !value.is_finite() {
        return GRAY;
    }
    let (share, full) = if low < 0.0 && high > 0.0 {
        let most = high.max(-low);
        (value.abs() / most, if value < 0.0 { COLORS[1] } else { COLORS[0] })
    } else if high <= 0.0 && low < 0.0 {
        (value / low, COLORS[1])
    } else {
        let extent = high - low;
        (if extent > 0.0 { (value - low) / extent } else { 0.5 }, COLORS[0])
    };
    let mixed = |at: fn(&RGBColor) -> u8| {
        let (from, to) = (f64::from(at(&WHITE)), f64::from(at(&full)));
        (from + (to - from) * share.clamp(0.0, 1.0)).round() as u8
    };
    RGBColor(mixed(|c| c.0), mixed(|c| c.1), mixed(|c| c.2))
}

pub(super) fn draw<B: DrawingBackend>(map: &Heatmap, area: &Area<'_, B>, unit: u32) -> Drawn<B> {
    let (rows, column, head) = measures(map);
    let px = |at: u32| (unit * at) as i32;
    let text = |size: u32, side: HPos| letters(size, unit).pos(Pos::new(side, VPos::Center));
    let (top, ends) = (head + LINE, ends(map));
    let right = rows + column * map.x.1.len() as u32;
    if !map.title.is_empty() {
        area.draw_text(&map.title, &text(FONT_SIZE + 2, HPos::Left), (px(rows), px(GAP + LINE / 2)))?;
    }
    area.draw_text(&map.y.0, &text(FONT_SIZE, HPos::Right), (px(rows - GAP / 2), px(top - LINE / 2)))?;
    for (i, (name, values)) in map.y.1.iter().zip(&map.values).enumerate() {
        let y = top + ROW * i as u32;
        area.draw_text(name, &text(FONT_SIZE - 1, HPos::Right), (px(rows - GAP / 2), px(y + ROW / 2)))?;
        for (j, value) in values.iter().enumerate() {
            let x = rows + column * j as u32;
            let corners = [(px(x), px(y)), (px(x + column), px(y + ROW))];
            area.draw(&Rectangle::new(corners, color(*value, ends).filled()))?;
            area.draw(&Rectangle::new(corners, WHITE.stroke_width(unit)))?;
        }
    }
    let bottom = top + ROW * map.y.1.len() as u32;
    for (j, name) in map.x.1.iter().enumerate() {
        let x = rows + column * j as u32 + column / 2;
        area.draw_text(name, &text(FONT_SIZE - 1, HPos::Center), (px(x), px(bottom + LINE / 2)))?;
    }
    let middle = u32::midpoint(rows, right);
    area.draw_text(&map.x.0, &text(FONT_SIZE, HPos::Center), (px(middle), px(bottom + LINE + LINE / 2)))?;
    // The color scale, with the largest value at the top.
    let (left, steps, height) = (right + 2 * GAP, 60, ROW * map.y.1.len().max(3) as u32);
    for step in 0..steps {
        let value = ends.1 + (ends.0 - ends.1) * f64::from(step) / f64::from(steps - 1);
        let (from, to) = (px(top) + px(height) * step / steps, px(top) + px(height) * (step + 1) / steps);
        area.draw(&Rectangle::new([(px(left), from), (px(left + SCALE.0), to)], color(value, ends).filled()))?;
    }
    for (value, y) in [(ends.1, top + LINE / 3), (ends.0, top + height - LINE / 3)] {
        let at = (px(left + SCALE.0 + GAP / 2), px(y));
        area.draw_text(&short(value), &text(FONT_SIZE - 1, HPos::Left), at)?;
    }
    area.draw_text(&map.unit, &text(FONT_SIZE - 1, HPos::Left), (px(left), px(top - LINE / 2)))
}

/// Formats a number for the color scale, with about three significant digits.
fn short(value: f64) -> String {
    match value.abs() {
        size if size != 0.0 && !(1e-3..1e5).contains(&size) => format!("{value:.2e}"),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}
