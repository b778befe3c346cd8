//! Threads: a pool for each handle, on which all of its model's work runs.

use std::sync::Arc;

use candle_core::Tensor;
use pricket_nn::ops::{self, Pool};
use pricket_nn::{
    Admission, CausalLm, Choice, Context, Layer, ModelInfo, ModelPlan, RowId, RowStep, State, StepDecoder,
};

use crate::{Error, Result};

/// More than any machine has cores. Each takes a stack, and waits for the others.
const MAX_THREADS: usize = 1024;

/// The number of CPU threads that a [`Loader`](crate::Loader) takes by default: the physical cores, or the cores that the
/// container grants if those are fewer.
#[must_use]
pub fn default_threads() -> usize {
    num_cpus::get_physical().min(num_cpus::get())
}

pub(crate) fn pool(threads: Option<usize>) -> Result<Pool> {
    let threads = threads.unwrap_or_else(default_threads);
    if !(1..=MAX_THREADS).contains(&threads) {
        return Err(Error::Options(format!("{threads} threads; from 1 to {MAX_THREADS} are possible")));
    }
    ops::cpu_isa().map_err(Error::Options)?;
    ops::kernels_are_on().map_err(Error::Options)?;
    Pool::new(threads).map_err(|e| Error::Options(format!("{threads} threads cannot be made: {e}")))
}

/// A model whose work runs on a pool of its own size.
pub(crate) struct Pooled {
    pub(crate) model: Arc<dyn CausalLm>,
    pub(crate) pool: Pool,
}

impl CausalLm for Pooled {
    fn info(&self) -> &ModelInfo {
        self.model.info()
    }

    fn embed(&self, ids: &Tensor, ctx: &mut Context) -> pricket_nn::Result<Tensor> {
        self.pool.install(|| self.model.embed(ids, ctx))
    }

    fn block(&self, i: usize, x: &Tensor, ctx: &mut Context) -> pricket_nn::Result<Tensor> {
        self.pool.install(|| self.model.block(i, x, ctx))
    }

    fn finish(&self, x: &Tensor) -> pricket_nn::Result<Tensor> {
        self.pool.install(|| self.model.finish(x))
    }

    fn head(&self, hidden: &Tensor) -> pricket_nn::Result<Tensor> {
        self.pool.install(|| self.model.head(hidden))
    }

    // Entering the pool once for all layers rather than once for each.
    fn hidden(&self, ids: &Tensor, ctx: &mut Context) -> pricket_nn::Result<Tensor> {
        self.pool.install(|| self.model.hidden(ids, ctx))
    }

    fn nll(&self, hidden: &Tensor, targets: &[u32]) -> pricket_nn::Result<Tensor> {
        self.pool.install(|| self.model.nll(hidden, targets))
    }

    fn plan(&self) -> Option<ModelPlan<'_>> {
        self.model.plan()
    }

    fn step_decoder(&self) -> Option<Box<dyn StepDecoder>> {
        let (decoder, pool) = (self.model.step_decoder()?, self.pool.clone());
        Some(Box::new(PooledDecoder { decoder, pool }))
    }

    fn map_layers(
        &self,
        f: &mut dyn FnMut(Layer<'_>) -> pricket_nn::Result<()>,
    ) -> pricket_nn::Result<Arc<dyn CausalLm>> {
        Ok(Arc::new(Self { model: self.model.map_layers(f)?, pool: self.pool.clone() }))
    }

    fn on_threads(&self, work: &mut dyn FnMut()) {
        self.pool.install(work);
    }
}

/// A decoder whose work runs on the pool of its model.
struct PooledDecoder {
    decoder: Box<dyn StepDecoder>,
    pool: Pool,
}

impl StepDecoder for PooledDecoder {
    fn admit(&mut self, row: Admission) -> pricket_nn::Result<RowId> {
        self.pool.install(|| self.decoder.admit(row))
    }

    fn step(&mut self, rows: &[RowStep<'_>]) -> pricket_nn::Result<Vec<Vec<Choice>>> {
        self.pool.install(|| self.decoder.step(rows))
    }

    fn rewind(&mut self, row: RowId, len: usize) -> pricket_nn::Result<usize> {
        self.decoder.rewind(row, len)
    }

    fn push(&mut self, row: RowId, token: u32) -> pricket_nn::Result<()> {
        self.decoder.push(row, token)
    }

    fn release(&mut self, row: RowId) -> pricket_nn::Result<State> {
        self.pool.install(|| self.decoder.release(row))
    }
}
