//! Model cards of published checkpoints (models/*.toml): facts that are not in the checkpoints' own files.

use std::sync::OnceLock;

use pricket_hub::Steps;
use serde::Deserialize;

/// The files of models/, one for each suite.
const FILES: [(&str, &str); 7] = [
    ("pythia.toml", include_str!("../../../../models/pythia.toml")),
    ("polypythias.toml", include_str!("../../../../models/polypythias.toml")),
    ("gpt-neox.toml", include_str!("../../../../models/gpt-neox.toml")),
    ("redpajama-incite.toml", include_str!("../../../../models/redpajama-incite.toml")),
    ("mpt.toml", include_str!("../../../../models/mpt.toml")),
    ("openllama.toml", include_str!("../../../../models/openllama.toml")),
    ("rwkv4.toml", include_str!("../../../../models/rwkv4.toml")),
];

/// Model card of a published checkpoint.
///
/// A card contains what config.json does not: license, training steps, prompt format, known problems of revisions. It
/// never affects how the model computes.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Card {
    /// Repository on the Hub.
    pub id: String,
    /// Model suite, such as "Pythia".
    pub suite: String,
    /// Model family: the name of its crate without `pricket-`, such as `gpt-neox` or `mpt`.
    pub family: String,
    /// Size in the model's name, such as "410m".
    pub size: String,
    /// License, in the Hub's spelling.
    pub license: String,
    /// Whether the license forbids commercial use.
    pub non_commercial: bool,
    /// Prompt format that the model was tuned for; "plain" if it was not tuned.
    pub prompt: String,
    /// Number of weights.
    pub parameters: u64,
    /// Shape of the token embedding: vocabulary size, width.
    pub embedding: [usize; 2],
    /// Other current or former ids. If a repository holds several models, a name for this one.
    pub aliases: Vec<String>,
    /// Published training steps.
    pub checkpoints: Option<StepPattern>,
    /// Revisions that are wrong, missing or unusual.
    pub known: Vec<Known>,
    /// Month in which the repository was removed from the Hub.
    pub gone: Option<String>,
    /// Copies by others, not verified against the original.
    pub mirrors: Vec<String>,
    /// Repository that provides the tokenizer, if this one has none.
    pub tokenizer: Option<String>,
    /// Weight file, if the repository holds several models.
    pub file: Option<String>,
    /// Note for users, in one sentence.
    pub note: Option<String>,
    /// Source of these facts.
    pub source: String,
}

/// Names and numbers of the published training steps.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct StepPattern {
    /// Branch name of a training step, with `{step}` in place of its number.
    pub revision: String,
    steps: String,
    /// Number of training tokens per step.
    pub tokens_per_step: u64,
}

impl StepPattern {
    /// Returns the training steps, ascending.
    pub fn steps(&self) -> Vec<u64> {
        expand(&self.steps)
    }

    /// Returns the branch of a training step.
    pub fn branch(&self, step: u64) -> String {
        self.revision.replace("{step}", &step.to_string())
    }
}

/// A known fact about some revisions.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Known {
    /// Training steps of the revisions.
    pub steps: Vec<u64>,
    /// Severity.
    pub kind: KnownKind,
    /// Description, which continues the sentence "owner/name@step0 ...".
    pub what: String,
    /// Source of the report.
    pub source: String,
}

/// Severity of a known fact about a revision, worst first.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, PartialOrd, Ord)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum KnownKind {
    /// The revision holds the weights of another training step.
    Wrong,
    /// The revision may hold the weights of another training step.
    Suspect,
    /// The revision does not exist.
    Missing,
    /// The revision is correct but unusual.
    Odd,
}

impl Card {
    /// Returns the known facts about a revision, worst first.
    pub fn known_of(&self, revision: &str) -> Vec<&Known> {
        let Some(step) = self.step_of(revision) else { return Vec::new() };
        let mut found: Vec<&Known> = self.known.iter().filter(|known| known.steps.contains(&step)).collect();
        found.sort_by_key(|known| known.kind);
        found
    }

