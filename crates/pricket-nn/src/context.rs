//! What changes from pass to pass: the state of the rows, the spans that are read, taps, and precision.

use std::sync::Arc;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor};

use crate::deferred::Deferred;
use crate::pass::Pass;
use crate::rotary::Rotary;
use crate::{Error, Recording, Result, Site, Span, State, Taps};

/// See [`Context::needs`].
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

/// Everything about a forward pass that is not the model. Owned by the caller, one for each batch of rows; the model itself
/// is `&self`.
///
/// Ids of `[batch, time]` are one row each. Rows of different lengths are packed behind each other: [`Context::pack`] says how
/// long each is, and the ids are `[1, sum of the lengths]`.
///
/// ```
/// use pricket_nn::{Context, State};
/// let scoring = Context::new();                        // every pass begins at position 0
/// let mut chat = Context::new().with_state(State::new());  // every pass continues the last
/// chat.pack(&[3, 5]);                                  // the next reads 3 tokens of row 0 and 5 of row 1
/// assert_eq!(chat.position(1), 0);
/// # drop(scoring);
/// ```
#[derive(Debug, Default)]
pub struct Context {
    state: Option<State>,
    taps: Option<Taps>,
    activations: Option<DType>,
    beyond: bool,
    /// See [`Context::for_gradients`].
    gradients_only: Option<Deferred>,
    /// Whether the block in hand needs the values of what attention and its MLP add to the residual stream.
    needs: Needs,
    /// Rows and lengths of the next pass.
    packed: Option<Vec<(usize, usize)>>,
    pass: Option<Pass>,
}

impl Context {
    /// No state, no taps, the model's own precision.
    pub fn new() -> Self {
        Self::default()
    }

    /// Continues from `state`, and keeps in it what is read.
    #[must_use]
    pub fn with_state(mut self, state: State) -> Self {
        self.state = Some(state);
        self
    }

    /// The next pass reads rows of these lengths, packed: its ids are `[1, sum of the lengths]`, and row `i` of the state reads
    /// `lens[i]` of them.
    pub fn pack(&mut self, lens: &[usize]) {
        self.abandon();
        self.packed = Some(lens.iter().copied().enumerate().collect());
    }

    /// As [`Context::pack`], of some rows only: pairs of a row of the state and a length. Rows that the state does not have
    /// yet are added to it.
    pub fn pack_rows(&mut self, rows: &[(usize, usize)]) {
        self.abandon();
        self.packed = Some(rows.to_vec());
    }

    /// As [`Context::pack`].
    #[must_use]
    pub fn with_packed(mut self, lens: &[usize]) -> Self {
        self.pack(lens);
        self
    }

    /// Records or edits at `taps`.
    #[must_use]
    pub fn with_taps(mut self, taps: Taps) -> Self {
        self.taps = Some(taps);
        self
    }

    /// Computes activations in `dtype` rather than the model's default. On the CPU they are f32 and nothing else.
    #[must_use]
    pub fn with_compute_dtype(mut self, dtype: DType) -> Self {
        self.activations = Some(dtype);
        self
    }

    /// Allows positions beyond the length that the model was trained for.
    #[must_use]
    pub fn beyond_trained_length(mut self) -> Self {
        self.beyond = true;
        self
    }

    /// Positions that were read of `row`; 0 without a state.
    pub fn position(&self, row: usize) -> usize {
        self.state.as_ref().map_or(0, |state| state.len(row))
    }

    /// The state, if there is one.
    pub fn state(&self) -> Option<&State> {
        self.state.as_ref()
    }

    /// The state, to select, join or rewind rows. It ends a pass that was not committed: what that has read is not past.
    pub fn state_mut(&mut self) -> Option<&mut State> {
        self.abandon();
        self.state.as_mut()
    }

    /// A context with the same past and precision, and no taps.
    #[must_use]
    pub fn fork(&self) -> Self {
        Self {
            state: self.state.as_ref().map(State::fork),
            activations: self.activations,
            beyond: self.beyond,
            ..Self::default()
        }
    }

    /// Keeps the rows `rows` of the state, in that order.
    ///
    /// # Errors
    /// [`Error::Input`] for a row that is not there.
    pub fn select_rows(&mut self, rows: &[usize]) -> Result<()> {
        self.abandon();
        self.state.as_mut().map_or(Ok(()), |state| state.select_rows(rows))
    }

