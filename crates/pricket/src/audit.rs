use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use candle_core::DType;
use pricket_hub::{Digest, Listed, Steps};
use pricket_nn::{Names, Progress};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::cards::KnownKind;
use crate::checkpoints::{Checkpoint, Checkpoints};
use crate::family::Family;
use crate::forms::{Form, forms, only};
use crate::remote::Tensors;
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
pub fn audit(model: &str, steps: &Steps, progress: &dyn Progress) -> Result<Audit> {
    crate::checkpoints(model)?.audit(steps, AuditOptions::default(), progress)
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

/// Tensors of a revision, each known by the hash of its values.
struct Fingerprints {
    tensors: Tensors,
    /// Canonical name to name on file, buffers left out.
    names: BTreeMap<String, String>,
    known: BTreeMap<String, [u8; 32]>,
}

impl Fingerprints {
    /// Of shape and values, whatever type they are stored as. Zero has one sign.
    fn of(&mut self, canonical: &str) -> Result<[u8; 32]> {
        if let Some(known) = self.known.get(canonical) {
            return Ok(*known);
        }
        let tensor = self.tensors.read(&self.names[canonical])?;
        let mut hash = Sha256::new();
        hash.update(format!("{:?}", tensor.dims()));
        for value in tensor.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()? {
            hash.update((value + 0.0).to_bits().to_le_bytes());
        }
        let found = hash.finalize().into();
        self.known.insert(canonical.to_owned(), found);
        Ok(found)
    }

    fn bytes(&self, canonical: &str) -> Result<usize> {
        let entry = self.tensors.entry(&self.names[canonical])?;
        Ok(entry.elements() * entry.dtype.size())
    }
}

/// How two revisions compare, tensor by tensor.
enum Compared {
    /// All that were compared are equal: so many of so many.
    Equal(usize, usize),
    Different,
    /// Their tensors have too few names in common.
    Unlike,
}

/// Bytes of tensors that two revisions on the Hub must agree in before they count as the same.
const ENOUGH: usize = 64 << 20;

/// Compares two revisions until a tensor differs.
fn compare(a: &mut Fingerprints, b: &mut Fingerprints) -> Result<Compared> {
    let mut names: Vec<String> = a.names.keys().filter(|name| b.names.contains_key(*name)).cloned().collect();
    // A tied head is a tensor in one form and none in another; more than that is another model.
    let apart = a.names.len().max(b.names.len()) - names.len();
    if names.is_empty() || apart > 1 {
        return Ok(Compared::Unlike);
    }
    // Norms and biases are small and move with every step: whatever differs mostly differs there.
    let is_bias = |name: &str| name.rsplit('.').next() == Some("bias");
    names.sort_by_key(|name| (!is_bias(name), !name.contains("norm"), std::cmp::Reverse(name.clone())));
    let is_local = a.tensors.is_local() && b.tensors.is_local();
    let mut read = 0;
    for (n, name) in names.iter().enumerate() {
        if read > ENOUGH && !is_local {
            return Ok(Compared::Equal(n, names.len()));
        }
        if a.of(name)? != b.of(name)? {
            return Ok(Compared::Different);
        }
        read += a.bytes(name)?;
    }
    Ok(Compared::Equal(names.len(), names.len()))
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
        chosen.extend(self.main.clone());
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
            for file in listing.files.iter_mut().filter(|file| files.contains(&file.path)) {
                self.of.home.hash(&checkpoint, file)?;
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

    /// The last step of the suite, where there can be no doubt which that is.
    fn last(&mut self) -> Option<String> {
        let of = self.of;
        if let Some(pattern) = of.card.and_then(|card| card.checkpoints.as_ref()) {
            let last = pattern.branch(pattern.steps().into_iter().max()?);
            return of.steps.iter().find(|checkpoint| checkpoint.present && checkpoint.revision == last).map(|_| last);
        }
        let last = of.steps.iter().rfind(|checkpoint| checkpoint.present)?.revision.clone();
        if of.home.is_partial() {
            // The last that the cache has seen is the last if main agrees.
            let (main, end) = (self.position("main")?, self.position(&last)?);
            return (self.classes.head(main) == self.classes.head(end)).then_some(last);
        }
        Some(last)
    }

    /// Joins what hashes cannot tell apart or together and has the same values.
    fn join_by_tensors(&mut self, options: AuditOptions, progress: &dyn Progress) -> Result<()> {
        let mut prints: BTreeMap<(usize, Form), Option<Fingerprints>> = BTreeMap::new();
        self.compare_mains_forms(&mut prints)?;
        self.join_by_files();
        let last =
            self.of.steps.iter().rfind(|checkpoint| checkpoint.present).map(|checkpoint| checkpoint.revision.clone());
        let heads: Vec<usize> = self.classes.groups().iter().map(|group| group[0]).collect();
        let members: BTreeMap<usize, Vec<usize>> =
            heads.iter().map(|&head| (head, self.classes.members(head))).collect();
        let has = |head: usize, name: &str| members[&head].iter().any(|&i| self.looked[i].name() == name);
        let closely = options.deep || self.of.home.is_local();
        let mut pairs = Vec::new();
        for (n, &b) in heads.iter().enumerate() {
            for &a in &heads[..n] {
                let told = members[&a]
                    .iter()
                    .any(|&a| members[&b].iter().any(|&b| self.looked[a].same_files(&self.looked[b]).is_some()));
                // Another header around the same tensors is another hash: between main and the last step it is worth a look.
                let ends = last
                    .as_deref()
                    .is_some_and(|last| (has(a, "main") && has(b, last)) || (has(a, last) && has(b, "main")));
                if !told || ends || closely {
                    pairs.push((a, b));
                }
            }
        }
        if pairs.is_empty() {
            return Ok(());
        }
        let task = Task::begin(progress, "comparing tensors", pairs.len(), "pairs");
        for (done, (a, b)) in pairs.into_iter().enumerate() {
            task.update(done);
            if progress.cancelled() {
                return Err(Error::Cancelled);
            }
            if self.classes.head(a) == self.classes.head(b) {
                continue;
            }
            let (left, right) = ((a, self.looked[a].form()), (b, self.looked[b].form()));
            if let Some(Compared::Equal(equal, total)) = self.compare(&mut prints, left, right)? {
                self.classes.join(a, b);
                self.compared.insert(a, (equal, total));
                self.compared.insert(b, (equal, total));
            }
        }
        Ok(())
    }

    /// Whether the forms of main hold the same, if the steps come in another form than a loader takes of main: then that
    /// other form of main can be compared with theirs by hash.
    fn compare_mains_forms(&mut self, prints: &mut BTreeMap<(usize, Form), Option<Fingerprints>>) -> Result<()> {
        let Some(main) = self.position("main") else { return Ok(()) };
        let taken = self.looked[main].form();
        let others: BTreeSet<Form> = self.looked.iter().map(Looked::form).filter(|form| *form != taken).collect();
        for form in others.into_iter().filter(|form| self.looked[main].forms.contains_key(form)).collect::<Vec<_>>() {
            match self.compare(prints, (main, taken), (main, form))? {
                Some(Compared::Equal(..)) => {
                    self.looked[main].agreeing.insert(form);
                }
                Some(Compared::Different) => {
                    let file = |form| self.looked[main].forms[&form][0].path.clone();
                    let words = format!("main: {} and {} hold different weights", file(taken), file(form));
                    self.say(FindingKind::FormsDiffer, vec!["main".into()], words, true);
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// `None` if one of them cannot be read, which is a finding.
    fn compare(
        &mut self,
        prints: &mut BTreeMap<(usize, Form), Option<Fingerprints>>,
        a: (usize, Form),
        b: (usize, Form),
    ) -> Result<Option<Compared>> {
        for which in [a, b] {
            if let Entry::Vacant(entry) = prints.entry(which) {
                let opened = self.fingerprints(which);
                entry.insert(self.readable(which.0, opened)?);
            }
        }
        // Taken out to be read from, two at a time; what could not be opened stays known as that.
        let (left, right) = (prints.remove(&a).flatten(), prints.remove(&b).flatten());
        let (mut left, mut right) = match (left, right) {
            (Some(left), Some(right)) => (left, right),
            (left, right) => {
                prints.insert(a, left);
                prints.insert(b, right);
                return Ok(None);
            }
        };
        let compared = compare(&mut left, &mut right);
        prints.insert(a, Some(left));
        prints.insert(b, Some(right));
        match compared {
            Ok(compared) => Ok(Some(compared)),
            Err(e) => {
                // A step, rather than main, which is compared with all of them.
                let which = if self.looked[a.0].name() == "main" { b } else { a };
                prints.insert(which, None);
                self.readable(which.0, Err::<(), _>(e)).map(|_| None)
            }
        }
    }

    /// What was read, or a finding that it could not be.
    fn readable<T>(&mut self, i: usize, read: Result<T>) -> Result<Option<T>> {
        match read {
            Ok(read) => Ok(Some(read)),
            Err(Error::Cancelled) => Err(Error::Cancelled),
            Err(e) => {
                let name = self.looked[i].name().to_owned();
                let damaged = !matches!(e, Error::Io { .. } | Error::Hub(_) | Error::Offline(_));
                self.say(FindingKind::Unreadable, vec![name.clone()], format!("{name} cannot be read: {e}"), damaged);
                Ok(None)
            }
        }
    }

    fn fingerprints(&self, (i, form): (usize, Form)) -> Result<Fingerprints> {
        let looked = &self.looked[i];
        let config = self.of.home.small_file(&looked.checkpoint, &looked.listing, "config.json")?;
        let config: Option<Value> = config.and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let family = config.and_then(|config| Family::from_config(&config).ok());
        let spelling = family.map_or_else(Names::default, |family| family.names());
        let tensors = self.of.home.tensors(&looked.checkpoint, &only(form, &looked.listing))?;
        let weights = tensors.names().filter(|name| !spelling.is_buffer(name));
        let names = weights.map(|name| (spelling.canonical(name).into_owned(), name.to_owned())).collect();
        Ok(Fingerprints { tensors, names, known: BTreeMap::new() })
    }

    fn conclude(mut self) -> Audit {
        let last = self.last();
        let groups: Vec<Vec<usize>> = self.classes.groups().into_iter().filter(|group| group.len() > 1).collect();
        for group in &groups {
            self.judge(group, last.as_deref());
        }
        self.judge_shards(last.as_deref());
        if let Some(end) = &last
            && let (Some(main), Some(at)) = (self.position("main"), self.position(end))
            && self.classes.head(main) != self.classes.head(at)
        {
            let words = format!("main is not {end}, the last step: their weights differ");
            self.say(FindingKind::MainDiffers, vec![end.clone()], words, true);
        }
        self.judge_known();
        self.findings.sort_by_key(|finding| (!finding.alarming, finding.kind));
        merge(&mut self.findings);
        let audited = |looked: &Looked| Audited {
            revision: looked.name().into(),
            commit: looked.checkpoint.commit.clone(),
            weights: looked.taken().iter().map(|file| (file.path.clone(), file.digest.clone())).collect(),
        };
        let names = |group: &Vec<usize>| group.iter().map(|&i| self.looked[i].name().to_owned()).collect();
        Audit {
            model: self.of.model.clone(),
            identical: groups.iter().map(names).collect(),
            revisions: self.looked.iter().map(audited).collect(),
            findings: self.findings,
        }
    }

    /// What it means that these are the same.
    fn judge(&mut self, group: &[usize], last: Option<&str>) {
        let names: Vec<String> = group.iter().map(|&i| self.looked[i].name().to_owned()).collect();
        let how = match group.iter().find_map(|i| self.compared.get(i)) {
            Some((equal, total)) if equal == total => {
                format!(" (compared tensor by tensor where files differ: all {total} are equal)")
            }
            Some((equal, total)) => {
                format!(" (compared tensor by tensor where files differ: {equal} of {total} were read and are equal)")
            }
            None => String::new(),
        };
        let main_is_elsewhere = last.is_some_and(|last| {
            let (main, end) = (self.position("main"), self.position(last));
            matches!((main, end), (Some(main), Some(end)) if self.classes.head(main) != self.classes.head(end))
        });
        let is_end = |name: &String| name == "main" || Some(name.as_str()) == last;
        let (ends, others): (Vec<String>, Vec<String>) = names.iter().cloned().partition(is_end);
        if others.is_empty() {
            let words = format!("{} hold the same weights{how}, as they should: main is the last step", listed(&ends));
            return self.say(FindingKind::Expected, names, words, false);
        }
        let steps: Vec<Option<u64>> = group.iter().map(|&i| self.looked[i].checkpoint.step).collect();
        if steps == [Some(0), Some(1)] {
            let words = format!(
                "step0 and step1 hold the same weights{how}: expected where the first step has a learning rate of 0, as in Pythia"
            );
            return self.say(FindingKind::Expected, names, words, false);
        }
        let rescue = self.rescue(group);
        let first_two = steps.contains(&Some(0)) && steps.contains(&Some(1));
        let most = if first_two { "at most one, step0 and step1 counted as one," } else { "at most one" };
        if ends == ["main"] && main_is_elsewhere {
            let words = format!(
                "{} hold the same weights{how}, and main is not the last step: {most} is what its name says{rescue}",
                listed(&names)
            );
            return self.say(FindingKind::Identical, names, words, true);
        }
        if ends.is_empty() {
            let words = format!("{} hold the same weights{how}: {most} is what its name says{rescue}", listed(&others));
            return self.say(FindingKind::Identical, others, words, true);
        }
        let (holds, are) = if others.len() == 1 {
            ("holds", "it is not what its name says")
        } else {
            ("hold", "they are not what their names say")
        };
        let of = match &ends[..] {
            [one] if one == "main" => "main".to_owned(),
            [one] => format!("{one}, the last step"),
            _ => format!("{}, the last step, which main has too", last.unwrap_or_default()),
        };
        let words = format!("{} {holds} the weights of {of}{how}: {are}{rescue}", listed(&others));
        self.say(FindingKind::EqualsFinal, others, words, true);
    }

    /// Another form of the same revisions may be right though the one that is loaded is not.
    fn rescue(&self, group: &[usize]) -> String {
        let first = &self.looked[group[0]];
        for form in first.forms.keys().skip(1) {
            let digests = group.iter().map(|&i| self.looked[i].digests(*form));
            let distinct: BTreeSet<Option<Vec<&Digest>>> = digests.collect();
            if !distinct.contains(&None) && distinct.len() == group.len() {
                return format!("; their {} all differ, so those may be right", first.forms[form][0].path);
            }
        }
        String::new()
    }

    /// Shards that revisions share which are otherwise different.
    fn judge_shards(&mut self, last: Option<&str>) {
        let mut holders: BTreeMap<(String, Digest), Vec<usize>> = BTreeMap::new();
        for (i, one) in self.looked.iter().enumerate() {
            for file in one.forms.values().filter(|files| files.len() > 1).flatten() {
                if let Some(digest) = &file.digest {
                    holders.entry((file.path.clone(), digest.clone())).or_default().push(i);
                }
            }
        }
        // One finding for a set of revisions, however many shards it shares.
        let mut shared: BTreeMap<Vec<usize>, Vec<String>> = BTreeMap::new();
        for ((path, _), who) in holders {
            let distinct: BTreeSet<usize> = who.iter().map(|&i| self.classes.head(i)).collect();
            if distinct.len() > 1 {
                shared.entry(who).or_default().push(path);
            }
        }
        for (who, paths) in shared {
            let names: Vec<String> = who.iter().map(|&i| self.looked[i].name().to_owned()).collect();
            let is_end = |name: &String| name == "main" || Some(name.as_str()) == last;
            let (ends, others): (Vec<String>, Vec<String>) = names.iter().cloned().partition(is_end);
            let paths = paths.join(", ");
            if ends.is_empty() || others.is_empty() {
                let words = format!("{} have {paths} in common, though they differ otherwise", listed(&names));
                self.say(FindingKind::SharedShard, names, words, true);
            } else {
                let has = if others.len() == 1 { "has" } else { "have" };
                let words =
                    format!("{} {has} {paths} of {}, and other shards of their own", listed(&others), listed(&ends));
                self.say(FindingKind::SharedShard, others, words, true);
            }
        }
    }

    /// What the card knows and the findings so far do not show.
    fn judge_known(&mut self) {
        let Some(card) = self.of.card else { return };
        let told: BTreeSet<(String, String)> = self
            .findings
            .iter()
            .flat_map(|finding| {
                finding.revisions.iter().flat_map(|r| finding.sources.iter().map(|s| (r.clone(), s.clone())))
            })
            .collect();
        let main = self.position("main");
        let mut by_fact: BTreeMap<(String, String, bool), (KnownKind, Vec<String>)> = BTreeMap::new();
        for i in 0..self.looked.len() {
            let revision = self.looked[i].name().to_owned();
            for known in card.known_of(&revision) {
                if known.kind == KnownKind::Missing || told.contains(&(revision.clone(), known.source.clone())) {
                    continue;
                }
                let own = main.is_some_and(|main| self.looked[i].same_files(&self.looked[main]) == Some(false));
                let mended = matches!(known.kind, KnownKind::Wrong | KnownKind::Suspect)
                    && own
                    && self.classes.members(i).len() == 1;
                let fact = (known.what.clone(), known.source.clone(), mended);
                by_fact.entry(fact).or_insert((known.kind, Vec::new())).1.push(revision.clone());
            }
        }
        for ((what, source, mended), (kind, revisions)) in by_fact {
            let words = if mended {
                format!("it was reported of {}: {what}; the files are their own now", listed(&revisions))
            } else {
                format!("it is reported of {}: {what}", listed(&revisions))
            };
            let alarming = !mended && matches!(kind, KnownKind::Wrong | KnownKind::Suspect);
            self.findings.push(Finding { kind: FindingKind::Known, revisions, words, alarming, sources: vec![source] });
        }
    }
}

/// One finding for many revisions of which the same is to be said in the same words.
fn merge(findings: &mut Vec<Finding>) {
    let mut out: Vec<Finding> = Vec::new();
    for finding in findings.drain(..) {
        let rest = |finding: &Finding| match &finding.revisions[..] {
            [one, ..] => finding.words.strip_prefix(one.as_str()).map(str::to_owned),
            [] => None,
        };
        let simple = matches!(finding.kind, FindingKind::Missing | FindingKind::NoWeights | FindingKind::NotCached);
        match out.iter_mut().find(|other| {
            simple && other.kind == finding.kind && other.sources == finding.sources && rest(other) == rest(&finding)
        }) {
            Some(other) => other.revisions.extend(finding.revisions),
            None => out.push(finding),
        }
    }
    for finding in out.iter_mut().filter(|finding| finding.revisions.len() > 1) {
        if matches!(finding.kind, FindingKind::Missing | FindingKind::NoWeights | FindingKind::NotCached)
            && let Some(rest) = finding.words.strip_prefix(&finding.revisions[0])
        {
            finding.words = format!("{}, each:{}", listed(&finding.revisions), rest.trim_start_matches(':'));
        }
    }
    *findings = out;
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
