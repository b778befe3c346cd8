//! Estimate of the memory that training needs, before it starts.

use candle_core::DType;
use pricket_nn::{CausalLm, Layer};

use crate::gradients::Checkpointing;
use crate::{Result, Trainer};

/// Estimated memory of a run in bytes, without the weights of the base model.
///
/// The parts that grow with the length of a micro-batch are approximate: they were measured on GPT-NeoX and MPT with
/// adapters on all linear layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TrainMemory {
    /// Trained parameters: the adapter, or all weights.
    pub parameters: u64,
    /// Gradients of the parameters.
    pub gradients: u64,
    /// The optimizer's moments, and f32 copies of parameters of other types.
    pub optimizer: u64,
    /// Inputs of the blocks, which gradient checkpointing keeps.
    pub block_inputs: u64,
    /// Activations for the backward pass: of one block with gradient checkpointing, otherwise of all blocks.
    pub activations: u64,
    /// Logits of some positions, and gradients of the final hidden states.
    pub head: u64,
    /// Number of token ids of the largest micro-batch, which these figures assume.
    pub micro_batch_tokens: usize,
}

impl TrainMemory {
    /// Returns the sum of all parts.
    pub fn total(&self) -> u64 {
        self.parameters + self.to_allocate()
    }

    /// Returns the memory that is not yet allocated when [`Trainer::new`] returns.
    pub fn to_allocate(&self) -> u64 {
        self.gradients + self.optimizer + self.block_inputs + self.activations + self.head
    }
}

/// Memory of a block's activations as a multiple of the inputs and outputs of its linear layers.
const ACTIVATIONS: f64 = 1.1;

/// Number of positions whose logits exist at the same time, and the number of copies of them.
const HEAD_POSITIONS: usize = 128;
const HEAD_COPIES: usize = 3;

impl Trainer {
    /// Estimates the memory of a training step.
    ///
    /// # Errors
    /// Returns an error if the layers of the model cannot be listed.
    pub fn memory(&self) -> Result<TrainMemory> {
        let model = &*self.tuned().model;
        let info = model.info();
        let tokens = self.largest_micro_batch();
        let (mut parameters, mut gradients, mut optimizer) = (0, 0, 0);
        for parameter in &self.tuned().parameters {
            let (count, dtype) = (parameter.var.elem_count(), parameter.var.dtype());
            parameters += count * dtype.size_in_bytes();
            gradients += count * dtype.size_in_bytes();
            let moments = if self.options().optimizer.rule.is_lion() { 1 } else { 2 };
            optimizer += count * 4 * (moments + usize::from(dtype != DType::F32));
        }
        let width = match info.activations {
            DType::F32 => 4,
            other => other.size_in_bytes(),
        };
        let stream = tokens * info.d_model * width;
        let block = (ACTIVATIONS * (linear_widths(model)? / info.layers.max(1) * tokens * width) as f64) as usize;
        let (block_inputs, activations) = match self.options().checkpointing {
            Checkpointing::PerBlock => ((info.layers + 1) * stream, block),
            Checkpointing::Off => (stream, info.layers * block),
        };
        let head = HEAD_COPIES * HEAD_POSITIONS.min(tokens) * info.vocab * 4 + 2 * stream;
        Ok(TrainMemory {
            parameters: parameters as u64,
            gradients: gradients as u64,
            optimizer: optimizer as u64,
            block_inputs: block_inputs as u64,
            activations: activations as u64,
            head: head as u64,
            micro_batch_tokens: tokens,
        })
    }
}

/// Returns the sum of the input and output widths of all linear layers, without the head.
fn linear_widths(model: &dyn CausalLm) -> Result<usize> {
    let (mut sum, mut failed) = (0, None);
    let vocab = model.info().vocab;
    model.map_layers(&mut |layer| {
        if let Layer::Linear(linear) = layer {
            match linear.weight().shape() {
                Ok((rows, _)) if rows == vocab => {}
                Ok((rows, columns)) => sum += rows + columns,
                Err(e) => failed = Some(e),
            }
        }
        Ok(())
    })?;
    match failed {
        Some(e) => Err(e.into()),
        None => Ok(sum),
    }
}
