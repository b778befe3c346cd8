//! From a sweep's file to pictures.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;

use serde_json::Value;

use crate::suites::published::published;
use crate::sweep::results;
use crate::{Error, Result};
use pricket_plots::{Curve, Curves, Layout, Picture, Point, Table};

/// A figure of a checkpoint, as [`crate::Sweep`] writes it.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// The model.
    pub model: String,
    /// Its revision.
    pub revision: String,
    /// Its training step.
    pub step: Option<u64>,
    /// What was measured, `TASK/METRIC`.
    pub metric: String,
    /// The figure; `NaN` for one that is no number.
    pub value: f64,
    /// Its standard error.
    pub stderr: Option<f64>,
    /// How it was measured.
    pub settings: Value,
    /// Hashes of what it was computed from; `null` in rows of earlier versions.
    pub inputs: Value,
}

/// Reads files of results, compressed or not, put together. Of a checkpoint and metric that was measured twice the last row counts; rows of
/// checkpoints that failed, and a measure that was broken off, are passed over.
///
/// # Errors
/// [`Error::Io`]; [`Error::Malformed`] for what is no row of a sweep.
pub fn read_rows(paths: &[impl AsRef<Path>]) -> Result<Vec<Row>> {
    let mut rows: Vec<Row> = Vec::new();
    let mut places: BTreeMap<(String, String, String), usize> = BTreeMap::new();
    // Of each measure of a checkpoint the last time that it was measured: a slice that has gone since is not in it.
    let (mut batch, mut batches) = (0, BTreeMap::new());
    let mut from = Vec::new();
    for path in paths {
        let path = path.as_ref();
        let text = pricket_lm::read_text(path)?;
        for row in results::parse(path, &text)?.rows {
            if row["error"].is_string() {
                continue;
            }
            batch += usize::from(row["part"][0] == 1);
            let measure = row["measure"].as_str().map(|measure| {
                let text = |key: &str| row[key].as_str().unwrap_or_default().to_owned();
                (text("model"), text("revision"), measure.to_owned())
            });
            if let Some(measure) = &measure {
                batches.insert(measure.clone(), batch);
            }
            let text = |key: &str| {
                let missing = || Error::Malformed {
                    origin: path.display().to_string(),
                    what: format!("a row without {key:?}: not of a sweep"),
                };
                row[key].as_str().map(str::to_owned).ok_or_else(missing)
            };
            let row = Row {
                model: text("model")?,
                revision: text("revision")?,
                step: row["step"].as_u64(),
                metric: text("metric")?,
                // JSON has no NaN: what is no number is null.
                value: row["value"].as_f64().unwrap_or(f64::NAN),
                stderr: row["stderr"].as_f64(),
                settings: row["settings"].clone(),
                inputs: row["inputs"].clone(),
            };
            let place =
                *places.entry((row.model.clone(), row.revision.clone(), row.metric.clone())).or_insert(rows.len());
            if place < rows.len() {
                (rows[place], from[place]) = (row, (measure, batch));
            } else {
                rows.push(row);
                from.push((measure, batch));
            }
        }
    }
    let mut from = from.into_iter();
    rows.retain(|_| match from.next() {
        Some((Some(measure), batch)) => batches.get(&measure) == Some(&batch),
        _ => true,
    });
    Ok(rows)
}

/// `rows` as a table for other programs: a line for each figure, under `model,revision,step,metric,value,stderr`. What is not known, or no
/// number, is empty. `wanted` names the metrics; all of them if it names none.
///
/// ```
/// use pricket::sweep::{csv, read_rows};
///
/// let file = tempfile::NamedTempFile::new()?;
/// let row = r#"{"model": "a", "revision": "step8", "step": 8, "metric": "text/loss", "value": 2.5, "part": [1, 1]}"#;
/// std::fs::write(&file, format!("{row}\n"))?;
/// assert_eq!(csv(&read_rows(&[file.path()])?, &[])?, "model,revision,step,metric,value,stderr\na,step8,8,text/loss,2.5,\n");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`Error::Results`] if there is no row, or none of a metric of `wanted`.
pub fn csv(rows: &[Row], wanted: &[String]) -> Result<String> {
    let metrics = metrics(rows, wanted)?;
    // RFC 4180.
    let field = |text: &str| {
        if text.contains([',', '"', '\n', '\r']) {
            format!("\"{}\"", text.replace('"', "\"\""))
        } else {
            text.to_owned()
        }
    };
    let number = |value: Option<f64>| value.filter(|value| value.is_finite()).map_or(String::new(), |x| x.to_string());
    let mut out = String::from("model,revision,step,metric,value,stderr\n");
    for row in rows.iter().filter(|row| metrics.contains(&row.metric)) {
        let step = row.step.map_or(String::new(), |step| step.to_string());
        let (model, revision, metric) = (field(&row.model), field(&row.revision), field(&row.metric));
        let _ = writeln!(out, "{model},{revision},{step},{metric},{},{}", number(Some(row.value)), number(row.stderr));
    }
    Ok(out)
}

