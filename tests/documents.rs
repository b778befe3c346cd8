//! Documents of tasks: parquet, JSON lines, and the Hub's datasets.

use std::path::{Path, PathBuf};

use pricket::lm::Documents;
use pricket::nn::NoProgress;
use pricket::text::fetch_documents;
use pricket::{Error, Task};
use pricket_testhub::{Content, Repo};
use proptest::prelude::*;
use serde_json::Value;

use crate::common::root;
use crate::world::{World, only};

fn parquet(name: &str) -> PathBuf {
    root().join("tests/data/documents").join(name)
}

fn lines(name: &str) -> PathBuf {
    root().join("tests/golden/scoring/score-neox-4tasks/data").join(name)
}

fn all(paths: &[impl AsRef<Path>]) -> Vec<Value> {
    Documents::open_all(paths).unwrap().collect::<Result<_, _>>().unwrap()
}

#[test]
fn parquet_and_json_lines_hold_the_same_documents() {
    for name in ["hellaswag.validation", "piqa.validation", "piqa.train"] {
        let (a, b) = (all(&[parquet(&format!("{name}.parquet"))]), all(&[lines(&format!("{name}.jsonl"))]));
        assert!(a.len() > 5 && a == b, "{name}");
    }
    // Lists inside structures, as in the choices of this dataset.
    let questions = all(&[parquet("arc_easy.test.parquet")]);
    assert_eq!(questions[1]["choices"]["text"], serde_json::json!(["2", "3", "none"]));
    // Several files are read in order, also with different formats.
    let both = all(&[parquet("piqa.train.parquet"), lines("piqa.train.jsonl")]);
    assert_eq!(both[..both.len() / 2], both[both.len() / 2..]);
}

#[test]
fn an_invalid_parquet_file_is_named() {
    let whole = std::fs::read(parquet("piqa.train.parquet")).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("cut.parquet");
    for len in [4, 8, 100, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&path, &whole[..len]).unwrap();
        let error = Documents::open(&path).unwrap_err().to_string();
        assert!(error.contains("cut.parquet") && error.contains("parquet"), "{error}");
    }
    let none: [&str; 0] = [];
    assert!(Documents::open_all(none).is_err());
    let error = Documents::open(directory.path().join("absent.jsonl")).unwrap_err().to_string();
    assert!(error.contains("absent.jsonl"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn a_broken_parquet_is_never_a_panic(at in 0usize..2263, byte: u8, second in 0usize..2263, other: u8) {
        let mut bytes = std::fs::read(parquet("piqa.train.parquet")).unwrap();
        let len = bytes.len();
        (bytes[at % len], bytes[second % len]) = (byte, other);
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("broken.parquet");
        std::fs::write(&path, bytes).unwrap();
        if let Ok(documents) = Documents::open(&path) {
            prop_assert!(documents.take(1000).count() < 1000);
        }
    }
}

/// A dataset with a conversion by the Hub beside the files of its owner.
fn converted() -> Repo {
    let file = |name: &str| Content::lfs(std::fs::read(parquet(name)).unwrap());
    let mut repo = Repo::default();
    let script = repo.commit([("piqa.py", Content::text("raise SystemExit")), ("README.md", Content::text("# PIQA"))]);
    repo.branch("main", &script);
    let converted = repo.commit([
        ("default/train/0000.parquet", file("piqa.train.parquet")),
        ("default/validation/0000.parquet", file("piqa.validation.parquet")),
        ("default/validation/0001.parquet", file("piqa.train.parquet")),
    ]);
    repo.branch("refs/convert/parquet", &converted);
    repo
}

#[test]
fn documents_are_fetched_from_the_hub() {
    let plain =
        only([("validation.jsonl", Content::text(std::fs::read(lines("hellaswag.validation.jsonl")).unwrap()))]);
    let world = World::new([("datasets/baber/piqa", converted()), ("datasets/Rowan/hellaswag", plain)]);
    let fetch = |hub: &pricket::Hub, task: &str, split: &str| {
        fetch_documents(&Task::named(task).unwrap(), split, hub, &NoProgress)
    };
    // Both parts of the split, in order, and nothing else.
    let files = fetch(&world.hub(), "piqa", "validation").unwrap();
    assert_eq!(files.len(), 2);
    assert!(files[0].starts_with(world.cache.path().join("datasets--baber--piqa/snapshots")), "{files:?}");
    assert_eq!(all(&files), [all(&[lines("piqa.validation.jsonl")]), all(&[lines("piqa.train.jsonl")])].concat());
    let sent: Vec<_> = world.server.take_log().into_iter().filter(|request| request.cdn).collect();
    assert_eq!(sent.len(), 2);
    // A dataset without a conversion is read as it is.
    let files = fetch(&world.hub(), "hellaswag", "validation").unwrap();
    assert_eq!(all(&files), all(&[lines("hellaswag.validation.jsonl")]));
    // Offline, both come from the cache.
    for task in ["piqa", "hellaswag"] {
        assert!(!fetch(&world.offline(), task, "validation").unwrap().is_empty());
    }
    // Errors name the missing split and the existing files.
    let error = fetch(&world.hub(), "hellaswag", "train").unwrap_err();
    assert!(matches!(error, Error::NotFound { .. }), "{error:?}");
    assert!(error.to_string().contains("Rowan/hellaswag") && error.to_string().contains("validation.jsonl"), "{error}");
    let error = fetch(&world.hub(), "sciq", "test").unwrap_err().to_string();
    assert!(error.contains("allenai/sciq"), "{error}");
}

/// The first twelve documents of piqa: gzip with a byte order mark and Windows line ends, zstd, and parquet with zstd.
#[test]
fn documents_are_read_compressed_and_as_windows_writes_them() {
    let expected: Vec<Value> = all(&[lines("piqa.validation.jsonl")]).into_iter().take(12).collect();
    for name in ["piqa.12.jsonl.gz", "piqa.12.jsonl.zst", "piqa.12.zstd.parquet"] {
        assert_eq!(all(&[parquet(name)]), expected, "{name}");
    }
    // A truncated compressed file is an error.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("half");
    for name in ["piqa.12.jsonl.gz", "piqa.12.jsonl.zst"] {
        let bytes = std::fs::read(parquet(name)).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        let read: Result<Vec<Value>, _> = Documents::open(&path).and_then(Iterator::collect);
        assert!(read.unwrap_err().to_string().contains("half"), "{name}");
    }
    // The error names the line and the column.
    std::fs::write(&path, "{\"a\": 1}\r\n\r\n{\"a\": x}\r\n").unwrap();
    let error = Documents::open(&path).unwrap().find_map(Result::err).unwrap().to_string();
    assert!(error.contains("line 3: not valid JSON at column 7") && !error.contains("line 1"), "{error}");
    // NaN, as Python writes it, is accepted.
    std::fs::write(&path, "{\"a\": NaN}\n").unwrap();
    assert_eq!(all(&[&path])[0]["a"], "NaN");
}
