//! Dependencies between crates and modules, as docs/architecture.md describes them.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use crate::common::{files, root};

/// The dependencies that each crate may have. crates/README.md holds the same table.
const ALLOWED: [(&str, &[&str]); 16] = [
    ("pricket-plots", &[]),
    ("pricket-progress", &[]),
    ("pricket-llama", &["pricket-nn"]),
    ("pricket-rwkv4", &["pricket-nn"]),
    ("pricket-hub", &["pricket-progress"]),
    ("pricket-testhub", &[]),
    ("pricket-toys", &["pricket-nn"]),
    ("pricket-weights", &["pricket-kernels"]),
    ("pricket-kernels", &[]),
    ("pricket-nn", &["pricket-weights", "pricket-kernels", "pricket-progress"]),
    ("pricket-gpt-neox", &["pricket-nn"]),
    ("pricket-mpt", &["pricket-nn"]),
    ("pricket-redpajama-incite", &["pricket-gpt-neox", "pricket-nn"]),
    ("pricket-lm", &["pricket-nn"]),
    ("pricket-train", &["pricket-nn", "pricket-lm", "pricket-weights"]),
    (
        "pricket",
        &[
            "pricket-hub",
            "pricket-weights",
            "pricket-nn",
            "pricket-gpt-neox",
            "pricket-mpt",
            "pricket-redpajama-incite",
            "pricket-llama",
            "pricket-rwkv4",
            "pricket-lm",
            "pricket-train",
            "pricket-plots",
            "pricket-progress",
        ],
    ),
];

