//! The contract between families and everything that uses a model, and the decoder that families fill with blocks.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use pricket_weights::Dtype;

use crate::context::Needs;
use crate::loss::cross_entropy;
use crate::ops::Matrix;
use crate::plan::{BlockPlan, ModelPlan, Residual};
use crate::step::StepDecoder;
use crate::{CacheType, Context, Embedding, EmbeddingAndHead, Error, Layer, Linear, Norm, Result, Site, Weights, ops};

/// What a model is, in numbers.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ModelInfo {
    /// The family, as config.json's `model_type` spells it.
    pub family: &'static str,
    /// Number of blocks.
    pub layers: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Rows of the head, padding included.
    pub vocab: usize,
    /// Positions the model was trained for.
    pub trained_length: usize,
    /// The same, where going beyond them is refused unless asked for.
    pub context: Option<usize>,
    /// Number of weights, each once.
    pub parameters: u64,
    /// Bytes the weights take in memory.
    pub weight_bytes: u64,
    /// Type of activations unless a [`Context`] says otherwise.
    pub activations: DType,
    /// Type of cached keys and values unless a [`State`](crate::State) says otherwise.
    pub cache: CacheType,
    /// Bytes of a row's recurrent state, which does not grow with its length; 0 for a model with attention.
    pub state_bytes: u64,
    /// Type of the largest matrix.
    pub dtype: Dtype,
    /// Where the weights are.
    pub device: Device,
}

impl ModelInfo {
    /// Multiplications and additions for one token, attention over the past left out.
    pub fn flops_per_token(&self) -> u64 {
        2 * (self.parameters - (self.vocab * self.d_model) as u64)
    }

    /// Bytes that the cache takes for each position of each row.
    pub fn cache_bytes_per_token(&self) -> u64 {
        (2 * self.layers * self.kv_heads * self.cache.bytes(self.head_dim)) as u64
    }

    /// Bytes that a pass over `positions` needs beside weights and cache, by rule of thumb.
    pub fn workspace_bytes(&self, positions: usize) -> u64 {
        (positions * (16 * self.d_model) * 4 + self.vocab * 4 * 3) as u64
    }
}

/// A causal language model as a residual stream: embed, blocks, norm, head.
///
/// Decoding (head of the last position), scoring (head of a few positions at a time), probing, patching and gradient
/// checkpointing are all written against these steps, outside the families.
pub trait CausalLm: Send + Sync {
    /// What the model is.
    fn info(&self) -> &ModelInfo;

    /// Token ids `[b, t]` to `[b, t, d]`; begins a pass.
    ///
    /// # Errors
    /// [`crate::Error::ContextExceeded`], or candle's for an id outside the vocabulary.
    fn embed(&self, ids: &Tensor, ctx: &mut Context) -> Result<Tensor>;

    /// Block `i`: `[b, t, d]` to `[b, t, d]`. A caller who takes the steps one by one ends the pass with [`Context::commit`].
    ///
    /// # Errors
    /// What an operation or a tap says.
    fn block(&self, i: usize, x: &Tensor, ctx: &mut Context) -> Result<Tensor>;

    /// The final norm, `[b, t, d]` to `[b, t, d]`.
    ///
    /// # Errors
    /// [`Error::Input`] for another width, and what candle says.
    fn finish(&self, x: &Tensor) -> Result<Tensor>;

    /// Hidden states `[.., d]` to logits `[.., vocab]` in f32.
    ///
    /// # Errors
    /// [`Error::Input`] for another width, and what candle says.
    fn head(&self, hidden: &Tensor) -> Result<Tensor>;

    /// All of it but the head: ids `[b, t]` to `[b, t, d]`.
    ///
    /// # Errors
    /// As the steps.
    fn hidden(&self, ids: &Tensor, ctx: &mut Context) -> Result<Tensor> {
        let mut x = self.embed(ids, ctx)?;
        for i in 0..self.info().layers {
            x = self.block(i, &x, ctx)?;
        }
        let x = self.finish(&x)?;
        let x = ctx.tap(Site::FinalNorm, x)?;
        ctx.commit();
        Ok(x)
    }

