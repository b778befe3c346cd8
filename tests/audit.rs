//! Audits of the revisions of a repository.

use std::collections::BTreeSet;

use pricket::Hub;
use pricket::hub::Steps;
use pricket::hub::{NoProgress, Settings};
use pricket::suites::{Audit, AuditOptions, Checkpoints, FindingKind};
use pricket_testhub::{Content, Repo};

use crate::common::root;
use crate::world::{SUITE, World, blob, case, snapshots, suite_cache, suite_repo, tiny_repo};

fn groups(audit: &Audit) -> BTreeSet<BTreeSet<String>> {
    audit.identical.iter().map(|group| group.iter().cloned().collect()).collect()
}

fn assert_golden(audit: &Audit) {
    let expected: BTreeSet<BTreeSet<String>> =
        serde_json::from_value(case()["identical_weight_groups"].clone()).unwrap();
    assert_eq!(groups(audit), expected);
    let alarming: Vec<_> = audit.findings.iter().filter(|finding| finding.alarming).collect();
    assert_eq!(alarming.len(), 1, "{:?}", audit.findings);
    assert_eq!((alarming[0].kind, &alarming[0].revisions[..]), (FindingKind::EqualsFinal, &["step512".to_owned()][..]));
    let words = &alarming[0].words;
    assert!(words.starts_with("step512 holds the weights of step1000") && words.contains("main"), "{words}");
    let expected = audit.findings.iter().find(|finding| finding.kind == FindingKind::Expected).unwrap();
    assert!(expected.words.contains("step0 and step1") && !expected.alarming, "{}", expected.words);
}

/// main is stored as safetensors, the steps as pickles with buffers, so only the tensors can be compared.
#[test]
fn the_planted_branch_is_found() {
    let world = World::new([(SUITE, suite_repo())]);
    assert_golden(&world.audit(SUITE));
    let sent = world.large_bytes();
    let all: u64 = snapshots()
        .values()
        .map(|directory| {
            let file = ["model.safetensors", "pytorch_model.bin"]
                .map(|name| directory.join(name))
                .into_iter()
                .find(|p| p.symlink_metadata().is_ok());
            std::fs::metadata(blob(&file.unwrap())).unwrap().len()
        })
        .sum();
    assert!(sent < all / 2, "{sent} of {all} bytes were read to compare");
    // The same audit on the cached repository, offline.
    let cache = tempfile::tempdir().unwrap();
    suite_cache(cache.path());
    let mut settings = Settings::new("http://127.0.0.1:9", cache.path());
    settings.offline = true;
    let hub = Hub::new(settings);
    assert_golden(
        &Checkpoints::on(&hub, SUITE, &NoProgress)
            .unwrap()
            .audit(&Steps::all(), AuditOptions::default(), &NoProgress)
            .unwrap(),
    );
    // The same audit on plain directories.
    let plain = tempfile::tempdir().unwrap();
    for (branch, directory) in snapshots() {
        let to = if branch == "main" { plain.path().to_owned() } else { plain.path().join("revisions").join(branch) };
        std::fs::create_dir_all(&to).unwrap();
        for entry in std::fs::read_dir(directory).unwrap().flatten() {
            std::fs::copy(blob(&entry.path()), to.join(entry.file_name())).unwrap();
        }
    }
    assert_golden(&pricket::suites::audit(plain.path().to_str().unwrap(), &Steps::all(), &NoProgress).unwrap());
}

/// A repository of made-up weights: branches with files. A letter stands for the content of a file.
fn letters(branches: &[(&str, &[(&str, &str)])]) -> Repo {
    let mut repo = Repo::default();
    for (branch, files) in branches {
        let files = files.iter().map(|(path, letter)| (*path, Content::lfs(*letter)));
        let commit = repo.commit(files.chain([("config.json", Content::text("{}"))]));
        repo.branch(branch, &commit);
    }
    repo
}

/// The findings of a kind: revisions, whether it is alarming, message.
fn said(audit: &Audit, kind: FindingKind) -> Vec<(Vec<&str>, bool, &str)> {
    let of_kind = audit.findings.iter().filter(|finding| finding.kind == kind);
    of_kind.map(|f| (f.revisions.iter().map(String::as_str).collect(), f.alarming, f.words.as_str())).collect()
}

