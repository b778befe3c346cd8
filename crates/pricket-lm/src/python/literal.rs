//! Python literals: formatting as `str` and `repr`, and parsing as `ast.literal_eval`.

use serde_json::{Number, Value, json};

/// Maximum nesting depth of parsed lists and tuples.
const MAX_DEPTH: usize = 64;

/// Formats a value as `str(value)`.
pub(crate) fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => repr(other),
    }
}

/// Formats a value as `repr(value)`.
pub(crate) fn repr(value: &Value) -> String {
    match value {
        Value::Null => "None".into(),
        Value::Bool(true) => "True".into(),
        Value::Bool(false) => "False".into(),
        Value::Number(number) => float(number).unwrap_or_else(|| number.to_string()),
        Value::String(text) => quoted(text),
        Value::Array(items) => format!("[{}]", items.iter().map(repr).collect::<Vec<_>>().join(", ")),
        Value::Object(entries) => {
            let entries: Vec<_> =
                entries.iter().map(|(key, value)| format!("{}: {}", quoted(key), repr(value))).collect();
            format!("{{{}}}", entries.join(", "))
        }
    }
}

/// Formats a float as `repr` does. Returns `None` for an integer.
fn float(number: &Number) -> Option<String> {
    let x = number.as_f64().filter(|_| number.is_f64())?;
    // Rust and Python both print the shortest digits. Python uses an exponent below 1e-4 and from 1e16 on.
    if x == 0.0 || (1e-4..1e16).contains(&x.abs()) {
        return Some(format!("{x:?}"));
    }
    let scientific = format!("{x:e}");
    let (digits, exponent) = scientific.split_once('e')?;
    let exponent: i32 = exponent.parse().ok()?;
    Some(format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs()))
}

fn quoted(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::from(quote);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == quote => out.extend(['\\', c]),
            c if is_printable(c) => out.push(c),
            c if (c as u32) < 0x100 => out.extend(format!("\\x{:02x}", c as u32).chars()),
            c if (c as u32) < 0x1_0000 => out.extend(format!("\\u{:04x}", c as u32).chars()),
            c => out.extend(format!("\\U{:08x}", c as u32).chars()),
        }
    }
    out.push(quote);
    out
}

/// Implements `str.isprintable` for a character. Control characters, format characters and separators other than the
/// space are not printable.
fn is_printable(c: char) -> bool {
    let formats = matches!(c, '\u{ad}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
        | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e000}'..='\u{f8ff}' | '\u{e0000}'..='\u{10ffff}');
    c == ' ' || !(c.is_control() || c.is_whitespace() || formats)
}

/// Implements `ast.literal_eval(text)` for strings, numbers, `True`, `False`, `None`, lists and tuples. Returns `None`
/// for anything else.
pub(crate) fn literal_eval(text: &str) -> Option<Value> {
    let mut parser = Parser { rest: text.trim_start_matches([' ', '\t']) };
    let value = parser.value(0)?;
    parser.skip_space();
    parser.rest.is_empty().then_some(value)
}

struct Parser<'a> {
    rest: &'a str,
}

