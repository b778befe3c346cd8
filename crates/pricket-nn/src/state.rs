//! The state of a model, the KV cache or recurrent state: one `RowState` for each row of a batch.
//!
//! A row holds one slot for each layer: the keys and values of its positions, or the tensors of a recurrence. Slots are
//! reference counted, so selecting, joining and forking rows copies no data. Writing to a shared slot copies it first.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use candle_core::{DType, Tensor};

use crate::ops::{self, NewKeys};
use crate::{Error, Result};

/// The capacity of a slot is a multiple of this number of positions.
const CHUNK: usize = 64;

/// Maximum number of marks of a row.
const MARKS: usize = 8;

/// Storage type of keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types, reason = "spelled as in ggml")]
pub enum CacheType {
    /// 32-bit float.
    F32,
    /// 16-bit float (IEEE half precision).
    F16,
    /// bfloat16.
    BF16,
    /// ggml's `q8_0`: 8-bit integers with an f16 scale for every 32 values of a head. CPU only.
    Q8_0,
}

impl CacheType {
    /// All cache types.
    pub const ALL: [Self; 4] = [Self::F32, Self::F16, Self::BF16, Self::Q8_0];

    /// Returns the cache type for `dtype`: f16 and bf16 for themselves, f32 for all others.
    pub fn of(dtype: DType) -> Self {
        match dtype {
            DType::F16 => Self::F16,
            DType::BF16 => Self::BF16,
            _ => Self::F32,
        }
    }

    /// Returns the name, as flags spell it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::Q8_0 => "q8_0",
        }
    }

    /// Returns the bytes of one key or value of width `head_dim`.
    pub const fn bytes(self, head_dim: usize) -> usize {
        match self {
            Self::F32 => 4 * head_dim,
            Self::F16 | Self::BF16 => 2 * head_dim,
            Self::Q8_0 => ops::q8_row_bytes(head_dim),
        }
    }

    /// Converts the keys and values of batch element `row`, `[b, kv_heads, t, head_dim]` each, to this type. Returns
    /// `[2, kv_heads, t, width]`, the layout of the state.
    ///
    /// # Errors
    /// Returns an error if the shapes do not match, or if the type is `q8_0` and the tensors are not f32 on the CPU.
    pub fn stored(self, k: &Tensor, v: &Tensor, row: usize) -> Result<Tensor> {
        let (_, heads, len, dim) = k.dims4()?;
        let dtype = self.storage();
        let kept = Tensor::zeros((2, heads, len, self.bytes(dim) / dtype.size_in_bytes()), dtype, k.device())?;
        ops::store(std::slice::from_ref(&kept), &[NewKeys { k, v, row, from: 0, len, at: 0 }])?;
        Ok(kept)
    }

    /// Returns the type of the tensor that stores the values; u8 for the bytes of `q8_0`.
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
        found.ok_or_else(|| Error::Input(format!("unknown cache type {name:?}; expected one of {names}")))
    }
}

impl std::fmt::Display for CacheType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// State of a model for a batch of rows: the KV cache, or the tensors of a recurrence.
///
/// It starts empty. The capacity of a row grows in multiples of 64 positions and does not depend on the context length
/// of the model.
///
/// ```
/// use pricket_nn::State;
/// let mut state = State::new();
/// state.add_rows(2);
/// let copy = state.fork();
/// state.select_rows(&[1])?;
/// state.extend(copy);
/// assert_eq!(state.rows(), 3);
/// # Ok::<(), pricket_nn::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct State {
    rows: Vec<RowState>,
    kind: Option<CacheType>,
}

/// State of one row.
#[derive(Clone, Debug, Default)]
pub(crate) struct RowState {
    len: usize,
    layers: Vec<Option<Arc<Slot>>>,
    marks: Vec<Mark>,
    /// Number of positions that the row is expected to reach at most.
    expected: Option<usize>,
}

