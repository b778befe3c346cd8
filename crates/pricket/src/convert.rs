//! Conversion of checkpoints to safetensors or GGUF, to other element types, and with adapters merged.
//!
//! ```
//! use pricket::convert::{ConvertOptions, Target};
//! let directory = tempfile::tempdir()?;
//! let out = directory.path().join("tiny-q8_0.gguf");
//! let written = pricket::Loader::embedded("tiny")?.convert(&out, &ConvertOptions::default())?;
//! assert_eq!(written.path, out);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod four_bit;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use pricket_lm::Vocabulary;
use pricket_nn::ops::{BlockType, Blocks, FOUR_BIT_BLOCK, Matrix, quantize, with_f16_scales};
use pricket_nn::{Family, FourBitQuantization, LoadOptions, Names, Quantization, RowOrder, Weights};
use pricket_weights::{Dtype, Entry, GgufValue, Headers, Outline, Store, Writer, four_bit_outlines, to_python_json};
use serde_json::Value;

use crate::loading::containers::paired_order;
use crate::loading::family::{checked_family, is_embedding_or_head};
use crate::loading::load::Loader;
use crate::loading::opened::Opened;
use crate::loading::provenance::Provenance;
use crate::loading::small_files::{TOKENIZER_FILES, TOKENIZERS, at, parent};
use crate::{Error, Result};

/// Element type of the converted matrices. The values of vectors never change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Target {
    /// The stored type, if the output format supports it. Block types of old GGML files become their current
    /// equivalents if that is lossless, otherwise f16.
    #[default]
    Stored,
    /// 32-bit float.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    BF16,
    /// Quantized blocks.
    Quantized(Quantization),
    /// 4-bit types of bitsandbytes, in Hub layout, as transformers saves them. Embeddings and head keep the stored
    /// type.
    FourBit(FourBitQuantization),
}

/// Options of a conversion.
#[derive(Clone, Debug, Default)]
pub struct ConvertOptions {
    /// Element type of the matrices; the stored type by default.
    pub target: Target,
    /// Whether an existing file is replaced; false by default.
    pub overwrite: bool,
}

/// Result of a conversion.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Converted {
    /// The weight file that was written.
    pub path: PathBuf,
    /// Size of the file in bytes.
    pub bytes: u64,
    /// Number of weights.
    pub parameters: u64,
    /// Deviations from the requested conversion, with reasons.
    pub notes: Vec<String>,
    /// Warnings about the source checkpoint.
    pub warnings: Vec<String>,
}

impl Converted {
    /// Returns the size of the file in bits per weight.
    pub fn bits_per_weight(&self) -> f64 {
        self.bytes as f64 * 8.0 / self.parameters.max(1) as f64
    }
}

/// A tensor to convert: its source and its outline in the output file.
struct Item {
    /// Name in the source file.
    from: String,
    canonical: String,
    /// Permutation from the Hub's row order to the model's.
    #[cfg_attr(not(feature = "train"), allow(dead_code, reason = "adapters read it"))]
    order: RowOrder,
    rows: Change,
    outline: Outline,
    /// Index of the tensor among those of a 4-bit matrix.
    part: Option<usize>,
}

/// Change of the row order.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Change {
    None,
    Apply(RowOrder),
    Undo(RowOrder),
}

