//! LoRA adapters (Hu et al. 2021, arXiv:2106.09685): reading and writing PEFT's files, attaching adapters to a model,
//! merging.
//!
//! An adapter changes a linear layer to `y = x (W + s · B A)ᵀ + b`, with `A [rank, inputs]`, `B [outputs, rank]` and
//! the scale `s = alpha / rank`. Rows of `B` are stored in the order of the checkpoint on the Hub.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use candle_core::{DType, Device, Tensor, Var};
use pricket_nn::ops::Matrix;
use pricket_nn::{Adapter, CausalLm, Dropout, Layer, Linear, Names, Parameter, RowOrder};
use pricket_weights::{clip, parse_json, read_tensor};

use crate::base::{Base, module_of};
use crate::config::{Bias, Initial, LoraConfig, Select};
use crate::files::{read_small, write_tensors, write_text};
use crate::random::{normal, number_of, uniform};
use crate::targets::{Named, Targets};
use crate::{Error, Result};

/// Prefix of module names in PEFT's files.
const PREFIX: &str = "base_model.model.";

/// The low-rank change of one module, with rows in the Hub's order.
#[derive(Clone, Debug)]
pub(crate) struct LowRank {
    /// `[rank, inputs]`.
    pub(crate) a: Tensor,
    /// `[outputs, rank]`.
    pub(crate) b: Tensor,
    /// DoRA's magnitudes, `[outputs]`.
    pub(crate) magnitude: Option<Tensor>,
}

/// A LoRA adapter: settings and tensors, as stored in PEFT's files.
///
/// ```
/// use std::sync::Arc;
/// use pricket_gpt_neox::{Config, NAMES, load};
/// use pricket_nn::Weights;
/// use pricket_train::{Base, Lora, LoraConfig};
/// use pricket_weights::{Dtype, Random};
///
/// let config = Config::from_json(&serde_json::json!({
///     "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
///     "intermediate_size": 128, "hidden_act": "gelu", "max_position_embeddings": 64,
/// }))?;
/// let model = load(&config, &Weights::as_stored(Arc::new(Random::new(Dtype::F32, 0)), NAMES))?;
/// let base = Base::new(Arc::new(model), NAMES);
///
/// let lora = Lora::new(LoraConfig { rank: 4, ..LoraConfig::default() }, &base, 0)?;
/// let folder = std::env::temp_dir().join("pricket-adapter");
/// lora.write(&folder)?;
/// let adapted = Lora::read(&folder)?.apply(&base)?;
/// assert_eq!(adapted.info().layers, 2);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Lora {
    pub(crate) config: LoraConfig,
    /// The file or a description, for messages.
    pub(crate) origin: String,
    /// Low-rank changes by module name on the Hub.
    pub(crate) low: BTreeMap<String, LowRank>,
    /// Weights and biases that are stored in full, by tensor name on the Hub.
    pub(crate) whole: BTreeMap<String, Tensor>,
}

/// A model and the parameters that are trained: those of an adapter, or all.
#[derive(Clone)]
pub struct Tuned {
    /// The model, which computes with the parameters below.
    pub model: Arc<dyn CausalLm>,
    /// The trained parameters. For an adapter they have the names of adapter_model.safetensors.
    pub parameters: Vec<Parameter>,
    /// Number of the pass, shared with [`Dropout::step`], so that each pass has its own dropout.
    pub passes: Arc<AtomicU64>,
}

impl std::fmt::Debug for Tuned {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tuned({}, {} parameters)", self.model.info().family, self.parameters.len())
    }
}

