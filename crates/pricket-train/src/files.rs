//! Reading and writing of small text files and safetensors files.
//!
//! Files are written under a temporary name and then renamed, so that an interrupted write leaves no incomplete file.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use pricket_weights::{Dtype, Outline, Writer};

use crate::{Error, Result};

/// Maximum size of a text file in bytes.
const MAX_TEXT: u64 = 16 << 20;

/// Reads a text file of at most [`MAX_TEXT`] bytes.
pub(crate) fn read_small(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(Error::io(path))?;
    file.take(MAX_TEXT + 1).read_to_end(&mut bytes).map_err(Error::io(path))?;
    if bytes.len() as u64 > MAX_TEXT {
        let what = format!("is larger than {} MiB", MAX_TEXT >> 20);
        return Err(Error::Adapter { origin: path.display().to_string(), what });
    }
    Ok(bytes)
}

/// Writes a temporary file beside `path`, syncs it to disk, and renames it to `path`.
fn write(path: &Path, fill: impl FnOnce(&mut File) -> std::io::Result<()>) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let part = path.with_file_name(format!(".{name}.{}.part", std::process::id()));
    let written = File::create(&part).and_then(|mut file| {
        fill(&mut file)?;
        file.sync_all()?;
        std::fs::rename(&part, path)
    });
    written.map_err(|e| {
        drop(std::fs::remove_file(&part));
        Error::io(path)(e)
    })
}

/// Writes a text file.
pub(crate) fn write_text(path: &Path, text: &str) -> Result<()> {
    write(path, |file| file.write_all(text.as_bytes()))
}

/// Reads all tensors of a file written by [`write_tensors`].
pub(crate) fn read_tensors(path: &Path) -> Result<BTreeMap<String, Tensor>> {
    let store = pricket_weights::open_file(path)?;
    let read = |name: String| Ok((name.clone(), pricket_weights::read_tensor(&*store, &name, &Device::Cpu)?));
    store.names().into_iter().map(read).collect()
}

/// Writes tensors as a safetensors file in f32, one tensor at a time, with the metadata that PyTorch libraries expect.
pub(crate) fn write_tensors(path: &Path, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    let outline = |(name, tensor): (&String, &Tensor)| Outline {
        name: name.clone(),
        dtype: Dtype::F32,
        shape: tensor.dims().to_vec(),
    };
    let outlines: Vec<Outline> = tensors.iter().map(outline).collect();
    let format = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    write(path, |file| {
        let mut writer = Writer::safetensors(BufWriter::with_capacity(1 << 20, file), &format, outlines.clone())?;
        for outline in &outlines {
            let values =
                tensors[&outline.name].flatten_all().and_then(|tensor| tensor.to_dtype(DType::F32)?.to_vec1::<f32>());
            let values = values.map_err(std::io::Error::other)?;
            for part in values.chunks(1 << 16) {
                writer.write(&part.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>())?;
            }
        }
        writer.finish()?.flush()
    })
}