impl Loader {
    /// Converts the checkpoint and writes it to `out`.
    ///
    /// If `out` ends in `.gguf`, writes one file with configuration and tokenizer, in the format of llama.cpp.
    /// Otherwise writes a directory in Hub layout with one safetensors file.
    ///
    /// At most one tensor is in memory at a time. Exception: if a GGUF file does not state the order of its QKV rows,
    /// the model is loaded once to determine it. Files get their final names only after they are complete.
    ///
    /// # Errors
    /// Returns the errors of [`Loader::load`], [`Error::Refused`] if the output format has no key for a value of the
    /// configuration, and [`Error::Output`] if the output already exists.
    pub fn convert(self, out: impl AsRef<Path>, options: &ConvertOptions) -> Result<Converted> {
        let out = out.as_ref();
        let mut opened = self.opened()?;
        let family = checked_family(&opened.config).map_err(|e| at(&opened.config_path, e))?;
        let in_model_order = self.in_model_order(&mut opened)?;
        #[cfg(feature = "train")]
        let adapters = self.read_adapters()?;
        let headers = Arc::new(Headers::of(Arc::clone(&opened.store)));
        let loading = LoadOptions { allow_unused: self.allows_unused(), ..LoadOptions::default() };
        let dry = Weights::new(headers, family.names(), loading);
        let model = family.load(&opened.config, &dry).map_err(|e| at(&opened.config_path, e))?;
        let info = model.info().clone();
        self.check_unused(&dry, &*opened.store)?;
        dry.verify_tied().map_err(|e| at(&opened.config_path, e))?;
        #[cfg(feature = "train")]
        crate::loading::adapters::check_mergeable(
            &adapters,
            &crate::loading::adapters::base(model, family.names(), dry.loaded_names()),
            &family.names(),
        )?;
        let gguf = out.extension().is_some_and(|e| e == "gguf");
        if gguf && let Target::FourBit(wanted) = options.target {
            let what = format!("GGUF has no type {wanted}; give a directory instead of {}", out.display());
            return Err(Error::Options(what));
        }
        let plan = Plan { family, options, gguf, in_model_order };
        let paired = family.paired_rows(&opened.config).map_err(|e| at(&opened.config_path, e))?;
        let items = plan.items(&dry, &*opened.store, &paired)?;
        let progress = self.reporter();
        progress.begin(
            &format!("writing {}", out.display()),
            items.iter().map(|i| i.outline.bytes() as u64).sum(),
            "bytes",
        );
        let mut warnings = opened.warnings.clone();
        warnings.extend(crate::loading::load::unused_warning(&dry));
        if opened.tokenizer.is_none() {
            warnings.push("the checkpoint has no tokenizer, so none is written; pass one with --tokenizer".into());
        }
        let mut notes: Vec<String> = opened.notes.clone();
        notes.extend(plan.notes(&items, &*opened.store));
        let path = if gguf { out.to_owned() } else { out.join("model.safetensors") };
        let floats = items.iter().map(|item| &item.outline).filter(|outline| outline.dtype.is_float());
        let largest = floats.max_by_key(|outline| outline.bytes());
        let (mut config, left_out) =
            python_config(&opened, family, largest.map_or(Dtype::F32, |outline| outline.dtype));
        if let Target::FourBit(wanted) = options.target {
            config["quantization_config"] = four_bit::quantization_config(wanted, largest.map(|outline| outline.dtype));
        }
        if gguf {
            let ends = crate::loading::opened::eos_ids(
                &opened.config,
                opened.generation_config.as_ref(),
                opened.tokenizer.as_ref(),
            );
            if let [others @ .., last] = &ends[..]
                && !others.is_empty()
            {
                notes.push(format!("GGUF holds one end token: {last} is written, {others:?} are not"));
            }
        } else {
            notes.extend(left_out);
            std::fs::create_dir_all(out).map_err(|error| Error::Io { path: out.into(), error })?;
            if !options.overwrite && (pricket_weights::find_weights(out).is_ok() || out.join("config.json").exists()) {
                let what = " already contains a model; allow overwriting to replace it";
                return Err(Error::Output { path: out.into(), what });
            }
        }
        let beside = if gguf { Vec::new() } else { beside(out, &opened, &config, options.overwrite)? };
        let part = Part::create(&path, options.overwrite)?;
        let io = |error: std::io::Error| Error::Io { path: path.clone(), error };
        let outlines: Vec<Outline> = items.iter().map(|item| item.outline.clone()).collect();
        let file = BufWriter::with_capacity(1 << 20, part.file.try_clone().map_err(io)?);
        let mut writer = if gguf {
            Writer::gguf(file, &metadata(&opened, family, options, info.vocab, &outlines)?, outlines).map_err(io)?
        } else {
            Writer::safetensors(file, &BTreeMap::new(), outlines).map_err(io)?
        };
        let mut done = 0;
        // The tensors of the 4-bit matrix that is being written.
        let mut parts = Vec::new();
        for item in &items {
            #[cfg(feature = "train")]
            let merge = item.merge(&adapters, family.names(), in_model_order);
            #[cfg(not(feature = "train"))]
            let merge = None;
            item.write_as(options.target, &*opened.store, merge, &mut parts, &mut |bytes| {
                if progress.cancelled() {
                    return Err(Error::Cancelled);
                }
                done += bytes.len() as u64;
                progress.update(done);
                writer.write(bytes).map_err(io)
            })?;
        }
        writer.finish().map_err(io)?;
        // The weights are completed last: a directory without weights cannot be loaded by mistake.
        for file in beside {
            file.write(out)?;
        }
        let bytes = part.finish()?;
        progress.end();
        Ok(Converted { path, bytes, parameters: info.parameters, notes, warnings })
    }
}

