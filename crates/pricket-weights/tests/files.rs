//! Files that torch wrote (tools/torch_fixtures.py), shards, and invalid shard names.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use pricket_weights::{Dtype, Error, Store, find_weights, open, read_tensor};

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

fn floats(store: &dyn Store, name: &str) -> Vec<f64> {
    let tensor = read_tensor(store, name, &Device::Cpu).unwrap();
    tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn every_storage_type_is_read() {
    let store = open(data("state_dict.bin")).unwrap();
    let counted: Vec<f64> = (0..6).map(f64::from).collect();
    let types = [
        ("f64", Dtype::F64),
        ("f32", Dtype::F32),
        ("f16", Dtype::F16),
        ("bf16", Dtype::BF16),
        ("i64", Dtype::I64),
        ("i32", Dtype::I32),
        ("i16", Dtype::I16),
        ("u8", Dtype::U8),
    ];
    for (name, dtype) in types {
        let entry = store.entry(name).unwrap();
        assert_eq!((entry.dtype, &entry.shape[..]), (dtype, &[2, 3][..]), "{name}");
        assert_eq!(floats(&*store, name), counted, "{name}");
    }
    assert_eq!(store.entry("bool").unwrap().dtype, Dtype::Bool);
    assert_eq!(floats(&*store, "bool"), [1.0, 0.0, 0.0, 1.0]);
    // Candle has no signed 8-bit type: the bytes can be read, but a tensor of them is an error.
    assert_eq!(&*store.bytes("i8").unwrap(), [0, 1, 2, 3, 4, 5]);
    let error = read_tensor(&*store, "i8", &Device::Cpu).unwrap_err().to_string();
    assert!(error.contains("i8") && error.contains("I8") && error.contains("state_dict.bin"), "{error}");
}

#[test]
fn views_of_a_shared_storage_are_gathered() {
    let store = open(data("state_dict.bin")).unwrap();
    let at = |row: usize, column: usize| (row * 6 + column) as f64;
    let matrix: Vec<f64> = (0..24).map(f64::from).collect();
    assert_eq!(floats(&*store, "matrix"), matrix);
    let transposed: Vec<f64> = (0..6).flat_map(|column| (0..4).map(move |row| at(row, column))).collect();
    assert_eq!(store.entry("transposed").unwrap().shape, [6, 4]);
    assert_eq!(floats(&*store, "transposed"), transposed);
    assert_eq!(floats(&*store, "slice"), [at(1, 2), at(1, 3), at(1, 4), at(2, 2), at(2, 3), at(2, 4)]);
    assert_eq!(floats(&*store, "column"), [at(0, 1), at(1, 1), at(2, 1), at(3, 1)]);
    assert_eq!((store.entry("scalar").unwrap().shape.len(), floats(&*store, "scalar")), (0, vec![2.5]));
    assert_eq!(store.entry("empty").unwrap().shape, [0, 3]);
    assert!(store.bytes("empty").unwrap().is_empty());
    assert_eq!(floats(&*store, "parameter"), [1.0, 1.0]);
}

#[test]
fn a_state_dict_inside_a_training_checkpoint_is_found() {
    let store = open(data("wrapped.bin")).unwrap();
    assert_eq!(store.names(), ["inner"]);
    assert_eq!(floats(&*store, "inner"), [0.0, 1.0, 2.0]);
}

#[test]
fn what_is_no_state_dict_says_so() {
    let error = open(data("bare_tensor.bin")).err().unwrap().to_string();
    assert!(error.contains("bare_tensor.bin") && error.contains("no state dict"), "{error}");
    let error = open(data("legacy.bin")).err().unwrap().to_string();
    assert!(error.contains("legacy.bin") && error.contains("legacy PyTorch format"), "{error}");
}

fn write_safetensors(path: &Path, tensors: &[(&str, Vec<usize>)]) {
    let bytes = vec![0u8; 4 * tensors.iter().map(|(_, shape)| shape.iter().product::<usize>()).max().unwrap_or(0)];
    let views = tensors.iter().map(|(name, shape)| {
        let n = 4 * shape.iter().product::<usize>();
        (*name, safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), &bytes[..n]).unwrap())
    });
    safetensors::serialize_to_file(views, None, path).unwrap();
}

