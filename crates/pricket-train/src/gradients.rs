//! The loss of a batch and its gradients, with or without gradient checkpointing.
//!
//! The loss is the cross-entropy of the token ids that are counted:
//!
//! ```text
//! L = weight · Σ -ln p(idᵢ | id₀ .. idᵢ₋₁)
//! ```

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use pricket_nn::{CausalLm, Context, Parameter};

use crate::{Error, Result, Sample};

/// Gradients of a list of parameters, summed over micro-batches.
#[derive(Clone, Debug)]
pub struct Gradients {
    of: Vec<Option<Tensor>>,
}

impl Gradients {
    /// Creates an empty sum of gradients for `parameters`.
    pub fn none(parameters: &[Parameter]) -> Self {
        Self { of: vec![None; parameters.len()] }
    }

    /// Creates gradients from tensors, in the order of the parameters.
    pub fn from_tensors(of: Vec<Option<Tensor>>) -> Self {
        Self { of }
    }

    /// Returns the gradient of each parameter, in the model's order of rows. `None` if the loss does not depend on a
    /// parameter.
    pub fn of(&self) -> &[Option<Tensor>] {
        &self.of
    }

    /// Adds the gradients of a backward pass, removing them from `found`.
    fn take(&mut self, parameters: &[Parameter], found: &mut GradStore) -> Result<()> {
        for (parameter, sum) in parameters.iter().zip(&mut self.of) {
            if let Some(grad) = found.remove(parameter.var.as_tensor()) {
                *sum = Some(match sum.take() {
                    Some(sum) => (sum + grad)?,
                    None => grad,
                });
            }
        }
        Ok(())
    }

    /// Returns the L2 norm of all gradients together.
    ///
    /// # Errors
    /// Returns an error if a tensor operation fails.
    pub fn norm(&self) -> Result<f64> {
        let mut sum = 0.0;
        for grad in self.of.iter().flatten() {
            sum += f64::from(grad.to_dtype(DType::F32)?.sqr()?.sum_all()?.to_scalar::<f32>()?);
        }
        Ok(sum.sqrt())
    }

    /// Scales the gradients so that their L2 norm is at most `max_norm`, and returns the norm before scaling.
    ///
    /// Equals torch's `clip_grad_norm_`. With `None` nothing is scaled.
    ///
    /// # Errors
    /// Returns an error if a tensor operation fails.
    pub fn clip(&mut self, max_norm: Option<f64>) -> Result<f64> {
        let norm = self.norm()?;
        let factor = max_norm.map_or(1.0, |max| max / (norm + 1e-6));
        if factor < 1.0 {
            for grad in self.of.iter_mut().flatten() {
                *grad = (&*grad * factor)?;
            }
        }
        Ok(norm)
    }

    /// Returns the name of the first parameter whose gradient contains NaN or infinity.
    ///
    /// # Errors
    /// Returns an error if a tensor operation fails.
    pub(crate) fn not_finite<'a>(&self, parameters: &'a [Parameter]) -> Result<Option<&'a str>> {
        for (parameter, grad) in parameters.iter().zip(&self.of) {
            let Some(grad) = grad else { continue };
            if !grad.to_dtype(DType::F32)?.abs()?.sum_all()?.to_scalar::<f32>()?.is_finite() {
                return Ok(Some(&parameter.name));
            }
        }
        Ok(None)
    }
}

/// Gradient checkpointing: the trade of memory for time in the backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checkpointing {
    /// Keeps the results of all operations for the backward pass.
    Off,
    /// Keeps only the input of each block, and computes each block again in the backward pass (Chen et al. 2016,
    /// arXiv:1604.06174). The gradients are bitwise equal to those of [`Checkpointing::Off`].
    PerBlock,
}

