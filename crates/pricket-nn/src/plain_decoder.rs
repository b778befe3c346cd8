//! A step decoder for any model, on top of the steps of [`CausalLm`].

use std::sync::Arc;

use candle_core::{IndexOp, Tensor};

use crate::step::{Admission, Choice, ChoiceInput, MAX_STEP, RowId, RowStep, StepDecoder};
use crate::{CausalLm, Context, Error, Result, SamplingParams, State};

/// [`StepDecoder`] for any model. Each step is one forward pass over the rows that read tokens, packed.
pub struct PlainDecoder {
    model: Arc<dyn CausalLm>,
    ctx: Context,
    /// In the order of the rows of the state.
    rows: Vec<Row>,
    next: u64,
}

struct Row {
    id: RowId,
    ids: Vec<u32>,
    prompt_len: usize,
    sampling: SamplingParams,
    vocab: Option<usize>,
}

impl std::fmt::Debug for PlainDecoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PlainDecoder({} rows)", self.rows.len())
    }
}

impl PlainDecoder {
    /// Returns a decoder of `model` without rows.
    pub fn new(model: Arc<dyn CausalLm>) -> Self {
        let ctx = Context::new().with_state(State::with_type(model.info().cache)).beyond_trained_length();
        Self { model, ctx, rows: Vec::new(), next: 0 }
    }

    fn index(&self, row: RowId) -> Result<usize> {
        let found = self.rows.iter().position(|known| known.id == row);
        found.ok_or_else(|| Error::Input(format!("row {} is not in the batch", row.0)))
    }

    fn state(&mut self) -> &mut State {
        self.ctx.state_mut().expect("the context was made with a state")
    }
}

impl StepDecoder for PlainDecoder {
    fn admit(&mut self, row: Admission) -> Result<RowId> {
        if row.state.rows() != 1 {
            return Err(Error::Input(format!(
                "the state of an admitted row must have one row, found {}",
                row.state.rows()
            )));
        }
        self.next += 1;
        let Admission { state, ids, prompt_len, sampling, vocab } = row;
        self.state().extend(state);
        self.rows.push(Row { id: RowId(self.next), ids, prompt_len, sampling, vocab });
        Ok(RowId(self.next))
    }

    fn step(&mut self, rows: &[RowStep<'_>]) -> Result<Vec<Vec<Choice>>> {
        let mut packed = Vec::with_capacity(rows.len());
        let mut tokens = Vec::with_capacity(rows.len());
        for step in rows {
            let (len, draws) = (step.tokens.len(), step.draws.len());
            if !(1..=MAX_STEP).contains(&len) || draws != len {
                return Err(Error::Input(format!(
                    "a step has {len} tokens and {draws} draws; expected 1 to {MAX_STEP} of each, in equal number"
                )));
            }
            packed.push((self.index(step.row)?, len));
            tokens.extend_from_slice(step.tokens);
        }
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        let before: Vec<usize> = packed.iter().map(|&(row, _)| self.ctx.position(row)).collect();
        self.ctx.pack_rows(&packed);
        let ids = Tensor::new(tokens, &self.model.info().device)?.unsqueeze(0)?;
        let hidden = self.model.hidden(&ids, &mut self.ctx)?;
        let logits: Vec<Vec<f32>> = self.model.head(&hidden)?.i(0)?.to_vec2()?;
        let mut inputs = Vec::with_capacity(logits.len());
        for ((step, &(row, _)), before) in rows.iter().zip(&packed).zip(before) {
            let row = &self.rows[row];
            let known = &row.ids[..before.min(row.ids.len())];
            for (i, &draw) in step.draws.iter().enumerate() {
                // Greedy decoding without penalties does not need the previous tokens.
                let ids = if row.sampling.is_argmax() { Vec::new() } else { [known, &step.tokens[..=i]].concat() };
                inputs.push(ChoiceInput {
                    logits: &logits[inputs.len()],
                    sampling: &row.sampling,
                    vocab: row.vocab,
                    ids: ids.into(),
                    prompt_len: row.prompt_len,
                    draw,
                });
            }
        }
        let mut choices = Vec::new();
        self.model.on_threads(&mut || choices = Choice::of_all(&inputs));
        let mut choices = choices.into_iter();
        Ok(packed.iter().map(|&(_, len)| choices.by_ref().take(len).collect()).collect())
    }

    fn rewind(&mut self, row: RowId, len: usize) -> Result<usize> {
        let row = self.index(row)?;
        Ok(self.state().rewind(row, len))
    }

    fn push(&mut self, row: RowId, token: u32) -> Result<()> {
        let row = self.index(row)?;
        self.rows[row].ids.push(token);
        Ok(())
    }

    fn release(&mut self, row: RowId) -> Result<State> {
        let index = self.index(row)?;
        self.rows.remove(index);
        Ok(self.state().take_row(index))
    }
}
