//! Names of branches that hold training steps.

/// The training step that a branch is named after: `step3000` is 3000.
pub fn step_of(revision: &str) -> Option<u64> {
    let digits = revision.strip_prefix("step")?;
    // No sign and no leading zero, so that a step has one name.
    let plain = digits.bytes().all(|b| b.is_ascii_digit()) && (digits == "0" || !digits.starts_with('0'));
    if plain { digits.parse().ok() } else { None }
}
