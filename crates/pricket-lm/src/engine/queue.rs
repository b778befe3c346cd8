//! Requests that wait for a place in the batch.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::request::{Request, RequestId};

/// Number of earlier requests that a request goes before, for each level of priority.
const LEVEL: i64 = 32;

/// Order in which requests join the batch. Later requests have larger turns, except by priority, so no request waits
/// forever.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Turn(i64, RequestId);

impl Turn {
    pub(super) fn new(id: RequestId, priority: i32) -> Self {
        let arrived = i64::try_from(id.0).unwrap_or(i64::MAX);
        Self(arrived.saturating_sub(i64::from(priority) * LEVEL), id)
    }

    pub(super) fn request(self) -> RequestId {
        self.1
    }
}

/// Waiting requests, by turn and by the content of their prompts.
#[derive(Debug, Default)]
pub(super) struct Queue {
    waiting: BTreeMap<Turn, (Request, Arc<[u32]>)>,
    /// Model, prompt and turn.
    prompts: BTreeSet<(usize, Arc<[u32]>, Turn)>,
}

impl Queue {
    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    pub(super) fn push(&mut self, turn: Turn, request: Request) {
        let prompt: Arc<[u32]> = request.ids.as_slice().into();
        self.prompts.insert((request.model.0, Arc::clone(&prompt), turn));
        self.waiting.insert(turn, (request, prompt));
    }

    /// Returns the first request whose turn is after `turn`.
    pub(super) fn after(&self, turn: Option<Turn>) -> Option<(Turn, &Request)> {
        use std::ops::Bound::{Excluded, Unbounded};
        let from = turn.map_or(Unbounded, Excluded);
        self.waiting.range((from, Unbounded)).next().map(|(&turn, (request, _))| (turn, request))
    }

    pub(super) fn remove(&mut self, turn: Turn) -> Option<Request> {
        let (request, prompt) = self.waiting.remove(&turn)?;
        self.prompts.remove(&(request.model.0, prompt, turn));
        Some(request)
    }

    /// Removes a request by its identifier.
    pub(super) fn cancel(&mut self, id: RequestId) -> Option<Request> {
        let turn = self.waiting.keys().copied().find(|turn| turn.request() == id)?;
        self.remove(turn)
    }

    /// Returns the largest number of tokens at the start that `ids` and a waiting prompt for the same model share.
    pub(super) fn longest_shared(&self, model: usize, ids: &[u32]) -> usize {
        // In lexicographic order, the prompts that share the most are next to `ids`.
        let place = (model, Arc::from(ids), Turn(i64::MIN, RequestId(0)));
        let (before, after) = (self.prompts.range(..&place).next_back(), self.prompts.range(&place..).next());
        let shared = |(other, prompt, _): &(usize, Arc<[u32]>, Turn)| {
            if *other == model { common_prefix(prompt, ids) } else { 0 }
        };
        before.map_or(0, shared).max(after.map_or(0, shared))
    }
}

/// Returns the number of tokens at the start that are the same.
pub(super) fn common_prefix(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}
