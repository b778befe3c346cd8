//! The rows that one model reads, and the pass over them in a step.

use candle_core::Tensor;
use pricket_nn::{Admission, CacheType, CausalLm, Choice, ChoiceInput, Context, RowStep, State, StepDecoder};

use super::request::{Score, Update};
use super::row::Row;
use crate::diagnose::diagnose;
use crate::head::logprobs;
use crate::{Error, Result};

/// Rows of one model.
pub(super) struct Lane {
    pub(super) rows: Vec<Row>,
    /// Context of all passes. Its state has a row for each of `rows` that is not in `decoder`, in the same order.
    pub(super) ctx: Context,
    /// The model's own decoder. Without one, all passes go through `ctx`.
    pub(super) decoder: Option<Box<dyn StepDecoder>>,
}

/// Tokens that a row reads in a step.
#[derive(Debug)]
pub(super) struct Reading {
    /// Index of the row.
    pub(super) row: usize,
    /// Number of unread tokens of the row to read.
    pub(super) len: usize,
    /// Draft tokens to read after them.
    pub(super) drafts: Vec<u32>,
}

/// Result of a [`Reading`].
#[derive(Default)]
struct Answer {
    scores: Vec<Score>,
    /// The token after the last one read, and after each draft token.
    choices: Vec<Choice>,
    logits: Vec<Vec<f32>>,
}

impl Lane {
    pub(super) fn new(model: &dyn CausalLm) -> Self {
        // The length of each request is checked when it is submitted, and again for each new token.
        let ctx = Context::new().with_state(State::with_type(model.info().cache)).beyond_trained_length();
        Self { rows: Vec::new(), ctx, decoder: model.step_decoder() }
    }

    /// Adds a row that continues from `state`.
    pub(super) fn join(&mut self, row: Row, state: State, positions: usize) {
        let place = self.rows.iter().filter(|row| row.decoder.is_none()).count();
        self.rows.push(row);
        let all = self.state();
        all.extend(state);
        all.expect(place, positions);
    }

    /// Removes a row and returns it with its state.
    pub(super) fn leave(&mut self, index: usize) -> (Row, State) {
        let place = self.place(index);
        let row = self.rows.remove(index);
        let state = match (row.decoder, &mut self.decoder) {
            (Some(id), Some(decoder)) => decoder.release(id).unwrap_or_default(),
            _ => self.state().take_row(place),
        };
        (row, state)
    }

    /// Returns a copy of the state of a row, without copying its data. Returns `None` if the row is in the decoder.
    pub(super) fn fork(&self, index: usize) -> Option<State> {
        let state = self.ctx.state().filter(|_| self.rows[index].decoder.is_none())?;
        Some(state.fork_row(self.place(index)))
    }

    /// Returns the index of a row in the state of the context.
    fn place(&self, index: usize) -> usize {
        self.rows[..index].iter().filter(|row| row.decoder.is_none()).count()
    }

    pub(super) fn state(&mut self) -> &mut State {
        self.ctx.state_mut().expect("the context was made with a state")
    }

    /// Moves all rows out of the decoder.
    pub(super) fn drop_decoder(&mut self) {
        let Some(mut decoder) = self.decoder.take() else { return };
        let mut states = Vec::with_capacity(self.rows.len());
        for row in &mut self.rows {
            states.push(match row.decoder.take() {
                Some(id) => decoder.release(id).unwrap_or_default(),
                None => self.ctx.state_mut().map(|state| state.take_row(0)).unwrap_or_default(),
            });
        }
        for state in states {
            self.state().extend(state);
        }
    }

    /// Marks the recurrent state of a row before it reads draft tokens, so that it can return to the tokens read so
    /// far. Removes the mark of the draft tokens before.
    pub(super) fn mark_for_drafts(&mut self, index: usize) {
        let (place, row) = (self.place(index), &mut self.rows[index]);
        if row.decoder.is_some() {
            return;
        }
        let (before, read) = (row.draft_mark.take(), row.read);
        let state = self.state();
        if let Some(before) = before.filter(|before| *before != read) {
            state.unmark(place, before);
        }
        let is_new = state.mark(place);
        self.rows[index].draft_mark = (is_new || before == Some(read)).then_some(read);
    }