    /// Cross-entropy of `targets` under hidden states `[n, d]`, in nats: `[n]` in f32, with a gradient. Logits are made a block of
    /// positions at a time, `[n, vocab]` never, and once more for the gradient.
    ///
    /// # Errors
    /// [`Error::Input`] for another number of targets or one outside the vocabulary, and what candle says.
    fn nll(&self, hidden: &Tensor, targets: &[u32]) -> Result<Tensor>;

    /// The layers of the model, for those who compute with them in another way; `None` if a block has another form.
    fn plan(&self) -> Option<ModelPlan<'_>> {
        None
    }

    /// A decoder of this model's own, if there is one that is faster than the steps above.
    fn step_decoder(&self) -> Option<Box<dyn StepDecoder>> {
        None
    }

    /// The same model over the same weights, with each layer as `f` leaves it, so that two adapters can share a base.
    ///
    /// # Errors
    /// The error that `f` returns.
    fn map_layers(&self, f: &mut dyn FnMut(Layer<'_>) -> Result<()>) -> Result<Arc<dyn CausalLm>>;

    /// As [`CausalLm::map_layers`], of linear layers only: each is replaced by what `f` makes of it.
    ///
    /// # Errors
    /// The error that `f` returns.
    fn map_linears(&self, f: &mut dyn FnMut(&Linear) -> Result<Linear>) -> Result<Arc<dyn CausalLm>> {
        self.map_layers(&mut |layer| {
            if let Layer::Linear(linear) = layer {
                *linear = f(linear)?;
            }
            Ok(())
        })
    }

    /// Does `work` where operations run on the threads that the model's own run on.
    fn on_threads(&self, work: &mut dyn FnMut()) {
        work();
    }
}

/// One block of a family: the residual wiring, which is what a reader comes to see.
pub trait Block: Clone + Send + Sync + 'static {
    /// `[b, t, d]` to `[b, t, d]`.
    ///
    /// # Errors
    /// What an operation or a tap says.
    fn forward(&self, x: &Tensor, ctx: &mut Context) -> Result<Tensor>;

    /// Whether the block passes `site`: one with a parallel residual has nothing between attention and MLP.
    fn has(&self, site: Site) -> bool {
        let _ = site;
        true
    }

    /// Its layers, in the order in which they compute.
    fn layers(&mut self) -> Vec<Layer<'_>>;

    /// Its layers, if it is attention and an MLP, each added to the residual stream.
    fn plan(&self) -> Option<BlockPlan<'_>> {
        None
    }
}

/// Adds to the residual stream: `x + (parts[0] + parts[1] + ..)`, in that order.
///
/// # Errors
/// If the shapes differ.
pub fn residual(x: &Tensor, parts: &[&Tensor]) -> Result<Tensor> {
    match parts {
        [] => Ok(x.clone()),
        [part] => ops::sum(part, x, None),
        [first, second] => ops::sum(first, second, Some(x)),
        [first, second, rest @ ..] => {
            let sum = ops::sum(first, second, None)?;
            let parts: Vec<&Tensor> = std::iter::once(&sum).chain(rest.iter().copied()).collect();
            residual(x, &parts)
        }
    }
}

/// The sizes that a family reads from its configuration.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// As [`ModelInfo::family`].
    pub family: &'static str,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Rows of the head.
    pub vocab: usize,
    /// As [`ModelInfo::trained_length`].
    pub trained_length: usize,
    /// As [`ModelInfo::context`].
    pub context: Option<usize>,
}

/// A [`CausalLm`] made of a family's blocks.
#[derive(Clone, Debug)]
pub struct Decoder<B> {
    info: ModelInfo,
    embed: Embedding,
    embed_norm: Option<Norm>,
    blocks: Vec<B>,
    norm: Norm,
    head: Linear,
    is_tied: bool,
    positions: Option<Embedding>,
    logit_scale: f64,
}

