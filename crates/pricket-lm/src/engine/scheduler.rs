//! Decides what each step reads: which rows, how many tokens of each, and which requests join.

use pricket_nn::{CausalLm, MAX_STEP, ModelInfo, Recording, State, Taps};

use super::EngineOptions;
use super::lane::{Lane, Reading, stores_exactly};
use super::prefixes::{Found, Prefixes};
use super::queue::{Queue, Turn, common_prefix};
use super::request::{FinishReason, Request, RequestId, Update};
use super::row::Row;
use super::speculation::Speculator;
use crate::{Error, Result};

/// Smallest number of shared tokens for which a request waits until another one has read them.
const WORTH_SHARING: usize = 8;

/// Share of the step budget that prompts always have, as a divisor.
const READING_SHARE: usize = 4;

/// Number of copies of a recurrent state that a row may hold: its own and its marks.
const RECURRENT_COPIES: u64 = 9;

/// The scheduler behind an engine. It does not own the models; each call gets the same ones.
pub(crate) struct Scheduler {
    rows: usize,
    step_tokens: usize,
    /// Whether a prompt that does not fit into the budget of a step is read in parts.
    splits_prompts: bool,
    memory: Option<u64>,
    queue: Queue,
    lanes: Vec<Lane>,
    prefixes: Prefixes,
    speculator: Option<Speculator>,
    next: u64,
    /// Whether the passes of the first model are recorded or edited.
    has_taps: bool,
    /// Updates about requests that ended outside of a pass.
    ended: Vec<Update>,
    /// Tokens that the models have read, without drafts; those of prompts; and those of prompts that were not read
    /// because a state held them.
    read: Read,
}

/// Numbers of tokens.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Read {
    /// Tokens that the models have read, without draft tokens.
    pub(crate) all: u64,
    /// Tokens of prompts and of continuations to score among them.
    pub(crate) of_prompts: u64,
    /// Tokens of prompts that were not read, because a state held them.
    pub(crate) shared: u64,
}

/// Where the state of a new row comes from.
#[derive(Clone, Copy)]
enum Source {
    /// Nowhere: the row reads its whole prompt.
    Nothing,
    /// A kept state.
    Kept(Found),
    /// The state of another row.
    Row { row: usize, shared: usize },
    /// Another row is reading the same tokens now. The request waits for it.
    Wait { row: usize, shared: usize },
}

impl Scheduler {
    pub(crate) fn new(model: &dyn CausalLm, options: &EngineOptions) -> Result<Self> {
        let info = model.info();
        let step_tokens = options.step_tokens.unwrap_or(if info.device.is_cpu() { 512 } else { 2048 });
        for (name, value) in [("rows", options.rows), ("step_tokens", step_tokens)] {
            if value == 0 {
                return Err(Error::Input(format!("{name}: expected at least 1, found 0")));
            }
        }
        let prefixes = options.prefix_memory.unwrap_or(info.cache_bytes_per_token() * 2048 + 64 * info.state_bytes);
        Ok(Self {
            rows: options.rows,
            step_tokens,
            splits_prompts: true,
            memory: options.memory,
            queue: Queue::default(),
            lanes: vec![Lane::new(model)],
            prefixes: Prefixes::default().with_limit(options.memory.unwrap_or(u64::MAX).min(prefixes)),
            speculator: None,
            next: 0,
            has_taps: false,
            ended: Vec::new(),
            read: Read::default(),
        })
    }

    /// Reads every prompt in one pass, even if it exceeds the budget of a step alone.
    pub(crate) fn with_whole_prompts(self) -> Self {
        Self { splits_prompts: false, ..self }
    }

    /// Adds a model. Its requests have the returned index.
    pub(crate) fn add_model(&mut self, model: &dyn CausalLm) -> usize {
        self.lanes.push(Lane::new(model));
        self.lanes.len() - 1
    }

    pub(crate) fn set_speculator(&mut self, speculator: Speculator) {
        self.speculator = Some(speculator);
    }

    pub(crate) fn speculator(&self) -> Option<&Speculator> {
        self.speculator.as_ref()
    }

    /// Sets the taps of the first model. States from passes with other taps are not used any more.
    pub(crate) fn set_taps(&mut self, model: &dyn CausalLm, taps: Option<Taps>) {
        self.has_taps = taps.is_some();
        self.prefixes.clear(0);
        let lane = &mut self.lanes[0];
        if taps.is_some() {
            lane.drop_decoder();
        } else if lane.decoder.is_none() {
            lane.decoder = model.step_decoder();
        }
        lane.ctx.set_taps(taps);
    }