/// The defects of pythia-2.8b in small. The audit compares hashes and reads no weights.
#[test]
fn an_audit_reads_hashes_only() {
    let world = World::new([(
        "EleutherAI/pythia-2.8b",
        letters(&[
            ("step0", &[("model.safetensors", "z"), ("pytorch_model.bin", "a")]),
            ("step1", &[("model.safetensors", "z"), ("pytorch_model.bin", "b")]),
            ("step2", &[("model.safetensors", "c")]),
            ("step4", &[("model.safetensors", "d")]),
            ("step8", &[("model.safetensors", "d")]),
            ("step16", &[("notes.txt", "no weights")]),
            ("step143000", &[("model.safetensors", "z")]),
            ("main", &[("model.safetensors", "z"), ("pytorch_model.bin", "z'")]),
        ]),
    )]);
    let audit = world.checkpoints("EleutherAI/pythia-2.8b");
    let audit = audit.audit(&"0..512,143000".parse().unwrap(), AuditOptions::default(), &NoProgress).unwrap();
    assert_eq!(world.large_bytes(), 0);
    let ends = said(&audit, FindingKind::EqualsFinal);
    assert!(ends.len() == 1 && ends[0].0 == ["step0", "step1"] && ends[0].2.contains("step143000"), "{ends:?}");
    assert!(!ends[0].2.contains("differ"), "not all of their other files are there: {ends:?}");
    assert!(audit.findings[0].sources.iter().any(|source| source.ends_with("205")));
    let same = said(&audit, FindingKind::Identical);
    assert!(
        same.len() == 1 && same[0].0 == ["step4", "step8"] && same[0].2.contains("at most one name is"),
        "{same:?}"
    );
    assert_eq!(said(&audit, FindingKind::NoWeights)[0].0, ["step16"]);
    let missing = said(&audit, FindingKind::Missing);
    assert!(missing.len() == 1 && missing[0].0 == ["step32", "step64", "step128", "step256", "step512"], "{missing:?}");
    // step2 is reported to be wrong, but now has files of its own.
    let known = said(&audit, FindingKind::Known);
    assert!(
        known.iter().any(|(who, alarming, words)| who == &["step2"]
            && !alarming
            && words.contains("now differ from all others")),
        "{known:?}"
    );
}

#[test]
fn an_audit_suggests_the_other_format() {
    let both = |st: &'static str, bin: &'static str| [("model.safetensors", st), ("pytorch_model.bin", bin)];
    let (zero, four, last, main) = (both("z", "a"), both("z", "b"), both("z", "y"), both("z", "x"));
    let world =
        World::new([("owner/x", letters(&[("step0", &zero), ("step4", &four), ("step9", &last), ("main", &main)]))]);
    let audit = world.audit("owner/x");
    let ends = said(&audit, FindingKind::EqualsFinal);
    assert!(ends[0].0 == ["step0", "step4"] && ends[0].2.contains("pytorch_model.bin all differ"), "{ends:?}");
}

/// The defect of pythia-12b: one shard belongs to another step.
#[test]
fn a_shard_of_another_step_is_found() {
    const ONE: &str = "pytorch_model-00001-of-00002.bin";
    const TWO: &str = "pytorch_model-00002-of-00002.bin";
    const INDEX: (&str, &str) = ("pytorch_model.bin.index.json", "{}");
    let world = World::new([(
        "owner/sharded",
        letters(&[
            ("step1", &[INDEX, (ONE, "a1"), (TWO, "a2")]),
            ("step2", &[INDEX, (ONE, "z1"), (TWO, "b2")]),
            ("step3", &[INDEX, (ONE, "z1"), (TWO, "z2")]),
            // main in the other format, with its pickles beside it.
            ("main", &[("model.safetensors", "zz"), INDEX, (ONE, "z1"), (TWO, "z2")]),
        ]),
    )]);
    let audit = world.audit("owner/sharded");
    let shared = said(&audit, FindingKind::SharedShard);
    assert!(
        shared.iter().any(|(who, alarming, words)| who == &["step2"] && *alarming && words.contains(ONE)),
        "{shared:?}"
    );
}

