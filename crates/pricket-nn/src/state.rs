//! The state of a model over the tokens that it has read: one `RowState` for each row of a batch.
//!
//! A row holds a slot for each layer: keys and values of its positions, or the tensors of a recurrence. Slots are shared by
//! reference, so selecting, joining and forking rows copies nothing; who writes to a shared slot copies it first.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use candle_core::{DType, Tensor};

use crate::ops::{self, NewKeys};
use crate::{Error, Result};

/// Positions are reserved in multiples of this.
const CHUNK: usize = 64;

/// Marks that a row keeps.
const MARKS: usize = 8;

/// The type in which keys and values are kept.
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

    /// A row's keys and values, `[b, kv_heads, t, head_dim]` each, as a state of this type keeps them: `[2, kv_heads, t, width]`.
    ///
    /// # Errors
    /// If the shapes do not fit, or for `q8_0` elsewhere than on the CPU.
    pub fn stored(self, k: &Tensor, v: &Tensor, row: usize) -> Result<Tensor> {
        let (_, heads, len, dim) = k.dims4()?;
        let dtype = self.storage();
        let kept = Tensor::zeros((2, heads, len, self.bytes(dim) / dtype.size_in_bytes()), dtype, k.device())?;
        ops::store(std::slice::from_ref(&kept), &[NewKeys { k, v, row, from: 0, len, at: 0 }])?;
        Ok(kept)
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
        found.ok_or_else(|| Error::Input(format!("{name:?} is not a cache type; use {names}")))
    }
}

impl std::fmt::Display for CacheType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// The state of a model over the tokens that it has read: keys and values, or the tensors of a recurrence, for each row. It starts
/// empty and grows in steps of 64 positions; its size does not depend on the model's limit.
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

/// The state of one row.
#[derive(Clone, Debug, Default)]
pub(crate) struct RowState {
    len: usize,
    layers: Vec<Option<Arc<Slot>>>,
    marks: Vec<Mark>,
}

/// The state of one layer of a row.
#[derive(Debug)]
enum Slot {
    /// Keys and values, `[2, kv_heads, capacity, width]`.
    KeyValue(Tensor),
    /// The tensors of a recurrence, by name.
    Recurrent(BTreeMap<&'static str, Tensor>),
}

/// The recurrent slots of a row as they were at a length.
#[derive(Clone, Debug)]
struct Mark {
    len: usize,
    layers: Vec<Option<Arc<Slot>>>,
}

impl State {
    /// A state without rows that keeps keys and values in the type in which it is given them. The first pass adds its rows.
    pub fn new() -> Self {
        Self::default()
    }

    /// A state without rows that keeps keys and values as `kind`.
    pub fn with_type(kind: CacheType) -> Self {
        Self { rows: Vec::new(), kind: Some(kind) }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows.len()
    }

    /// Positions that were read of `row`; 0 for a row that is not there.
    pub fn len(&self, row: usize) -> usize {
        self.rows.get(row).map_or(0, |row| row.len)
    }

    /// Whether no position was read of any row.
    pub fn is_empty(&self) -> bool {
        self.rows.iter().all(|row| row.len == 0)
    }

    /// Adds `count` rows of which nothing was read.
    pub fn add_rows(&mut self, count: usize) {
        self.rows.resize(self.rows.len() + count, RowState::default());
    }

    /// A second state with the same past. It costs nothing until one of the two is written.
    #[must_use]
    pub fn fork(&self) -> Self {
        self.clone()
    }

    /// Keeps the rows `rows`, in that order. A row may repeat.
    ///
    /// # Errors
    /// [`Error::Input`] for a row that is not there.
    pub fn select_rows(&mut self, rows: &[usize]) -> Result<()> {
        let count = self.rows.len();
        let missing = || Error::Input(format!("rows {rows:?} of a state of {count} rows"));
        let selected = rows.iter().map(|&row| self.rows.get(row).cloned());
        self.rows = selected.collect::<Option<_>>().ok_or_else(missing)?;
        Ok(())
    }

    /// Adds the rows of `other` behind these.
    pub fn extend(&mut self, other: Self) {
        self.rows.extend(other.rows);
    }

