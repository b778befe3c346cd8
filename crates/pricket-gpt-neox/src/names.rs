use pricket_nn::Names;

/// The names of `GPTNeoXForCausalLM`, as transformers spells them on the Hub.
pub const NAMES: Names = Names {
    // transformers 5 calls the head by its other name.
    aliases: &[("embed_out.weight", "lm_head.weight")],
    parts: &[],
    // Training wrappers add a prefix, a bare `GPTNeoXModel` lacks one.
    prefixes: &[("", "model."), ("", "module."), ("gpt_neox.", "")],
    // The causal mask, its fill value and rounded frequencies, which transformers once saved in every layer.
    buffers: &[".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq", ".attention.norm_factor"],
};
