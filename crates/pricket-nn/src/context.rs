//! The context of a forward pass: the state of the rows, the spans to read, the taps and the precision.

use std::sync::Arc;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor};

use crate::deferred::Deferred;
use crate::pass::Pass;
use crate::rotary::Rotary;
use crate::{Error, Recording, Result, Site, Span, State, Taps};

/// Outputs that the current block has to compute. An output that is not needed may be zeros; see
/// [`Context::for_gradients`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Needs {
    pub(crate) attention: bool,
    pub(crate) mlp: bool,
}

impl Default for Needs {
    fn default() -> Self {
        Self { attention: true, mlp: true }
    }
}

/// State and settings of a forward pass. The caller owns one context for each batch of rows; the model itself is
/// immutable.
///
/// Token ids of shape `[batch, time]` hold one row in each batch element. Rows of different lengths are packed one
/// after the other: [`Context::pack`] sets their lengths, and the ids have the shape `[1, sum of the lengths]`.
///
/// ```
/// use pricket_nn::{Context, State};
/// let scoring = Context::new(); // every pass starts at position 0
/// let mut chat = Context::new().with_state(State::new()); // every pass continues the one before
/// chat.pack(&[3, 5]); // the next pass reads 3 tokens of row 0 and 5 tokens of row 1
/// assert_eq!(chat.position(1), 0);
/// # drop(scoring);
/// ```
#[derive(Debug, Default)]
pub struct Context {
    state: Option<State>,
    taps: Option<Taps>,
    activations: Option<DType>,
    beyond: bool,
    /// Deferred parts of blocks; `Some` after [`Context::for_gradients`].
    gradients_only: Option<Deferred>,
    /// Outputs that the current block has to compute.
    needs: Needs,
    /// Rows and lengths of the next pass, if it is packed.
    packed: Option<Vec<(usize, usize)>>,
    pass: Option<Pass>,
}

impl Context {
    /// Returns a context without state and taps, with the default precision of the model.
    pub fn new() -> Self {
        Self::default()
    }

    /// Continues from `state` and adds the positions of each pass to it.
    #[must_use]
    pub fn with_state(mut self, state: State) -> Self {
        self.state = Some(state);
        self
    }

    /// Packs the next pass: its ids are `[1, sum of the lengths]`, and row `i` of the state reads `lens[i]` of them.
    pub fn pack(&mut self, lens: &[usize]) {
        self.abandon();
        self.packed = Some(lens.iter().copied().enumerate().collect());
    }

    /// Packs the next pass with some rows only. Each pair is a row of the state and a length. Missing rows are added to
    /// the state.
    pub fn pack_rows(&mut self, rows: &[(usize, usize)]) {
        self.abandon();
        self.packed = Some(rows.to_vec());
    }

    /// Packs the next pass, like [`Context::pack`].
    #[must_use]
    pub fn with_packed(mut self, lens: &[usize]) -> Self {
        self.pack(lens);
        self
    }

    /// Records and edits tensors with `taps`.
    #[must_use]
    pub fn with_taps(mut self, taps: Taps) -> Self {
        self.taps = Some(taps);
        self
    }

    /// Computes activations in `dtype` instead of the default of the model. The CPU supports f32 only.
    #[must_use]
    pub fn with_compute_dtype(mut self, dtype: DType) -> Self {
        self.activations = Some(dtype);
        self
    }

    /// Allows positions beyond the length for which the model was trained.
    #[must_use]
    pub fn beyond_trained_length(mut self) -> Self {
        self.beyond = true;
        self
    }

    /// Returns the number of positions of `row` read so far; 0 without a state.
    pub fn position(&self, row: usize) -> usize {
        self.state.as_ref().map_or(0, |state| state.len(row))
    }

    /// Returns the state, if there is one.
    pub fn state(&self) -> Option<&State> {
        self.state.as_ref()
    }

    /// Returns the state, to select, join or rewind rows. Discards a pass that was not committed.
    pub fn state_mut(&mut self) -> Option<&mut State> {
        self.abandon();
        self.state.as_mut()
    }

    /// Returns a context with the same past and precision, and without taps.
    #[must_use]
    pub fn fork(&self) -> Self {
        Self {
            state: self.state.as_ref().map(State::fork),
            activations: self.activations,
            beyond: self.beyond,
            ..Self::default()
        }
    }

    /// Keeps the given rows of the state, in that order.
    ///
    /// # Errors
    /// Returns [`Error::Input`] if a row does not exist.
    pub fn select_rows(&mut self, rows: &[usize]) -> Result<()> {
        self.abandon();
        self.state.as_mut().map_or(Ok(()), |state| state.select_rows(rows))
    }

    /// Returns the spans of the current or last pass, in the order of its tensors.
    pub fn spans(&self) -> &[Span] {
        self.pass.as_ref().map_or(&[], |pass| &pass.spans()[..])
    }