    /// Reads tokens of some rows and adds the results to the rows. Returns an update for each of `readings`, in another
    /// order.
    ///
    /// With `is_last`, every row ends with this pass, and no state is kept.
    pub(super) fn read(&mut self, model: &dyn CausalLm, readings: &[Reading], is_last: bool) -> Vec<(usize, Update)> {
        let in_decoder = |i: &usize| self.rows[readings[*i].row].decoder.is_some();
        let (decoding, reading): (Vec<usize>, Vec<usize>) = (0..readings.len()).partition(in_decoder);
        let of = |group: &[usize]| group.iter().map(|&i| &readings[i]).collect::<Vec<_>>();
        let mut answers: Vec<(usize, Result<Answer>)> = Vec::with_capacity(readings.len());
        match self.decode(&of(&decoding)) {
            Ok(found) => answers.extend(decoding.into_iter().zip(found)),
            Err(error) => answers.extend(spread(error, &decoding)),
        }
        match self.pass(model, &of(&reading), is_last) {
            Ok(found) => answers.extend(reading.into_iter().zip(found)),
            // The error may come from a single row, which must not end the others. A pass that has already changed the
            // states cannot be repeated.
            Err(_) if reading.len() > 1 && reading.iter().all(|&i| self.is_unchanged(readings[i].row)) => {
                for i in reading {
                    let alone = self.pass(model, &[&readings[i]], is_last);
                    answers.push((i, alone.and_then(|mut found| found.pop().unwrap_or_else(|| Ok(Answer::default())))));
                }
            }
            Err(error) => answers.extend(spread(error, &reading)),
        }
        answers.into_iter().map(|(i, answer)| (i, self.add(model, &readings[i], answer))).collect()
    }

    /// Returns whether the state of a row holds just the tokens that the row has read.
    fn is_unchanged(&self, index: usize) -> bool {
        self.ctx.position(self.place(index)) == self.rows[index].read
    }

    /// Runs a step of the model's own decoder.
    fn decode(&mut self, readings: &[&Reading]) -> Result<Vec<Result<Answer>>> {
        let (Some(decoder), false) = (&mut self.decoder, readings.is_empty()) else { return Ok(Vec::new()) };
        let mut inputs = Vec::with_capacity(readings.len());
        for Reading { row, len, drafts } in readings {
            let row = &mut self.rows[*row];
            let tokens = [&row.ids[row.read..row.read + len], drafts].concat();
            // Only the tokens after the last unread one are new.
            let draws = [vec![0.0; len - 1], row.draws(1 + drafts.len())].concat();
            inputs.push((row.decoder, tokens, draws));
        }
        let steps = inputs.iter().filter_map(|(row, tokens, draws)| Some(RowStep { row: (*row)?, tokens, draws }));
        let steps: Vec<RowStep<'_>> = steps.collect();
        let choices = decoder.step(&steps)?;
        let answer = |(choices, reading): (Vec<Choice>, &&Reading)| {
            // A row that was rewound far reads its tokens again in several steps.
            let is_all = reading.len == self.rows[reading.row].unread();
            let choices = if is_all { choices[reading.len - 1..].to_vec() } else { Vec::new() };
            Ok(Answer { choices, ..Answer::default() })
        };
        Ok(choices.into_iter().zip(readings).map(answer).collect())
    }