    pub(crate) fn take_recording(&mut self) -> Recording {
        self.lanes[0].ctx.take_recording()
    }

    pub(crate) fn check(&self, models: &[&dyn CausalLm], request: &Request) -> Result<()> {
        let Some(model) = models.get(request.model.0) else {
            return Err(Error::Input("the model of the request does not belong to this engine".into()));
        };
        request.check(*model)?;
        let needed = reservation(model.info(), request);
        match self.memory.filter(|&limit| needed > limit) {
            Some(limit) => Err(Error::Input(format!(
                "the state of {} positions needs {needed} bytes; the engine's memory is limited to {limit} bytes",
                request.positions(model.info().context)
            ))),
            None => Ok(()),
        }
    }

    pub(crate) fn submit(&mut self, models: &[&dyn CausalLm], request: Request) -> Result<RequestId> {
        self.check(models, &request)?;
        let id = RequestId(self.next);
        self.next += 1;
        if request.has_no_work() {
            let finish = Some(Ok(FinishReason::Length));
            self.ended.push(Update { finish, ..Update::new(id) });
        } else {
            self.queue.push(Turn::new(id, request.priority), request);
        }
        Ok(id)
    }

    /// Ends a request. Returns whether it had not ended yet.
    pub(crate) fn cancel(&mut self, id: RequestId) -> bool {
        let mut update = Update::new(id);
        if self.queue.cancel(id).is_some() {
            update.finish = Some(Ok(FinishReason::Unfinished));
            self.ended.push(update);
            return true;
        }
        for lane in 0..self.lanes.len() {
            if let Some(row) = self.lanes[lane].rows.iter().position(|row| row.id() == id) {
                self.lanes[lane].rows[row].end(FinishReason::Unfinished, &mut update);
                self.end(lane, row, &mut update);
                self.ended.push(update);
                return true;
            }
        }
        false
    }

    /// Ends all requests without updates.
    pub(crate) fn clear(&mut self) {
        self.queue = Queue::default();
        if let Some(speculator) = &mut self.speculator {
            speculator.clear();
        }
        for lane in 0..self.lanes.len() {
            while let Some(row) = self.lanes[lane].rows.first() {
                let mut update = Update::new(row.id());
                self.lanes[lane].rows[0].end(FinishReason::Unfinished, &mut update);
                self.end(lane, 0, &mut update);
            }
        }
        self.ended.clear();
    }

    pub(crate) fn waiting(&self) -> usize {
        self.queue.len()
    }

    pub(crate) fn running(&self) -> usize {
        self.lanes.iter().map(|lane| lane.rows.len()).sum()
    }

    pub(crate) fn read(&self) -> Read {
        self.read
    }

    pub(crate) fn state_bytes(&self) -> u64 {
        let rows = self.lanes.iter().filter_map(|lane| lane.ctx.state()).map(|state| state.bytes() as u64);
        let drafts = self.speculator.as_ref().map_or(0, Speculator::state_bytes);
        rows.sum::<u64>() + self.prefixes.bytes() + drafts
    }

    pub(super) fn prefixes(&self) -> &Prefixes {
        &self.prefixes
    }

    pub(super) fn set_prefixes(&mut self, prefixes: Prefixes) {
        self.prefixes = prefixes;
    }

    /// Runs a step. Returns `None` if no request is left.
    pub(crate) fn step(
        &mut self,
        models: &[&dyn CausalLm],
        draft: Option<&dyn CausalLm>,
    ) -> Result<Option<Vec<Update>>> {
        let mut updates = std::mem::take(&mut self.ended);
        let readings = self.plan(models);
        if updates.is_empty() && readings.iter().all(Vec::is_empty) {
            return Ok(None);
        }
        for (lane, mut readings) in readings.into_iter().enumerate() {
            if readings.is_empty() {
                continue;
            }
            let model = models[lane];
            if lane == 0
                && let (Some(draft), Some(speculator)) = (draft, &mut self.speculator)
            {
                speculator.propose(draft, model.info(), &mut self.lanes[0], &mut readings)?;
            }
            let is_last = self.is_last(lane, model, &readings);
            let mut decodes_only = true;
            for reading in &readings {
                let is_decoding = self.lanes[lane].rows[reading.row].is_decoding();
                decodes_only &= is_decoding;
                self.read.all += reading.len as u64;
                self.read.of_prompts += if is_decoding { 0 } else { reading.len as u64 };
            }
            let start = std::time::Instant::now();
            let of_pass = self.lanes[lane].read(model, &readings, is_last);
            if lane == 0
                && let Some(speculator) = &mut self.speculator
            {
                speculator.record(&readings, &of_pass, decodes_only.then(|| start.elapsed()));
            }
            for row in &mut self.lanes[lane].rows {
                if let Some(state) = row.handed.take() {
                    self.prefixes.keep(lane, row.ids[..state.len(0)].to_vec(), state, true);
                }
            }
            updates.extend(of_pass.into_iter().map(|(_, update)| update));
            for row in (0..self.lanes[lane].rows.len())
                .rev()
                .filter(|&row| self.lanes[lane].rows[row].finish.is_some())
                .collect::<Vec<_>>()
            {
                let id = self.lanes[lane].rows[row].id();
                if let Some(update) = updates.iter_mut().find(|update| update.request == id) {
                    self.end(lane, row, update);
                }
            }
        }
        Ok(Some(updates))
    }

