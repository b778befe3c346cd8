//! Places in a forward pass where a tensor can be looked at or changed.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::Tensor;

use crate::{Error, Result, Span};

/// A place in a forward pass where a tensor can be looked at or changed. `b` is the batch, `t` the new positions,
/// `s` the positions seen so far, `d` the width, `h` the heads. In a packed pass `b` is 1, `t` counts the positions of all
/// rows, and [`Recording::spans`] says whose they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Site {
    /// After the embedding, `[b, t, d]`.
    Embed,
    /// Residual stream before a block, `[b, t, d]`.
    ResidPre,
    /// Residual stream between attention and MLP, `[b, t, d]`; parallel blocks have none.
    ResidMid,
    /// Residual stream after a block, `[b, t, d]`.
    ResidPost,
    /// Queries after rotation, `[b, h, t, head_dim]`.
    Query,
    /// Keys after rotation, `[b, h, t, head_dim]`.
    Key,
    /// Values, `[b, h, t, head_dim]`.
    Value,
    /// Attention probabilities, `[b, h, t, s]`; where rows differ in their positions one tensor for each row, `[1, h, t, s]`.
    /// Asking for them selects the unfused attention.
    Pattern,
    /// What attention adds to the residual stream, `[b, t, d]`.
    AttentionOut,
    /// What the MLP adds to the residual stream, `[b, t, d]`.
    MlpOut,
    /// After the final norm, `[b, t, d]`.
    FinalNorm,
}

impl Site {
    /// Whether there is one per layer.
    pub fn is_per_layer(self) -> bool {
        !matches!(self, Site::Embed | Site::FinalNorm)
    }
}

/// Every site, in the order of a forward pass.
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

/// What to record and what to change during forward passes. Without taps, nothing is spent on them. A tap that cannot fire, at a
/// site or layer that the model does not have, is an error when a pass begins.
///
/// ```
/// use pricket_nn::{Site, Taps};
/// let taps = Taps::new()
///     .record(Site::ResidPost)                       // of every layer
///     .record_at(Site::Pattern, 3)                   // of layer 3 alone
///     .edit(Site::ResidPre, |_, x| Ok((x * 0.5)?))     // of every layer
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
    /// Taps that do nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Records `site`, of every layer where it is per layer.
    #[must_use]
    pub fn record(mut self, site: Site) -> Self {
        self.record.push((site, None));
        self
    }

    /// Records `site` of one layer.
    #[must_use]
    pub fn record_at(mut self, site: Site, layer: usize) -> Self {
        self.record.push((site, Some(layer)));
        self
    }

    /// Replaces the tensor at `site` by what `edit(layer, tensor)` returns, before it is recorded. The layer of a
    /// site that is not per layer is 0.
    #[must_use]
    pub fn edit(mut self, site: Site, edit: impl FnMut(usize, &Tensor) -> Result<Tensor> + Send + 'static) -> Self {
        self.edits.push((site, None, Box::new(edit)));
        self
    }

    /// As [`Taps::edit`], of one layer.
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

    /// Refuses taps that cannot fire in a model of `layers` blocks, which have the sites that `has` says.
    ///
    /// # Errors
    /// [`Error::Input`], naming the tap and what there is.
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
                    format!("{site:?} of layer {layer}: the layers are 0 to {}", layers.saturating_sub(1))
                } else {
                    format!("{site:?} of layer {layer}: there is one for all layers, at layer 0")
                };
                return Err(Error::Input(what));
            }
        }
        Ok(())
    }

    /// Whether anything here looks at `site` of `layer`.
    pub(crate) fn wants(&self, site: Site, layer: usize) -> bool {
        self.records(site, layer)
            || self.edits.iter().any(|(at, only, _)| *at == site && only.is_none_or(|only| only == layer))
    }

    fn records(&self, site: Site, layer: usize) -> bool {
        self.record.iter().any(|&(at, only)| at == site && only.is_none_or(|only| only == layer))
    }

    /// Edits and records a tensor, the one with number `part` of those that the site has in this pass.
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

/// The tensors that [`Taps`] kept, owned.
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
    /// The tensor of `site` at `layer` (0 for sites that are not per layer), from the last forward pass. `None` if nothing was
    /// recorded there, or several tensors: see [`Recording::parts`].
    pub fn get(&self, site: Site, layer: usize) -> Option<&Tensor> {
        match self.parts(site, layer) {
            [tensor] => Some(tensor),
            _ => None,
        }
    }

    /// The tensors of `site` at `layer`: one for the pass, or one for each row, in the order of [`Recording::spans`].
    pub fn parts(&self, site: Site, layer: usize) -> &[Tensor] {
        self.tensors.get(&(site, layer)).map_or(&[], Vec::as_slice)
    }

    /// The rows and positions of the last forward pass, in the order of its tensors.
    pub fn spans(&self) -> &[Span] {
        &self.spans
    }

    /// Everything recorded, in the order of sites, layers and rows.
    pub fn iter(&self) -> impl Iterator<Item = (Site, usize, &Tensor)> {
        self.tensors.iter().flat_map(|(&(site, layer), parts)| parts.iter().map(move |tensor| (site, layer, tensor)))
    }
}
