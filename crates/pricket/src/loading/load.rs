//! [`Loader`]: settings for loading a model, and the loading itself.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{DType, Device};
use pricket_hub::Hub;
use pricket_lm::Tokenizer;
use pricket_nn::ops::ActivationPrecision;
use pricket_nn::{
    CacheType, CausalLm, FourBitQuantization, FusedRows, LoadOptions, ModelInfo, NoProgress, Progress, Quantization,
    Storage, Trainable, Weights,
};
use pricket_weights::{Headers, Store};
use serde_json::Value;

use crate::loading::changes::Changes;
use crate::loading::embedded::{EMBEDDED, Embedded};
use crate::loading::family::{checked_family, unlike};
use crate::loading::memory::{self, Estimate};
use crate::loading::open::open_files;
use crate::loading::opened::{Opened, eos_ids, eos_warning};
use crate::loading::pool::{Pooled, pool};
use crate::loading::provenance::Provenance;
use crate::loading::qkv::{self, QkvOrder};
use crate::loading::repository::fetch_id;
use crate::loading::small_files::{TOKENIZERS, at};
use crate::loading::source::{Place, Source};
use crate::text::handle::Parts;
use crate::text::handle::Pricket;
use crate::text::prompts;
use crate::{Error, Result};

/// Loads a model with the default settings: weights as stored, on the CPU, with one thread per physical core.
///
/// `model` is one of:
///
/// - a directory in Hub layout;
/// - a weight file with its config.json in the same directory;
/// - a repository of the Hub: `EleutherAI/pythia-410m`, `EleutherAI/pythia-410m@step3000`, or a name from
///   [`crate::suites::cards`] without its owner.
///
/// The revision after `@` is a branch, tag or commit. For a directory it is a training step in it: `models/tiny@step64`
/// is `models/tiny/revisions/step64`. An existing path wins; otherwise the name of an embedded model is tried
/// ([`Loader::embedded`]).
///
/// Files of a repository are fetched into the cache that Python also uses, and verified. Only the files needed for
/// loading are fetched. `HF_HUB_OFFLINE`, `HF_TOKEN` and other variables have the same meaning as in Python (see
/// [`crate::hub::Settings`]).
///
/// # Errors
/// Returns an error that names the file and what is wrong with it; see [`Error`].
pub fn load(model: impl Into<Source>) -> Result<Pricket> {
    Loader::new(model).load()
}

/// Loads the model that is compiled into pricket: a Pythia with 1.3 million weights, for examples and tests. Needs no
/// files and no network.
///
/// ```
/// let pricket = pricket::tiny()?;
/// let text = pricket.generate("The people of the United", &Default::default())?.text;
/// assert!(text.starts_with(" States"));
/// # Ok::<(), pricket::Error>(())
/// ```
///
/// # Errors
/// Returns [`Error::Options`] if threads cannot be started.
pub fn tiny() -> Result<Pricket> {
    Loader::tiny().load()
}

/// Element type of the loaded weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Precision {
    /// As stored on the CPU, bf16 on a GPU.
    #[default]
    Auto,
    /// 32-bit float.
    F32,
    /// bfloat16.
    BF16,
    /// IEEE half precision. Pythia-70m and RedPajama-INCITE overflow in it on a GPU.
    F16,
}

impl std::fmt::Display for Precision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Precision::Auto => "auto",
            Precision::F32 => "f32",
            Precision::BF16 => "bf16",
            Precision::F16 => "f16",
        })
    }
}

impl std::str::FromStr for Precision {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "auto" => Ok(Precision::Auto),
            "f32" => Ok(Precision::F32),
            "bf16" => Ok(Precision::BF16),
            "f16" => Ok(Precision::F16),
            _ => Err(Error::Unknown {
                what: "precision",
                name: name.into(),
                known: "expected auto, f32, bf16 or f16".into(),
            }),
        }
    }
}

