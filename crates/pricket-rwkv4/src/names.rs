//! The tensor names of RWKV-4: transformers' on the Hub and those of BlinkDL/RWKV-LM.

use pricket_nn::Names;

/// Tensor names of `RwkvForCausalLM`, as transformers spells them on the Hub.
pub const NAMES: Names = Names { root: "rwkv", head: "head", aliases: &[], spellings: &[NATIVE], buffers: &[] };

/// Parts of canonical names without the root, and their names in BlinkDL/RWKV-LM.
const NATIVE: &[(&str, &str)] = &[
    ("embeddings", "emb"),
    ("pre_ln", "ln0"),
    ("attention", "att"),
    ("feed_forward", "ffn"),
    ("time_mix_key", "time_mix_k"),
    ("time_mix_value", "time_mix_v"),
    ("time_mix_receptance", "time_mix_r"),
];

/// Weights outside the blocks that exist only in other RWKV models, and the names of those models.
pub(crate) const FOREIGN_TRUNK: &[(&str, &str)] = &[
    ("head_q.weight", "an RWKV-4 with a copying head"),
    ("head_k.weight", "an RWKV-4 with a copying head"),
    ("pos_emb_x", "an RWKV-4 with learned positions"),
    ("pos_emb_y", "an RWKV-4 with learned positions"),
];

/// Weights of a block that exist only in other RWKV models, and the names of those models.
pub(crate) const FOREIGN: &[(&str, &str)] = &[
    ("tiny_ln.weight", "RWKV-4a"),
    ("attention.time_mix_qq", "RWKV-4b"),
    ("attention.qq.weight", "RWKV-4b"),
    ("attention.ln_x.weight", "RWKV-5 or later"),
    ("attention.gate.weight", "RWKV-5 or later"),
    ("attention.time_faaaa", "RWKV-5 or later"),
    ("attention.time_maa_x", "RWKV-6"),
    ("attention.x_r", "RWKV-7"),
    ("ffnPre.key.weight", "an RWKV-4 with ffnPre"),
];