struct Plan<'a> {
    family: &'a dyn Family,
    options: &'a ConvertOptions,
    gguf: bool,
    in_model_order: bool,
}

impl Plan<'_> {
    fn items(&self, dry: &Weights, store: &dyn Store, paired: &[(&str, usize)]) -> Result<Vec<Item>> {
        let fused = dry.fused();
        let mut out = Vec::new();
        for (canonical, from) in dry.loaded_names() {
            let entry = store.entry(&from).ok_or_else(|| store.missing(&from))?;
            let order = fused.iter().find(|(name, _)| *name == canonical).map(|(_, order)| *order);
            let rows = match (order, self.gguf, self.in_model_order) {
                (Some(order), true, false) => Change::Apply(order),
                (Some(order), false, true) => Change::Undo(order),
                (None, true, _) => match paired_order(paired, &canonical) {
                    RowOrder::AsStored => Change::None,
                    order => Change::Undo(order),
                },
                _ => Change::None,
            };
            let dtype = self.dtype(&canonical, &from, &entry.shape, entry.dtype, store)?;
            let name =
                if self.gguf { Names::to_spelling(&canonical, self.family.gguf_names()) } else { canonical.clone() };
            let order = order.unwrap_or_default();
            if let Target::FourBit(wanted) = self.options.target
                && let [count, columns] = entry.shape[..]
                && !is_embedding_or_head(self.family, &canonical)
            {
                let shape = (count, columns);
                let outlines = four_bit_outlines(&name, shape, wanted.kind, FOUR_BIT_BLOCK, wanted.is_double);
                out.extend(outlines.into_iter().enumerate().map(|(i, outline)| {
                    let (from, canonical) = (from.clone(), canonical.clone());
                    Item { rows, outline, from, canonical, order, part: Some(i) }
                }));
                continue;
            }
            let outline = Outline { name, dtype, shape: entry.shape };
            out.push(Item { rows, outline, from, canonical, order, part: None });
        }
        if self.gguf
            && self.family.gguf_repeats_tied_head()
            && !out.iter().any(|i| i.outline.name == "output.weight")
            && let Some(embed) = out.iter().find(|item| item.outline.name == "token_embd.weight")
        {
            let outline = Outline { name: "output.weight".into(), ..embed.outline.clone() };
            let (from, canonical) = (embed.from.clone(), embed.canonical.clone());
            let item = Item { from, canonical, order: RowOrder::AsStored, rows: Change::None, outline, part: None };
            out.push(item);
        }
        Ok(out)
    }

    /// Returns the type of a tensor in the output file.
    fn dtype(&self, canonical: &str, from: &str, shape: &[usize], stored: Dtype, store: &dyn Store) -> Result<Dtype> {
        // llama.cpp requires vectors in f32. Position embeddings stay f32 because they are added to the residual
        // stream.
        let is_positions = || Names::to_spelling(canonical, self.family.gguf_names()) == "position_embd.weight";
        if self.gguf && (shape.len() == 1 || is_positions()) {
            return Ok(Dtype::F32);
        }
        let stored = if stored == Dtype::F64 { Dtype::F32 } else { stored };
        Ok(match self.options.target {
            Target::F32 => Dtype::F32,
            Target::F16 => Dtype::F16,
            Target::BF16 => Dtype::BF16,
            Target::Quantized(wanted) if self.gguf && shape.len() == 2 => {
                match wanted.of(is_embedding_or_head(self.family, canonical), shape[1]) {
                    Some(kind) => Dtype::Block(kind),
                    None => match stored {
                        Dtype::Block(kind) if !kind.is_current() => Dtype::F16,
                        stored => stored,
                    },
                }
            }
            Target::Stored | Target::Quantized(_) | Target::FourBit(_) => match stored {
                // Exact, whatever the type before quantization was.
                Dtype::FourBit(_) => Dtype::F32,
                Dtype::Block(_) if !self.gguf => Dtype::F32,
                Dtype::Block(kind) => match kind.with_f16_scales() {
                    None if kind.is_current() => stored,
                    // Lossless only if all scales are exactly representable in f16.
                    Some(narrow) if with_f16_scales(kind, &store.bytes(from)?).is_some() => Dtype::Block(narrow),
                    _ => Dtype::F16,
                },
                other => other,
            },
        })
    }

    fn notes(&self, items: &[Item], store: &dyn Store) -> Vec<String> {
        let mut changed: BTreeMap<(&str, &str), usize> = BTreeMap::new();
        for item in items {
            let stored = store.entry(&item.from).map_or(Dtype::F32, |entry| entry.dtype);
            let wanted = match self.options.target {
                Target::Quantized(wanted) if item.outline.shape.len() == 2 => Dtype::Block(wanted.weights),
                Target::Stored => stored,
                _ => continue,
            };
            let head = matches!(item.outline.name.as_str(), "token_embd.weight" | "output.weight");
            if item.outline.dtype != wanted && item.outline.shape.len() == 2 && !head {
                *changed.entry((wanted.name(), item.outline.dtype.name())).or_default() += 1;
            }
        }
        let note = |((wanted, got), count): ((&str, &str), usize)| {
            format!("{count} matrices are {got} instead of {wanted}, which the format or their width does not support")
        };
        changed.into_iter().map(note).collect()
    }
}

