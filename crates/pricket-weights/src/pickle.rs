//! A pickle reader that cannot execute code.
//!
//! A pickle is a program for a stack machine. This machine implements only the opcodes that build numbers, strings and
//! containers. `GLOBAL` resolves to a member of [`Global`] or fails. `REDUCE` does not call anything: it builds a value
//! of this module. Values are stored in an arena and refer to each other by index, so deeply nested pickles cannot
//! overflow the stack and cycles are harmless.

use crate::Dtype;
use crate::error::clip;

/// Index of a value in [`Pickle::values`].
pub(crate) type Id = u32;

/// Maximum number of values. A tensor takes about 30, the largest known file 15,000.
const MAX_VALUES: usize = 1 << 17;

/// Maximum number of arguments of `REDUCE`. `_rebuild_tensor_v2` takes seven.
const MAX_ARGUMENTS: usize = 16;

/// Maximum length of a storage key in bytes. Keys are small decimal numbers.
const MAX_KEY: usize = 64;

/// The only globals that a pickle may name.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Global {
    RebuildTensor,
    RebuildParameter,
    OrderedDict,
    Size,
    /// `_codecs.encode`, which protocol 2 uses for bytes objects.
    Encode,
    Storage(Dtype),
}

impl Global {
    fn find(module: &str, name: &str) -> Option<Self> {
        Some(match (module, name) {
            ("torch._utils", "_rebuild_tensor_v2" | "_rebuild_tensor") => Global::RebuildTensor,
            ("torch._utils", "_rebuild_parameter") => Global::RebuildParameter,
            ("collections", "OrderedDict") => Global::OrderedDict,
            ("torch", "Size") => Global::Size,
            ("_codecs", "encode") => Global::Encode,
            ("torch", "DoubleStorage") => Global::Storage(Dtype::F64),
            ("torch", "FloatStorage") => Global::Storage(Dtype::F32),
            ("torch", "HalfStorage") => Global::Storage(Dtype::F16),
            ("torch", "BFloat16Storage") => Global::Storage(Dtype::BF16),
            ("torch", "LongStorage") => Global::Storage(Dtype::I64),
            ("torch", "IntStorage") => Global::Storage(Dtype::I32),
            ("torch", "ShortStorage") => Global::Storage(Dtype::I16),
            ("torch", "CharStorage") => Global::Storage(Dtype::I8),
            ("torch", "ByteStorage") => Global::Storage(Dtype::U8),
            ("torch", "BoolStorage") => Global::Storage(Dtype::Bool),
            _ => return None,
        })
    }
}

/// A reference to the storage of a tensor, the entry `data/KEY` of the archive.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct StorageRef {
    pub(crate) key: String,
    pub(crate) dtype: Dtype,
    /// Number of elements that the pickle claims. The caller checks it against the archive.
    pub(crate) elements: u64,
}

/// A strided view of a storage. Offset and strides are in elements.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TensorRef {
    pub(crate) storage: StorageRef,
    pub(crate) offset: u64,
    pub(crate) shape: Vec<u64>,
    pub(crate) stride: Vec<u64>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Str(String),
    Bytes,
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Global(Global),
    Storage(StorageRef),
    Tensor(TensorRef),
}

impl Value {
    /// Returns the kind of the value for messages, without its contents, which may be long.
    fn kind(&self) -> &'static str {
        match self {
            Value::None => "None",
            Value::Bool(_) => "a bool",
            Value::Int(_) => "a negative number",
            Value::Float(_) => "a float",
            Value::Str(_) => "a string",
            Value::Bytes => "bytes",
            Value::Tuple(_) => "a tuple",
            Value::List(_) => "a list",
            Value::Dict(_) => "a dictionary",
            Value::Global(_) => "a callable",
            Value::Storage(_) => "a storage",
            Value::Tensor(_) => "a tensor",
        }
    }
}

/// The values that a pickle built, with the index of the result.
#[derive(Debug)]
pub(crate) struct Pickle {
    pub(crate) values: Vec<Value>,
    pub(crate) root: Id,
}

impl Pickle {
    pub(crate) fn get(&self, id: Id) -> &Value {
        &self.values[id as usize]
    }
}

/// The reason why a pickle was rejected.
#[derive(Debug, PartialEq)]
pub(crate) enum Fault {
    /// The pickle names a global outside of [`Global`].
    Forbidden(String),
    /// The pickle is invalid, or not of the kind that torch writes.
    Malformed(String),
}

type Result<T> = std::result::Result<T, Fault>;

fn malformed<T>(what: impl Into<String>) -> Result<T> {
    Err(Fault::Malformed(what.into()))
}

