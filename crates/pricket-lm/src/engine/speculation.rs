//! Speculative decoding: a small draft model proposes tokens, and the model reads all of them in one pass
//! (Leviathan et al. 2023, arXiv:2211.17192).
//!
//! The model chooses each token from its own logits and its own random number, as without drafts. A draft token counts
//! only if it is the chosen one, so drafts change the speed and never the text. For sampled text the draft model uses
//! the random numbers of the model, which makes equal choices likely.

use std::time::Duration;

use candle_core::Tensor;
use pricket_nn::{CausalLm, Choice, ChoiceInput, Context, MAX_STEP, ModelInfo, State};

use super::lane::{Lane, Reading};
use super::queue::common_prefix;
use super::request::{RequestId, Update};
use crate::{Error, Result};

/// Decoding steps without drafts that are measured before drafts are used.
const PLAIN_STEPS: u32 = 4;

/// Steps with drafts that are measured before their speed is judged.
const DRAFT_STEPS: u32 = 8;

/// Decoding steps without drafts after which drafts are tried again.
const RETRY: u32 = 256;

/// Maximum number of tokens that the draft model reads in one pass.
const DRAFT_PASS: usize = 512;

/// Use of a draft model.
#[derive(Clone, Copy, Debug)]
pub struct SpeculationOptions {
    /// Maximum number of draft tokens for each row and step, 1 to 7; 4 by default.
    pub tokens: usize,
    /// Whether drafts are turned off while they do not pay; true by default. See [`Speculation::break_even`].
    pub adaptive: bool,
}

impl Default for SpeculationOptions {
    fn default() -> Self {
        Self { tokens: 4, adaptive: true }
    }
}

impl SpeculationOptions {
    /// Checks the options.
    ///
    /// # Errors
    /// Returns [`Error::Input`] if the number of draft tokens is out of range.
    pub fn check(&self) -> Result<()> {
        if (1..MAX_STEP).contains(&self.tokens) {
            return Ok(());
        }
        Err(Error::Input(format!("draft tokens: expected 1 to {}, found {}", MAX_STEP - 1, self.tokens)))
    }
}

/// Measurements of speculative decoding.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Speculation {
    /// Number of draft tokens that the model read.
    pub drafted: u64,
    /// Number of draft tokens that were accepted.
    pub accepted: u64,
    /// Mean seconds of a step without drafts. NaN if there was none.
    pub plain_seconds: f64,
    /// Mean seconds in which the draft model proposes the tokens of a step. NaN if there was no step with drafts.
    pub draft_seconds: f64,
    /// Mean seconds of the model's pass over the draft tokens. NaN if there was no step with drafts.
    pub verify_seconds: f64,
    /// Mean number of new tokens of a row in a step with drafts.
    pub tokens_per_step: f64,
    /// Share of draft tokens that has to be accepted for drafts to pay, if each is accepted with the same probability.
    /// Above 1 if drafts cannot pay. NaN until both kinds of steps were measured.
    pub break_even: f64,
    /// Whether the next step uses drafts.
    pub is_on: bool,
}

impl Speculation {
    /// Returns the share of draft tokens that were accepted; NaN without draft tokens.
    pub fn acceptance(&self) -> f64 {
        self.accepted as f64 / self.drafted as f64
    }
}

/// Draft model's side of an engine: its state, and the measurements that decide whether it is used.
pub(crate) struct Speculator {
    options: SpeculationOptions,
    ctx: Context,
    /// In the order of the rows of the state.
    rows: Vec<DraftRow>,
    drafted: u64,
    accepted: u64,
    /// Measurements by number of rows, in powers of two.
    costs: Vec<Costs>,
    /// Time of the last proposal; `None` if it is not typical.
    proposal: Option<Duration>,
}

struct DraftRow {
    request: RequestId,
    /// Tokens that the draft model has read.
    ids: Vec<u32>,
}

/// Measurements of decoding steps with about the same number of rows.
#[derive(Clone, Copy, Debug, Default)]
struct Costs {
    plain: Mean,
    draft: Mean,
    verify: Mean,
    /// New tokens of a row in a step with drafts.
    gained: Mean,
    /// Steps without drafts since drafts were turned off.
    rest: Option<u32>,
}

/// Mean of the last measurements, with weights that halve about every ten.
#[derive(Clone, Copy, Debug, Default)]
struct Mean {
    value: f64,
    count: u32,
}

