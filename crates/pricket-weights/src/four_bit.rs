//! 4-bit matrices in the layout in which transformers saves them with bitsandbytes.
//!
//! A matrix `W` is stored in several tensors:
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

use pricket_kernels::{FourBit, FourBitType, NESTED_BLOCK, Scales};
use serde::{Deserialize, Serialize};

use crate::{Bytes, Dtype, Entry, Error, Outline, Result, Store};

/// Separator between the name of a matrix and the type of its elements.
const STATE: &str = ".quant_state.bitsandbytes__";

/// Ends of the names of the other tensors of a matrix.
const PARTS: [&str; 4] = [".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"];

/// Largest JSON of a matrix that is read, in bytes.
const LARGEST_STATE: usize = 64 << 10;

/// JSON of a matrix.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq)]
struct QuantState {
    /// `nf4` or `fp4`.
    quant_type: String,
    /// Number of elements that share a scale.
    blocksize: usize,
    /// The type before quantization: `float32`, `float16` or `bfloat16`.
    dtype: String,
    /// The shape of the matrix.
    shape: Vec<usize>,
    /// Number of blocks that share a scale of their scales.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    nested_blocksize: Option<usize>,
    /// The type of the scales: `float32`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    nested_dtype: Option<String>,
    /// The mean of the scales.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    nested_offset: Option<f64>,
}

/// Store that shows the 4-bit matrices of another store under their names, with their shapes.
pub struct FourBitTensors {
    store: Arc<dyn Store>,
    matrices: BTreeMap<String, (FourBitType, QuantState)>,
}

impl FourBitTensors {
    /// Wraps `store`; returns it unchanged if it has no 4-bit matrices.
    ///
    /// # Errors
    /// Returns [`Error::Corrupt`] if the JSON of a matrix is invalid or does not fit its tensors, and
    /// [`Error::Unsupported`] for a 4-bit type other than NF4 and FP4.
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

    /// Returns whether a tensor is a part of a matrix, other than the elements.
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

/// Checks the types and sizes of the tensors of a matrix by their headers.
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
    let is_double = state.nested_offset.is_some();
    if is_double && state.nested_blocksize.is_none_or(|size| size == 0) {
        return bad("nested_blocksize is missing".into());
    }
    let part = |end: &str, dtype: Option<Dtype>, bytes: usize| {
        let name = format!("{matrix}{end}");
        let entry = store.entry(&name).ok_or_else(|| store.missing(&name))?;
        if dtype.is_none_or(|dtype| dtype == entry.dtype) && entry.bytes() == bytes {
            return Ok(());
        }
        let expected = dtype.map_or_else(String::new, |dtype| format!(" of {dtype}"));
        let (found, kind) = (entry.bytes(), entry.dtype);
        let what = format!(
            "expected {bytes} bytes{expected} for a 4-bit matrix of [{rows}, {columns}], found {found} of {kind}"
        );
        Err(corrupt(store, &name, what))
    };
    // The elements first: after this check, no size below can overflow. `bnb_4bit_quant_storage` can give the same
    // bytes another type.
    part("", None, elements.div_ceil(2))?;
    let blocks = elements.div_ceil(state.blocksize);
    part(".quant_map", Some(Dtype::F32), 64)?;
    match state.nested_blocksize.filter(|_| is_double) {
        Some(nested_block) => {
            part(".absmax", Some(Dtype::U8), blocks)?;
            part(".nested_absmax", Some(Dtype::F32), blocks.div_ceil(nested_block) * 4)?;
            part(".nested_quant_map", Some(Dtype::F32), 1024)
        }
        None => part(".absmax", Some(Dtype::F32), blocks * 4),
    }
}

/// Returns the type before quantization.
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

