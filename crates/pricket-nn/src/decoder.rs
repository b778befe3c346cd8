//! The interface of a model, [`CausalLm`], and its implementation by a sequence of blocks, [`Decoder`].

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use pricket_weights::Dtype;

use crate::context::Needs;
use crate::loss::cross_entropy;
use crate::ops::Matrix;
use crate::plan::{BlockPlan, ModelPlan, Residual};
use crate::step::StepDecoder;
use crate::{CacheType, Context, Embedding, EmbeddingAndHead, Error, Layer, Linear, Norm, Result, Site, Weights, ops};

/// Sizes and properties of a model.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ModelInfo {
    /// Family, as `model_type` in config.json spells it.
    pub family: &'static str,
    /// Number of blocks.
    pub layers: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Number of query heads.
    pub heads: usize,
    /// Number of key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Number of rows of the head, padding included.
    pub vocab: usize,
    /// Number of positions for which the model was trained.
    pub trained_length: usize,
    /// Number of positions beyond which a pass fails, unless [`Context::beyond_trained_length`] is set; `None` for no
    /// limit.
    pub context: Option<usize>,
    /// Number of parameters; tied weights are counted once.
    pub parameters: u64,
    /// Bytes of the weights in memory.
    pub weight_bytes: u64,
    /// Type of activations, unless a [`Context`] sets another.
    pub activations: DType,
    /// Type of cached keys and values, unless a [`State`](crate::State) sets another.
    pub cache: CacheType,
    /// Bytes of the recurrent state of a row, which does not grow with its length; 0 for a model with attention.
    pub state_bytes: u64,
    /// Type of the largest matrix.
    pub dtype: Dtype,
    /// Device of the weights.
    pub device: Device,
}

impl ModelInfo {
    /// Returns the number of multiplications and additions for one token, without attention over the past.
    pub fn flops_per_token(&self) -> u64 {
        2 * (self.parameters - (self.vocab * self.d_model) as u64)
    }

    /// Returns the bytes of the KV cache for each position of each row.
    pub fn cache_bytes_per_token(&self) -> u64 {
        (2 * self.layers * self.kv_heads * self.cache.bytes(self.head_dim)) as u64
    }

    /// Returns an estimate of the bytes that a pass over `positions` needs besides weights and KV cache.
    pub fn workspace_bytes(&self, positions: usize) -> u64 {
        (positions * (16 * self.d_model) * 4 + self.vocab * 4 * 3) as u64
    }
}

/// Causal language model, as the steps of a residual stream: embedding, blocks, final norm, head.
///
/// Decoding, scoring, probing, patching and gradient checkpointing use these steps and need no code of a family.
/// Decoding applies the head to the last position only; scoring applies it to a few positions at a time.
pub trait CausalLm: Send + Sync {
    /// Returns the sizes and properties of the model.
    fn info(&self) -> &ModelInfo;

    /// Embeds token ids, `[b, t]`, and starts a pass. Returns `[b, t, d]`.
    ///
    /// # Errors
    /// Returns [`crate::Error::ContextExceeded`] if the pass is too long, or [`Error::Input`] if the ids have a wrong
    /// shape or type, if an id is outside the vocabulary, or if a tap does not match the model.
    fn embed(&self, ids: &Tensor, ctx: &mut Context) -> Result<Tensor>;

    /// Applies block `i` to `x`, `[b, t, d]`. Returns `[b, t, d]`.
    ///
    /// A caller that runs the steps one by one ends the pass with [`Context::commit`].
    ///
    /// # Errors
    /// Returns an error if a shape does not match, or if a tensor operation or the edit of a tap fails.
    fn block(&self, i: usize, x: &Tensor, ctx: &mut Context) -> Result<Tensor>;

    /// Applies the final norm to `x`, `[b, t, d]`. Returns `[b, t, d]`.
    ///
    /// # Errors
    /// Returns [`Error::Input`] if the width does not match, or an error if a tensor operation fails.
    fn finish(&self, x: &Tensor) -> Result<Tensor>;

    /// Applies the head to hidden states, `[.., d]`. Returns the logits, `[.., vocab]` in f32.
    ///
    /// # Errors
    /// Returns [`Error::Input`] if the width does not match, or an error if a tensor operation fails.
    fn head(&self, hidden: &Tensor) -> Result<Tensor>;

    /// Runs all steps except the head on token ids, `[b, t]`, and ends the pass. Returns the hidden states,
    /// `[b, t, d]`.
    ///
    /// # Errors
    /// Returns the errors of [`CausalLm::embed`], [`CausalLm::block`] and [`CausalLm::finish`].
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

    /// Returns the negative log-likelihood of `targets` given hidden states, `[n, d]`: `[n]` in nats, in f32, with a
    /// gradient.
    ///
    /// Logits are computed for a few positions at a time, so the full `[n, vocab]` matrix is never in memory.
    ///
    /// # Errors
    /// Returns [`Error::Input`] if the number of targets differs from `n` or a target is outside the vocabulary, or an
    /// error if a tensor operation fails.
    fn nll(&self, hidden: &Tensor, targets: &[u32]) -> Result<Tensor>;

