//! Forms of a revision's weights: safetensors or PyTorch, one file or shards, or a GGUF or GGML file. Some revisions
//! have several forms, whose weights can differ.

use std::collections::BTreeMap;
use std::path::Path;

use pricket_hub::Listed;
use pricket_weights::{choose_weights, parts_of};

/// A form of weights, in the order in which a loader prefers them ([`pricket_weights::choose_weights`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Form {
    Safetensors,
    SafetensorsShards,
    Torch,
    TorchShards,
    /// GGUF and GGML.
    Container,
}

const SHARDED: [(&str, &str, &str, Form); 2] = [
    ("model.safetensors.index.json", "model-", ".safetensors", Form::SafetensorsShards),
    ("pytorch_model.bin.index.json", "pytorch_model-", ".bin", Form::TorchShards),
];

/// Returns whether a file holds weights, judged by its name.
pub(crate) fn is_weight_file(path: &str) -> bool {
    [".safetensors", ".bin", ".pth", ".gguf"].iter().any(|end| path.ends_with(end))
}

/// Returns the weight files of each form in the listing, sorted. A loader takes the first form.
pub(crate) fn forms(listing: &[Listed]) -> BTreeMap<Form, Vec<Listed>> {
    let find = |name: &str| listing.iter().find(|file| file.path == name).cloned();
    let mut out = BTreeMap::new();
    for (name, form) in [("model.safetensors", Form::Safetensors), ("pytorch_model.bin", Form::Torch)] {
        if let Some(file) = find(name) {
            out.insert(form, vec![file]);
        }
    }
    for (index, stem, end, form) in SHARDED {
        let is_shard = |file: &&Listed| {
            let middle = file.path.strip_prefix(stem).and_then(|rest| rest.strip_suffix(end));
            middle.is_some_and(|middle| middle.contains("-of-") && !middle.contains('/'))
        };
        let mut shards: Vec<Listed> = listing.iter().filter(is_shard).cloned().collect();
        if find(index).is_some() && !shards.is_empty() {
            shards.sort_by(|a, b| a.path.cmp(&b.path));
            out.insert(form, shards);
        }
    }
    // Otherwise: a file with an unusual name, or numbered parts without an index.
    let plain: Vec<&str> = listing.iter().map(|file| file.path.as_str()).filter(|path| !path.contains('/')).collect();
    if out.is_empty()
        && let Ok(chosen) = choose_weights(&plain, Path::new(""))
    {
        let files: Option<Vec<Listed>> = match parts_of(chosen) {
            Some(parts) => parts.iter().map(|part| find(part)).collect(),
            None => find(chosen).map(|file| vec![file]),
        };
        let end = Path::new(chosen).extension().and_then(|end| end.to_str());
        let form = match (end, parts_of(chosen).is_some()) {
            (Some("safetensors"), false) => Some(Form::Safetensors),
            (Some("safetensors"), true) => Some(Form::SafetensorsShards),
            (Some("bin"), true) => Some(Form::TorchShards),
            (Some("pth"), false) => Some(Form::Torch),
            _ => Some(Form::Container),
        };
        out.extend(form.zip(files));
    }
    out
}

/// Returns the listing without the weights of other forms, so that a loader takes this form.
pub(crate) fn only(form: Form, listing: &[Listed]) -> Vec<Listed> {
    let taken = &forms(listing)[&form];
    let index = SHARDED.iter().find(|(.., of)| *of == form).map(|(index, ..)| *index);
    let is_weights = |path: &str| is_weight_file(path) || path.ends_with(".index.json");
    let keep = |file: &&Listed| !is_weights(&file.path) || taken.contains(file) || Some(file.path.as_str()) == index;
    listing.iter().filter(keep).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_form_is_what_a_loader_takes() {
        let sets: [&[&str]; 14] = [
            &["model.gguf", "README.md"],
            &["a.gguf", "b.gguf"],
            &["pythia-ggml-q4_0.bin", "config.json"],
            &["RWKV-4-Pile-169M-20220807-8023.pth", "README.md"],
            &["model.safetensors", "RWKV-4-Pile-169M-20220807-8023.pth"],
            &["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
            &["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "training_args.bin"],
            &["a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors", "b.safetensors"],
            &["model.safetensors", "pytorch_model.bin", "config.json"],
            &[
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "model.safetensors.index.json",
                "adapter_model.safetensors",
            ],
            &["pytorch_model.bin", "model-00001-of-00002.safetensors"],
            &["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "training_args.bin"],
            &["weights.safetensors"],
            &["sub/model.safetensors", "optimizer.bin"],
        ];
        for names in sets {
            let listing: Vec<Listed> = names.iter().map(|name| Listed::new(*name, 1, None)).collect();
            // `Chosen` does not take files in folders either.
            let plain: Vec<&str> = names.iter().copied().filter(|name| !name.contains('/')).collect();
            let chosen = pricket_weights::choose_weights(&plain, std::path::Path::new("x")).ok();
            let found = forms(&listing).into_iter().next();
            assert_eq!(chosen.is_some(), found.is_some(), "{names:?}");
            let Some((form, files)) = found else { continue };
            let index = SHARDED.iter().find(|(.., of)| *of == form).map(|(index, ..)| *index);
            let index = index.filter(|index| names.contains(index));
            assert_eq!(chosen, Some(index.unwrap_or(&files[0].path)), "{names:?}");
            assert_eq!(forms(&only(form, &listing)).len(), 1);
        }
    }
}
