//! Checkpoints of 4-bit matrices, as transformers saves them with bitsandbytes.
//!
//! A matrix `W` is stored as several tensors:
//!
//! | name | type | holds |
//! |---|---|---|
//! | `W` | u8 | two elements a byte |
//! | `W.absmax` | f32, or u8 with double quantization | the scale of each block |
//! | `W.quant_map` | f32 | the sixteen values |
//! | `W.nested_absmax`, `W.nested_quant_map` | f32 | scales and values of the scales, with double quantization |
//! | `W.quant_state.bitsandbytes__nf4` or `__fp4` | u8 | JSON: the shape, the block size, the type before quantization, the offset of the scales |

use std::collections::BTreeMap;
use std::sync::Arc;

use pricket_kernels::{FourBit, FourBitType, Scales};
use serde::{Deserialize, Serialize};

use crate::{Bytes, Dtype, Entry, Error, Outline, Result, Store};

/// Separates the name of a matrix from the type of its elements.
const STATE: &str = ".quant_state.bitsandbytes__";

/// Endings of the tensors that belong to a matrix.
const PARTS: [&str; 4] = [".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"];

/// The largest JSON of a matrix that is read, in bytes.
const LARGEST_STATE: usize = 64 << 10;

/// The JSON of a matrix.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq)]
pub struct QuantState {
    /// `nf4` or `fp4`.
    pub quant_type: String,
    /// Elements that share a scale.
    pub blocksize: usize,
    /// The type before quantization: `float32`, `float16` or `bfloat16`.
    pub dtype: String,
    /// The shape of the matrix.
    pub shape: Vec<usize>,
    /// Blocks that share a scale of scales.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nested_blocksize: Option<usize>,
    /// The type of the scales: `float32`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nested_dtype: Option<String>,
    /// The mean of the scales.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nested_offset: Option<f64>,
}

/// A store whose 4-bit matrices appear under their names with their shapes, and whose other tensors are those of another store.
pub struct FourBitTensors {
    store: Arc<dyn Store>,
    matrices: BTreeMap<String, (FourBitType, QuantState)>,
}

impl FourBitTensors {
    /// Returns `store` with its 4-bit matrices put together, or `store` itself if it has none.
    ///
    /// # Errors
    /// Returns [`Error::Corrupt`] if the JSON of a matrix cannot be read or does not fit its tensors, and [`Error::Unsupported`] for a type of
    /// elements other than NF4 and FP4.
    pub fn over(store: Arc<dyn Store>) -> Result<Arc<dyn Store>> {
        let mut matrices = BTreeMap::new();
        for name in store.names() {
            let Some((matrix, kind)) = name.rsplit_once(STATE) else { continue };
            let state = read_state(&*store, &name)?;
            let kind = match kind {
                "nf4" => FourBitType::Nf4,
                "fp4" => FourBitType::Fp4,
                other => {
                    let what = format!("tensor {matrix} is stored in the 4-bit type {other}; expected nf4 or fp4");
                    return Err(Error::Unsupported { path: store.origin(&name).into(), what });
                }
            };
            check(&*store, matrix, &state)?;
            matrices.insert(matrix.to_owned(), (kind, state));
        }
        Ok(if matrices.is_empty() { store } else { Arc::new(Self { store, matrices }) })
    }

    fn is_part(&self, name: &str) -> bool {
        let of = |end: &str| name.strip_suffix(end).is_some_and(|matrix| self.matrices.contains_key(matrix));
        PARTS.into_iter().any(of)
            || name.rsplit_once(STATE).is_some_and(|(matrix, _)| self.matrices.contains_key(matrix))
    }
}

fn corrupt(store: &dyn Store, name: &str, what: impl std::fmt::Display) -> Error {
    Error::Corrupt { path: store.origin(name).into(), what: format!("tensor {name}: {what}") }
}