/// Settings for loading a model. Every setting has a default.
///
/// ```no_run
/// use pricket::Loader;
/// use pricket::loading::Precision;
/// let pricket = Loader::new("models/pythia-410m").precision(Precision::F32).threads(4).load()?;
/// # Ok::<(), pricket::Error>(())
/// ```
#[derive(Clone)]
#[allow(clippy::struct_excessive_bools, reason = "each is set by a method of its own")]
pub struct Loader {
    origin: Origin,
    device: Device,
    precision: Precision,
    threads: Option<usize>,
    deterministic: bool,
    tokenizer: Option<PathBuf>,
    progress: Arc<dyn Progress>,
    hub: Option<Hub>,
    train: bool,
    any_memory: bool,
    revision: Option<String>,
    file: Option<String>,
    qkv: QkvOrder,
    quantization: Option<Quantization>,
    four_bit: Option<FourBitQuantization>,
    activations: ActivationPrecision,
    cache: Option<CacheType>,
    changes: Changes,
    allow_unused: bool,
    in_place: bool,
    #[cfg(feature = "train")]
    adapters: Vec<PathBuf>,
}

#[derive(Clone)]
enum Origin {
    Named(Source),
    Embedded(&'static Embedded),
    Store { config: Value, store: Arc<dyn Store> },
}

impl std::fmt::Debug for Loader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Loader({}, {:?}, {:?})", self.origin.name(), self.device, self.precision)
    }
}

impl Origin {
    fn name(&self) -> String {
        match self {
            Origin::Named(source) => source.to_string(),
            Origin::Embedded(model) => format!("the embedded model {}", model.name),
            Origin::Store { .. } => "the model".into(),
        }
    }
}

impl Loader {
    /// Creates a loader for `model`, which is named as in [`load`].
    pub fn new(model: impl Into<Source>) -> Self {
        Self::from_origin(Origin::Named(model.into()))
    }

    /// Creates a loader for the embedded model of [`tiny`].
    pub fn tiny() -> Self {
        Self::from_origin(Origin::Embedded(&EMBEDDED[0]))
    }

    /// Creates a loader for one of the embedded models: `tiny` (Pythia), `tiny-mpt` (MPT), `tiny-chat`
    /// (RedPajama-INCITE-Chat), `tiny-llama` (OpenLLaMA) or `tiny-rwkv` (RWKV-4).
    ///
    /// # Errors
    /// Returns [`Error::Unknown`] if no embedded model has this name.
    pub fn embedded(name: &str) -> Result<Self> {
        let names = || EMBEDDED.iter().map(|model| model.name).collect::<Vec<_>>().join(", ");
        let known = || format!("expected one of {}", names());
        let missing = || Error::Unknown { what: "embedded model", name: name.into(), known: known() };
        Embedded::find(name).map(|model| Self::from_origin(Origin::Embedded(model))).ok_or_else(missing)
    }

    /// Creates a loader for the model that `config` describes, with weights from any store (for example random weights)
    /// and without a tokenizer.
    pub fn from_store(config: Value, store: Arc<dyn Store>) -> Self {
        Self::from_origin(Origin::Store { config, store })
    }

    /// Creates a loader for the model that `config` describes, with the random initial weights of its family.
    ///
    /// # Errors
    /// Returns [`Error::Refused`] if no family supports the configuration, or if its initialization scheme is not
    /// implemented.
    #[cfg(feature = "train")]
    pub fn untrained(config: Value, seed: u64) -> Result<Self> {
        let family = checked_family(&config)?;
        let scheme = family.initialization(&config)?;
        Ok(Self::from_store(config, Arc::new(pricket_train::Untrained::new(scheme, family.names(), seed))))
    }