impl Lora {
    /// Creates a new adapter for `base`. The same seed gives the same initial values on every machine.
    ///
    /// # Errors
    /// Returns [`Error::Config`] with the key if a setting is invalid or matches no module of the model.
    pub fn new(mut config: LoraConfig, base: &Base, seed: u64) -> Result<Self> {
        config.check()?;
        let (mut low, mut whole, mut known) = (BTreeMap::new(), BTreeMap::new(), BTreeSet::new());
        let mut last_parts = BTreeSet::new();
        let targets = Targets::new(&config)?;
        let mut saved = vec![false; config.modules_to_save.len()];
        base.visit(&mut |layer| {
            let names = base.spellings(layer.name());
            let is_named = |name: &&String| targets.saves(name) || targets.names(name);
            let name = names.iter().find(is_named).unwrap_or(&names[0]).clone();
            let last = name.rsplit('.').next().unwrap_or(&name).to_owned();
            let linear = if let Layer::Linear(linear) = layer { Some(&**linear) } else { None };
            let is_head = layer.name() == base.names().head;
            known.insert(last.clone());
            let is_target = targets.has(Named { name: &name, is_linear: linear.is_some(), is_head })?;
            let is_saved = targets.saves(&name);
            for (end, found) in config.modules_to_save.iter().zip(&mut saved) {
                *found |= name.ends_with(end.as_str());
            }
            if is_target {
                let Some(linear) = linear else {
                    let what = format!("{name} is not a linear layer; modules_to_save trains it in full");
                    return Err(Error::config("target_modules", what));
                };
                if !is_head {
                    last_parts.insert(last);
                }
                low.insert(name.clone(), fresh(&config, linear, targets.rank(&name)?, &name, seed)?);
            }
            let has_bias = match config.bias {
                Bias::None => is_saved,
                Bias::All => true,
                Bias::LoraOnly => is_saved || is_target,
            };
            for (end, tensor) in parts_in_full(layer)? {
                if (end == "weight" && is_saved) || (end == "bias" && has_bias) {
                    whole.insert(format!("{name}.{end}"), tensor);
                }
            }
            Ok(())
        })?;
        let known = known.into_iter().collect::<Vec<_>>().join(", ");
        if let Some((name, _)) = config.modules_to_save.iter().zip(&saved).find(|(_, found)| !**found) {
            return Err(Error::Config {
                key: "modules_to_save".into(),
                what: format!("the model has no module {}; it has {known}", clip(name)),
            });
        }
        if low.is_empty() {
            let what = format!("no module matches; the model has {known}");
            return Err(Error::Config { key: "target_modules".into(), what });
        }
        // PEFT also replaces "all-linear" by the list of names it found.
        if config.targets == Select::AllLinear {
            config.targets = Select::Names(last_parts.into_iter().collect());
        }
        Ok(Self { config, origin: "the adapter".into(), low, whole })
    }

    /// Returns the settings.
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// Sets the repository or path of the base model, and its revision, in the settings.
    pub fn set_base(&mut self, base: Option<String>, revision: Option<String>) {
        (self.config.base, self.config.revision) = (base, revision);
    }

    /// Returns the names on the Hub of the modules that have a low-rank change.
    pub fn modules(&self) -> impl Iterator<Item = &str> {
        self.low.keys().map(String::as_str)
    }

    /// Returns the number of elements of all tensors of the adapter.
    pub fn weights(&self) -> usize {
        self.tensors().values().map(Tensor::elem_count).sum()
    }

    /// Reads an adapter written by PEFT or by [`Lora::write`].
    ///
    /// `directory` holds adapter_config.json and adapter_model.safetensors or adapter_model.bin.
    ///
    /// # Errors
    /// Returns [`Error::Config`] if a setting is invalid or not implemented. Returns [`Error::Adapter`] with the tensor
    /// if one is missing, has a wrong shape, or belongs to an adapter type that is not implemented.
    pub fn read(directory: impl AsRef<Path>) -> Result<Self> {
        let directory = directory.as_ref();
        let path = directory.join("adapter_config.json");
        let text = read_small(&path)?;
        let json = parse_json(&text).map_err(|e| Error::Adapter {
            origin: path.display().to_string(),
            what: clip(&format!("is not JSON: {e}")),
        })?;
        let config = LoraConfig::from_json(&json)?;
        let files = ["adapter_model.safetensors", "adapter_model.bin"].map(|name| directory.join(name));
        let Some(file) = files.iter().find(|file| file.exists()) else {
            let what = "has adapter_config.json, but no adapter_model.safetensors or adapter_model.bin".into();
            return Err(Error::Adapter { origin: directory.display().to_string(), what });
        };
        let store = pricket_weights::open_file(file)?;
        let mut tensors = BTreeMap::new();
        for name in store.names() {
            let entry = store.entry(&name).ok_or_else(|| store.missing(&name))?;
            if !entry.dtype.is_float() || entry.dtype.to_candle().is_none() {
                let what = format!("tensor {name} is stored as {}; expected f32, f16 or bf16", entry.dtype.name());
                return Err(Error::Adapter { origin: file.display().to_string(), what });
            }
            let tensor = read_tensor(&*store, &name, &Device::Cpu)?.to_dtype(DType::F32)?;
            tensors.insert(name, tensor);
        }
        Self::from_tensors(config, tensors, &file.display().to_string())
    }