    /// Takes `row` out: a state of one row. Rows behind it move up. A row that is not there is an empty one.
    #[must_use]
    pub fn take_row(&mut self, row: usize) -> Self {
        let taken = if row < self.rows.len() { self.rows.remove(row) } else { RowState::default() };
        Self { rows: vec![taken], kind: self.kind }
    }

    /// Forgets what was read of `row` from position `len` on. Returns the number of positions that are kept: `len`, or all
    /// if there are fewer; for a recurrent model the last position that [`State::mark`] has saved up to there. The caller
    /// reads the rest again.
    pub fn rewind(&mut self, row: usize, len: usize) -> usize {
        self.rows.get_mut(row).map_or(0, |row| row.rewind(len))
    }

    /// Saves `row` as it is now, for [`State::rewind`] to return to; the last eight marks are kept. Keys and values need no mark,
    /// and cost none.
    pub fn mark(&mut self, row: usize) {
        if let Some(row) = self.rows.get_mut(row) {
            row.mark();
        }
    }

    /// Bytes that keys, values and recurrent tensors take; what rows share counts once.
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

    /// Starts anew with `count` rows.
    pub(crate) fn reset(&mut self, count: usize) {
        self.rows.clear();
        self.add_rows(count);
    }

    /// The tensor that holds a row's keys and values, with room for new ones, which [`ops::store`] writes.
    pub(crate) fn slot_for(&mut self, row: usize, layer: usize, new: &NewKeys<'_>) -> Result<Tensor> {
        self.rows[row].slot_for(layer, new, self.kind)
    }

    /// A tensor of a layer's recurrence, by the name that its block gives it; `None` if nothing was read of `row`, and for keys and
    /// values.
    pub fn recurrent(&self, row: usize, layer: usize, name: &'static str) -> Option<&Tensor> {
        match self.rows.get(row)?.layers.get(layer)?.as_deref()? {
            Slot::Recurrent(tensors) => tensors.get(name),
            Slot::KeyValue(_) => None,
        }
    }

    /// The positions of a pass were read.
    pub(crate) fn commit(&mut self, row: usize, len: usize) {
        self.rows[row].len = len;
    }

    /// Replaces a tensor of a layer's recurrence.
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

    fn mark(&mut self) {
        self.marks.retain(|mark| mark.len < self.len);
        if self.is_recurrent() {
            let recurrent = |slot: &Option<Arc<Slot>>| slot.clone().filter(|slot| matches!(**slot, Slot::Recurrent(_)));
            // The oldest goes where there is no more room.
            if self.marks.len() >= MARKS {
                self.marks.remove(0);
            }
            self.marks.push(Mark { len: self.len, layers: self.layers.iter().map(recurrent).collect() });
        }
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
        let slot = self.slot(layer);
        let held = match slot.as_deref() {
            Some(Slot::KeyValue(held)) => Some((held.dims4()?, held.dtype())),
            _ => None,
        };
        // What was kept in one type goes on in it, whatever state the row is in.
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
                let what = format!("the state holds {h} heads of {w}, the input has {heads} heads of {width}");
                return Err(Error::Input(what));
            }
            None => {
                let what = format!("layer {layer} has no past, and the input starts at position {past}");
                return Err(Error::Input(what));
            }
        };
        if capacity < end || slot.as_mut().and_then(Arc::get_mut).is_none() {
            // Grown by half, or shared with another row: the past is copied to a slot of this row's own.
            let room =
                if capacity >= end { capacity } else { end.max(capacity + capacity / 2).next_multiple_of(CHUNK) };
            let grown = Tensor::zeros((2, heads, room, width), stored, new.k.device())?;
            if let Some(Slot::KeyValue(old)) = slot.as_deref()
                && past > 0
            {
                grown.slice_set(&old.narrow(2, 0, past)?.contiguous()?, 2, 0)?;
            }
            *slot = Some(Arc::new(Slot::KeyValue(grown)));
        }
        let Some(Slot::KeyValue(kept)) = slot.as_deref() else {
            return Err(Error::Input(format!("layer {layer} keeps no keys and values")));
        };
        Ok(kept.clone())
    }
}
