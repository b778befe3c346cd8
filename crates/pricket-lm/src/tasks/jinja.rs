//! Templates of task files, rendered as in lm-evaluation-harness: Jinja with the methods of Python's strings and lists.
//! Values are printed in Python syntax.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, UndefinedBehavior};
use minijinja_contrib::pycompat;
use regex::Regex;
use serde_json::Value;

use crate::python::{self, capitalize, is_space};

/// Maximum number of steps of a template. Bounds loops, and the depth of the values that they build.
const FUEL: u64 = 100_000;

/// Maximum nesting depth of lists and dictionaries.
const MAX_DEPTH: usize = 64;

/// Maximum size of a template, in bytes.
///
/// The parser rejects deeply nested brackets. A chain such as `a ~ b ~ c`, `not not a` or of `elif`s is still a tree as
/// deep as the chain is long, and the compiler recurses through it.
const MAX_TEMPLATE: usize = 16 << 10;

/// Stack size of the thread that compiles a template, in bytes. Large enough for every template of [`MAX_TEMPLATE`]
/// bytes.
const STACK: usize = 64 << 20;

/// Templates of a task, by name.
#[derive(Debug)]
pub(super) struct Templates(Environment<'static>);

impl Templates {
    pub(super) fn new() -> Result<Self, String> {
        let mut templates = Environment::new();
        // A missing key of a document is an error. It does not render as an empty string.
        templates.set_undefined_behavior(UndefinedBehavior::Strict);
        templates.set_syntax(SyntaxConfig::builder().keep_trailing_newline(true).build().map_err(|e| e.to_string())?);
        templates.set_unknown_method_callback(method);
        templates.add_filter("regex_replace", regex_replace);
        templates.set_fuel(Some(FUEL));
        templates.set_formatter(|out, _, value| {
            if is_deeper(value, MAX_DEPTH) {
                return Err(wrong(format!("the value is nested deeper than {MAX_DEPTH} levels")));
            }
            let value =
                serde_json::to_value(value).map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))?;
            out.write_str(&python::text(&value)).map_err(Error::from)
        });
        Ok(Self(templates))
    }

    /// Adds the template of a key of the task file.
    pub(super) fn add(&mut self, key: &'static str, source: String) -> Result<(), String> {
        if !source.contains(['{', '}']) {
            return self.0.add_template_owned(key, source).map_err(|e| format!("{key}: {e:#}"));
        }
        compile(key, source.len(), || self.0.add_template_owned(key, source))
    }

    /// Renders a template for a document.
    pub(super) fn render(&self, key: &str, document: &Value) -> Result<String, String> {
        let template = self.0.get_template(key).map_err(|e| format!("{key}: {e:#}"))?;
        template.render(minijinja::Value::from(Serde(document))).map_err(|e| format!("{key}: {e:#}"))
    }

    /// Returns an error if an expression does not compile.
    pub(super) fn check(&self, key: &str, source: &str) -> Result<(), String> {
        compile(key, source.len(), || self.0.compile_expression(source)).map(drop)
    }

    /// Evaluates an expression for a document.
    pub(super) fn evaluate(&self, key: &str, source: &str, document: &Value) -> Result<Value, String> {
        let expression = compile(key, source.len(), || self.0.compile_expression(source))?;
        let value = expression.eval(minijinja::Value::from(Serde(document))).map_err(|e| format!("{key}: {e:#}"))?;
        serde_json::to_value(value).map_err(|e| format!("{key}: {e}"))
    }
}

/// Compiles a source of `len` bytes, at most [`MAX_TEMPLATE`], on a thread with a stack of [`STACK`] bytes.
fn compile<T: Send>(key: &str, len: usize, f: impl FnOnce() -> Result<T, Error> + Send) -> Result<T, String> {
    if len > MAX_TEMPLATE {
        return Err(format!("{key}: the template is {len} bytes; the limit is {MAX_TEMPLATE}"));
    }
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK).spawn_scoped(scope, f);
        let compiled = thread.map_err(|e| format!("{key}: {e}"))?.join();
        compiled.map_err(|_| format!("{key}: the template compiler panicked"))?.map_err(|e| format!("{key}: {e:#}"))
    })
}