    /// Creates an adapter from the tensors of an adapter_model.safetensors. Error messages name `origin`.
    ///
    /// # Errors
    /// Returns the errors of [`Lora::read`].
    pub fn from_tensors(config: LoraConfig, tensors: BTreeMap<String, Tensor>, origin: &str) -> Result<Self> {
        config.check()?;
        let wrong = |what: String| Error::Adapter { origin: origin.into(), what: clip(&what) };
        let (mut parts, mut whole) = (BTreeMap::<String, [Option<Tensor>; 3]>::new(), BTreeMap::new());
        for (name, tensor) in tensors {
            let bare = name.strip_prefix(PREFIX).unwrap_or(&name);
            let ends = [
                (".lora_A.weight", 0),
                (".lora_B.weight", 1),
                (".lora_magnitude_vector", 2),
                (".lora_magnitude_vector.weight", 2),
            ];
            if let Some((module, part)) = ends.iter().find_map(|(end, part)| Some((bare.strip_suffix(end)?, *part))) {
                parts.entry(module.to_owned()).or_default()[part] = Some(tensor);
                continue;
            }
            if bare.contains(".lora_") || module_of(bare).is_none() {
                let what = format!(
                    "tensor {name}: this type of adapter is not implemented; expected lora_A, lora_B or a full weight"
                );
                return Err(wrong(what));
            }
            whole.insert(bare.replace(".base_layer.", ".").replace(".modules_to_save.", "."), tensor);
        }
        let targets = Targets::new(&config)?;
        let mut low = BTreeMap::new();
        for (name, parts) in parts {
            let [Some(a), Some(b), magnitude] = parts else {
                return Err(wrong(format!("{name}: lora_A or lora_B is missing")));
            };
            let (expected, shapes) = (targets.rank(&name)?, (a.dims().to_vec(), b.dims().to_vec()));
            if a.rank() != 2 || b.rank() != 2 || shapes.0[0] != expected || shapes.1[1] != expected {
                return Err(wrong(format!(
                    "{name}: lora_A is {:?} and lora_B {:?}; expected rank {expected}",
                    shapes.0, shapes.1
                )));
            }
            if config.dora != magnitude.is_some() {
                let (has, says) = if config.dora { ("no", "true") } else { ("a", "false") };
                return Err(wrong(format!("{name} has {has} lora_magnitude_vector, but use_dora is {says}")));
            }
            low.insert(name, LowRank { a, b, magnitude });
        }
        if low.is_empty() && whole.is_empty() {
            return Err(wrong("expected tensors of a LoRA adapter, found none".into()));
        }
        Ok(Self { config, origin: origin.into(), low, whole })
    }

    /// Returns the tensors with the names and the row order of adapter_model.safetensors.
    pub fn tensors(&self) -> BTreeMap<String, Tensor> {
        let mut out = BTreeMap::new();
        for (name, LowRank { a, b, magnitude }) in &self.low {
            out.insert(format!("{PREFIX}{name}.lora_A.weight"), a.clone());
            out.insert(format!("{PREFIX}{name}.lora_B.weight"), b.clone());
            out.extend(magnitude.clone().map(|m| (format!("{PREFIX}{name}.lora_magnitude_vector"), m)));
        }
        out.extend(self.whole.iter().map(|(name, tensor)| (self.whole_key(name), tensor.clone())));
        out
    }

