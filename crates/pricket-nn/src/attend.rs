//! Attention, the token shift and the WKV recurrence over the rows of a pass. Each row continues from its own past in
//! the state.

use candle_core::{D, Tensor};

use crate::ops::{self, AttentionRow, NewKeys, Scores};
use crate::rotary::Rotary;
use crate::{Context, Norm, Result, Site};

/// Queries, and the keys and values that they attend to.
struct Piece {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: usize,
}

impl Context {
    /// Causal attention of the new positions of each row to all positions of the row.
    ///
    /// `q` is `[b, h, t, head_dim]`; `k` and `v` are `[b, kv_heads, t, head_dim]`. All three hold new positions only.
    /// If the context has a state, the new keys and values are stored in it. Returns `[b, t, h · head_dim]`.
    ///
    /// # Errors
    /// Returns an error if the shapes do not match each other or the state.
    pub fn attend(&mut self, q: &Tensor, k: &Tensor, v: &Tensor, scores: Scores<'_>) -> Result<Tensor> {
        let wants_pattern = self.wants(Site::Pattern);
        let (pass, mut state) = self.parts()?;
        let mut kept = Vec::with_capacity(if state.is_some() { pass.spans().len() } else { 0 });
        if let Some(state) = &mut state {
            let mut new = Vec::with_capacity(pass.spans().len());
            for (span, (row, from)) in pass.places() {
                new.push(NewKeys { k, v, row, from, len: span.len, at: span.past });
                kept.push(state.slot_for(span.row, pass.layer, &new[new.len() - 1])?);
            }
            ops::store(&kept, &new)?;
        }
        let is_tracked = [q, k, v].into_iter().any(Tensor::track_op);
        if is_tracked && kept.is_empty() && !wants_pattern && ops::self_attention_is_fused(q, k, v) {
            return ops::self_attention(q, k, v, pass.own_spans(), scores);
        }
        if !ops::attention_is_fused(q, k, v) || wants_pattern {
            return self.attend_plainly([q, k, v], &kept, scores);
        }
        let rows = pass.places().enumerate().map(|(i, (span, (row, from)))| match kept.get(i) {
            Some(kept) => AttentionRow {
                keys: kept.clone(),
                values: kept.clone(),
                at: (0, 1),
                first: 0,
                len: span.past + span.len,
                queries: span.len,
            },
            None => AttentionRow {
                keys: k.clone(),
                values: v.clone(),
                at: (row, row),
                first: from,
                len: span.len,
                queries: span.len,
            },
        });
        ops::attention(q, rows.filter(|row| row.queries > 0).collect(), scores)
    }

    /// Rotates and attends in one operation that has a gradient.
    ///
    /// `qkv` is `[b, t, heads + 2 kv_heads, head_dim]` and holds queries, keys and values before rotation. Returns
    /// `None` if no gradient is tracked, if the context has a state, if a tap needs an intermediate tensor, or if there
    /// is no kernel.
    ///
    /// # Errors
    /// Returns an error if the shapes do not match.
    pub(crate) fn attend_fused(
        &mut self,
        qkv: &Tensor,
        heads: (usize, usize),
        rotary: Option<&Rotary>,
        scores: Scores<'_>,
    ) -> Result<Option<Tensor>> {
        let is_seen = [Site::Query, Site::Key, Site::Value, Site::Pattern].into_iter().any(|site| self.wants(site));
        if !qkv.track_op() || self.state().is_some() || is_seen {
            return Ok(None);
        }
        let angles = rotary.map(|rotary| self.angles(rotary, qkv.dtype(), qkv.device())).transpose()?;
        let spans = self.pass_mut()?.own_spans();
        ops::fused_self_attention(qkv, heads, angles, spans, scores)
    }

