mod compare;
mod judge;

use std::collections::{BTreeMap, BTreeSet};

use pricket_hub::{Digest, Listed, Steps};
use pricket_nn::Progress;
use serde_json::{Value, json};

use crate::loading::forms::{Form, forms};
use crate::loading::source::Source;
use crate::suites::cards::KnownKind;
use crate::suites::checkpoints::{Checkpoint, Checkpoints};
use crate::task::Task;
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
    /// The forms of one revision hold different weights.
    FormsDiffer,
    /// A step that was published is not there.
    Missing,
    /// A revision is there and holds no weights.
    NoWeights,
    /// A revision could not be looked into.
    Unreadable,
    /// The cache, which was all there was to ask, has no weights of it.
    NotCached,
    /// Something that others have reported and that hashes do not show.
    Known,
    /// Revisions are the same, and should be.
    Expected,
}

impl FindingKind {
    /// In a word or two, for tables and JSON.
    pub fn name(self) -> &'static str {
        match self {
            FindingKind::EqualsFinal => "equals-final",
            FindingKind::Identical => "identical",
            FindingKind::SharedShard => "shared-shard",
            FindingKind::MainDiffers => "main-differs",
            FindingKind::FormsDiffer => "forms-differ",
            FindingKind::Missing => "missing",
            FindingKind::NoWeights => "no-weights",
            FindingKind::Unreadable => "unreadable",
            FindingKind::NotCached => "not-cached",
            FindingKind::Known => "known",
            FindingKind::Expected => "expected",
        }
    }
}

/// How closely to look.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct AuditOptions {
    /// Compares the tensors of all revisions whose files differ, in case only headers do. Costs some requests for each
    /// revision on the Hub; of files on disk it is always done.
    pub deep: bool,
}

impl AuditOptions {
    /// Sets [`AuditOptions::deep`].
    #[must_use]
    pub fn deep(mut self, deep: bool) -> Self {
        self.deep = deep;
        self
    }
}

/// Says which revisions of a model hold what: which are identical, which equal `main`, which are missing. `steps` are looked
/// at, and `main` with them.
///
/// Hashes tell it without a download: every commit lists those of its files. Where they cannot, because one revision is
/// safetensors and another a pickle, tensors are compared, read one by one until one differs. A revision that cannot be read
/// is a finding like others.
///
/// # Errors
/// As [`crate::checkpoints`].
pub fn audit(model: impl Into<Source>, steps: &Steps, progress: &dyn Progress) -> Result<Audit> {
    crate::suites::checkpoints::checkpoints(model)?.audit(steps, AuditOptions::default(), progress)
}

/// A revision and its files.
struct Looked {
    checkpoint: Checkpoint,
    listing: Vec<Listed>,
    forms: BTreeMap<Form, Vec<Listed>>,
    /// Forms that are known to hold what the form that is taken holds.
    agreeing: BTreeSet<Form>,
}

impl Looked {
    fn name(&self) -> &str {
        &self.checkpoint.revision
    }

    fn form(&self) -> Form {
        // A revision without weights is not looked at.
        *self.forms.keys().next().unwrap_or(&Form::Safetensors)
    }

    /// What a loader takes.
    fn taken(&self) -> &[Listed] {
        self.forms.get(&self.form()).map_or(&[], Vec::as_slice)
    }

    fn digests(&self, form: Form) -> Option<Vec<&Digest>> {
        self.forms.get(&form)?.iter().map(|file| file.digest.as_ref()).collect()
    }

    /// Whether the files are the same by their hashes; `None` if those cannot tell.
    fn same_files(&self, other: &Self) -> Option<bool> {
        let form = self.agreeing.iter().find(|form| other.agreeing.contains(form))?;
        Some(self.digests(*form)? == other.digests(*form)?)
    }
}

/// The work of one audit.
struct Auditor<'a> {
    of: &'a Checkpoints,
    looked: Vec<Looked>,
    classes: Classes,
    /// For revisions joined by their tensors, how many of how many were compared.
    compared: BTreeMap<usize, (usize, usize)>,
    findings: Vec<Finding>,
}

impl Checkpoints {
    /// As [`audit`], for steps that have been listed.
    ///
    /// # Errors
    /// As [`audit`].
    pub fn audit(&self, steps: &Steps, options: AuditOptions, progress: &dyn Progress) -> Result<Audit> {
        let mut chosen: Vec<Checkpoint> = self.select(steps)?.into_iter().cloned().collect();
        chosen.extend(self.main.clone().filter(|main| chosen.iter().all(|other| other.revision != main.revision)));
        let mut auditor = Auditor {
            of: self,
            looked: Vec::new(),
            classes: Classes::new(0),
            compared: BTreeMap::new(),
            findings: Vec::new(),
        };
        auditor.look(chosen, progress)?;
        auditor.join_by_files();
        auditor.join_by_tensors(options, progress)?;
        Ok(auditor.conclude())
    }
}