/// State of one layer of a row.
#[derive(Debug)]
enum Slot {
    /// Keys and values, `[2, kv_heads, capacity, width]`.
    KeyValue(Tensor),
    /// Tensors of a recurrence, by name.
    Recurrent(BTreeMap<&'static str, Tensor>),
}

/// Copy of the recurrent slots of a row after `len` positions.
#[derive(Clone, Debug)]
struct Mark {
    len: usize,
    layers: Vec<Option<Arc<Slot>>>,
}

impl State {
    /// Returns a state without rows, which stores keys and values in their own type. The first pass adds the rows.
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns a state without rows, which stores keys and values as `kind`.
    pub fn with_type(kind: CacheType) -> Self {
        Self { rows: Vec::new(), kind: Some(kind) }
    }

    /// Returns the number of rows.
    pub fn rows(&self) -> usize {
        self.rows.len()
    }

    /// Returns the number of positions of `row` read so far; 0 for a row that does not exist.
    pub fn len(&self, row: usize) -> usize {
        self.rows.get(row).map_or(0, |row| row.len)
    }

    /// Returns whether no position of any row was read.
    pub fn is_empty(&self) -> bool {
        self.rows.iter().all(|row| row.len == 0)
    }

    /// Adds `count` empty rows.
    pub fn add_rows(&mut self, count: usize) {
        self.rows.resize(self.rows.len() + count, RowState::default());
    }

    /// Returns a second state with the same past. Data is copied only when one of the two is written.
    #[must_use]
    pub fn fork(&self) -> Self {
        self.clone()
    }

    /// Returns a state of one row with the same past as `row`. Data is copied only when one of the two is written. A
    /// row that does not exist gives an empty one.
    #[must_use]
    pub fn fork_row(&self, row: usize) -> Self {
        Self { rows: vec![self.rows.get(row).cloned().unwrap_or_default()], kind: self.kind }
    }

    /// Keeps the given rows, in that order. A row may repeat.
    ///
    /// # Errors
    /// Returns [`Error::Input`] if a row does not exist.
    pub fn select_rows(&mut self, rows: &[usize]) -> Result<()> {
        let count = self.rows.len();
        let missing = || Error::Input(format!("rows {rows:?} are not all in the state, which has {count} rows"));
        let selected = rows.iter().map(|&row| self.rows.get(row).cloned());
        self.rows = selected.collect::<Option<_>>().ok_or_else(missing)?;
        Ok(())
    }

    /// Appends the rows of `other`.
    pub fn extend(&mut self, other: Self) {
        self.rows.extend(other.rows);
    }

    /// Removes `row` and returns it as a state of one row. The rows after it move up by one. A row that does not exist
    /// gives an empty one.
    #[must_use]
    pub fn take_row(&mut self, row: usize) -> Self {
        let taken = if row < self.rows.len() { self.rows.remove(row) } else { RowState::default() };
        Self { rows: vec![taken], kind: self.kind }
    }

    /// Discards the positions of `row` from `len` on. Returns the number of positions kept.
    ///
    /// With a KV cache, `len` positions are kept, or all if there are fewer. A recurrent state returns to the last mark
    /// of [`State::mark`] at or before `len`; without one it returns to 0. The caller then has to read the positions up
    /// to `len` again.
    pub fn rewind(&mut self, row: usize, len: usize) -> usize {
        self.rows.get_mut(row).map_or(0, |row| row.rewind(len))
    }

    /// Saves the recurrent tensors of `row`, so that [`State::rewind`] can return to this position. The last eight
    /// marks are kept. A KV cache needs no marks, and calling this does nothing. Returns whether the mark is new.
    pub fn mark(&mut self, row: usize) -> bool {
        self.rows.get_mut(row).is_some_and(RowState::mark)
    }

    /// Removes the mark of `row` at the position `len`, if there is one.
    pub fn unmark(&mut self, row: usize, len: usize) {
        if let Some(row) = self.rows.get_mut(row) {
            row.marks.retain(|mark| mark.len != len);
        }
    }

    /// Returns whether `row` has recurrent tensors, so that it can only be rewound to marks.
    pub fn is_recurrent(&self, row: usize) -> bool {
        self.rows.get(row).is_some_and(RowState::is_recurrent)
    }

    /// Tells that `row` reaches at most `len` positions. Its capacity then does not grow further, unless it reaches
    /// more.
    pub fn expect(&mut self, row: usize, len: usize) {
        if let Some(row) = self.rows.get_mut(row) {
            row.expected = Some(len);
        }
    }

