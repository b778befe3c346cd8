//! Names of the tensors of a family: canonical names, other spellings in files, and wrapper modules.

use std::collections::BTreeSet;

/// Modules that wrap other modules at any level: `torch.compile`, two versions of FSDP, and activation checkpointing.
const INNER_WRAPPERS: [&str; 4] = ["_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module"];

/// Modules that wrap a whole model: DistributedDataParallel, Lightning and Composer, PEFT, TRL, DeepSpeed, and reward
/// models.
const WRAPPERS: [&str; 8] = [
    "module",
    "model",
    "base_model",
    "pretrained_model",
    "_forward_module",
    "transformer",
    "rwtransformer",
    "rwtranrsformer",
];

/// Tensor names of a family: spellings in files besides the canonical one, and buffers to ignore.
#[derive(Clone, Copy, Debug, Default)]
pub struct Names {
    /// First part of the names of all weights except the head, such as `gpt_neox`. The parts before it are wrappers.
    pub root: &'static str,
    /// Name of the head without `.weight`.
    pub head: &'static str,
    /// Pairs of a canonical name and another name of the same tensor.
    pub aliases: &'static [(&'static str, &'static str)],
    /// Other spellings. Each is a table that replaces parts of canonical names between dots, such as
    /// `("norm_1", "ln_1")`.
    pub spellings: &'static [&'static [(&'static str, &'static str)]],
    /// Name suffixes of tensors that are not weights, such as masks and tables that old code saved.
    pub buffers: &'static [&'static str],
}

impl Names {
    /// Returns all spellings of the canonical name `name`, the canonical one first.
    pub(crate) fn spellings(&self, name: &str) -> Vec<String> {
        let mut out = vec![name.to_owned()];
        out.extend(
            self.aliases.iter().filter(|(canonical, _)| *canonical == name).map(|(_, other)| (*other).to_owned()),
        );
        out.extend(self.spellings.iter().map(|table| Self::to_spelling(name, table)).filter(|other| other != name));
        // A model saved without its head has names without the root.
        let root = format!("{}.", self.root);
        let bare: Vec<String> = out.iter().filter_map(|name| Some(name.strip_prefix(&root)?.to_owned())).collect();
        out.extend(bare);
        out
    }

    /// Returns `name` without the wrapper modules of training, in any number and order.
    pub fn unwrapped(&self, name: &str) -> String {
        let mut parts: Vec<&str> = name.split('.').filter(|part| !INNER_WRAPPERS.contains(part)).collect();
        let is_wrapper = |part: &&str| WRAPPERS.contains(part);
        // The root of a family may have the name of a wrapper, so the last occurrence is the root.
        let root = parts.iter().rposition(|part| *part == self.root).filter(|&at| parts[..at].iter().all(is_wrapper));
        // The head is next to the root, so the parts before it are wrappers too.
        let head = parts.iter().position(|part| *part == self.head).filter(|&at| parts[..at].iter().all(is_wrapper));
        let outer = head.or(root).unwrap_or_else(|| parts.iter().take_while(|part| is_wrapper(part)).count());
        parts.drain(..outer.min(parts.len().saturating_sub(2)));
        parts.join(".")
    }

    /// Returns whether an unused tensor looks like a weight of this family: by its name, or because `asked` has the
    /// tensor of the same name in another block. The numbers in the names in `asked` are replaced by `#`.
    pub(crate) fn is_weight(&self, name: &str, asked: &BTreeSet<String>) -> bool {
        let canonical = self.canonical(name);
        let first = canonical.split('.').next();
        // Without the root, names start with a part such as `layers` or `blocks`.
        let is_bare = || {
            let firsts = asked.iter().map(|name| self.unwrapped(name));
            firsts.map(|name| name.split('.').next().map(str::to_owned)).any(|known| known.as_deref() == first)
        };
        let is_ours = first == Some(self.root) || canonical.starts_with(&format!("{}.", self.head)) || is_bare();
        let ends = [".weight", ".bias"].iter().any(|end| canonical.ends_with(end));
        (is_ours && ends) || asked.contains(&without_numbers(name))
    }

    /// Returns the canonical name of the tensor with the name `name` in a file, to compare files with different
    /// spellings. Does not add a missing root.
    pub fn canonical(&self, name: &str) -> String {
        let bare = self.unwrapped(name);
        if let Some((canonical, _)) = self.aliases.iter().find(|(_, other)| *other == bare) {
            return (*canonical).into();
        }
        for table in self.spellings.iter().filter(|table| table.iter().any(|(_, other)| bare.contains(other))) {
            let name = table.iter().fold(bare.clone(), |name, (part, other)| respelled(&name, other, part));
            if name != bare {
                return name;
            }
        }
        bare
    }

