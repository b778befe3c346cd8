//! Flags for speculative decoding.

use std::path::PathBuf;

use pricket::text::{Speculation, SpeculationOptions};
use pricket::{Loader, Pricket};

use super::common::{ComputeArgs, tell};

/// Speculative decoding.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct DraftArgs {
    /// Much smaller model with the same tokenizer that drafts tokens, which the model then checks in one pass. The text
    /// does not change. Takes the same values as --model
    #[arg(long, value_name = "MODEL")]
    draft: Option<PathBuf>,
    /// Maximum number of draft tokens per step, 1 to 7
    #[arg(long, value_name = "N", default_value_t = SpeculationOptions::default().tokens, requires = "draft")]
    draft_tokens: usize,
    /// Use the draft model even where it makes decoding slower
    #[arg(long, requires = "draft")]
    always_draft: bool,
}

impl DraftArgs {
    /// Loads the draft model, if there is one, with the flags of the model.
    pub(crate) fn load(&self, compute: &ComputeArgs) -> pricket::Result<Option<(Pricket, SpeculationOptions)>> {
        let Some(draft) = &self.draft else { return Ok(None) };
        let options = SpeculationOptions { tokens: self.draft_tokens, adaptive: !self.always_draft };
        options.check()?;
        #[allow(unused_mut, reason = "there are no adapters without the feature `train`")]
        let mut compute = compute.clone();
        #[cfg(feature = "train")]
        compute.adapter.clear();
        let loaded = compute.configure(Loader::new(draft))?.precision(compute.dtype).load()?;
        for warning in loaded.warnings() {
            tell(format_args!("warning: draft model: {warning}"));
        }
        Ok(Some((loaded, options)))
    }
}

/// Prints the measurements of speculative decoding on stderr.
pub(crate) fn report(found: &Speculation) {
    tell(format_args!("{}", described(found)));
}

fn described(found: &Speculation) -> String {
    if found.drafted == 0 {
        return "draft: too few tokens to try the draft model".into();
    }
    let acceptance = 100.0 * found.acceptance();
    let millis = |seconds: f64| format!("{:.1} ms", 1e3 * seconds);
    let text = format!(
        "draft: {} of {} tokens accepted ({acceptance:.0} %), {:.2} tokens a step; draft {}, check {}",
        found.accepted,
        found.drafted,
        found.tokens_per_step,
        millis(found.draft_seconds),
        millis(found.verify_seconds)
    );
    if found.plain_seconds.is_nan() {
        return text;
    }
    let needed =
        if found.break_even > 1.0 { "more than 100".into() } else { format!("{:.0}", 100.0 * found.break_even) };
    let off = if found.is_on { "" } else { "; turned off" };
    format!("{text}, step without draft {}; pays above {needed} %{off}", millis(found.plain_seconds))
}
