//! Initial weights for training a model from scratch.

use pricket_nn::{Init, Initialization, Names};
use pricket_weights::{Bytes, Dtype, Entry, ShapesOnly, Store};

use crate::random::{normal, number_of, uniform};

/// A store of initial f32 weights, filled by a family's [`Initialization`].
///
/// It holds every tensor that is requested, in the requested shape. The same seed gives the same weights on every
/// machine.
#[derive(Debug)]
pub struct Untrained {
    shapes: ShapesOnly,
    scheme: Initialization,
    names: Names,
    seed: u64,
}

impl Untrained {
    /// Creates a store with this initialization for a family with these tensor names.
    pub fn new(scheme: Initialization, names: Names, seed: u64) -> Self {
        Self { shapes: ShapesOnly::new(Dtype::F32), scheme, names, seed }
    }
}

impl Store for Untrained {
    fn names(&self) -> Vec<String> {
        self.shapes.names()
    }

    fn entry(&self, name: &str) -> Option<Entry> {
        self.shapes.entry(name)
    }

    fn expect(&self, name: &str, shape: &[usize]) -> Option<Entry> {
        self.shapes.expect(name, shape)
    }

    fn bytes(&self, name: &str) -> pricket_weights::Result<Bytes<'_>> {
        let entry = self.entry(name).ok_or_else(|| self.missing(name))?;
        let (seed, count) = (number_of(name, self.seed), entry.elements());
        let values = match self.scheme.of(&self.names.canonical(name), &entry.shape) {
            Init::Constant(number) => vec![number as f32; count],
            Init::Normal { deviation } => normal(seed, count, deviation),
            Init::Uniform { low, high } => uniform(seed, count, low, high),
            Init::Power { offset, scale, power, span } => {
                along(&entry.shape, |i| offset + scale * (i as f64 / span).powf(power))
            }
            Init::Zigzag { offset, scale } => along(&entry.shape, |i| offset + scale * ((i + 1) % 3) as f64 - scale),
        };
        Ok(values.into_iter().flat_map(f32::to_le_bytes).collect::<Vec<u8>>().into())
    }

    fn origin(&self, _: &str) -> String {
        "untrained weights".into()
    }
}

/// Fills a tensor with values that depend on the index in the last dimension.
fn along(shape: &[usize], value: impl Fn(usize) -> f64) -> Vec<f32> {
    let (count, last) = (shape.iter().product::<usize>(), shape.last().copied().unwrap_or(1));
    (0..count).map(|i| value(i % last) as f32).collect()
}
