//! Bytes on disk to named tensors.
//!
//! A [`Store`] answers three questions: which tensors are there, what shape and type each has, and what its bytes
//! are. Nothing in this crate knows a model. [`open`] makes a store of whatever lies at a path:
//!
//! | on disk | store |
//! |---|---|
//! | `model.safetensors` | [`SafetensorsFile`], memory-mapped |
//! | `pytorch_model.bin` (PyTorch ≥ 1.6, a zip of a pickle and raw storages) | [`TorchFile`], memory-mapped |
//! | `*.gguf`, version 1 to 3, whole or split | [`GgufFile`], memory-mapped; quantized blocks as they are |
//! | ggml, ggmf, ggjt (2023) | [`GgmlFile`], which wants the headers of its families |
//! | the first two in shards, with an `*.index.json` or numbered (`-00001-of-00002`) | [`Sharded`] |
//!
//! Opening reads headers only, so a 24 GB repository costs milliseconds; bytes are paged in when a tensor is asked
//! for and let go when it has been copied. A file is never believed: sizes, offsets and shapes are checked against
//! the bytes that are really there before anything is allocated, and the pickle reader can build tensors and plain
//! containers, nothing else: it has no way to call code.
//!
//! More stores hold no file: [`ShapesOnly`] says yes to every name (for counting parameters with the real loading
//! code), [`Headers`] is another store without its bytes (for checking a checkpoint before reading it), and [`Random`]
//! makes reproducible weights of any shape (for measuring speed without a download).
//!
//! ```
//! use pricket_weights::{Dtype, Store};
//! # let dir = tempfile::tempdir()?;
//! # let path = dir.path().join("model.safetensors");
//! # let data: Vec<u8> = [1f32, 2.0, 3.0, 4.0, 5.0, 6.0].iter().flat_map(|x| x.to_le_bytes()).collect();
//! # let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![2, 3], &data)?;
//! # safetensors::serialize_to_file([("embed_in.weight", view)], None, &path)?;
//! let store = pricket_weights::open(&path)?;
//! assert_eq!(store.names(), ["embed_in.weight"]);
//! let entry = store.entry("embed_in.weight").unwrap();
//! assert_eq!((entry.dtype, &entry.shape[..]), (Dtype::F32, &[2, 3][..]));
//! let tensor = pricket_weights::read_tensor(&*store, "embed_in.weight", &candle_core::Device::Cpu)?;
//! assert_eq!(tensor.to_vec2::<f32>()?, [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![cfg_attr(docsrs, feature(doc_cfg))]

mod cursor;
mod dtype;
mod error;
mod format;
mod four_bit;
mod ggml;
mod gguf;
mod json;
mod mapped;
mod open;
mod parts;
mod pickle;
mod safetensors_file;
mod sharded;
mod source;
mod store;
mod synthetic;
mod torch;
mod write;
mod zip_directory;

pub use dtype::Dtype;
pub use error::{Error, Result, clip, counted};
pub use format::{Format, open_one, open_remote, sniff, sniff_remote, stand_in};
pub use four_bit::{FourBitTensors, QuantState, four_bit_parts};
pub use ggml::{GgmlBody, GgmlFile, GgmlLayout, GgmlType};
pub use gguf::GgufFile;
pub use json::{parse_json, to_python_json};
pub use open::{choose_weights, find_weights, open, open_file};
pub use parts::parts_of;
pub use safetensors_file::SafetensorsFile;
pub use sharded::{Sharded, shard_map};
pub use source::ReadAt;
pub use store::{Bytes, Entry, Store, read_matrix, read_matrix_in_place, read_tensor};
pub use synthetic::{Headers, Random, ShapesOnly};
pub use torch::TorchFile;
pub use write::{GgufValue, Outline, Writer};