/// Adds the gradients of `weight · Σ nll` to `sum`, and returns `Σ nll`.
///
/// `Σ nll` is the cross-entropy in nats, summed over the counted token ids of all `samples`. Positions begin at 0 in
/// each sample, and samples do not attend to each other.
///
/// # Errors
/// Returns [`Error::Input`] if a sample does not fit the model, and an error if a tensor operation fails.
pub fn add_gradients(
    model: &dyn CausalLm,
    samples: &[Sample],
    weight: f64,
    parameters: &[Parameter],
    checkpointing: Checkpointing,
    sum: &mut Gradients,
) -> Result<f64> {
    if samples.iter().all(|sample| sample.counted() == 0) {
        return Ok(0.0);
    }
    separate_ids(parameters)?;
    let mut result = Err(Error::Input("the model did not run the gradient computation on its threads".into()));
    model.on_threads(&mut || {
        let pass = Pass { model, batch: Batch::new(samples), weight, parameters };
        result = match checkpointing {
            Checkpointing::Off => pass.whole(sum),
            Checkpointing::PerBlock => pass.by_block(sum),
        };
    });
    result
}

/// Makes sure that new tensors get ids that no parameter has.
///
/// candle finds gradients by tensor ids, which are numbered by a counter of the library. In a notebook each cell is
/// linked with its own copy of the library, so a parameter that an earlier cell made can have the id of a new tensor,
/// whose gradient would be added to its own.
fn separate_ids(parameters: &[Parameter]) -> Result<()> {
    // candle shows the number of an id in its debug format only.
    let number = |tensor: &Tensor| -> Option<u64> {
        format!("{:?}", tensor.id()).trim_matches(|c: char| !c.is_ascii_digit()).parse().ok()
    };
    let Some(last) = parameters.iter().filter_map(|parameter| number(parameter.var.as_tensor())).max() else {
        return Ok(());
    };
    while number(&Tensor::zeros((), DType::F32, &Device::Cpu)?).is_some_and(|new| new <= last) {}
    Ok(())
}

/// Returns the loss of each sample: the cross-entropy in nats, summed over its counted token ids.
///
/// All samples are computed in one pass and do not attend to each other.
///
/// # Errors
/// Returns the errors of [`add_gradients`].
pub fn losses(model: &dyn CausalLm, samples: &[Sample]) -> Result<Vec<f64>> {
    let batch = Batch::new(samples);
    let mut result = Ok(vec![0.0; samples.len()]);
    if batch.targets.is_empty() {
        return result;
    }
    model.on_threads(&mut || {
        result = (|| {
            // Without detaching, the activations of all blocks would be kept for a backward pass.
            let mut ctx = batch.context();
            let mut x = model.embed(&batch.ids(model)?, &mut ctx)?.detach();
            for i in 0..model.info().layers {
                x = model.block(i, &x, &mut ctx)?.detach();
            }
            let hidden = model.finish(&x)?.detach();
            let nll = model.nll(&batch.select(&hidden)?, &batch.targets)?.to_vec1::<f32>()?;
            let mut nll = nll.into_iter();
            Ok(samples.iter().map(|sample| nll.by_ref().take(sample.counted()).map(f64::from).sum()).collect())
        })();
    });
    result
}

/// Concatenated samples.
struct Batch {
    ids: Vec<u32>,
    lens: Vec<usize>,
    /// Positions in the batch whose next id is counted in the loss.
    positions: Vec<u32>,
    /// The next id at each of `positions`.
    targets: Vec<u32>,
}

impl Batch {
    fn new(samples: &[Sample]) -> Self {
        let (mut ids, mut positions, mut targets) = (Vec::new(), Vec::new(), Vec::new());
        for sample in samples {
            for (position, target) in sample.targets() {
                positions.push((ids.len() + position) as u32);
                targets.push(target);
            }
            ids.extend_from_slice(sample.ids());
        }
        Self { ids, lens: samples.iter().map(|sample| sample.ids().len()).collect(), positions, targets }
    }

    /// Returns whether all samples have the same length. Then they are the rows of a batch; otherwise they are packed.
    fn is_uniform(&self) -> bool {
        self.lens.windows(2).all(|pair| pair[0] == pair[1])
    }