/// Size in bytes of the JSON that pricket writes. It is padded with spaces, because the size must be known before the
/// offset is.
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Tensors in memory.
    struct Tensors(BTreeMap<String, (Dtype, Vec<u8>)>);

    impl Store for Tensors {
        fn names(&self) -> Vec<String> {
            self.0.keys().cloned().collect()
        }

        fn entry(&self, name: &str) -> Option<Entry> {
            let (dtype, bytes) = self.0.get(name)?;
            Some(Entry { shape: vec![bytes.len() / dtype.bytes(1)], dtype: *dtype })
        }

        fn bytes(&self, name: &str) -> Result<Bytes<'_>> {
            Ok(self.0.get(name).ok_or_else(|| self.missing(name))?.1.clone().into())
        }

        fn origin(&self, _: &str) -> String {
            "memory".into()
        }
    }

    fn tensors(is_double: bool) -> BTreeMap<String, (Dtype, Vec<u8>)> {
        let values: Vec<f32> = (0..35u8).map(|i| f32::from(i) / 16.0 - 1.0).collect();
        let matrix = FourBit::quantize(FourBitType::Nf4, &values, (5, 7), 64, is_double).unwrap();
        let parts = four_bit_parts("w", &matrix, Dtype::F16);
        parts.into_iter().map(|(outline, bytes)| (outline.name, (outline.dtype, bytes))).collect()
    }

    #[test]
    fn outlines_have_the_sizes_of_the_parts() {
        for is_double in [false, true] {
            let values = vec![0.5f32; 3 * 90];
            let matrix = FourBit::quantize(FourBitType::Fp4, &values, (3, 90), 64, is_double).unwrap();
            for (outline, bytes) in four_bit_parts("w", &matrix, Dtype::BF16) {
                assert_eq!(outline.bytes(), bytes.len(), "{}", outline.name);
            }
        }
    }

    #[test]
    fn invalid_parts_are_refused() {
        for is_double in [false, true] {
            let store = FourBitTensors::over(Arc::new(Tensors(tensors(is_double)))).unwrap();
            assert_eq!((store.names(), store.four_bit("w").unwrap().1), (vec!["w".to_owned()], Dtype::F16));
            // Every part that is missing or cut short.
            for name in tensors(is_double).keys().filter(|name| !name.contains(STATE)) {
                let (mut missing, mut short) = (tensors(is_double), tensors(is_double));
                missing.remove(name);
                short.get_mut(name).unwrap().1.pop();
                for parts in [missing, short] {
                    let error = FourBitTensors::over(Arc::new(Tensors(parts))).err().unwrap().to_string();
                    assert!(error.contains(name.as_str()), "{name}: {error}");
                }
            }
            for (from, to) in [
                ("[5,7]", "[5,7,1]".to_owned()),
                ("[5,7]", format!("[{},1]", usize::MAX)),
                ("[5,7]", format!("[{},{}]", usize::MAX, usize::MAX)),
                ("[5,7]", "[0,7]".into()),
                ("\"blocksize\":64", "\"blocksize\":0".into()),
                ("\"blocksize\":64", "\"blocksize\":1".into()),
                ("\"blocksize\":64", "\"blocksize\":-1".into()),
                ("\"nf4\"", "null".into()),
                ("{", "[".into()),
            ] {
                let mut parts = tensors(is_double);
                let state = parts.get_mut(&format!("w{STATE}nf4")).unwrap();
                let json = String::from_utf8(state.1.clone()).unwrap();
                assert!(json.contains(from), "{json}");
                state.1 = json.trim_end().replace(from, &to).into_bytes();
                let error = FourBitTensors::over(Arc::new(Tensors(parts))).err();
                assert!(error.is_some_and(|error| error.to_string().contains("tensor w")), "{from} {to}");
            }
        }
        let mut parts = tensors(false);
        let state = parts.remove(&format!("w{STATE}nf4")).unwrap();
        parts.insert(format!("w{STATE}nf3"), state);
        let error = FourBitTensors::over(Arc::new(Tensors(parts))).err().unwrap().to_string();
        assert!(error.contains("4-bit type nf3"), "{error}");
    }
}