    /// Runs one packed pass.
    fn pass(&mut self, model: &dyn CausalLm, readings: &[&Reading], is_last: bool) -> Result<Vec<Result<Answer>>> {
        if readings.is_empty() {
            return Ok(Vec::new());
        }
        let (mut packed, mut tokens) = (Vec::with_capacity(readings.len()), Vec::new());
        let (mut chosen, mut scored, mut targets) = (Vec::new(), Vec::new(), Vec::new());
        let mut counts = Vec::with_capacity(readings.len());
        for (i, Reading { row: index, len, drafts }) in readings.iter().enumerate() {
            let row = &self.rows[*index];
            let start = tokens.len();
            packed.push((if is_last { i } else { self.place(*index) }, len + drafts.len()));
            tokens.extend_from_slice(&row.ids[row.read..row.read + len]);
            tokens.extend_from_slice(drafts);
            let before = (chosen.len(), targets.len());
            if row.generates() && *len == row.unread() {
                chosen.extend(start + len - 1..start + len + drafts.len());
            }
            for (place, branch, target) in row.targets(*len) {
                scored.push(start + place);
                targets.push((branch, target));
            }
            counts.push((chosen.len() - before.0, targets.len() - before.1));
        }
        let mut fresh = Context::new().beyond_trained_length();
        let ctx = if is_last { &mut fresh } else { &mut self.ctx };
        ctx.pack_rows(&packed);
        let input = Tensor::new(tokens, &model.info().device)?.unsqueeze(0)?;
        let hidden = model.hidden(&input, ctx)?.squeeze(0)?;
        let ids: Vec<u32> = targets.iter().map(|(_, target)| *target).collect();
        let scores = if ids.is_empty() { Vec::new() } else { logprobs(model, &select(&hidden, &scored)?, &ids)? };
        let mut logits: Vec<Vec<f32>> =
            if chosen.is_empty() { Vec::new() } else { model.head(&select(&hidden, &chosen)?)?.to_vec2()? };
        let choices = self.choose(model, readings, &counts, &logits);

        let (mut logits, mut choices) = (logits.drain(..), choices.into_iter());
        let mut scores = scores.into_iter().zip(&targets);
        let mut answers = Vec::with_capacity(readings.len());
        for (reading, &(chosen, scored)) in readings.iter().zip(&counts) {
            let row = &self.rows[reading.row];
            let mut answer = Answer { choices: choices.by_ref().take(chosen).collect(), ..Answer::default() };
            let kept = logits.by_ref().take(chosen);
            if row.request.logits {
                answer.logits = kept.collect();
            } else {
                kept.for_each(drop);
            }
            let mut is_finite = true;
            for ((summary, logprob), &(branch, target)) in scores.by_ref().take(scored) {
                is_finite &= summary.finite;
                let is_greedy = summary.argmax == target as usize;
                answer.scores.push(Score { branch, logprob, is_greedy, is_likeliest: logprob >= -summary.log_sum });
            }
            let answer = if is_finite { Ok(answer) } else { Err(diagnose(model, &row.ids)) };
            answers.push(answer);
        }
        Ok(answers)
    }

    /// Chooses the next tokens. `counts` holds the number of rows of `logits` for each reading.
    fn choose(
        &mut self,
        model: &dyn CausalLm,
        readings: &[&Reading],
        counts: &[(usize, usize)],
        logits: &[Vec<f32>],
    ) -> Vec<Choice> {
        let draws: Vec<Vec<f64>> =
            readings.iter().zip(counts).map(|(reading, (count, _))| self.rows[reading.row].draws(*count)).collect();
        let mut inputs = Vec::with_capacity(logits.len());
        for (reading, draws) in readings.iter().zip(&draws) {
            let row = &self.rows[reading.row];
            let sampling = &row.request.options.sampling;
            for (i, &draw) in draws.iter().enumerate() {
                // Greedy decoding without penalties does not need the previous tokens.
                let ids = if sampling.is_argmax() { Vec::new() } else { [&row.ids, &reading.drafts[..i]].concat() };
                inputs.push(ChoiceInput {
                    logits: &logits[inputs.len()],
                    sampling,
                    vocab: row.request.vocab,
                    ids: ids.into(),
                    prompt_len: row.request.ids.len(),
                    draw,
                });
            }
        }
        let mut choices = Vec::new();
        if !inputs.is_empty() {
            model.on_threads(&mut || choices = Choice::of_all(&inputs));
        }
        choices
    }

