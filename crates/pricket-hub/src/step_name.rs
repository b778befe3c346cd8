//! Branch names of training steps.

/// Returns the training step in a branch name: 3000 for `step3000`. Returns `None` for other names.
pub fn step_of(revision: &str) -> Option<u64> {
    let digits = revision.strip_prefix("step")?;
    // Rejects signs and leading zeros, so that each step has exactly one name.
    let plain = digits.bytes().all(|b| b.is_ascii_digit()) && (digits == "0" || !digits.starts_with('0'));
    if plain { digits.parse().ok() } else { None }
}
