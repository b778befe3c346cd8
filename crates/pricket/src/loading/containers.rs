//! Files that hold configuration, vocabulary and weights in one: GGUF, and the containers before it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pricket_lm::{Pieces, Tokenizer};
use pricket_nn::{FusedRows, KnownTokenizer, Reordered, RowOrder};
use pricket_weights::{Format, GgmlFile, GgmlLayout, GgufFile, Store};
use serde_json::Value;

use crate::loading::family::{
    all_ggml_layouts, checked_family, config_from_gguf, family_of_ggml, family_of_gguf, unknown_gguf_keys,
};
use crate::{Error, Result};

/// What such a file holds.
pub(crate) struct Container {
    pub(crate) config: Value,
    pub(crate) tokenizer: Option<Tokenizer>,
    /// Its tensors as they are stored.
    pub(crate) store: Arc<dyn Store>,
    /// The same with values and shapes as the Hub has them.
    pub(crate) tensors: Arc<dyn Store>,
    pub(crate) fused: FusedRows,
    /// What it is, in a line.
    pub(crate) describe: String,
    /// What it says of itself.
    pub(crate) metadata: Value,
    pub(crate) warnings: Vec<String>,
    pub(crate) notes: Vec<String>,
    /// The repository of the tokenizer that its words are those of, where it has none of its own.
    pub(crate) known_tokenizer: Option<String>,
}

/// The file at `path` that may be such a file: itself, or the weights of a directory.
pub(crate) fn candidate(path: &Path) -> Result<Option<PathBuf>> {
    if !path.is_dir() {
        return Ok(path.is_file().then(|| path.to_owned()));
    }
    match pricket_weights::find_weights(path) {
        Ok(file) => Ok(Some(file).filter(|file| file.is_file())),
        Err(e @ pricket_weights::Error::Ambiguous { .. }) if !path.join("config.json").is_file() => Err(e.into()),
        Err(_) => Ok(None),
    }
}

/// Opens `path` if it is such a file; `given` is the tokenizer that the user names, which comes before the file's.
pub(crate) fn open(path: &Path, given: Option<&Tokenizer>) -> Result<Option<Container>> {
    match pricket_weights::sniff(path)? {
        Format::Gguf => gguf(path, given).map(Some),
        Format::LegacyGgml => ggml(path, given).map(Some),
        _ => Ok(None),
    }
}

/// The tensors of a weight file of any format, as they are named and stored there: a safetensors or PyTorch file, an index
/// of shards, GGUF, or legacy GGML.
///
/// # Errors
/// One that names the file and what is wrong with it.
pub fn open_weights(path: impl AsRef<Path>) -> Result<Arc<dyn Store>> {
    let path = path.as_ref();
    if path.is_file()
        && let Some(container) = open(path, None)?
    {
        return Ok(container.store);
    }
    Ok(Arc::from(pricket_weights::open(path)?))
}

/// The headers of legacy GGML files that are known, for [`GgmlFile`].
pub fn ggml_layouts() -> Vec<GgmlLayout> {
    all_ggml_layouts()
}

/// Tensors with their rows as the Hub has them. Under the names of llama.cpp or of the original program, rows that are rotated together
/// are side by side.
pub(crate) fn in_hub_order(store: Arc<dyn Store>, config: &Value) -> pricket_nn::Result<Arc<dyn Store>> {
    let family = checked_family(config)?;
    let (names, paired) = (family.names(), family.paired_rows(config)?);
    if paired.is_empty() {
        return Ok(store);
    }
    let order = |name: &str| {
        // Under the Hub's own name a tensor is as the Hub has it.
        let is_hubs = paired.iter().any(|(part, _)| name.contains(part));
        if is_hubs { RowOrder::AsStored } else { paired_order(&paired, &names.canonical(name)) }
    };
    Ok(Arc::new(Reordered::new(store, order)?))
}

/// The tensors of such a file under the names and in the order of the Hub.
pub(crate) fn under_hub_names(store: Arc<dyn Store>, config: &Value) -> pricket_nn::Result<Arc<dyn Store>> {
    let names = checked_family(config)?.names();
    let store = in_hub_order(store, config)?;
    let stored = store.names().into_iter().map(|name| (names.canonical(&name), name)).collect();
    Ok(Arc::new(Renamed { store, stored }))
}

/// A store whose tensors have other names.
struct Renamed {
    store: Arc<dyn Store>,
    /// New name to the name in the store.
    stored: BTreeMap<String, String>,
}

impl Renamed {
    fn stored<'a>(&'a self, name: &'a str) -> &'a str {
        self.stored.get(name).map_or(name, String::as_str)
    }
}

impl Store for Renamed {
    fn names(&self) -> Vec<String> {
        self.stored.keys().cloned().collect()
    }

    fn entry(&self, name: &str) -> Option<pricket_weights::Entry> {
        self.store.entry(self.stored(name))
    }

    fn bytes(&self, name: &str) -> pricket_weights::Result<pricket_weights::Bytes<'_>> {
        self.store.bytes(self.stored(name))
    }

    fn origin(&self, name: &str) -> String {
        self.store.origin(self.stored(name))
    }
}