    fn from_origin(origin: Origin) -> Self {
        Self {
            origin,
            device: Device::Cpu,
            precision: Precision::Auto,
            threads: None,
            deterministic: false,
            tokenizer: None,
            progress: Arc::new(NoProgress),
            hub: None,
            train: false,
            any_memory: false,
            revision: None,
            file: None,
            qkv: QkvOrder::Auto,
            quantization: None,
            four_bit: None,
            activations: ActivationPrecision::F32,
            cache: None,
            changes: Changes::default(),
            allow_unused: false,
            in_place: false,
            #[cfg(feature = "train")]
            adapters: Vec::new(),
        }
    }

    /// Sets the compute device, the CPU by default; see [`crate::loading::device`].
    #[must_use]
    pub fn device(mut self, device: Device) -> Self {
        self.device = device;
        self
    }

    /// Sets the element type of the weights; [`Precision::Auto`] by default.
    #[must_use]
    pub fn precision(mut self, precision: Precision) -> Self {
        self.precision = precision;
        self
    }

    /// Quantizes the matrices while loading. CPU only.
    #[must_use]
    pub fn quantize(mut self, quantization: Quantization) -> Self {
        self.quantization = Some(quantization);
        self
    }

    /// Quantizes the matrices of the blocks to 4 bits while they are loaded, on the CPU, as bitsandbytes does.
    ///
    /// ```
    /// use pricket::Loader;
    /// let small = Loader::tiny().four_bit("nf4".parse().map_err(pricket::Error::Options)?).load()?;
    /// assert!(small.info().weight_bytes < pricket::tiny()?.info().weight_bytes);
    /// # Ok::<(), pricket::Error>(())
    /// ```
    #[must_use]
    pub fn four_bit(mut self, quantization: FourBitQuantization) -> Self {
        self.four_bit = Some(quantization);
        self
    }

    /// Sets the precision of activations in matrix products, f32 by default. CPU only.
    #[must_use]
    pub fn activations(mut self, precision: ActivationPrecision) -> Self {
        self.activations = precision;
        self
    }

    /// Sets the type of cached keys and values. The default depends on the activations: f32 for f32, f16 for 8-bit, and
    /// bf16 for bf16 activations.
    #[must_use]
    pub fn cache(mut self, kind: CacheType) -> Self {
        self.cache = Some(kind);
        self
    }

