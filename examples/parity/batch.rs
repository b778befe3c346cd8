//! A batch with left padding, computed as packed rows without padding.

use anyhow::Result;
use pricket::candle::{IndexOp, Tensor};
use pricket::{CausalLm, Context};

/// The batch of a golden case: token ids `[batch, time]` with left padding.
pub(crate) struct Batch {
    pub(crate) ids: Tensor,
    pub(crate) padding: Vec<usize>,
    pub(crate) time: usize,
}

impl Batch {
    /// Computes the hidden states of positions `from` to `to` of all rows, without padding.
    ///
    /// Returns a tensor for each row, or `None` for a row that has only padding there. Rows with padding are packed.
    pub(crate) fn read(
        &self,
        model: &dyn CausalLm,
        (from, to): (usize, usize),
        ctx: &mut Context,
    ) -> Result<Vec<Option<Tensor>>> {
        let starts: Vec<usize> = self.padding.iter().map(|&pad| pad.clamp(from, to)).collect();
        if self.padding.iter().all(|&pad| pad == 0) {
            let hidden = model.hidden(&self.ids.narrow(1, from, to - from)?.contiguous()?, ctx)?;
            return (0..starts.len()).map(|row| Ok(Some(hidden.i(row)?))).collect();
        }
        let rows: Vec<(usize, usize)> =
            starts.iter().map(|start| to - start).enumerate().filter(|row| row.1 > 0).collect();
        if rows.is_empty() {
            return Ok(vec![None; starts.len()]);
        }
        let ids = rows.iter().map(|&(row, len)| self.ids.i(row)?.narrow(0, to - len, len));
        let ids = Tensor::cat(&ids.collect::<Result<Vec<_>, _>>()?, 0)?.unsqueeze(0)?;
        ctx.pack_rows(&rows);
        let hidden = model.hidden(&ids, ctx)?;
        let mut out = vec![None; starts.len()];
        for (row, tensor) in Self::rows_of(&hidden, &rows)?.into_iter().enumerate() {
            out[rows[row].0] = Some(tensor);
        }
        Ok(out)
    }

    /// Splits a tensor of a packed pass, `[1, sum of the lengths, ..]`, into its rows.
    fn rows_of(x: &Tensor, rows: &[(usize, usize)]) -> Result<Vec<Tensor>> {
        let mut at = 0;
        let row = |&(_, len): &(usize, usize)| {
            at += len;
            Ok(x.i(0)?.narrow(0, at - len, len)?)
        };
        rows.iter().map(row).collect()
    }

    /// Lays out a tensor recorded in a pass over all positions as `[batch, time, ..]`, with zeros at padding.
    pub(crate) fn recorded(&self, x: &Tensor) -> Result<Tensor> {
        if self.padding.iter().all(|&pad| pad == 0) {
            return Ok(x.clone());
        }
        let rows: Vec<(usize, usize)> = self.padding.iter().map(|pad| self.time - pad).enumerate().collect();
        self.laid_out(Self::rows_of(x, &rows)?.into_iter().map(|row| vec![row]).collect())
    }

    /// Concatenates the parts of each row and lays out the rows as `[batch, time, ..]`, with zeros at padding.
    pub(crate) fn laid_out(&self, rows: Vec<Vec<Tensor>>) -> Result<Tensor> {
        let laid = rows.into_iter().map(|parts| {
            let row = Tensor::cat(&parts, 0)?;
            let pad = self.time - row.dim(0)?;
            row.pad_with_zeros(0, pad, 0)
        });
        Ok(Tensor::stack(&laid.collect::<Result<Vec<_>, _>>()?, 0)?)
    }

    /// Returns the logits of all positions, computed in chunks of these lengths.
    pub(crate) fn logits(&self, model: &dyn CausalLm, split: &[usize], ctx: &mut Context) -> Result<Tensor> {
        let (mut rows, mut at) = (vec![Vec::new(); self.padding.len()], 0);
        for len in split {
            for (row, hidden) in rows.iter_mut().zip(self.read(model, (at, at + len), ctx)?) {
                row.extend(hidden.map(|hidden| model.head(&hidden)).transpose()?);
            }
            at += len;
        }
        self.laid_out(rows)
    }
}