    /// Copies keys and values of `row` that are shared with another row, or that have room for more than `positions`
    /// positions, to tensors with room for `positions`. Without this, the first write copies them with all their room.
    ///
    /// # Errors
    /// Returns an error if a tensor operation fails.
    pub fn compact(&mut self, row: usize, positions: usize) -> Result<()> {
        self.rows.get_mut(row).map_or(Ok(()), |row| row.compact(positions))
    }

    /// Returns the bytes of keys, values and recurrent tensors. Data that rows share is counted once.
    pub fn bytes(&self) -> usize {
        let mut seen = BTreeSet::new();
        let slots = self.rows.iter().flat_map(|row| row.layers.iter().flatten());
        let marked = self.rows.iter().flat_map(|row| row.marks.iter().flat_map(|mark| mark.layers.iter().flatten()));
        let distinct = slots.chain(marked).filter(|slot| seen.insert(Arc::as_ptr(slot)));
        distinct.map(|slot| slot.tensors().map(|t| t.elem_count() * t.dtype().size_in_bytes()).sum::<usize>()).sum()
    }

    /// Keeps the first `count` rows.
    pub(crate) fn truncate_rows(&mut self, count: usize) {
        self.rows.truncate(count);
    }

    /// Replaces all rows by `count` empty ones.
    pub(crate) fn reset(&mut self, count: usize) {
        self.rows.clear();
        self.add_rows(count);
    }

    /// Returns the tensor with the keys and values of a row, with room for `new`. [`ops::store`] writes the new ones.
    pub(crate) fn slot_for(&mut self, row: usize, layer: usize, new: &NewKeys<'_>) -> Result<Tensor> {
        self.rows[row].slot_for(layer, new, self.kind)
    }

    /// Returns a tensor of the recurrence of a layer, by the name that the block gives it. Returns `None` if nothing of
    /// `row` was read or the layer has a KV cache.
    pub fn recurrent(&self, row: usize, layer: usize, name: &'static str) -> Option<&Tensor> {
        match self.rows.get(row)?.layers.get(layer)?.as_deref()? {
            Slot::Recurrent(tensors) => tensors.get(name),
            Slot::KeyValue(_) => None,
        }
    }

    /// Sets the number of positions of `row` read so far.
    pub(crate) fn commit(&mut self, row: usize, len: usize) {
        self.rows[row].len = len;
    }

    /// Sets a tensor of the recurrence of a layer.
    pub(crate) fn set_recurrent(&mut self, row: usize, layer: usize, name: &'static str, tensor: Tensor) {
        let slot = self.rows[row].slot(layer);
        let mut tensors = match slot.as_deref() {
            Some(Slot::Recurrent(tensors)) => tensors.clone(),
            _ => BTreeMap::new(),
        };
        tensors.insert(name, tensor);
        *slot = Some(Arc::new(Slot::Recurrent(tensors)));
    }
}

impl Slot {
    fn tensors(&self) -> Box<dyn Iterator<Item = &Tensor> + '_> {
        match self {
            Slot::KeyValue(tensor) => Box::new(std::iter::once(tensor)),
            Slot::Recurrent(tensors) => Box::new(tensors.values()),
        }
    }
}

impl RowState {
    fn slot(&mut self, layer: usize) -> &mut Option<Arc<Slot>> {
        if self.layers.len() <= layer {
            self.layers.resize(layer + 1, None);
        }
        &mut self.layers[layer]
    }

    fn is_recurrent(&self) -> bool {
        self.layers.iter().flatten().any(|slot| matches!(**slot, Slot::Recurrent(_)))
    }

    fn mark(&mut self) -> bool {
        let is_known = self.marks.iter().any(|mark| mark.len == self.len);
        self.marks.retain(|mark| mark.len < self.len);
        if self.is_recurrent() {
            let recurrent = |slot: &Option<Arc<Slot>>| slot.clone().filter(|slot| matches!(**slot, Slot::Recurrent(_)));
            // The oldest mark is dropped first.
            if self.marks.len() >= MARKS {
                self.marks.remove(0);
            }
            self.marks.push(Mark { len: self.len, layers: self.layers.iter().map(recurrent).collect() });
        }
        self.is_recurrent() && !is_known
    }