/// How files of llama.cpp have the rows of a tensor, given what a family says of them.
pub(crate) fn paired_order(paired: &[(&str, usize)], canonical: &str) -> RowOrder {
    let module = canonical.strip_suffix(".weight").or_else(|| canonical.strip_suffix(".bias"));
    let found = paired.iter().find(|(part, _)| module.is_some_and(|module| module.ends_with(part)));
    found.map_or(RowOrder::AsStored, |&(_, heads)| RowOrder::Pairs { heads })
}

fn gguf(path: &Path, given: Option<&Tokenizer>) -> Result<Container> {
    let file = GgufFile::open(path)?;
    let metadata = file.metadata();
    let shape = |name: &str| file.entry(name).map(|entry| entry.shape);
    let config = config_from_gguf(&metadata, &shape).map_err(|e| crate::loading::small_files::at(path, e))?;
    let mut warnings = Vec::new();
    let tokenizer = match given {
        Some(given) => Some(given.clone()),
        None => match gguf_tokenizer(&file, &metadata, path) {
            Ok(Some(tokenizer)) => Some(tokenizer),
            own => {
                if let Err(e) = own {
                    warnings.push(format!("its tokenizer is not used: {e}"));
                }
                tokenizer_beside(path)?
            }
        },
    };
    let fused = family_of_gguf(&metadata)
        .map_err(|e| crate::loading::small_files::at(path, e))?
        .gguf_rows(&metadata, file.version());
    let describe = format!("GGUF, version {}", file.version());
    let unknown = unknown_gguf_keys(&metadata);
    let notes = if unknown.is_empty() {
        Vec::new()
    } else {
        vec![format!("{}: unknown keys without effect: {}", path.display(), unknown.join(", "))]
    };
    let store: Arc<dyn Store> = Arc::new(file);
    Ok(Container {
        config,
        tokenizer,
        tensors: Arc::clone(&store),
        store,
        fused,
        describe,
        metadata,
        warnings,
        notes,
        known_tokenizer: None,
    })
}

/// The pre-tokenizers that are GPT-2's under other names.
const GPT2_LIKE: [&str; 6] = ["default", "gpt-2", "gpt-neox", "mpt", "olmo", "stablelm"];

/// Tokens and merges of the tokenizer that these families share, without its added runs of spaces.
const WITHOUT_RUNS: (usize, usize) = (50254, 50009);

fn gguf_tokenizer(file: &GgufFile, metadata: &Value, path: &Path) -> Result<Option<Tokenizer>> {
    let Some(mut words) = file.texts("tokenizer.ggml.tokens")? else { return Ok(None) };
    let origin = path.display().to_string();
    let wrong = |what: String| Error::Tokenizer { origin: origin.clone(), what };
    let (model, pre) = (metadata["tokenizer.ggml.model"].as_str(), metadata["tokenizer.ggml.pre"].as_str());
    if model == Some("llama") {
        return sentencepiece_of(file, metadata, words, origin).map(Some);
    }
    if model != Some("gpt2") || pre.is_some_and(|pre| !GPT2_LIKE.contains(&pre)) {
        let (model, pre) = (model.unwrap_or("none"), pre.unwrap_or("none"));
        return Err(wrong(format!("a tokenizer of kind {model} ({pre}); byte-level BPE as GPT-2's is read")));
    }
    let Some(merges) = file.texts("tokenizer.ggml.merges")? else {
        return Err(wrong("it has tokens and no merges".into()));
    };
    let kinds = file.integers("tokenizer.ggml.token_type")?.unwrap_or_default();
    if (words.len(), merges.len()) == WITHOUT_RUNS {
        // The first converters left out the runs of spaces, longest first, which the model was trained with.
        words.extend((2..=24).rev().map(|n| vec![b' '; n]));
    }
    Ok(Some(Tokenizer::from_vocabulary(&words, &kinds, &merges, origin)?))
}

/// A sentencepiece vocabulary, which llama.cpp calls by the name of the first model that had one.
fn sentencepiece_of(file: &GgufFile, metadata: &Value, words: Vec<Vec<u8>>, origin: String) -> Result<Tokenizer> {
    let flag = |key: &str, default: bool| metadata[format!("tokenizer.ggml.{key}")].as_bool().unwrap_or(default);
    let id = |name: &str| {
        let id = metadata[format!("tokenizer.ggml.{name}_token_id")].as_u64();
        id.and_then(|id| u32::try_from(id).ok())
    };
    let begin = id("bos").unwrap_or(1);
    let charsmap = file.integers("tokenizer.ggml.precompiled_charsmap")?.unwrap_or_default();
    let pieces = Pieces {
        scores: file.floats("tokenizer.ggml.scores")?.unwrap_or_else(|| vec![0.0; words.len()]),
        kinds: file.integers("tokenizer.ggml.token_type")?.unwrap_or_else(|| vec![1; words.len()]),
        words,
        begin: flag("add_bos_token", true).then_some(begin),
        end: id("eos"),
        unknown: id("unknown"),
        add_space_prefix: flag("add_space_prefix", true),
        remove_extra_whitespaces: flag("remove_extra_whitespaces", false),
        charsmap: charsmap.into_iter().map(|byte| byte as u8).collect(),
    };
    Ok(Tokenizer::from_pieces(&pieces, origin)?)
}