    /// Returns references to the layers, for code that computes the model in another way. Returns `None` if a block is
    /// not attention and an MLP.
    fn plan(&self) -> Option<ModelPlan<'_>> {
        None
    }

    /// Returns a decoder specialized for this model, if there is one that is faster than the steps above.
    fn step_decoder(&self) -> Option<Box<dyn StepDecoder>> {
        None
    }

    /// Returns a copy of the model in which `f` may replace each layer. Unchanged weights are shared, so that several
    /// adapters can use one base model.
    ///
    /// # Errors
    /// Returns the error of `f`.
    fn map_layers(&self, f: &mut dyn FnMut(Layer<'_>) -> Result<()>) -> Result<Arc<dyn CausalLm>>;

    /// Returns a copy of the model in which each linear layer is replaced by the result of `f`. See
    /// [`CausalLm::map_layers`].
    ///
    /// # Errors
    /// Returns the error of `f`.
    fn map_linears(&self, f: &mut dyn FnMut(&Linear) -> Result<Linear>) -> Result<Arc<dyn CausalLm>> {
        self.map_layers(&mut |layer| {
            if let Layer::Linear(linear) = layer {
                *linear = f(linear)?;
            }
            Ok(())
        })
    }

    /// Runs `work` on the thread pool of the model.
    fn on_threads(&self, work: &mut dyn FnMut()) {
        work();
    }
}

/// One block of a family. Its code shows the residual connections.
pub trait Block: Clone + Send + Sync + 'static {
    /// Applies the block to `x`, `[b, t, d]`. Returns `[b, t, d]`.
    ///
    /// # Errors
    /// Returns an error if a tensor operation or the edit of a tap fails.
    fn forward(&self, x: &Tensor, ctx: &mut Context) -> Result<Tensor>;

    /// Returns whether the block has `site`. For example, a block with a parallel residual does not have
    /// [`Site::ResidMid`].
    fn has(&self, site: Site) -> bool {
        let _ = site;
        true
    }

    /// Returns all layers of the block.
    fn layers(&mut self) -> Vec<Layer<'_>>;

    /// Returns the layers by role, if the block is attention and an MLP, each added to the residual stream.
    fn plan(&self) -> Option<BlockPlan<'_>> {
        None
    }
}

/// Adds `parts` to the residual stream. Returns `(parts[0] + parts[1] + ..) + x`, added in that order.
///
/// # Errors
/// Returns an error if the shapes differ.
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

/// Sizes that a family reads from its configuration.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Family; see [`ModelInfo::family`].
    pub family: &'static str,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Number of query heads.
    pub heads: usize,
    /// Number of key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Number of rows of the head.
    pub vocab: usize,
    /// Number of positions for which the model was trained; see [`ModelInfo::trained_length`].
    pub trained_length: usize,
    /// Maximum number of positions; see [`ModelInfo::context`].
    pub context: Option<usize>,
}

/// [`CausalLm`] made of the blocks of a family.
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
    /// Returns a model of the given parts. `weights` is the cursor that loaded them.
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

    /// Applies a norm to the token vectors before the first block.
    #[must_use]
    pub fn with_embed_norm(mut self, norm: Norm) -> Self {
        self.embed_norm = Some(norm);
        self
    }

    /// Adds learned position vectors to the token vectors, if `positions` is given. The table limits the number of
    /// positions.
    #[must_use]
    pub fn with_positions(mut self, positions: Option<Embedding>) -> Self {
        self.positions = positions;
        self
    }

    /// Sets the size of the recurrent state of a row: `values` f32 numbers.
    #[must_use]
    pub fn with_recurrent_state(mut self, values: usize) -> Self {
        self.info.state_bytes = 4 * values as u64;
        self
    }

    /// Multiplies the logits by `scale`.
    #[must_use]
    pub fn with_logit_scale(mut self, scale: f64) -> Self {
        self.logit_scale = scale;
        self
    }

    /// Returns an error if a tap names a site or layer that this model does not have.
    fn check_taps(&self, ctx: &Context) -> Result<()> {
        let in_blocks = |site: Site| self.blocks.iter().any(|block| block.has(site));
        ctx.check_taps(self.blocks.len(), &|site: Site| !site.is_per_layer() || in_blocks(site))
    }

    /// Returns an error if the last dimension of `x` is not the width of the model.
    fn check_width(&self, x: &Tensor) -> Result<()> {
        match x.dims() {
            [.., d] if *d == self.info.d_model => Ok(()),
            found => {
                let d = self.info.d_model;
                Err(Error::Input(format!("hidden states: expected a last dimension of {d}, found shape {found:?}")))
            }
        }
    }

    /// Checks the shape and the type of ids, and on the CPU their values. On a GPU reading the values would stall the
    /// device.
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

    /// Returns the learned vectors of the positions of this pass, `[1 or b, t, d]`.
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
                "activations of type {} are not supported on the CPU; use f32",
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
        // Replacing the embedding or the head unties them.
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
