//! Layout and drawing of pictures, as SVG or PNG.
//!
//! Layout is computed in CSS pixels. `unit` is the number of pixels per CSS pixel: 1 for SVG, more for PNG.

use plotters::backend::{BitMapBackend, DrawingBackend, SVGBackend};
use plotters::chart::ChartBuilder;
use plotters::drawing::IntoDrawingArea;
use plotters::element::{Circle, Cross, DashedPathElement, PathElement, Polygon, TriangleMarker};
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{Color, RGBColor, ShapeStyle};

use super::axis::{Axis, Scale};
use super::canvas::{Area, COLORS, Drawn, FONT_SIZE, GAP, LINE, TEXT, WHITE, letters, ready, width_of};
use super::text::{draw_bars, draw_tokens};
use super::{Content, Curve, Curves, Layout, Legend, Picture, Point, Table, XAxis, heatmap};
use crate::{Error, Result};

/// Color of grid lines.
const GRID: RGBColor = RGBColor(225, 225, 225);
/// Background of every second row of a table.
const STRIPE: RGBColor = RGBColor(244, 246, 248);

/// Width of the numbers and label of the vertical axis.
const LABELS: u32 = 62;

/// Width of the line samples in the legend.
const SAMPLE: u32 = 40;

/// Returns the points of a curve that can be drawn, from left to right.
pub(super) fn visible(curve: &Curve, panel: &Curves) -> Vec<Point> {
    let mut points: Vec<Point> = curve.points.clone();
    let has_place = |x: f64| match &panel.x {
        XAxis::Steps => x >= 0.0,
        XAxis::Linear(_) => true,
        XAxis::Log(_) => x > 0.0,
        XAxis::Names(names) => x >= 0.0 && x < names.len() as f64,
    };
    let is_drawn = |p: &Point| p.step.is_finite() && has_place(p.step) && p.value.is_finite();
    points.retain(|p| is_drawn(p) && (!panel.log || p.value > 0.0));
    points.sort_by(|a, b| a.step.total_cmp(&b.step));
    points
}

/// Returns the lower and upper end of a point's error band.
fn band(point: &Point, log: bool) -> (f64, f64) {
    let error = point.error.filter(|e| e.is_finite()).unwrap_or(0.0);
    let low = point.value - error;
    // A logarithmic axis has no place for values up to 0: the band ends at half the point's value.
    let low = if log && low <= 0.0 { point.value * 0.5 } else { low };
    (low, point.value + error)
}

/// Returns the distinct names of the curves. The index of a name is its number, which gives color and marker.
fn labels(panels: &[Curves]) -> Vec<&str> {
    let mut labels: Vec<&str> = Vec::new();
    for curve in panels.iter().flat_map(|panel| &panel.curves) {
        if !labels.contains(&curve.label.as_str()) {
            labels.push(&curve.label);
        }
    }
    labels
}

/// Returns whether any curve shows published values.
fn any_published(panels: &[Curves]) -> bool {
    panels.iter().flat_map(|panel| &panel.curves).any(|curve| curve.published)
}

/// Returns the number of panels per row.
fn columns(panels: usize) -> usize {
    panels.min(if panels > 4 { 3 } else { 2 })
}

/// Returns the width and height of a picture of curves.
pub(super) fn size_of_curves(panels: &[Curves], layout: &Layout) -> (u32, u32) {
    let columns = columns(panels.len());
    let rows = panels.len().div_ceil(columns) as u32;
    let (width, height) = (columns as u32 * layout.panel.0, rows * layout.panel.1 + title_height(&layout.title));
    match layout.legend {
        Legend::Right => {
            let entries = entries(panels).len() as u32;
            (width + legend_width(panels), height.max(title_height(&layout.title) + entries * LINE + 2 * GAP))
        }
        Legend::Below => (width, height + rows_below(panels, width) * LINE + GAP),
        Legend::None => (width, height),
    }
}

/// Returns the height of a title, 0 if it is empty.
fn title_height(title: &str) -> u32 {
    if title.is_empty() { 0 } else { LINE + GAP }
}