impl<B: Block> Decoder<B> {
    /// Puts the parts together; `weights` is the cursor they were loaded from.
    pub fn new(
        sizes: Sizes,
        embedding_and_head: EmbeddingAndHead,
        blocks: Vec<B>,
        norm: Norm,
        weights: &Weights,
    ) -> Self {
        let Sizes { family, d_model, heads, kv_heads, head_dim, vocab, trained_length, context } = sizes;
        let info = ModelInfo {
            family,
            layers: blocks.len(),
            d_model,
            heads,
            kv_heads,
            head_dim,
            vocab,
            trained_length,
            context,
            parameters: weights.elements(),
            weight_bytes: weights.bytes(),
            activations: weights.activations(),
            cache: weights.cache(),
            state_bytes: 0,
            dtype: weights.largest(),
            device: weights.device().clone(),
        };
        let EmbeddingAndHead { embed, head, is_tied } = embedding_and_head;
        Self { info, embed, embed_norm: None, blocks, norm, head, is_tied, positions: None, logit_scale: 1.0 }
    }

    /// Norms the token vectors before the first block.
    #[must_use]
    pub fn with_embed_norm(mut self, norm: Norm) -> Self {
        self.embed_norm = Some(norm);
        self
    }

    /// Adds learned positions, if there are any, to the token vectors; there are none beyond their table.
    #[must_use]
    pub fn with_positions(mut self, positions: Option<Embedding>) -> Self {
        self.positions = positions;
        self
    }

    /// Says that each row keeps `values` f32 numbers, whatever its length.
    #[must_use]
    pub fn with_recurrent_state(mut self, values: usize) -> Self {
        self.info.state_bytes = 4 * values as u64;
        self
    }

    /// Multiplies the logits.
    #[must_use]
    pub fn with_logit_scale(mut self, scale: f64) -> Self {
        self.logit_scale = scale;
        self
    }

    /// Refuses taps at sites or layers that this model does not have.
    fn check_taps(&self, ctx: &Context) -> Result<()> {
        let in_blocks = |site: Site| self.blocks.iter().any(|block| block.has(site));
        ctx.check_taps(self.blocks.len(), &|site: Site| !site.is_per_layer() || in_blocks(site))
    }

    /// Refuses hidden states of another width.
    fn check_width(&self, x: &Tensor) -> Result<()> {
        match x.dims() {
            [.., d] if *d == self.info.d_model => Ok(()),
            found => {
                let d = self.info.d_model;
                Err(Error::Input(format!("hidden states: expected a last dimension of {d}, found the shape {found:?}")))
            }
        }
    }

    /// Refuses ids of another shape or type, or outside the vocabulary. On a GPU looking at them would cost a wait.
    fn check_ids(&self, ids: &Tensor) -> Result<(usize, usize)> {
        let &[b, t] = ids.dims() else {
            return Err(Error::Input(format!("token ids of shape {:?}; expected [batch, length]", ids.dims())));
        };
        if ids.dtype() != DType::U32 {
            return Err(Error::Input(format!("token ids of type {}; expected u32", ids.dtype().as_str())));
        }
        let vocab = self.info.vocab;
        if ids.device().is_cpu()
            && let Some(id) = ids.flatten_all()?.to_vec1::<u32>()?.into_iter().find(|&id| id as usize >= vocab)
        {
            return Err(Error::Input(format!("token id {id} is outside the vocabulary of {vocab}")));
        }
        Ok((b, t))
    }

    /// The learned vectors of this pass's positions, `[1 or b, t, d]`.
    fn position_vectors(&self, table: &Embedding, dtype: DType, ctx: &mut Context) -> Result<Tensor> {
        let ((positions, shape), limit) = (ctx.pass_mut()?.positions(), table.weight.shape()?.0);
        if let Some(&last) = positions.iter().max().filter(|&&last| last >= limit) {
            return Err(Error::ContextExceeded { asked: last + 1, limit });
        }
        let ids: Vec<u32> = positions.iter().map(|&position| position as u32).collect();
        table.forward(&Tensor::from_vec(ids, shape, &self.info.device)?, dtype)
    }
}

