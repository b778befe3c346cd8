//! Conclusions from equal revisions, and the wording of findings.

use std::collections::{BTreeMap, BTreeSet};

use pricket_hub::Digest;

use super::{Audit, Audited, Auditor, Finding, FindingKind, Looked};
use crate::suites::cards::KnownKind;

impl Auditor<'_> {
    /// Returns the last training step, if it is known for certain.
    fn last(&mut self) -> Option<String> {
        let of = self.of;
        if let Some(pattern) = of.card.and_then(|card| card.checkpoints.as_ref()) {
            let last = pattern.branch(pattern.steps().into_iter().max()?);
            return of.steps.iter().find(|checkpoint| checkpoint.present && checkpoint.revision == last).map(|_| last);
        }
        let last = of.steps.iter().rfind(|checkpoint| checkpoint.present)?.revision.clone();
        if of.home.is_partial() {
            // The cache may lack later steps. Its last step is the last one only if it equals main.
            let (main, end) = (self.position("main")?, self.position(&last)?);
            return (self.classes.head(main) == self.classes.head(end)).then_some(last);
        }
        Some(last)
    }

    /// Returns whether the weights of `main` are known to differ from those of a training step.
    fn main_differs_from(&mut self, step: &str) -> bool {
        let (Some(main), Some(step)) = (self.position("main"), self.position(step)) else { return false };
        self.looked[main].is_comparable(&self.looked[step]) && self.classes.head(main) != self.classes.head(step)
    }

    /// Turns the sets of equal revisions into findings.
    pub(super) fn conclude(mut self) -> Audit {
        let last = self.last();
        let groups: Vec<Vec<usize>> = self.classes.groups().into_iter().filter(|group| group.len() > 1).collect();
        for group in &groups {
            self.judge(group, last.as_deref());
        }
        self.judge_shards(last.as_deref());
        if let Some(end) = &last
            && self.main_differs_from(end)
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

    /// Adds the finding for a set of equal revisions.
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
        let main_is_elsewhere = last.is_some_and(|last| self.main_differs_from(last));
        let is_end = |name: &String| name == "main" || Some(name.as_str()) == last;
        let (ends, others): (Vec<String>, Vec<String>) = names.iter().cloned().partition(is_end);
        if others.is_empty() {
            let words = format!("{} hold the same weights{how}, as expected: main is the last step", listed(&ends));
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
        let most = if first_two { "at most one name (step0 and step1 count as one)" } else { "at most one name" };
        if ends == ["main"] && main_is_elsewhere {
            let words = format!(
                "{} hold the same weights{how}, and main is not the last step: {most} is correct{rescue}",
                listed(&names)
            );
            return self.say(FindingKind::Identical, names, words, true);
        }
        if ends.is_empty() {
            let words = format!("{} hold the same weights{how}: {most} is correct{rescue}", listed(&others));
            return self.say(FindingKind::Identical, others, words, true);
        }
        let (holds, are) =
            if others.len() == 1 { ("holds", "its name is wrong") } else { ("hold", "their names are wrong") };
        let of = match &ends[..] {
            [one] if one == "main" => "main".to_owned(),
            [one] => format!("{one}, the last step"),
            _ => format!("{}, the last step, and of main", last.unwrap_or_default()),
        };
        let words = format!("{} {holds} the weights of {of}{how}: {are}{rescue}", listed(&others));
        self.say(FindingKind::EqualsFinal, others, words, true);
    }

    /// Returns a hint if another form of these revisions has different weights in each of them, and so may be correct.
    fn rescue(&self, group: &[usize]) -> String {
        let first = &self.looked[group[0]];
        for form in first.forms.keys().skip(1) {
            let digests = group.iter().map(|&i| self.looked[i].digests(*form));
            let distinct: BTreeSet<Option<Vec<&Digest>>> = digests.collect();
            if !distinct.contains(&None) && distinct.len() == group.len() {
                return format!("; their files {} all differ and may be correct", first.forms[form][0].path);
            }
        }
        String::new()
    }

    /// Adds findings for shards shared by revisions whose other files differ.
    fn judge_shards(&mut self, last: Option<&str>) {
        let mut holders: BTreeMap<(String, Digest), Vec<usize>> = BTreeMap::new();
        for (i, one) in self.looked.iter().enumerate() {
            for file in one.forms.values().filter(|files| files.len() > 1).flatten() {
                if let Some(digest) = &file.digest {
                    holders.entry((file.path.clone(), digest.clone())).or_default().push(i);
                }
            }
        }
        // One finding per set of revisions, with all shards that they share.
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
                let words = format!("{} share {paths}, but their other files differ", listed(&names));
                self.say(FindingKind::SharedShard, names, words, true);
            } else {
                let has = if others.len() == 1 { "has" } else { "have" };
                let words =
                    format!("{} {has} {paths} of {}, and other shards of their own", listed(&others), listed(&ends));
                self.say(FindingKind::SharedShard, others, words, true);
            }
        }
    }

    /// Adds findings for facts of the model card that no other finding covers.
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
                format!("was reported for {}: {what}; the files now differ from all others", listed(&revisions))
            } else {
                format!("is reported for {}: {what}", listed(&revisions))
            };
            let alarming = !mended && matches!(kind, KnownKind::Wrong | KnownKind::Suspect);
            self.findings.push(Finding { kind: FindingKind::Known, revisions, words, alarming, sources: vec![source] });
        }
    }
}

/// Merges findings of the same kind and wording into one finding for all their revisions.
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
/// Formats names as a list in a sentence. A long list is shortened to its first and last names and their number.
fn listed(names: &[String]) -> String {
    match names {
        [] => "nothing".into(),
        [one] => one.clone(),
        [first @ .., last] if names.len() <= 8 => format!("{} and {last}", first.join(", ")),
        [a, b, c, .., last] => format!("{a}, {b}, {c}, ... {last} ({} in all)", names.len()),
        _ => names.join(", "),
    }
}