/// Returns the entries of the legend: number of the color, name, and whether the entry stands for published values.
fn entries(panels: &[Curves]) -> Vec<(usize, &str, bool)> {
    let entries = labels(panels).into_iter().enumerate().map(|(i, label)| (i, label, false));
    entries.chain(any_published(panels).then_some((6, "published", true))).collect()
}

/// Returns the number of rows of a legend below panels of this total width.
fn rows_below(panels: &[Curves], width: u32) -> u32 {
    (entries(panels).len() as u32).div_ceil(across(panels, width))
}

/// Returns the number of names per row in a legend below panels of this total width.
fn across(panels: &[Curves], width: u32) -> u32 {
    (width.saturating_sub(2 * GAP + LABELS) / legend_width(panels)).max(1)
}

/// Returns the width of a legend with one name per row.
fn legend_width(panels: &[Curves]) -> u32 {
    ready();
    let widest = labels(panels).into_iter().chain(["published"]).map(|label| width_of(label, FONT_SIZE)).max();
    SAMPLE + widest.unwrap_or(0) + 2 * GAP
}

/// Returns the widths of a table's columns.
fn column_widths(table: &Table) -> Vec<u32> {
    ready();
    let width = |i: usize| {
        let texts = table.rows.iter().map(|row| &row[i]).chain([&table.columns[i]]);
        texts.map(|text| width_of(text, FONT_SIZE)).max().unwrap_or(0) + 2 * GAP
    };
    (0..table.columns.len()).map(width).collect()
}

/// Returns the width and height of a table.
pub(super) fn size_of_table(table: &Table) -> (u32, u32) {
    let title = if table.title.is_empty() { 0 } else { LINE + GAP };
    let width = column_widths(table).iter().sum::<u32>().max(width_of(&table.title, FONT_SIZE + 2));
    (width + 2 * GAP, title + (table.rows.len() as u32 + 1) * LINE + 2 * GAP)
}

/// Draws a picture as SVG.
pub(super) fn svg(content: &Content, size: (u32, u32)) -> Result<String> {
    ready();
    let mut svg = String::new();
    draw(content, &SVGBackend::with_string(&mut svg, size).into_drawing_area(), 1)?;
    Ok(svg)
}

/// Pixels of a PNG per CSS pixel.
const DENSITY: u32 = 2;

/// Maximum number of pixels of a drawing.
const MOST_PIXELS: u64 = 64 << 20;