impl Mean {
    fn add(&mut self, value: f64) {
        self.count = self.count.saturating_add(1);
        self.value += (value - self.value) / f64::from(self.count.min(16));
    }

    fn get(self) -> f64 {
        if self.count == 0 { f64::NAN } else { self.value }
    }
}

impl Costs {
    /// Returns the number of tokens of a row that a step with drafts has to give.
    fn needed(&self) -> f64 {
        (self.draft.get() + self.verify.get()) / self.plain.get()
    }

    fn is_on(&self, adaptive: bool) -> bool {
        !adaptive || (self.plain.count >= PLAIN_STEPS && self.rest.is_none())
    }

    /// Decides whether the next steps use drafts.
    fn judge(&mut self) {
        if let Some(rest) = &mut self.rest {
            *rest += 1;
            if *rest >= RETRY {
                let plain = self.plain;
                *self = Self { plain, ..Self::default() };
            }
        } else if self.gained.count >= DRAFT_STEPS && self.gained.get() < self.needed() {
            self.rest = Some(0);
        }
    }
}

/// Returns the acceptance rate `a` at which `1 + a + .. + a^tokens` is `needed`.
fn break_even(needed: f64, tokens: usize) -> f64 {
    let gained = |a: f64| (0..=tokens).map(|i| a.powi(i as i32)).sum::<f64>();
    if needed.is_nan() || needed <= 1.0 {
        return if needed.is_nan() { f64::NAN } else { 0.0 };
    }
    let (mut low, mut high) = (0.0, 2.0);
    while gained(high) < needed {
        high *= 2.0;
    }
    for _ in 0..60 {
        let middle = f64::midpoint(low, high);
        if gained(middle) < needed { low = middle } else { high = middle }
    }
    high
}

impl Speculator {
    /// Creates the draft side of an engine.
    ///
    /// # Errors
    /// Returns [`Error::Input`] if an option is out of range.
    pub(crate) fn new(draft: &dyn CausalLm, options: SpeculationOptions) -> Result<Self> {
        options.check()?;
        let ctx = Context::new().with_state(State::with_type(draft.info().cache)).beyond_trained_length();
        let proposal = None;
        Ok(Self { options, ctx, rows: Vec::new(), drafted: 0, accepted: 0, costs: Vec::new(), proposal })
    }

    pub(crate) fn report(&self) -> Speculation {
        let costs = self.costs.iter().max_by_key(|costs| costs.plain.count + costs.verify.count);
        let costs = costs.copied().unwrap_or_default();
        Speculation {
            drafted: self.drafted,
            accepted: self.accepted,
            plain_seconds: costs.plain.get(),
            draft_seconds: costs.draft.get(),
            verify_seconds: costs.verify.get(),
            tokens_per_step: costs.gained.get(),
            break_even: break_even(costs.needed(), self.options.tokens),
            is_on: costs.is_on(self.options.adaptive),
        }
    }

    fn costs(&mut self, rows: usize) -> &mut Costs {
        let class = rows.next_power_of_two().trailing_zeros() as usize;
        if self.costs.len() <= class {
            self.costs.resize(class + 1, Costs::default());
        }
        &mut self.costs[class]
    }