    /// Returns the training step in the name of a revision.
    pub fn step_of(&self, revision: &str) -> Option<u64> {
        let (before, after) = self.checkpoints.as_ref()?.revision.split_once("{step}")?;
        let digits = revision.strip_prefix(before)?.strip_suffix(after)?;
        let step: u64 = digits.parse().ok()?;
        (step.to_string() == digits).then_some(step)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Suite {
    #[serde(rename = "suite")]
    name: String,
    family: String,
    #[serde(alias = "licence")]
    license: String,
    prompt: String,
    source: String,
    checkpoints: Option<StepPattern>,
    size: Vec<Size>,
    models: Vec<Rule>,
    #[serde(default)]
    known: Vec<KnownRule>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Size {
    name: String,
    parameters: u64,
    embedding: [usize; 2],
    #[serde(default)]
    aliases: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    id: String,
    sizes: Vec<String>,
    #[serde(default)]
    seeds: Vec<u64>,
    #[serde(alias = "licence")]
    license: Option<String>,
    prompt: Option<String>,
    tokenizer: Option<String>,
    file: Option<String>,
    note: Option<String>,
    #[serde(default)]
    mirrors: Vec<String>,
    gone: Option<String>,
    #[serde(default)]
    aliases: Vec<String>,
    #[serde(default)]
    non_commercial: bool,
    #[serde(default = "yes")]
    checkpoints: bool,
}

fn yes() -> bool {
    true
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct KnownRule {
    models: Vec<String>,
    steps: String,
    kind: KnownKind,
    what: String,
    source: String,
}

/// Expands a list of training steps in a card.
fn expand(text: &str) -> Vec<u64> {
    let steps = text.parse::<Steps>().ok().and_then(|steps| steps.expand());
    steps.unwrap_or_else(|| panic!("models/: {text:?} is not a list of training steps"))
}

impl Suite {
    fn cards(&self) -> impl Iterator<Item = Card> + '_ {
        self.models.iter().flat_map(move |rule| {
            rule.sizes.iter().flat_map(move |name| {
                let size = self.size.iter().find(|size| size.name == *name);
                let size = size.unwrap_or_else(|| panic!("models/: {} has no size {name}", self.name));
                let seeds = if rule.seeds.is_empty() { vec![None] } else { rule.seeds.iter().map(Some).collect() };
                seeds.into_iter().map(move |seed| self.card(rule, size, seed.copied()))
            })
        })
    }

    fn card(&self, rule: &Rule, size: &Size, seed: Option<u64>) -> Card {
        let id_of = |size: &str| {
            let seed = seed.map_or(String::new(), |seed| seed.to_string());
            rule.id.replace("{size}", size).replace("{seed}", &seed)
        };
        let id = id_of(&size.name);
        let known = self.known.iter().filter(|known| known.models.iter().any(|model| *model == "*" || *model == id));
        let old = size.aliases.iter().map(|size| id_of(size)).filter(|old| *old != id);
        Card {
            suite: self.name.clone(),
            family: self.family.clone(),
            size: size.name.clone(),
            license: rule.license.as_ref().unwrap_or(&self.license).clone(),
            non_commercial: rule.non_commercial,
            prompt: rule.prompt.as_ref().unwrap_or(&self.prompt).clone(),
            parameters: size.parameters,
            embedding: size.embedding,
            aliases: rule.aliases.iter().cloned().chain(old).collect(),
            checkpoints: self.checkpoints.clone().filter(|_| rule.checkpoints),
            known: known
                .map(|known| Known {
                    steps: expand(&known.steps),
                    kind: known.kind,
                    what: known.what.clone(),
                    source: known.source.clone(),
                })
                .collect(),
            gone: rule.gone.clone(),
            mirrors: rule.mirrors.clone(),
            tokenizer: rule.tokenizer.clone(),
            file: rule.file.clone(),
            note: rule.note.clone(),
            source: self.source.clone(),
            id,
        }
    }
}

/// Returns the model cards of all supported published checkpoints.
///
/// ```
/// let pythia = pricket::suites::cards().iter().filter(|card| card.suite == "Pythia").count();
/// assert_eq!(pythia, 34);
/// ```
pub fn cards() -> &'static [Card] {
    static CARDS: OnceLock<Vec<Card>> = OnceLock::new();
    CARDS.get_or_init(|| {
        let suites = FILES.iter().map(|(name, text)| {
            // The files are compiled in, and a test checks them.
            toml::from_str::<Suite>(text).unwrap_or_else(|e| panic!("models/{name}: {e}"))
        });
        suites.collect::<Vec<_>>().iter().flat_map(|suite| suite.cards().collect::<Vec<_>>()).collect()
    })
}

/// Returns the card of a repository. `id` is a current or former id, with or without the owner, in upper or lower case.
///
/// ```
/// let card = pricket::suites::card("pythia-410m").unwrap();
/// assert_eq!((card.id.as_str(), card.parameters), ("EleutherAI/pythia-410m", 405_334_016));
/// assert_eq!(pricket::suites::card("EleutherAI/pythia-1.3b").unwrap().size, "1.4b");
/// assert!(pricket::suites::card("a/mirror-of-it").is_none());
/// ```
pub fn card(id: &str) -> Option<&'static Card> {
    let same = |known: &str| known.eq_ignore_ascii_case(id);
    let bare = |known: &str| known.split_once('/').is_some_and(|(_, name)| same(name));
    let named = |card: &&Card| same(&card.id) || card.aliases.iter().any(|alias| same(alias));
    let nameless = |card: &&Card| bare(&card.id) || card.aliases.iter().any(|alias| bare(alias));
    cards().iter().find(named).or_else(|| if id.contains('/') { None } else { cards().iter().find(nameless) })
}

/// Returns the card of a repository or, for a known copy, the card of the original.
pub(crate) fn card_of(repo: &str) -> Option<&'static Card> {
    let mirrored = || cards().iter().find(|card| card.mirrors.iter().any(|mirror| mirror.eq_ignore_ascii_case(repo)));
    card(repo).or_else(mirrored)
}
