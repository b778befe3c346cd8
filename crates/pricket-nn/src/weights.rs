//! Loads layers by name from a store of tensors.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use candle_core::{DType, Device, Tensor, Var};
use pricket_kernels::{FOUR_BIT_BLOCK, FourBit};
use pricket_weights::{Dtype, Entry, Store};

use crate::names::without_numbers;
use crate::ops::{self, ActivationPrecision, BlockType, Blocks, Matrix};
use crate::{
    CacheType, Embedding, EmbeddingAndHead, Error, FourBitQuantization, Linear, LoadOptions, Names, Norm, Result,
    RowOrder, Storage, Trainable,
};

/// A trainable parameter: a variable, and how it relates to the tensor on file.
#[derive(Clone, Debug)]
pub struct Parameter {
    /// The name on file.
    pub name: String,
    /// The variable the model computes with.
    pub var: Var,
    /// How its rows are ordered; [`RowOrder::undo`] brings a gradient into the order on file.
    pub rows: RowOrder,
}

/// A cursor over named weights that knows what to make of them.
///
/// Moves like `cd`: `weights.pp("attention").pp("dense")`. It carries the store and the [`LoadOptions`], so that a family says
/// names and sizes and nothing else.
#[derive(Clone)]
pub struct Weights {
    shared: Arc<Shared>,
    path: String,
}

struct Shared {
    store: Arc<dyn Store>,
    names: Names,
    options: LoadOptions,
    /// Names without wrappers, and the names on file, of tensors that have any.
    wrapped: OnceLock<BTreeMap<String, String>>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    asked: BTreeSet<String>,
    /// Canonical names, and names on file.
    canonical: Vec<(String, String)>,
    parameters: Vec<Parameter>,
    elements: u64,
    /// In memory.
    bytes: u64,
    in_place: u64,
    /// On file.
    read: u64,
    /// By canonical name, those that were brought into another order.
    fused: Vec<(String, RowOrder)>,
    /// Type and size of the largest matrix on file.
    largest: (Option<Dtype>, usize),
    /// Names on file of an embedding and of the head that it is tied to, where both are there.
    tied: Option<(String, String)>,
}

impl std::fmt::Debug for Weights {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Weights({:?}, {:?})", self.path, self.shared.options)
    }
}

impl Weights {
    /// The root of `store` for the CPU, everything as stored.
    pub fn as_stored(store: Arc<dyn Store>, names: Names) -> Self {
        Self::new(store, names, LoadOptions::default())
    }

    /// The root of `store`, to be read as `names` says.
    pub fn new(store: Arc<dyn Store>, names: Names, options: LoadOptions) -> Self {
        let shared = Shared { store, names, options, wrapped: OnceLock::new(), state: Mutex::default() };
        Self { shared: Arc::new(shared), path: String::new() }
    }

    /// How weights are loaded.
    pub fn options(&self) -> &LoadOptions {
        &self.shared.options
    }

    /// The type in which keys and values are cached: as asked for, else as precise as the activations.
    pub fn cache(&self) -> CacheType {
        let precision = if self.device().is_cpu() { self.options().precision } else { ActivationPrecision::F32 };
        self.options().cache.unwrap_or(match precision {
            ActivationPrecision::F32 => CacheType::of(self.activations()),
            ActivationPrecision::BF16 => CacheType::BF16,
            ActivationPrecision::Q8 => CacheType::F16,
        })
    }

    /// The type of the largest matrix, as the model keeps it.
    pub fn largest(&self) -> Dtype {
        let stored = self.state().largest.0.unwrap_or(Dtype::F32);
        match self.options().storage {
            _ if self.options().trainable == Trainable::All => Dtype::F32,
            Storage::Cast(dtype) => Dtype::from_candle(dtype),
            Storage::AsStored if stored == Dtype::F64 => Dtype::F32,
            Storage::AsStored if stored.to_candle().is_none() && !self.device().is_cpu() => {
                Dtype::from_candle(self.activations())
            }
            Storage::Quantize(wanted) if self.device().is_cpu() => Dtype::Block(wanted.weights),
            Storage::FourBit(wanted) if self.device().is_cpu() => Dtype::FourBit(wanted.kind),
            Storage::AsStored | Storage::Quantize(_) | Storage::FourBit(_) => stored,
        }
    }