    /// [`Context::attend`] by plain operations, with taps on the pattern. Computes all rows at once if there is no past
    /// and the pass is not packed; otherwise row by row.
    fn attend_plainly(&mut self, new: [&Tensor; 3], kept: &[Tensor], scores: Scores<'_>) -> Result<Tensor> {
        let wants_pattern = self.wants(Site::Pattern);
        let pass = self.pass_mut()?;
        let [q, k, v] = new;
        let (is_packed, is_aligned, dim) = (pass.is_packed(), pass.is_aligned(), q.dim(D::Minus1)?);
        let is_tracked = new.iter().any(|x| x.track_op());
        let mut pieces = Vec::new();
        if kept.is_empty() && !is_packed {
            pieces.push(Piece { q: q.clone(), k: k.clone(), v: v.clone(), past: 0 });
        } else {
            for (i, (span, (row, from))) in pass.places().enumerate() {
                let own = |x: &Tensor| x.narrow(0, row, 1)?.narrow(2, from, span.len);
                let all = |part: usize, new: &Tensor| -> Result<Tensor> {
                    let Some(kept) = kept.get(i).map(|kept| kept.narrow(0, part, 1)).transpose()? else {
                        return Ok(own(new)?);
                    };
                    // Stored keys and values have no gradient, so tracked new positions are appended to the past
                    // instead.
                    let end = if is_tracked { span.past } else { span.past + span.len };
                    if end == 0 {
                        return Ok(own(new)?);
                    }
                    let past = ops::widened(&kept.narrow(2, 0, end)?, dim, q.dtype())?;
                    if is_tracked { Ok(Tensor::cat(&[&past, &own(new)?.contiguous()?], 2)?) } else { Ok(past) }
                };
                pieces.push(Piece { q: own(q)?, k: all(0, k)?, v: all(1, v)?, past: span.past });
            }
        }
        if wants_pattern && is_aligned && pieces.len() > 1 {
            // Aligned rows are joined, so that the batch has one pattern.
            let joined = |part: fn(&Piece) -> &Tensor| Tensor::cat(&pieces.iter().map(part).collect::<Vec<_>>(), 0);
            pieces = vec![Piece {
                q: q.clone(),
                k: joined(|piece| &piece.k)?,
                v: joined(|piece| &piece.v)?,
                past: pieces[0].past,
            }];
        }
        let mut out = Vec::with_capacity(pieces.len());
        for (i, Piece { q, k, v, past }) in pieces.into_iter().enumerate() {
            let bias = self.pass_mut()?.bias(scores.slopes, past, q.dim(2)?, q.device())?;
            let pattern = ops::attention_pattern(&q, &k, scores.scale, bias.as_ref())?;
            let pattern = self.tap_part(Site::Pattern, i, pattern)?;
            out.push(ops::attention_output(&pattern, &v)?);
        }
        match &out[..] {
            [out] => Ok(out.clone()),
            _ => Ok(Tensor::cat(&out, usize::from(is_packed))?),
        }
    }

    /// Token shift of RWKV. Returns `norm(x)` and the same tensor shifted by one position, both `[b, t, d]`.
    ///
    /// The first position of a row gets the vector that the state holds under `name`, or zeros if there is none. The
    /// last position of each row is saved under `name`.
    ///
    /// # Errors
    /// Returns an error if the shape of `x` is not that of the pass.
    pub fn token_shift(&mut self, norm: &Norm, x: &Tensor, name: &'static str) -> Result<(Tensor, Tensor)> {
        let (b, t, d) = x.dims3()?;
        let x = norm.forward(x)?;
        let (pass, state) = self.parts()?;
        let flat = x.reshape((b * t, d))?;
        let mut before = Vec::with_capacity(pass.spans().len() + 1);
        for span in pass.spans().iter() {
            let kept = state.as_ref().and_then(|state| state.recurrent(span.row, pass.layer, name));
            before.push(match kept {
                Some(kept) => kept.clone(),
                None => Tensor::zeros((1, d), x.dtype(), x.device())?,
            });
        }
        if state.is_some() {
            for (span, last) in pass.spans().clone().iter().zip(pass.last()) {
                // Copied, because a view would keep the tensor of the whole pass in memory.
                let last = flat.narrow(0, last as usize, 1)?.detach().copy()?;
                pass.recurrent.insert((pass.layer, span.row, name), last);
            }
        }
        if pass.spans().iter().all(|span| span.len == 1) {
            // With one position in each row, the previous positions are exactly the saved ones.
            return Ok((x, Tensor::cat(&before, 0)?.reshape((b, t, d))?));
        }
        before.push(flat);
        let shifts = pass.shifts(x.device())?;
        let before = Tensor::cat(&before, 0)?.index_select(&shifts, 0)?.reshape((b, t, d))?;
        Ok((x, before))
    }

    /// WKV recurrence of RWKV-4; see [`ops::wkv4`] for the formula.
    ///
    /// `k` and `v` are `[b, t, d]`; `decay` and `first` are the parameters `time_decay` and `time_first`, `[d]`. The
    /// recurrence continues from the tensor that the state holds under `name`, and saves its result there. Returns
    /// `[b, t, d]`.
    ///
    /// # Errors
    /// Returns an error if the shapes do not match each other or the pass.
    pub fn wkv4(
        &mut self,
        k: &Tensor,
        v: &Tensor,
        decay: &Tensor,
        first: &Tensor,
        name: &'static str,
    ) -> Result<Tensor> {
        let (b, t, d) = k.dims3()?;
        let (pass, state) = self.parts()?;
        let mut before = Vec::with_capacity(pass.spans().len());
        for span in pass.spans().iter() {
            let kept = state.as_ref().and_then(|state| state.recurrent(span.row, pass.layer, name));
            before.push(kept.map_or_else(|| ops::wkv4_initial_state(d, k.device()), |kept| Ok(kept.clone()))?);
        }
        let lens: Vec<usize> = pass.spans().iter().map(|span| span.len).collect();
        let (k, v) = (k.reshape((b * t, d))?, v.reshape((b * t, d))?);
        let (out, after) = ops::wkv4(&k, &v, decay, first, &lens, &before)?;
        if state.is_some() {
            for (span, after) in pass.spans().clone().iter().zip(after) {
                pass.recurrent.insert((pass.layer, span.row, name), after);
            }
        }
        Ok(out.reshape((b, t, d))?)
    }
}