/// A function that merges adapters into a tensor.
type Merge<'a> = Box<dyn FnOnce(Tensor) -> Result<Tensor> + 'a>;

impl Item {
    /// Returns the function that merges adapters into the tensor; `None` if no adapter changes it.
    #[cfg(feature = "train")]
    fn merge<'a>(
        &'a self,
        adapters: &'a [pricket_train::Lora],
        names: Names,
        in_model_order: bool,
    ) -> Option<Merge<'a>> {
        adapters.iter().any(|adapter| adapter.changes(&names, &self.canonical)).then(|| -> Merge<'a> {
            let rows = if in_model_order { self.order } else { RowOrder::AsStored };
            Box::new(move |tensor| crate::loading::adapters::merged(adapters, &names, &self.canonical, &tensor, rows))
        })
    }

    /// Returns the tensor with its rows in the order of the output.
    fn reordered(&self, tensor: &Tensor) -> Result<Tensor> {
        Ok(match self.rows {
            Change::None => tensor.clone(),
            Change::Apply(order) => order.apply(tensor)?,
            Change::Undo(order) => order.undo(tensor)?,
        })
    }

    /// Writes the converted bytes of the tensor.
    fn write(
        &self,
        store: &dyn Store,
        merge: Option<Merge<'_>>,
        out: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let (from, dtype) = (&self.from, self.outline.dtype);
        let entry = store.entry(from).map(|entry| entry.dtype);
        if let (Some(Dtype::Block(stored)), Dtype::Block(wanted)) = (entry, dtype)
            && (stored == wanted || stored.with_f16_scales() == Some(wanted))
            && merge.is_none()
            && let Matrix::Blocks(blocks) = pricket_weights::read_matrix(store, from)?
        {
            let rounded = (stored != wanted).then(|| with_f16_scales(stored, blocks.bytes())).flatten();
            if stored == wanted || rounded.is_some() {
                let (count, columns) = blocks.shape();
                let blocks = rounded.map_or(blocks, |bytes| Blocks::new(wanted, count, columns, bytes));
                let blocks = Matrix::Blocks(blocks);
                let moved = match self.rows {
                    Change::Apply(order) => order.apply_to_matrix(blocks)?,
                    Change::Undo(order) => order.undo_to_matrix(blocks)?,
                    Change::None => blocks,
                };
                let Matrix::Blocks(blocks) = moved else {
                    return Err(Error::Malformed {
                        origin: store.origin(from),
                        what: format!("tensor {from} is not quantized after its rows were reordered"),
                    });
                };
                return out(blocks.bytes());
            }
        }
        let tensor = pricket_weights::read_tensor(store, from, &Device::Cpu)?;
        let tensor = self.reordered(&merge.map_or(Ok(tensor.clone()), |merge| merge(tensor))?)?;
        let (count, columns) = match tensor.dims() {
            [count, columns] => (*count, *columns),
            dims => (1, dims.iter().product()),
        };
        let tensor = tensor.reshape((count, columns))?;
        for start in (0..count).step_by(512) {
            let part = tensor.narrow(0, start, 512.min(count - start))?;
            let bytes = encode(&part, dtype, columns);
            let wrong = |e| Error::Malformed { origin: store.origin(from), what: format!("tensor {from}: {e}") };
            out(&bytes.map_err(wrong)?)?;
        }
        Ok(())
    }
}

