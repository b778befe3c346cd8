//! Rows of result files, and the tables and curves drawn from them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;

use serde_json::Value;

use crate::suites::published::published;
use crate::sweep::results;
use crate::{Error, Result};
use pricket_plots::{Curve, Curves, Layout, Picture, Point, Table};

/// A value of a checkpoint, as written by [`crate::Sweep`].
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Repository or directory of the model.
    pub model: String,
    /// Revision of the checkpoint.
    pub revision: String,
    /// Training step.
    pub step: Option<u64>,
    /// Name of the metric, `TASK/METRIC`.
    pub metric: String,
    /// Value of the metric; `NaN` if it is not a finite number.
    pub value: f64,
    /// Standard error of the value.
    pub stderr: Option<f64>,
    /// Settings of the measurement.
    pub settings: Value,
    /// Hashes of the inputs; `null` in rows of earlier versions.
    pub inputs: Value,
}

/// Reads and combines result files, which may be compressed. If a metric of a checkpoint was measured several times,
/// the last row counts. Rows of failed checkpoints and of incomplete measures are skipped.
///
/// # Errors
/// Returns [`Error::Io`] if a file cannot be read, and [`Error::Malformed`] if a line is not a row of a sweep.
pub fn read_rows(paths: &[impl AsRef<Path>]) -> Result<Vec<Row>> {
    let mut rows: Vec<Row> = Vec::new();
    let mut places: BTreeMap<(String, String, String), usize> = BTreeMap::new();
    // The last batch of rows of each measure of a checkpoint. Slices that only an earlier batch has are dropped.
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
                    what: format!("not a row of a sweep: {key:?} is missing"),
                };
                row[key].as_str().map(str::to_owned).ok_or_else(missing)
            };
            let row = Row {
                model: text("model")?,
                revision: text("revision")?,
                step: row["step"].as_u64(),
                metric: text("metric")?,
                // JSON has no NaN; such values are written as null.
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

/// Returns `rows` as CSV with the columns `model,revision,step,metric,value,stderr`. Unknown and non-finite values are
/// empty. `wanted` names the metrics to include; if it is empty, all are included.
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
/// Returns [`Error::Results`] if there are no rows, or none with a metric in `wanted`.
pub fn csv(rows: &[Row], wanted: &[String]) -> Result<String> {
    let metrics = metrics(rows, wanted)?;
    // Quoting according to RFC 4180.
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

/// Returns the metrics in `wanted`, in its order; if it is empty, all metrics of `rows`.
fn metrics(rows: &[Row], wanted: &[String]) -> Result<Vec<String>> {
    let mut there: Vec<String> = Vec::new();
    for row in rows {
        if !there.contains(&row.metric) {
            there.push(row.metric.clone());
        }
    }
    if there.is_empty() {
        return Err(Error::Results("the results contain no values".into()));
    }
    if let Some(missing) = wanted.iter().find(|wanted| !there.contains(wanted)) {
        return Err(Error::Results(format!("no row has the metric {missing:?}; the metrics are {}", there.join(", "))));
    }
    Ok(if wanted.is_empty() { there } else { wanted.to_vec() })
}

/// Returns pairs of label and model, in order of appearance. Labels are the shortest distinct names: the last path
/// component if it is unique.
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

/// Removes the seed from the name of a run: `pythia-160m-seed3` becomes `pythia-160m`.
fn without_seed(label: &str) -> &str {
    label.rsplit_once("-seed").filter(|(_, seed)| seed.parse::<u64>().is_ok()).map_or(label, |(suite, _)| suite)
}

/// Options of [`curves`].
#[derive(Clone, Debug)]
pub struct CurveOptions {
    /// Whether runs that differ only in their seed are drawn as one curve: their mean, with a band of one standard
    /// deviation. False by default.
    pub mean_of_seeds: bool,
    /// Whether published scores of the models are drawn too; true by default.
    pub published: bool,
    /// Whether slices or tasks with the same metric share a panel. False by default: one panel each.
    pub together: bool,
    /// Layout of the panels.
    pub layout: Layout,
}

impl Default for CurveOptions {
    fn default() -> Self {
        Self { mean_of_seeds: false, published: true, together: false, layout: Layout::default() }
    }
}

/// Returns the name of a metric with its unit.
fn with_unit(metric: &str) -> String {
    match metric {
        "loss" => "loss (nats per token)".into(),
        "bits_per_byte" => "bits per byte".into(),
        other => other.replace('_', " "),
    }
}

/// Draws curves over training, with one panel for each metric in `wanted` (all metrics if it is empty). Bands show one
/// standard error in each direction.
///
/// If `wanted` is empty, metrics without a finite value are left out. Models without training steps have no curve; see
/// [`table`].
///
/// # Errors
/// Returns [`Error::Results`] if a metric in `wanted` does not occur, if no value is finite, or if rows of one curve
/// were measured with different settings. Returns [`Error::Picture`] if a metric in `wanted` has nothing to draw.
pub fn curves(rows: &[Row], wanted: &[String], options: &CurveOptions) -> Result<Picture> {
    let metrics = metrics(rows, wanted)?;
    metrics.iter().try_for_each(|metric| same_settings(rows, metric))?;
    if rows.iter().all(|row| row.step.is_none()) {
        return Err(Error::Results("no row has a training step, which curves require; draw a table instead".into()));
    }
    // Title of a panel, short name of its metric, and full names of its metrics.
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
        // The label contains only what distinguishes the curve from others of its panel.
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
    // Perplexity falls from millions to a few, so its axis is logarithmic.
    let log = name.ends_with("perplexity") && low > 0.0 && high > 10.0 * low;
    Curves { title, y: with_unit(&name), log, curves, ..Curves::default() }
}

/// Returns an error if the values of a curve have different settings, such as the number of documents, the number of
/// examples or the type of the weights.
fn same_settings(rows: &[Row], metric: &str) -> Result<()> {
    let mut of_model: BTreeMap<&str, &Row> = BTreeMap::new();
    for row in rows.iter().filter(|row| row.metric == metric) {
        let first = *of_model.entry(&row.model).or_insert(row);
        let both = first.inputs.is_object() && row.inputs.is_object();
        let others =
            both && ["definition", "documents", "examples"].iter().any(|key| first.inputs[key] != row.inputs[key]);
        if others && first.settings == row.settings {
            return Err(Error::Results(format!(
                "{metric} of {} was measured on different documents at {} and {}; measure again, or draw each from its own file",
                row.model, first.revision, row.revision
            )));
        }
        if first.settings != row.settings {
            return Err(Error::Results(format!(
                "{metric} of {} was measured with different settings: {} at {}, {} at {}; draw each from its own file",
                row.model, first.settings, first.revision, row.settings, row.revision
            )));
        }
    }
    Ok(())
}

/// Returns one point per training step: the value, or the mean of several values.
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

/// Draws a table of the last training step of each model: one row per model, one column per metric in `wanted` (all
/// metrics if it is empty).
///
/// # Errors
/// Returns [`Error::Results`] if a metric in `wanted` does not occur, and [`Error::Picture`] if the table cannot be
/// drawn.
pub fn table(rows: &[Row], wanted: &[String]) -> Result<Picture> {
    let metrics = metrics(rows, wanted)?;
    let mut lines = Vec::new();
    for (label, model) in models(rows) {
        let of_model = || rows.iter().filter(|row| row.model == model);
        // A revision without a number, such as main, sorts last.
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

/// Formats a value with 2 or 4 decimals, and its standard error if known.
fn figure(value: f64, stderr: Option<f64>) -> String {
    let decimals = if value.abs() < 10.0 { 4 } else { 2 };
    match stderr {
        Some(stderr) => format!("{value:.decimals$} ± {stderr:.decimals$}"),
        None => format!("{value:.decimals$}"),
    }
}
