//! Configurations of files without a config.json, and the files of saharNooby/rwkv.cpp.

use std::sync::Arc;

use pricket_nn::{
    BlockType, Bytes, Dtype, Entry, GgmlBody, GgmlLayout, GgmlType, KnownTokenizer, Store, StoreError, StoreResult,
};
use serde_json::{Value, json};

use crate::NAMES;

/// Tokenizer of the Pile and PilePlus checkpoints. Checkpoints with another vocabulary size use another tokenizer.
pub(crate) const TOKENIZER: KnownTokenizer =
    KnownTokenizer { repository: "EleutherAI/gpt-neox-20b", words: &[], count: 50277 };

/// Derives a config.json from the shapes of the tensors. Returns `None` if they are not those of an RWKV-4 model.
pub(crate) fn config_from_shapes(shape: &dyn Fn(&str) -> Option<Vec<usize>>) -> Option<Value> {
    let size = |name: &str, at: usize| NAMES.shape(name, shape)?.get(at).copied();
    let in_block = |part: &str| size(&format!("rwkv.blocks.0.{part}"), 0);
    let (vocab, d) = (size("rwkv.embeddings.weight", 0)?, size("rwkv.embeddings.weight", 1)?);
    let width = in_block("attention.time_decay")?;
    let hidden = in_block("feed_forward.key.weight")?;
    let layers = (0..1 << 12).take_while(|i| size(&format!("rwkv.blocks.{i}.ln1.weight"), 0).is_some()).count();
    let mut config = json!({
        "model_type": "rwkv", "architectures": ["RwkvForCausalLM"], "vocab_size": vocab, "hidden_size": d,
        "attention_hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": layers,
        "layer_norm_epsilon": 1e-5, "context_length": 1024, "rescale_every": 6, "tie_word_embeddings": false,
        "bos_token_id": 0, "eos_token_id": 0,
    });
    if vocab == TOKENIZER.count {
        config["tokenizer_name"] = TOKENIZER.repository.into();
    }
    Some(config)
}

/// Tensor types of rwkv.cpp in version 100. Its quantized types are omitted, because their block layouts changed in
/// version 101.
const PLAIN: &[(u32, GgmlType)] = &[(0, GgmlType::F32), (1, GgmlType::F16)];
/// Tensor types of rwkv.cpp in version 101.
const BLOCKS: &[(u32, GgmlType)] = &[
    (0, GgmlType::F32),
    (1, GgmlType::F16),
    (2, GgmlType::Block(BlockType::Q4_0)),
    (3, GgmlType::Block(BlockType::Q4_1)),
    (7, GgmlType::Block(BlockType::Q5_0)),
    (8, GgmlType::Block(BlockType::Q5_1)),
    (9, GgmlType::Block(BlockType::Q8_0)),
];

/// Header layouts of rwkv.cpp. Its files have no vocabulary.
pub(crate) const GGML: [GgmlLayout; 2] = [layout("rwkv.cpp, 100", 100, PLAIN), layout("rwkv.cpp, 101", 101, BLOCKS)];

const fn layout(name: &'static str, version: u32, types: &'static [(u32, GgmlType)]) -> GgmlLayout {
    let fields = &[("n_vocab", false), ("n_embd", false), ("n_layer", false), ("ftype", false)];
    GgmlLayout { name, fields, plain_version: 2, embedding: "emb.weight", body: GgmlBody::Own { version, types } }
}

/// Store that converts the tensors of an rwkv.cpp file to the form of checkpoints on the Hub.
///
/// Mixing factors become `[1, 1, d]` instead of `[d]`. The file stores the decay `w = -exp(time_decay)`; it becomes
/// `ln(-w)`, from which the model computes the same `w` up to rounding.
pub(crate) struct FromRwkvCpp(pub(crate) Arc<dyn Store>);

impl Store for FromRwkvCpp {
    fn names(&self) -> Vec<String> {
        self.0.names()
    }

    fn entry(&self, name: &str) -> Option<Entry> {
        let mut entry = self.0.entry(name)?;
        if name.contains(".time_mix_")
            && let &[d] = &entry.shape[..]
        {
            entry.shape = vec![1, 1, d];
        }
        Some(entry)
    }

    fn bytes(&self, name: &str) -> StoreResult<Bytes<'_>> {
        let bytes = self.0.bytes(name)?;
        if !name.ends_with(".time_decay") {
            return Ok(bytes);
        }
        let wrong = |what: String| StoreError::Unsupported { path: self.0.origin(name).into(), what };
        if let Some(other) = self.0.entry(name).map(|entry| entry.dtype).filter(|dtype| *dtype != Dtype::F32) {
            return Err(wrong(format!("tensor {name} is stored as {other}; rwkv.cpp stores decays as f32")));
        }
        let decays: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        if let Some(w) = decays.iter().find(|w| w.is_nan() || **w >= 0.0) {
            return Err(wrong(format!("tensor {name} holds {w}; a decay of rwkv.cpp is negative")));
        }
        Ok(decays.iter().flat_map(|&w| (f64::from(-w).ln() as f32).to_le_bytes()).collect::<Vec<u8>>().into())
    }

    fn origin(&self, name: &str) -> String {
        self.0.origin(name)
    }
}
