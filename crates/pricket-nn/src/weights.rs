//! Loading layers by name from a store of tensors.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use candle_core::{DType, Device, Tensor, Var};

use pricket_weights::{Dtype, Entry, Store};

use crate::names::without_numbers;
use crate::ops::{self, ActivationPrecision, BlockType, Blocks, FOUR_BIT_BLOCK, FourBit, Matrix};
use crate::{
    CacheType, Embedding, EmbeddingAndHead, Error, FourBitQuantization, Linear, LoadOptions, Names, Norm, Result,
    RowOrder, Storage, Trainable,
};

/// Trainable parameter: a variable, and the name and row order of its tensor in the file.
#[derive(Clone, Debug)]
pub struct Parameter {
    /// Name in the file.
    pub name: String,
    /// Variable that the model uses.
    pub var: Var,
    /// Row order; [`RowOrder::undo`] converts a gradient to the order in the file.
    pub rows: RowOrder,
}

/// Cursor over named weights that creates layers from them.
///
/// [`Weights::pp`] moves one level down, like `cd`: `weights.pp("attention").pp("dense")`. The cursor holds the store
/// and the [`LoadOptions`], so that family code gives only names and sizes.
#[derive(Clone)]
pub struct Weights {
    shared: Arc<Shared>,
    path: String,
}

struct Shared {
    store: Arc<dyn Store>,
    names: Names,
    options: LoadOptions,
    /// Names without wrappers and the names in the file, for tensors with wrappers in their names.
    wrapped: OnceLock<BTreeMap<String, String>>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Names in the file of the tensors loaded so far.
    asked: BTreeSet<String>,
    /// Canonical names and names in the file, in the order of loading.
    canonical: Vec<(String, String)>,
    parameters: Vec<Parameter>,
    elements: u64,
    /// Bytes in memory.
    bytes: u64,
    /// Bytes of matrices used in place.
    in_place: u64,
    /// Bytes read from the file.
    read: u64,
    /// Canonical names and row orders of reordered tensors.
    fused: Vec<(String, RowOrder)>,
    /// Type in the file and bytes of the largest matrix.
    largest: (Option<Dtype>, usize),
    /// Names in the file of a tied embedding and head, if the file has both.
    tied: Option<(String, String)>,
}

impl std::fmt::Debug for Weights {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Weights({:?}, {:?})", self.path, self.shared.options)
    }
}

impl Weights {
    /// Returns a cursor at the root of `store`, with the default options: the CPU, and all weights as stored.
    pub fn as_stored(store: Arc<dyn Store>, names: Names) -> Self {
        Self::new(store, names, LoadOptions::default())
    }

    /// Returns a cursor at the root of `store`. `names` gives the spellings of tensor names in the file.
    pub fn new(store: Arc<dyn Store>, names: Names, options: LoadOptions) -> Self {
        let shared = Shared { store, names, options, wrapped: OnceLock::new(), state: Mutex::default() };
        Self { shared: Arc::new(shared), path: String::new() }
    }

    /// Returns the options for loading.
    pub fn options(&self) -> &LoadOptions {
        &self.shared.options
    }

    /// Returns the storage type of keys and values: the type in the options, otherwise one as precise as the
    /// activations.
    pub fn cache(&self) -> CacheType {
        let precision = if self.device().is_cpu() { self.options().precision } else { ActivationPrecision::F32 };
        self.options().cache.unwrap_or(match precision {
            ActivationPrecision::F32 => CacheType::of(self.activations()),
            ActivationPrecision::BF16 => CacheType::BF16,
            ActivationPrecision::Q8 => CacheType::F16,
        })
    }

    /// Returns the type that the model uses for the largest matrix.
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

    /// Returns the canonical names and the names in the file of all tensors loaded so far, in the order of loading.
    pub fn loaded_names(&self) -> Vec<(String, String)> {
        self.state().canonical.clone()
    }

    /// Returns the canonical names and row orders of the tensors whose rows were reordered.
    pub fn fused(&self) -> Vec<(String, RowOrder)> {
        self.state().fused.clone()
    }

    /// Returns a cursor one level down, at `name`.
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

    /// Returns the default type of activations for these weights.
    pub fn activations(&self) -> DType {
        match self.options().storage {
            _ if self.options().trainable == Trainable::All => DType::F32,
            Storage::Cast(dtype) if !self.device().is_cpu() => dtype,
            _ => DType::F32,
        }
    }

    /// Returns the device of the weights.
    pub fn device(&self) -> &Device {
        &self.options().device
    }

