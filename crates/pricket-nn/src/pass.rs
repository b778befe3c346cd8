//! One forward pass: the spans that it reads, and tensors that depend only on them.
//!
//! A pass reads new positions of some rows. If every row has the same number of them, tensors are `[batch, time, ..]`.
//! Otherwise the rows are packed one after the other, and tensors are `[1, sum of lengths, ..]`. A [`Span`] gives the
//! positions of a row. Learned positions, rotary angles, attention and recurrences use the spans; all other operations
//! treat positions independently.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, DeviceLocation, Tensor};

use crate::{Error, Result, Rotary, State, ops};

/// New positions of a row: `past` up to, but not including, `past + len`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Index of the row in the state.
    pub row: usize,
    /// Number of positions of the row read so far.
    pub past: usize,
    /// Number of new positions.
    pub len: usize,
}

impl Span {
    /// Returns the range of the new positions.
    pub fn positions(self) -> std::ops::Range<usize> {
        self.past..self.past + self.len
    }
}

/// Place of a span in the tensors of a pass: index in the batch and first index along time.
pub(crate) type Place = (usize, usize);

/// A started pass. Its spans do not change.
#[derive(Clone, Debug)]
pub(crate) struct Pass {
    spans: Arc<[Span]>,
    /// Shape of the ids, `[batch, time]`.
    shape: (usize, usize),
    is_packed: bool,
    pub(crate) layer: usize,
    /// Whether the positions were added to the state.
    pub(crate) is_committed: bool,
    /// Number of rows of the state before this pass added any.
    pub(crate) rows_before: usize,
    /// New recurrent tensors by layer, row and name. Committing the pass moves them to the state.
    pub(crate) recurrent: BTreeMap<(usize, usize, &'static str), Tensor>,
    angles: Vec<Angles>,
    biases: Vec<Bias>,
    shifts: Option<(DeviceLocation, Tensor)>,
}

/// Cached cosines and sines of all positions.
#[derive(Clone, Debug)]
struct Angles {
    of: (Rotary, DType, DeviceLocation),
    cos: Tensor,
    sin: Tensor,
}

/// Cached bias of the attention scores of a span.
#[derive(Clone, Debug)]
struct Bias {
    of: (Vec<f32>, usize, usize, DeviceLocation),
    bias: Option<Tensor>,
}

impl Pass {
    /// Returns a pass over ids of `shape`: with the rows and lengths in `packed`, or with one row for each batch
    /// element.
    pub(crate) fn new(shape: (usize, usize), packed: Option<&[(usize, usize)]>, state: Option<&State>) -> Result<Self> {
        let (batch, time) = shape;
        if let Some(rows) = packed {
            let total: usize = rows.iter().map(|(_, len)| len).sum();
            let mut distinct: Vec<usize> = rows.iter().map(|(row, _)| *row).collect();
            distinct.sort_unstable();
            distinct.dedup();
            if (batch, time) != (1, total) || distinct.len() != rows.len() || rows.iter().any(|(_, len)| *len == 0) {
                return Err(Error::Input(format!(
                    "packed rows and lengths {rows:?}: expected distinct rows of at least one token and ids of shape \
                    [1, {total}], found shape [{batch}, {time}]"
                )));
            }
        }
        let rows = state.map_or(0, State::rows);
        if let Some((row, _)) =
            packed.into_iter().flatten().find(|(row, _)| *row >= rows + packed.map_or(0, <[_]>::len))
        {
            return Err(Error::Input(format!(
                "row {row} does not follow the {rows} rows of the state; add rows from {rows} on"
            )));
        }
        // A state without positions may take a batch of another size.
        if packed.is_none() && rows != batch && state.is_some_and(|state| !state.is_empty()) {
            return Err(Error::Input(format!("the state holds {rows} rows, but the input has {batch}")));
        }
        let past = |row: usize| state.map_or(0, |state| state.len(row));
        let span = |(row, len): (usize, usize)| Span { row, past: past(row), len };
        let spans: Arc<[Span]> = match packed {
            Some(rows) => rows.iter().copied().map(span).collect(),
            None => (0..batch).map(|row| span((row, time))).collect(),
        };
        Ok(Self {
            spans,
            shape,
            is_packed: packed.is_some(),
            layer: 0,
            is_committed: false,
            rows_before: rows,
            recurrent: BTreeMap::new(),
            angles: Vec::new(),
            biases: Vec::new(),
            shifts: None,
        })
    }

    /// Returns a copy of the pass at its start.
    pub(crate) fn replayed(&self) -> Self {
        Self { recurrent: BTreeMap::new(), is_committed: false, ..self.clone() }
    }

