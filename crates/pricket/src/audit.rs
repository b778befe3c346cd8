use std::collections::{BTreeMap, BTreeSet};

use candle_core::DType;
use pricket_hub::{Digest, Listed, Steps};
use pricket_nn::{Names, Progress};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::cards::KnownKind;
use crate::checkpoints::{Checkpoint, Checkpoints};
use crate::family::Family;
use crate::remote::Tensors;
use crate::{Error, Result};

/// What the revisions of a model really hold.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Audit {
    /// The model.
    pub model: String,
    /// Every revision that was looked at, steps ascending, `main` last.
    pub revisions: Vec<Audited>,
    /// Sets of two or more revisions that hold the same weights.
    pub identical: Vec<Vec<String>>,
    /// What there is to say, what is alarming first.
    pub findings: Vec<Finding>,
}

/// A revision that was looked at.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Audited {
    /// The revision.
    pub revision: String,
    /// Its commit.
    pub commit: Option<String>,
    /// The weight files that a loader takes, with their hashes.
    pub weights: Vec<(String, Option<Digest>)>,
}

/// Something that the audit found.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Finding {
    /// What kind of thing.
    pub kind: FindingKind,
    /// The revisions that it is about; those that are wrong, where it is known which are.
    pub revisions: Vec<String>,
    /// The same in words.
    pub words: String,
    /// Whether somebody should act on it.
    pub alarming: bool,
    /// Where it was reported before.
    pub sources: Vec<String>,
}

/// Kinds of [`Finding`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum FindingKind {
    /// Revisions hold the weights of the last step, or of `main`.
    EqualsFinal,
    /// Revisions hold the same weights, and nobody can say whose.
    Identical,
    /// Revisions that differ have a shard in common.
    SharedShard,
    /// `main` is not the last step.
    MainDiffers,
    /// A step that was published is not there.
    Missing,
    /// A revision is there and holds no weights.
    NoWeights,
    /// Something that others have reported and that hashes do not show.
    Known,
    /// Revisions are the same, and should be.
    Expected,
}

impl FindingKind {
    /// In one word, for tables and JSON.
    pub fn name(self) -> &'static str {
        match self {
            FindingKind::EqualsFinal => "equals-final",
            FindingKind::Identical => "identical",
            FindingKind::SharedShard => "shared-shard",
            FindingKind::MainDiffers => "main-differs",
            FindingKind::Missing => "missing",
            FindingKind::NoWeights => "no-weights",
            FindingKind::Known => "known",
            FindingKind::Expected => "expected",
        }
    }
}

/// Says which revisions of a model hold what: which are identical, which equal `main`, which are missing. `steps` are looked
/// at, and `main` with them.
///
/// Hashes tell it without a download: every commit lists those of its files. Where they cannot, because one revision is
/// safetensors and another a pickle, tensors are compared, read one by one until one differs.
///
/// # Errors
/// As [`crate::checkpoints`].
pub fn audit(model: &str, steps: &Steps, progress: &dyn Progress) -> Result<Audit> {
    crate::checkpoints(model)?.audit(steps, progress)
}

/// The forms that weights come in, in the order in which a loader looks for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Form {
    Safetensors,
    SafetensorsShards,
    Torch,
    TorchShards,
}

/// The form that a file is part of, by its name.
pub(crate) fn form_of(path: &str) -> Option<Form> {
    let (stem, kind) = path.rsplit_once('.').filter(|(stem, _)| !stem.contains('/'))?;
    match (kind, stem.contains("-of-")) {
        ("safetensors", true) => Some(Form::SafetensorsShards),
        ("safetensors", false) => Some(Form::Safetensors),
        ("bin", true) if stem.starts_with("pytorch_model-") => Some(Form::TorchShards),
        ("bin", false) if stem == "pytorch_model" => Some(Form::Torch),
        _ => None,
    }
}

/// A revision, its files, and what is the same.
struct Looked {
    checkpoint: Checkpoint,
    listing: Vec<Listed>,
    forms: BTreeMap<Form, Vec<Listed>>,
}

impl Looked {
    fn new(checkpoint: Checkpoint, listing: Vec<Listed>) -> Self {
        let mut forms: BTreeMap<Form, Vec<Listed>> = BTreeMap::new();
        for file in &listing {
            if let Some(form) = form_of(&file.path) {
                forms.entry(form).or_default().push(file.clone());
            }
        }
        Self { checkpoint, listing, forms }
    }

    fn name(&self) -> &str {
        &self.checkpoint.revision
    }