impl Auditor<'_> {
    fn say(&mut self, kind: FindingKind, revisions: Vec<String>, words: String, alarming: bool) {
        let matters = |known: &KnownKind| match kind {
            FindingKind::Missing | FindingKind::NoWeights => *known == KnownKind::Missing,
            FindingKind::Expected => *known == KnownKind::Odd,
            _ => matches!(known, KnownKind::Wrong | KnownKind::Suspect),
        };
        let card = self.of.card;
        let known = revisions.iter().filter_map(|revision| Some(card?.known_of(revision))).flatten();
        let sources: BTreeSet<String> =
            known.filter(|known| matters(&known.kind)).map(|known| known.source.clone()).collect();
        self.findings.push(Finding { kind, revisions, words, alarming, sources: sources.into_iter().collect() });
    }

    /// Lists every revision.
    fn look(&mut self, chosen: Vec<Checkpoint>, progress: &dyn Progress) -> Result<()> {
        let listings = self.of.home.listings(&chosen, progress)?;
        let hashing = Task::begin(progress, "taking hashes", chosen.len(), "revisions");
        let mut failed = Vec::new();
        for (done, (checkpoint, listing)) in chosen.into_iter().zip(listings).enumerate() {
            hashing.update(done);
            let revision = checkpoint.revision.clone();
            let mut listing = match listing {
                Ok(Some(listing)) => listing,
                Ok(None) => {
                    self.missing(&revision);
                    continue;
                }
                Err(Error::Cancelled) => return Err(Error::Cancelled),
                Err(e) => {
                    failed.push((revision, e));
                    continue;
                }
            };
            if progress.cancelled() {
                return Err(Error::Cancelled);
            }
            let files: BTreeSet<String> = forms(&listing.files).into_values().flatten().map(|file| file.path).collect();
            let mut stand_in = None;
            for file in listing.files.iter_mut().filter(|file| files.contains(&file.path)) {
                stand_in = stand_in.or(self.of.home.stand_in(&checkpoint, file));
                self.of.home.hash(&checkpoint, file)?;
            }
            // Pointers to files that are not here may be equal, or differ, for any reason.
            if let Some(what) = stand_in {
                self.say(FindingKind::Unreadable, vec![revision.clone()], format!("{revision}: {what}"), true);
                continue;
            }
            let forms = forms(&listing.files);
            let Some(&form) = forms.keys().next() else {
                if listing.is_complete {
                    self.say(
                        FindingKind::NoWeights,
                        vec![revision.clone()],
                        format!("{revision} is there and holds no weights"),
                        true,
                    );
                } else {
                    self.say(
                        FindingKind::NotCached,
                        vec![revision.clone()],
                        format!("{revision}: its weights are not in the cache"),
                        false,
                    );
                }
                continue;
            };
            self.looked.push(Looked { checkpoint, forms, listing: listing.files, agreeing: BTreeSet::from([form]) });
        }
        // If nothing could be listed, that is no audit.
        if self.looked.is_empty() && !failed.is_empty() {
            return Err(failed.swap_remove(0).1);
        }
        for (revision, e) in failed {
            let kind = if matches!(e, Error::Offline(_)) { FindingKind::NotCached } else { FindingKind::Unreadable };
            self.say(kind, vec![revision.clone()], format!("{revision}: {e}"), false);
        }
        self.classes = Classes::new(self.looked.len());
        Ok(())
    }

    fn missing(&mut self, revision: &str) {
        let known = self.of.card.map(|card| card.known_of(revision)).unwrap_or_default();
        let known = known.into_iter().find(|known| known.kind == KnownKind::Missing);
        let words = known.map_or("was published and is not there", |known| &known.what);
        self.say(FindingKind::Missing, vec![revision.to_owned()], format!("{revision} {words}"), known.is_none());
    }

    fn join_by_files(&mut self) {
        for a in 0..self.looked.len() {
            for b in 0..a {
                if self.looked[a].same_files(&self.looked[b]) == Some(true) {
                    self.classes.join(a, b);
                }
            }
        }
    }

    fn position(&self, name: &str) -> Option<usize> {
        self.looked.iter().position(|looked| looked.name() == name)
    }
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