    /// Selects the last position of each row from the hidden states of the last pass, `[batch, time, d]`. Returns
    /// `[rows, d]`.
    ///
    /// # Errors
    /// Returns [`Error::Input`] if the last pass had another shape.
    pub fn last_positions(&self, hidden: &Tensor) -> Result<Tensor> {
        let (b, t, _) = hidden.dims3()?;
        match self.pass.as_ref().filter(|pass| pass.shape() == (b, t) && t > 0) {
            Some(pass) if pass.is_packed() => {
                let last = Tensor::new(pass.last(), hidden.device())?;
                Ok(hidden.squeeze(0)?.index_select(&last, 0)?)
            }
            Some(_) => Ok(hidden.narrow(1, t - 1, 1)?.squeeze(1)?),
            None => Err(Error::Input(format!("hidden states [{b}, {t}, ..]: the last pass had another shape"))),
        }
    }

    /// Removes the taps and returns them.
    pub fn take_taps(&mut self) -> Option<Taps> {
        self.taps.take()
    }

    /// Replaces the taps, from the next pass on.
    pub fn set_taps(&mut self, taps: Option<Taps>) {
        self.taps = taps;
    }

    /// Returns the tensors that the taps recorded, and clears them. The taps stay in place.
    pub fn take_recording(&mut self) -> Recording {
        let spans = self.pass.as_ref().map_or_else(|| Arc::from([]), |pass| Arc::clone(pass.spans()));
        self.taps.as_mut().map(|taps| taps.take(spans)).unwrap_or_default()
    }

    /// Returns a context that computes blocks of the current pass again, for gradient checkpointing. Positions and past
    /// are the same; taps do not run and the state is not written.
    ///
    /// ```
    /// use candle_core::Tensor;
    /// use pricket_nn::{CausalLm, Context, Result};
    ///
    /// /// Computes the first block of a model twice. Both results have the same bits.
    /// fn twice(model: &dyn CausalLm, ids: &Tensor) -> Result<(Tensor, Tensor)> {
    ///     let mut ctx = Context::new();
    ///     let x = model.embed(ids, &mut ctx)?;
    ///     let first = model.block(0, &x, &mut ctx)?;
    ///     let again = model.block(0, &x, &mut ctx.replay()?)?;
    ///     Ok((first, again))
    /// }
    /// ```
    ///
    /// # Errors
    /// Returns [`Error::Input`] if no pass was started, or if the pass was committed to the state.
    pub fn replay(&self) -> Result<Self> {
        let pass = self
            .pass
            .as_ref()
            .ok_or_else(|| Error::Input("there is no pass to replay; start one with embed".into()))?;
        if pass.is_committed && self.state.is_some() {
            return Err(Error::Input("the pass was committed to the state and cannot be replayed".into()));
        }
        let mut replay = self.fork();
        replay.pass = Some(pass.replayed());
        Ok(replay)
    }

    /// Computes blocks for their gradients only, which needs less memory.
    ///
    /// The output of a block may be wrong: if nothing else in the block depends on the output of attention or the MLP,
    /// that output is zeros. [`Context::backward`] computes the omitted parts one after the other, so that their
    /// intermediate tensors are not in memory at the same time. The gradients have the same bits.
    #[must_use]
    pub fn for_gradients(mut self) -> Self {
        self.gradients_only = Some(Deferred::default());
        self
    }

    /// Returns the gradients of all variables on which `y`, the output of a block, depends. `grad` is the gradient of
    /// `y`.
    ///
    /// # Errors
    /// Returns an error if a tensor operation fails.
    pub fn backward(&mut self, y: &Tensor, grad: Tensor) -> Result<GradStore> {
        self.gradients_only.clone().unwrap_or_default().backward(y, grad)
    }

    /// Defers `part(x)` to [`Context::backward`] and returns zeros, if only gradients are computed and the value is not
    /// needed. Otherwise returns `None`. The function that `part` creates returns a tensor of the shape of `x`.
    pub(crate) fn defer<F>(&mut self, is_needed: bool, x: &Tensor, part: impl FnOnce() -> F) -> Result<Option<Tensor>>
    where
        F: Fn(&Tensor, &mut Context) -> Result<Tensor> + Send + Sync + 'static,
    {
        let Some(deferred) = self.gradients_only.as_ref().filter(|_| !is_needed) else { return Ok(None) };
        let needs = Needs { attention: false, mlp: false };
        // The value of attention is needed only in a sequential block. There only the MLP reads `x`.
        let is_last_reader = self.needs.attention;
        Ok(Some(deferred.defer(x, is_last_reader, Context { needs, ..self.replay()? }, part())?))
    }

    /// Frees the memory of `x` when [`Context::backward`] starts, if only gradients are computed. Nothing but the
    /// addition to the residual stream may read `x`.
    pub(crate) fn release_later(&self, x: &Tensor) {
        if let Some(deferred) = &self.gradients_only {
            deferred.release_later(x);
        }
    }

    /// Sets the outputs that the next block has to compute. Without [`Context::for_gradients`], it has to compute all
    /// of them.
    pub(crate) fn set_needs(&mut self, needs: Needs) {
        self.needs = if self.gradients_only.is_some() { needs } else { Needs::default() };
    }

    /// Returns the outputs that the current block has to compute.
    pub(crate) fn needs(&self) -> Needs {
        self.needs
    }