    /// What a loader takes.
    fn taken(&self) -> &[Listed] {
        self.forms.values().next().map_or(&[], Vec::as_slice)
    }

    /// Whether the weights are the same by their hashes; `None` if those cannot tell.
    fn same(&self, other: &Self) -> Option<bool> {
        let form = self.forms.keys().find(|form| other.forms.contains_key(form))?;
        let digests =
            |looked: &Self| looked.forms[form].iter().map(|file| file.digest.clone()).collect::<Option<Vec<_>>>();
        Some(digests(self)? == digests(other)?)
    }
}

/// Tensors of a revision, each known by the hash of its values.
struct Fingerprints {
    tensors: Tensors,
    /// Canonical name to name on file, buffers left out.
    names: BTreeMap<String, String>,
    known: BTreeMap<String, [u8; 32]>,
}

impl Fingerprints {
    fn new(tensors: Tensors, names: Names) -> Self {
        let weights = tensors.names().filter(|name| !names.is_buffer(name));
        let names = weights.map(|name| (names.canonical(name).into_owned(), name.to_owned())).collect();
        Self { tensors, names, known: BTreeMap::new() }
    }

    /// Of shape and values, whatever type they are stored as.
    fn of(&mut self, canonical: &str) -> Result<[u8; 32]> {
        if let Some(known) = self.known.get(canonical) {
            return Ok(*known);
        }
        let tensor = self.tensors.read(&self.names[canonical])?;
        let mut hash = Sha256::new();
        hash.update(format!("{:?}", tensor.dims()));
        for value in tensor.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()? {
            hash.update(value.to_bits().to_le_bytes());
        }
        let found = hash.finalize().into();
        self.known.insert(canonical.to_owned(), found);
        Ok(found)
    }
}

/// Bytes of tensors that two revisions on the Hub must agree in before they count as the same.
const ENOUGH: usize = 64 << 20;

impl Checkpoints {
    /// As [`audit`], for steps that have been listed.
    ///
    /// # Errors
    /// As [`audit`].
    pub fn audit(&self, steps: &Steps, progress: &dyn Progress) -> Result<Audit> {
        let mut chosen: Vec<Checkpoint> = self.select(steps)?.into_iter().cloned().collect();
        chosen.extend(self.main.clone());
        let listings = self.home.listings(&chosen, progress)?;
        let mut findings = Vec::new();
        let mut looked = Vec::new();
        let (mut missing, mut empty) = (Vec::new(), Vec::new());
        for (checkpoint, mut listing) in chosen.into_iter().zip(listings) {
            for file in listing.iter_mut().flatten().filter(|file| form_of(&file.path).is_some()) {
                self.home.hash(&checkpoint, file)?;
            }
            match listing.map(|listing| Looked::new(checkpoint.clone(), listing)) {
                None => missing.push(checkpoint.revision),
                Some(found) if found.forms.is_empty() => empty.push(checkpoint.revision),
                Some(found) => looked.push(found),
            }
        }
        let mut classes = Classes::new(looked.len());
        for a in 0..looked.len() {
            for b in 0..a {
                if looked[a].same(&looked[b]) == Some(true) {
                    classes.join(a, b);
                }
            }
        }
        let compared = self.compare_tensors(&looked, &mut classes, progress)?;
        let groups = classes.groups();
        for group in groups.iter().filter(|group| group.len() > 1) {
            let members: Vec<&Looked> = group.iter().map(|&i| &looked[i]).collect();
            let count = compared.iter().find(|((a, b), _)| group.contains(a) && group.contains(b));
            findings.push(self.verdict(&members, count.map(|(_, count)| *count)));
        }
        findings.extend(self.shared_shards(&looked, &mut classes));
        findings.extend(self.main_differs(&looked, &mut classes));
        let plain = |kind, revisions: Vec<String>, singular: &str, plural: &str| {
            let words = format!("{} {}", listed(&revisions), if revisions.len() == 1 { singular } else { plural });
            (!revisions.is_empty()).then(|| self.finding(kind, revisions, words, true))
        };
        findings.extend(plain(
            FindingKind::Missing,
            missing,
            "was published and is not there",
            "were published and are not there",
        ));
        findings.extend(plain(
            FindingKind::NoWeights,
            empty,
            "is there and holds no weights",
            "are there and hold no weights",
        ));
        findings.extend(self.known(&looked, &findings));
        findings.sort_by_key(|finding| (!finding.alarming, finding.kind));
        let audited = |looked: &Looked| Audited {
            revision: looked.name().into(),
            commit: looked.checkpoint.commit.clone(),
            weights: looked.taken().iter().map(|file| (file.path.clone(), file.digest.clone())).collect(),
        };
        let names = |group: &Vec<usize>| group.iter().map(|&i| looked[i].name().to_owned()).collect();
        Ok(Audit {
            model: self.model.clone(),
            identical: groups.iter().filter(|group| group.len() > 1).map(names).collect(),
            revisions: looked.iter().map(audited).collect(),
            findings,
        })
    }