    /// Returns PEFT's name of a tensor that is stored in full.
    fn whole_key(&self, name: &str) -> String {
        match name.strip_suffix(".bias").filter(|module| self.low.contains_key(*module)) {
            Some(module) => format!("{PREFIX}{module}.base_layer.bias"),
            None => format!("{PREFIX}{name}"),
        }
    }

    /// Writes adapter_config.json and adapter_model.safetensors into a directory, in PEFT's format.
    ///
    /// An interrupted write leaves no incomplete file under these names.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if a file cannot be written.
    pub fn write(&self, directory: impl AsRef<Path>) -> Result<()> {
        let directory = directory.as_ref();
        std::fs::create_dir_all(directory).map_err(Error::io(directory))?;
        write_tensors(&directory.join("adapter_model.safetensors"), &self.tensors())?;
        let json = serde_json::to_string_pretty(&self.config.to_json()).unwrap_or_default();
        write_text(&directory.join("adapter_config.json"), &(json + "\n"))
    }

    /// Returns a model that computes the base with this adapter, in addition to the adapters it already has.
    ///
    /// The base's weights are shared, and the base is unchanged. To remove the adapter, use the base again.
    ///
    /// # Errors
    /// Returns [`Error::Adapter`] with the module if the model does not have it or its shape differs.
    pub fn apply(&self, base: &Base) -> Result<Arc<dyn CausalLm>> {
        Ok(self.attach(base, None)?.model)
    }

    /// Returns the base with this adapter, whose tensors are variables that collect gradients. `seed` is the seed of
    /// the dropout.
    ///
    /// # Errors
    /// Returns the errors of [`Lora::apply`].
    pub fn train(&self, base: &Base, seed: u64) -> Result<Tuned> {
        self.attach(base, Some(seed))
    }

    /// Checks that the base has every module of the adapter, with the same shapes. Reads no weights of the base.
    ///
    /// # Errors
    /// Returns the errors of [`Lora::apply`].
    pub fn check(&self, base: &Base) -> Result<()> {
        let (mut shapes, mut dims) = (BTreeMap::new(), BTreeMap::new());
        base.visit(&mut |layer| {
            let name = layer.name();
            let mut note = |end: &str, shape: Vec<usize>| dims.insert(format!("{name}.{end}"), shape);
            match layer {
                Layer::Linear(linear) => {
                    let (rows, columns) = linear.weight().shape()?;
                    shapes.insert(name.to_owned(), (rows, columns));
                    note("weight", vec![rows, columns]);
                    linear.bias().map(|bias| note("bias", bias.dims().to_vec()));
                }
                Layer::Norm(norm) => {
                    note("weight", norm.weight().dims().to_vec());
                    norm.bias().map(|bias| note("bias", bias.dims().to_vec()));
                }
                Layer::Embedding(embedding) => {
                    let (rows, columns) = embedding.weight().shape()?;
                    note("weight", vec![rows, columns]);
                }
                _ => {}
            }
            Ok(())
        })?;
        for (name, tensor) in &self.whole {
            let expected = dims.get(&base.canonical_tensor(name));
            if expected.map(Vec::as_slice) != Some(tensor.dims()) {
                let what = format!(
                    "{name} has shape {:?}; the model has {}",
                    tensor.dims(),
                    expected.map_or("none".into(), |dims| format!("{dims:?}"))
                );
                return Err(Error::Adapter { origin: self.origin.clone(), what: clip(&what) });
            }
        }
        for (name, LowRank { a, b, .. }) in &self.low {
            let expected = shapes.get(&base.canonical(name));
            let found = (b.dim(0)?, a.dim(1)?);
            if expected != Some(&found) {
                let what = match expected {
                    Some(expected) => format!("{name}: the adapter is for {found:?}, the model has {expected:?}"),
                    None => format!("{name}: the model has no linear layer of this name"),
                };
                return Err(Error::Adapter { origin: self.origin.clone(), what: clip(&what) });
            }
        }
        Ok(())
    }

