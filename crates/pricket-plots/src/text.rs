//! Pictures of tokens: tokens shaded by probability, and bars of probabilities.

use plotters::backend::DrawingBackend;
use plotters::element::Rectangle;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{Color, RGBColor};

use super::canvas::{Area, COLORS, Drawn, FONT_SIZE, GAP, LINE, WHITE, letters, ready, width_of};

/// Width of a picture of tokens, at which lines are broken.
const WIDTH: u32 = 760;
/// Height of a token with its probability below it.
const TOKEN: u32 = 40;
/// Length of the longest bar.
const BAR: u32 = 360;

/// Returns a text with its control characters escaped.
pub(super) fn visible_text(text: &str) -> String {
    text.chars().flat_map(|c| if c.is_control() { c.escape_default().collect::<Vec<_>>() } else { vec![c] }).collect()
}

/// Returns the left edge, top edge and width of each token, and the height of all.
fn places(tokens: &[(String, f64)]) -> (Vec<(u32, u32, u32)>, u32) {
    ready();
    let (mut x, mut y) = (GAP, GAP);
    let mut places = Vec::new();
    for (text, _) in tokens {
        let width = width_of(text, FONT_SIZE).max(24) + 8;
        if x + width > WIDTH - GAP && x > GAP {
            (x, y) = (GAP, y + TOKEN + 4);
        }
        places.push((x, y, width));
        x += width + 2;
    }
    (places, y + TOKEN + GAP)
}

/// Returns the width and height of a picture of tokens.
pub(super) fn size_of_tokens(tokens: &[(String, f64)]) -> (u32, u32) {
    (WIDTH, places(tokens).1)
}

pub(super) fn draw_tokens<B: DrawingBackend>(tokens: &[(String, f64)], area: &Area<'_, B>, unit: u32) -> Drawn<B> {
    let px = |at: u32| (unit * at) as i32;
    for ((text, probability), (x, y, width)) in tokens.iter().zip(places(tokens).0) {
        let share = if probability.is_finite() { probability.clamp(0.0, 1.0) } else { 0.0 };
        let mixed = |at: fn(&RGBColor) -> u8| {
            let (from, to) = (f64::from(at(&WHITE)), f64::from(at(&COLORS[0])));
            (from + (to - from) * share).round() as u8
        };
        let color = RGBColor(mixed(|c| c.0), mixed(|c| c.1), mixed(|c| c.2));
        let corners = [(px(x), px(y)), (px(x + width), px(y + LINE))];
        area.draw(&Rectangle::new(corners, color.filled()))?;
        area.draw(&Rectangle::new(corners, RGBColor(200, 200, 200).stroke_width(unit)))?;
        let center = Pos::new(HPos::Center, VPos::Center);
        let style = letters(FONT_SIZE, unit).pos(center);
        let style = if share > 0.6 { style.color(&WHITE) } else { style };
        area.draw_text(text, &style, (px(x + width / 2), px(y + LINE / 2)))?;
        let percent = if share >= 0.01 { format!("{:.0}%", 100.0 * share) } else { "<1%".into() };
        area.draw_text(&percent, &letters(FONT_SIZE - 3, unit).pos(center), (px(x + width / 2), px(y + LINE + 9)))?;
    }
    Ok(())
}

/// Returns the width of the widest label of the bars.
fn label_width(bars: &[(String, f64)]) -> u32 {
    ready();
    bars.iter().map(|(text, _)| width_of(text, FONT_SIZE)).max().unwrap_or(0)
}

/// Returns the width and height of a picture of bars.
pub(super) fn size_of_bars(bars: &[(String, f64)]) -> (u32, u32) {
    (label_width(bars) + BAR + 60 + 3 * GAP, bars.len() as u32 * LINE + 2 * GAP)
}

pub(super) fn draw_bars<B: DrawingBackend>(bars: &[(String, f64)], area: &Area<'_, B>, unit: u32) -> Drawn<B> {
    let px = |at: u32| (unit * at) as i32;
    let left = label_width(bars) + 2 * GAP;
    let most = bars.iter().map(|(_, p)| *p).filter(|p| p.is_finite()).fold(0.0, f64::max).max(f64::MIN_POSITIVE);
    for (i, (text, probability)) in bars.iter().enumerate() {
        let y = GAP + i as u32 * LINE;
        let style = letters(FONT_SIZE, unit);
        area.draw_text(
            text,
            &style.clone().pos(Pos::new(HPos::Right, VPos::Center)),
            (px(left - 8), px(y + LINE / 2)),
        )?;
        let length = (f64::from(BAR) * (probability / most).clamp(0.0, 1.0)) as u32;
        let corners = [(px(left), px(y + 3)), (px(left + length.max(1)), px(y + LINE - 3))];
        area.draw(&Rectangle::new(corners, COLORS[0].filled()))?;
        let value = format!("{:.1}%", 100.0 * probability);
        let style = style.pos(Pos::new(HPos::Left, VPos::Center));
        area.draw_text(&value, &style, (px(left + length + 6), px(y + LINE / 2)))?;
    }
    Ok(())
}