fn find_global(module: &str, name: &str) -> Result<Global> {
    Global::find(module, name).ok_or_else(|| Fault::Forbidden(clip(&format!("{module:.200} {name:.200}"))))
}

/// Reads a pickle.
pub(crate) fn read(bytes: &[u8]) -> Result<Pickle> {
    let mut machine = Machine {
        input: bytes,
        at: 0,
        values: Vec::new(),
        stack: Vec::new(),
        marks: Vec::new(),
        memo: Vec::new(),
        items: 0,
    };
    let root = machine.run()?;
    Ok(Pickle { values: machine.values, root })
}

struct Machine<'a> {
    input: &'a [u8],
    at: usize,
    values: Vec<Value>,
    stack: Vec<Id>,
    marks: Vec<usize>,
    memo: Vec<Option<Id>>,
    /// Number of container items so far.
    items: usize,
}

impl<'a> Machine<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let end = self.at.checked_add(n).filter(|&end| end <= self.input.len());
        let Some(end) = end else { return malformed("the pickle ends in the middle of an opcode") };
        let bytes = &self.input[self.at..end];
        self.at = end;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    fn byte(&mut self) -> Result<u8> {
        Ok(self.array::<1>()?[0])
    }

    fn length_u32(&mut self) -> Result<usize> {
        Ok(u32::from_le_bytes(self.array()?) as usize)
    }

    fn length_u64(&mut self) -> Result<usize> {
        usize::try_from(u64::from_le_bytes(self.array()?)).or_else(|_| malformed("a length exceeds the address space"))
    }

    fn line(&mut self) -> Result<&'a str> {
        let rest = &self.input[self.at..];
        let Some(n) = rest.iter().position(|&b| b == b'\n') else { return malformed("the pickle ends inside a line") };
        let line = self.take(n + 1)?;
        std::str::from_utf8(&line[..n]).or_else(|_| malformed("a name is not UTF-8"))
    }

    fn text(&mut self, n: usize) -> Result<()> {
        let bytes = self.take(n)?;
        // Python pickles lone surrogates as invalid UTF-8. No tensor name contains them, so a lossy conversion is
        // enough.
        let text = String::from_utf8_lossy(bytes).into_owned();
        self.push(Value::Str(text))
    }

    fn push(&mut self, value: Value) -> Result<()> {
        if self.values.len() >= MAX_VALUES {
            return malformed(format!("the pickle builds more than {MAX_VALUES} values"));
        }
        self.values.push(value);
        self.stack.push(self.values.len() as Id - 1);
        Ok(())
    }

    fn pop(&mut self) -> Result<Id> {
        if self.marks.last().is_some_and(|&mark| mark == self.stack.len()) {
            return malformed("an opcode pops a value below the last mark");
        }
        self.stack.pop().ok_or(Fault::Malformed("an opcode pops a value from an empty stack".into()))
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Id>> {
        match self.marks.pop() {
            Some(mark) if mark <= self.stack.len() => {
                self.count_items(self.stack.len() - mark)?;
                Ok(self.stack.split_off(mark))
            }
            _ => malformed("an opcode needs a mark, but there is none"),
        }
    }

    fn top(&self) -> Result<Id> {
        self.stack.last().copied().ok_or(Fault::Malformed("an opcode reads an empty stack".into()))
    }

    fn value(&self, id: Id) -> &Value {
        &self.values[id as usize]
    }

    fn pairs(items: &[Id]) -> Result<Vec<(Id, Id)>> {
        if !items.len().is_multiple_of(2) {
            return malformed("a dictionary has a key without a value");
        }
        Ok(items.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect())
    }

    fn remember(&mut self, slot: usize) -> Result<()> {
        if slot >= MAX_VALUES {
            return malformed("a memo slot exceeds the limit");
        }
        let id = self.top()?;
        if self.memo.len() <= slot {
            self.memo.resize(slot + 1, None);
        }
        self.memo[slot] = Some(id);
        Ok(())
    }

    fn recall(&mut self, slot: usize) -> Result<()> {
        let Some(Some(id)) = self.memo.get(slot).copied() else {
            return malformed(format!("memo slot {slot} is read before it is written"));
        };
        // Recalling creates no value, so the stack needs its own limit.
        if self.stack.len() >= MAX_VALUES {
            return malformed("the stack exceeds the limit");
        }
        self.stack.push(id);
        Ok(())
    }

    #[allow(clippy::too_many_lines, reason = "one opcode after the other")]
    fn run(&mut self) -> Result<Id> {
        loop {
            let opcode = self.byte()?;
            match opcode {
                0x80 => {
                    let protocol = self.byte()?;
                    if protocol > 5 {
                        return malformed(format!("unknown pickle protocol {protocol}"));
                    }
                }
                0x95 => drop(self.take(8)?), // FRAME is only a hint for buffering.
                b'(' => {
                    if self.marks.len() >= MAX_VALUES {
                        return malformed("the number of marks exceeds the limit");
                    }
                    self.marks.push(self.stack.len());
                }
                b'.' => return self.pop(),
                b'0' => drop(self.pop()?),
                b'N' => self.push(Value::None)?,
                0x88 => self.push(Value::Bool(true))?,
                0x89 => self.push(Value::Bool(false))?,
                b'J' => {
                    let v = i32::from_le_bytes(self.array()?);
                    self.push(Value::Int(v.into()))?;
                }
                b'K' => {
                    let v = self.byte()?;
                    self.push(Value::Int(v.into()))?;
                }
                b'M' => {
                    let v = u16::from_le_bytes(self.array()?);
                    self.push(Value::Int(v.into()))?;
                }
                0x8a => self.long1()?,
                b'G' => {
                    let v = f64::from_be_bytes(self.array()?);
                    self.push(Value::Float(v))?;
                }
                b'X' | b'T' => {
                    let n = self.length_u32()?;
                    self.text(n)?;
                }
                0x8c | b'U' => {
                    let n = self.byte()?.into();
                    self.text(n)?;
                }
                0x8d => {
                    let n = self.length_u64()?;
                    self.text(n)?;
                }
                b'C' => {
                    let n = self.byte()?.into();
                    self.take(n)?;
                    self.push(Value::Bytes)?;
                }
                b'B' => {
                    let n = self.length_u32()?;
                    self.take(n)?;
                    self.push(Value::Bytes)?;
                }
                b')' => self.push(Value::Tuple(Vec::new()))?,
                b']' => self.push(Value::List(Vec::new()))?,
                b'}' => self.push(Value::Dict(Vec::new()))?,
                b't' => {
                    let items = self.pop_to_mark()?;
                    self.push(Value::Tuple(items))?;
                }
                0x85..=0x87 => {
                    let mut items = Vec::new();
                    for _ in 0..opcode - 0x84 {
                        items.push(self.pop()?);
                    }
                    items.reverse();
                    self.push(Value::Tuple(items))?;
                }
                b'l' => {
                    let items = self.pop_to_mark()?;
                    self.push(Value::List(items))?;
                }
                b'd' => {
                    let items = self.pop_to_mark()?;
                    self.push(Value::Dict(Self::pairs(&items)?))?;
                }
                b'a' => {
                    let item = self.pop()?;
                    self.extend_list(vec![item])?;
                }
                b'e' => {
                    let items = self.pop_to_mark()?;
                    self.extend_list(items)?;
                }
                b's' => {
                    let value = self.pop()?;
                    let key = self.pop()?;
                    self.extend_dict(vec![(key, value)])?;
                }
                b'u' => {
                    let items = self.pop_to_mark()?;
                    self.extend_dict(Self::pairs(&items)?)?;
                }
                b'q' => {
                    let slot = self.byte()?.into();
                    self.remember(slot)?;
                }
                b'r' => {
                    let slot = self.length_u32()?;
                    self.remember(slot)?;
                }
                0x94 => self.remember(self.memo.len())?,
                b'h' => {
                    let slot = self.byte()?.into();
                    self.recall(slot)?;
                }
                b'j' => {
                    let slot = self.length_u32()?;
                    self.recall(slot)?;
                }
                b'c' => {
                    let module = self.line()?;
                    let name = self.line()?;
                    self.push(Value::Global(find_global(module, name)?))?;
                }
                0x93 => {
                    let name = self.pop()?;
                    let module = self.pop()?;
                    let (Value::Str(module), Value::Str(name)) = (self.value(module), self.value(name)) else {
                        return malformed("STACK_GLOBAL without two strings");
                    };
                    let global = find_global(module, name)?;
                    self.push(Value::Global(global))?;
                }
                b'Q' => self.persistent()?,
                b'R' => self.reduce()?,
                b'b' => {
                    // BUILD sets the attributes of an OrderedDict (`_metadata`), which hold no weights.
                    self.pop()?;
                    let target = self.top()?;
                    if !matches!(self.value(target), Value::Dict(_)) {
                        return malformed("BUILD on a value that is not a dictionary");
                    }
                }
                other => return malformed(format!("unsupported pickle opcode {other:#04x}")),
            }
        }
    }

    fn long1(&mut self) -> Result<()> {
        let n = self.byte()?.into();
        let bytes = self.take(n)?;
        if n > 8 {
            return malformed("an integer has more than 64 bits");
        }
        let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
        let mut out = if negative { [0xff; 8] } else { [0; 8] };
        out[..n].copy_from_slice(bytes);
        self.push(Value::Int(i64::from_le_bytes(out)))
    }

    /// Counts container items against a limit. They can outnumber values, because the memo names a value again with two
    /// bytes.
    fn count_items(&mut self, n: usize) -> Result<()> {
        self.items += n;
        if self.items > 4 * MAX_VALUES { malformed("the number of container items exceeds the limit") } else { Ok(()) }
    }

    fn extend_list(&mut self, items: Vec<Id>) -> Result<()> {
        self.count_items(items.len())?;
        let target = self.top()?;
        match &mut self.values[target as usize] {
            Value::List(list) => list.extend(items),
            _ => return malformed("APPEND on a value that is not a list"),
        }
        Ok(())
    }

    fn extend_dict(&mut self, items: Vec<(Id, Id)>) -> Result<()> {
        self.count_items(2 * items.len())?;
        let target = self.top()?;
        match &mut self.values[target as usize] {
            Value::Dict(dict) => dict.extend(items),
            _ => return malformed("SETITEM on a value that is not a dictionary"),
        }
        Ok(())
    }

    fn tuple(&self, id: Id) -> Result<&[Id]> {
        match self.value(id) {
            Value::Tuple(items) => Ok(items),
            other => malformed(format!("expected a tuple, found {}", other.kind())),
        }
    }

    fn natural(&self, id: Id) -> Result<u64> {
        match self.value(id) {
            Value::Int(v) if *v >= 0 => Ok(*v as u64),
            other => malformed(format!("expected a size or stride, found {}", other.kind())),
        }
    }

    fn naturals(&self, id: Id) -> Result<Vec<u64>> {
        let items = self.tuple(id)?;
        if items.len() > 8 {
            return malformed("a tensor has more than eight dimensions");
        }
        items.iter().map(|&id| self.natural(id)).collect()
    }

    /// Runs `BINPERSID`, whose argument is torch's tuple ("storage", type, key, location, elements).
    fn persistent(&mut self) -> Result<()> {
        let id = self.pop()?;
        let items = self.tuple(id)?;
        let &[tag, kind, key, _location, elements, ..] = items else {
            return malformed("a persistent id is not a storage");
        };
        let (Value::Str(tag), Value::Global(Global::Storage(dtype)), Value::Str(key)) =
            (self.value(tag), self.value(kind), self.value(key))
        else {
            return malformed("a persistent id is not a storage of a known type");
        };
        if tag != "storage" || key.len() > MAX_KEY {
            return malformed("a persistent id is not a storage");
        }
        let storage = StorageRef { key: key.clone(), dtype: *dtype, elements: self.natural(elements)? };
        self.push(Value::Storage(storage))
    }

    fn reduce(&mut self) -> Result<()> {
        let args = self.pop()?;
        let callable = self.pop()?;
        let &Value::Global(global) = self.value(callable) else {
            return malformed("REDUCE on a value that is not callable");
        };
        let args = self.tuple(args)?;
        // A short pickle can name one long tuple many times with the memo, so its length is checked before it is
        // copied.
        if args.len() > MAX_ARGUMENTS {
            return malformed(format!("{global:?} is called with {} arguments", args.len()));
        }
        let args = args.to_vec();
        match global {
            Global::OrderedDict if args.is_empty() => self.push(Value::Dict(Vec::new())),
            Global::Size if args.len() == 1 => {
                // The argument of torch.Size is the tuple of numbers itself.
                self.naturals(args[0])?;
                self.stack.push(args[0]);
                Ok(())
            }
            Global::Encode if args.len() == 2 => self.push(Value::Bytes),
            Global::RebuildParameter if !args.is_empty() => {
                let Value::Tensor(tensor) = self.value(args[0]).clone() else {
                    return malformed("a parameter is not a tensor");
                };
                self.push(Value::Tensor(tensor))
            }
            Global::RebuildTensor if args.len() >= 4 => {
                let Value::Storage(storage) = self.value(args[0]).clone() else {
                    return malformed("a tensor has no storage");
                };
                let tensor = TensorRef {
                    storage,
                    offset: self.natural(args[1])?,
                    shape: self.naturals(args[2])?,
                    stride: self.naturals(args[3])?,
                };
                self.push(Value::Tensor(tensor))
            }
            other => malformed(format!("{other:?} is called with {} arguments", args.len())),
        }
    }
}

#[cfg(test)]
mod tests;