#[test]
fn shards_are_found_by_their_index_alone() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    write_safetensors(&at("a.safetensors"), &[("x", vec![2]), ("y", vec![3, 1])]);
    std::fs::copy(data("state_dict.bin"), at("b.bin")).unwrap();
    // An index may name shards of both formats. Each is opened by its own format.
    let index = r#"{"metadata": {}, "weight_map": {"x": "a.safetensors", "y": "a.safetensors", "matrix": "b.bin"}}"#;
    std::fs::write(at("model.safetensors.index.json"), index).unwrap();
    let store = open(dir.path()).unwrap();
    assert!(["matrix", "x", "y"].iter().all(|name| store.entry(name).is_some()));
    assert_eq!(store.entry("y").unwrap().shape, [3, 1]);
    assert!(store.origin("matrix").ends_with("b.bin"));
    assert!(store.entry("slice").is_some(), "tensors that the index does not list are available");

    // A tensor that the index lists but its shard lacks is claimed and missing, and its shard is known.
    let index = r#"{"weight_map": {"x": "a.safetensors", "mask": "a.safetensors"}}"#;
    std::fs::write(at("model.safetensors.index.json"), index).unwrap();
    let store = open(dir.path()).unwrap();
    assert!(store.entry("mask").is_none() && store.claims("mask") && !store.claims("nothing"));
    assert!(store.origin("mask").ends_with("a.safetensors"));

    let wrong = [
        (r#"{"weight_map": {"z": "a.safetensors"}}"#, "z"),
        (r#"{"weight_map": {"x": "/etc/passwd"}}"#, "/etc/passwd"),
        (r#"{"weight_map": {"x": ".."}}"#, ".."),
        (r#"{"weight_map": {"x": "sub/a.safetensors"}}"#, "sub/a"),
        (r#"{"weight_map": {"x": "sub\\a.safetensors"}}"#, "sub"),
        (r#"{"weight_map": {"x": ""}}"#, "\"\""),
        (r#"{"weight_map": {"x": "c.safetensors"}}"#, "c.safetensors"),
        (r#"{"weight_map": 3}"#, "index"),
        ("", "index"),
    ];
    for (index, named) in wrong {
        std::fs::write(at("model.safetensors.index.json"), index).unwrap();
        let error = open(dir.path()).err().unwrap().to_string();
        assert!(error.contains(named) && error.contains("model.safetensors.index.json"), "{index}: {error}");
    }
}

#[test]
fn a_directory_without_weights_says_what_was_looked_for() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(find_weights(dir.path()), Err(Error::NotFound { .. })));
    write_safetensors(&dir.path().join("odd-name.safetensors"), &[("x", vec![1])]);
    assert!(find_weights(dir.path()).unwrap().ends_with("odd-name.safetensors"));
    write_safetensors(&dir.path().join("another.safetensors"), &[("x", vec![1])]);
    let error = find_weights(dir.path()).unwrap_err().to_string();
    assert!(error.contains("index"), "{error}");
}

#[cfg(unix)]
#[test]
fn what_is_no_file_is_refused_without_waiting() {
    let dir = tempfile::tempdir().unwrap();
    let pipe = dir.path().join("model.safetensors");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    assert!(open(&pipe).err().unwrap().to_string().contains("not a regular file"));
}

/// Opening reads only headers: a sparse file of 128 GiB opens at once.
#[cfg(target_os = "linux")]
#[test]
fn opening_reads_headers_only() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let elements = 1u64 << 36;
    let header = format!(r#"{{"big":{{"dtype":"F16","shape":[{elements}],"data_offsets":[0,{}]}}}}"#, 2 * elements);
    std::fs::write(&path, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat()).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(8 + header.len() as u64 + 2 * elements).unwrap();
    let start = std::time::Instant::now();
    let store = open(&path).unwrap();
    assert_eq!(store.entry("big").unwrap().elements() as u64, elements);
    assert!(start.elapsed().as_secs() < 2);
}
