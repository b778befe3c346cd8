//! Container files, which hold configuration, vocabulary and weights: GGUF and its legacy GGML predecessors.

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

/// Contents of a container file.
pub(crate) struct Container {
    pub(crate) config: Value,
    pub(crate) tokenizer: Option<Tokenizer>,
    /// Tensors as stored.
    pub(crate) store: Arc<dyn Store>,
    /// Tensors with the values and shapes of the Hub.
    pub(crate) tensors: Arc<dyn Store>,
    pub(crate) fused: FusedRows,
    /// Description of the format in one line.
    pub(crate) describe: String,
    /// Metadata or header of the file.
    pub(crate) metadata: Value,
    pub(crate) warnings: Vec<String>,
    pub(crate) notes: Vec<String>,
    /// For a file without a usable tokenizer, the repository with a tokenizer of the same vocabulary.
    pub(crate) known_tokenizer: Option<String>,
}

/// Returns the file at `path` that may be a container file: `path` itself, or the weight file of a directory.
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

/// Opens `path` if it is a container file. `given` is the user's tokenizer, which takes precedence over the file's.
pub(crate) fn open(path: &Path, given: Option<&Tokenizer>) -> Result<Option<Container>> {
    match pricket_weights::sniff(path)? {
        Format::Gguf => gguf(path, given).map(Some),
        Format::LegacyGgml => ggml(path, given).map(Some),
        _ => Ok(None),
    }
}

/// Opens a weight file of any format: safetensors, PyTorch, an index of shards, GGUF or legacy GGML. Tensors have the
/// names and types of the file.
///
/// # Errors
/// Returns an error that names the file and what is wrong with it.
pub fn open_weights(path: impl AsRef<Path>) -> Result<Arc<dyn Store>> {
    let path = path.as_ref();
    if path.is_file()
        && let Some(container) = open(path, None)?
    {
        return Ok(container.store);
    }
    Ok(Arc::from(pricket_weights::open(path)?))
}

/// Returns the known headers of legacy GGML files, for [`GgmlFile`].
pub fn ggml_layouts() -> Vec<GgmlLayout> {
    all_ggml_layouts()
}

/// Returns the tensors with the row order of the Hub. Files with the names of llama.cpp or of the original program
/// store rows that are rotated together side by side.
pub(crate) fn in_hub_order(store: Arc<dyn Store>, config: &Value) -> pricket_nn::Result<Arc<dyn Store>> {
    let family = checked_family(config)?;
    let (names, paired) = (family.names(), family.paired_rows(config)?);
    if paired.is_empty() {
        return Ok(store);
    }
    let order = |name: &str| {
        // A tensor with the name of the Hub also has the row order of the Hub.
        let is_hubs = paired.iter().any(|(part, _)| name.contains(part));
        if is_hubs { RowOrder::AsStored } else { paired_order(&paired, &names.canonical(name)) }
    };
    Ok(Arc::new(Reordered::new(store, order)?))
}

/// Returns the tensors of a container file with the names and row order of the Hub.
pub(crate) fn under_hub_names(store: Arc<dyn Store>, config: &Value) -> pricket_nn::Result<Arc<dyn Store>> {
    let names = checked_family(config)?.names();
    let store = in_hub_order(store, config)?;
    let stored = store.names().into_iter().map(|name| (names.canonical(&name), name)).collect();
    Ok(Arc::new(Renamed { store, stored }))
}

/// A store whose tensors are renamed.
struct Renamed {
    store: Arc<dyn Store>,
    /// Maps the new name to the name in the store.
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

/// Returns the row order of a tensor in files of llama.cpp. `paired` is the family's list of modules and their heads.
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
                    warnings.push(format!("the tokenizer in the file is not used: {e}"));
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

/// Names of pre-tokenizers that are equivalent to GPT-2's.
const GPT2_LIKE: [&str; 6] = ["default", "gpt-2", "gpt-neox", "mpt", "olmo", "stablelm"];

/// Numbers of tokens and merges of the tokenizer that these families share, without its added runs of spaces.
const WITHOUT_RUNS: (usize, usize) = (50254, 50009);

/// Reads the tokenizer in a GGUF file; returns `None` if there is none.
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
        return Err(wrong(format!(
            "tokenizer of kind {model} ({pre}) is not supported; expected GPT-2's byte-level BPE"
        )));
    }
    let Some(merges) = file.texts("tokenizer.ggml.merges")? else {
        return Err(wrong("the tokenizer has tokens but no merges".into()));
    };
    let kinds = file.integers("tokenizer.ggml.token_type")?.unwrap_or_default();
    if (words.len(), merges.len()) == WITHOUT_RUNS {
        // The first converters omitted the runs of spaces. The model's ids have them, longest first.
        words.extend((2..=24).rev().map(|n| vec![b' '; n]));
    }
    Ok(Some(Tokenizer::from_vocabulary(&words, &kinds, &merges, origin)?))
}

/// Reads a sentencepiece vocabulary, which llama.cpp calls "llama" after its first model with one.
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

/// Reads the sentencepiece vocabulary of a legacy GGML file, if it has one. Such files store the displayed form of
/// pieces: the unknown piece as ` ⁇ `, control pieces as empty strings, byte pieces as the byte, and others with
/// spaces.
fn sentencepiece_of_words(file: &GgmlFile, origin: String) -> Option<Result<Tokenizer>> {
    let words: Vec<Vec<u8>> = (0..file.words()).map(|id| file.word(id)).collect::<Option<_>>()?;
    let scores: Vec<f32> = (0..file.words()).map(|id| file.score(id)).collect::<Option<_>>()?;
    let unknown = " \u{2047} ".as_bytes();
    if words.first().map(Vec::as_slice) != Some(unknown) {
        return None;
    }
    // The 256 byte pieces are consecutive.
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

/// Reads the tokenizer in the directory of a file.
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
        // Only ASCII words are compared: partial characters became U+FFFD, and the spelling of added tokens differs.
        let known = known.filter(|(id, word)| {
            !word.is_empty() && word.is_ascii() && !word.contains(&b'[') && !tokenizer.is_special(*id as u32)
        });
        let (mut all, mut other) = (0, 0);
        for (id, word) in known {
            all += 1;
            other += usize::from(tokenizer.token_bytes(id as u32) != word);
        }
        if 20 * other > all {
            warnings.push(format!(
                "the tokenizer does not match the vocabulary in the file: {other} of {all} words differ"
            ));
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
        notes: family.ggml_assumes().map(|what| format!("not in the file, assumed: {what}")).into_iter().collect(),
        tensors: family.ggml_tensors(Arc::clone(&store)),
        store,
    })
}
