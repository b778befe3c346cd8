//! Configurations of published model sizes (models/shapes.toml).

use std::sync::OnceLock;

use serde_json::{Map, Value};

/// Returns all names and configurations, in the order of the file.
fn shapes() -> &'static [(String, Value)] {
    static SHAPES: OnceLock<Vec<(String, Value)>> = OnceLock::new();
    SHAPES.get_or_init(|| {
        // The file is compiled in, and a test checks it.
        let text = include_str!("../../../../models/shapes.toml");
        let file: Value = toml::from_str(text).unwrap_or_else(|e| panic!("models/shapes.toml: {e}"));
        file["suite"].as_array().into_iter().flatten().flat_map(suite).collect()
    })
}

/// Returns the configurations of a suite: its common keys, overridden by the keys of each shape.
fn suite(suite: &Value) -> Vec<(String, Value)> {
    let mut common: Map<String, Value> = suite.as_object().cloned().unwrap_or_default();
    let shapes = common.remove("shapes");
    let shapes = shapes.as_ref().and_then(Value::as_array).into_iter().flatten();
    let shape = |shape: &Value| {
        let mut own = shape.as_object().cloned().unwrap_or_default();
        let name = own.remove("name")?.as_str()?.to_owned();
        let mut config = common.clone();
        config.extend(own);
        Some((name, Value::Object(config)))
    };
    shapes.filter_map(shape).collect()
}

/// Returns the names that [`published_config`] knows.
pub fn published_shapes() -> impl Iterator<Item = &'static str> {
    shapes().iter().map(|(name, _)| name.as_str())
}

/// Returns the config.json of a published model size, such as `1.4b` (Pythia), `neox-20b`, `incite-3b` or `mpt-7b`. Use
/// it for memory estimates and for benchmarks with random weights.
///
/// ```
/// let config = pricket::suites::published_config("12b").unwrap();
/// let estimate = pricket::loading::estimate(&config, pricket::loading::Dtype::F16, 2048)?;
/// assert_eq!(estimate.info.parameters, 11_846_072_320);
/// # Ok::<(), pricket::Error>(())
/// ```
pub fn published_config(name: &str) -> Option<Value> {
    shapes().iter().find(|(known, _)| known == name).map(|(_, config)| config.clone())
}
