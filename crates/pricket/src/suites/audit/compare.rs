//! Comparison of revisions tensor by tensor, for revisions whose file hashes cannot be compared.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use candle_core::DType;
use pricket_nn::{Names, Progress};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::{AuditOptions, Auditor, FindingKind, Looked};
use crate::loading::family::checked_family;
use crate::loading::forms::{Form, only};
use crate::suites::remote::Tensors;
use crate::task::Task;
use crate::{Error, Result};

/// Tensors of a revision, with a hash of the values of each.
struct Fingerprints {
    tensors: Tensors,
    /// Maps canonical names to names on file, without buffers.
    names: BTreeMap<String, String>,
    known: BTreeMap<String, [u8; 32]>,
}

impl Fingerprints {
    /// Returns the hash of shape and values of a tensor. It does not depend on the stored type or the sign of zeros.
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
        Ok(entry.bytes())
    }
}

/// Result of comparing two revisions tensor by tensor.
enum Compared {
    /// All compared tensors are equal. Fields: number of compared tensors, number of tensors.
    Equal(usize, usize),
    Different,
    /// The names of the tensors differ.
    Unlike,
}

/// Bytes of equal tensors after which two revisions on the Hub count as equal.
const ENOUGH: usize = 64 << 20;

/// Compares two revisions until a tensor differs.
fn compare(a: &mut Fingerprints, b: &mut Fingerprints) -> Result<Compared> {
    let mut names: Vec<String> = a.names.keys().filter(|name| b.names.contains_key(*name)).cloned().collect();
    // A tied head may be stored in one form only, so one name may differ. More differences mean another model.
    let apart = a.names.len().max(b.names.len()) - names.len();
    if names.is_empty() || apart > 1 {
        return Ok(Compared::Unlike);
    }
    // Biases and norms come first: they are small, and they change with every training step.
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
/// Fingerprints by revision and form; `None` for those that cannot be read.
type Prints = BTreeMap<(usize, Form), Option<Fingerprints>>;

impl Auditor<'_> {
    /// Joins revisions whose tensors are equal, where the hashes of files do not decide.
    pub(super) fn join_by_tensors(&mut self, options: AuditOptions, progress: &dyn Progress) -> Result<()> {
        let mut prints: Prints = BTreeMap::new();
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
                if !self.looked[a].is_comparable(&self.looked[b]) {
                    continue;
                }
                let told = members[&a]
                    .iter()
                    .any(|&a| members[&b].iter().any(|&b| self.looked[a].same_files(&self.looked[b]).is_some()));
                // A different header changes the hash of equal tensors. main and the last step are therefore always
                // compared.
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

    /// Compares the forms of `main` with each other, if the training steps have a form that a loader does not take from
    /// `main`. If the forms agree, that form of `main` can be compared with the steps by hash.
    fn compare_mains_forms(&mut self, prints: &mut Prints) -> Result<()> {
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

    /// Compares two forms. Returns `None` and adds a finding if one of them cannot be read.
    fn compare(&mut self, prints: &mut Prints, a: (usize, Form), b: (usize, Form)) -> Result<Option<Compared>> {
        for which in [a, b] {
            if let Entry::Vacant(entry) = prints.entry(which) {
                let opened = self.fingerprints(which);
                entry.insert(self.readable(which.0, opened)?);
            }
        }
        // Both entries are taken out of the map to borrow them mutably. Unreadable ones are put back as `None`.
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
                // Marks the training step as unreadable rather than main, which is compared with every step.
                let which = if self.looked[a.0].name() == "main" { b } else { a };
                prints.insert(which, None);
                self.readable(which.0, Err::<(), _>(e)).map(|_| None)
            }
        }
    }

    /// Returns the value that was read, or adds a finding and returns `None`.
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
        let family = config.and_then(|config| checked_family(&config).ok());
        let spelling = family.map_or_else(Names::default, pricket_nn::Family::names);
        let tensors = self.of.home.tensors(&looked.checkpoint, &only(form, &looked.listing))?;
        let weights = tensors.names().filter(|name| !spelling.is_buffer(name));
        let names = weights.map(|name| (spelling.canonical(name), name.to_owned())).collect();
        Ok(Fingerprints { tensors, names, known: BTreeMap::new() })
    }
}
