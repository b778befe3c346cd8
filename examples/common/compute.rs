//! Flags for device, precision, quantization and threads, shared by the examples that load a model.

use std::collections::BTreeMap;

use pricket::Loader;
use pricket::loading::Precision;
use pricket::nn::ops::ActivationPrecision;
use pricket::nn::{BlockType, CacheType, FourBitQuantization, Quantization};

/// Type that `--quantize` names.
#[derive(Clone, Copy, Debug)]
pub(crate) enum QuantizedType {
    /// Blocks of ggml.
    Blocks(BlockType),
    /// 4-bit types of bitsandbytes.
    FourBit(FourBitQuantization),
}

impl std::str::FromStr for QuantizedType {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let blocks = name.parse().map(Self::Blocks);
        blocks.or_else(|e: String| {
            name.parse().map(Self::FourBit).map_err(|_| format!("{e}, nf4, fp4, nf4_f32, fp4_f32"))
        })
    }
}

/// Device, precision, quantization and threads.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct ComputeArgs {
    /// Device: cpu, cuda, cuda:N or metal
    #[arg(long, default_value = "cpu")]
    pub(crate) device: String,
    /// Type of the weights in memory: auto (on the CPU the type in the file, on a GPU bf16), f32, bf16 or f16
    #[arg(long, default_value = "auto")]
    pub(crate) dtype: Precision,
    /// Quantize the weight matrices while loading: to q4_0, q4_1, q5_0, q5_1, q8_0, q2_k, q3_k, q4_k, q5_k or q6_k of
    /// ggml, or to nf4 or fp4 of bitsandbytes (nf4_f32 and fp4_f32 keep f32 scales). Requires the CPU and --dtype auto
    #[arg(long, value_name = "TYPE")]
    pub(crate) quantize: Option<QuantizedType>,
    /// Type of the embedding and the head if --quantize has a ggml type: another ggml type, or none for no
    /// quantization. With nf4 and fp4 they are never quantized
    #[arg(long, alias = "quantize-tables", value_name = "TYPE", default_value = "q8_0")]
    pub(crate) quantize_embeddings_and_head: String,
    /// Precision of activations in matrix products on the CPU: f32, bf16 (as in torch), or q8 (as in ggml: 8-bit
    /// integers if the weight has a ggml block type, f16 or bf16 if the weight has that type)
    #[arg(long, value_name = "PRECISION", default_value = "f32", value_parser = ["f32", "bf16", "q8"])]
    pub(crate) activations: String,
    /// Type of cached keys and values: f32, f16, bf16 or q8_0 [default: f32; f16 with --activations q8; bf16 with
    /// --activations bf16]
    #[arg(long, value_name = "TYPE")]
    pub(crate) cache_type: Option<CacheType>,
    /// Use f32, f16 and bf16 weights directly in the memory-mapped file instead of copying them (CPU only). Loading is
    /// immediate, and processes share the memory. The file must not change while the program runs
    #[arg(long)]
    pub(crate) in_place: bool,
    /// LoRA adapter in PEFT's format: a directory or a repository of the Hub. Can be given several times; the changes
    /// of the adapters add up
    #[cfg(feature = "train")]
    #[arg(long, value_name = "ADAPTER")]
    pub(crate) adapter: Vec<std::path::PathBuf>,
    /// Fix the order of summation, so that a text gets the same bits alone and in any batch (CPU only). Slower for
    /// small batches
    #[arg(long)]
    pub(crate) deterministic: bool,
    /// Number of CPU threads [default: number of physical cores]
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<usize>,
}

impl ComputeArgs {
    /// Limits the threads of candle's own operations to `--threads`. By default candle starts one busy-waiting thread
    /// per core.
    ///
    /// Call this at the start of a program, before it has a second thread.
    #[allow(unsafe_code, reason = "candle reads the number of its threads from the environment only")]
    pub(crate) fn limit_candle_threads(&self) {
        const VARIABLE: &str = "CANDLE_NUM_THREADS";
        if std::env::var_os(VARIABLE).is_none() {
            let threads = self.threads.unwrap_or_else(pricket::loading::default_threads);
            // SAFETY: this is the only thread of the process, so nothing reads the environment meanwhile.
            unsafe { std::env::set_var(VARIABLE, threads.to_string()) };
        }
    }