/// An audit blames a revision only where the evidence is clear.
#[test]
fn ambiguous_evidence_blames_no_revision() {
    let st = |letter: &'static str| [("model.safetensors", letter)];
    let (a, b, c) = (st("a"), st("b"), st("c"));
    let world = World::new([
        // main equals a step in the middle: either the step or main is wrong.
        ("owner/middle", letters(&[("step1", &a), ("step2", &b), ("step3", &c), ("main", &b)])),
        // The card lists a last step that the Hub lacks, so main may differ from every step.
        ("EleutherAI/pythia-160m", letters(&[("step1000", &a), ("step2000", &b), ("main", &c)])),
        ("owner/three", letters(&[("step0", &a), ("step1", &a), ("step2", &a), ("step9", &b), ("main", &b)])),
    ]);
    let found = world.checkpoints("owner/middle");
    let audit = found.audit(&"1,2".parse().unwrap(), AuditOptions::default(), &NoProgress).unwrap();
    let ends = said(&audit, FindingKind::EqualsFinal);
    assert!(ends.len() == 1, "without the last step main stands for it: {ends:?}");
    let found = world.checkpoints("EleutherAI/pythia-160m");
    let audit = found.audit(&"1000,2000,143000".parse().unwrap(), AuditOptions::default(), &NoProgress).unwrap();
    assert!(
        said(&audit, FindingKind::MainDiffers).is_empty() && said(&audit, FindingKind::EqualsFinal).is_empty(),
        "{:?}",
        audit.findings
    );
    assert_eq!(said(&audit, FindingKind::Missing)[0].0, ["step143000"]);
    let audit = world.audit("owner/three");
    let same = said(&audit, FindingKind::Identical);
    assert!(same[0].2.contains("count as one"), "{same:?}");
    assert_eq!(said(&audit, FindingKind::Expected)[0].0, ["step9", "main"]);
}

/// A v0 model starts at step1000. Its card says so, and the audit raises no alarm.
#[test]
fn unpublished_steps_are_not_reported_as_missing() {
    let world = World::new([("EleutherAI/pythia-70m-v0", tiny_repo(&["step1000"]))]);
    let found = world.checkpoints("EleutherAI/pythia-70m-v0");
    let audit = found.audit(&"0..1000".parse().unwrap(), AuditOptions::default(), &NoProgress).unwrap();
    let missing = said(&audit, FindingKind::Missing);
    assert!(missing.len() == 1 && !missing[0].1 && missing[0].2.contains("never published"), "{missing:?}");
    assert!(!audit.is_alarming(), "{:?}", audit.findings);
}