    /// Attaches the adapter to a copy of the base. With a seed in `training`, its tensors are variables and have
    /// dropout.
    fn attach(&self, base: &Base, training: Option<u64>) -> Result<Tuned> {
        let targets = Targets::new(&self.config)?;
        let twice = |name: &str| {
            let what = format!("{name} and another tensor name belong to the same module");
            Error::Adapter { origin: self.origin.clone(), what: clip(&what) }
        };
        let (mut low, mut whole) = (BTreeMap::new(), BTreeMap::new());
        for (name, change) in &self.low {
            if low.insert(base.canonical(name), (name, change)).is_some() {
                return Err(twice(name));
            }
        }
        for (name, tensor) in &self.whole {
            if whole.insert(base.canonical_tensor(name), (name, tensor)).is_some() {
                return Err(twice(name));
            }
        }
        let (passes, mut parameters, mut used) = (Arc::new(AtomicU64::new(0)), Vec::new(), BTreeSet::new());
        let mut failed = None;
        let mut change = |mut layer: Layer<'_>| -> Result<()> {
            let canonical = layer.name().to_owned();
            let (rows, device) = (rows_of(&layer), base.model.info().device.clone());
            let mut place = |key: String, tensor: &Tensor, rows: RowOrder| -> Result<Tensor> {
                let tensor = rows.apply(tensor)?.to_device(&device)?;
                if training.is_none() {
                    return Ok(tensor);
                }
                let var = Var::from_tensor(&tensor.contiguous()?)?;
                let tensor = var.as_tensor().clone();
                parameters.push(Parameter { name: key, var, rows });
                Ok(tensor)
            };
            let [weight, bias] = ["weight", "bias"].map(|end| format!("{canonical}.{end}"));
            let [weight, bias] = [weight, bias].map(|name| whole.get(&name).map(|found| (name, *found)));
            let mut in_full = |part: Option<(String, (&String, &Tensor))>| -> Result<Option<Tensor>> {
                let Some((canonical, (name, tensor))) = part else { return Ok(None) };
                used.insert(canonical);
                Ok(Some(place(self.whole_key(name), tensor, rows)?))
            };
            let (weight, bias) = (in_full(weight)?, in_full(bias)?);
            replace(&mut layer, weight, bias)?;
            let Some((name, LowRank { a, b, magnitude })) = low.get(&canonical) else { return Ok(()) };
            let Layer::Linear(linear) = layer else {
                return Err(Error::Input(format!("{name} is not a linear layer")));
            };
            used.insert(canonical);
            let key = |end: &str| format!("{PREFIX}{name}.{end}");
            let mut adapter = Adapter::new(
                place(key("lora_A.weight"), a, RowOrder::AsStored)?,
                place(key("lora_B.weight"), b, rows)?,
                targets.scale(name, b.dim(1)?)?,
            );
            if let Some(magnitude) = magnitude {
                adapter.magnitude = Some(place(key("lora_magnitude_vector"), magnitude, rows)?);
            }
            if let Some(seed) = training.filter(|_| self.config.dropout > 0.0) {
                let site = number_of(&key("dropout"), 0);
                adapter.dropout = Some(Dropout { rate: self.config.dropout, seed, site, step: Arc::clone(&passes) });
            }
            let adapters = linear.adapters().iter().cloned().chain([adapter]).collect();
            *linear = linear.with_adapters(adapters)?;
            Ok(())
        };
        let model = base.model.map_layers(&mut |layer| {
            if failed.is_none() {
                failed = change(layer).err();
            }
            Ok(())
        })?;
        let wrong = |what: String| Error::Adapter { origin: self.origin.clone(), what: clip(&what) };
        match failed {
            Some(Error::Input(what)) => return Err(wrong(what)),
            Some(e) => return Err(e),
            None => {}
        }
        let names = low.iter().map(|(canonical, (name, _))| (canonical, *name));
        let names = names.chain(whole.iter().map(|(canonical, (name, _))| (canonical, *name)));
        if let Some((_, name)) = names.into_iter().find(|(canonical, _)| !used.contains(*canonical)) {
            let family = base.model.info().family;
            return Err(wrong(format!("adapts module {name}, which this {family} model does not have")));
        }
        Ok(Tuned { model, parameters, passes })
    }

    /// Returns a copy of the adapter with the current values of `parameters`, the variables of [`Lora::train`].
    ///
    /// # Errors
    /// Returns [`Error::Input`] if `parameters` belong to another adapter.
    pub fn trained(&self, parameters: &[Parameter]) -> Result<Self> {
        let mut tensors = self.tensors();
        for Parameter { name, var, rows } in parameters {
            let value = rows.undo(&var.as_tensor().detach().to_device(&Device::Cpu)?.to_dtype(DType::F32)?)?;
            let place = tensors.get_mut(name).filter(|tensor| tensor.dims() == value.dims());
            // Copied, because training continues to change the variable.
            *place.ok_or_else(|| Error::Input(format!("the adapter has no tensor {name}")))? = value.copy()?;
        }
        Ok(Self { origin: self.origin.clone(), ..Self::from_tensors(self.config.clone(), tensors, &self.origin)? })
    }

    /// Returns the base with the adapter merged into its weights, in f32: a model without adapters.
    ///
    /// [`Lora::merged_weight`] merges one tensor at a time, with less memory.
    ///
    /// # Errors
    /// Returns the errors of [`Lora::apply`], and [`Error::Input`] if the adapter changes a head that is tied to the
    /// embedding.
    pub fn merge(&self, base: &Base) -> Result<Arc<dyn CausalLm>> {
        let adapted = self.apply(base)?;
        if let Some(plan) = adapted.plan().filter(|plan| plan.is_tied && !plan.head.adapters().is_empty()) {
            let what = "an adapter of a head that is tied to the embedding cannot be merged";
            return Err(Error::Input(format!("{}: {what}", plan.head.name())));
        }
        Ok(adapted.map_linears(&mut |linear| {
            if linear.adapters().is_empty() {
                return Ok(linear.clone());
            }
            linear.with_weight(Matrix::Dense(linear.merged()?))
        })?)
    }

    /// Returns tensor `name` of the base after merging, or `None` if the adapter does not change it.
    ///
    /// `weight` is its value before merging, `[outputs, inputs]` in f32. `rows` is the order of its rows relative to
    /// the Hub's.
    ///
    /// # Errors
    /// Returns [`Error::Adapter`] if the shape of `weight` differs from the adapter's.
    pub fn merged_weight(&self, base: &Names, name: &str, weight: &Tensor, rows: RowOrder) -> Result<Option<Tensor>> {
        let canonical = base.canonical(name);
        let is_it = |other: &str| base.canonical(other) == canonical;
        if let Some((_, tensor)) = self.whole.iter().find(|(name, _)| is_it(name)) {
            if tensor.dims() != weight.dims() {
                let what = format!("{name}: the adapter has shape {:?}, the model {:?}", tensor.dims(), weight.dims());
                return Err(Error::Adapter { origin: self.origin.clone(), what });
            }
            return Ok(Some(rows.apply(tensor)?));
        }
        let found = self.low.iter().find(|(module, _)| is_it(&format!("{module}.weight")));
        let Some((module, LowRank { a, b, magnitude })) = found else { return Ok(None) };
        let (outputs, inputs) = (b.dim(0)?, a.dim(1)?);
        if weight.dims() != [outputs, inputs] {
            let what =
                format!("{module}: the adapter is for [{outputs}, {inputs}], the weight has shape {:?}", weight.dims());
            return Err(Error::Adapter { origin: self.origin.clone(), what });
        }
        let scale = Targets::new(&self.config)?.scale(module, b.dim(1)?)?;
        let mut adapter = Adapter::new(a.clone(), rows.apply(b)?, scale);
        adapter.magnitude = magnitude.as_ref().map(|magnitude| rows.apply(magnitude)).transpose()?;
        let linear = Linear::over(module, Matrix::Dense(weight.clone())).with_adapters(vec![adapter])?;
        Ok(Some(linear.merged()?))
    }

    /// Returns whether merging the adapter changes tensor `name` of the base.
    pub fn changes(&self, base: &Names, name: &str) -> bool {
        let canonical = base.canonical(name);
        let modules = self.low.keys().map(|module| format!("{module}.weight"));
        modules.chain(self.whole.keys().cloned()).any(|name| base.canonical(&name) == canonical)
    }
}

