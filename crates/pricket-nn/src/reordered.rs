//! A store that reorders the rows of some tensors.

use std::collections::BTreeMap;
use std::sync::Arc;

use pricket_weights::{Bytes, Entry, Store};

use crate::{Error, Result, RowOrder};

/// Store that wraps another store and gives some tensors with their rows reordered, in the order of checkpoints on the
/// Hub.
pub struct Reordered {
    store: Arc<dyn Store>,
    orders: BTreeMap<String, RowOrder>,
}

impl std::fmt::Debug for Reordered {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reordered").field("orders", &self.orders).finish_non_exhaustive()
    }
}

impl Reordered {
    /// Wraps `store`. `order` returns the row order of a tensor by its name in `store`.
    ///
    /// # Errors
    /// Returns [`Error::Input`] if the rows of a tensor cannot be reordered.
    pub fn new(store: Arc<dyn Store>, order: impl Fn(&str) -> RowOrder) -> Result<Self> {
        let orders = store.names().into_iter().map(|name| (order(&name), name));
        let orders: BTreeMap<_, _> =
            orders.filter(|(order, _)| *order != RowOrder::AsStored).map(|(order, name)| (name, order)).collect();
        for (name, order) in &orders {
            let rows = store.entry(name).and_then(|entry| entry.shape.first().copied()).unwrap_or(0);
            let named = |e| Error::Input(format!("{}: tensor {name}: {e}", store.origin(name)));
            order.source_rows(rows, false).map_err(named)?;
        }
        Ok(Self { store, orders })
    }
}

impl Store for Reordered {
    fn names(&self) -> Vec<String> {
        self.store.names()
    }

    fn entry(&self, name: &str) -> Option<Entry> {
        self.store.entry(name)
    }

    fn expect(&self, name: &str, shape: &[usize]) -> Option<Entry> {
        self.store.expect(name, shape)
    }

    fn resolve<'a>(&'a self, name: &'a str) -> &'a str {
        self.store.resolve(name)
    }

    fn claims(&self, name: &str) -> bool {
        self.store.claims(name)
    }

    fn bytes(&self, name: &str) -> pricket_weights::Result<Bytes<'_>> {
        let bytes = self.store.bytes(name)?;
        let rows = self.entry(name).and_then(|entry| entry.shape.first().copied()).unwrap_or(0);
        // A row is a whole number of bytes in every type.
        match self.orders.get(name).and_then(|order| order.source_rows(rows, false).ok()) {
            Some(sources) if rows > 0 => {
                let row = bytes.len() / rows;
                let mut out = Vec::with_capacity(bytes.len());
                for from in sources {
                    out.extend_from_slice(&bytes[from * row..(from + 1) * row]);
                }
                Ok(out.into())
            }
            _ => Ok(bytes),
        }
    }

    fn origin(&self, name: &str) -> String {
        self.store.origin(name)
    }

    fn shapes_only(&self) -> bool {
        self.store.shapes_only()
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};
    use pricket_weights::{Dtype, Random, read_tensor};

    use super::*;

    #[test]
    fn rows_of_pairs_come_as_halves_and_go_back() {
        let file = Tensor::arange(0f32, 24.0, &Device::Cpu).unwrap().reshape((12, 2)).unwrap();
        let order = RowOrder::Pairs { heads: 2 };
        let memory = order.apply(&file).unwrap();
        let first: Vec<f32> = memory.narrow(1, 0, 1).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        assert_eq!(first, [0.0, 4.0, 8.0, 2.0, 6.0, 10.0, 12.0, 16.0, 20.0, 14.0, 18.0, 22.0]);
        let same = |a: &Tensor, b: &Tensor| a.to_vec2::<f32>().unwrap() == b.to_vec2::<f32>().unwrap();
        assert!(same(&order.undo(&memory).unwrap(), &file));
        let rows = Tensor::new(
            order.source_rows(12, false).unwrap().iter().map(|&x| x as u32).collect::<Vec<_>>(),
            &Device::Cpu,
        );
        assert!(same(&file.index_select(&rows.unwrap(), 0).unwrap(), &memory));
        assert!(RowOrder::Pairs { heads: 5 }.apply(&file).is_err());
    }

    #[test]
    fn a_store_gives_what_the_order_gives() {
        let store: Arc<dyn Store> = Arc::new(Random::new(Dtype::F16, 3));
        store.expect("q", &[12, 6]);
        let order = RowOrder::Pairs { heads: 2 };
        let reordered = Reordered::new(Arc::clone(&store), |name| if name == "q" { order } else { RowOrder::AsStored });
        let read = |store: &dyn Store| read_tensor(store, "q", &Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
        let (found, expected) = (read(&reordered.unwrap()), order.apply(&read(&*store)).unwrap());
        assert_eq!(found.to_vec2::<f32>().unwrap(), expected.to_vec2::<f32>().unwrap());
    }
}