    /// What the last pass reads, or has read: the spans of its rows, in the order of its tensors.
    pub fn spans(&self) -> &[Span] {
        self.pass.as_ref().map_or(&[], |pass| &pass.spans()[..])
    }

    /// Of the hidden states of the last pass, `[batch, time, d]`, those of the last position of each row: `[rows, d]`.
    ///
    /// # Errors
    /// [`Error::Input`] if they are not those of the last pass.
    pub fn last_positions(&self, hidden: &Tensor) -> Result<Tensor> {
        let (b, t, _) = hidden.dims3()?;
        match self.pass.as_ref().filter(|pass| pass.shape() == (b, t) && t > 0) {
            Some(pass) if pass.is_packed() => {
                let last = Tensor::new(pass.last(), hidden.device())?;
                Ok(hidden.squeeze(0)?.index_select(&last, 0)?)
            }
            Some(_) => Ok(hidden.narrow(1, t - 1, 1)?.squeeze(1)?),
            None => Err(Error::Input(format!("hidden states of [{b}, {t}, ..]: the last pass had another shape"))),
        }
    }

    /// The taps, leaving none.
    pub fn take_taps(&mut self) -> Option<Taps> {
        self.taps.take()
    }

    /// Records or edits at `taps` from the next pass on, or at none.
    pub fn set_taps(&mut self, taps: Option<Taps>) {
        self.taps = taps;
    }

    /// What the taps have recorded, leaving them in place and empty.
    pub fn take_recording(&mut self) -> Recording {
        let spans = self.pass.as_ref().map_or_else(|| Arc::from([]), |pass| Arc::clone(pass.spans()));
        self.taps.as_mut().map(|taps| taps.take(spans)).unwrap_or_default()
    }

    /// A context that computes blocks of the pass in hand a second time: at the same positions, after the same past, without
    /// firing taps and without writing the state. Gradient checkpointing repeats a block so.
    ///
    /// ```
    /// use candle_core::Tensor;
    /// use pricket_nn::{CausalLm, Context, Result};
    ///
    /// /// The first block of a model, computed twice: both results have the same bits.
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
    /// [`Error::Input`] if no pass was begun, or if its positions have become past.
    pub fn replay(&self) -> Result<Self> {
        let pass = self.pass.as_ref().ok_or_else(|| Error::Input("no pass was begun that could be replayed".into()))?;
        if pass.is_committed && self.state.is_some() {
            return Err(Error::Input("the pass is over: its positions have become past".into()));
        }
        let mut replay = self.fork();
        replay.pass = Some(pass.replayed());
        Ok(replay)
    }

    /// Computes blocks for their gradients only. The result of a block may be wrong: attention and MLP read as zeros where nothing else
    /// in the block depends on them, and are computed in [`Context::backward`], one after the other, so that what both hold is
    /// not held at once. Gradients keep their bits.
    #[must_use]
    pub fn for_gradients(mut self) -> Self {
        self.gradients_only = Some(Deferred::default());
        self
    }

    /// The gradients of all variables that the result `y` of a block depends on, where that of `y` is `grad`.
    ///
    /// # Errors
    /// What an operation says.
    pub fn backward(&mut self, y: &Tensor, grad: Tensor) -> Result<GradStore> {
        self.gradients_only.clone().unwrap_or_default().backward(y, grad)
    }

    /// Postpones `part(x)` to [`Context::backward`] and returns zeros instead, if the block is computed for its gradients only and the value
    /// is not needed. `part` returns a tensor of the shape of `x`.
    pub(crate) fn defer<F>(&mut self, is_needed: bool, x: &Tensor, part: impl FnOnce() -> F) -> Result<Option<Tensor>>
    where
        F: Fn(&Tensor, &mut Context) -> Result<Tensor> + Send + Sync + 'static,
    {
        let Some(deferred) = self.gradients_only.as_ref().filter(|_| !is_needed) else { return Ok(None) };
        let needs = Needs { attention: false, mlp: false };
        // Only in a sequential block is the value of attention needed, and there the MLP alone reads `x`.
        let is_last_reader = self.needs.attention;
        Ok(Some(deferred.defer(x, is_last_reader, Context { needs, ..self.replay()? }, part())?))
    }

