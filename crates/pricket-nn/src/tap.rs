//! Taps: recording and editing tensors at named sites of a forward pass.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::Tensor;

use crate::{Error, Result, Span};

/// Place in a forward pass where a tensor can be recorded or edited.
///
/// In the shapes, `b` is the batch size, `t` the number of new positions, `s` the number of positions read so far
/// including the new ones, `d` the width and `h` the number of heads. In a packed pass `b` is 1 and `t` counts the
/// positions of all rows; [`Recording::spans`] gives the row of each position.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Site {
    /// After the embedding, `[b, t, d]`.
    Embed,
    /// Residual stream before a block, `[b, t, d]`.
    ResidPre,
    /// Residual stream between attention and MLP, `[b, t, d]`. Blocks with a parallel residual do not have this site.
    ResidMid,
    /// Residual stream after a block, `[b, t, d]`.
    ResidPost,
    /// Queries after rotation, `[b, h, t, head_dim]`.
    Query,
    /// Keys after rotation, `[b, h, t, head_dim]`.
    Key,
    /// Values, `[b, h, t, head_dim]`.
    Value,
    /// Attention probabilities, `[b, h, t, s]`. If the positions of the rows differ, there is one tensor for each row,
    /// `[1, h, t, s]`. Tapping this site disables fused attention.
    Pattern,
    /// Output of attention, which is added to the residual stream, `[b, t, d]`.
    AttentionOut,
    /// Output of the MLP, which is added to the residual stream, `[b, t, d]`.
    MlpOut,
    /// After the final norm, `[b, t, d]`.
    FinalNorm,
}

impl Site {
    /// Returns whether every layer has this site.
    pub fn is_per_layer(self) -> bool {
        !matches!(self, Site::Embed | Site::FinalNorm)
    }
}

/// All sites, in the order of a forward pass.
const SITES: [Site; 11] = [
    Site::Embed,
    Site::ResidPre,
    Site::Query,
    Site::Key,
    Site::Value,
    Site::Pattern,
    Site::AttentionOut,
    Site::ResidMid,
    Site::MlpOut,
    Site::ResidPost,
    Site::FinalNorm,
];

type Edit = Box<dyn FnMut(usize, &Tensor) -> Result<Tensor> + Send>;

/// Tensors to record and to edit during forward passes.
///
/// Starting a pass fails if a tap names a site or a layer that the model does not have.
///
/// ```
/// use pricket_nn::{Site, Taps};
/// let taps = Taps::new()
///     .record(Site::ResidPost) // in every layer
///     .record_at(Site::Pattern, 3) // in layer 3 only
///     .edit(Site::ResidPre, |_, x| Ok((x * 0.5)?)) // in every layer
///     .edit_at(Site::AttentionOut, 5, |x| Ok(x.zeros_like()?));
/// # drop(taps);
/// ```
#[derive(Default)]
pub struct Taps {
    record: Vec<(Site, Option<usize>)>,
    edits: Vec<(Site, Option<usize>, Edit)>,
    recording: Recording,
}

impl std::fmt::Debug for Taps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Taps {{ record: {:?}, edits: {} }}", self.record, self.edits.len())
    }
}

impl Taps {
    /// Returns taps that record and edit nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Records `site` in every layer.
    #[must_use]
    pub fn record(mut self, site: Site) -> Self {
        self.record.push((site, None));
        self
    }

    /// Records `site` in one layer.
    #[must_use]
    pub fn record_at(mut self, site: Site, layer: usize) -> Self {
        self.record.push((site, Some(layer)));
        self
    }

    /// Replaces the tensor at `site` by the result of `edit(layer, tensor)`, in every layer. Edits run before
    /// recording. For a site that exists once in the model, `layer` is 0.
    #[must_use]
    pub fn edit(mut self, site: Site, edit: impl FnMut(usize, &Tensor) -> Result<Tensor> + Send + 'static) -> Self {
        self.edits.push((site, None, Box::new(edit)));
        self
    }

    /// Replaces the tensor at `site` by the result of `edit(tensor)`, in one layer.
    #[must_use]
    pub fn edit_at(
        mut self,
        site: Site,
        layer: usize,
        mut edit: impl FnMut(&Tensor) -> Result<Tensor> + Send + 'static,
    ) -> Self {
        self.edits.push((site, Some(layer), Box::new(move |_, tensor| edit(tensor))));
        self
    }

