//! The tensor names of LLaMA: transformers' on the Hub, the original program's and llama.cpp's.

use pricket_nn::Names;

/// Tensor names of `LlamaForCausalLM`, as transformers spells them on the Hub.
pub const NAMES: Names = Names {
    root: "model",
    head: "lm_head",
    aliases: &[],
    spellings: &[GGUF, ORIGINAL],
    // Rotary frequencies and tables that old versions of transformers and the original program saved.
    buffers: &["rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached", "rope.freqs"],
};

/// Parts of canonical names, and their names in llama.cpp's files.
pub(crate) const GGUF: &[(&str, &str)] = &[
    ("model.embed_tokens", "token_embd"),
    ("model.layers", "blk"),
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
];

/// Parts of canonical names without the root, and their names in the original program, which legacy GGML files use.
const ORIGINAL: &[(&str, &str)] = &[
    ("embed_tokens", "tok_embeddings"),
    ("input_layernorm", "attention_norm"),
    ("self_attn.q_proj", "attention.wq"),
    ("self_attn.k_proj", "attention.wk"),
    ("self_attn.v_proj", "attention.wv"),
    ("self_attn.o_proj", "attention.wo"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "feed_forward.w1"),
    ("mlp.down_proj", "feed_forward.w2"),
    ("mlp.up_proj", "feed_forward.w3"),
    ("lm_head", "output"),
];

/// Matrices whose rows are in pairs in llama.cpp's files; see [`pricket_nn::RowOrder::Pairs`].
pub(crate) const PAIRED: [&str; 2] = ["self_attn.q_proj", "self_attn.k_proj"];
