use candle_core::{DType, Device, Tensor};

use crate::ops::{Scores, SharedBias};
use crate::rotary::Rotary;
use crate::{Cache, Error, Recording, Result, Site, Taps};

/// Everything about a forward pass that is not the model: the past, padding, precision, taps. Owned, one a sequence
/// batch; the model itself is `&self`.
///
/// ```
/// use pricket_nn::{Cache, Context};
/// let scoring = Context::new();                        // no past, no cache
/// let chat = Context::new().with_cache(Cache::new());  // every call continues the last
/// assert_eq!(chat.position(), 0);
/// # drop(scoring);
/// ```
#[derive(Debug, Default)]
pub struct Context {
    cache: Option<Cache>,
    padding: Vec<usize>,
    taps: Option<Taps>,
    activations: Option<DType>,
    beyond: bool,
    step: Option<Step>,
}

/// One forward pass: where it starts, and what all of its layers share.
#[derive(Debug)]
struct Step {
    batch: usize,
    len: usize,
    start: usize,
    layer: usize,
    angles: Option<(Rotary, Tensor, Tensor)>,
    bias: SharedBias,
}

impl Context {
    /// No past, no padding, no taps, the model's own precision.
    pub fn new() -> Self {
        Self::default()
    }

    /// Continues from `cache`, and keeps new positions in it.
    #[must_use]
    pub fn with_cache(mut self, cache: Cache) -> Self {
        self.cache = Some(cache);
        self
    }

    /// `padding[row]` positions on the left of each batch row are padding: masked as keys, and positions are counted
    /// from the first that is not.
    #[must_use]
    pub fn with_padding(mut self, padding: Vec<usize>) -> Self {
        self.set_padding(padding);
        self
    }

    /// As [`Context::with_padding`].
    pub fn set_padding(&mut self, padding: Vec<usize>) {
        self.padding = if padding.iter().all(|&n| n == 0) { Vec::new() } else { padding };
    }

    /// Records or edits at `taps`.
    #[must_use]
    pub fn with_taps(mut self, taps: Taps) -> Self {
        self.taps = Some(taps);
        self
    }

    /// Computes activations in `dtype` rather than the model's default. On the CPU they are f32 and nothing else.
    #[must_use]
    pub fn with_activations(mut self, dtype: DType) -> Self {
        self.activations = Some(dtype);
        self
    }

    /// Allows positions beyond the length that the model was trained for.
    #[must_use]
    pub fn beyond_trained_length(mut self) -> Self {
        self.beyond = true;
        self
    }

    /// Positions already read, 0 without a cache.
    pub fn position(&self) -> usize {
        self.cache.as_ref().map_or(0, Cache::len)
    }

    /// The cache, if there is one.
    pub fn cache(&self) -> Option<&Cache> {
        self.cache.as_ref()
    }

    /// The cache, to truncate or replace it.
    pub fn cache_mut(&mut self) -> Option<&mut Cache> {
        self.cache.as_mut()
    }

    /// A context with the same past, padding and precision, and no taps.
    #[must_use]
    pub fn fork(&self) -> Self {
        Self {
            cache: self.cache.as_ref().map(Cache::fork),
            padding: self.padding.clone(),
            activations: self.activations,
            beyond: self.beyond,
            ..Self::default()
        }
    }

    /// Keeps the batch rows `rows`, in that order.
    ///
    /// # Errors
    /// If a row is not there.
    pub fn select_rows(&mut self, rows: &[u32]) -> Result<()> {
        if !self.padding.is_empty() {
            let kept = rows.iter().map(|&row| self.padding.get(row as usize).copied());
            let missing = || Error::Input(format!("rows {rows:?} of a batch of {}", self.padding.len()));
            self.padding = kept.collect::<Option<_>>().ok_or_else(missing)?;
        }
        match &mut self.cache {
            Some(cache) => cache.select_rows(rows),
            None => Ok(()),
        }
    }

    /// What the taps have recorded, leaving them in place and empty.
    pub fn take_recording(&mut self) -> Recording {
        self.taps.as_mut().map(Taps::take).unwrap_or_default()
    }

    /// The activation type for a model whose default is `default`.
    pub(crate) fn activations(&self, default: DType) -> DType {
        self.activations.unwrap_or(default)
    }

    /// Refuses taps that cannot fire: see [`Taps::check`].
    pub(crate) fn check_taps(&self, layers: usize, has: &dyn Fn(Site) -> bool) -> Result<()> {
        self.taps.as_ref().map_or(Ok(()), |taps| taps.check(layers, has))
    }