    /// Checks that a model with `layers` blocks has every tapped site and layer. `has` returns whether it has a site.
    ///
    /// # Errors
    /// Returns [`Error::Input`] if a site or layer is missing. The message lists those that exist.
    pub(crate) fn check(&self, layers: usize, has: &dyn Fn(Site) -> bool) -> Result<()> {
        let of_edits = self.edits.iter().map(|(site, layer, _)| (*site, *layer));
        for (site, layer) in self.record.iter().copied().chain(of_edits) {
            if !has(site) {
                let sites = SITES.iter().filter(|site| has(**site)).map(|site| format!("{site:?}"));
                let sites = sites.collect::<Vec<_>>().join(", ");
                return Err(Error::Input(format!("this model has no site {site:?}; its sites are {sites}")));
            }
            if let Some(layer) = layer.filter(|&layer| layer >= if site.is_per_layer() { layers } else { 1 }) {
                let what = if site.is_per_layer() {
                    format!("site {site:?} of layer {layer}: the layers are 0 to {}", layers.saturating_sub(1))
                } else {
                    format!("site {site:?} of layer {layer}: this site exists once for all layers; use layer 0")
                };
                return Err(Error::Input(what));
            }
        }
        Ok(())
    }

    /// Returns whether `site` of `layer` is recorded or edited.
    pub(crate) fn wants(&self, site: Site, layer: usize) -> bool {
        self.records(site, layer)
            || self.edits.iter().any(|(at, only, _)| *at == site && only.is_none_or(|only| only == layer))
    }

    fn records(&self, site: Site, layer: usize) -> bool {
        self.record.iter().any(|&(at, only)| at == site && only.is_none_or(|only| only == layer))
    }

    /// Edits and records a tensor. `part` is its index among the tensors that the site has in this pass.
    pub(crate) fn visit(&mut self, site: Site, layer: usize, part: usize, tensor: Tensor) -> Result<Tensor> {
        let mut tensor = tensor;
        for (at, only, edit) in &mut self.edits {
            if *at == site && only.is_none_or(|only| only == layer) {
                tensor = edit(layer, &tensor)?;
            }
        }
        if self.records(site, layer) {
            let parts = self.recording.tensors.entry((site, layer)).or_default();
            parts.truncate(part);
            parts.push(tensor.clone());
        }
        Ok(tensor)
    }

    pub(crate) fn take(&mut self, spans: Arc<[Span]>) -> Recording {
        Recording { spans, ..std::mem::take(&mut self.recording) }
    }
}

/// Tensors that [`Taps`] recorded.
#[derive(Debug)]
pub struct Recording {
    tensors: BTreeMap<(Site, usize), Vec<Tensor>>,
    spans: Arc<[Span]>,
}

impl Default for Recording {
    fn default() -> Self {
        Self { tensors: BTreeMap::new(), spans: Arc::from([]) }
    }
}

impl Recording {
    /// Returns the tensor at `site` of `layer` from the last forward pass. For a site that exists once in the model,
    /// `layer` is 0.
    ///
    /// Returns `None` if nothing was recorded, or if there are several tensors; see [`Recording::parts`].
    pub fn get(&self, site: Site, layer: usize) -> Option<&Tensor> {
        match self.parts(site, layer) {
            [tensor] => Some(tensor),
            _ => None,
        }
    }

    /// Returns the tensors at `site` of `layer`: one for the whole pass, or one for each row in the order of
    /// [`Recording::spans`].
    pub fn parts(&self, site: Site, layer: usize) -> &[Tensor] {
        self.tensors.get(&(site, layer)).map_or(&[], Vec::as_slice)
    }

    /// Returns the rows and positions of the last forward pass, in the order of its tensors.
    pub fn spans(&self) -> &[Span] {
        &self.spans
    }

    /// Returns an iterator over all recorded tensors with their site and layer, in the order of sites, layers and rows.
    pub fn iter(&self) -> impl Iterator<Item = (Site, usize, &Tensor)> {
        self.tensors.iter().flat_map(|(&(site, layer), parts)| parts.iter().map(move |tensor| (site, layer, tensor)))
    }
}