    /// Returns the shape of the tensor with the canonical name `canonical`, in any spelling. `shape` returns a shape by
    /// the name in the file.
    pub fn shape(&self, canonical: &str, shape: &dyn Fn(&str) -> Option<Vec<usize>>) -> Option<Vec<usize>> {
        self.spellings(canonical).iter().find_map(|spelling| shape(spelling))
    }

    /// Returns `name` in the spelling of `table`.
    pub fn to_spelling(name: &str, table: &[(&str, &str)]) -> String {
        table.iter().fold(name.to_owned(), |name, (part, other)| respelled(&name, part, other))
    }

    /// Returns whether `name` is a buffer and not a weight.
    pub fn is_buffer(&self, name: &str) -> bool {
        self.buffers.iter().any(|ending| {
            let before = name.strip_suffix(ending);
            // The suffix has to be the whole name or to start at a dot.
            before.is_some_and(|before| before.is_empty() || before.ends_with('.') || ending.starts_with('.'))
        })
    }
}

/// Replaces the part `from` of `name`, between dots or at an end, by `to`.
fn respelled(name: &str, from: &str, to: &str) -> String {
    let padded = format!(".{name}.").replace(&format!(".{from}."), &format!(".{to}."));
    padded[1..padded.len() - 1].to_owned()
}

/// Replaces every number between dots in `name` by `#`.
pub(crate) fn without_numbers(name: &str) -> String {
    let is_number = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    name.split('.').map(|part| if is_number(part) { "#" } else { part }).collect::<Vec<_>>().join(".")
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEOX: Names = Names {
        root: "gpt_neox",
        head: "embed_out",
        aliases: &[("embed_out.weight", "lm_head.weight")],
        spellings: &[&[("gpt_neox.layers", "blk"), ("attention.dense", "attn_output")]],
        buffers: &[".attention.bias"],
    };
    const MPT: Names = Names { root: "transformer", head: "lm_head", aliases: &[], spellings: &[], buffers: &[] };
    const WRAPPER: Names = Names { root: "model", ..MPT };

    #[test]
    fn wrappers_are_taken_off_in_any_order_and_number() {
        for prefix in [
            "",
            "_orig_mod.",
            "module.",
            "module.module.",
            "model.",
            "base_model.model.",
            "pretrained_model.",
            "_fsdp_wrapped_module.",
            "module._orig_mod.",
            "_orig_mod.module.",
            "model._orig_mod.module.",
            "base_model.model.module.",
            "transformer.",
            "rwtransformer.",
            "_forward_module.module.model.",
        ] {
            let name = "gpt_neox.layers.0.attention.dense.weight";
            assert_eq!(NEOX.unwrapped(&format!("{prefix}{name}")), name, "{prefix}");
            assert_eq!(
                NEOX.unwrapped(&format!("{prefix}layers.0.mlp.dense_h_to_4h.bias")),
                "layers.0.mlp.dense_h_to_4h.bias"
            );
            assert_eq!(NEOX.unwrapped(&format!("{prefix}embed_out.weight")), "embed_out.weight");
            assert_eq!(WRAPPER.unwrapped(&format!("{prefix}lm_head.weight")), "lm_head.weight", "{prefix}");
            assert_eq!(WRAPPER.unwrapped(&format!("{prefix}model.norm.weight")), "model.norm.weight", "{prefix}");
            assert_eq!(MPT.unwrapped(&format!("{prefix}transformer.wte.weight")), "transformer.wte.weight", "{prefix}");
        }
        let inside =
            "_fsdp_wrapped_module.gpt_neox.layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.mlp.x.weight";
        assert_eq!(NEOX.unwrapped(inside), "gpt_neox.layers.0.mlp.x.weight");
        // A name that consists only of wrappers stays as it is.
        assert_eq!(NEOX.unwrapped("model.weight"), "model.weight");
        assert_eq!(NEOX.unwrapped("student.gpt_neox.embed_in.weight"), "student.gpt_neox.embed_in.weight");
    }

    #[test]
    fn weights_are_told_from_other_tensors() {
        let asked: BTreeSet<String> = ["layers.#.attention.dense.weight".to_owned()].into();
        for (name, expected) in [
            ("gpt_neox.layers.7.attention.dense.weight", true),
            ("module.gpt_neox.layers.7.attention.query_key_value.lora_A.default.weight", true),
            ("layers.9.attention.dense.weight", true),
            ("layers.9.attention.query_key_value.bias", true),
            ("module.layers.9.attention.norm.weight", true),
            ("blk.9.attn_output.bias", true),
            ("lm_head.weight", true),
            ("v_head.summary.weight", false),
            ("score.weight", false),
            ("gpt_neox.rotary_emb.inv_freq", false),
            ("optimizer.step", false),
        ] {
            assert_eq!(NEOX.is_weight(name, &asked), expected, "{name}");
        }
    }
}