    /// Marks the pass as committed and frees the tensors shared by its layers.
    pub(crate) fn end(&mut self) {
        self.is_committed = true;
        self.angles.clear();
        self.biases.clear();
        self.shifts = None;
    }

    pub(crate) fn spans(&self) -> &Arc<[Span]> {
        &self.spans
    }

    pub(crate) fn shape(&self) -> (usize, usize) {
        self.shape
    }

    pub(crate) fn is_packed(&self) -> bool {
        self.is_packed
    }

    /// Returns whether all rows have the same positions.
    pub(crate) fn is_aligned(&self) -> bool {
        !self.is_packed && self.spans.iter().all(|span| span.past == self.spans[0].past)
    }

    /// Returns each span and its place in the tensors.
    pub(crate) fn places(&self) -> impl Iterator<Item = (Span, Place)> + '_ {
        let mut from = 0;
        self.spans.iter().enumerate().map(move |(i, &span)| {
            let place = if self.is_packed { (0, from) } else { (i, 0) };
            from += span.len;
            (span, place)
        })
    }

    /// Returns the positions, row after row, and their shape `[rows, time]`. If all rows have the same positions,
    /// returns one row.
    pub(crate) fn positions(&self) -> (Vec<usize>, (usize, usize)) {
        let (batch, time) = self.shape;
        let rows = if self.is_aligned() { 1.min(batch) } else { batch };
        let spans = if self.is_packed { &self.spans[..] } else { &self.spans[..rows] };
        (spans.iter().flat_map(|span| span.positions()).collect(), (rows, time))
    }

    /// Returns the cosines and sines of the positions, computed once for all layers.
    pub(crate) fn angles(&mut self, rotary: &Rotary, dtype: DType, device: &Device) -> Result<(Tensor, Tensor)> {
        let is_same = |known: &&Angles| known.of.0 == *rotary && known.of.1 == dtype && known.of.2 == device.location();
        if let Some(known) = self.angles.iter().find(is_same) {
            return Ok((known.cos.clone(), known.sin.clone()));
        }
        let (positions, (_, time)) = self.positions();
        let (cos, sin) = rotary.angles(&positions, time, dtype, device)?;
        let of = (rotary.clone(), dtype, device.location());
        self.angles.push(Angles { of, cos: cos.clone(), sin: sin.clone() });
        Ok((cos, sin))
    }

    /// Returns the bias of the attention scores of `len` positions after `past`, computed once for all layers and rows.
    pub(crate) fn bias(&mut self, slopes: &[f32], past: usize, len: usize, device: &Device) -> Result<Option<Tensor>> {
        let is_same = |known: &&Bias| known.of.0 == slopes && (known.of.1, known.of.2) == (past, len);
        if let Some(known) = self.biases.iter().find(|known| is_same(known) && known.of.3 == device.location()) {
            return Ok(known.bias.clone());
        }
        let bias = ops::attention_bias(slopes, past, len, device)?;
        self.biases.push(Bias { of: (slopes.to_vec(), past, len, device.location()), bias: bias.clone() });
        Ok(bias)
    }

    /// Returns, for each position, the index of the vector of the previous position. The indices refer to a matrix with
    /// one saved vector for each span, followed by one vector for each position of the pass.
    pub(crate) fn shifts(&mut self, device: &Device) -> Result<Tensor> {
        if let Some((_, shifts)) = self.shifts.as_ref().filter(|(at, _)| *at == device.location()) {
            return Ok(shifts.clone());
        }
        let (count, mut at) = (self.spans.len(), 0);
        let mut before = Vec::with_capacity(self.shape.0 * self.shape.1);
        for (i, span) in self.spans.iter().enumerate() {
            let first = (span.len > 0).then_some(i);
            before.extend(first.into_iter().chain((0..span.len.saturating_sub(1)).map(|j| count + at + j)));
            at += span.len;
        }
        let before: Vec<u32> = before.into_iter().map(|row| row as u32).collect();
        let shifts = Tensor::new(before, device)?;
        self.shifts = Some((device.location(), shifts.clone()));
        Ok(shifts)
    }

    /// Returns the new positions of each row as index in the batch, first index along time and number of positions.
    /// Omits empty spans.
    pub(crate) fn own_spans(&self) -> Vec<(usize, usize, usize)> {
        let spans = self.places().filter(|(span, _)| span.len > 0);
        spans.map(|(span, (row, from))| (row, from, span.len)).collect()
    }

    /// Returns the index of the last position of each span among all positions of the pass.
    pub(crate) fn last(&self) -> Vec<u32> {
        let ends = self.spans.iter().scan(0, |end, span| {
            *end += span.len;
            Some(*end)
        });
        ends.map(|end: usize| end.saturating_sub(1) as u32).collect()
    }
}