    /// Frees `x` when [`Context::backward`] begins, if the block is computed for its gradients only. `x` is added to the residual stream and
    /// read by nothing else.
    pub(crate) fn release_later(&self, x: &Tensor) {
        if let Some(deferred) = &self.gradients_only {
            deferred.release_later(x);
        }
    }

    /// Sets what the block that is entered has to compute; everything unless [`Context::for_gradients`] was called.
    pub(crate) fn set_needs(&mut self, needs: Needs) {
        self.needs = if self.gradients_only.is_some() { needs } else { Needs::default() };
    }

    /// The values that the block in hand has to compute.
    pub(crate) fn needs(&self) -> Needs {
        self.needs
    }

    /// Ends a pass whose steps a caller takes one by one: its positions become past. [`CausalLm::hidden`](crate::CausalLm::hidden)
    /// does it itself.
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

    /// Forgets a pass that was not committed, and the rows that it has added to the state.
    fn abandon(&mut self) {
        if let Some(pass) = self.pass.take_if(|pass| !pass.is_committed)
            && let Some(state) = &mut self.state
        {
            state.truncate_rows(pass.rows_before);
        }
    }

    /// Forgets how the next pass was to be packed: it did not begin.
    pub(crate) fn unpack(&mut self) {
        self.packed = None;
    }

    /// The activation type for a model whose default is `default`.
    pub(crate) fn activations(&self, default: DType) -> DType {
        self.activations.unwrap_or(default)
    }

    /// Refuses taps that cannot fire: see [`Taps::check`].
    pub(crate) fn check_taps(&self, layers: usize, has: &dyn Fn(Site) -> bool) -> Result<()> {
        self.taps.as_ref().map_or(Ok(()), |taps| taps.check(layers, has))
    }

    /// Whether a pass over ids of this shape was begun and is not over.
    pub(crate) fn has_begun(&self, batch: usize, time: usize) -> bool {
        self.pass.as_ref().is_some_and(|pass| pass.shape() == (batch, time) && !pass.is_committed)
    }

    /// Begins a pass over ids of `[batch, time]`.
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
                // Nothing was read of other rows: `Pass::new` has looked.
                state.reset(rows);
            }
            state.add_rows(rows.saturating_sub(state.rows()));
        }
        self.pass = Some(pass);
        Ok(())
    }

    /// Enters a layer; a pass that starts in the middle of the model begins here.
    pub(crate) fn enter(&mut self, layer: usize, batch: usize, time: usize, limit: Option<usize>) -> Result<()> {
        if !self.has_begun(batch, time) {
            self.begin(batch, time, limit)?;
        }
        self.pass_mut()?.layer = layer;
        Ok(())
    }

    /// The pass, and the state.
    pub(crate) fn parts(&mut self) -> Result<(&mut Pass, Option<&mut State>)> {
        match &mut self.pass {
            Some(pass) => Ok((pass, self.state.as_mut())),
            None => Err(Error::Input("no pass was begun".into())),
        }
    }

    pub(crate) fn pass_mut(&mut self) -> Result<&mut Pass> {
        Ok(self.parts()?.0)
    }

    /// Cosines and sines for the positions of this pass, computed once for all layers.
    pub(crate) fn angles(&mut self, rotary: &Rotary, dtype: DType, device: &Device) -> Result<(Tensor, Tensor)> {
        self.pass_mut()?.angles(rotary, dtype, device)
    }

    /// The layer that the pass is in.
    pub(crate) fn layer(&self) -> usize {
        self.pass.as_ref().map_or(0, |pass| pass.layer)
    }

    /// Whether a tap is at `site` of the current layer.
    pub(crate) fn wants(&self, site: Site) -> bool {
        self.taps.as_ref().is_some_and(|taps| taps.wants(site, self.layer()))
    }

    /// Passes a tensor through the taps at `site` of the current layer.
    ///
    /// # Errors
    /// What an edit returns.
    pub fn tap(&mut self, site: Site, tensor: Tensor) -> Result<Tensor> {
        self.tap_part(site, 0, tensor)
    }

    /// As [`Context::tap`], of a tensor that is one of several: `part` counts them.
    pub(crate) fn tap_part(&mut self, site: Site, part: usize, tensor: Tensor) -> Result<Tensor> {
        let layer = if site.is_per_layer() { self.layer() } else { 0 };
        match &mut self.taps {
            Some(taps) => taps.visit(site, layer, part, tensor),
            None => Ok(tensor),
        }
    }
}
