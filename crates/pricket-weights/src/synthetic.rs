//! Stores without bytes of their own: expected shapes, random weights, and the headers of another store.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex};

use crate::{Bytes, Dtype, Entry, Error, Result, Store};

/// A store that accepts every name with the expected shape, records both, and has no bytes.
///
/// Running the loading code of a model over this store counts its parameters or estimates its memory without a
/// checkpoint.
#[derive(Debug)]
pub struct ShapesOnly {
    dtype: Dtype,
    asked: Mutex<BTreeMap<String, Vec<usize>>>,
}

impl ShapesOnly {
    /// Creates a store whose tensors all have the type `dtype`.
    pub fn new(dtype: Dtype) -> Self {
        Self { dtype, asked: Mutex::default() }
    }

    /// Returns the number of elements of all tensors requested so far.
    pub fn elements(&self) -> u64 {
        let asked = self.asked.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        asked.values().map(|shape| shape.iter().map(|&n| n as u64).product::<u64>()).sum()
    }

    /// Returns the size of all tensors requested so far in bytes, in the type of the store.
    pub fn bytes_on_file(&self) -> u64 {
        self.dtype.bytes(self.elements() as usize) as u64
    }
}

impl Store for ShapesOnly {
    fn names(&self) -> Vec<String> {
        self.asked.lock().unwrap_or_else(std::sync::PoisonError::into_inner).keys().cloned().collect()
    }

    fn entry(&self, name: &str) -> Option<Entry> {
        let asked = self.asked.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        asked.get(name).map(|shape| Entry { shape: shape.clone(), dtype: self.dtype })
    }

    fn expect(&self, name: &str, shape: &[usize]) -> Option<Entry> {
        let mut asked = self.asked.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        asked.insert(name.into(), shape.into());
        Some(Entry { shape: shape.into(), dtype: self.dtype })
    }

    fn bytes(&self, name: &str) -> Result<Bytes<'_>> {
        Err(Error::Unsupported {
            path: self.origin(name).into(),
            what: format!("tensor {name} has a shape but no bytes in this store"),
        })
    }

    fn origin(&self, _: &str) -> String {
        "shapes only".into()
    }

    fn shapes_only(&self) -> bool {
        true
    }
}

/// A store of reproducible random weights of any expected shape, for measuring speed and memory without a checkpoint.
///
/// The weights of norms are 1. All others are approximately normal with standard deviation 0.02, from a seed and the
/// name of the tensor.
#[derive(Debug)]
pub struct Random {
    shapes: ShapesOnly,
    seed: u64,
}

impl Random {
    /// Creates a store of weights of the type `dtype` (F32, F16 or BF16). The same `seed` gives the same weights.
    pub fn new(dtype: Dtype, seed: u64) -> Self {
        Self { shapes: ShapesOnly::new(dtype), seed }
    }
}

impl Store for Random {
    fn names(&self) -> Vec<String> {
        self.shapes.names()
    }

    fn entry(&self, name: &str) -> Option<Entry> {
        self.shapes.entry(name)
    }

    fn expect(&self, name: &str, shape: &[usize]) -> Option<Entry> {
        self.shapes.expect(name, shape)
    }

    fn bytes(&self, name: &str) -> Result<Bytes<'_>> {
        let missing = || self.missing(name);
        let entry = self.entry(name).ok_or_else(missing)?;
        let mut hasher = DefaultHasher::new();
        (self.seed, name).hash(&mut hasher);
        let mut state = hasher.finish() | 1;
        let is_norm_weight = entry.shape.len() == 1 && name.ends_with("weight");
        let mut next = || {
            if is_norm_weight {
                return 1.0;
            }
            // xorshift64*. The sum of its four 16-bit parts is close enough to a normal distribution for a speed test.
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            let bits = state.wrapping_mul(0x2545_F491_4F6C_DD1D);
            let sum: u64 = (0..4).map(|i| (bits >> (16 * i)) & 0xffff).sum();
            (sum as f32 / 65535.0 - 2.0) * (0.02 * 3f32.sqrt())
        };
        let n = entry.elements();
        Ok(match entry.dtype {
            Dtype::F32 => (0..n).flat_map(|_| next().to_le_bytes()).collect::<Vec<u8>>(),
            Dtype::F16 => (0..n).flat_map(|_| half::f16::from_f32(next()).to_le_bytes()).collect(),
            Dtype::BF16 => (0..n).flat_map(|_| half::bf16::from_f32(next()).to_le_bytes()).collect(),
            other => {
                return Err(Error::Unsupported {
                    path: self.origin(name).into(),
                    what: format!("unsupported type {other} for random weights; expected F32, F16 or BF16"),
                });
            }
        }
        .into())
    }

    fn origin(&self, _: &str) -> String {
        "random weights".into()
    }
}

/// The names, shapes and types of another store.
///
/// Running the loading code of a model over this store checks every tensor and computes the memory before any weight is
/// read.
pub struct Headers(Arc<dyn Store>);

impl Headers {
    /// Creates a view of the headers of `store`.
    pub fn of(store: Arc<dyn Store>) -> Self {
        Self(store)
    }
}

impl Store for Headers {
    fn names(&self) -> Vec<String> {
        self.0.names()
    }

    fn entry(&self, name: &str) -> Option<Entry> {
        self.0.entry(name)
    }

    fn expect(&self, name: &str, shape: &[usize]) -> Option<Entry> {
        self.0.expect(name, shape)
    }

    fn resolve<'a>(&'a self, name: &'a str) -> &'a str {
        self.0.resolve(name)
    }

    fn claims(&self, name: &str) -> bool {
        self.0.claims(name)
    }

    fn bytes(&self, name: &str) -> Result<Bytes<'_>> {
        self.0.bytes(name)
    }

    fn origin(&self, name: &str) -> String {
        self.0.origin(name)
    }

    fn shapes_only(&self) -> bool {
        true
    }
}
