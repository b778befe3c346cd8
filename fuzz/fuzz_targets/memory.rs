//! Reads a weight file from memory, for the other targets.

use std::ops::Range;
use std::sync::Arc;

use pricket::weights::{Dtype, ReadAt, Result, Store};

pub struct Bytes(pub Vec<u8>);

impl ReadAt for Bytes {
    fn name(&self) -> String {
        "fuzzed".into()
    }

    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_at(&self, range: Range<u64>) -> Result<Vec<u8>> {
        Ok(self.0[range.start as usize..range.end as usize].to_vec())
    }
}

/// Opens `data` in the format of its first bytes and reads every tensor.
#[allow(dead_code)]
pub fn open(data: &[u8]) {
    if let Ok(store) = pricket::weights::open_remote(Arc::new(Bytes(data.to_vec()))) {
        read(&*store);
    }
}

/// Reads every tensor of a store.
pub fn read(store: &dyn Store) {
    for name in store.names() {
        let entry = store.entry(&name).expect("every name has an entry");
        // The element size of a type that pricket does not read is unknown.
        let known = !matches!(entry.dtype, Dtype::Other(_));
        if let Some(bytes) = store.bytes(&name).ok().filter(|_| known) {
            assert_eq!(bytes.len(), entry.bytes(), "{name}");
        }
        // A pickle can claim a tensor that is larger than its bytes. Large tensors are skipped to save memory.
        if entry.bytes() < 1 << 22 {
            let _ = pricket::weights::read_matrix(store, &name);
        }
    }
}
