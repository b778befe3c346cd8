//! Parsing of sizes in flags.

/// Parses a size in bytes, such as `50GB`, `200 MiB`, `1.5g` or `1000000`.
pub(crate) fn parse(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let (digits, unit) = text.split_at(text.trim_end_matches(|c: char| c.is_ascii_alphabetic()).len());
    let unit: f64 = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kb" => 1e3,
        "m" | "mb" => 1e6,
        "g" | "gb" => 1e9,
        "t" | "tb" => 1e12,
        "kib" => 1024.0,
        "mib" => 1024f64.powi(2),
        "gib" => 1024f64.powi(3),
        "tib" => 1024f64.powi(4),
        _ => return Err("expected a number of bytes, such as 3GB, 500MiB or 1000000".into()),
    };
    let number: f64 = digits.trim().parse().map_err(|_| "expected a number of bytes, such as 3GB".to_string())?;
    if number.is_finite() && number >= 0.0 {
        Ok((number * unit) as u64)
    } else {
        Err("expected a size of 0 or more".into())
    }
}
