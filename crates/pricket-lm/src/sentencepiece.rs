//! SentencePiece models (Kudo and Richardson 2018, arXiv:1808.06226): byte-pair encoding by scores, and unigram models.
//!
//! The fast tokenizers that transformers converts from these models rebuild merges from scores and omit the normalizer,
//! which gives different ids for OpenLLaMA. This module reads the model file and segments texts as google/sentencepiece
//! does.

mod normalizer;
mod proto;

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

pub(crate) use normalizer::MARK;
use normalizer::Normalizer;
pub(crate) use proto::{Kind, Model, NormalizerSpec, Piece};

/// Difference between the score of the least likely piece of a unigram model and that of an unknown character.
const UNKNOWN_PENALTY: f32 = 10.0;

/// Maximum length of a piece in bytes.
const MAX_PIECE: usize = 1 << 10;

/// A model with the tables that segmentation needs.
#[derive(Debug)]
pub(crate) struct SentencePiece {
    pub(crate) model: Model,
    normalizer: Normalizer,
    /// The normalizer with the opposite setting of `add_dummy_prefix`.
    other: Normalizer,
    /// Ids of normal, user-defined and unused pieces by their text.
    ids: HashMap<String, u32>,
    /// Ids of the byte pieces, if the model has all 256.
    bytes: Option<Box<[u32; 256]>>,
    unknown: u32,
    /// Lengths of user-defined symbols in bytes, the longest first.
    user_lengths: Vec<usize>,
    /// Length of the longest piece in bytes.
    longest: usize,
    /// Lowest and highest score of a normal piece.
    scores: (f32, f32),
}

/// Two adjacent symbols that may be merged into one piece.
struct Pair {
    score: f32,
    left: usize,
    right: usize,
    /// Length of both together in bytes.
    len: usize,
}