    /// Sets the number of CPU threads; [`default_threads`](crate::loading::default_threads) by default.
    ///
    /// Candle's own operations on large tensors use other threads, but models contain few such operations. The
    /// environment variable `CANDLE_NUM_THREADS` sets the number of those threads; the default is the number of
    /// physical cores. They spin while they wait. If `threads` is smaller than the number of cores, set the variable to
    /// `threads` before the process starts. The examples do this themselves.
    #[must_use]
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = Some(threads);
        self
    }

    /// Fixes the order of summation, so that a prompt gives the same bits alone and in any batch, read at once or in
    /// parts.
    ///
    /// Products of a few rows then take longer, mostly in decoding with float weights; docs/performance.md has
    /// measurements. [`ActivationPrecision::BF16`] acts as `F32`. Supported on the CPU only. Results of another
    /// instruction set or another release may still differ.
    #[must_use]
    pub fn deterministic(mut self, deterministic: bool) -> Self {
        self.deterministic = deterministic;
        self
    }

    /// Uses this tokenizer file (tokenizer.json or a sentencepiece tokenizer.model) instead of the checkpoint's.
    #[must_use]
    pub fn tokenizer(mut self, path: impl AsRef<Path>) -> Self {
        self.tokenizer = Some(path.as_ref().to_owned());
        self
    }

    /// Chooses a branch, tag or commit, such as `step3000`. For a directory, chooses one of the training steps in it.
    /// Same as [`Source::revision`].
    #[must_use]
    pub fn revision(mut self, revision: impl Into<String>) -> Self {
        self.revision = Some(revision.into());
        self
    }

    /// Chooses a weight file of the repository or directory, instead of the preferred one: for example one of several
    /// GGUF files, or `pytorch_model.bin` where `model.safetensors` also exists.
    #[must_use]
    pub fn file(mut self, name: impl Into<String>) -> Self {
        self.file = Some(name.into());
        self
    }

    /// Fetches repositories from this Hub instead of the one that the environment variables configure.
    #[must_use]
    pub fn hub(mut self, hub: Hub) -> Self {
        self.hub = Some(hub);
        self
    }

    /// Sets the receiver of progress reports, in bytes fetched and bytes loaded. It can cancel the work.
    #[must_use]
    pub fn progress(mut self, progress: Arc<dyn Progress>) -> Self {
        self.progress = progress;
        self
    }

    /// Loads every weight as an f32 variable that collects gradients; see [`Pricket::parameters`].
    #[must_use]
    pub fn train(mut self) -> Self {
        self.train = true;
        self
    }

    /// Skips the check of free memory before loading.
    #[must_use]
    pub fn allow_any_memory(mut self) -> Self {
        self.any_memory = true;
        self
    }

    /// Sets the row order of fused query-key-value matrices for a GGUF file that does not state it. By default the
    /// order is determined while loading; see [`QkvOrder`].
    #[must_use]
    pub fn qkv_order(mut self, order: QkvOrder) -> Self {
        self.qkv = order;
        self
    }

    /// Overrides the GELU variant of the configuration: `gelu` (error function) or `gelu_tanh` (tanh approximation).
    /// llama.cpp uses `gelu_tanh` for every model, and GPT-NeoX was trained with it.
    #[must_use]
    pub fn activation_function(mut self, name: impl Into<String>) -> Self {
        self.changes.activation_function = Some(name.into());
        self
    }

    /// Sets a key of the configuration, such as `use_parallel_residual` or `attn_config.clip_qkv`, before the
    /// configuration is checked. Use it for files with wrong or missing values. A key that the family does not know is
    /// an error.
    #[must_use]
    pub fn set(mut self, key: impl Into<String>, value: impl Into<Value>) -> Self {
        self.changes.keys.push((key.into(), value.into()));
        self
    }

    /// Uses f32, f16 and bf16 matrices directly in the memory-mapped file instead of copying them; see
    /// [`LoadOptions::in_place`](pricket_nn::LoadOptions::in_place). Loading is almost free, weights that are never
    /// used are never read, and processes share one copy.
    ///
    /// Off by default, because the file must then not change. Overwriting it changes the model without an error.
    /// Truncating it gives an error at the next matrix product, or ends the process if a product is running. Files in
    /// the Hub's cache are never overwritten.
    #[must_use]
    pub fn in_place(mut self) -> Self {
        self.in_place = true;
        self
    }

    /// Allows weights that the configuration does not use, and ignores them. By default they are an error: usually the
    /// configuration belongs to another model, and the output would be wrong.
    #[must_use]
    pub fn allow_unused(mut self) -> Self {
        self.allow_unused = true;
        self
    }

    /// Adds a LoRA adapter in PEFT's file format: a directory, or a repository of the Hub with an optional `@REVISION`.
    /// The changes of several adapters add up. [`Loader::convert`] merges them into the weights.
    #[cfg(feature = "train")]
    #[must_use]
    pub fn adapter(mut self, adapter: impl AsRef<Path>) -> Self {
        self.adapters.push(adapter.as_ref().to_owned());
        self
    }

    /// Fetches and reads the adapters.
    #[cfg(feature = "train")]
    pub(crate) fn read_adapters(&self) -> Result<Vec<pricket_train::Lora>> {
        let find = |path: &PathBuf| crate::loading::adapters::find(path, self.hub.as_ref(), &*self.progress);
        self.adapters.iter().map(find).collect()
    }

    /// Returns the storage type of the matrices, after checking that the options agree.
    fn storage(&self) -> Result<Storage> {
        if self.quantization.is_some() && self.four_bit.is_some() {
            return Err(Error::Options("weights are quantized to blocks or to 4 bits, not to both".into()));
        }
        if (self.quantization.is_some() || self.four_bit.is_some())
            && (!self.device.is_cpu() || self.precision != Precision::Auto)
        {
            let what = "quantizing while loading requires the CPU and the precision auto";
            return Err(Error::Options(what.into()));
        }
        let storage = match (self.quantization, self.precision, self.device.is_cpu()) {
            (Some(quantization), ..) => Storage::Quantize(quantization),
            (None, Precision::Auto, true) => Storage::AsStored,
            (None, Precision::F32, _) => Storage::Cast(DType::F32),
            (None, Precision::F16, _) => Storage::Cast(DType::F16),
            (None, Precision::BF16, _) | (None, Precision::Auto, false) => Storage::Cast(DType::BF16),
        };
        Ok(self.four_bit.map_or(storage, Storage::FourBit))
    }

    /// Loads the model. Headers, names, shapes and memory are checked before any weight is read.
    ///
    /// # Errors
    /// Returns an error that names the file and what is wrong with it; see [`Error`].
    pub fn load(self) -> Result<Pricket> {
        let mut opened = self.opened()?;
        let config_path = opened.config_path.clone();
        let refused = |e| at(&config_path, e);
        let family = checked_family(&opened.config).map_err(refused)?;
        let storage = self.storage()?;
        let options = LoadOptions {
            storage,
            trainable: if self.train { Trainable::All } else { Trainable::None },
            precision: self.activations,
            cache: self.cache,
            allow_unused: self.allow_unused,
            in_place: self.in_place,
            ..LoadOptions::default()
        };
        let store = Arc::new(Headers::of(Arc::clone(&opened.store)));
        let headers = Weights::new(store, family.names(), options.clone());
        let dry = family.load(&opened.config, &headers).map_err(refused)?;
        self.check_unused(&headers, &*opened.store)?;
        if self.device.is_cpu() && !self.any_memory {
            let mut estimate = Estimate::new(dry.info().clone(), 512);
            // The system reclaims pages of a mapped file when it needs memory.
            estimate.weights = estimate.weights.saturating_sub(headers.in_place_bytes());
            memory::check(&self.origin.name(), &estimate)?;
        }
        if self.cache == Some(CacheType::Q8_0) && !self.device.is_cpu() {
            return Err(Error::Options("a q8_0 cache requires the CPU; on a GPU use f32, f16 or bf16".into()));
        }
        if self.deterministic && !self.device.is_cpu() {
            return Err(Error::Options("a fixed order of summation requires the CPU".into()));
        }
        #[cfg(feature = "train")]
        let adapters = self.read_adapters()?;
        let pool = pool(self.threads)?;
        let pool = if self.deterministic { pool.with_fixed_order() } else { pool };
        let read = headers.bytes_read();
        let build = |in_model_order: bool| {
            self.progress.begin(&format!("loading {}", self.origin.name()), read, "bytes");
            let (device, progress) = (self.device.clone(), Arc::clone(&self.progress));
            let options = LoadOptions { device, progress, in_model_order, ..options.clone() };
            let weights = Weights::new(Arc::clone(&opened.store), family.names(), options);
            let model = pool.install(|| family.load(&opened.config, &weights));
            self.progress.end();
            let pooled = |model| -> Arc<dyn CausalLm> { Arc::new(Pooled { model, pool: pool.clone() }) };
            Ok((model.map(pooled).map_err(refused)?, weights))
        };
        let (in_model_order, (model, weights)) = match (qkv::decided(&opened.fused, self.qkv), &opened.fused) {
            (None, &FusedRows::Unknown { model_order_is_likely, why }) => {
                let (order, built, note) = qkv::by_evidence(build, model_order_is_likely, why, &opened, &headers)?;
                opened.notes.push(note);
                (order, built)
            }
            (decided, _) => {
                let order = decided.unwrap_or(false);
                (order, build(order)?)
            }
        };
        let names_on_file = if opened.is_container { Vec::new() } else { weights.loaded_names() };
        #[cfg(feature = "train")]
        let model = adapters.iter().try_fold(model, |model, adapter| -> Result<_> {
            let base = crate::loading::adapters::base(model, family.names(), names_on_file.clone());
            opened.notes.extend(crate::loading::adapters::notes(adapter, &opened.provenance));
            Ok(adapter.apply(&base)?)
        })?;
        let stranger = card_mismatch_warning(&opened.provenance, model.info(), &opened.config);
        let license = license_warning(&opened.provenance);
        let (format, chosen) = prompts::choose(&opened);
        let generation_config = opened.generation_config.as_ref();
        let ends = eos_warning(&opened.config, generation_config);
        Ok(Pricket::new(Parts {
            threads: pool.threads(),
            model,
            eos: eos_ids(&opened.config, generation_config, opened.tokenizer.as_ref()),
            tokenizer: opened.tokenizer,
            config: opened.config,
            parameters: weights.parameters(),
            warnings: opened
                .warnings
                .into_iter()
                .chain(unused_warning(&weights))
                .chain(ends)
                .chain(stranger)
                .chain(license)
                .collect(),
            notes: opened.notes.into_iter().chain(chosen).chain(slow_note()).collect(),
            in_model_order,
            format,
            provenance: opened.provenance,
            _in_use: opened.in_use.map(Arc::new),
            names_on_file,
        }))
    }

    /// Opens the checkpoint and applies the changes that these settings request.
    pub(crate) fn opened(&self) -> Result<Opened> {
        let mut opened = self.open()?;
        if self.qkv != QkvOrder::Auto && opened.fused == FusedRows::AsTrained {
            let what = "qkv_order is set, but this checkpoint is not a GGUF file with an unknown order of QKV rows";
            return Err(Error::Options(what.into()));
        }
        if let Some(path) = &self.tokenizer {
            opened.provenance.replace(&TOKENIZERS, path);
            opened.tokenizer_path = Some(path.clone());
        }
        Ok(opened)
    }

    /// Returns an error if the configuration does not use all weights, unless that is allowed.
    pub(crate) fn check_unused(&self, weights: &Weights, store: &dyn Store) -> Result<()> {
        let unused = if self.allow_unused { Vec::new() } else { weights.unused_weights() };
        let Some(first) = unused.first() else { return Ok(()) };
        let origin = store.origin(first);
        Err(Error::Unused { path: origin.into(), first: pricket_weights::clip(first), count: unused.len() })
    }

    pub(crate) fn allows_unused(&self) -> bool {
        self.allow_unused
    }

    #[cfg(feature = "train")]
    pub(crate) fn has_adapters(&self) -> bool {
        !self.adapters.is_empty()
    }

    /// Returns whether the rows of fused matrices are in the model's order on file. If the file does not state it,
    /// loads the model to determine it.
    pub(crate) fn in_model_order(&self, opened: &mut Opened) -> Result<bool> {
        if let Some(known) = qkv::decided(&opened.fused, self.qkv) {
            return Ok(known);
        }
        let loaded = self.clone().load()?;
        opened.notes.extend(loaded.notes().iter().cloned());
        Ok(loaded.in_model_order())
    }

    pub(crate) fn reporter(&self) -> &dyn Progress {
        &*self.progress
    }

    /// Returns the origin with the chosen revision and file.
    fn origin(&self) -> Result<Origin> {
        let mut source = match (&self.origin, self.revision.is_some() || self.file.is_some()) {
            (Origin::Named(source), _) => source.clone(),
            (Origin::Embedded(model), true) => Source::new(model.directory()),
            (Origin::Store { .. }, true) => {
                let what = format!("revision or file: {} has no revisions or files to choose from", self.origin.name());
                return Err(Error::Source(what));
            }
            (origin, false) => return Ok(origin.clone()),
        };
        if let Some(revision) = &self.revision {
            source = source.revision(revision);
        }
        if let Some(file) = &self.file {
            source = source.file(file);
        }
        Ok(source.embedded().map_or(Origin::Named(source), Origin::Embedded))
    }

    fn open(&self) -> Result<Opened> {
        let given = self.tokenizer.as_ref().map(Tokenizer::from_file).transpose()?;
        match self.origin()? {
            Origin::Embedded(model) => {
                let mut opened = model.open(given)?;
                self.changes.apply(&mut opened.config)?;
                Ok(opened)
            }
            Origin::Store { mut config, store } => {
                self.changes.apply(&mut config)?;
                Ok(Opened { config, config_path: "config".into(), tokenizer: given, ..Opened::new(store) })
            }
            Origin::Named(source) => match source.locate()? {
                Place::Local(path) => {
                    let mut opened = open_files(&path, None, given, &self.changes)?;
                    if opened.known_tokenizer.is_some() {
                        let hub = self.hub.clone().map_or_else(Hub::from_env, Ok)?;
                        opened.take_known_tokenizer(&path.display().to_string(), &hub, &*self.progress)?;
                    }
                    Ok(opened)
                }
                Place::Hub(id, file) => {
                    let hub = self.hub.clone().map_or_else(Hub::from_env, Ok)?;
                    let fetched = fetch_id(&id, file.as_deref(), &self.changes, &hub, &*self.progress)?;
                    let mut opened = open_files(&fetched.weights.clone(), Some(fetched), given, &self.changes)?;
                    opened.borrow_tokenizer(&id, &hub, &*self.progress)?;
                    opened.take_known_tokenizer(&id.to_string(), &hub, &*self.progress)?;
                    Ok(opened)
                }
            },
        }
    }
}