/// The golden suite in other formats than that of the fixture.
#[test]
fn the_planted_branch_is_found_in_every_format() {
    let file = |branch: &str, name: &str| std::fs::read(blob(&snapshots()[branch].join(name))).unwrap();
    let config = || Content::text(file("step64", "config.json"));
    let bin = |branch: &str| ("pytorch_model.bin", Content::lfs(file(branch, "pytorch_model.bin")));
    let st = || Content::lfs(file("main", "model.safetensors"));
    // The same tensors with another header have another hash.
    let resaved = {
        let bytes = file("main", "model.safetensors");
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let metadata = Some(std::collections::HashMap::from([("saved".to_owned(), "again".to_owned())]));
        Content::lfs(safetensors::serialize(tensors.tensors(), metadata).unwrap())
    };
    let mut repo = Repo::default();
    for (branch, files) in [
        ("step64", vec![bin("step64")]),
        ("step128", vec![("model.safetensors", resaved)]),
        ("step256", vec![("model.safetensors", Content::lfs(vec![7; 100]))]),
        ("step512", vec![bin("step1000")]),
        ("step1000", vec![bin("step1000")]),
        // Both formats of one step.
        ("main", vec![("model.safetensors", st()), bin("step1000")]),
    ] {
        let commit = repo.commit(files.into_iter().chain([("config.json", config())]));
        repo.branch(branch, &commit);
    }
    let world = World::new([("owner/odd", repo.clone())]);
    let audit = world.audit("owner/odd");
    assert_eq!(said(&audit, FindingKind::EqualsFinal)[0].0, ["step512"]);
    // step256 is damaged. A deep audit reports it and continues.
    let deep =
        world.checkpoints("owner/odd").audit(&Steps::all(), AuditOptions::default().deep(true), &NoProgress).unwrap();
    assert_eq!(said(&deep, FindingKind::EqualsFinal)[0].0, ["step128", "step512"]);
    let unreadable = said(&deep, FindingKind::Unreadable);
    assert!(unreadable.len() == 1 && unreadable[0].0 == ["step256"] && unreadable[0].1, "{unreadable:?}");
    // The two formats of main differ. The audit reports that, and draws no conclusion from the pickles.
    let commit = repo.commit([("model.safetensors", st()), bin("step64"), ("config.json", config())]);
    repo.branch("main", &commit);
    world.server.add("owner/odd", repo);
    let audit = world.audit("owner/odd");
    assert_eq!(said(&audit, FindingKind::FormsDiffer)[0].0, ["main"]);
    assert_eq!(said(&audit, FindingKind::EqualsFinal)[0].0, ["step128", "step512"]);
    assert!(groups(&audit).iter().all(|group| !group.contains("step64")));
}

/// An offline audit covers only the revisions in the cache.
#[test]
fn an_offline_audit_covers_the_cached_revisions() {
    let world = World::new([(SUITE, suite_repo())]);
    let found = world.checkpoints(SUITE);
    for step in &found.steps[..3] {
        found.fetch(step, &NoProgress).unwrap();
    }
    // Only the configuration of main is cached, as the Python client leaves it.
    let (hub, id): (Hub, pricket::hub::ModelId) = (world.hub(), SUITE.parse().unwrap());
    let commit = hub.resolve(&id, &NoProgress).unwrap();
    let listing = hub.files(&id.repo, &commit, &NoProgress).unwrap().files;
    let config: Vec<_> = listing.iter().filter(|file| file.path == "config.json").cloned().collect();
    hub.fetch_part(&id.repo, &commit, &config, &NoProgress).unwrap();
    std::fs::write(world.cache.path().join("models--test--tiny-neox/refs/main"), &commit).unwrap();
    let audit = Checkpoints::on(&world.offline(), SUITE, &NoProgress).unwrap();
    let audit = audit.audit(&Steps::all(), AuditOptions::default(), &NoProgress).unwrap();
    assert!(!audit.is_alarming(), "{:?}", audit.findings);
    assert_eq!(said(&audit, FindingKind::NotCached)[0].0, ["main"]);
}

/// The training steps of models/tiny are GGUF files; main is safetensors, with which they cannot be compared.
#[test]
fn gguf_steps_are_audited() {
    let audit = |model: &std::path::Path| {
        let checkpoints = pricket::checkpoints(model).unwrap();
        checkpoints.audit(&Steps::all(), AuditOptions::default(), &NoProgress).unwrap()
    };
    let tiny = audit(&root().join("models/tiny"));
    assert_eq!((tiny.revisions.len(), tiny.findings.len()), (9, 0), "{:?}", tiny.findings);
    assert!(tiny.revisions.iter().all(|revision| revision.weights.len() == 1));
    // A copied step is found, whether main is there or not.
    let directory = tempfile::tempdir().unwrap();
    let put = |from: &str, to: &str| {
        let to = directory.path().join("revisions").join(to);
        std::fs::create_dir_all(&to).unwrap();
        std::fs::copy(root().join("models/tiny/revisions").join(from).join("model.gguf"), to.join("model.gguf"))
            .unwrap();
    };
    for (from, to) in [("step64", "step64"), ("step1000", "step512"), ("step1000", "step1000")] {
        put(from, to);
    }
    let planted = audit(directory.path());
    assert_eq!(said(&planted, FindingKind::EqualsFinal)[0].0, ["step512"]);
    assert_eq!(planted.identical, [["step512", "step1000"]]);
}