    /// Joins what hashes cannot tell apart or together and has the same values. Gives, for each pair joined, in how many tensors
    /// of how many they were found equal.
    fn compare_tensors(
        &self,
        looked: &[Looked],
        classes: &mut Classes,
        progress: &dyn Progress,
    ) -> Result<BTreeMap<(usize, usize), (usize, usize)>> {
        let last = self.last().unwrap_or_default();
        let heads: Vec<usize> = classes.groups().iter().map(|group| group[0]).collect();
        let mut pairs = Vec::new();
        for (n, &a) in heads.iter().enumerate() {
            for &b in &heads[..n] {
                let (left, right) = (classes.members(a), classes.members(b));
                let told = left.iter().any(|&a| right.iter().any(|&b| looked[a].same(&looked[b]).is_some()));
                // Another header around the same tensors is another hash: between main and the last step it is worth a look.
                let both = |x: &[usize], name: &str| x.iter().any(|&i| looked[i].name() == name);
                let ends = (both(&left, "main") && both(&right, last)) || (both(&right, "main") && both(&left, last));
                if !told || ends {
                    pairs.push((a, b));
                }
            }
        }
        let mut prints: BTreeMap<usize, Fingerprints> = BTreeMap::new();
        let mut compared = BTreeMap::new();
        if pairs.is_empty() {
            return Ok(compared);
        }
        progress.begin("comparing tensors", pairs.len() as u64, "pairs");
        for (done, (a, b)) in pairs.into_iter().enumerate() {
            progress.update(done as u64);
            if progress.cancelled() {
                return Err(Error::Cancelled);
            }
            for i in [a, b] {
                if let std::collections::btree_map::Entry::Vacant(entry) = prints.entry(i) {
                    entry.insert(self.fingerprints(&looked[i])?);
                }
            }
            if let Some(count) = equal(&mut prints, a, b)? {
                classes.join(a, b);
                compared.insert((a.min(b), a.max(b)), count);
            }
        }
        progress.end();
        Ok(compared)
    }

    fn fingerprints(&self, looked: &Looked) -> Result<Fingerprints> {
        let config = self.home.small_file(&looked.checkpoint, &looked.listing, "config.json");
        let config: Option<Value> = config.and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let family = config.and_then(|config| Family::from_config(&config).ok());
        let names = family.map_or_else(Names::default, |family| family.names());
        Ok(Fingerprints::new(self.home.tensors(&looked.checkpoint, &looked.listing)?, names))
    }

    /// The last step that is there.
    fn last(&self) -> Option<&str> {
        let present = self.steps.iter().rfind(|checkpoint| checkpoint.present)?;
        Some(&present.revision)
    }

    fn finding(&self, kind: FindingKind, revisions: Vec<String>, words: String, alarming: bool) -> Finding {
        let known = revisions.iter().filter_map(|revision| Some(self.card?.known_of(revision))).flatten();
        let sources: BTreeSet<String> = known.map(|known| known.source.clone()).collect();
        Finding { kind, revisions, words, alarming, sources: sources.into_iter().collect() }
    }