    /// Removes an ended row and keeps its state for later requests.
    fn end(&mut self, lane: usize, row: usize, update: &mut Update) {
        let (row, state) = self.lanes[lane].leave(row);
        update.finish = row.finish;
        let has_taps = lane == 0 && self.has_taps;
        if matches!(update.finish, Some(Ok(_))) && state.len(0) == row.read && !has_taps {
            self.prefixes.keep(lane, row.ids[..row.read].to_vec(), state, row.is_awaited);
        }
    }

    /// Chooses the tokens that the step reads, and lets waiting requests join. Returns the readings of each lane.
    fn plan(&mut self, models: &[&dyn CausalLm]) -> Vec<Vec<Reading>> {
        let mut readings: Vec<Vec<Reading>> = Vec::new();
        let (mut prompts, mut decoding) = (Vec::new(), 0);
        for (lane, Lane { rows, .. }) in self.lanes.iter().enumerate() {
            readings.push(Vec::new());
            for (i, row) in rows.iter().enumerate() {
                if row.is_decoding() {
                    readings[lane].push(Reading { row: i, len: row.unread().min(MAX_STEP), drafts: Vec::new() });
                    decoding += 1;
                } else {
                    prompts.push((row.turn, lane, i));
                }
            }
        }
        let mut left = self.step_tokens.saturating_sub(decoding).max(self.step_tokens.div_ceil(READING_SHARE));
        prompts.sort_unstable_by_key(|(turn, ..)| *turn);
        for (_, lane, row) in prompts {
            self.give(lane, row, models[lane].info(), &mut left, &mut readings[lane]);
        }
        let (mut turn, mut running) = (None, self.running());
        while left > 0 && running < self.rows {
            let Some((next, request)) = self.queue.after(turn) else { break };
            turn = Some(next);
            let (lane, info) = (request.model.0, models[request.model.0].info());
            let (reserved, positions) = (reservation(info, request), request.positions(info.context));
            let source = self.source(request);
            let shared = match source {
                Source::Wait { row, shared } => {
                    let other = &mut self.lanes[lane].rows[row];
                    other.is_awaited = true;
                    if info.state_bytes == 0 {
                        continue;
                    }
                    // A recurrent state is marked where the waiting request branches off.
                    if !other.stops.contains(&shared) {
                        other.stops.push(shared);
                    }
                    if let Some(reading) = readings[lane].iter_mut().find(|reading| reading.row == row) {
                        let len = reading.len.min(shared - other.read);
                        left += reading.len - len;
                        reading.len = len;
                    }
                    continue;
                }
                Source::Nothing => 0,
                Source::Row { shared, .. } | Source::Kept(Found { shared, .. }) => shared,
            };
            let longest = request.longest_reading() - shared;
            if !self.splits_prompts && longest > left && left < self.step_tokens {
                break;
            }
            let room = request.ids.len();
            // A request that does not fit keeps its turn: no later one overtakes it.
            if !self.has_room(reserved) {
                break;
            }
            let (mut state, kept) = self.state_from(lane, source);
            self.make_room(reserved);
            let Some(request) = self.queue.remove(next) else { break };
            let mut row = Row::new(next, request, reserved).after(kept);
            // The row gets a state of its own now, with room for its prompt only.
            row.finish = state.compact(0, room).err().map(|error| Err(error.into()));
            self.read.shared += kept as u64;
            self.lanes[lane].join(row, state, positions);
            running += 1;
            self.give(lane, self.lanes[lane].rows.len() - 1, info, &mut left, &mut readings[lane]);
            if !self.splits_prompts {
                // A later continuation may be longer than the first one.
                left = left.saturating_sub(longest.saturating_sub(self.lanes[lane].rows.last().map_or(0, Row::unread)));
            }
        }
        self.prefixes.release();
        readings
    }