/// The sentencepiece vocabulary of a legacy GGML file, where it has one: the unknown piece is written as it is shown, control pieces are
/// empty, bytes are the byte itself, and others have spaces.
fn sentencepiece_of_words(file: &GgmlFile, origin: String) -> Option<Result<Tokenizer>> {
    let words: Vec<Vec<u8>> = (0..file.words()).map(|id| file.word(id)).collect::<Option<_>>()?;
    let scores: Vec<f32> = (0..file.words()).map(|id| file.score(id)).collect::<Option<_>>()?;
    let unknown = " \u{2047} ".as_bytes();
    if words.first().map(Vec::as_slice) != Some(unknown) {
        return None;
    }
    // All bytes follow each other.
    let bytes = words.windows(256).position(|run| run.iter().zip(0..=255u8).all(|(word, byte)| word[..] == [byte]));
    let (mut pieces, mut kinds) = (Vec::with_capacity(words.len()), Vec::with_capacity(words.len()));
    for (id, word) in words.iter().enumerate() {
        let byte = bytes.and_then(|first| id.checked_sub(first)).filter(|byte| *byte < 256);
        let (piece, kind) = match (id, byte, word.is_empty()) {
            (0, ..) => (b"<unk>".to_vec(), 2),
            (_, Some(byte), _) => (format!("<0x{byte:02X}>").into_bytes(), 6),
            (1, None, true) => (b"<s>".to_vec(), 3),
            (2, None, true) => (b"</s>".to_vec(), 3),
            (_, None, true) => (format!("[PAD{id}]").into_bytes(), 3),
            _ => (String::from_utf8(word.clone()).ok()?.replace(' ', "\u{2581}").into_bytes(), 1),
        };
        pieces.push(piece);
        kinds.push(kind);
    }
    let pieces = Pieces {
        words: pieces,
        scores,
        kinds,
        begin: Some(1),
        end: Some(2),
        unknown: Some(0),
        add_space_prefix: true,
        remove_extra_whitespaces: false,
        charsmap: Vec::new(),
    };
    Some(Tokenizer::from_pieces(&pieces, origin).map_err(Into::into))
}

/// The tokenizer in the directory of a file.
fn tokenizer_beside(path: &Path) -> Result<Option<Tokenizer>> {
    let found = crate::loading::small_files::tokenizer_in(&crate::loading::small_files::parent(path));
    Ok(found.map(Tokenizer::from_file).transpose()?)
}

fn ggml(path: &Path, given: Option<&Tokenizer>) -> Result<Container> {
    let file = GgmlFile::open(path, &all_ggml_layouts())?;
    let shape = |name: &str| file.entry(name).map(|entry| entry.shape);
    let wrong = |e| crate::loading::small_files::at(path, e);
    let family = family_of_ggml(file.layout()).map_err(wrong)?;
    let config = family.config_from_ggml(&file.header(), &shape).map_err(wrong)?;
    let mut warnings = file.warnings().to_vec();
    let mut tokenizer = given.cloned().map_or_else(|| tokenizer_beside(path), |given| Ok(Some(given)))?;
    if tokenizer.is_none() {
        tokenizer = sentencepiece_of_words(&file, path.display().to_string()).transpose()?;
    } else if let Some(tokenizer) = &tokenizer {
        let known = (0..file.words()).filter_map(|id| Some((id, file.word(id)?)));
        // Bytes of parts of characters became U+FFFD, and added tokens are spelled in other ways.
        let known = known.filter(|(id, word)| {
            !word.is_empty() && word.is_ascii() && !word.contains(&b'[') && !tokenizer.is_special(*id as u32)
        });
        let (mut all, mut other) = (0, 0);
        for (id, word) in known {
            all += 1;
            other += usize::from(tokenizer.token_bytes(id as u32) != word);
        }
        if 20 * other > all {
            warnings.push(format!("the tokenizer is not the file's: {other} of {all} words differ"));
        }
    }
    let has = |&(id, text): &(usize, &str)| file.word(id).is_some_and(|word| word == text.as_bytes());
    let is_known = |known: &KnownTokenizer| file.words() >= known.count && known.words.iter().all(has);
    let known = family.ggml_tokenizer().filter(|known| tokenizer.is_none() && is_known(known));
    let named = config["tokenizer_name"].as_str().filter(|_| tokenizer.is_none()).map(str::to_owned);
    let (describe, metadata) = (file.describe(), file.header());
    let store: Arc<dyn Store> = Arc::new(file);
    Ok(Container {
        config,
        known_tokenizer: known.map(|known| known.repository.to_owned()).or(named),
        tokenizer,
        fused: FusedRows::AsTrained,
        describe,
        metadata,
        warnings,
        notes: family.ggml_assumes().map(|what| format!("not in the file and assumed: {what}")).into_iter().collect(),
        tensors: family.ggml_tensors(Arc::clone(&store)),
        store,
    })
}
