//! What it means that revisions are the same, in words.

use std::collections::{BTreeMap, BTreeSet};

use pricket_hub::Digest;

use super::{Audit, Audited, Auditor, Finding, FindingKind, Looked};
use crate::suites::cards::KnownKind;

impl Auditor<'_> {
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

    pub(super) fn conclude(mut self) -> Audit {
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
