//! The configuration of files that have none.

use serde_json::{Value, json};

use crate::NAMES;

/// The tokenizer of the Pile and PilePlus checkpoints, and the size of its vocabulary.
const TOKENIZER: (&str, usize) = ("EleutherAI/gpt-neox-20b", 50277);

/// The config.json that the shapes of a native file stand for; `None` for tensors that are not an RWKV's.
pub(crate) fn config_from_shapes(shape: &dyn Fn(&str) -> Option<Vec<usize>>) -> Option<Value> {
    let size = |name: &str, at: usize| NAMES.shape(name, shape)?.get(at).copied();
    let in_block = |part: &str| size(&format!("rwkv.blocks.0.{part}"), 0);
    let (vocab, d) = (size("rwkv.embeddings.weight", 0)?, size("rwkv.embeddings.weight", 1)?);
    let width = in_block("attention.time_decay")?;
    let hidden = in_block("feed_forward.key.weight")?;
    let layers = (0..).take_while(|i| size(&format!("rwkv.blocks.{i}.ln1.weight"), 0).is_some()).count();
    let mut config = json!({
        "model_type": "rwkv", "architectures": ["RwkvForCausalLM"], "vocab_size": vocab, "hidden_size": d,
        "attention_hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": layers,
        "layer_norm_epsilon": 1e-5, "context_length": 1024, "rescale_every": 6, "tie_word_embeddings": false,
        "bos_token_id": 0, "eos_token_id": 0,
    });
    if vocab == TOKENIZER.1 {
        config["tokenizer_name"] = TOKENIZER.0.into();
    }
    Some(config)
}
