use std::sync::Arc;

use candle_core::{DType, Tensor};

use crate::{Error, Result, ops};

/// Positions are reserved in multiples of this.
const CHUNK: usize = 64;

/// How keys and values are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types, reason = "the field's own spelling")]
pub enum CacheType {
    /// 32-bit float.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    BF16,
    /// ggml's `q8_0`: 8 bits and a scale in f16 for every 32 of a head. On the CPU only.
    Q8_0,
}

impl CacheType {
    /// Every one of them.
    pub const ALL: [Self; 4] = [Self::F32, Self::F16, Self::BF16, Self::Q8_0];

    /// The one that keeps `dtype` as it is; f32 for what no cache holds.
    pub fn of(dtype: DType) -> Self {
        match dtype {
            DType::F16 => Self::F16,
            DType::BF16 => Self::BF16,
            _ => Self::F32,
        }
    }

    /// Its name, as flags spell it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::Q8_0 => "q8_0",
        }
    }

    /// Bytes that a key or a value of `head_dim` takes.
    pub const fn bytes(self, head_dim: usize) -> usize {
        match self {
            Self::F32 => 4 * head_dim,
            Self::F16 | Self::BF16 => 2 * head_dim,
            Self::Q8_0 => ops::q8_row_bytes(head_dim),
        }
    }

    /// The type of the storage.
    fn storage(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::BF16 => DType::BF16,
            Self::Q8_0 => DType::U8,
        }
    }
}

impl std::str::FromStr for CacheType {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let names = Self::ALL.map(Self::name).join(", ");
        let found = Self::ALL.into_iter().find(|kind| kind.name() == name);
        found.ok_or_else(|| Error::Input(format!("{name:?} is no type of a cache; use {names}")))
    }
}

impl std::fmt::Display for CacheType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Keys and values of past positions, one slot a layer, grown as it fills and never sized by the model's limit.
///
/// Cloning ([`Cache::fork`]) shares the past; whoever writes first copies the slot it writes to.
///
/// Storage is `[batch, kv_heads, capacity, head_dim]` as [`CacheType`] says, and attention reads it as it is.
#[derive(Clone, Debug)]
pub struct Cache {
    slots: Vec<Option<Arc<Slot>>>,
    len: usize,
    kind: Option<CacheType>,
}

#[derive(Debug)]
struct Slot {
    k: Tensor,
    v: Tensor,
}

impl Default for Cache {
    fn default() -> Self {
        Self::new()
    }
}

impl Cache {
    /// An empty cache that stores what it is given, in the type it is given.
    pub fn new() -> Self {
        Self { slots: Vec::new(), len: 0, kind: None }
    }

    /// An empty cache that stores keys and values as `kind`.
    pub fn with_type(kind: CacheType) -> Self {
        Self { slots: Vec::new(), len: 0, kind: Some(kind) }
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no position is held.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Forgets positions from `len` on. Does nothing if there are fewer.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// A second cache with the same past, at no cost until one of them is written.
    #[must_use]
    pub fn fork(&self) -> Self {
        self.clone()
    }

    /// Keeps the batch rows `rows`, in that order (rows may repeat).
    ///
    /// # Errors
    /// If a row is not there.
    pub fn select_rows(&mut self, rows: &[u32]) -> Result<()> {
        for slot in self.slots.iter_mut().flatten() {
            let index = Tensor::new(rows, slot.k.device())?;
            *slot = Arc::new(Slot { k: slot.k.index_select(&index, 0)?, v: slot.v.index_select(&index, 0)? });
        }
        Ok(())
    }

    /// Bytes that the storage takes.
    pub fn bytes(&self) -> usize {
        let size = |t: &Tensor| t.elem_count() * t.dtype().size_in_bytes();
        self.slots.iter().flatten().map(|slot| size(&slot.k) + size(&slot.v)).sum()
    }

    pub(crate) fn set_len(&mut self, len: usize) {
        self.len = len;
    }

    /// Writes `k` and `v` of `[batch, kv_heads, t, head_dim]` at positions `[at, at + t)` of `layer`; gives all
    /// positions up to there, as they are stored (those with a gradient as they are).
    pub(crate) fn append(&mut self, layer: usize, at: usize, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let dtype = k.dtype();
        let (batch, heads, t, dim) = k.dims4()?;
        let end = at + t;
        let stored = self.kind.map_or(dtype, CacheType::storage);
        let width = self.kind.map_or(dim, |kind| kind.bytes(dim) / stored.size_in_bytes());
        if self.slots.len() <= layer {
            self.slots.resize(layer + 1, None);
        }
        let slot = &mut self.slots[layer];
        let found = slot.as_ref().map(|old| old.k.dims4()).transpose()?;
        match found {
            Some((b, h, _, w)) if (b, h, w) == (batch, heads, width) => {}
            // Nothing is held: another batch may begin.
            _ if at == 0 => *slot = None,
            Some((b, h, _, w)) => {
                return Err(Error::Input(format!(
                    "the cache holds {b} rows of {h} heads of {w}, the input has {batch} rows of {heads} heads of {width}"
                )));
            }
            None => {
                return Err(Error::Input(format!("layer {layer} has no past, and the input starts at position {at}")));
            }
        }
        let fits = slot.as_ref().is_some_and(|slot| slot.k.dims()[2] >= end);
        if !fits || Arc::get_mut(slot.as_mut().expect("fits")).is_none() {
            // Grown by half, or shared with a fork: the past is copied into storage of our own.
            let held = slot.as_ref().map_or(0, |slot| slot.k.dims()[2]);
            let capacity = if fits { held } else { end.max(held + held / 2).next_multiple_of(CHUNK) };
            let grow = |old: Option<&Tensor>| -> Result<Tensor> {
                let new = Tensor::zeros((batch, heads, capacity, width), stored, k.device())?;
                if let Some(old) = old.filter(|_| at > 0) {
                    new.slice_set(&old.narrow(2, 0, at)?.contiguous()?, 2, 0)?;
                }
                Ok(new)
            };
            let new = Slot { k: grow(slot.as_ref().map(|s| &s.k))?, v: grow(slot.as_ref().map(|s| &s.v))? };
            *slot = Some(Arc::new(new));
        }
        let slot = slot.as_ref().expect("just made");
        let put = |past: &Tensor, new: &Tensor| -> Result<Tensor> {
            ops::store(past, new, at)?;
            if new.track_op() {
                // Written storage has no gradient: the new positions are appended to the past as they are.
                let new = new.contiguous()?;
                return Ok(if at == 0 {
                    new
                } else {
                    Tensor::cat(&[&ops::widened(&past.narrow(2, 0, at)?, dim, dtype)?, &new], 2)?
                });
            }
            Ok(past.narrow(2, 0, end)?)
        };
        Ok((put(&slot.k, k)?, put(&slot.v, v)?))
    }
}
