use pricket_nn::Names;

/// The names of `GPTNeoXForCausalLM`, as transformers spells them on the Hub.
pub const NAMES: Names = Names {
    root: "gpt_neox",
    head: "embed_out",
    // transformers 5 calls the head by its other name.
    aliases: &[("embed_out.weight", "lm_head.weight")],
    spellings: &[GGUF],
    // The causal mask, its fill value and rounded frequencies, which transformers once saved in every layer.
    buffers: &[
        ".attention.bias",
        ".attention.masked_bias",
        ".attention.norm_factor",
        "rotary_emb.inv_freq",
        "rotary_emb.cos_cached",
        "rotary_emb.sin_cached",
    ],
};

/// llama.cpp's names.
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