    /// Gives a row that reads its prompt its part of the budget.
    fn give(&self, lane: usize, row: usize, info: &ModelInfo, left: &mut usize, readings: &mut Vec<Reading>) {
        let at = &self.lanes[lane].rows[row];
        let stop = at.stops.iter().copied().filter(|&stop| stop > at.read && info.state_bytes > 0).min();
        let most = if self.splits_prompts { *left } else { usize::MAX };
        let len = at.unread().min(most).min(stop.map_or(usize::MAX, |stop| stop - at.read));
        if len > 0 {
            readings.push(Reading { row, len, drafts: Vec::new() });
            *left = left.saturating_sub(len);
        }
    }

    /// Finds the state that holds the most tokens at the start of a waiting request.
    fn source(&self, request: &Request) -> Source {
        let (lane, ids) = (request.model.0, &request.ids);
        // The token before the first one that is scored or chosen has to be read, to predict it.
        let most = request.score_from.unwrap_or(ids.len()).min(ids.len()) - 1;
        if lane == 0 && self.has_taps {
            return Source::Nothing;
        }
        let found = self.prefixes.find(lane, ids, most);
        let mut best = found.map_or(Source::Nothing, Source::Kept);
        let mut held = found.map_or(0, |found| found.shared);
        let (mut wait, mut later) = (None, 0);
        for (row, other) in self.lanes[lane].rows.iter().enumerate().filter(|(_, row)| row.decoder.is_none()) {
            let shared = common_prefix(&other.ids, ids).min(most);
            if shared > held.max(WORTH_SHARING - 1) && other.read >= shared.min(other.ids.len() - 1) {
                (best, held) = (Source::Row { row, shared }, shared);
            }
            if shared > later && other.read < shared.min(other.ids.len() - 1) {
                (wait, later) = (Some(row), shared);
            }
        }
        match wait {
            Some(row) if later >= held + WORTH_SHARING => Source::Wait { row, shared: later },
            _ => best,
        }
    }

    /// Returns a state of one row from a source, and the number of positions that it holds.
    fn state_from(&mut self, lane: usize, source: Source) -> (State, usize) {
        match source {
            Source::Kept(found) => self.prefixes.take(found),
            Source::Row { row, shared } => {
                let mut state = self.lanes[lane].fork(row).unwrap_or_default();
                let kept = state.rewind(0, shared);
                (state, kept)
            }
            Source::Nothing | Source::Wait { .. } => {
                let mut state = State::new();
                state.add_rows(1);
                (state, 0)
            }
        }
    }

    fn reserved(&self) -> u64 {
        self.lanes.iter().flat_map(|lane| &lane.rows).map(|row| row.reserved).sum()
    }

    /// Returns whether there is memory for a new row, apart from kept states for which no request waits.
    fn has_room(&self, bytes: u64) -> bool {
        let used = self.reserved() + self.prefixes.awaited_bytes();
        self.memory.is_none_or(|limit| used.saturating_add(bytes) <= limit)
    }

    /// Discards kept states so that a new row fits into the memory.
    fn make_room(&mut self, bytes: u64) {
        if let Some(limit) = self.memory {
            self.prefixes.shrink(limit.saturating_sub(self.reserved().saturating_add(bytes)));
        }
    }

    /// Returns whether no row needs a state after this pass, so that it can run without one, which is faster.
    fn is_last(&self, lane: usize, model: &dyn CausalLm, readings: &[Reading]) -> bool {
        let ends = |reading: &Reading| {
            let row = &self.lanes[lane].rows[reading.row];
            let is_whole = row.read == 0 && reading.len == row.unread() && row.decoder.is_none();
            is_whole && !row.continues() && self.queue.longest_shared(lane, &row.ids) < WORTH_SHARING
        };
        !self.has_taps && stores_exactly(model) && readings.iter().all(ends)
    }
}

/// Returns the largest size of the state of a request, in bytes.
fn reservation(info: &ModelInfo, request: &Request) -> u64 {
    let positions = request.positions(info.context).checked_next_multiple_of(64).unwrap_or(usize::MAX) as u64;
    info.cache_bytes_per_token().saturating_mul(positions).saturating_add(RECURRENT_COPIES * info.state_bytes)
}