impl<B: Block> CausalLm for Decoder<B> {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn embed(&self, ids: &Tensor, ctx: &mut Context) -> Result<Tensor> {
        let checked = self.check_ids(ids).and_then(|shape| self.check_taps(ctx).map(|()| shape));
        let (b, t) = checked.inspect_err(|_| ctx.unpack())?;
        ctx.begin(b, t, self.info.context)?;
        let activations = ctx.activations(self.info.activations);
        if self.info.device.is_cpu() && activations != DType::F32 {
            return Err(Error::Input(format!(
                "activations are f32 on the CPU, {} is not computed there",
                activations.as_str()
            )));
        }
        let mut x = self.embed.forward(ids, activations)?;
        if let Some(table) = &self.positions {
            x = x.broadcast_add(&self.position_vectors(table, activations, ctx)?)?;
        }
        if let Some(norm) = &self.embed_norm {
            x = norm.forward(&x)?;
        }
        ctx.tap(Site::Embed, x)
    }

    fn block(&self, i: usize, x: &Tensor, ctx: &mut Context) -> Result<Tensor> {
        let &[b, t, _] = x.dims() else {
            return Err(Error::Input(format!(
                "hidden states of shape {:?}; expected [batch, length, width]",
                x.dims()
            )));
        };
        self.check_width(x)?;
        if i >= self.blocks.len() {
            return Err(Error::Input(format!(
                "block {i}: the blocks are 0 to {}",
                self.blocks.len().saturating_sub(1)
            )));
        }
        if !ctx.has_begun(b, t) {
            self.check_taps(ctx)?;
        }
        ctx.enter(i, b, t, self.info.context)?;
        let residual = self.blocks[i].plan().map(|plan| plan.residual);
        ctx.set_needs(Needs { attention: residual != Some(Residual::Parallel), mlp: residual.is_none() });
        let x = ctx.tap(Site::ResidPre, x.clone())?;
        let x = self.blocks[i].forward(&x, ctx)?;
        if residual.is_some() {
            ctx.release_later(&x);
        }
        ctx.tap(Site::ResidPost, x)
    }

    fn finish(&self, x: &Tensor) -> Result<Tensor> {
        self.check_width(x)?;
        self.norm.forward(x)
    }

    fn head(&self, hidden: &Tensor) -> Result<Tensor> {
        self.check_width(hidden)?;
        let logits = self.head.forward(hidden)?.to_dtype(DType::F32)?;
        if self.logit_scale == 1.0 { Ok(logits) } else { Ok((logits * self.logit_scale)?) }
    }
    fn nll(&self, hidden: &Tensor, targets: &[u32]) -> Result<Tensor> {
        self.check_width(hidden)?;
        if let Some(id) = targets.iter().find(|&&id| id as usize >= self.info.vocab) {
            return Err(Error::Input(format!("token {id} is outside the vocabulary of {}", self.info.vocab)));
        }
        cross_entropy(hidden, &self.head, self.logit_scale, targets)
    }

    fn plan(&self) -> Option<ModelPlan<'_>> {
        Some(ModelPlan {
            embed: &self.embed,
            learned_positions: self.positions.as_ref(),
            embed_norm: self.embed_norm.as_ref(),
            blocks: self.blocks.iter().map(Block::plan).collect::<Option<_>>()?,
            final_norm: &self.norm,
            head: &self.head,
            is_tied: self.is_tied,
            logit_scale: self.logit_scale,
        })
    }

    fn map_layers(&self, f: &mut dyn FnMut(Layer<'_>) -> Result<()>) -> Result<Arc<dyn CausalLm>> {
        let mut mapped = self.clone();
        let Self { embed, embed_norm, blocks, norm, head, positions, .. } = &mut mapped;
        let first = [Layer::from(embed)].into_iter();
        let first = first.chain(positions.as_mut().map(Layer::from)).chain(embed_norm.as_mut().map(Layer::from));
        for layer in first.chain(blocks.iter_mut().flat_map(Block::layers)).chain([norm.into(), head.into()]) {
            f(layer)?;
        }
        // Another table for one of the two unties them.
        let is_same = |now: &Matrix, before: &Matrix| match (now, before) {
            (Matrix::Dense(now), Matrix::Dense(before)) => now.id() == before.id(),
            (Matrix::InPlace(now), Matrix::InPlace(before)) => now.is_same(before),
            (now, before) => std::mem::discriminant(now) == std::mem::discriminant(before),
        };
        mapped.is_tied &= is_same(&mapped.embed.weight, &self.embed.weight);
        mapped.is_tied &= is_same(&mapped.head.weight, &self.head.weight);
        Ok(Arc::new(mapped))
    }
}
