use candle_core::{DType, Device, Tensor};
use pricket_weights::Dtype;

use crate::{CacheType, Context, Embedding, Error, LayerNorm, Linear, Result, Site, Weights, ops};

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
    /// Type of cached keys and values unless a [`Cache`](crate::Cache) says otherwise.
    pub cache: CacheType,
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

    /// Block `i`: `[b, t, d]` to `[b, t, d]`. The last block ends the pass: its positions become past.
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
        ctx.tap(Site::FinalNorm, x)
    }

    /// Does `work` where operations run on the threads that the model's own run on.
    fn on_threads(&self, work: &mut dyn FnMut()) {
        work();
    }
}

/// One block of a family: the residual wiring, which is what a reader comes to see.
pub trait Block: Send + Sync {
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
    /// Rows of the head.
    pub vocab: usize,
    /// As [`ModelInfo::trained_length`].
    pub trained_length: usize,
    /// As [`ModelInfo::context`].
    pub context: Option<usize>,
}

/// A [`CausalLm`] made of a family's blocks.
#[derive(Debug)]
pub struct Decoder<B> {
    info: ModelInfo,
    embed: Embedding,
    blocks: Vec<B>,
    norm: LayerNorm,
    head: Linear,
    positions: Option<Embedding>,
    logit_scale: f64,
}

impl<B: Block> Decoder<B> {
    /// Puts the parts together; `weights` is the cursor they were loaded from.
    pub fn new(
        sizes: Sizes,
        embed: Embedding,
        blocks: Vec<B>,
        norm: LayerNorm,
        head: Linear,
        weights: &Weights,
    ) -> Self {
        let Sizes { family, d_model, heads, kv_heads, vocab, trained_length, context } = sizes;
        let info = ModelInfo {
            family,
            layers: blocks.len(),
            d_model,
            heads,
            kv_heads,
            head_dim: d_model / heads,
            vocab,
            trained_length,
            context,
            parameters: weights.elements(),
            weight_bytes: weights.bytes(),
            activations: weights.activations(),
            cache: weights.cache(),
            dtype: weights.largest(),
            device: weights.device().clone(),
        };
        Self { info, embed, blocks, norm, head, positions: None, logit_scale: 1.0 }
    }

    /// Adds learned positions, if there are any, to the token vectors; there are none beyond their table.
    #[must_use]
    pub fn with_positions(mut self, positions: Option<Embedding>) -> Self {
        self.positions = positions;
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
    fn position_vectors(&self, table: &Embedding, t: usize, dtype: DType, ctx: &Context) -> Result<Tensor> {
        let (positions, limit) = (ctx.positions(), table.weight.shape()?.0);
        if let Some(&last) = positions.iter().max().filter(|&&last| last >= limit) {
            return Err(Error::ContextExceeded { asked: last + 1, limit });
        }
        let ids: Vec<u32> = positions.iter().map(|&position| position as u32).collect();
        table.forward(&Tensor::from_vec(ids, (positions.len() / t.max(1), t), &self.info.device)?, dtype)
    }
}

impl<B: Block> CausalLm for Decoder<B> {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn embed(&self, ids: &Tensor, ctx: &mut Context) -> Result<Tensor> {
        let (b, t) = self.check_ids(ids)?;
        self.check_taps(ctx)?;
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
            x = x.broadcast_add(&self.position_vectors(table, t, activations, ctx)?)?;
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
        let x = ctx.tap(Site::ResidPre, x.clone())?;
        let x = self.blocks[i].forward(&x, ctx)?;
        let x = ctx.tap(Site::ResidPost, x)?;
        if i + 1 == self.blocks.len() {
            ctx.commit();
        }
        Ok(x)
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
}
