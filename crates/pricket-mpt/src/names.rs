//! The tensor names of MPT: llm-foundry's on the Hub, MosaicGPT's and llama.cpp's.

use pricket_nn::Names;

/// Tensor names of llm-foundry's `MPTForCausalLM`, as on the Hub.
pub const NAMES: Names = Names {
    root: "transformer",
    head: "lm_head",
    aliases: &[],
    spellings: &[MOSAIC_GPT, GGUF],
    // Early versions saved the biases of the attention scores beside the weights.
    buffers: &["attn_bias"],
};

/// Parts of the names in [`NAMES`], and their replacements in MosaicGPT checkpoints.
const MOSAIC_GPT: &[(&str, &str)] = &[
    ("norm_1", "ln_1"),
    ("norm_2", "ln_2"),
    ("norm_f", "ln_f"),
    ("ffn.up_proj", "mlp.mlp_up"),
    ("ffn.down_proj", "mlp.mlp_down"),
];

/// Parts of the names in [`NAMES`], and their replacements in llama.cpp's files.
pub(crate) const GGUF: &[(&str, &str)] = &[
    ("transformer.wte", "token_embd"),
    ("transformer.wpe", "position_embd"),
    ("transformer.blocks", "blk"),
    ("norm_1", "attn_norm"),
    ("norm_2", "ffn_norm"),
    ("attn.Wqkv", "attn_qkv"),
    ("attn.out_proj", "attn_output"),
    ("attn.q_ln", "attn_q_norm"),
    ("attn.k_ln", "attn_k_norm"),
    ("ffn.up_proj", "ffn_up"),
    ("ffn.down_proj", "ffn_down"),
    ("transformer.norm_f", "output_norm"),
    ("lm_head", "output"),
];
