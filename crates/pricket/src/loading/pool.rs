//! Thread pools. Each loaded model has its own pool, on which all of its work runs.

use std::sync::Arc;

use candle_core::Tensor;
use pricket_nn::ops::{self, Pool};
use pricket_nn::{
    Admission, CausalLm, Choice, Context, Layer, ModelInfo, ModelPlan, RowId, RowStep, State, StepDecoder,
};

use crate::{Error, Result};

/// Largest accepted number of threads. Each thread needs a stack and takes part in every operation.
const MAX_THREADS: usize = 1024;

/// Returns the default number of CPU threads of a [`Loader`](crate::Loader): the number of physical cores, or the
/// number of cores available to the container if that is smaller.
#[must_use]
pub fn default_threads() -> usize {
    num_cpus::get_physical().min(num_cpus::get())
}

pub(crate) fn pool(threads: Option<usize>) -> Result<Pool> {
    let threads = threads.unwrap_or_else(default_threads);
    if !(1..=MAX_THREADS).contains(&threads) {
        return Err(Error::Options(format!("{threads} threads are not possible; expected 1 to {MAX_THREADS}")));
    }
    ops::cpu_isa().map_err(Error::Options)?;
    ops::kernels_are_on().map_err(Error::Options)?;
    Pool::new(threads).map_err(|e| Error::Options(format!("{threads} threads cannot be started: {e}")))
}

/// A model whose work runs on its own thread pool.
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

    // Enters the pool once for all blocks instead of once per block.
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

/// A decoder whose work runs on the thread pool of its model.
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