    /// Adds what the model computed to a row.
    fn add(&mut self, model: &dyn CausalLm, reading: &Reading, answer: Result<Answer>) -> Update {
        let place = self.place(reading.row);
        let row = &mut self.rows[reading.row];
        let mut update = Update::new(row.id());
        let answer = match answer {
            Ok(answer) => answer,
            Err(error) => {
                row.finish = Some(Err(error));
                return update;
            }
        };
        let was_decoding = row.is_decoding();
        row.advance(reading.len);
        update.scores = answer.scores;
        // A recurrent state can return to marks only.
        let is_stop = row.stops.contains(&row.read) || (row.generates() && !was_decoding && row.unread() == 0);
        if is_stop && row.decoder.is_none() {
            self.ctx.state_mut().expect("the context was made with a state").mark(place);
        }
        if answer.choices.is_empty() {
            if row.unread() == 0 && !row.generates() {
                self.next_branch(reading.row, place, &mut update);
            }
            return update;
        }
        if row.decoder.is_none()
            && let Some(decoder) = &mut self.decoder
        {
            let state = self.ctx.state_mut().expect("the context was made with a state");
            if row.is_awaited {
                row.handed = Some(state.fork_row(place));
            }
            let admission = Admission {
                state: state.fork_row(place),
                ids: row.ids.clone(),
                prompt_len: row.request.ids.len(),
                sampling: row.request.options.sampling.clone(),
                vocab: row.request.vocab,
            };
            match decoder.admit(admission) {
                Ok(id) => {
                    row.decoder = Some(id);
                    // The decoder has the only reference to the state when it writes.
                    drop(state.take_row(place));
                }
                Err(error) => {
                    row.finish = Some(Err(error.into()));
                    return update;
                }
            }
        }
        let limit = model.info().context;
        let mut logits = answer.logits.into_iter();
        for (i, choice) in answer.choices.into_iter().enumerate() {
            if choice.logprob.is_nan() {
                row.finish = Some(Err(diagnose(model, &row.ids)));
                break;
            }
            row.push(choice, limit, &mut update);
            update.logits.extend(logits.next());
            if let (Some(id), Some(decoder)) = (row.decoder, &mut self.decoder)
                && let Err(error) = decoder.push(id, choice.id)
            {
                row.finish = Some(Err(error.into()));
            }
            if row.finish.is_some() || reading.drafts.get(i) != Some(&choice.id) {
                break;
            }
        }
        if !reading.drafts.is_empty()
            && let Err(error) = self.reject(reading)
        {
            self.rows[reading.row].finish = Some(Err(error));
        }
        update
    }

    /// Removes rejected draft tokens from the state of a row.
    fn reject(&mut self, reading: &Reading) -> Result<()> {
        let place = self.place(reading.row);
        let row = &mut self.rows[reading.row];
        // The last token is chosen and not read. All tokens before it were accepted.
        let valid = row.ids.len() - 1;
        row.read = match (row.decoder, &mut self.decoder) {
            (Some(id), Some(decoder)) => decoder.rewind(id, valid)?,
            _ => self.ctx.state_mut().expect("the context was made with a state").rewind(place, valid),
        };
        Ok(())
    }

    /// Returns to the end of the prompt for the next continuation to score, or ends the row.
    fn next_branch(&mut self, index: usize, place: usize, update: &mut Update) {
        let row = &mut self.rows[index];
        match row.next_branch() {
            Some(kept) => row.read = self.ctx.state_mut().map_or(0, |state| state.rewind(place, kept)),
            None => row.end(super::request::FinishReason::Length, update),
        }
    }
}

/// Returns an error for each of the readings. The first one gets the error itself, so that a caller can match on it.
fn spread(error: Error, readings: &[usize]) -> Vec<(usize, Result<Answer>)> {
    let message = error.to_string();
    let mut error = Some(error);
    let of = |&i: &usize| (i, Err(error.take().unwrap_or_else(|| Error::Input(message.clone()))));
    readings.iter().map(of).collect()
}

/// Returns whether a state stores keys and values exactly as the model computes them. Only then does a pass without a
/// state compute the same as a pass with one.
pub(super) fn stores_exactly(model: &dyn CausalLm) -> bool {
    let info = model.info();
    info.cache == CacheType::of(info.activations)
}

/// Returns the given rows of a matrix.
fn select(hidden: &Tensor, rows: &[usize]) -> Result<Tensor> {
    let (first, last) = (rows[0], rows[rows.len() - 1]);
    if rows.windows(2).all(|pair| pair[0] + 1 == pair[1]) {
        return Ok(hidden.narrow(0, first, last + 1 - first)?);
    }
    let rows: Vec<u32> = rows.iter().map(|&row| row as u32).collect();
    Ok(hidden.index_select(&Tensor::new(rows, hidden.device())?, 0)?)
}
