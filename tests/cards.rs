//! Cards of the published checkpoints.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use pricket::suites::{KnownKind, cards};

use crate::common::root;

#[test]
fn suites_list_the_published_models() {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for card in cards() {
        *counts.entry(&card.suite).or_default() += 1;
    }
    let expected = [
        ("GPT-NeoX", 1),
        ("MPT", 12),
        ("OpenLLaMA", 12),
        ("PolyPythias", 45),
        ("Pythia", 34),
        ("RWKV-4", 16),
        ("RedPajama-INCITE", 9),
    ];
    assert_eq!(counts.into_iter().collect::<Vec<_>>(), expected);
    let ids: BTreeSet<&str> = cards().iter().map(|card| card.id.as_str()).collect();
    // One repository holds four RWKV-4 models.
    assert_eq!(ids.len(), 126);
    // Every alias leads to one model.
    for card in cards() {
        for alias in &card.aliases {
            assert_eq!(pricket::suites::card(alias).unwrap().id, card.id, "{alias}");
        }
        assert_eq!(pricket::suites::card(&card.id.to_uppercase()).unwrap().id, card.id);
        assert!(card.id.parse::<pricket::hub::RepoId>().is_ok() && !card.license.is_empty());
        assert!(card.mirrors.iter().all(|mirror| mirror.parse::<pricket::hub::RepoId>().is_ok()));
    }
}

#[test]
fn every_pythia_has_154_steps() {
    for card in cards().iter().filter(|card| card.suite.contains("Pythia")) {
        let pattern = card.checkpoints.as_ref().unwrap();
        let steps = pattern.steps();
        let names: BTreeSet<String> = steps.iter().map(|&step| pattern.branch(step)).collect();
        assert_eq!((names.len(), steps[11], steps[153]), (154, 1000, 143_000), "{}", card.id);
        assert!(names.contains("step512") && names.contains("step143000"));
        assert!(steps.iter().all(|&step| card.step_of(&pattern.branch(step)) == Some(step)));
        assert_eq!(pattern.tokens_per_step * 143_000, 299_892_736_000);
    }
    assert!(cards().iter().filter(|card| !card.suite.contains("Pythia")).all(|card| card.checkpoints.is_none()));
}

/// The parameter counts of a card equal those that the loading code computes from the same shape.
#[test]
fn parameter_counts_match_the_shapes() {
    for card in cards() {
        let name = match card.suite.as_str() {
            "RedPajama-INCITE" => format!("incite-{}", card.size),
            "GPT-NeoX" => format!("neox-{}", card.size),
            "MPT" => format!("mpt-{}", card.size),
            "OpenLLaMA" => format!("open-llama-{}", card.size),
            "RWKV-4" => format!("rwkv4-{}", card.size),
            _ => card.size.clone(),
        };
        let config = pricket::suites::published_config(&name).unwrap_or_else(|| panic!("{name} has no shape"));
        let info = pricket::loading::estimate(&config, pricket::weights::Dtype::F16, 1).unwrap().info;
        assert_eq!((info.parameters, [info.vocab, info.d_model]), (card.parameters, card.embedding), "{}", card.id);
    }
}

#[test]
fn known_problems_cite_a_source() {
    let wrong = |id: &str| {
        let known = pricket::suites::card(id).unwrap().known.iter().filter(|known| known.kind == KnownKind::Wrong);
        known.flat_map(|known| known.steps.clone()).collect::<BTreeSet<u64>>()
    };
    let of_2_8b = wrong("EleutherAI/pythia-2.8b");
    assert!(of_2_8b.len() == 85 && of_2_8b.contains(&0) && of_2_8b.contains(&53_000), "{}", of_2_8b.len());
    assert_eq!(wrong("EleutherAI/pythia-12b"), BTreeSet::from([50_000, 58_000]));
    for card in cards() {
        let steps = card.checkpoints.as_ref().map(pricket::suites::StepPattern::steps).unwrap_or_default();
        for known in &card.known {
            assert!(known.source.starts_with("https://") && !known.what.ends_with('.'), "{}: {known:?}", card.id);
            assert!(known.steps.iter().all(|step| steps.contains(step)), "{}: {known:?}", card.id);
        }
    }
    let first = pricket::suites::card("pythia-2.8b").unwrap().known_of("step0")[0];
    assert_eq!(first.kind, KnownKind::Wrong, "the worst comes first");
}

/// The table between the markers of README.md.
fn table() -> String {
    let mut suites: BTreeMap<&str, Vec<&pricket::suites::Card>> = BTreeMap::new();
    for card in cards() {
        suites.entry(&card.suite).or_default().push(card);
    }
    let join = |items: Vec<&str>| {
        let mut seen = BTreeSet::new();
        items.into_iter().filter(|item| seen.insert(*item)).collect::<Vec<_>>().join(", ")
    };
    let mut out = String::from("| suite | models | sizes | training steps | license |\n|---|---|---|---|---|\n");
    for (suite, cards) in suites {
        let steps =
            cards[0].checkpoints.as_ref().map_or(String::new(), |pattern| format!("{} each", pattern.steps().len()));
        let sizes = join(cards.iter().map(|card| card.size.as_str()).collect());
        let licenses = join(cards.iter().map(|card| card.license.as_str()).collect());
        writeln!(out, "| {suite} | {} | {sizes} | {steps} | {licenses} |", cards.len()).unwrap();
    }
    out
}

/// `PRICKET_BLESS=1 cargo test readme` rewrites the table.
#[test]
fn the_readme_table_is_made_from_the_cards() {
    let path = root().join("README.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once("<!-- cards -->\n").unwrap();
    let (found, after) = rest.split_once("<!-- /cards -->").unwrap();
    if std::env::var_os("PRICKET_BLESS").is_some() {
        std::fs::write(path, format!("{before}<!-- cards -->\n{}<!-- /cards -->{after}", table())).unwrap();
    } else {
        assert_eq!(found, table());
    }
}