impl Parser<'_> {
    fn skip_space(&mut self) {
        self.rest = self.rest.trim_start();
    }

    fn take(&mut self, token: &str) -> bool {
        self.skip_space();
        let rest = self.rest.strip_prefix(token);
        self.rest = rest.unwrap_or(self.rest);
        rest.is_some()
    }

    fn value(&mut self, depth: usize) -> Option<Value> {
        self.skip_space();
        match self.rest.chars().next().filter(|_| depth < MAX_DEPTH)? {
            '[' => self.items('[', ']', depth).map(|(items, _)| Value::Array(items)),
            '(' => match self.items('(', ')', depth)? {
                // Parentheses around one value make a tuple only with a trailing comma.
                (mut items, false) if items.len() == 1 => items.pop(),
                (items, _) => Some(Value::Array(items)),
            },
            '\'' | '"' => {
                let mut text = String::new();
                // Adjacent strings are one string.
                while self.rest.starts_with(['\'', '"']) {
                    self.string(&mut text)?;
                    self.skip_space();
                }
                Some(Value::String(text))
            }
            _ => self.word(),
        }
    }

    /// Returns the items between brackets, and whether a comma follows the last one.
    fn items(&mut self, open: char, close: char, depth: usize) -> Option<(Vec<Value>, bool)> {
        self.rest = self.rest.strip_prefix(open)?;
        let (mut items, mut comma) = (Vec::new(), false);
        loop {
            if self.take(close.encode_utf8(&mut [0; 4])) {
                return Some((items, comma));
            }
            if !items.is_empty() && !comma {
                return None;
            }
            items.push(self.value(depth + 1)?);
            comma = self.take(",");
        }
    }

    fn string(&mut self, out: &mut String) -> Option<()> {
        let quote = self.rest.chars().next()?;
        let mut chars = self.rest[1..].chars();
        loop {
            match chars.next()? {
                c if c == quote => break,
                '\n' => return None,
                '\\' => match chars.next()? {
                    'n' => out.push('\n'),
                    't' => out.push('\t'),
                    'r' => out.push('\r'),
                    '0' => out.push('\0'),
                    '\n' => {}
                    c @ ('\\' | '\'' | '"') => out.push(c),
                    c @ ('x' | 'u' | 'U') => {
                        let len = match c {
                            'x' => 2,
                            'u' => 4,
                            _ => 8,
                        };
                        let digits: String = chars.by_ref().take(len).collect();
                        let code = u32::from_str_radix(&digits, 16).ok().filter(|_| digits.len() == len)?;
                        out.push(char::from_u32(code)?);
                    }
                    other => out.extend(['\\', other]),
                },
                c => out.push(c),
            }
        }
        self.rest = chars.as_str();
        Some(())
    }

    fn word(&mut self) -> Option<Value> {
        let end =
            self.rest.find(|c: char| !(c.is_ascii_alphanumeric() || "+-._".contains(c))).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest;
        match word {
            "True" => Some(json!(true)),
            "False" => Some(json!(false)),
            "None" => Some(Value::Null),
            _ => word.parse::<i64>().map(|n| json!(n)).or_else(|_| word.parse::<f64>().map(|x| json!(x))).ok(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Expected values are from CPython 3.11.
    #[test]
    fn values_print_as_python_prints_them() {
        for (value, expected) in [
            (json!("it's"), "\"it's\""),
            (json!("it's \"it\""), "'it\\'s \"it\"'"),
            (json!("a\\b\n\t\u{7f}\u{a0}\u{200b}é"), "'a\\\\b\\n\\t\\x7f\\xa0\\u200bé'"),
            (json!([1, 2.0, true, null, "x"]), "[1, 2.0, True, None, 'x']"),
            (json!({"a": [0.1]}), "{'a': [0.1]}"),
            (json!([1e16, 1e-5, 123_456_789.5, 1.5e300, -2.5e-7]), "[1e+16, 1e-05, 123456789.5, 1.5e+300, -2.5e-07]"),
        ] {
            assert_eq!(repr(&value), expected);
        }
        assert_eq!(text(&json!("it's")), "it's");
    }

    #[test]
    fn literals_are_read_as_python_reads_them() {
        for (source, expected) in [
            ("['a', \"it's\", 'b' 'c']", Some(json!(["a", "it's", "bc"]))),
            (" [1, -2, 3.5, True, None,]", Some(json!([1, -2, 3.5, true, null]))),
            ("('a', 'b')", Some(json!(["a", "b"]))),
            ("('a')", Some(json!("a"))),
            ("('a',)", Some(json!(["a"]))),
            ("[]", Some(json!([]))),
            ("'\\x41\\u00e9\\q'", Some(json!("Aé\\q"))),
            ("['a' 1]", None),
            ("[a]", None),
            ("[,]", None),
            ("['a'", None),
            ("['a'] x", None),
            ("__import__('os')", None),
        ] {
            assert_eq!(literal_eval(source), expected, "{source}");
        }
        assert_eq!(literal_eval(&"[".repeat(100_000)), None);
    }

    proptest::proptest! {
        #[test]
        fn what_is_printed_is_read(texts in proptest::collection::vec(".*", 0..5)) {
            let value = json!(texts);
            proptest::prop_assert_eq!(literal_eval(&repr(&value)), Some(value));
        }

        #[test]
        fn nothing_panics(source in "[\\[\\]()'\"\\\\xuU,0-9a-f é-]{0,24}") {
            let _ = literal_eval(&source);
        }
    }
}