impl Ord for Pair {
    /// Orders by score; of equal scores, the leftmost pair is the greatest.
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Pair {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Pair {}

/// A part of the text, as a node of a doubly linked list.
#[derive(Clone, Copy)]
struct Symbol {
    start: usize,
    end: usize,
    before: Option<usize>,
    after: Option<usize>,
    is_user_defined: bool,
}

impl SentencePiece {
    pub(crate) fn new(mut model: Model) -> Result<Self, String> {
        let (mut ids, mut bytes, mut unknown) = (HashMap::new(), [None; 256], None);
        let (mut user_lengths, mut scores) = (Vec::new(), (f32::MAX, f32::MIN_POSITIVE));
        for (id, piece) in model.pieces.iter().enumerate() {
            let id = id as u32;
            if piece.text.len() > MAX_PIECE {
                return Err(format!("piece {id} has {} bytes; at most {MAX_PIECE} are allowed", piece.text.len()));
            }
            match piece.kind {
                Kind::Normal | Kind::UserDefined | Kind::Unused => {
                    if piece.text.is_empty() {
                        return Err(format!("piece {id} is empty"));
                    }
                    if ids.insert(piece.text.clone(), id).is_some() {
                        return Err(format!("duplicate piece {:?}", pricket_nn::clip(&piece.text)));
                    }
                }
                Kind::Byte => {
                    let value = piece.text.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
                    let value = value.and_then(|digits| u8::from_str_radix(digits, 16).ok());
                    let value = value.ok_or_else(|| {
                        format!("invalid byte piece {:?}; expected a form like <0x0A>", pricket_nn::clip(&piece.text))
                    })?;
                    bytes[usize::from(value)] = Some(id);
                }
                Kind::Unknown if unknown.is_some() => return Err("the model has two unknown pieces".into()),
                Kind::Unknown => unknown = Some(id),
                Kind::Control => {}
            }
            match piece.kind {
                Kind::UserDefined => user_lengths.push(piece.text.len()),
                Kind::Normal => scores = (scores.0.min(piece.score), scores.1.max(piece.score)),
                _ => {}
            }
        }
        let bytes: Option<Vec<u32>> = bytes.into_iter().collect();
        let bytes = bytes.and_then(|ids| ids.try_into().ok()).map(Box::new);
        model.byte_fallback &= bytes.is_some();
        user_lengths.sort_unstable_by(|a, b| b.cmp(a));
        user_lengths.dedup();
        let longest = model.pieces.iter().map(|piece| piece.text.len()).max().unwrap_or(0);
        let unknown = unknown.ok_or("the model has no unknown piece")?;
        let normalizer = Normalizer::new(model.normalizer.clone())?;
        let spec = NormalizerSpec { add_dummy_prefix: !model.normalizer.add_dummy_prefix, ..model.normalizer.clone() };
        let other = Normalizer::new(spec)?;
        Ok(Self { model, normalizer, other, ids, bytes, unknown, user_lengths, longest, scores })
    }

    fn kind(&self, id: u32) -> Kind {
        self.model.pieces[id as usize].kind
    }

    /// Returns the length of the longest user-defined symbol at the beginning of `text`.
    fn user_defined(&self, text: &str) -> Option<usize> {
        self.user_lengths.iter().copied().find(|&len| {
            let known = text.get(..len).and_then(|start| self.ids.get(start));
            known.is_some_and(|&id| self.kind(id) == Kind::UserDefined)
        })
    }

    /// Encodes a text as ids. Control symbols that are spelled out in it are encoded as text.
    pub(crate) fn encode(&self, text: &str) -> Vec<u32> {
        self.cut(&self.normalizer.normalize(text, |text| self.user_defined(text)))
    }

    /// Encodes a text as ids, with `dummy_prefix` instead of the model's own `add_dummy_prefix`.
    pub(crate) fn encode_with(&self, text: &str, dummy_prefix: bool) -> Vec<u32> {
        if dummy_prefix == self.normalizer.spec.add_dummy_prefix {
            return self.encode(text);
        }
        self.cut(&self.other.normalize(text, |text| self.user_defined(text)))
    }

    fn cut(&self, text: &str) -> Vec<u32> {
        let mut out = Vec::new();
        let mut after_unknown = false;
        let parts = if self.model.is_unigram { self.best_path(text) } else { self.merged(text) };
        for (part, id) in parts {
            let is_unknown = id == self.unknown;
            match &self.bytes {
                Some(bytes) if is_unknown && self.model.byte_fallback => {
                    out.extend(part.bytes().map(|byte| bytes[usize::from(byte)]));
                }
                // A run of unknown characters becomes one unknown token.
                _ if is_unknown && after_unknown => {}
                _ => out.push(id),
            }
            after_unknown = is_unknown;
        }
        out
    }

    /// Repeatedly merges the adjacent pair whose merged piece has the highest score, until no pair forms a piece.
    fn merged<'a>(&self, text: &'a str) -> Vec<(&'a str, u32)> {
        let mut symbols: Vec<Symbol> = Vec::new();
        let mut at = 0;
        while at < text.len() {
            let user = self.user_defined(&text[at..]);
            let len = user.or_else(|| text[at..].chars().next().map(char::len_utf8)).unwrap_or(1);
            let before = symbols.len().checked_sub(1);
            symbols.push(Symbol { start: at, end: at + len, before, after: None, is_user_defined: user.is_some() });
            at += len;
        }
        let count = symbols.len();
        for (i, symbol) in symbols.iter_mut().enumerate() {
            symbol.after = (i + 1 < count).then_some(i + 1);
        }
        let mut heap = BinaryHeap::new();
        // Split points of merged unused pieces, which are split again at the end.
        let mut joined: HashMap<&str, usize> = HashMap::new();
        let mut propose =
            |symbols: &[Symbol], heap: &mut BinaryHeap<Pair>, left: Option<usize>, right: Option<usize>| {
                let (Some(left), Some(right)) = (left, right) else { return };
                let (a, b) = (symbols[left], symbols[right]);
                if a.is_user_defined || b.is_user_defined || b.end - a.start > self.longest {
                    return;
                }
                let Some(&id) = self.ids.get(&text[a.start..b.end]) else { return };
                if self.kind(id) == Kind::Unused {
                    joined.insert(&text[a.start..b.end], a.end - a.start);
                }
                let score = self.model.pieces[id as usize].score;
                heap.push(Pair { score, left, right, len: b.end - a.start });
            };
        for i in 1..count {
            propose(&symbols, &mut heap, Some(i - 1), Some(i));
        }
        while let Some(Pair { left, right, len, .. }) = heap.pop() {
            let (a, b) = (symbols[left], symbols[right]);
            // Skips the pair if one of its symbols has been merged with another in the meantime.
            if a.start == a.end || b.start == b.end || b.end - a.start != len || a.after != Some(right) {
                continue;
            }
            symbols[left].end = b.end;
            symbols[left].after = b.after;
            if let Some(after) = b.after {
                symbols[after].before = Some(left);
            }
            symbols[right].end = symbols[right].start;
            propose(&symbols, &mut heap, a.before, Some(left));
            propose(&symbols, &mut heap, Some(left), b.after);
        }
        let mut out = Vec::new();
        let mut todo: Vec<&str> = Vec::new();
        for symbol in symbols.iter().filter(|symbol| symbol.start < symbol.end) {
            todo.push(&text[symbol.start..symbol.end]);
            while let Some(part) = todo.pop() {
                let id = self.ids.get(part).copied().unwrap_or(self.unknown);
                match joined.get(part).filter(|_| self.kind(id) == Kind::Unused) {
                    Some(&at) => todo.extend([&part[at..], &part[..at]]),
                    None => out.push((part, id)),
                }
            }
        }
        out
    }

    /// Returns the most likely segmentation of the text (Viterbi 1967), as sentencepiece's `EncodeOptimized` does.
    fn best_path<'a>(&self, text: &'a str) -> Vec<(&'a str, u32)> {
        #[derive(Clone, Copy)]
        struct End {
            start: Option<usize>,
            score: f32,
            id: u32,
        }
        let mut ends = vec![End { start: None, score: 0.0, id: self.unknown }; text.len() + 1];
        let unknown_score = self.scores.0 - UNKNOWN_PENALTY;
        for (at, char) in text.char_indices() {
            let (till, one) = (ends[at].score, char.len_utf8());
            let mut has_one = false;
            let reach = |ends: &mut [End], end: usize, score: f32, id: u32| {
                if ends[end].start.is_none() || score > ends[end].score {
                    ends[end] = End { start: Some(at), score, id };
                }
            };
            for end in at + 1..=text.len().min(at + self.longest) {
                let Some(&id) = text.get(at..end).and_then(|part| self.ids.get(part)) else { continue };
                let score = match self.kind(id) {
                    Kind::Unused => continue,
                    Kind::UserDefined => (end - at) as f32 * self.scores.1 - 0.1,
                    _ => self.model.pieces[id as usize].score,
                };
                reach(&mut ends, end, score + till, id);
                has_one |= end - at == one;
            }
            if !has_one {
                reach(&mut ends, at + one, unknown_score + till, self.unknown);
            }
        }
        let (mut out, mut end) = (Vec::new(), text.len());
        while let Some(start) = ends[end].start {
            out.push((&text[start..end], ends[end].id));
            end = start;
        }
        out.reverse();
        out
    }

    /// Returns the bytes that a piece decodes to; empty for control symbols.
    pub(crate) fn piece_bytes(&self, id: u32) -> Vec<u8> {
        let piece = &self.model.pieces[id as usize];
        match piece.kind {
            Kind::Control => Vec::new(),
            Kind::Unknown => self.model.unknown_surface.clone().into_bytes(),
            Kind::Byte => {
                let digits = piece.text.get(3..5).and_then(|digits| u8::from_str_radix(digits, 16).ok());
                digits.into_iter().collect()
            }
            Kind::Normal | Kind::UserDefined | Kind::Unused => piece.text.replace(MARK, " ").into_bytes(),
        }
    }

    /// Returns whether the text of a piece begins with [`MARK`].
    pub(crate) fn begins_with_mark(&self, id: u32) -> bool {
        let piece = &self.model.pieces[id as usize];
        matches!(piece.kind, Kind::Normal | Kind::UserDefined | Kind::Unused) && piece.text.starts_with(MARK)
    }
}
