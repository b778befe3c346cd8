//! Axes: linear, logarithmic, and logarithmic with a place for 0 left of 1, which training steps use.

use std::ops::Range;

use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};

/// Place of step 0 on the logarithmic axis, in decades.
const ZERO: f64 = -0.6;

/// The mapping from values to places on an axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scale {
    Linear,
    Log,
    /// Logarithmic, with a place for 0 at [`ZERO`].
    Steps,
}

/// A range of a scale, with its ticks.
#[derive(Clone, Debug)]
pub(super) struct Axis {
    scale: Scale,
    /// Range of places, not of values.
    range: Range<f64>,
    /// Values of the ticks.
    ticks: Vec<f64>,
    /// Labels of the ticks 0, 1, 2 and so on, if they are names.
    names: Vec<String>,
}

impl Axis {
    /// Creates an axis that shows all of `values`, which are finite, with a margin.
    pub(super) fn over(scale: Scale, values: impl Iterator<Item = f64>) -> Self {
        let places: Vec<f64> = values.map(|value| place(scale, value)).collect();
        let low = places.iter().copied().fold(f64::INFINITY, f64::min);
        let high = places.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        // The range of a single value is empty and needs a width.
        let extent = if high > low { high - low } else { (high.abs() * 0.2).max(0.5) };
        let range = low - 0.05 * extent..high + 0.05 * extent;
        let ticks = match scale {
            Scale::Linear => linear_ticks(&range),
            Scale::Log => log_ticks(&range),
            Scale::Steps => {
                let zero = range.contains(&ZERO).then_some(0.0);
                let powers = (0..=9).map(|n| 10f64.powi(n)).filter(|&x| range.contains(&x.log10()));
                let ticks: Vec<f64> = zero.into_iter().chain(powers).collect();
                // A range between two powers of ten needs finer ticks.
                if ticks.len() < 2 && zero.is_none() { log_ticks(&range) } else { ticks }
            }
        };
        Self { scale, range, ticks, names: Vec::new() }
    }

    /// Creates an axis with a name for each of the values 0, 1, 2 and so on.
    pub(super) fn of_names(names: &[String]) -> Self {
        let count = names.len() as f64;
        let ticks = (0..names.len()).map(|i| i as f64).collect();
        Self { scale: Scale::Linear, range: -0.5..count - 0.5, ticks, names: names.to_vec() }
    }

    /// Returns the number of decimals that shows all ticks of a linear axis exactly.
    fn decimals(&self) -> usize {
        self.ticks.iter().map(|&tick| decimals(tick)).max().unwrap_or(0)
    }
}

/// Returns the place of a value on a scale.
fn place(scale: Scale, value: f64) -> f64 {
    match scale {
        Scale::Linear => value,
        Scale::Steps if value < 1.0 => ZERO,
        Scale::Log | Scale::Steps => value.log10(),
    }
}

/// Returns about five round numbers in a range.
fn linear_ticks(range: &Range<f64>) -> Vec<f64> {
    let rough = (range.end - range.start) / 5.0;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().map(|m| m * power).find(|&s| s >= rough).unwrap_or(rough);
    let first = (range.start / step).ceil() as i64;
    (first..).map(|i| i as f64 * step).take_while(|&x| x <= range.end).take(20).collect()
}

/// Returns powers of ten in a range of decades, and round numbers between them if the range is short.
fn log_ticks(range: &Range<f64>) -> Vec<f64> {
    let between: &[f64] = if range.end - range.start > 3.0 {
        &[1.0]
    } else if range.end - range.start > 0.7 {
        &[1.0, 2.0, 5.0]
    } else {
        // Below a decade, the ticks are those of a linear axis.
        return linear_ticks(&(10f64.powf(range.start)..10f64.powf(range.end)));
    };
    let powers = range.start.floor() as i32..=range.end.ceil() as i32;
    let all = powers.flat_map(|n| between.iter().map(move |m| m * 10f64.powi(n)));
    all.filter(|x| range.contains(&x.log10())).collect()
}

impl Ranged for Axis {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        let share = (place(self.scale, *value) - self.range.start) / (self.range.end - self.range.start);
        limit.0 + (share * f64::from(limit.1 - limit.0)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        self.ticks.clone()
    }