    /// What it means that these are the same.
    fn verdict(&self, members: &[&Looked], compared: Option<(usize, usize)>) -> Finding {
        let names: Vec<String> = members.iter().map(|looked| looked.name().to_owned()).collect();
        let last = self.last().unwrap_or_default();
        let is_end = |name: &String| name == "main" || name == last;
        let (ends, others): (Vec<String>, Vec<String>) = names.iter().cloned().partition(is_end);
        let steps: Vec<Option<u64>> = members.iter().map(|looked| looked.checkpoint.step).collect();
        let how = match compared {
            Some((equal, total)) if equal == total => {
                format!(" (their files differ; all {total} tensors are equal)")
            }
            Some((equal, total)) => {
                format!(" (their files differ; {equal} of {total} tensors were compared and are equal)")
            }
            None => String::new(),
        };
        if others.is_empty() {
            let words = format!("{} hold the same weights{how}, as they should: main is the last step", listed(&ends));
            return self.finding(FindingKind::Expected, names, words, false);
        }
        if steps == [Some(0), Some(1)] {
            let words = format!(
                "step0 and step1 hold the same weights{how}: expected where the first step has a learning rate of 0, as in Pythia"
            );
            return self.finding(FindingKind::Expected, names, words, false);
        }
        // Another form of the same revisions may be right though the one that is loaded is not.
        let differing = members[0].forms.keys().skip(1).find(|form| {
            let digests = members
                .iter()
                .map(|looked| Some(looked.forms.get(form)?.iter().map(|f| f.digest.clone()).collect::<Vec<_>>()));
            let distinct: BTreeSet<Option<Vec<Option<Digest>>>> = digests.collect();
            !distinct.contains(&None) && distinct.len() > 1
        });
        let rescue = differing.map_or(String::new(), |form| {
            let file = &members[0].forms[form][0].path;
            format!("; their {file} differ, so those may be right")
        });
        if ends.is_empty() {
            let words =
                format!("{} hold the same weights{how}: at most one is what its name says{rescue}", listed(&others));
            return self.finding(FindingKind::Identical, others, words, true);
        }
        let (holds, are) = if others.len() == 1 {
            ("holds", "it is not what its name says")
        } else {
            ("hold", "they are not what their names say")
        };
        let of = match &ends[..] {
            [one] if one == "main" => "main".to_owned(),
            [one] => format!("{one}, the last step"),
            _ => format!("{last}, the last step, which main has too"),
        };
        let words = format!("{} {holds} the weights of {of}{how}: {are}{rescue}", listed(&others));
        self.finding(FindingKind::EqualsFinal, others, words, true)
    }

    /// Shards that revisions share which are otherwise different.
    fn shared_shards(&self, looked: &[Looked], classes: &mut Classes) -> Vec<Finding> {
        let mut holders: BTreeMap<(&str, &Digest), Vec<usize>> = BTreeMap::new();
        for (i, one) in looked.iter().enumerate() {
            for file in one.taken().iter().filter(|_| one.taken().len() > 1) {
                if let Some(digest) = &file.digest {
                    holders.entry((&file.path, digest)).or_default().push(i);
                }
            }
        }
        // One finding for a set of revisions, however many shards it shares.
        let mut shared: BTreeMap<Vec<usize>, Vec<&str>> = BTreeMap::new();
        for ((path, _), who) in holders {
            let distinct: BTreeSet<usize> = who.iter().map(|&i| classes.head(i)).collect();
            if distinct.len() > 1 {
                shared.entry(who).or_default().push(path);
            }
        }
        let last = self.last().unwrap_or_default().to_owned();
        let finding = |(who, paths): (Vec<usize>, Vec<&str>)| {
            let names: Vec<String> = who.iter().map(|&i| looked[i].name().to_owned()).collect();
            let (ends, others): (Vec<String>, Vec<String>) =
                names.iter().cloned().partition(|name| name == "main" || *name == last);
            let (revisions, words) = if ends.is_empty() || others.is_empty() {
                let words =
                    format!("{} have {} in common, though they differ otherwise", listed(&names), paths.join(", "));
                (names, words)
            } else {
                let has = if others.len() == 1 { "has" } else { "have" };
                let words = format!(
                    "{} {has} {} of {}, and the other shards of another step",
                    listed(&others),
                    paths.join(", "),
                    listed(&ends)
                );
                (others, words)
            };
            self.finding(FindingKind::SharedShard, revisions, words, true)
        };
        shared.into_iter().map(finding).collect()
    }

    fn main_differs(&self, looked: &[Looked], classes: &mut Classes) -> Option<Finding> {
        let last = self.last()?;
        let find = |name: &str| looked.iter().position(|looked| looked.name() == name);
        let (main, end) = (find("main")?, find(last)?);
        (classes.head(main) != classes.head(end)).then(|| {
            let words = format!("main is not {last}, the last step: their weights differ");
            self.finding(FindingKind::MainDiffers, vec![last.to_owned()], words, true)
        })
    }