    /// Returns the number of elements loaded so far. Each tensor is counted once.
    pub fn elements(&self) -> u64 {
        self.state().elements
    }

    /// Returns the bytes of the loaded tensors in memory, including those used in place in their file.
    pub fn bytes(&self) -> u64 {
        self.state().bytes
    }

    /// Returns the bytes of matrices that are used in place in their mapped file.
    pub fn in_place_bytes(&self) -> u64 {
        self.state().in_place
    }

    /// Returns the bytes of the loaded tensors in the file.
    pub fn bytes_read(&self) -> u64 {
        self.state().read
    }

    /// Returns the trainable parameters that [`LoadOptions::trainable`] selects, in the order of loading.
    pub fn parameters(&self) -> Vec<Parameter> {
        self.state().parameters.clone()
    }

    /// Checks, after loading, that every name in [`Trainable::Names`] matches a weight of the model.
    ///
    /// # Errors
    /// Returns [`Error::Input`] naming the first name without a match.
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

    /// Returns the tensors of the store that were not loaded and are not known buffers.
    pub fn unused(&self) -> Vec<String> {
        let state = self.state();
        let names = self.shared.store.names().into_iter();
        names.filter(|name| !state.asked.contains(name) && !self.shared.names.is_buffer(name)).collect()
    }

    /// Returns the tensors of [`Weights::unused`] that look like weights of the family. If there are any, the
    /// configuration probably belongs to another checkpoint.
    pub fn unused_weights(&self) -> Vec<String> {
        let asked = self.state().asked.iter().map(|name| without_numbers(name)).collect();
        let mut unused = self.unused();
        unused.retain(|name| self.shared.names.is_weight(name, &asked));
        unused
    }

    /// Loads the linear layer `name`: `weight`, `[outputs, inputs]`, and, if `bias` is true, `bias`, `[outputs]`.
    ///
    /// # Errors
    /// Returns an error if a tensor is missing, has another shape or does not have a floating-point or quantized type.
    pub fn linear(&self, name: &str, inputs: usize, outputs: usize, bias: bool) -> Result<Linear> {
        self.linear_in_order(name, inputs, outputs, bias, RowOrder::AsStored)
    }

    /// Loads a linear layer and converts its rows from the order `rows` to the model's order. See [`Weights::linear`].
    ///
    /// # Errors
    /// Returns the errors of [`Weights::linear`], or an error if the rows cannot be reordered.
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

    /// Loads the head `name` of a model, `[outputs, inputs]`, without a bias. When quantizing, its type is
    /// [`Quantization::embeddings_and_head`](crate::Quantization::embeddings_and_head).
    ///
    /// # Errors
    /// Returns the errors of [`Weights::linear`].
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

    /// Loads the layer norm `name` over `dim` elements, with a bias if `bias` is true.
    ///
    /// # Errors
    /// Returns the errors of [`Weights::linear`].
    pub fn layer_norm(&self, name: &str, dim: usize, eps: f64, bias: bool) -> Result<Norm> {
        let at = self.pp(name);
        let weight = at.tensor("weight", &[dim], RowOrder::AsStored)?;
        // A norm without a bias gets a bias of zeros, which candle's fused form needs.
        let has_bias = bias;
        let zeros_or_bias =
            if bias { at.tensor("bias", &[dim], RowOrder::AsStored)? } else { weight.detach().zeros_like()? };
        Ok(Norm::Layer { name: at.path.as_str().into(), weight, bias: zeros_or_bias, has_bias, eps })
    }

    /// Loads the root-mean-square norm `name` over `dim` elements.
    ///
    /// # Errors
    /// Returns the errors of [`Weights::linear`].
    pub fn rms_norm(&self, name: &str, dim: usize, eps: f64) -> Result<Norm> {
        let weight = self.vector(&format!("{name}.weight"), dim)?;
        Ok(Norm::Rms { name: self.name(name).into(), weight, eps })
    }

    /// Loads the vector `name` of `dim` elements, such as the decay of a recurrence.
    ///
    /// # Errors
    /// Returns the errors of [`Weights::linear`].
    pub fn vector(&self, name: &str, dim: usize) -> Result<Tensor> {
        self.array(name, &[dim])
    }

    /// Loads the tensor `name` of any shape in the type of the activations, such as mixing factors of `[1, 1, d]`.
    ///
    /// # Errors
    /// Returns the errors of [`Weights::linear`].
    pub fn array(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.tensor(name, shape, RowOrder::AsStored)
    }