/// The metrics of `rows` that `wanted` names, in its order; all of them if it names none.
fn metrics(rows: &[Row], wanted: &[String]) -> Result<Vec<String>> {
    let mut there: Vec<String> = Vec::new();
    for row in rows {
        if !there.contains(&row.metric) {
            there.push(row.metric.clone());
        }
    }
    if there.is_empty() {
        return Err(Error::Results("there are no figures to draw".into()));
    }
    if let Some(missing) = wanted.iter().find(|wanted| !there.contains(wanted)) {
        return Err(Error::Results(format!("no row has the metric {missing:?}; there are {}", there.join(", "))));
    }
    Ok(if wanted.is_empty() { there } else { wanted.to_vec() })
}

/// The models of `rows` in the order in which they come, with the names that tell them apart.
fn models(rows: &[Row]) -> Vec<(String, String)> {
    let mut models: Vec<String> = Vec::new();
    for row in rows {
        if !models.contains(&row.model) {
            models.push(row.model.clone());
        }
    }
    let last = |model: &str| model.trim_end_matches('/').rsplit(['/', '\\']).next().unwrap_or(model).to_owned();
    let alone = models.iter().map(|model| last(model)).collect::<BTreeSet<_>>().len() == models.len();
    models.into_iter().map(|model| (if alone { last(&model) } else { model.clone() }, model)).collect()
}

/// The name of a run without its seed: `pythia-160m` of `pythia-160m-seed3`.
fn without_seed(label: &str) -> &str {
    label.rsplit_once("-seed").filter(|(_, seed)| seed.parse::<u64>().is_ok()).map_or(label, |(suite, _)| suite)
}

/// What [`curves`] draws.
#[derive(Clone, Debug)]
pub struct CurveOptions {
    /// Whether runs that differ in their seed are one curve: their mean, in a band of their standard deviation. False by default.
    pub mean_of_seeds: bool,
    /// Whether what others have published of these models is drawn beside; true by default.
    pub published: bool,
    /// Whether the slices or tasks that have one metric are curves of one panel, rather than a panel each. False by default.
    pub together: bool,
    /// How the panels are laid out.
    pub layout: Layout,
}

impl Default for CurveOptions {
    fn default() -> Self {
        Self { mean_of_seeds: false, published: true, together: false, layout: Layout::default() }
    }
}

/// The name of a metric with its unit.
fn with_unit(metric: &str) -> String {
    match metric {
        "loss" => "loss (nats per token)".into(),
        "bits_per_byte" => "bits per byte".into(),
        other => other.replace('_', " "),
    }
}

/// Curves over training, a panel for each of `metrics` (all of them if there are none). Bands are a standard error up and down.
///
/// Metrics without a finite value at any step are left out, unless they are named. Models without training steps have no curve: see
/// [`table`].
///
/// # Errors
/// [`Error::Results`] if a metric that is named is not there, if nothing has a finite value, and if rows of a curve were measured in different
/// ways; [`Error::Picture`] if a metric that is named has nothing to draw.
pub fn curves(rows: &[Row], wanted: &[String], options: &CurveOptions) -> Result<Picture> {
    let metrics = metrics(rows, wanted)?;
    metrics.iter().try_for_each(|metric| same_settings(rows, metric))?;
    if rows.iter().all(|row| row.step.is_none()) {
        return Err(Error::Results(
            "no row has a training step, and curves are drawn over steps; a table needs none".into(),
        ));
    }
    // Title of a panel, name of its metric, and the metrics in full.
    let mut panels: Vec<(String, String, Vec<String>)> = Vec::new();
    for metric in metrics {
        let (title, name) = metric.rsplit_once('/').unwrap_or(("", &metric));
        let (title, name) = (title.to_owned(), name.to_owned());
        match panels.iter_mut().find(|panel| options.together && panel.1 == name) {
            Some(panel) => panel.2.push(metric),
            None => panels.push((if options.together { String::new() } else { title }, name, vec![metric])),
        }
    }
    let mut panels: Vec<Curves> = panels.into_iter().map(|panel| panel_of(rows, panel, options)).collect();
    if wanted.is_empty() {
        panels.retain(Curves::is_drawable);
    }
    if panels.is_empty() {
        return Err(Error::Results("no metric has a finite value at a training step".into()));
    }
    Ok(Picture::of_curves_in(panels, &options.layout)?)
}