/// Returns a warning if the model differs from the model card of its repository.
fn card_mismatch_warning(provenance: &Provenance, info: &ModelInfo, config: &Value) -> Option<String> {
    let card = crate::suites::cards::card(provenance.repo.as_deref()?)?;
    if let Some(what) = unlike(config, &card.family) {
        return Some(format!("{}: config.json does not describe a model of {}: {what}", card.id, card.suite));
    }
    let found = (info.parameters, [info.vocab, info.d_model]);
    // A repository may hold several models.
    let is_known = crate::suites::cards::cards()
        .iter()
        .any(|other| other.id == card.id && found == (other.parameters, other.embedding));
    (!is_known).then(|| {
        format!(
            "{}: the model has {} weights and an embedding of shape {:?}; the published model has {} and {:?}",
            card.id, found.0, found.1, card.parameters, card.embedding
        )
    })
}

/// Returns a note, once per process, if the program was compiled without optimization.
fn slow_note() -> Option<String> {
    static TOLD: AtomicBool = AtomicBool::new(false);
    let slow = cfg!(pricket_unoptimized) && !TOLD.swap(true, Ordering::Relaxed);
    let note = "this program is compiled without optimization and about fifty times slower: use `--release`, or add \
                `[profile.dev.package.\"*\"]` with `opt-level = 3` to Cargo.toml";
    slow.then(|| note.to_owned())
}

/// Returns a warning if the README of an unlisted model forbids commercial use. For published models, the warning comes
/// from the model card.
fn license_warning(provenance: &Provenance) -> Option<String> {
    let license = provenance.license.as_deref().filter(|license| license.split('-').any(|part| part == "nc"))?;
    let known = provenance.repo.as_deref().and_then(crate::suites::cards::card).is_some();
    (!known).then(|| format!("{}: license {license}, no commercial use", provenance.name()))
}

/// Returns a warning if the checkpoint contains tensors that the configuration does not use.
pub(crate) fn unused_warning(weights: &Weights) -> Option<String> {
    let unused = weights.unused();
    let first = pricket_weights::clip(unused.first()?);
    let what = if weights.unused_weights().is_empty() {
        ""
    } else {
        "; some are named like weights of this family, so loading refuses them"
    };
    Some(format!("{} not used by this configuration ({first}, ...){what}", crate::error::tensors(unused.len())))
}