/// Encodes rows as the bytes of an element type.
fn encode(part: &Tensor, dtype: Dtype, columns: usize) -> candle_core::Result<Vec<u8>> {
    let values = part.flatten_all()?;
    let wide = |values: &Tensor| values.to_dtype(DType::F32)?.to_vec1::<f32>();
    Ok(match dtype {
        Dtype::F16 => {
            let halves = values.to_dtype(DType::F16)?.to_vec1::<half::f16>()?;
            if let Some(at) = halves.iter().position(|x| !x.is_finite()) {
                candle_core::bail!("the value {} is too large for f16", wide(&values)?[at]);
            }
            halves.iter().flat_map(|x| x.to_le_bytes()).collect()
        }
        Dtype::BF16 => {
            let values = values.to_dtype(DType::BF16)?.to_vec1::<half::bf16>()?;
            values.iter().flat_map(|x| x.to_le_bytes()).collect()
        }
        Dtype::Block(kind) => quantize(kind, &wide(&values)?, columns)?,
        _ => wide(&values)?.iter().flat_map(|x| x.to_le_bytes()).collect(),
    })
}

/// Returns llama.cpp's `general.file_type`, which encodes the type of most tensors.
fn file_type(options: &ConvertOptions, stored: Dtype) -> u32 {
    let dtype = match options.target {
        Target::F32 => Dtype::F32,
        Target::F16 => Dtype::F16,
        Target::BF16 => Dtype::BF16,
        Target::Quantized(wanted) => Dtype::Block(wanted.weights),
        Target::Stored | Target::FourBit(_) => stored,
    };
    match dtype {
        Dtype::F16 => 1,
        Dtype::BF16 => 32,
        Dtype::Block(kind) => match kind.with_f16_scales().unwrap_or(kind) {
            BlockType::Q4_0 => 2,
            BlockType::Q4_1 => 3,
            BlockType::Q8_0 => 7,
            BlockType::Q5_0 => 8,
            BlockType::Q5_1 => 9,
            BlockType::Q2K => 10,
            BlockType::Q3K => 11,
            BlockType::Q4K => 14,
            BlockType::Q5K => 16,
            BlockType::Q6K => 18,
            _ => 1024,
        },
        _ => 0,
    }
}