    /// Whether a pass over `len` positions of `batch` rows has begun.
    pub(crate) fn has_begun(&self, batch: usize, len: usize) -> bool {
        self.step.as_ref().is_some_and(|step| (step.batch, step.len) == (batch, len))
    }

    /// Starts a forward pass over `len` new positions.
    pub(crate) fn begin(&mut self, batch: usize, len: usize, limit: Option<usize>) -> Result<()> {
        let start = self.position();
        if let Some(limit) = limit.filter(|_| !self.beyond) {
            // Padding takes no position: the longest row decides.
            let longest = start + len - self.padding.iter().copied().min().unwrap_or(0).min(start + len);
            if longest > limit {
                return Err(Error::ContextExceeded { asked: longest, limit });
            }
        }
        if !self.padding.is_empty() && self.padding.len() != batch {
            return Err(Error::Input(format!("{} padding lengths for a batch of {batch}", self.padding.len())));
        }
        self.step = Some(Step { batch, len, start, layer: 0, angles: None, bias: SharedBias::default() });
        Ok(())
    }

    /// Enters a layer; a pass that starts in the middle of the model begins here.
    pub(crate) fn enter(&mut self, layer: usize, batch: usize, len: usize, limit: Option<usize>) -> Result<()> {
        if !self.has_begun(batch, len) {
            self.begin(batch, len, limit)?;
        }
        self.step_mut().layer = layer;
        Ok(())
    }

    /// The last layer is through: the new positions are past.
    pub(crate) fn commit(&mut self) {
        let Some(step) = self.step.take() else { return };
        if let Some(cache) = &mut self.cache {
            cache.set_len(step.start + step.len);
        }
    }

    fn step_mut(&mut self) -> &mut Step {
        self.step.as_mut().expect("a forward pass has begun")
    }

    /// How scores are biased in every layer of this pass.
    pub(crate) fn scores<'a>(&'a self, scale: f64, slopes: &'a [f32]) -> Scores<'a> {
        let bias = &self.step.as_ref().expect("a forward pass has begun").bias;
        Scores { scale, slopes, padding: &self.padding, bias }
    }

    /// Keys and values of all positions, given those of the new ones.
    pub(crate) fn past(&mut self, k: Tensor, v: Tensor) -> Result<(Tensor, Tensor)> {
        let (layer, start) = self.step.as_ref().map_or((0, 0), |step| (step.layer, step.start));
        match &mut self.cache {
            Some(cache) => cache.append(layer, start, &k, &v),
            None => Ok((k, v)),
        }
    }

    /// Cosines and sines for the positions of this pass, computed once for all layers.
    pub(crate) fn angles(&mut self, rotary: &Rotary, dtype: DType, device: &Device) -> Result<(Tensor, Tensor)> {
        let positions = self.positions();
        let step = self.step_mut();
        if step.angles.as_ref().is_none_or(|(of, ..)| of != rotary) {
            let (cos, sin) = rotary.angles(&positions, step.len, dtype, device)?;
            step.angles = Some((rotary.clone(), cos, sin));
        }
        let (_, cos, sin) = step.angles.as_ref().expect("just made");
        Ok((cos.clone(), sin.clone()))
    }

    /// Positions of this pass, row after row; one row stands for all where there is no padding. Padding is at position 0.
    pub(crate) fn positions(&self) -> Vec<usize> {
        let (start, len) = self.step.as_ref().map_or((0, 0), |step| (step.start, step.len));
        let row = |pad: usize| (start..start + len).map(move |i| i.saturating_sub(pad));
        if self.padding.is_empty() { row(0).collect() } else { self.padding.iter().flat_map(|&pad| row(pad)).collect() }
    }

    /// Whether somebody looks at `site` of the current layer.
    pub(crate) fn wants(&self, site: Site) -> bool {
        let layer = self.step.as_ref().map_or(0, |step| step.layer);
        self.taps.as_ref().is_some_and(|taps| taps.wants(site, layer))
    }

    /// Passes a tensor through the taps at `site` of the current layer.
    ///
    /// # Errors
    /// What an edit returns.
    pub fn tap(&mut self, site: Site, tensor: Tensor) -> Result<Tensor> {
        let layer = if site.is_per_layer() { self.step.as_ref().map_or(0, |step| step.layer) } else { 0 };
        match &mut self.taps {
            Some(taps) => taps.visit(site, layer, tensor),
            None => Ok(tensor),
        }
    }
}