    /// What the card knows and the findings so far do not show.
    fn known(&self, looked: &[Looked], findings: &[Finding]) -> Vec<Finding> {
        let told: BTreeSet<(&str, &str)> = findings
            .iter()
            .flat_map(|finding| {
                finding.revisions.iter().flat_map(|r| finding.sources.iter().map(|s| (r.as_str(), s.as_str())))
            })
            .collect();
        let mut by_fact: BTreeMap<(&str, &str), (KnownKind, Vec<String>)> = BTreeMap::new();
        for revision in looked.iter().map(Looked::name) {
            for known in self.card.map(|card| card.known_of(revision)).unwrap_or_default() {
                if !told.contains(&(revision, known.source.as_str())) {
                    let entry = by_fact.entry((&known.what, &known.source)).or_insert((known.kind, Vec::new()));
                    entry.1.push(revision.to_owned());
                }
            }
        }
        let finding = |((what, source), (kind, revisions)): ((&str, &str), (KnownKind, Vec<String>))| Finding {
            kind: FindingKind::Known,
            words: format!("it is reported that {}: {what}", listed(&revisions)),
            revisions,
            alarming: matches!(kind, KnownKind::Wrong | KnownKind::Suspect),
            sources: vec![source.to_owned()],
        };
        by_fact.into_iter().map(finding).collect()
    }
}

/// How many tensors of how many are equal, if none is found that is not.
fn equal(prints: &mut BTreeMap<usize, Fingerprints>, a: usize, b: usize) -> Result<Option<(usize, usize)>> {
    let mut names: Vec<String> = prints[&a].names.keys().cloned().collect();
    if !prints[&b].names.keys().eq(names.iter()) {
        return Ok(None);
    }
    // Norms and biases are small and move with every step: whatever differs mostly differs there.
    let is_bias = |name: &str| name.rsplit('.').next() == Some("bias");
    names.sort_by_key(|name| (!is_bias(name), !name.contains("norm"), std::cmp::Reverse(name.clone())));
    let total = names.len();
    let is_local = prints[&a].tensors.is_local() && prints[&b].tensors.is_local();
    let mut read = 0;
    for (n, name) in names.iter().enumerate() {
        if read > ENOUGH && !is_local {
            return Ok(Some((n, total)));
        }
        let mut print = |i: usize| match prints.get_mut(&i) {
            Some(prints) => prints.of(name),
            None => Err(Error::Input("a revision was not opened".into())),
        };
        if print(a)? != print(b)? {
            return Ok(None);
        }
        let entry = prints[&a].tensors.entry(&prints[&a].names[name])?;
        read += entry.elements() * entry.dtype.size();
    }
    Ok(Some((total, total)))
}

/// Sets of things that are the same.
struct Classes(Vec<usize>);

impl Classes {
    fn new(n: usize) -> Self {
        Self((0..n).collect())
    }

    fn head(&mut self, i: usize) -> usize {
        if self.0[i] != i {
            self.0[i] = self.head(self.0[i]);
        }
        self.0[i]
    }

    fn join(&mut self, a: usize, b: usize) {
        let (a, b) = (self.head(a), self.head(b));
        self.0[a.max(b)] = a.min(b);
    }

    fn members(&mut self, i: usize) -> Vec<usize> {
        let head = self.head(i);
        (0..self.0.len()).filter(|&other| self.head(other) == head).collect()
    }

    fn groups(&mut self) -> Vec<Vec<usize>> {
        let mut groups: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for i in 0..self.0.len() {
            groups.entry(self.head(i)).or_default().push(i);
        }
        groups.into_values().collect()
    }
}

/// Names in a sentence; of many the first, the last and their number.
fn listed(names: &[String]) -> String {
    match names {
        [] => "nothing".into(),
        [one] => one.clone(),
        [first @ .., last] if names.len() <= 8 => format!("{} and {last}", first.join(", ")),
        [a, b, c, .., last] => format!("{a}, {b}, {c}, ... {last} ({} in all)", names.len()),
        _ => names.join(", "),
    }
}

impl Audit {
    /// Whether somebody should act on something.
    pub fn is_alarming(&self) -> bool {
        self.findings.iter().any(|finding| finding.alarming)
    }

    /// As JSON.
    pub fn to_json(&self) -> Value {
        let revision = |audited: &Audited| {
            let files: Vec<Value> = audited
                .weights
                .iter()
                .map(|(path, digest)| json!({ "path": path, "digest": digest.as_ref().map(Digest::hex) }))
                .collect();
            json!({ "revision": audited.revision, "commit": audited.commit, "weights": files })
        };
        let finding = |finding: &Finding| {
            json!({
                "kind": finding.kind.name(), "revisions": finding.revisions, "words": finding.words,
                "alarming": finding.alarming, "sources": finding.sources,
            })
        };
        json!({
            "model": self.model,
            "revisions": self.revisions.iter().map(revision).collect::<Vec<_>>(),
            "identical": self.identical,
            "findings": self.findings.iter().map(finding).collect::<Vec<_>>(),
        })
    }
}
