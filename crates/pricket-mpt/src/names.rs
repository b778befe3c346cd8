use pricket_nn::Names;

/// The names of llm-foundry's `MPTForCausalLM`, as the Hub has them.
pub const NAMES: Names = Names {
    aliases: &[],
    // MosaicGPT, the forerunner, called the same tensors so.
    parts: &[
        ("norm_1", "ln_1"),
        ("norm_2", "ln_2"),
        ("norm_f", "ln_f"),
        ("ffn.up_proj", "mlp.mlp_up"),
        ("ffn.down_proj", "mlp.mlp_down"),
    ],
    // Composer adds a prefix, a bare `MPTModel` lacks one.
    prefixes: &[("", "model."), ("transformer.", "")],
    // transformers stores the head although it is the embedding; old code saved its bias tables.
    buffers: &["lm_head.weight", ".attn_bias"],
};