/// Returns the metadata of the GGUF file.
fn metadata(
    opened: &Opened,
    family: &dyn Family,
    options: &ConvertOptions,
    vocab: usize,
    outlines: &[Outline],
) -> Result<Vec<(String, GgufValue)>> {
    let holds = |name: &str| outlines.iter().any(|outline| outline.name == name);
    let own = family.gguf_metadata(&opened.config, &holds).map_err(|e| at(&opened.config_path, e))?;
    let value = |value: &Value| match value {
        Value::Bool(flag) => GgufValue::Bool(*flag),
        Value::String(text) => GgufValue::Text(text.clone()),
        // Integers stay integers, because llama.cpp refuses a float where it expects an integer.
        number => number.as_u64().map_or_else(
            || GgufValue::F32(number.as_f64().unwrap_or(0.0) as f32),
            |n| GgufValue::U32(u32::try_from(n).unwrap_or(u32::MAX)),
        ),
    };
    let mut out: Vec<(String, GgufValue)> =
        own.as_object().into_iter().flatten().map(|(key, of)| (key.clone(), value(of))).collect();
    let mut add = |key: &str, value: GgufValue| out.push((key.to_owned(), value));
    let stored = opened.store.names().iter().filter_map(|name| opened.store.entry(name)).max_by_key(Entry::elements);
    add("general.name", GgufValue::Text(opened.base_name()));
    add("general.quantization_version", GgufValue::U32(2));
    add("general.file_type", GgufValue::U32(file_type(options, stored.map_or(Dtype::F32, |entry| entry.dtype))));
    if let Some(license) = &opened.provenance.license {
        add("general.license", GgufValue::Text(license.clone()));
    }
    add("pricket.version", GgufValue::Text(env!("CARGO_PKG_VERSION").into()));
    add("pricket.qkv_order", GgufValue::Text("split".into()));
    add("pricket.source", GgufValue::Text(opened.base_name()));
    if let Some(commit) = &opened.provenance.commit {
        add("pricket.source.commit", GgufValue::Text(commit.clone()));
    }
    let Some(tokenizer) = &opened.tokenizer else {
        add("tokenizer.ggml.model", GgufValue::Text("none".into()));
        return Ok(out);
    };
    let vocabulary = tokenizer.to_vocabulary(vocab)?;
    let bytes = |texts: Vec<String>| GgufValue::Texts(texts.into_iter().map(String::into_bytes).collect());
    // llama.cpp's names of tokenizer rules, as its own converter writes them for these families.
    let is_sentencepiece = !vocabulary.scores.is_empty();
    let (model, pre) = if is_sentencepiece { ("llama", "default") } else { ("gpt2", "olmo") };
    add("tokenizer.ggml.model", GgufValue::Text(model.into()));
    add("tokenizer.ggml.pre", GgufValue::Text(pre.into()));
    // Sentencepiece marks the unknown token with kind 2.
    let unknown = vocabulary.kinds.iter().position(|kind| is_sentencepiece && *kind == 2).map(|id| id as u32);
    let Vocabulary { words, kinds, merges, scores, add_space_prefix, remove_extra_whitespaces, charsmap } = vocabulary;
    add("tokenizer.ggml.tokens", bytes(words));
    add("tokenizer.ggml.token_type", GgufValue::Integers(kinds));
    if is_sentencepiece {
        add("tokenizer.ggml.scores", GgufValue::Floats(scores));
        add("tokenizer.ggml.add_space_prefix", GgufValue::Bool(add_space_prefix));
        // llama.cpp ignores both keys for this kind of tokenizer; pricket reads them.
        add("tokenizer.ggml.remove_extra_whitespaces", GgufValue::Bool(remove_extra_whitespaces));
        if !charsmap.is_empty() {
            add("tokenizer.ggml.precompiled_charsmap", GgufValue::Bytes(charsmap));
        }
    } else {
        add("tokenizer.ggml.merges", bytes(merges));
    }
    let end = crate::loading::opened::eos_ids(&opened.config, opened.generation_config.as_ref(), Some(tokenizer));
    let end = end.last().copied().unwrap_or(0);
    let configured = || opened.config["bos_token_id"].as_u64().and_then(|id| u32::try_from(id).ok());
    let begin = tokenizer.begin().or_else(configured).unwrap_or(end);
    for (key, id) in [("bos", begin), ("eos", end), ("unknown", unknown.unwrap_or(begin))] {
        add(&format!("tokenizer.ggml.{key}_token_id"), GgufValue::U32(id));
    }
    add("tokenizer.ggml.add_bos_token", GgufValue::Bool(tokenizer.begin().is_some()));
    add("tokenizer.ggml.add_eos_token", GgufValue::Bool(false));
    Ok(out)
}

