//! Axes: linear, logarithmic, and that of training steps, on which 0 has a place left of 1.

use std::ops::Range;

use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};

/// Where step 0 stands, in decades.
const ZERO: f64 = -0.6;

/// How values become places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scale {
    Linear,
    Log,
    /// Logarithmic, with a place for 0.
    Steps,
}

/// Part of a scale, and what is written beside it.
#[derive(Clone, Debug)]
pub(super) struct Axis {
    scale: Scale,
    /// Places, not values.
    range: Range<f64>,
    ticks: Vec<f64>,
    /// Texts in the place of the numbers 0, 1, ..
    names: Vec<String>,
}

impl Axis {
    /// One that shows all of `values`, which are finite, with some room.
    pub(super) fn over(scale: Scale, values: impl Iterator<Item = f64>) -> Self {
        let places: Vec<f64> = values.map(|value| place(scale, value)).collect();
        let low = places.iter().copied().fold(f64::INFINITY, f64::min);
        let high = places.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        // A single value has no extent of its own.
        let extent = if high > low { high - low } else { (high.abs() * 0.2).max(0.5) };
        let range = low - 0.05 * extent..high + 0.05 * extent;
        let ticks = match scale {
            Scale::Linear => linear_ticks(&range),
            Scale::Log => log_ticks(&range),
            Scale::Steps => {
                let zero = range.contains(&ZERO).then_some(0.0);
                let powers = (0..=9).map(|n| 10f64.powi(n)).filter(|&x| range.contains(&x.log10()));
                let ticks: Vec<f64> = zero.into_iter().chain(powers).collect();
                // Between two powers of ten there is something to write too.
                if ticks.len() < 2 && zero.is_none() { log_ticks(&range) } else { ticks }
            }
        };
        Self { scale, range, ticks, names: Vec::new() }
    }

    /// One with a text in the place of each of the numbers 0, 1, ..
    pub(super) fn of_names(names: &[String]) -> Self {
        let count = names.len() as f64;
        let ticks = (0..names.len()).map(|i| i as f64).collect();
        Self { scale: Scale::Linear, range: -0.5..count - 0.5, ticks, names: names.to_vec() }
    }

    /// Decimals that all ticks are told exactly with: as many for each of a linear axis.
    fn decimals(&self) -> usize {
        self.ticks.iter().map(|&tick| decimals(tick)).max().unwrap_or(0)
    }
}

fn place(scale: Scale, value: f64) -> f64 {
    match scale {
        Scale::Linear => value,
        Scale::Steps if value < 1.0 => ZERO,
        Scale::Log | Scale::Steps => value.log10(),
    }
}

/// About five round numbers.
fn linear_ticks(range: &Range<f64>) -> Vec<f64> {
    let rough = (range.end - range.start) / 5.0;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().map(|m| m * power).find(|&s| s >= rough).unwrap_or(rough);
    let first = (range.start / step).ceil() as i64;
    (first..).map(|i| i as f64 * step).take_while(|&x| x <= range.end).take(20).collect()
}

/// Powers of ten, and where there are few of them what lies between.
fn log_ticks(range: &Range<f64>) -> Vec<f64> {
    let between: &[f64] = if range.end - range.start > 3.0 {
        &[1.0]
    } else if range.end - range.start > 0.7 {
        &[1.0, 2.0, 5.0]
    } else {
        // Less than a decade: the values are round as on a linear axis.
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

    /// As values, which is what the library hands back to [`Ranged::map`].
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

/// A number in its unit: thousands, millions.
fn scaled(value: f64) -> (f64, &'static str) {
    match value.abs() {
        size if size >= 1e6 => (value / 1e6, "M"),
        size if size >= 1e3 => (value / 1e3, "k"),
        _ => (value, ""),
    }
}

/// Decimals that a tick is told exactly with.
fn decimals(value: f64) -> usize {
    let (scaled, _) = scaled(value);
    let exact = |&decimals: &usize| {
        let rounded: f64 = format!("{scaled:.decimals$}").parse().unwrap_or(scaled);
        (rounded - scaled).abs() <= 1e-9 * scaled.abs().max(1e-9)
    };
    (0..12).find(exact).unwrap_or(12)
}

/// A number as an axis shows it: `20k`, `1M`.
fn short(value: f64, decimals: usize) -> String {
    let (scaled, unit) = scaled(value);
    // What is zero but for rounding has no sign.
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