    /// Returns the range of values. plotters passes them to [`Ranged::map`].
    fn range(&self) -> Range<f64> {
        let value = |place: f64| if self.scale == Scale::Linear { place } else { 10f64.powf(place) };
        value(self.range.start)..value(self.range.end)
    }
}

impl ValueFormatter<f64> for Axis {
    fn format(value: &f64) -> String {
        short(*value, decimals(*value))
    }

    fn format_ext(&self, value: &f64) -> String {
        if let Some(name) = self.names.get(*value as usize) {
            return name.clone();
        }
        short(*value, if self.scale == Scale::Linear { self.decimals() } else { decimals(*value) })
    }
}

/// Returns a number in its unit, and the unit: nothing, thousands or millions.
fn scaled(value: f64) -> (f64, &'static str) {
    match value.abs() {
        size if size >= 1e6 => (value / 1e6, "M"),
        size if size >= 1e3 => (value / 1e3, "k"),
        _ => (value, ""),
    }
}

/// Returns the number of decimals that shows a tick exactly.
fn decimals(value: f64) -> usize {
    let (scaled, _) = scaled(value);
    let exact = |&decimals: &usize| {
        let rounded: f64 = format!("{scaled:.decimals$}").parse().unwrap_or(scaled);
        (rounded - scaled).abs() <= 1e-9 * scaled.abs().max(1e-9)
    };
    (0..12).find(exact).unwrap_or(12)
}

/// Formats a number as the label of a tick, such as `20k` or `1M`.
fn short(value: f64, decimals: usize) -> String {
    let (scaled, unit) = scaled(value);
    // Rounding errors must not show as -0.
    let scaled = if scaled.abs() < 1e-15 { 0.0 } else { scaled };
    format!("{scaled:.decimals$}{unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        let axis = Axis::over(Scale::Linear, [0.18, 0.56].into_iter());
        assert_eq!(
            axis.ticks.iter().map(|tick| axis.format_ext(tick)).collect::<Vec<_>>(),
            ["0.2", "0.3", "0.4", "0.5"]
        );
        let axis = Axis::over(Scale::Steps, [0.0, 1.0, 143_000.0].into_iter());
        let shown: Vec<String> = axis.ticks.iter().map(|tick| axis.format_ext(tick)).collect();
        assert_eq!(shown, ["0", "1", "10", "100", "1k", "10k", "100k"]);
        let shown = |scale, values: [f64; 2]| {
            let axis = Axis::over(scale, values.into_iter());
            axis.ticks.iter().map(|tick| axis.format_ext(tick)).collect::<Vec<_>>()
        };
        assert_eq!(shown(Scale::Linear, [0.0, 1.0]), ["0.00", "0.25", "0.50", "0.75", "1.00"]);
        assert_eq!(shown(Scale::Linear, [1000.0, 1200.0]), ["1.00k", "1.05k", "1.10k", "1.15k", "1.20k"]);
        assert_eq!(shown(Scale::Linear, [-0.1, 0.1]), ["-0.10", "-0.05", "0.00", "0.05", "0.10"]);
        assert_eq!(shown(Scale::Steps, [2000.0, 9000.0]), ["2k", "5k"]);
        assert!(shown(Scale::Steps, [143_000.0; 2]).len() > 1);
        let axis = Axis::over(Scale::Log, [4.4, 3_684_074.0].into_iter());
        assert_eq!(axis.ticks.first(), Some(&10.0));
        let axis = Axis::over(Scale::Log, [4.4, 5.1].into_iter());
        assert!(axis.ticks.len() >= 3, "{axis:?}");
        let axis = Axis::over(Scale::Linear, [0.5].into_iter());
        assert!(axis.ticks.len() >= 3, "{axis:?}");
        let axis = Axis::over(Scale::Linear, [0.0].into_iter());
        assert!(axis.ticks.contains(&0.0), "{axis:?}");
    }

    #[test]
    fn zero_stands_left_of_one_and_order_is_kept() {
        let axis = Axis::over(Scale::Steps, [0.0, 1.0, 512.0].into_iter());
        let places: Vec<i32> = [0.0, 1.0, 2.0, 512.0].iter().map(|step| axis.map(step, (0, 1000))).collect();
        assert!(places.is_sorted() && places[0] < places[1] && places[3] <= 1000, "{places:?}");
    }
}
