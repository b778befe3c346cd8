//! Templates as lm-evaluation-harness renders them: Jinja with the methods of Python's strings and lists, and with
//! values formatted as in Python.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, UndefinedBehavior};
use minijinja_contrib::pycompat;
use regex::Regex;
use serde_json::Value;

use crate::python::{self, capitalize, is_space};

/// Largest number of steps of a template. It ends loops in a task file and prevents values too deep for the stack.
const FUEL: u64 = 100_000;

/// Deepest nesting of lists and dictionaries.
const MAX_DEPTH: usize = 64;

/// Largest size of a template in bytes, and of the stack of its compiler. The parser refuses deep brackets, but a chain
/// such as `a ~ b ~ c`, `not not a` or of `elif`s is a tree as deep as it is long, which the compiler visits
/// recursively.
const MAX_TEMPLATE: usize = 16 << 10;
const STACK: usize = 64 << 20;

/// The templates of a task, by name.
#[derive(Debug)]
pub(super) struct Templates(Environment<'static>);

impl Templates {
    pub(super) fn new() -> Result<Self, String> {
        let mut templates = Environment::new();
        // A key that a document lacks is an error, not an empty text.
        templates.set_undefined_behavior(UndefinedBehavior::Strict);
        templates.set_syntax(SyntaxConfig::builder().keep_trailing_newline(true).build().map_err(|e| e.to_string())?);
        templates.set_unknown_method_callback(method);
        templates.add_filter("regex_replace", regex_replace);
        templates.set_fuel(Some(FUEL));
        templates.set_formatter(|out, _, value| {
            if is_deeper(value, MAX_DEPTH) {
                return Err(wrong(format!("a value nested deeper than {MAX_DEPTH} levels")));
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

    /// Checks an expression.
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

/// Compiles a template of `len` bytes on a stack that is large enough for the largest allowed template.
fn compile<T: Send>(key: &str, len: usize, f: impl FnOnce() -> Result<T, Error> + Send) -> Result<T, String> {
    if len > MAX_TEMPLATE {
        return Err(format!("{key}: a template of {len} bytes; {MAX_TEMPLATE} are possible"));
    }
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK).spawn_scoped(scope, f);
        let compiled = thread.map_err(|e| format!("{key}: {e}"))?.join();
        compiled.map_err(|_| format!("{key}: the compiler of templates failed"))?.map_err(|e| format!("{key}: {e:#}"))
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
        // `str.isspace` and `str.capitalize` differ from Rust's functions for a few characters.
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

/// The harness's own filter: `re.sub(pattern, repl, text, count)`.
fn regex_replace(text: &str, pattern: &str, replacement: &str, count: Option<usize>) -> Result<String, Error> {
    let found = Regex::new(pattern).map_err(|e| wrong(format!("regex_replace: {e}")))?;
    let replacement = replacement_of(replacement, found.captures_len())?;
    Ok(found.replacen(text, count.unwrap_or(0), &*replacement).into_owned())
}

/// Converts a replacement from Python's notation to that of the crate `regex`: `\1` and `\g<1>` become `${1}`, and a
/// dollar sign stays one.
fn replacement_of(python: &str, groups: usize) -> Result<String, Error> {
    let unknown = || wrong(format!("regex_replace: the replacement {python:?} is not supported"));
    let mut out = String::new();
    let mut chars = python.chars().peekable();
    while let Some(c) = chars.next() {
        if c != '\\' {
            out.push(c);
            // A doubled backslash is no reference.
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
                // In Python, three digits are the number of a character.
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