/// Returns the row order of a layer relative to the file.
fn rows_of(layer: &Layer<'_>) -> RowOrder {
    if let Layer::Linear(linear) = layer { linear.rows() } else { RowOrder::AsStored }
}

/// Replaces the weight or bias of a layer. `None` keeps it.
fn replace(layer: &mut Layer<'_>, weight: Option<Tensor>, bias: Option<Tensor>) -> Result<()> {
    match layer {
        _ if weight.is_none() && bias.is_none() => {}
        Layer::Linear(linear) => {
            if let Some(weight) = weight {
                **linear = linear.with_weight(Matrix::Dense(weight))?;
            }
            if bias.is_some() {
                **linear = linear.with_bias(bias)?;
            }
        }
        Layer::Norm(norm) => {
            let weight = weight.unwrap_or_else(|| norm.weight().clone());
            let bias = bias.or_else(|| norm.bias().cloned());
            **norm = norm.with(weight, bias)?;
        }
        Layer::Embedding(embedding) => {
            if let Some(weight) = weight {
                **embedding = embedding.with_weight(Matrix::Dense(weight))?;
            }
            if bias.is_some() {
                return Err(Error::Input(format!("{}: an embedding has no bias to replace", embedding.name())));
            }
        }
        _ => return Err(Error::Input(format!("{}: this type of layer cannot be trained in full", layer.name()))),
    }
    Ok(())
}