/// Usual names of license and notice files in repositories.
const LICENSES: [&str; 5] = ["LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt"];

/// Size limit in bytes of a file copied next to the weights. Larger tokenizer files cannot be loaded either.
const MAX_BESIDE: u64 = 6 << 20;

/// A file next to the weights, with its new content; `None` deletes it.
struct CompanionFile {
    name: &'static str,
    bytes: Option<Vec<u8>>,
}

impl CompanionFile {
    fn write(&self, directory: &Path) -> Result<()> {
        let path = directory.join(self.name);
        let io = |error| Error::Io { path: path.clone(), error };
        let Some(bytes) = &self.bytes else { return std::fs::remove_file(&path).map_err(io) };
        let mut part = Part::create(&path, true)?;
        std::io::Write::write_all(&mut part.file, bytes).map_err(io)?;
        part.finish()?;
        Ok(())
    }
}

/// Returns the configuration, tokenizer and license files to write next to the weights. With `overwrite`, tokenizer
/// files and generation settings of a previous model are deleted. Licenses and notices are never deleted.
///
/// # Errors
/// Returns [`Error::Output`] if one of the files exists and `overwrite` is false.
fn beside(directory: &Path, opened: &Opened, config: &Value, overwrite: bool) -> Result<Vec<CompanionFile>> {
    let mut files: Vec<(&'static str, Option<Vec<u8>>)> = vec![
        ("config.json", Some(to_python_json(config).into_bytes())),
        ("generation_config.json", opened.generation_config.as_ref().map(|json| to_python_json(json).into_bytes())),
    ];
    let own = opened.tokenizer.as_ref().map(pricket_lm::Tokenizer::to_files).transpose()?.unwrap_or_default();
    // Deletes tokenizer files of the other kind, which belong to a previous model.
    files.extend(TOKENIZERS.map(|name| (name, None)));
    let copied = |folder: Option<PathBuf>, name: &str| {
        let path = folder.map(|folder| folder.join(name)).filter(|path| path.is_file());
        path.map(|path| crate::loading::small_files::read_at_most(&path, MAX_BESIDE)).transpose()
    };
    let tokenizer = opened.tokenizer_path.as_deref().map(parent);
    for name in TOKENIZER_FILES {
        files.push((name, copied(tokenizer.clone(), name)?));
    }
    for (name, bytes) in own {
        match files.iter_mut().find(|(known, _)| *known == name) {
            // A file copied from the source is more complete than the generated one.
            Some((_, content)) => *content = content.take().or(Some(bytes)),
            None => files.push((name, Some(bytes))),
        }
    }
    let source = opened.provenance.directory.clone().filter(|_| !opened.is_container);
    for name in LICENSES {
        files.extend(copied(source.clone(), name)?.map(|bytes| (name, Some(bytes))));
    }
    files.push(("README.md", Some(readme(opened).into_bytes())));
    let is_there = |name: &str| std::fs::symlink_metadata(directory.join(name)).is_ok();
    if let Some((name, _)) = files.iter().find(|(name, _)| !overwrite && is_there(name)) {
        let path = directory.join(name);
        return Err(Error::Output { path: path.clone(), what: " already exists; allow overwriting to replace it" });
    }
    files.retain(|(name, bytes)| bytes.is_some() || is_there(name));
    Ok(files.into_iter().map(|(name, bytes)| CompanionFile { name, bytes }).collect())
}