    fn compact(&mut self, positions: usize) -> Result<()> {
        let (len, room) = (self.len, positions.max(self.len).next_multiple_of(CHUNK));
        for slot in &mut self.layers {
            let Some(Slot::KeyValue(held)) = slot.as_deref() else { continue };
            let (parts, heads, capacity, width) = held.dims4()?;
            if capacity <= room && slot.as_mut().and_then(Arc::get_mut).is_some() {
                continue;
            }
            let Some(Slot::KeyValue(held)) = slot.as_deref() else { continue };
            let kept = Tensor::zeros((parts, heads, room, width), held.dtype(), held.device())?;
            if len > 0 {
                kept.slice_set(&held.narrow(2, 0, len)?.contiguous()?, 2, 0)?;
            }
            *slot = Some(Arc::new(Slot::KeyValue(kept)));
        }
        Ok(())
    }

    fn rewind(&mut self, len: usize) -> usize {
        if len >= self.len {
            return self.len;
        }
        self.marks.retain(|mark| mark.len <= len);
        if self.is_recurrent() {
            let (kept, layers) = self.marks.last().map_or((0, &[][..]), |mark| (mark.len, &mark.layers));
            for (layer, slot) in self.layers.iter_mut().enumerate() {
                if slot.as_deref().is_some_and(|slot| matches!(slot, Slot::Recurrent(_))) {
                    *slot = layers.get(layer).cloned().flatten();
                }
            }
            self.len = kept;
        } else {
            self.len = len;
        }
        self.len
    }

    fn slot_for(&mut self, layer: usize, new: &NewKeys<'_>, kind: Option<CacheType>) -> Result<Tensor> {
        let (_, heads, _, dim) = new.k.dims4()?;
        let (past, end) = (new.at, new.at + new.len);
        let expected = self.expected.unwrap_or(usize::MAX).max(end).checked_next_multiple_of(CHUNK);
        let slot = self.slot(layer);
        let held = match slot.as_deref() {
            Some(Slot::KeyValue(held)) => Some((held.dims4()?, held.dtype())),
            _ => None,
        };
        // A row with a past keeps its type, even after it moved to a state with another type.
        let stored = match (held, kind) {
            (Some((_, dtype)), _) if past > 0 => dtype,
            (_, Some(kind)) => kind.storage(),
            (_, None) => new.k.dtype(),
        };
        let width = if stored == DType::U8 { CacheType::Q8_0.bytes(dim) } else { dim };
        let held = held.filter(|(_, dtype)| *dtype == stored).map(|(dims, _)| dims);
        let capacity = match held {
            Some((_, h, capacity, w)) if (h, w) == (heads, width) => capacity,
            _ if past == 0 => 0,
            Some((_, h, _, w)) => {
                let what =
                    format!("the state holds {h} heads of width {w}, but the input has {heads} heads of width {width}");
                return Err(Error::Input(what));
            }
            None => {
                let what = format!("layer {layer} has no past, but the input starts at position {past}");
                return Err(Error::Input(what));
            }
        };
        if capacity < end || slot.as_mut().and_then(Arc::get_mut).is_none() {
            // The slot is too small or shared with another row: copies the past to a new slot, by half larger if it has
            // to grow.
            let grown = if capacity >= end { end } else { end.max(capacity + capacity / 2) };
            let room = grown.next_multiple_of(CHUNK).min(expected.unwrap_or(usize::MAX));
            let grown = Tensor::zeros((2, heads, room, width), stored, new.k.device())?;
            if let Some(Slot::KeyValue(old)) = slot.as_deref()
                && past > 0
            {
                grown.slice_set(&old.narrow(2, 0, past)?.contiguous()?, 2, 0)?;
            }
            *slot = Some(Arc::new(Slot::KeyValue(grown)));
        }
        let Some(Slot::KeyValue(kept)) = slot.as_deref() else {
            return Err(Error::Input(format!("layer {layer} has no keys and values in the state")));
        };
        Ok(kept.clone())
    }
}