fn panel_of(rows: &[Row], (title, name, metrics): (String, String, Vec<String>), options: &CurveOptions) -> Curves {
    let models = models(rows);
    let mut curves: Vec<Curve> = Vec::new();
    for metric in &metrics {
        let slice = metric.rsplit_once('/').map_or("", |(slice, _)| slice);
        // A curve is named after what tells it apart from the others of its panel.
        let named = |label: String| match (metrics.len() > 1, models.len() > 1) {
            (false, _) => label,
            (true, false) => slice.to_owned(),
            (true, true) => format!("{label} {slice}"),
        };
        let mut groups: Vec<(String, Vec<&Row>)> = Vec::new();
        for (label, model) in &models {
            let of_model = rows.iter().filter(|row| row.model == *model && row.metric == *metric && row.step.is_some());
            let label = if options.mean_of_seeds { without_seed(label) } else { label };
            match groups.iter_mut().find(|(name, _)| name == label) {
                Some((_, group)) => group.extend(of_model),
                None => groups.push((label.to_owned(), of_model.collect())),
            }
        }
        let groups = groups.into_iter().filter(|(_, group)| !group.is_empty());
        curves.extend(groups.map(|(label, group)| Curve::new(named(label), points(&group))));
        for (label, model) in models.iter().filter(|_| options.published) {
            let figures = published(model).into_iter().filter(|figure| figure.metric == *metric);
            let points: Vec<Point> =
                figures.filter_map(|figure| Some(Point::new(figure.step? as f64, figure.value))).collect();
            if !points.is_empty() {
                curves.push(Curve { label: named(label.clone()), points, published: true });
            }
        }
    }
    let values = curves.iter().flat_map(|curve| &curve.points).map(|point| point.value);
    let (low, high) = values.fold((f64::INFINITY, 0f64), |(low, high), v| (low.min(v), high.max(v)));
    // A perplexity falls from millions to a few.
    let log = name.ends_with("perplexity") && low > 0.0 && high > 10.0 * low;
    Curves { title, y: with_unit(&name), log, curves, ..Curves::default() }
}

/// Figures over fewer documents, with more examples or of another type of weights are not points of one curve.
fn same_settings(rows: &[Row], metric: &str) -> Result<()> {
    let mut of_model: BTreeMap<&str, &Row> = BTreeMap::new();
    for row in rows.iter().filter(|row| row.metric == metric) {
        let first = *of_model.entry(&row.model).or_insert(row);
        let both = first.inputs.is_object() && row.inputs.is_object();
        let others =
            both && ["definition", "documents", "examples"].iter().any(|key| first.inputs[key] != row.inputs[key]);
        if others && first.settings == row.settings {
            return Err(Error::Results(format!(
                "{metric} of {} was measured on other documents at {} than at {}; measure again, or draw from a file for each",
                row.model, first.revision, row.revision
            )));
        }
        if first.settings != row.settings {
            return Err(Error::Results(format!(
                "{metric} of {} was measured in different ways: {} at {}, {} at {}; draw from a file for each",
                row.model, first.settings, first.revision, row.settings, row.revision
            )));
        }
    }
    Ok(())
}

/// A value for each step: the one there is, or the mean of several.
fn points(rows: &[&Row]) -> Vec<Point> {
    let mut steps: BTreeMap<u64, Vec<&Row>> = BTreeMap::new();
    for row in rows {
        steps.entry(row.step.unwrap_or(0)).or_default().push(row);
    }
    let point = |(step, rows): (u64, Vec<&Row>)| {
        let n = rows.len() as f64;
        let mean = rows.iter().map(|row| row.value).sum::<f64>() / n;
        let error = match rows[..] {
            [row] => row.stderr,
            _ => Some((rows.iter().map(|row| (row.value - mean).powi(2)).sum::<f64>() / (n - 1.0)).sqrt()),
        };
        Point { step: step as f64, value: mean, error }
    };
    steps.into_iter().map(point).collect()
}

/// A table of the last step of each model: a row for each, a column for each of `metrics` (all of them if there are none).
///
/// # Errors
/// As [`curves`].
pub fn table(rows: &[Row], wanted: &[String]) -> Result<Picture> {
    let metrics = metrics(rows, wanted)?;
    let mut lines = Vec::new();
    for (label, model) in models(rows) {
        let of_model = || rows.iter().filter(|row| row.model == model);
        // A final revision without a number comes after all that have one.
        let order = |row: &&Row| row.step.unwrap_or(u64::MAX);
        let Some(last) = of_model().max_by_key(order) else { continue };
        let figure = |metric: &String| {
            of_model()
                .find(|row| row.revision == last.revision && row.metric == *metric)
                .map_or("–".to_owned(), |row| figure(row.value, row.stderr))
        };
        let mut line = vec![label, last.revision.clone()];
        line.extend(metrics.iter().map(figure));
        lines.push(line);
    }
    let columns = ["model".into(), "revision".into()].into_iter().chain(metrics).collect();
    Ok(Picture::of_table(Table { title: String::new(), columns, rows: lines })?)
}

/// Four digits, and the standard error where there is one.
fn figure(value: f64, stderr: Option<f64>) -> String {
    let decimals = if value.abs() < 10.0 { 4 } else { 2 };
    match stderr {
        Some(stderr) => format!("{value:.decimals$} ± {stderr:.decimals$}"),
        None => format!("{value:.decimals$}"),
    }
}