    /// Loads the embedding `name`, `[rows, dim]`.
    ///
    /// # Errors
    /// Returns the errors of [`Weights::linear`].
    pub fn embedding(&self, name: &str, rows: usize, dim: usize) -> Result<Embedding> {
        Ok(Embedding {
            name: self.name(name).into(),
            weight: self.pp(name).matrix("weight", &[rows, dim], RowOrder::AsStored, true)?,
            precision: self.options().precision,
        })
    }

    /// Loads the embedding and the head of a model, both `[rows, dim]`. If they are tied, the file needs only one of
    /// the two tensors.
    ///
    /// # Errors
    /// Returns the errors of [`Weights::linear`]. If they are tied, returns an error if the file has both tensors and
    /// their values differ, unless unused weights are allowed.
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
            // Callers look up the matrix by the name of the embedding.
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

    /// Marks a tied head in the file as used, if it equals the embedding.
    fn check_tied(&self, own: &str, other: &str) -> Result<()> {
        let mut state = self.state();
        state.asked.insert(other.to_owned());
        state.tied = Some((own.to_owned(), other.to_owned()));
        drop(state);
        // Headers are enough to compare shapes. Values are compared when weights are loaded.
        self.compare_tied(!self.shared.store.shapes_only())
    }

    /// Compares the values of a tied head and its embedding, if the file has both. Loading from headers only skips this
    /// comparison.
    ///
    /// # Errors
    /// Returns an error if the values differ, unless unused weights are allowed.
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
             ignore it, allow unused weights"
        );
        Err(pricket_weights::Error::Corrupt { path: store.origin(&other).into(), what }.into())
    }

    /// Returns whether the checkpoint has a tensor `name`, or lists one. A store without a file has the tensors that
    /// were requested so far.
    pub fn holds(&self, name: &str) -> bool {
        let (store, name) = (&*self.shared.store, self.name(name));
        self.stored(&name).is_some() || self.shared.names.spellings(&name).iter().any(|spelling| store.claims(spelling))
    }

    /// Returns the name in the store of the tensor with the canonical name `canonical`.
    fn stored(&self, canonical: &str) -> Option<String> {
        let Shared { store, names, wrapped, .. } = &*self.shared;
        let spellings = names.spellings(canonical);
        let there = |name: &str| store.entry(name).is_some();
        let plain = spellings.iter().map(|spelling| store.resolve(spelling)).find(|name| there(name));
        // The name may contain wrapper modules.
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
            let what = format!("tensor {spelling} is stored as {kind}, which is not supported");
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

    /// Loads a tensor in the type of the activations.
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

    /// Loads a matrix with the storage, device and training options.
    fn matrix(&self, name: &str, shape: &[usize], rows: RowOrder, is_embedding_or_head: bool) -> Result<Matrix> {
        let (store, device) = (&*self.shared.store, self.device());
        let is_trained = self.is_trained(name);
        let (name, entry) = self.begin(name, shape)?;
        let quantized = match self.options().storage {
            Storage::Quantize(wanted) if device.is_cpu() => wanted.of(is_embedding_or_head, shape[1]),
            _ => None,
        };
        let four_bit = match self.options().storage {
            Storage::FourBit(wanted) if device.is_cpu() && !is_embedding_or_head => Some(wanted),
            _ => None,
        };
        let stored = entry.dtype.to_candle();
        if is_trained && (quantized.is_some() || four_bit.is_some() || stored.is_none()) {
            let kind = four_bit.map(|wanted| Dtype::FourBit(wanted.kind)).or(quantized.map(Dtype::Block));
            let kind = kind.unwrap_or(entry.dtype);
            let what = format!(
                "tensor {name} cannot be trained, because it is quantized ({}); train a checkpoint in f32, f16 or bf16",
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
            // Only the CPU multiplies quantized blocks. On other devices they are dequantized.
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

    /// Returns whether a matrix is used in place in the mapped file.
    fn is_left_in_place(&self, rows: RowOrder, is_trained: bool) -> bool {
        self.options().in_place && self.device().is_cpu() && rows == RowOrder::AsStored && !is_trained
    }

    /// Loads a matrix and quantizes it to `kind`. Converts 512 rows at a time to f32, to limit the memory needed.
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

    /// Loads a matrix in a 4-bit type. Blocks follow the row order of the file, as in bitsandbytes.
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
        let bytes = match &matrix {
            Matrix::FourBit(matrix) => matrix.size(),
            _ => kind.bytes(entry.elements()),
        };
        self.loaded(name, entry, bytes);
        Ok(matrix)
    }

    /// Returns a tensor of the given shape that holds a single element, through zero strides.
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

    /// Turns a trained weight into a variable and registers it. Returns other weights unchanged.
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