fn read_state(store: &dyn Store, name: &str) -> Result<QuantState> {
    let bytes = store.entry(name).map_or(0, |entry| entry.bytes());
    if bytes > LARGEST_STATE {
        return Err(corrupt(store, name, format!("{bytes} bytes of JSON; the limit is {LARGEST_STATE}")));
    }
    serde_json::from_slice(&store.bytes(name)?).map_err(|e| corrupt(store, name, e))
}

/// Checks the tensors of a matrix by their headers.
fn check(store: &dyn Store, matrix: &str, state: &QuantState) -> Result<()> {
    let bad = |what: String| Err(corrupt(store, matrix, what));
    let [rows, columns] = state.shape[..] else {
        return bad(format!("a 4-bit tensor of shape {:?}; expected two dimensions", state.shape));
    };
    let Some(elements) = rows.checked_mul(columns) else {
        return bad(format!("a 4-bit matrix of [{rows}, {columns}] is too large"));
    };
    if state.blocksize == 0 {
        return bad("4-bit blocks of 0 elements".into());
    }
    if original(state).is_none() {
        return bad(format!(
            "the type before quantization is {:?}; expected float32, float16 or bfloat16",
            state.dtype
        ));
    }
    let blocks = elements.div_ceil(state.blocksize);
    let nested = blocks.div_ceil(state.nested_blocksize.unwrap_or(1).max(1));
    let is_double = state.nested_offset.is_some();
    let mut parts = vec![
        // `bnb_4bit_quant_storage` may give the same bytes another type.
        (String::new(), None, elements.div_ceil(2)),
        (".quant_map".to_owned(), Some(Dtype::F32), 64),
        (
            ".absmax".to_owned(),
            Some(if is_double { Dtype::U8 } else { Dtype::F32 }),
            blocks * if is_double { 1 } else { 4 },
        ),
    ];
    if is_double {
        if state.nested_blocksize.is_none_or(|size| size == 0) {
            return bad("nested_blocksize is missing".into());
        }
        parts.push((".nested_absmax".into(), Some(Dtype::F32), nested * 4));
        parts.push((".nested_quant_map".into(), Some(Dtype::F32), 1024));
    }
    for (end, dtype, bytes) in parts {
        let name = format!("{matrix}{end}");
        let entry = store.entry(&name).ok_or_else(|| store.missing(&name))?;
        if dtype.is_some_and(|dtype| dtype != entry.dtype) || entry.bytes() != bytes {
            let (found, bits) = (entry.bytes(), entry.dtype);
            let expected = dtype.map_or_else(String::new, |dtype| format!(" of {dtype}"));
            return Err(corrupt(
                store,
                &name,
                format!(
                    "expected {bytes} bytes{expected} for a 4-bit matrix of [{rows}, {columns}], found {found} of {bits}"
                ),
            ));
        }
    }
    Ok(())
}

/// The type before quantization.
fn original(state: &QuantState) -> Option<Dtype> {
    match &state.dtype[..] {
        "float32" => Some(Dtype::F32),
        "float16" => Some(Dtype::F16),
        "bfloat16" => Some(Dtype::BF16),
        _ => None,
    }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|x| f32::from_le_bytes(*x)).collect()
}

impl Store for FourBitTensors {
    fn names(&self) -> Vec<String> {
        self.store.names().into_iter().filter(|name| !self.is_part(name)).collect()
    }

    fn entry(&self, name: &str) -> Option<Entry> {
        match self.matrices.get(name) {
            Some((kind, state)) => Some(Entry { shape: state.shape.clone(), dtype: Dtype::FourBit(*kind) }),
            None => self.store.entry(name),
        }
    }

    fn resolve<'a>(&'a self, name: &'a str) -> &'a str {
        self.store.resolve(name)
    }

    fn claims(&self, name: &str) -> bool {
        self.store.claims(name)
    }