/// Draws a picture as PNG.
pub(super) fn png(content: &Content, (width, height): (u32, u32)) -> Result<Vec<u8>> {
    ready();
    // plotters places letters at whole pixels. Drawing larger and scaling down gives even spacing.
    let pixels_at = |times: &u32| u64::from(width) * u64::from(height) * u64::from(DENSITY * times).pow(2);
    let Some(times) = [4, 2, 1].into_iter().find(|times| pixels_at(times) <= MOST_PIXELS) else {
        let found = pixels_at(&1) as usize;
        return Err(Error::Count { what: "pixels".into(), found, most: MOST_PIXELS as usize });
    };
    let unit = DENSITY * times;
    let mut drawn = vec![0u8; 3 * pixels_at(&times) as usize];
    let size = (unit * width, unit * height);
    draw(content, &BitMapBackend::with_buffer(&mut drawn, size).into_drawing_area(), unit)?;
    let (width, height) = (DENSITY * width, DENSITY * height);
    let pixels = smaller(&drawn, width as usize, height as usize, times as usize);
    let mut out = Vec::new();
    let mut encoder = png::Encoder::new(&mut out, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    // An inch has 96 CSS pixels and a meter 3780.
    let per_meter = DENSITY * 3780;
    encoder.set_pixel_dims(Some(png::PixelDimensions { xppu: per_meter, yppu: per_meter, unit: png::Unit::Meter }));
    let written = encoder.write_header().and_then(|mut writer| writer.write_image_data(&pixels));
    written.map_err(|e| Error::Draw(e.to_string()))?;
    Ok(out)
}

/// Scales an RGB image down by `times`: each pixel is the mean of a square of `times` by `times` pixels.
fn smaller(pixels: &[u8], width: usize, height: usize, times: usize) -> Vec<u8> {
    if times == 1 {
        return pixels.to_vec();
    }
    let mut out = Vec::with_capacity(3 * width * height);
    let line = 3 * width * times;
    let mut sums = vec![0u32; 3 * width];
    for rows in pixels.chunks_exact(line * times) {
        sums.fill(0);
        for row in rows.chunks_exact(line) {
            for (square, sum) in row.chunks_exact(3 * times).zip(sums.chunks_exact_mut(3)) {
                for pixel in square.chunks_exact(3) {
                    sum.iter_mut().zip(pixel).for_each(|(sum, &byte)| *sum += u32::from(byte));
                }
            }
        }
        let count = (times * times) as u32;
        out.extend(sums.iter().map(|sum| ((sum + count / 2) / count) as u8));
    }
    out
}

/// Draws a picture on a white background, with `unit` pixels per CSS pixel.
fn draw<B: DrawingBackend>(content: &Content, area: &Area<'_, B>, unit: u32) -> Result<()> {
    let drawn = area.fill(&WHITE).and_then(|()| draw_content(content, area, unit)).and_then(|()| area.present());
    drawn.map_err(|e| Error::Draw(e.to_string()))
}

fn draw_content<B: DrawingBackend>(content: &Content, area: &Area<'_, B>, unit: u32) -> Drawn<B> {
    match content {
        Content::Curves(panels, layout) => draw_curves(panels, layout, area, unit),
        Content::Heatmap(map) => heatmap::draw(map, area, unit),
        Content::Table(table) => draw_table(table, area, unit),
        Content::Tokens(tokens) => draw_tokens(tokens, area, unit),
        Content::Bars(bars) => draw_bars(bars, area, unit),
        Content::Stack(pictures) => {
            let mut top = 0;
            for Picture { content, size: (width, height) } in pictures {
                draw_content(content, &area.clone().shrink((0, top), (width * unit, height * unit)), unit)?;
                top += (height * unit) as i32;
            }
            Ok(())
        }
    }
}

fn draw_curves<B: DrawingBackend>(panels: &[Curves], layout: &Layout, area: &Area<'_, B>, unit: u32) -> Drawn<B> {
    let names = labels(panels);
    let number = |curve: &Curve| names.iter().position(|&label| label == curve.label).unwrap_or(0);
    let (width, _) = area.dim_in_pixel();
    let (head, body) = area.split_vertically(unit * title_height(&layout.title));
    let columns = columns(panels.len());
    let rows = panels.len().div_ceil(columns);
    let of_panels = (unit * columns as u32 * layout.panel.0, unit * rows as u32 * layout.panel.1);
    let (left, right, below) = match layout.legend {
        Legend::Right => {
            let (left, right) = body.split_horizontally(width - unit * legend_width(panels));
            (left, Some(right), None)
        }
        Legend::Below => {
            let (left, below) = body.split_vertically(of_panels.1);
            (left, None, Some(below))
        }
        Legend::None => (body, None, None),
    };
    if !layout.title.is_empty() {
        let style = letters(FONT_SIZE + 4, unit).pos(Pos::new(HPos::Center, VPos::Center));
        let center = (unit * (GAP + LABELS) + of_panels.0 - unit * GAP) / 2;
        head.draw_text(&layout.title, &style, (center as i32, (unit * (GAP + LINE / 2)) as i32))?;
    }
    for (panel, area) in panels.iter().zip(left.split_evenly((rows, columns))) {
        draw_panel(panel, &area, unit, &number)?;
    }
    let x = |at: u32| (unit * at) as i32;
    let across = below.as_ref().map_or(1, |_| across(panels, width / unit));
    if let Some(legend) = right.or(below.clone()) {
        for (i, (number, label, published)) in entries(panels).into_iter().enumerate() {
            let (column, row) = (i as u32 % across, i as u32 / across);
            let indent = if below.is_some() { GAP + LABELS } else { 0 };
            let from = indent + column * legend_width(panels);
            let y = x(row * LINE) + if below.is_some() { x(LINE / 2) } else { x(GAP + LINE) };
            draw_line(&legend, &[(x(from), y), (x(from + SAMPLE - GAP), y)], number, published, unit)?;
            draw_marker(&legend, (x(from + (SAMPLE - GAP) / 2), y), number, published, unit)?;
            let style = letters(FONT_SIZE, unit).pos(Pos::new(HPos::Left, VPos::Center));
            legend.draw_text(label, &style, (x(from + SAMPLE), y))?;
        }
    }
    Ok(())
}

fn draw_panel<B: DrawingBackend>(
    panel: &Curves,
    area: &Area<'_, B>,
    unit: u32,
    number: &impl Fn(&Curve) -> usize,
) -> Drawn<B> {
    let points: Vec<(&Curve, Vec<Point>)> = panel.curves.iter().map(|curve| (curve, visible(curve, panel))).collect();
    let all = || points.iter().flat_map(|(_, points)| points);
    let scale = if panel.log { Scale::Log } else { Scale::Linear };
    let ends = all().flat_map(|point| <[f64; 2]>::from(band(point, panel.log)));
    let places = || all().map(|point| point.step);
    let (x_axis, x_label) = match &panel.x {
        XAxis::Steps => (Axis::over(Scale::Steps, places()), "training step"),
        XAxis::Linear(label) => (Axis::over(Scale::Linear, places()), &label[..]),
        XAxis::Log(label) => (Axis::over(Scale::Log, places()), &label[..]),
        XAxis::Names(names) => (Axis::of_names(names), ""),
    };
    let y_axis = Axis::over(scale, ends);
    let head = if panel.title.is_empty() { 0 } else { LINE };
    let (title, body) = area.split_vertically(unit * head);
    if !panel.title.is_empty() {
        // Centered over the axes, not over the panel.
        let (width, _) = title.dim_in_pixel();
        let center = (unit * (GAP + LABELS) + width - unit * GAP) / 2;
        let style = letters(FONT_SIZE + 2, unit).pos(Pos::new(HPos::Center, VPos::Bottom));
        title.draw_text(&panel.title, &style, (center as i32, (unit * (LINE + GAP / 2)) as i32))?;
    }
    let mut builder = ChartBuilder::on(&body);
    builder.margin(unit * GAP).x_label_area_size(unit * 40).y_label_area_size(unit * LABELS);
    let mut chart = builder.build_cartesian_2d(x_axis, y_axis)?;
    chart
        .configure_mesh()
        .light_line_style(GRID.stroke_width(unit))
        .bold_line_style(GRID.stroke_width(unit))
        .axis_style(TEXT.stroke_width(unit))
        .x_labels(12)
        .y_labels(12)
        .x_desc(x_label)
        .y_desc(&panel.y)
        .label_style(letters(FONT_SIZE - 1, unit))
        .axis_desc_style(letters(FONT_SIZE, unit))
        .set_all_tick_mark_size(5 * unit)
        .draw()?;
    for (curve, points) in &points {
        if points.iter().any(|point| point.error.is_some_and(|error| error > 0.0)) {
            let upper = points.iter().map(|point| (point.step, band(point, panel.log).1));
            let lower = points.iter().rev().map(|point| (point.step, band(point, panel.log).0));
            let outline: Vec<(f64, f64)> = upper.chain(lower).collect();
            chart.draw_series([Polygon::new(outline, color(number(curve)).mix(0.16).filled())])?;
        }
    }
    // Lines and markers are drawn in pixels, so that dashes and shapes have the same size on every scale.
    let plane = chart.plotting_area();
    let base = plane.get_pixel_range();
    let inside = plane.strip_coord_spec();
    for (curve, points) in &points {
        let place = |point: &Point| {
            let (x, y) = plane.map_coordinate(&(point.step, point.value));
            (x - base.0.start, y - base.1.start)
        };
        let places: Vec<(i32, i32)> = points.iter().map(place).collect();
        draw_line(&inside, &places, number(curve), curve.published, unit)?;
        // At most about 40 markers per curve, so that they do not overlap.
        let every = places.len().div_ceil(40).max(1);
        for &place in places.iter().step_by(every) {
            draw_marker(&inside, place, number(curve), curve.published, unit)?;
        }
    }
    Ok(())
}

/// Returns the color of a curve.
fn color(number: usize) -> RGBColor {
    COLORS[number % COLORS.len()]
}

fn draw_line<B: DrawingBackend>(
    area: &Area<'_, B>,
    places: &[(i32, i32)],
    number: usize,
    published: bool,
    unit: u32,
) -> Drawn<B> {
    let style = ShapeStyle { color: color(number).to_rgba(), filled: false, stroke_width: 2 * unit };
    if published {
        let (dash, gap) = (5 * unit, 4 * unit);
        return area.draw(&DashedPathElement::new(places.iter().copied(), dash, gap, style));
    }
    area.draw(&PathElement::new(places.to_vec(), style))
}

fn draw_marker<B: DrawingBackend>(
    area: &Area<'_, B>,
    at: (i32, i32),
    number: usize,
    published: bool,
    unit: u32,
) -> Drawn<B> {
    let size = (4 * unit) as i32;
    let square = |half: i32| {
        let (x, y) = at;
        vec![(x - half, y - half), (x + half, y - half), (x + half, y + half), (x - half, y + half)]
    };
    let diamond = |half: i32| {
        let (x, y) = at;
        vec![(x, y - half), (x + half, y), (x, y + half), (x - half, y)]
    };
    let fill = color(number).filled();
    if published {
        area.draw(&Circle::new(at, size, WHITE.filled()))?;
        return area.draw(&Circle::new(at, size, color(number).stroke_width(unit)));
    }
    match number % 5 {
        0 => area.draw(&Circle::new(at, size, fill)),
        1 => area.draw(&Polygon::new(square(size - unit as i32 / 2), fill)),
        2 => area.draw(&TriangleMarker::new(at, size + unit as i32, fill)),
        3 => area.draw(&Polygon::new(diamond(size + unit as i32), fill)),
        _ => area.draw(&Cross::new(at, size, color(number).stroke_width(2 * unit))),
    }
}

fn draw_table<B: DrawingBackend>(table: &Table, area: &Area<'_, B>, unit: u32) -> Drawn<B> {
    let widths = column_widths(table);
    let px = |at: u32| (unit * at) as i32;
    let mut y = GAP;
    if !table.title.is_empty() {
        let style = letters(FONT_SIZE + 2, unit).pos(Pos::new(HPos::Left, VPos::Center));
        area.draw_text(&table.title, &style, (px(GAP), px(y + LINE / 2)))?;
        y += LINE + GAP;
    }
    let right = GAP + widths.iter().sum::<u32>();
    let rule = |y: u32| PathElement::new(vec![(px(GAP), px(y)), (px(right), px(y))], TEXT.stroke_width(unit));
    for (i, row) in std::iter::once(&table.columns).chain(&table.rows).enumerate() {
        if i > 0 && i % 2 == 0 {
            let corners =
                vec![(px(GAP), px(y)), (px(right), px(y)), (px(right), px(y + LINE)), (px(GAP), px(y + LINE))];
            area.draw(&Polygon::new(corners, STRIPE.filled()))?;
        }
        let mut x = GAP;
        for (column, (text, width)) in row.iter().zip(&widths).enumerate() {
            // Columns of names are aligned left, columns of numbers right.
            let names = table.rows.iter().any(|row| row[column].starts_with(char::is_alphabetic));
            let (at, side) = if names { (x + GAP, HPos::Left) } else { (x + width - GAP, HPos::Right) };
            let style = letters(FONT_SIZE, unit).pos(Pos::new(side, VPos::Center));
            area.draw_text(text, &style, (px(at), px(y + LINE / 2)))?;
            x += width;
        }
        y += LINE;
        if i == 0 {
            area.draw(&rule(y))?;
        }
    }
    area.draw(&rule(y))
}