fn metadata() -> serde_json::Value {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn crates_use_only_what_the_architecture_allows() {
    let allowed: BTreeMap<&str, BTreeSet<&str>> =
        ALLOWED.iter().map(|(c, uses)| (*c, uses.iter().copied().collect())).collect();
    let metadata = metadata();
    for package in metadata["packages"].as_array().unwrap() {
        let name = package["name"].as_str().unwrap();
        let allowed = allowed.get(name).unwrap_or_else(|| panic!("{name} is not in the table of the architecture"));
        for dependency in package["dependencies"].as_array().unwrap() {
            let uses = dependency["name"].as_str().unwrap();
            // Tests may have other dependencies.
            let knows_no_tensors = ["pricket-hub", "pricket-plots"].contains(&name);
            assert!(!(knows_no_tensors && uses.starts_with("candle")), "{name} knows no tensors");
            if uses.starts_with("pricket") && dependency["kind"] != "dev" {
                assert!(allowed.contains(uses), "{name} must not use {uses}");
            }
        }
    }
}

/// Source lines of a crate, without tests and comments.
fn code(krate: &str) -> Vec<(String, String)> {
    let mut out = Vec::new();
    for path in files(&root().join("crates").join(krate).join("src")) {
        if path.extension().is_none_or(|end| end != "rs") {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        let text = text.split("#[cfg(test)]").next().unwrap();
        for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim_start().starts_with("//")) {
            out.push((format!("{}:{}", path.display(), i + 1), line.to_owned()));
        }
    }
    out
}

fn refuse(krate: &str, words: &[&str]) {
    for (place, line) in code(krate) {
        for word in words {
            assert!(!line.contains(word), "{place} mentions {word}: {line}");
        }
    }
}

#[test]
fn families_know_no_device_type_feature_or_cache() {
    for family in [
        "pricket-gpt-neox",
        "pricket-mpt",
        "pricket-redpajama-incite",
        "pricket-llama",
        "pricket-rwkv4",
        "pricket-toys",
    ] {
        refuse(family, &["cfg(feature", "Device::", "to_dtype", "DType", "uantis", "uantiz", "Cache", "State::"]);
        // The names of tensors and keys in files are tables beside the code.
        let is_embedding_or_head = |place: &str| place.contains("formats.rs") || place.contains("names.rs");
        // Files that hold only lists of keys are as long as the formats of other programs require.
        let lines = code(family).into_iter().filter(|(place, _)| !place.contains("keys.rs"));
        // `family.rs` describes the other modules to the rest of pricket.
        let (listed, lines): (Vec<_>, Vec<_>) = lines.partition(|(place, _)| place.contains("family.rs"));
        let lines = lines.into_iter();
        let (tables, code): (Vec<_>, Vec<_>) = lines.partition(|(place, _)| is_embedding_or_head(place));
        let (tables, lines) = (tables.len(), code.len());
        assert!(
            lines < 300 && tables < 160 && listed.len() < 110,
            "{family}: {lines} lines, {tables} in tables; a family is config and block"
        );
    }
}

#[test]
fn shared_crates_name_no_family() {
    for krate in ["pricket-weights", "pricket-kernels", "pricket-nn", "pricket-lm", "pricket-train"] {
        refuse(krate, &["neox", "NeoX", "pythia", "Pythia", "\"mpt", "Mpt", "MPT", "rwkv", "Rwkv"]);
        // pricket-lm reads sentencepiece models and therefore holds the name that transformers gives to their
        // tokenizer.
        if krate != "pricket-lm" {
            refuse(krate, &["llama", "Llama"]);
        }
    }
}

#[test]
fn fused_operations_are_called_in_one_module() {
    for (place, line) in code("pricket-nn") {
        let fused = ["candle_nn::ops", "pricket_kernels", "rotary_emb"].iter().any(|word| line.contains(word));
        assert!(!fused || place.contains("src/ops"), "{place}: {line}");
    }
}

#[test]
fn public_handles_are_owned() {
    for file in ["text/handle.rs", "loading/load.rs", "loading/memory.rs"] {
        let text = std::fs::read_to_string(root().join("crates/pricket/src").join(file)).unwrap();
        for line in text.lines() {
            let public = line.starts_with("pub struct") || line.starts_with("pub enum");
            assert!(!(public && line.contains("<'")), "{file}: a notebook cannot keep a borrowed handle: {line}");
            assert!(!line.contains("async fn"), "{file}: {line}");
        }
    }
}

/// A module's name as the parts of its path. The root has none.
type Module = Vec<String>;

/// The modules of a crate with their source, without tests and comments.
fn modules(krate: &str) -> BTreeMap<Module, String> {
    let source = root().join("crates").join(krate).join("src");
    let module = |path: &std::path::Path| -> Module {
        let path = path.strip_prefix(&source).unwrap().with_extension("");
        let parts = path.iter().map(|part| part.to_string_lossy().into_owned());
        parts.filter(|part| part != "lib").collect()
    };
    let code = |path: &std::path::Path| {
        let text = std::fs::read_to_string(path).unwrap();
        let text = text.split("#[cfg(test)]\nmod tests").next().unwrap();
        text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
    };
    files(&source)
        .into_iter()
        .filter(|path| path.extension().is_some_and(|end| end == "rs"))
        .map(|path| (module(&path), code(&path)))
        .collect()
}

/// The paths in a tree of uses: `a::{b, c::d}` gives `a::b` and `a::c::d`.
fn expanded(tree: &str) -> Vec<String> {
    let Some((before, rest)) = tree.split_once('{') else {
        return vec![tree.split(" as ").next().unwrap().split_whitespace().collect()];
    };
    let (mut depth, mut part, mut parts) = (0, String::new(), Vec::new());
    for c in rest[..rest.rfind('}').unwrap()].chars() {
        depth += i32::from(c == '{') - i32::from(c == '}');
        if c == ',' && depth == 0 { parts.push(std::mem::take(&mut part)) } else { part.push(c) }
    }
    parts.push(part);
    let parts = parts.iter().filter(|part| !part.trim().is_empty());
    parts.flat_map(|part| expanded(&format!("{}{}", before.trim(), part.trim()))).collect()
}

/// The trees of all `use` items of a source, and whether each is public.
fn uses(source: &str) -> Vec<(bool, String)> {
    let statement = regex::Regex::new(r"(?m)^\s*(pub(?:\([a-z]+\))? )?use ([^;]+);").unwrap();
    let found = statement.captures_iter(source);
    found.flat_map(|found| expanded(&found[2]).into_iter().map(move |path| (found.get(1).is_some(), path))).collect()
}

/// The module that a path leads to from `module`, and the rest of the path. `None` for a path outside the crate.
fn resolved(path: &str, module: &Module, known: &BTreeMap<Module, String>) -> Option<(Module, Vec<String>)> {
    let mut parts = path.split("::").map(str::to_owned).collect::<std::collections::VecDeque<_>>();
    let mut at = match parts.front()?.as_str() {
        "crate" => Vec::new(),
        "super" | "self" => module.clone(),
        child if known.contains_key(&[&module[..], &[child.to_owned()]].concat()) => module.clone(),
        _ => return None,
    };
    while let Some(part) = parts.front() {
        match part.as_str() {
            "crate" | "self" => {}
            "super" => {
                at.pop();
            }
            part => {
                let child = [&at[..], &[part.to_owned()]].concat();
                if !known.contains_key(&child) {
                    break;
                }
                at = child;
            }
        }
        parts.pop_front();
    }
    Some((at, parts.into()))
}

/// Which module uses which. A reexported name counts for the module that defines it. Parents and children may use each
/// other.
fn graph(known: &BTreeMap<Module, String>) -> BTreeMap<Module, BTreeSet<Module>> {
    let mut passed_on: BTreeMap<(Module, String), Module> = BTreeMap::new();
    for (module, source) in known {
        for (_, path) in uses(source).into_iter().filter(|(public, _)| *public) {
            if let Some((target, rest)) = resolved(&path, module, known).filter(|(_, rest)| !rest.is_empty()) {
                passed_on.insert((module.clone(), rest[0].clone()), target);
            }
        }
    }
    let inline = regex::Regex::new(r"\b(?:crate|super)(?:::\w+)+").unwrap();
    let mut graph = BTreeMap::new();
    for (module, source) in known {
        let paths = uses(source).into_iter().map(|(_, path)| path);
        let paths = paths.chain(inline.find_iter(source).map(|found| found.as_str().to_owned()));
        let mut used = BTreeSet::new();
        for (mut target, rest) in paths.filter_map(|path: String| resolved(&path, module, known)) {
            for _ in 0..8 {
                if let Some(next) = rest.first().and_then(|name| passed_on.get(&(target.clone(), name.clone()))) {
                    target.clone_from(next);
                }
            }
            if !module.starts_with(&target) && !target.starts_with(module) {
                used.insert(target);
            }
        }
        graph.insert(module.clone(), used);
    }
    graph
}

/// A path from a module back to itself.
fn circle(graph: &BTreeMap<Module, BTreeSet<Module>>) -> Option<Vec<Module>> {
    fn walk(
        at: &Module,
        way: &mut Vec<Module>,
        done: &mut BTreeSet<Module>,
        graph: &BTreeMap<Module, BTreeSet<Module>>,
    ) -> Option<Vec<Module>> {
        if let Some(start) = way.iter().position(|module| module == at) {
            return Some(way[start..].to_vec());
        }
        if !done.insert(at.clone()) {
            return None;
        }
        way.push(at.clone());
        let found = graph.get(at)?.iter().find_map(|next| walk(next, way, done, graph));
        way.pop();
        found
    }
    let mut done = BTreeSet::new();
    graph.keys().find_map(|module| walk(module, &mut Vec::new(), &mut done, graph))
}

/// The files of a crate have no circular dependencies.
#[test]
fn modules_have_no_dependency_cycles() {
    for (krate, _) in ALLOWED {
        let known = modules(krate);
        let graph = graph(&known);
        assert!(known.len() < 4 || graph.values().any(|used| !used.is_empty()), "{krate}: nothing was found");
        assert_eq!(circle(&graph), None, "{krate}");
    }
    // The search finds a cycle through a reexported name and through a tree of uses.
    let module = |name: &str| name.split("::").filter(|part| !part.is_empty()).map(str::to_owned).collect::<Module>();
    let known = [
        ("", "mod a;\nmod b;\npub use b::B;"),
        ("a", "use crate::{B, c};"),
        ("b", "fn f() { crate::a::g() }"),
        ("c", ""),
    ]
    .map(|(name, source)| (module(name), source.to_owned()));
    assert_eq!(circle(&graph(&known.into())), Some(vec![module("a"), module("b")]));
}

#[test]
fn a_family_is_small_and_named_in_one_place() {
    for file in ["gated.rs", "recurrent.rs"] {
        let text = std::fs::read_to_string(root().join("crates/pricket-toys/src").join(file)).unwrap();
        assert!(text.lines().count() < 120, "{file}: {} lines", text.lines().count());
    }
    // The facade names families in one list only.
    let named =
        |line: &str| ["pricket_gpt_neox", "pricket_mpt", "pricket_redpajama"].iter().any(|name| line.contains(name));
    for (place, line) in code("pricket").into_iter().filter(|(_, line)| named(line)) {
        assert!(place.contains("src/loading/family.rs"), "{place} names a family: {line}");
    }
}