    fn bytes(&self, name: &str) -> Result<Bytes<'_>> {
        self.store.bytes(name)
    }

    fn origin(&self, name: &str) -> String {
        self.store.origin(name)
    }

    fn shapes_only(&self) -> bool {
        self.store.shapes_only()
    }

    fn four_bit(&self, name: &str) -> Result<(FourBit, Dtype)> {
        let store = &*self.store;
        let (kind, state) = self.matrices.get(name).ok_or_else(|| store.missing(name))?;
        let part = |end: &str| store.bytes(&format!("{name}{end}"));
        let absmax = part(".absmax")?;
        let scales = match (state.nested_offset, state.nested_blocksize) {
            (Some(offset), Some(nested_block)) => Scales::Double {
                codes: absmax.to_vec(),
                table: floats(&part(".nested_quant_map")?),
                nested: floats(&part(".nested_absmax")?),
                nested_block,
                offset: offset as f32,
            },
            _ => Scales::Plain(floats(&absmax)),
        };
        let table = floats(&part(".quant_map")?).try_into();
        let table = table.map_err(|_| corrupt(store, name, "a table of sixteen values is needed"))?;
        let shape = (state.shape[0], state.shape[1]);
        let matrix = FourBit::new(*kind, table, shape, state.blocksize, part("")?.to_vec(), scales);
        let original = original(state).unwrap_or(Dtype::F32);
        Ok((matrix.map_err(|e| corrupt(store, name, e))?, original))
    }
}

/// Bytes of the JSON of a matrix that pricket writes. Its end is filled with spaces, so that the size is known before the offset is.
const WRITTEN_STATE: usize = 256;

/// Returns the outlines of the tensors that [`four_bit_parts`] makes of a matrix, in the same order.
pub fn four_bit_outlines(
    name: &str,
    (rows, columns): (usize, usize),
    kind: FourBitType,
    block: usize,
    is_double: bool,
) -> Vec<Outline> {
    let elements = rows * columns;
    let blocks = elements.div_ceil(block);
    let part = |end: &str, dtype, len| Outline { name: format!("{name}{end}"), dtype, shape: vec![len] };
    let mut out = vec![
        Outline { name: name.into(), dtype: Dtype::U8, shape: vec![elements.div_ceil(2), 1] },
        part(".quant_map", Dtype::F32, 16),
        part(".absmax", if is_double { Dtype::U8 } else { Dtype::F32 }, blocks),
    ];
    if is_double {
        out.push(part(".nested_absmax", Dtype::F32, blocks.div_ceil(NESTED_BLOCK)));
        out.push(part(".nested_quant_map", Dtype::F32, 256));
    }
    out.push(part(&format!("{STATE}{}", kind.name()), Dtype::U8, WRITTEN_STATE));
    out
}

/// Blocks that share a scale of scales.
const NESTED_BLOCK: usize = 256;

/// Returns the tensors that store a 4-bit matrix `name` of the type `original` before quantization, with their bytes.
pub fn four_bit_parts(name: &str, matrix: &FourBit, original: Dtype) -> Vec<(Outline, Vec<u8>)> {
    let bytes = |values: &[f32]| values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    let (shape, kind, block) = (matrix.shape(), matrix.kind(), matrix.block());
    let mut state = QuantState {
        quant_type: kind.name().into(),
        blocksize: block,
        dtype: match original {
            Dtype::F16 => "float16",
            Dtype::BF16 => "bfloat16",
            _ => "float32",
        }
        .into(),
        shape: vec![shape.0, shape.1],
        nested_blocksize: None,
        nested_dtype: None,
        nested_offset: None,
    };
    let mut parts = vec![matrix.bytes().to_vec(), bytes(matrix.table())];
    match matrix.scales() {
        Scales::Plain(scales) => parts.push(bytes(scales)),
        Scales::Double { codes, table, nested, nested_block, offset } => {
            parts.extend([codes.clone(), bytes(nested), bytes(table)]);
            state.nested_blocksize = Some(*nested_block);
            state.nested_dtype = Some("float32".into());
            state.nested_offset = Some(f64::from(*offset));
        }
    }
    let mut json = serde_json::to_vec(&state).unwrap_or_default();
    json.resize(json.len().max(WRITTEN_STATE), b' ');
    parts.push(json);
    let is_double = matches!(matrix.scales(), Scales::Double { .. });
    four_bit_outlines(name, shape, kind, block, is_double).into_iter().zip(parts).collect()
}