/// Returns the weight and bias of a layer in f32, with rows in the Hub's order.
fn parts_in_full(layer: &Layer<'_>) -> Result<Vec<(&'static str, Tensor)>> {
    let dense = |matrix: &Matrix| matrix.to_dense(DType::F32, &Device::Cpu);
    let (weight, bias) = match layer {
        Layer::Linear(linear) => (dense(linear.weight())?, linear.bias().cloned()),
        Layer::Norm(norm) => (norm.weight().clone(), norm.bias().cloned()),
        Layer::Embedding(embedding) => (dense(embedding.weight())?, None),
        _ => return Ok(Vec::new()),
    };
    let rows = rows_of(layer);
    let parts = [("weight", Some(weight)), ("bias", bias)];
    let parts = parts.into_iter().filter_map(|(end, tensor)| Some((end, tensor?)));
    parts
        .map(|(end, tensor)| {
            let tensor = tensor.detach().to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
            Ok((end, rows.undo(&tensor)?))
        })
        .collect()
}

/// Creates the initial low-rank change of a linear layer.
fn fresh(config: &LoraConfig, linear: &Linear, rank: usize, name: &str, seed: u64) -> Result<LowRank> {
    let (outputs, inputs) = linear.weight().shape()?;
    let seed_of = |part: &str| number_of(&format!("{name}.{part}"), seed);
    let kaiming = |part: &str, count: usize, fan_in: usize| {
        let bound = 1.0 / (fan_in as f64).sqrt();
        uniform(seed_of(part), count, -bound, bound)
    };
    let b = match config.initial {
        Initial::Random => kaiming("lora_B", outputs * rank, rank),
        Initial::Kaiming | Initial::Gaussian => vec![0.0; outputs * rank],
    };
    let a = match config.initial {
        Initial::Gaussian => normal(seed_of("lora_A"), rank * inputs, 1.0 / rank as f64),
        Initial::Kaiming | Initial::Random => kaiming("lora_A", rank * inputs, inputs),
    };
    let magnitude = if config.dora {
        let whole = parts_in_full(&Layer::Linear(&mut linear.clone()))?;
        let weight = whole.into_iter().find(|(end, _)| *end == "weight").map(|(_, weight)| weight);
        weight.map(|weight| weight.sqr()?.sum(1)?.sqrt()).transpose()?
    } else {
        None
    };
    let device = &Device::Cpu;
    Ok(LowRank {
        a: Tensor::from_vec(a, (rank, inputs), device)?,
        b: Tensor::from_vec(b, (outputs, rank), device)?,
        magnitude,
    })
}