/// Calls a method of a Python string or list.
fn method(
    state: &mut State<'_, '_>,
    value: &minijinja::Value,
    method: &str,
    args: &[minijinja::Value],
) -> Result<minijinja::Value, Error> {
    match (value.as_str(), method, args) {
        // `str.isspace` and `str.capitalize` differ from Rust's rules for a few characters.
        (Some(text), "strip", []) => Ok(text.trim_matches(is_space).into()),
        (Some(text), "lstrip", []) => Ok(text.trim_start_matches(is_space).into()),
        (Some(text), "rstrip", []) => Ok(text.trim_end_matches(is_space).into()),
        (Some(text), "capitalize", []) => Ok(capitalize(text).into()),
        (Some(text), "split", []) => {
            Ok(text.split(is_space).filter(|word| !word.is_empty()).map(minijinja::Value::from).collect())
        }
        (Some(text), "index", [part]) => {
            let at = part.as_str().and_then(|part| text.find(part));
            let at = at.ok_or_else(|| wrong(format!("{part} is not in {}", python::repr(&text.into()))))?;
            Ok(text[..at].chars().count().into())
        }
        (None, "index", [item]) if value.kind() == ValueKind::Seq => {
            let at = value.try_iter()?.position(|other| other == *item);
            Ok(at.ok_or_else(|| wrong(format!("{item} is not in the list {value}")))?.into())
        }
        _ => pycompat::unknown_method_callback(state, value, method, args),
    }
}

/// Returns whether a value is nested deeper than `depth`.
fn is_deeper(value: &minijinja::Value, depth: usize) -> bool {
    match value.kind() {
        ValueKind::Seq | ValueKind::Iterable => {
            depth == 0 || value.try_iter().is_ok_and(|mut items| items.any(|item| is_deeper(&item, depth - 1)))
        }
        ValueKind::Map => {
            let is_deep = |key| value.get_item(&key).is_ok_and(|item| is_deeper(&item, depth - 1));
            depth == 0 || value.try_iter().is_ok_and(|mut keys| keys.any(is_deep))
        }
        _ => false,
    }
}

/// Implements the filter `regex_replace` of the harness: Python's `re.sub(pattern, repl, text, count)`.
fn regex_replace(text: &str, pattern: &str, replacement: &str, count: Option<usize>) -> Result<String, Error> {
    let found = Regex::new(pattern).map_err(|e| wrong(format!("regex_replace: {e}")))?;
    let replacement = replacement_of(replacement, found.captures_len())?;
    Ok(found.replacen(text, count.unwrap_or(0), &*replacement).into_owned())
}

/// Converts a replacement from Python's syntax to that of the crate `regex`: `\1` and `\g<1>` become `${1}`, `$`
/// becomes `$$`.
fn replacement_of(python: &str, groups: usize) -> Result<String, Error> {
    let unknown = || wrong(format!("regex_replace: the replacement {python:?} is not supported"));
    let mut out = String::new();
    let mut chars = python.chars().peekable();
    while let Some(c) = chars.next() {
        if c != '\\' {
            out.push(c);
            // A doubled dollar sign is a literal one.
            if c == '$' {
                out.push(c);
            }
            continue;
        }
        let mut digits = String::new();
        match chars.next().ok_or_else(unknown)? {
            '\\' => out.push('\\'),
            'n' => out.push('\n'),
            't' => out.push('\t'),
            'r' => out.push('\r'),
            'g' => {
                let rest: String = chars.by_ref().take_while(|c| *c != '>').collect();
                let name = rest.strip_prefix('<').filter(|name| !name.is_empty()).ok_or_else(unknown)?;
                if !python.contains(&format!("\\g<{name}>")) {
                    return Err(unknown());
                }
                digits.push_str(name);
            }
            digit @ '1'..='9' => {
                digits.push(digit);
                digits.extend(chars.next_if(char::is_ascii_digit));
                // In Python, three digits are an octal character code.
                if digits.len() == 2 && chars.peek().is_some_and(char::is_ascii_digit) {
                    return Err(unknown());
                }
            }
            _ => return Err(unknown()),
        }
        if !digits.is_empty() {
            let group: usize = digits.parse().ok().filter(|&group| group < groups).ok_or_else(unknown)?;
            out.push_str("${");
            out.push_str(&group.to_string());
            out.push('}');
        }
    }
    Ok(out)
}

fn wrong(what: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, what)
}