    /// Adds draft tokens to the readings of rows that are decoding.
    ///
    /// # Errors
    /// Returns the error of the draft model.
    pub(super) fn propose(
        &mut self,
        draft: &dyn CausalLm,
        info: &ModelInfo,
        lane: &mut Lane,
        readings: &mut [Reading],
    ) -> Result<()> {
        self.proposal = Some(Duration::ZERO);
        self.leave(lane);
        let adaptive = self.options.adaptive;
        let mut decoding: Vec<&mut Reading> =
            readings.iter_mut().filter(|reading| lane.rows[reading.row].is_decoding()).collect();
        if decoding.is_empty() || !self.costs(decoding.len()).is_on(adaptive) {
            return Ok(());
        }
        let start = std::time::Instant::now();
        let mut wanted = Vec::with_capacity(decoding.len());
        for reading in &decoding {
            let row = &lane.rows[reading.row];
            // Positions beyond its length could end the draft model's pass with an error.
            let limits = [info.context.filter(|_| !row.request.options.beyond_trained_length), draft.info().context];
            let [own, of_draft] =
                limits.map(|limit| limit.map_or(usize::MAX, |limit| limit.saturating_sub(row.ids.len())));
            // The pass itself gives one token more than there are drafts.
            let room = (row.left() - 1).min(own).min(of_draft).min(MAX_STEP - reading.len.min(MAX_STEP));
            let knows = |&id: &u32| (id as usize) < draft.info().vocab;
            let is_possible = reading.len == row.unread() && row.ids.iter().all(knows);
            wanted.push(if is_possible { self.options.tokens.min(room) } else { 0 });
        }
        let mut is_typical = true;
        for round in 0..self.options.tokens {
            let active: Vec<usize> = (0..decoding.len()).filter(|&i| wanted[i] > round).collect();
            if active.is_empty() {
                break;
            }
            let mut places = Vec::with_capacity(active.len());
            for &i in &active {
                places.push(self.place(lane, decoding[i], draft.info().state_bytes > 0));
            }
            // The first time, the draft model reads whole prompts, which later steps do not have to.
            let unread = |(&i, &place): (&usize, &usize)| {
                lane.rows[decoding[i].row].ids.len() - self.rows[place].ids.len() > 2 * MAX_STEP
            };
            is_typical &= round > 0 || !active.iter().zip(&places).any(unread);
            let logits = self.read(draft, lane, &active, &decoding, &places)?;
            let mut inputs = Vec::with_capacity(active.len());
            for (&i, logits) in active.iter().zip(&logits) {
                let row = &mut lane.rows[decoding[i].row];
                let draw = row.draws(round + 1)[round];
                inputs.push((i, logits, draw));
            }
            let inputs: Vec<ChoiceInput<'_>> = inputs
                .into_iter()
                .map(|(i, logits, draw)| {
                    let row = &lane.rows[decoding[i].row];
                    ChoiceInput {
                        logits,
                        sampling: &row.request.options.sampling,
                        // The model and the draft model may be padded to different sizes.
                        vocab: Some(row.request.vocab.unwrap_or(info.vocab).min(info.vocab)),
                        ids: [&row.ids[..], &decoding[i].drafts].concat().into(),
                        prompt_len: row.request.ids.len(),
                        draw,
                    }
                })
                .collect();
            let mut choices = Vec::new();
            draft.on_threads(&mut || choices = Choice::of_all(&inputs));
            drop(inputs);
            for (&i, choice) in active.iter().zip(choices) {
                decoding[i].drafts.push(choice.id);
            }
        }
        for reading in decoding.iter().filter(|reading| !reading.drafts.is_empty()) {
            lane.mark_for_drafts(reading.row);
        }
        self.proposal = is_typical.then(|| start.elapsed());
        Ok(())
    }

    /// Removes the rows of requests that have ended.
    fn leave(&mut self, lane: &Lane) {
        for place in (0..self.rows.len()).rev() {
            if !lane.rows.iter().any(|row| row.id() == self.rows[place].request) {
                self.rows.remove(place);
                let _ = self.ctx.state_mut().map(|state| state.take_row(place));
            }
        }
    }

    /// Returns the draft row of a reading. Discards tokens that the row did not take over.
    fn place(&mut self, lane: &Lane, reading: &Reading, is_recurrent: bool) -> usize {
        let row = &lane.rows[reading.row];
        let place = self.rows.iter().position(|known| known.request == row.id()).unwrap_or_else(|| {
            self.rows.push(DraftRow { request: row.id(), ids: Vec::new() });
            if let Some(state) = self.ctx.state_mut() {
                state.add_rows(1);
            }
            self.rows.len() - 1
        });
        let Some(state) = self.ctx.state_mut() else { return place };
        let known = &mut self.rows[place].ids;
        if reading.drafts.is_empty() {
            // The last token is always read again, because its logits give the first draft token.
            let shared = common_prefix(known, &row.ids).min(row.ids.len() - 1);
            let kept = state.rewind(place, shared);
            known.truncate(kept);
            if is_recurrent {
                state.mark(place);
            }
        }
        place
    }