/// Returns a model card that names the source of the weights and their license.
fn readme(opened: &Opened) -> String {
    let Provenance { repo, commit, license, .. } = &opened.provenance;
    let mut front: Vec<String> = license.iter().map(|license| format!("license: {license}")).collect();
    front.extend(repo.iter().map(|repo| format!("base_model: {repo}")));
    let front = if front.is_empty() { String::new() } else { format!("---\n{}\n---\n\n", front.join("\n")) };
    let commit = commit.as_ref().map_or(String::new(), |commit| format!(", commit {commit}"));
    format!("{front}Converted from {}{commit} with pricket {}.\n", opened.base_name(), env!("CARGO_PKG_VERSION"))
}

/// Returns the configuration for transformers, with `dtype` as the type of the matrices, and notes on omitted keys.
fn python_config(opened: &Opened, family: &dyn Family, dtype: Dtype) -> (Value, Vec<String>) {
    let mut config = opened.config.clone();
    let mut notes = Vec::new();
    let Some(object) = config.as_object_mut() else { return (config, notes) };
    object.retain(|_, value| !value.is_null());
    // Both keys name Python files, which are not copied.
    for key in ["auto_map", "custom_pipelines"] {
        if object.remove(key).is_some() {
            notes.push(format!("config.json: {key} is omitted, because the code that it names is not copied"));
        }
    }
    let architecture = family.class(&opened.config);
    object.insert("architectures".into(), serde_json::json!([architecture]));
    // A local path is meaningless on other machines.
    let is_path = |name: &str| name.starts_with(['/', '.', '~']) || name.contains(['\\', ':']);
    if object.get("_name_or_path").and_then(Value::as_str).is_some_and(is_path) {
        object.remove("_name_or_path");
    }
    let name = match dtype {
        Dtype::F32 => Some("float32"),
        Dtype::F16 => Some("float16"),
        Dtype::BF16 => Some("bfloat16"),
        _ => None,
    };
    // transformers 5 calls the key `dtype`, and prefers it if both keys exist.
    let mut keys: Vec<&str> = ["dtype", "torch_dtype"].into_iter().filter(|key| object.contains_key(*key)).collect();
    if keys.is_empty() {
        keys.push("torch_dtype");
    }
    for key in keys {
        match name {
            Some(name) => object.insert(key.into(), name.into()),
            None => object.remove(key),
        };
    }
    (config, notes)
}

/// A temporary file that is renamed when it is complete, and deleted otherwise.
struct Part {
    file: File,
    at: PathBuf,
    path: PathBuf,
    done: bool,
}

impl Part {
    fn create(path: &Path, overwrite: bool) -> Result<Self> {
        if std::fs::metadata(path).is_ok_and(|meta| !meta.is_file()) {
            return Err(Error::Output { path: path.into(), what: " is not a regular file, so it is not overwritten" });
        }
        if path.exists() && !overwrite {
            return Err(Error::Output { path: path.into(), what: " already exists; allow overwriting to replace it" });
        }
        let name = path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        let at = crate::loading::small_files::parent(path).join(format!(".{name}.{}.part", std::process::id()));
        let file = File::create(&at).map_err(|error| Error::Io { path: path.into(), error })?;
        Ok(Self { file, at, path: path.to_owned(), done: false })
    }

    fn finish(mut self) -> Result<u64> {
        let io = |error| Error::Io { path: self.path.clone(), error };
        self.file.sync_all().map_err(io)?;
        let bytes = self.file.metadata().map_err(io)?.len();
        std::fs::rename(&self.at, &self.path).map_err(io)?;
        self.done = true;
        Ok(bytes)
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if !self.done {
            let _ = std::fs::remove_file(&self.at);
        }
    }
}