    /// Ends the current pass and adds its positions to the state. Needed by callers that run the steps one by one;
    /// [`CausalLm::hidden`](crate::CausalLm::hidden) calls it.
    pub fn commit(&mut self) {
        let Some(pass) = self.pass.as_mut().filter(|pass| !pass.is_committed) else { return };
        pass.end();
        let Some(state) = &mut self.state else { return };
        for ((layer, row, name), tensor) in std::mem::take(&mut pass.recurrent) {
            state.set_recurrent(row, layer, name, tensor);
        }
        for span in pass.spans().iter() {
            state.commit(span.row, span.past + span.len);
        }
    }

    /// Discards a pass that was not committed, and the rows that it added to the state.
    fn abandon(&mut self) {
        if let Some(pass) = self.pass.take_if(|pass| !pass.is_committed)
            && let Some(state) = &mut self.state
        {
            state.truncate_rows(pass.rows_before);
        }
    }

    /// Discards the packing of a pass that failed to start.
    pub(crate) fn unpack(&mut self) {
        self.packed = None;
    }

    /// Returns the type of activations for a model with the default type `default`.
    pub(crate) fn activations(&self, default: DType) -> DType {
        self.activations.unwrap_or(default)
    }

    /// Returns an error if a tap cannot run in this model; see [`Taps::check`].
    pub(crate) fn check_taps(&self, layers: usize, has: &dyn Fn(Site) -> bool) -> Result<()> {
        self.taps.as_ref().map_or(Ok(()), |taps| taps.check(layers, has))
    }

    /// Returns whether a pass over ids of this shape was started and not committed.
    pub(crate) fn has_begun(&self, batch: usize, time: usize) -> bool {
        self.pass.as_ref().is_some_and(|pass| pass.shape() == (batch, time) && !pass.is_committed)
    }

    /// Starts a pass over ids of shape `[batch, time]`. `limit` is the maximum number of positions of a row.
    pub(crate) fn begin(&mut self, batch: usize, time: usize, limit: Option<usize>) -> Result<()> {
        self.abandon();
        let mut pass = Pass::new((batch, time), self.packed.take().as_deref(), self.state.as_ref())?;
        let longest = pass.spans().iter().map(|span| span.past + span.len).max().unwrap_or(0);
        if let Some(limit) = limit.filter(|&limit| longest > limit && !self.beyond) {
            return Err(Error::ContextExceeded { asked: longest, limit });
        }
        if let Some(state) = &mut self.state {
            pass.rows_before = state.rows();
            let rows = pass.spans().iter().map(|span| span.row + 1).max().unwrap_or(0);
            if !pass.is_packed() && state.rows() != rows {
                // `Pass::new` has checked that the state is empty.
                state.reset(rows);
            }
            state.add_rows(rows.saturating_sub(state.rows()));
        }
        self.pass = Some(pass);
        Ok(())
    }

    /// Enters a layer. Starts a pass if there is none, which happens if a caller starts in the middle of the model.
    pub(crate) fn enter(&mut self, layer: usize, batch: usize, time: usize, limit: Option<usize>) -> Result<()> {
        if !self.has_begun(batch, time) {
            self.begin(batch, time, limit)?;
        }
        self.pass_mut()?.layer = layer;
        Ok(())
    }

    /// Returns the current pass and the state.
    pub(crate) fn parts(&mut self) -> Result<(&mut Pass, Option<&mut State>)> {
        match &mut self.pass {
            Some(pass) => Ok((pass, self.state.as_mut())),
            None => Err(Error::Input("no pass was started".into())),
        }
    }

    pub(crate) fn pass_mut(&mut self) -> Result<&mut Pass> {
        Ok(self.parts()?.0)
    }

    /// Returns the cosines and sines for the positions of this pass, computed once for all layers.
    pub(crate) fn angles(&mut self, rotary: &Rotary, dtype: DType, device: &Device) -> Result<(Tensor, Tensor)> {
        self.pass_mut()?.angles(rotary, dtype, device)
    }

    /// Returns the index of the current layer.
    pub(crate) fn layer(&self) -> usize {
        self.pass.as_ref().map_or(0, |pass| pass.layer)
    }

    /// Returns whether a tap records or edits `site` of the current layer.
    pub(crate) fn wants(&self, site: Site) -> bool {
        self.taps.as_ref().is_some_and(|taps| taps.wants(site, self.layer()))
    }

    /// Passes a tensor through the taps at `site` of the current layer and returns the result.
    ///
    /// # Errors
    /// Returns the error of an edit.
    pub fn tap(&mut self, site: Site, tensor: Tensor) -> Result<Tensor> {
        self.tap_part(site, 0, tensor)
    }

    /// [`Context::tap`] for a site with several tensors in a pass; `part` is the index of this one.
    pub(crate) fn tap_part(&mut self, site: Site, part: usize, tensor: Tensor) -> Result<Tensor> {
        let layer = if site.is_per_layer() { self.layer() } else { 0 };
        match &mut self.taps {
            Some(taps) => taps.visit(site, layer, part, tensor),
            None => Ok(tensor),
        }
    }
}
