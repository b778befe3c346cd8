//! One forward pass: which tokens it reads, and the tensors that follow from that.
//!
//! A pass reads some new positions of some rows. Either every row has the same number, and tensors are `[batch, time, ..]`; or
//! the rows are packed behind each other, and tensors are `[1, sum of lengths, ..]`. A [`Span`] says which positions those are.
//! Learned positions, rotary angles, attention and recurrences read spans; everything else sees a matrix of rows.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, DeviceLocation, Tensor};

use crate::{Error, Result, Rotary, State, ops};

/// New positions of a row: `past` to `past + len`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The row of the state.
    pub row: usize,
    /// Positions of the row that were read before.
    pub past: usize,
    /// New positions.
    pub len: usize,
}

impl Span {
    /// The positions.
    pub fn positions(self) -> std::ops::Range<usize> {
        self.past..self.past + self.len
    }
}

/// Where a span is in the tensors of a pass: element of the batch, first position along time.
pub(crate) type Place = (usize, usize);

/// A pass that was begun. Its spans do not change.
#[derive(Clone, Debug)]
pub(crate) struct Pass {
    spans: Arc<[Span]>,
    /// Of the ids: `[batch, time]`.
    shape: (usize, usize),
    is_packed: bool,
    pub(crate) layer: usize,
    /// Whether its positions have become past.
    pub(crate) is_committed: bool,
    /// Rows of the state before it has added any.
    pub(crate) rows_before: usize,
    /// What the recurrences of layers and rows become when the pass is committed.
    pub(crate) recurrent: BTreeMap<(usize, usize, &'static str), Tensor>,
    angles: Vec<Angles>,
    biases: Vec<Bias>,
    shifts: Option<(DeviceLocation, Tensor)>,
}

/// Cosines and sines of all positions.
#[derive(Clone, Debug)]
struct Angles {
    of: (Rotary, DType, DeviceLocation),
    cos: Tensor,
    sin: Tensor,
}

/// What is added to the scores of a span.
#[derive(Clone, Debug)]
struct Bias {
    of: (Vec<f32>, usize, usize, DeviceLocation),
    bias: Option<Tensor>,
}

impl Pass {
    /// A pass over ids of `shape`: of the rows and lengths `packed`, or of every row of the state.
    pub(crate) fn new(shape: (usize, usize), packed: Option<&[(usize, usize)]>, state: Option<&State>) -> Result<Self> {
        let (batch, time) = shape;
        if let Some(rows) = packed {
            let total: usize = rows.iter().map(|(_, len)| len).sum();
            let mut distinct: Vec<usize> = rows.iter().map(|(row, _)| *row).collect();
            distinct.sort_unstable();
            distinct.dedup();
            if (batch, time) != (1, total) || distinct.len() != rows.len() || rows.iter().any(|(_, len)| *len == 0) {
                return Err(Error::Input(format!(
                    "a packed pass over rows and lengths {rows:?}: expected distinct rows of at least one token and ids of shape \
                     [1, {total}], found [{batch}, {time}]"
                )));
            }
        }
        let rows = state.map_or(0, State::rows);
        if let Some((row, _)) =
            packed.into_iter().flatten().find(|(row, _)| *row >= rows + packed.map_or(0, <[_]>::len))
        {
            return Err(Error::Input(format!("row {row} of a state of {rows} rows: a pass adds rows from {rows} on")));
        }
        // As long as nothing was read, another batch may begin.
        if packed.is_none() && rows != batch && state.is_some_and(|state| !state.is_empty()) {
            return Err(Error::Input(format!("the state holds {rows} rows, the input has {batch}")));
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

    /// The same pass, from its beginning.
    pub(crate) fn replayed(&self) -> Self {
        Self { recurrent: BTreeMap::new(), is_committed: false, ..self.clone() }
    }

    /// Its positions have become past: what was made for its layers is let go.
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

    /// Whether all rows have the same positions.
    pub(crate) fn is_aligned(&self) -> bool {
        !self.is_packed && self.spans.iter().all(|span| span.past == self.spans[0].past)
    }

    /// Every span and where it is.
    pub(crate) fn places(&self) -> impl Iterator<Item = (Span, Place)> + '_ {
        let mut from = 0;
        self.spans.iter().enumerate().map(move |(i, &span)| {
            let place = if self.is_packed { (0, from) } else { (i, 0) };
            from += span.len;
            (span, place)
        })
    }

    /// The positions, row after row; one row stands for all where they are the same. Shape: `[rows, time]`.
    pub(crate) fn positions(&self) -> (Vec<usize>, (usize, usize)) {
        let (batch, time) = self.shape;
        let rows = if self.is_aligned() { 1.min(batch) } else { batch };
        let spans = if self.is_packed { &self.spans[..] } else { &self.spans[..rows] };
        (spans.iter().flat_map(|span| span.positions()).collect(), (rows, time))
    }

    /// Cosines and sines of the positions, made once for all layers.
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

    /// What is added to the scores of `len` positions after `past`, made once for all layers and rows.
    pub(crate) fn bias(&mut self, slopes: &[f32], past: usize, len: usize, device: &Device) -> Result<Option<Tensor>> {
        let is_same = |known: &&Bias| known.of.0 == slopes && (known.of.1, known.of.2) == (past, len);
        if let Some(known) = self.biases.iter().find(|known| is_same(known) && known.of.3 == device.location()) {
            return Ok(known.bias.clone());
        }
        let bias = ops::attention_bias(slopes, past, len, device)?;
        self.biases.push(Bias { of: (slopes.to_vec(), past, len, device.location()), bias: bias.clone() });
        Ok(bias)
    }

    /// For each position the row, among one for each span and then one for each position, that holds the position before.
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

    /// The rows without their pasts: element of the batch, first position in it, and number of positions; those that read nothing are left out.
    pub(crate) fn own_spans(&self) -> Vec<(usize, usize, usize)> {
        let spans = self.places().filter(|(span, _)| span.len > 0);
        spans.map(|(span, (row, from))| (row, from, span.len)).collect()
    }

    /// The last position of each span, among all positions of the pass.
    pub(crate) fn last(&self) -> Vec<u32> {
        let ends = self.spans.iter().scan(0, |end, span| {
            *end += span.len;
            Some(*end)
        });
        ends.map(|end: usize| end.saturating_sub(1) as u32).collect()
    }
}
