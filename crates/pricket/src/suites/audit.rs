//! Audits of training steps: which revisions hold identical weights, are missing, or do not match their names.

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

/// Result of an audit.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Audit {
    /// The model.
    pub model: String,
    /// All audited revisions: training steps ascending, then `main`.
    pub revisions: Vec<Audited>,
    /// Sets of two or more revisions that hold the same weights.
    pub identical: Vec<Vec<String>>,
    /// Findings, alarming ones first.
    pub findings: Vec<Finding>,
}

/// An audited revision.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Audited {
    /// Name of the revision.
    pub revision: String,
    /// Commit of the revision.
    pub commit: Option<String>,
    /// Weight files that a loader takes, with their hashes.
    pub weights: Vec<(String, Option<Digest>)>,
}

/// A finding of an audit.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Finding {
    /// Kind of the finding.
    pub kind: FindingKind,
    /// The revisions concerned; only the wrong ones, if it is known which are wrong.
    pub revisions: Vec<String>,
    /// Description of the finding.
    pub words: String,
    /// Whether the finding needs attention.
    pub alarming: bool,
    /// Earlier reports of the problem.
    pub sources: Vec<String>,
}

/// Kinds of [`Finding`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum FindingKind {
    /// Revisions hold the weights of the last training step or of `main`.
    EqualsFinal,
    /// Revisions hold the same weights, and it is unknown to which of them the weights belong.
    Identical,
    /// Revisions with different weights share a shard.
    SharedShard,
    /// The weights of `main` differ from those of the last training step.
    MainDiffers,
    /// The forms (safetensors, PyTorch) of one revision hold different weights.
    FormsDiffer,
    /// A published training step does not exist.
    Missing,
    /// A revision exists but has no weights.
    NoWeights,
    /// A revision could not be read.
    Unreadable,
    /// The audit used the cache only, and the cache has no weights of the revision.
    NotCached,
    /// A problem that others reported and that the audit did not find.
    Known,
    /// Revisions hold the same weights, as expected.
    Expected,
}

impl FindingKind {
    /// Returns the name of the kind in tables and JSON.
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

/// Options of an audit.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct AuditOptions {
    /// Whether to compare the tensors of all revisions whose files differ, in case only their headers differ. Needs a
    /// few requests per revision on the Hub. Local files are always compared this way. False by default.
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

/// Audits the training steps `steps` of a model, and `main`. Finds revisions that are identical, equal to `main`, or
/// missing.
///
/// Usually this needs no download, because every commit lists the hashes of its files. If hashes cannot be compared,
/// for example between safetensors and pickle files, tensors are read one by one until one differs. A revision that
/// cannot be read gives a finding, not an error.
///
/// # Errors
/// Returns the errors of [`crate::checkpoints`].
pub fn audit(model: impl Into<Source>, steps: &Steps, progress: &dyn Progress) -> Result<Audit> {
    crate::suites::checkpoints::checkpoints(model)?.audit(steps, AuditOptions::default(), progress)
}

/// A revision under audit, with its files.
struct Looked {
    checkpoint: Checkpoint,
    listing: Vec<Listed>,
    forms: BTreeMap<Form, Vec<Listed>>,
    /// Forms whose weights are known to equal those of the loaded form.
    agreeing: BTreeSet<Form>,
}

impl Looked {
    fn name(&self) -> &str {
        &self.checkpoint.revision
    }

    fn form(&self) -> Form {
        // Revisions without weights are never in this list, so the default is not used.
        *self.forms.keys().next().unwrap_or(&Form::Safetensors)
    }

    /// Returns the weight files that a loader takes.
    fn taken(&self) -> &[Listed] {
        self.forms.get(&self.form()).map_or(&[], Vec::as_slice)
    }

    fn digests(&self, form: Form) -> Option<Vec<&Digest>> {
        self.forms.get(&form)?.iter().map(|file| file.digest.as_ref()).collect()
    }

    /// Returns whether equal weights would be equal in the files. A GGUF file may be quantized and has its rows in
    /// another order than safetensors, so it is compared with GGUF files only.
    fn is_comparable(&self, other: &Self) -> bool {
        (self.form() == Form::Container) == (other.form() == Form::Container)
    }

    /// Returns whether the files have the same hashes; `None` if hashes cannot be compared.
    fn same_files(&self, other: &Self) -> Option<bool> {
        let form = self.agreeing.iter().find(|form| other.agreeing.contains(form))?;
        Some(self.digests(*form)? == other.digests(*form)?)
    }
}

/// State of one audit.
struct Auditor<'a> {
    of: &'a Checkpoints,
    looked: Vec<Looked>,
    classes: Classes,
    /// For revisions found equal by tensors: numbers of compared tensors and of all tensors.
    compared: BTreeMap<usize, (usize, usize)>,
    findings: Vec<Finding>,
}

impl Checkpoints {
    /// Audits listed training steps; see [`audit`].
    ///
    /// # Errors
    /// Returns the errors of [`Checkpoints::select`] and [`Error::Cancelled`].
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

    /// Lists the files of every revision.
    fn look(&mut self, chosen: Vec<Checkpoint>, progress: &dyn Progress) -> Result<()> {
        let listings = self.of.home.listings(&chosen, progress)?;
        let hashing = Task::begin(progress, "computing hashes", chosen.len(), "revisions");
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
            // Placeholders of files that were not downloaded say nothing about the weights.
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
                        format!("{revision} exists but has no weights"),
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
        // If no revision could be listed, the audit fails.
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
        let words = known.map_or("was published but does not exist", |known| &known.what);
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

/// Sets of equal revisions (union-find).
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
    /// Returns whether a finding needs attention.
    pub fn is_alarming(&self) -> bool {
        self.findings.iter().any(|finding| finding.alarming)
    }

    /// Returns the audit as JSON.
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
