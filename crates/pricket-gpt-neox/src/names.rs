//! The tensor names of GPT-NeoX on the Hub and in llama.cpp's files.

use pricket_nn::Names;

/// Tensor names of `GPTNeoXForCausalLM`, as transformers spells them on the Hub.
pub const NAMES: Names = Names {
    root: "gpt_neox",
    head: "embed_out",
    // transformers 5 uses the other name of the head.
    aliases: &[("embed_out.weight", "lm_head.weight")],
    spellings: &[GGUF],
    // Old versions of transformers saved the causal mask, its fill value and the rotary tables in every layer.
    buffers: &[
        ".attention.bias",
        ".attention.masked_bias",
        ".attention.norm_factor",
        "rotary_emb.inv_freq",
        "rotary_emb.cos_cached",
        "rotary_emb.sin_cached",
    ],
};

/// Parts of canonical names, and their names in llama.cpp's files.
pub(crate) const GGUF: &[(&str, &str)] = &[
    ("gpt_neox.embed_in", "token_embd"),
    ("gpt_neox.layers", "blk"),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("attention.query_key_value", "attn_qkv"),
    ("attention.dense", "attn_output"),
    ("mlp.dense_h_to_4h", "ffn_up"),
    ("mlp.dense_4h_to_h", "ffn_down"),
    ("gpt_neox.final_layer_norm", "output_norm"),
    ("embed_out", "output"),
];