    fn context(&self) -> Context {
        if self.is_uniform() { Context::new() } else { Context::new().with_packed(&self.lens) }
    }

    fn ids(&self, model: &dyn CausalLm) -> Result<Tensor> {
        let rows = if self.is_uniform() { self.lens.len() } else { 1 };
        Ok(Tensor::new(&self.ids[..], &model.info().device)?.reshape((rows, ()))?)
    }

    /// Selects the positions of `[b, t, d]` that the loss reads, `[n, d]`.
    fn select(&self, hidden: &Tensor) -> Result<Tensor> {
        let rows = hidden.flatten(0, 1)?;
        if self.positions.len() == rows.dim(0)? {
            return Ok(rows);
        }
        Ok(rows.index_select(&Tensor::new(&self.positions[..], rows.device())?, 0)?)
    }
}

/// A forward and backward pass over a batch.
struct Pass<'a> {
    model: &'a dyn CausalLm,
    batch: Batch,
    weight: f64,
    parameters: &'a [Parameter],
}

impl Pass<'_> {
    /// Returns the loss of final hidden states: its unweighted value, and the weighted tensor that the backward pass
    /// starts from.
    fn loss(&self, hidden: &Tensor) -> Result<(f64, Tensor)> {
        let nll = self.model.nll(&self.batch.select(hidden)?, &self.batch.targets)?;
        let value = nll.to_vec1::<f32>()?.into_iter().map(f64::from).sum();
        Ok((value, (nll.sum_all()? * self.weight)?))
    }

    /// Computes the gradients without checkpointing.
    fn whole(&self, sum: &mut Gradients) -> Result<f64> {
        let hidden = self.model.hidden(&self.batch.ids(self.model)?, &mut self.batch.context())?;
        let (value, loss) = self.loss(&hidden)?;
        sum.take(self.parameters, &mut loss.backward()?)?;
        Ok(value)
    }

    /// Computes the gradients with checkpointing: one block at a time, from the last to the first.
    fn by_block(&self, sum: &mut Gradients) -> Result<f64> {
        let model = self.model;
        let mut ctx = self.batch.context();
        let ids = self.batch.ids(model)?;
        let embedded = model.embed(&ids, &mut ctx)?;
        let mut x = embedded.detach();
        // The input of each block that needs a backward pass.
        let mut inputs: Vec<Option<Tensor>> = Vec::new();
        let mut is_trained = embedded.track_op();
        let is_embedding_trained = is_trained;
        drop(embedded);
        for i in 0..model.info().layers {
            let y = model.block(i, &x, &mut ctx)?;
            // A block needs a backward pass if a parameter in it or before it is trained.
            let needs_backward = is_trained || y.track_op();
            inputs.push(needs_backward.then(|| x.clone()));
            x = y.detach();
            is_trained = needs_backward;
        }
        let top = Var::from_tensor(&x)?.into_inner();
        let (value, loss) = self.loss(&model.finish(&top)?)?;
        let mut found = loss.backward()?;
        sum.take(self.parameters, &mut found)?;
        let mut grad = found.remove(&top);
        drop((found, loss, top, x));
        for i in (0..inputs.len()).rev() {
            let (Some(mut x), Some(above)) = (inputs[i].take(), grad.take()) else { break };
            let has_more_below = if i == 0 { is_embedding_trained } else { inputs[i - 1].is_some() };
            if has_more_below {
                x = Var::from_tensor(&x)?.into_inner();
            }
            let mut again = ctx.replay()?.for_gradients();
            let y = model.block(i, &x, &mut again)?;
            let mut found = again.backward(&y, above)?;
            sum.take(self.parameters, &mut found)?;
            grad = found.remove(&x);
        }
        if let Some(above) = grad.filter(|_| is_embedding_trained) {
            let mut again = self.batch.context();
            let y = model.embed(&ids, &mut again)?;
            sum.take(self.parameters, &mut again.backward(&y, above)?)?;
        }
        Ok(value)
    }
}