    /// Reads the unread tokens of the active rows, and returns the logits of the last one of each.
    fn read(
        &mut self,
        draft: &dyn CausalLm,
        lane: &Lane,
        active: &[usize],
        decoding: &[&mut Reading],
        places: &[usize],
    ) -> Result<Vec<Vec<f32>>> {
        let mut last: Vec<Option<Tensor>> = vec![None; active.len()];
        while last.iter().any(Option::is_none) {
            let (mut packed, mut tokens, mut read) = (Vec::new(), Vec::new(), Vec::new());
            for (at, (&i, &place)) in active.iter().zip(places).enumerate() {
                let all = [&lane.rows[decoding[i].row].ids[..], &decoding[i].drafts].concat();
                let known = self.rows[place].ids.len();
                let len = (all.len() - known).min(DRAFT_PASS.saturating_sub(tokens.len()));
                if len > 0 && last[at].is_none() {
                    tokens.extend_from_slice(&all[known..known + len]);
                    packed.push((place, len));
                    read.push((at, place, all[known..known + len].to_vec(), known + len == all.len()));
                }
            }
            self.ctx.pack_rows(&packed);
            let input = Tensor::new(tokens, &draft.info().device)?.unsqueeze(0)?;
            let hidden = draft.hidden(&input, &mut self.ctx)?;
            let ends = self.ctx.last_positions(&hidden)?;
            for (end, (at, place, ids, is_all)) in read.into_iter().enumerate() {
                self.rows[place].ids.extend(ids);
                if is_all {
                    last[at] = Some(ends.narrow(0, end, 1)?);
                }
            }
        }
        let last: Vec<Tensor> = last.into_iter().flatten().collect();
        Ok(draft.head(&Tensor::cat(&last, 0)?)?.to_vec2()?)
    }

    /// Takes over the measurements of a step. `time` is the time of the pass; `None` if it also read prompts, so that
    /// it cannot be compared.
    pub(super) fn record(&mut self, readings: &[Reading], updates: &[(usize, Update)], time: Option<Duration>) {
        let (mut gained, mut with_drafts) = (0, 0);
        for (i, update) in updates.iter().filter(|(i, _)| !readings[*i].drafts.is_empty()) {
            let drafts = &readings[*i].drafts;
            self.drafted += drafts.len() as u64;
            let same = drafts.iter().zip(&update.tokens).take_while(|(draft, token)| **draft == token.id);
            self.accepted += same.count() as u64;
            gained += update.tokens.len();
            with_drafts += 1;
        }
        let (Some(time), Some(proposal)) = (time, self.proposal) else { return };
        let costs = self.costs(readings.len());
        if with_drafts == 0 {
            costs.plain.add(time.as_secs_f64());
        } else {
            costs.draft.add(proposal.as_secs_f64());
            costs.verify.add(time.as_secs_f64());
            costs.gained.add(f64::from(gained as u32) / f64::from(with_drafts));
        }
        costs.judge();
    }

    /// Discards the states of all rows.
    pub(super) fn clear(&mut self) {
        self.rows.clear();
        if let Some(state) = self.ctx.state_mut() {
            let _ = state.select_rows(&[]);
        }
    }

    pub(super) fn state_bytes(&self) -> u64 {
        self.ctx.state().map_or(0, |state| state.bytes() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_break_even_rate_gives_the_tokens_that_are_needed() {
        for tokens in 1..8 {
            for needed in [1.0, 1.2, 2.0, 3.5, 9.0] {
                let rate = break_even(needed, tokens);
                let gained: f64 = (0..=tokens).map(|i| rate.powi(i as i32)).sum();
                assert!((gained - needed).abs() < 1e-6, "{tokens} tokens, {needed} needed, rate {rate}");
                assert_eq!(rate > 1.0, needed > tokens as f64 + 1.0);
            }
        }
    }

    #[test]
    fn drafts_rest_below_the_break_even_rate_and_are_tried_again() {
        let mut costs = Costs::default();
        let step = |costs: &mut Costs, gained: f64| {
            if costs.is_on(true) {
                costs.draft.add(1.0);
                costs.verify.add(1.0);
                costs.gained.add(gained);
            } else {
                costs.plain.add(1.0);
            }
            costs.judge();
        };
        (0..PLAIN_STEPS).for_each(|_| step(&mut costs, 0.0));
        assert!(costs.is_on(true));
        (0..100).for_each(|_| step(&mut costs, 2.1));
        assert!(costs.is_on(true), "2.1 tokens for the time of 2");
        (0..100).for_each(|_| step(&mut costs, 1.5));
        assert!(!costs.is_on(true) && costs.is_on(false), "1.5 tokens for the time of 2");
        (0..RETRY).for_each(|_| step(&mut costs, 3.0));
        assert!(costs.is_on(true));
    }
}
