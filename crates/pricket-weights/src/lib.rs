//! Model weights on disk as named tensors.
//!
//! A [`Store`] gives the names of its tensors, their shapes and types, and their bytes. This crate does not depend on a
//! model architecture. [`open`] creates the store for a path:
//!
//! | on disk | store |
//! |---|---|
//! | `model.safetensors` | [`SafetensorsFile`], memory-mapped |
//! | `pytorch_model.bin` (PyTorch ≥ 1.6, a zip of a pickle and raw storages) | [`TorchFile`], memory-mapped |
//! | `*.gguf`, version 1 to 3, whole or split | [`GgufFile`], memory-mapped; blocks stay quantized |
//! | ggml, ggmf, ggjt (2023) | [`GgmlFile`], opened with the header layouts of the model families |
//! | safetensors or PyTorch shards, with an `*.index.json` or numbered (`-00001-of-00002`) | [`Sharded`] |
//!
//! Opening reads only headers, so opening a 24 GB repository takes milliseconds. The bytes of a tensor are paged in
//! when it is read, and the pages are released after they are copied.
//!
//! Files are not trusted. Sizes, offsets and shapes are checked against the length of the file before anything is
//! allocated. The pickle reader builds only tensors and plain containers and cannot call code.
//!
//! Three more stores need no file of their own:
//!
//! - [`ShapesOnly`] accepts every name with the expected shape, to count parameters with the real loading code;
//! - [`Headers`] is another store without its bytes, to check a checkpoint before reading it;
//! - [`Random`] makes reproducible random weights of any shape, to measure speed without a download.
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
pub use four_bit::{FourBitTensors, four_bit_outlines, four_bit_parts};
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