    /// What was loaded, in that order: canonical names, and names on file.
    pub fn asked(&self) -> Vec<(String, String)> {
        self.state().canonical.clone()
    }

    /// The tensors whose rows are in another order in the model than on file, by their canonical names.
    pub fn fused(&self) -> Vec<(String, RowOrder)> {
        self.state().fused.clone()
    }

    /// The cursor one level down.
    #[must_use]
    pub fn pp(&self, name: impl Display) -> Self {
        Self { shared: Arc::clone(&self.shared), path: self.name(name) }
    }

    fn name(&self, name: impl Display) -> String {
        if self.path.is_empty() { name.to_string() } else { format!("{}.{name}", self.path) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The type in which activations are best computed with these weights.
    pub fn activations(&self) -> DType {
        match self.options().storage {
            _ if self.options().trainable == Trainable::All => DType::F32,
            Storage::Cast(dtype) if !self.device().is_cpu() => dtype,
            _ => DType::F32,
        }
    }

    /// The device the weights go to.
    pub fn device(&self) -> &Device {
        &self.options().device
    }

    /// Elements loaded so far, each tensor once.
    pub fn elements(&self) -> u64 {
        self.state().elements
    }

    /// Bytes that the loaded tensors take in memory or, in place, in their file.
    pub fn bytes(&self) -> u64 {
        self.state().bytes
    }

    /// Bytes of those that are used where their file is mapped, and not copied.
    pub fn in_place_bytes(&self) -> u64 {
        self.state().in_place
    }

    /// Bytes that the loaded tensors take on file.
    pub fn bytes_read(&self) -> u64 {
        self.state().read
    }

    /// The variables that [`LoadOptions::trainable`] asks for, in the order of loading.
    pub fn parameters(&self) -> Vec<Parameter> {
        self.state().parameters.clone()
    }

    /// Checks that every name of [`Trainable::Names`] is one of the model's, once it is loaded.
    ///
    /// # Errors
    /// [`Error::Input`] naming the first that is not.
    pub fn check_trainable(&self) -> Result<()> {
        let Trainable::Names(names) = &self.options().trainable else { return Ok(()) };
        let state = self.state();
        let found = |name: &&String| {
            let only = Trainable::Names(vec![(*name).clone()]);
            state.canonical.iter().any(|(canonical, _)| only.includes(canonical))
        };
        match names.iter().find(|name| !found(name)) {
            Some(name) => Err(Error::Input(format!("{name}: the model has no weight of that name to train"))),
            None => Ok(()),
        }
    }

    /// Tensors of the store that nothing asked for and that are no known buffers.
    pub fn unused(&self) -> Vec<String> {
        let state = self.state();
        let names = self.shared.store.names().into_iter();
        names.filter(|name| !state.asked.contains(name) && !self.shared.names.is_buffer(name)).collect()
    }

    /// Those of [`Weights::unused`] that look like weights of the family: a configuration that has no use for them is mostly
    /// not theirs.
    pub fn unused_weights(&self) -> Vec<String> {
        let asked = self.state().asked.iter().map(|name| without_numbers(name)).collect();
        let mut unused = self.unused();
        unused.retain(|name| self.shared.names.is_weight(name, &asked));
        unused
    }

    /// A linear layer `name`: `weight` of `[outputs, inputs]` and, if `bias`, `bias` of `[outputs]`.
    ///
    /// # Errors
    /// If a tensor is missing, misshapen, or no floating-point type.
    pub fn linear(&self, name: &str, inputs: usize, outputs: usize, bias: bool) -> Result<Linear> {
        self.linear_in_order(name, inputs, outputs, bias, RowOrder::AsStored)
    }

    /// As [`Weights::linear`], its rows brought into the model's order.
    ///
    /// # Errors
    /// As [`Weights::linear`].
    pub fn linear_in_order(
        &self,
        name: &str,
        inputs: usize,
        outputs: usize,
        bias: bool,
        rows: RowOrder,
    ) -> Result<Linear> {
        self.linear_of(name, [outputs, inputs], bias, rows, false)
    }

    /// The head `name` of a model, `[outputs, inputs]` without a bias: as [`Weights::linear`], stored as
    /// [`Quantization::embeddings_and_head`](crate::Quantization::embeddings_and_head) says.
    ///
    /// # Errors
    /// As [`Weights::linear`].
    pub fn head(&self, name: &str, inputs: usize, outputs: usize) -> Result<Linear> {
        self.linear_of(name, [outputs, inputs], false, RowOrder::AsStored, true)
    }

    fn linear_of(&self, name: &str, shape: [usize; 2], bias: bool, rows: RowOrder, is_head: bool) -> Result<Linear> {
        let at = self.pp(name);
        let hub = rows;
        let rows = if self.options().in_model_order { RowOrder::AsStored } else { rows };
        if rows != RowOrder::AsStored {
            self.state().fused.push((at.name("weight"), rows));
            self.state().fused.push((at.name("bias"), rows));
        }
        let weight = at.matrix("weight", &shape, rows, is_head)?;
        let bias = bias.then(|| at.tensor("bias", &shape[..1], rows)).transpose()?;
        Ok(Linear::new(&at.path, weight, bias, self.options().precision, hub))
    }

    /// A layer norm `name` over `dim`, with a bias if `bias`.
    ///
    /// # Errors
    /// As [`Weights::linear`].
    pub fn layer_norm(&self, name: &str, dim: usize, eps: f64, bias: bool) -> Result<Norm> {
        let at = self.pp(name);
        let weight = at.tensor("weight", &[dim], RowOrder::AsStored)?;
        // A norm without a bias gets a zero one: candle's fused form needs it.
        let has_bias = bias;
        let zeros_or_bias =
            if bias { at.tensor("bias", &[dim], RowOrder::AsStored)? } else { weight.detach().zeros_like()? };
        Ok(Norm::Layer { name: at.path.as_str().into(), weight, bias: zeros_or_bias, has_bias, eps })
    }

    /// A root-mean-square norm `name` over `dim`.
    ///
    /// # Errors
    /// As [`Weights::linear`].
    pub fn rms_norm(&self, name: &str, dim: usize, eps: f64) -> Result<Norm> {
        let weight = self.vector(&format!("{name}.weight"), dim)?;
        Ok(Norm::Rms { name: self.name(name).into(), weight, eps })
    }

    /// A vector `name` of `dim`: a decay.
    ///
    /// # Errors
    /// As [`Weights::linear`].
    pub fn vector(&self, name: &str, dim: usize) -> Result<Tensor> {
        self.array(name, &[dim])
    }

    /// A tensor `name` of any shape that is no matrix, in the type of the activations: mixing factors of `[1, 1, d]`.
    ///
    /// # Errors
    /// As [`Weights::linear`].
    pub fn array(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.tensor(name, shape, RowOrder::AsStored)
    }

    /// A table `name` of `[rows, dim]`.
    ///
    /// # Errors
    /// As [`Weights::linear`].
    pub fn embedding(&self, name: &str, rows: usize, dim: usize) -> Result<Embedding> {
        Ok(Embedding {
            name: self.name(name).into(),
            weight: self.pp(name).matrix("weight", &[rows, dim], RowOrder::AsStored, true)?,
            precision: self.options().precision,
        })
    }

    /// Embedding and head of a model: tables of `[rows, dim]` under two names. Where they are tied, one of the names is enough.
    ///
    /// # Errors
    /// As [`Weights::linear`], and if a tied head is there as well and holds other values than the embedding: the file
    /// does not say which of the two to use.
    pub fn embedding_and_head(
        &self,
        embedding: &str,
        head: &str,
        rows: usize,
        dim: usize,
        tied: bool,
    ) -> Result<EmbeddingAndHead> {
        if !tied {
            let (embed, head) = (self.embedding(embedding, rows, dim)?, self.head(head, dim, rows)?);
            return Ok(EmbeddingAndHead { embed, head, is_tied: false });
        }
        let [own, other] = [embedding, head].map(|name| self.stored(&self.pp(name).name("weight")));
        let by_head = own.is_none() && other.is_some();
        let embed = self.embedding(if by_head { head } else { embedding }, rows, dim)?;
        if by_head {
            // Callers look the matrix up under the embedding's name.
            let [own, other] = [embedding, head].map(|name| self.pp(name).name("weight"));
            let mut state = self.state();
            for (canonical, _) in state.canonical.iter_mut().filter(|(canonical, _)| *canonical == other) {
                canonical.clone_from(&own);
            }
        }
        if let (Some(own), Some(other)) = (own, other)
            && own != other
        {
            self.check_tied(&own, &other)?;
        }
        let head = Linear::tied(&embed, &self.name(head));
        Ok(EmbeddingAndHead { embed, head, is_tied: true })
    }

    /// Passes over a head that is there beside the embedding that it is tied to, if they are the same.
    fn check_tied(&self, own: &str, other: &str) -> Result<()> {
        let mut state = self.state();
        state.asked.insert(other.to_owned());
        state.tied = Some((own.to_owned(), other.to_owned()));
        drop(state);
        // Headers alone can tell another shape; bytes are compared where weights are loaded.
        self.compare_tied(!self.shared.store.shapes_only())
    }

    /// Compares the values of a tied head that is there with those of its embedding, which loading over headers does not.
    ///
    /// # Errors
    /// If they differ, unless that is allowed.
    pub fn verify_tied(&self) -> Result<()> {
        self.compare_tied(true)
    }

    fn compare_tied(&self, bytes: bool) -> Result<()> {
        let store = &*self.shared.store;
        let Some((own, other)) = self.state().tied.clone().filter(|_| !self.options().allow_unused) else {
            return Ok(());
        };
        if store.entry(&own) == store.entry(&other) && (!bytes || *store.bytes(&own)? == *store.bytes(&other)?) {
            return Ok(());
        }
        let what = format!(
            "tie_word_embeddings is true, but tensor {other} differs from the embedding {own}: to use it, load with tie_word_embeddings=false; to \
             leave it out, allow unused weights"
        );
        Err(pricket_weights::Error::Corrupt { path: store.origin(&other).into(), what }.into())
    }

    /// Whether the checkpoint holds a tensor `name`, or says that it does. A store without a file holds what was asked for by
    /// shape so far.
    pub fn holds(&self, name: &str) -> bool {
        let (store, name) = (&*self.shared.store, self.name(name));
        self.stored(&name).is_some() || self.shared.names.spellings(&name).iter().any(|spelling| store.claims(spelling))
    }

    /// The name under which the store has the tensor that is called `canonical` here.
    fn stored(&self, canonical: &str) -> Option<String> {
        let Shared { store, names, wrapped, .. } = &*self.shared;
        let spellings = names.spellings(canonical);
        let there = |name: &str| store.entry(name).is_some();
        let plain = spellings.iter().map(|spelling| store.resolve(spelling)).find(|name| there(name));
        // What is not called so may be wrapped.
        plain.map(str::to_owned).or_else(|| {
            let wrapped = wrapped.get_or_init(|| {
                let mut wrapped = BTreeMap::new();
                for name in store.names() {
                    let bare = names.unwrapped(&name);
                    if bare != name {
                        wrapped.entry(bare).or_insert(name);
                    }
                }
                wrapped
            });
            spellings.iter().find_map(|spelling| wrapped.get(spelling)).cloned()
        })
    }

    fn find(&self, name: &str, shape: &[usize]) -> Result<(String, Entry)> {
        let store = &*self.shared.store;
        let stored = self.stored(name).unwrap_or_else(|| name.to_owned());
        let Some((spelling, entry)) = store.expect(&stored, shape).map(|entry| (stored, entry)) else {
            return Err(store.missing(name).into());
        };
        let origin = store.origin(&spelling);
        if let Dtype::Other(kind) = entry.dtype {
            let what = format!("tensor {spelling} is stored as {kind}, which is not read");
            return Err(pricket_weights::Error::Unsupported { path: origin.into(), what }.into());
        }
        if !entry.dtype.is_float() {
            return Err(pricket_weights::Error::NotFloat { origin, name: spelling, found: entry.dtype }.into());
        }
        if entry.shape != shape {
            let expected = shape.to_vec();
            return Err(pricket_weights::Error::Shape { origin, name: spelling, expected, found: entry.shape }.into());
        }
        Ok((spelling, entry))
    }

    /// A vector, in the type of the activations.
    fn tensor(&self, name: &str, shape: &[usize], rows: RowOrder) -> Result<Tensor> {
        let (store, device) = (&*self.shared.store, self.device());
        let is_trained = self.is_trained(name);
        let target = if is_trained { DType::F32 } else { self.activations() };
        let (name, entry) = self.begin(name, shape)?;
        let tensor = if store.shapes_only() {
            self.shape_only(target, shape)?
        } else {
            let tensor = rows.apply(&pricket_weights::read_tensor(store, &name, &Device::Cpu)?)?;
            self.variable(&name, tensor.to_dtype(target)?.to_device(device)?, rows, is_trained)?
        };
        self.loaded(name, &entry, target.size_in_bytes() * entry.elements());
        Ok(tensor)
    }

    fn is_trained(&self, name: &str) -> bool {
        self.options().trainable.includes(&self.name(name))
    }

    /// A matrix, as the options say.
    fn matrix(&self, name: &str, shape: &[usize], rows: RowOrder, is_table: bool) -> Result<Matrix> {
        let (store, device) = (&*self.shared.store, self.device());
        let is_trained = self.is_trained(name);
        let (name, entry) = self.begin(name, shape)?;
        let quantized = match self.options().storage {
            Storage::Quantize(wanted) if device.is_cpu() => wanted.of(is_table, shape[1]),
            _ => None,
        };
        let four_bit = match self.options().storage {
            Storage::FourBit(wanted) if device.is_cpu() && !is_table => Some(wanted),
            _ => None,
        };
        let stored = entry.dtype.to_candle();
        if is_trained && (quantized.is_some() || four_bit.is_some() || stored.is_none()) {
            let kind = four_bit.map(|wanted| Dtype::FourBit(wanted.kind)).or(quantized.map(Dtype::Block));
            let kind = kind.unwrap_or(entry.dtype);
            let what = format!(
                "tensor {name} is to be trained, but is quantized ({}); train a checkpoint in f32, f16 or bf16",
                kind.name()
            );
            return Err(pricket_weights::Error::Unsupported { path: store.origin(&name).into(), what }.into());
        }
        if let Some(kind) = quantized {
            return self.quantized(name, &entry, rows, kind);
        }
        if let Some(wanted) = four_bit {
            return self.four_bit(name, &entry, rows, wanted);
        }
        let target = match (self.options().storage, stored) {
            _ if is_trained => Some(DType::F32),
            (Storage::AsStored | Storage::Quantize(_) | Storage::FourBit(_), Some(DType::F64)) => Some(DType::F32),
            (Storage::Cast(dtype), _) => Some(dtype),
            // Blocks are multiplied on the CPU; elsewhere they become what they stand for.
            (_, None) if !device.is_cpu() => Some(self.activations()),
            (_, stored) => stored,
        };
        let bytes = target.map_or(entry.bytes(), |target| target.size_in_bytes() * entry.elements());
        let is_left = target.is_some() && target == stored && self.is_left_in_place(rows, is_trained);
        if is_left && !self.state().asked.contains(&name) {
            self.state().in_place += bytes as u64;
        }
        let matrix = match target {
            _ if store.shapes_only() => Matrix::Dense(self.shape_only(target.unwrap_or(DType::F32), shape)?),
            None => rows.apply_to_matrix(pricket_weights::read_matrix(store, &name)?)?.packed(),
            Some(_) if is_left => pricket_weights::read_matrix_in_place(store, &name)?,
            Some(target) => {
                let tensor = rows.apply(&pricket_weights::read_tensor(store, &name, &Device::Cpu)?)?;
                let tensor = tensor.to_dtype(target)?.to_device(device)?;
                Matrix::Dense(self.variable(&name, tensor, rows, is_trained)?)
            }
        };
        self.loaded(name, &entry, bytes);
        Ok(matrix)
    }

    /// Whether a matrix can be used where the file is mapped.
    fn is_left_in_place(&self, rows: RowOrder, is_trained: bool) -> bool {
        self.options().in_place && self.device().is_cpu() && rows == RowOrder::AsStored && !is_trained
    }

    /// A matrix in blocks of `kind`, row after row, so that of a large one only a part is widened at a time.
    fn quantized(&self, name: String, entry: &Entry, rows: RowOrder, kind: BlockType) -> Result<Matrix> {
        let store = &*self.shared.store;
        let (count, columns) = (entry.shape[0], entry.shape[1]);
        let bytes = kind.bytes(entry.elements());
        let matrix = if store.shapes_only() {
            Matrix::Dense(self.shape_only(DType::F32, &entry.shape)?)
        } else if entry.dtype == Dtype::Block(kind) {
            rows.apply_to_matrix(pricket_weights::read_matrix(store, &name)?)?.packed()
        } else {
            let tensor = rows.apply(&pricket_weights::read_tensor(store, &name, &Device::Cpu)?)?;
            let mut out = Vec::with_capacity(bytes);
            for start in (0..count).step_by(512) {
                let part = tensor.narrow(0, start, 512.min(count - start))?.to_dtype(DType::F32)?;
                let part = part.flatten_all()?.to_vec1::<f32>()?;
                let quantized = ops::quantize(kind, &part, columns);
                out.extend(
                    quantized.map_err(|e| Error::Input(format!("{}: tensor {name}: {e}", store.origin(&name))))?,
                );
            }
            Matrix::Blocks(Blocks::new(kind, count, columns, out)).packed()
        };
        self.loaded(name, entry, bytes);
        Ok(matrix)
    }

    /// A matrix in elements of 4 bits. Blocks are those of the order on file, as bitsandbytes quantizes.
    fn four_bit(&self, name: String, entry: &Entry, rows: RowOrder, wanted: FourBitQuantization) -> Result<Matrix> {
        let store = &*self.shared.store;
        let kind = Dtype::FourBit(wanted.kind);
        let matrix = if store.shapes_only() {
            Matrix::Dense(self.shape_only(DType::F32, &entry.shape)?)
        } else if entry.dtype == kind {
            rows.apply_to_matrix(pricket_weights::read_matrix(store, &name)?)?
        } else {
            let tensor = pricket_weights::read_tensor(store, &name, &Device::Cpu)?.flatten_all()?;
            let read =
                |from: usize, to: usize| tensor.narrow(0, from, to - from)?.to_dtype(DType::F32)?.to_vec1::<f32>();
            let shape = (entry.shape[0], entry.shape[1]);
            let matrix = FourBit::quantize_parts(wanted.kind, shape, FOUR_BIT_BLOCK, wanted.is_double, read);
            let matrix = matrix.map_err(|e| Error::Input(format!("{}: tensor {name}: {e}", store.origin(&name))))?;
            rows.apply_to_matrix(Matrix::FourBit(matrix))?
        };
        self.loaded(name, entry, kind.bytes(entry.elements()));
        Ok(matrix)
    }

    /// One element seen through zero strides: the shape of the real thing and none of its memory.
    fn shape_only(&self, dtype: DType, shape: &[usize]) -> Result<Tensor> {
        Ok(Tensor::zeros((), dtype, self.device())?.broadcast_as(shape)?)
    }

    fn begin(&self, name: &str, shape: &[usize]) -> Result<(String, Entry)> {
        if self.options().progress.cancelled() {
            return Err(Error::Cancelled);
        }
        let canonical = self.name(name);
        let (name, entry) = self.find(&canonical, shape)?;
        let mut state = self.state();
        if state.canonical.iter().all(|(known, _)| *known != canonical) {
            state.canonical.push((canonical, name.clone()));
        }
        drop(state);
        Ok((name, entry))
    }

    /// The variable that a trained weight is.
    fn variable(&self, name: &str, tensor: Tensor, rows: RowOrder, is_trained: bool) -> Result<Tensor> {
        if !is_trained {
            return Ok(tensor);
        }
        let var = Var::from_tensor(&tensor)?;
        let tensor = var.as_tensor().clone();
        self.state().parameters.push(Parameter { name: name.into(), var, rows });
        Ok(tensor)
    }

    fn loaded(&self, name: String, entry: &Entry, bytes: usize) {
        let mut state = self.state();
        if state.asked.insert(name) {
            state.elements += entry.elements() as u64;
            state.bytes += bytes as u64;
            state.read += entry.bytes() as u64;
            if entry.shape.len() > 1 && entry.bytes() > state.largest.1 {
                state.largest = (Some(entry.dtype), entry.bytes());
            }
        }
        self.options().progress.update(state.read);
    }
}
