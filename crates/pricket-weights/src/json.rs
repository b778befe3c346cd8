//! JSON with the non-standard numbers of Python's `json` module.

use serde_json::Value;

/// Parses JSON, including the numbers `NaN`, `Infinity` and `-Infinity`, which Python's `json` module writes.
///
/// These three numbers become strings of the same names, so that they are never mistaken for valid numbers. A byte
/// order mark is skipped.
///
/// # Errors
/// Returns an error with line and column if the text is not valid JSON.
///
/// ```
/// let json = pricket_weights::parse_json(br#"{"a": Infinity, "b": "NaN", "c": [NaN, 1]}"#)?;
/// assert_eq!(json, serde_json::json!({"a": "Infinity", "b": "NaN", "c": ["NaN", 1]}));
/// # Ok::<(), serde_json::Error>(())
/// ```
pub fn parse_json(bytes: &[u8]) -> serde_json::Result<Value> {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    // Standard JSON needs no second pass. The first error is returned, because the columns in the replaced text differ.
    serde_json::from_slice(bytes).or_else(|e| match with_quoted_numbers(bytes) {
        Some(quoted) => serde_json::from_slice(&quoted).map_err(|_| e),
        None => Err(e),
    })
}

/// Writes JSON for Python, the inverse of [`parse_json`]: the strings `NaN`, `Infinity` and `-Infinity` become numbers.
pub fn to_python_json(value: &Value) -> String {
    let text = serde_json::to_string_pretty(value).unwrap_or_default();
    // In pretty-printed JSON a value stands alone on its line or after a key and a colon. Strings contain no line
    // breaks.
    let lines = text.split('\n').map(|line| {
        let (rest, comma) = line.strip_suffix(',').map_or((line, ""), |rest| (rest, ","));
        let special = SPECIAL.iter().find_map(|name| {
            let before = rest.strip_suffix(&format!("\"{name}\""))?;
            (before.trim_start().is_empty() || before.ends_with("\": ")).then(|| format!("{before}{name}{comma}"))
        });
        special.unwrap_or_else(|| line.to_owned())
    });
    lines.collect::<Vec<_>>().join("\n")
}

const SPECIAL: [&str; 3] = ["-Infinity", "Infinity", "NaN"];

/// Puts quotes around these numbers outside of strings. Returns `None` if there are none.
fn with_quoted_numbers(bytes: &[u8]) -> Option<Vec<u8>> {
    let (mut out, mut at, mut in_text, mut found) = (Vec::with_capacity(bytes.len() + 64), 0, false, false);
    while at < bytes.len() {
        let rest = &bytes[at..];
        if in_text && rest[0] == b'\\' && rest.len() > 1 {
            out.extend_from_slice(&rest[..2]);
            at += 2;
            continue;
        }
        in_text ^= rest[0] == b'"';
        if !in_text && let Some(name) = SPECIAL.iter().find(|name| rest.starts_with(name.as_bytes())) {
            out.push(b'"');
            out.extend_from_slice(name.as_bytes());
            out.push(b'"');
            at += name.len();
            found = true;
            continue;
        }
        out.push(rest[0]);
        at += 1;
    }
    found.then_some(out)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn numbers_of_python_are_read_outside_of_strings_only() {
        let text = br#"{"a\"NaN": NaN, "b": "x, NaN", "c": [-Infinity,Infinity], "d": {"Infinity": 1}}"#;
        let value = parse_json(text).unwrap();
        let expected = json!({"a\"NaN": "NaN", "b": "x, NaN", "c": ["-Infinity", "Infinity"], "d": {"Infinity": 1}});
        assert_eq!(value, expected);
        // A string that contains one of these words stays a string.
        for text in ["x\"NaN", "NaN,", "a\": \"NaN", "NaN\n", "-Infinity\\"] {
            let value = json!({"a": text, "b": [text]});
            assert_eq!(parse_json(to_python_json(&value).as_bytes()).unwrap(), value, "{text:?}");
        }
        let written = to_python_json(&value);
        assert!(
            written.contains(r#""a\"NaN": NaN"#)
                && written.contains("-Infinity,\n")
                && written.contains(r#""Infinity": 1"#)
        );
        assert_eq!(parse_json(written.as_bytes()).unwrap(), value);
        for bad in ["{\"a\": NaN", "{\"a\": Nan}", "{\"a\": +Infinity}", "{\"a\": NaNa}"] {
            assert!(parse_json(bad.as_bytes()).is_err(), "{bad}");
        }
        assert_eq!(parse_json("\u{feff}{}".as_bytes()).unwrap(), json!({}));
    }

    #[test]
    fn numbers_are_the_nearest_floats() {
        for x in [47.0 / 52.0, 1e-5, 1e-6, 0.1 + 0.2, 5e-324, f64::MAX] {
            assert_eq!(parse_json(format!("{x:?}").as_bytes()).unwrap().as_f64(), Some(x));
        }
        // The harness's accuracy for 47 of 52 documents. Inexact parsers read it as the neighboring float.
        assert_eq!(parse_json(b"0.9038461538461539").unwrap().as_f64(), Some(47.0 / 52.0));
    }
}