    /// Returns the 4-bit type set by `--quantize`.
    pub(crate) fn four_bit(&self) -> Option<FourBitQuantization> {
        match self.quantize {
            Some(QuantizedType::FourBit(wanted)) => Some(wanted),
            _ => None,
        }
    }

    /// Returns the quantization set by `--quantize` and `--quantize-embeddings-and-head`.
    pub(crate) fn quantization(&self) -> pricket::Result<Option<Quantization>> {
        let Some(QuantizedType::Blocks(weights)) = self.quantize else { return Ok(None) };
        let embeddings_and_head = match self.quantize_embeddings_and_head.as_str() {
            "none" => None,
            name => Some(name.parse().map_err(pricket::Error::Options)?),
        };
        Ok(Some(Quantization { weights, embeddings_and_head }))
    }

    /// Returns the flags that change results and differ from their defaults, for the settings of a sweep's rows.
    #[allow(dead_code, reason = "only sweep records the flags")]
    pub(crate) fn setup(&self) -> BTreeMap<String, String> {
        let device = self.device.split(':').next().unwrap_or_default();
        let quantize = self.quantize.map(|kind| match kind {
            QuantizedType::Blocks(kind) => format!("{kind}, tables {}", self.quantize_embeddings_and_head),
            QuantizedType::FourBit(kind) => kind.to_string(),
        });
        let cache = self.cache_type.map(|kind| kind.to_string());
        #[cfg(feature = "train")]
        let adapter = self.adapters();
        #[cfg(not(feature = "train"))]
        let adapter = None;
        let flags = [
            ("device", Some(device.to_owned()).filter(|device| device != "cpu")),
            ("dtype", Some(self.dtype.to_string()).filter(|dtype| dtype != "auto")),
            ("quantize", quantize),
            ("activations", Some(self.activations.clone()).filter(|activations| activations != "f32")),
            ("cache_type", cache),
            ("deterministic", self.deterministic.then(|| "true".into())),
            ("adapter", adapter),
        ];
        flags.into_iter().filter_map(|(flag, value)| Some((flag.to_owned(), value?))).collect()
    }

    /// Returns the adapters, identified by the hash of their files.
    #[allow(dead_code, reason = "only sweep records the flags")]
    #[cfg(feature = "train")]
    fn adapters(&self) -> Option<String> {
        let name = |path: &std::path::PathBuf| {
            let file = path.join("adapter_model.safetensors");
            let hash = std::fs::read(file)
                .map(|bytes| pricket::hub::Digest::Sha256(String::new()).of(&bytes).hex().to_owned());
            hash.map_or_else(|_| path.display().to_string(), |hash| format!("sha256 {}", &hash[..16]))
        };
        let names: Vec<String> = self.adapter.iter().map(name).collect();
        (!names.is_empty()).then(|| names.join(" + "))
    }

    /// Applies these flags to a loader, except `--dtype`.
    pub(crate) fn configure(&self, loader: Loader) -> pricket::Result<Loader> {
        let mut loader = loader.device(pricket::loading::device(&self.device)?).deterministic(self.deterministic);
        if let Some(threads) = self.threads {
            loader = loader.threads(threads);
        }
        if let Some(wanted) = self.quantization()? {
            loader = loader.quantize(wanted);
        }
        if let Some(wanted) = self.four_bit() {
            loader = loader.four_bit(wanted);
        }
        loader = match self.activations.as_str() {
            "q8" => loader.activations(ActivationPrecision::Q8),
            "bf16" => loader.activations(ActivationPrecision::BF16),
            _ => loader,
        };
        if let Some(kind) = self.cache_type {
            loader = loader.cache(kind);
        }
        if self.in_place {
            loader = loader.in_place();
        }
        #[cfg(feature = "train")]
        for adapter in &self.adapter {
            loader = loader.adapter(adapter);
        }
        Ok(loader)
    }
}
