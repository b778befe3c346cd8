//! Normalization of a text before it is split into pieces: character replacements and spaces.

use crate::sentencepiece::proto::NormalizerSpec;

/// Character that stands for a space in pieces, U+2581.
pub(crate) const MARK: &str = "\u{2581}";

/// Maximum length of a replacement in bytes. The longest in sentencepiece's own rules has 33.
const MAX_REPLACEMENT: usize = 256;

/// A normalizer and its parsed table of character replacements.
#[derive(Debug)]
pub(crate) struct Normalizer {
    pub(crate) spec: NormalizerSpec,
    charsmap: Option<Charsmap>,
}

/// Character replacements: a double-array trie in the format of darts-clone, whose values are offsets into a list of
/// replacements that end with a zero byte.
#[derive(Debug)]
struct Charsmap {
    units: Vec<u32>,
    texts: Vec<u8>,
}

impl Charsmap {
    fn parse(blob: &[u8]) -> Option<Self> {
        let (size, rest) = blob.split_first_chunk::<4>()?;
        let (trie, texts) = rest.split_at_checked(u32::from_le_bytes(*size) as usize)?;
        let (units, odd) = trie.as_chunks::<4>();
        // A long replacement would make a short text very large.
        let is_short = texts.split(|&byte| byte == 0).all(|text| text.len() <= MAX_REPLACEMENT);
        let whole = odd.is_empty() && !units.is_empty() && texts.last().is_none_or(|&last| last == 0) && is_short;
        whole.then(|| Self {
            units: units.iter().map(|unit| u32::from_le_bytes(*unit)).collect(),
            texts: texts.to_vec(),
        })
    }

    /// Finds the longest prefix of `text` that has a replacement. Returns its length in bytes and the replacement.
    fn longest(&self, text: &[u8]) -> Option<(usize, &[u8])> {
        let offset = |unit: u32| ((unit >> 10) << ((unit & (1 << 9)) >> 6)) as usize;
        let mut at = offset(self.units[0]);
        let mut found = None;
        for (i, &byte) in text.iter().enumerate() {
            at ^= usize::from(byte);
            let Some(&unit) = self.units.get(at) else { break };
            if unit & ((1 << 31) | 0xff) != u32::from(byte) {
                break;
            }
            at ^= offset(unit);
            if unit >> 8 & 1 == 1 {
                let value = self.units.get(at)? & !(1 << 31);
                found = Some((i + 1, value as usize));
            }
        }
        let (len, start) = found?;
        let rest = self.texts.get(start..)?;
        Some((len, &rest[..rest.iter().position(|&byte| byte == 0)?]))
    }
}

impl Normalizer {
    pub(crate) fn new(spec: NormalizerSpec) -> Result<Self, String> {
        let charsmap = match &spec.charsmap[..] {
            [] => None,
            blob => Some(Charsmap::parse(blob).ok_or("invalid precompiled_charsmap in the normalizer")?),
        };
        Ok(Self { spec, charsmap })
    }

    /// Normalizes the beginning of `text`, which must not be empty. Returns the normalized text and the number of bytes
    /// that it replaces. `user` is the length of the user-defined symbol at the beginning, if there is one.
    fn prefix<'a>(&'a self, text: &'a str, user: Option<usize>) -> (&'a str, usize) {
        if let Some(len) = user {
            return (&text[..len], len);
        }
        let mapped = self.charsmap.as_ref().and_then(|charsmap| charsmap.longest(text.as_bytes()));
        if let Some((len, replaced)) = mapped
            && text.is_char_boundary(len)
            && let Ok(replaced) = std::str::from_utf8(replaced)
        {
            return (replaced, len);
        }
        let len = text.chars().next().map_or(0, char::len_utf8);
        (&text[..len], len)
    }

    /// Normalizes a text. `user` returns the length of the user-defined symbol at the beginning of its argument.
    pub(crate) fn normalize(&self, text: &str, user: impl Fn(&str) -> Option<usize>) -> String {
        let spec = &self.spec;
        let mut rest = text;
        if spec.remove_extra_whitespaces {
            while !rest.is_empty() {
                let (first, len) = self.prefix(rest, user(rest));
                if first != " " {
                    break;
                }
                rest = &rest[len..];
            }
        }
        let mut out = String::with_capacity(text.len() + text.len() / 4);
        if rest.is_empty() {
            return out;
        }
        let space = if spec.escape_whitespaces { MARK } else { " " };
        if spec.add_dummy_prefix && !spec.whitespace_is_suffix {
            out.push_str(space);
        }
        let mut after_space = spec.remove_extra_whitespaces;
        while !rest.is_empty() {
            let (mut piece, len) = self.prefix(rest, user(rest));
            while after_space && let Some(less) = piece.strip_prefix(' ') {
                piece = less;
            }
            if !piece.is_empty() {
                if spec.escape_whitespaces {
                    piece.split(' ').enumerate().for_each(|(i, part)| {
                        out.push_str(if i > 0 { MARK } else { "" });
                        out.push_str(part);
                    });
                } else {
                    out.push_str(piece);
                }
                after_space = piece.ends_with(' ');
            }
            rest = &rest[len..];
            after_space &= spec.remove_extra_whitespaces;
        }
        if spec.remove_extra_whitespaces {
            while out.ends_with(space) {
                out.truncate(out.len() - space.len());
            }
        }
        if spec.add_dummy_prefix && spec.whitespace_is_suffix {
            out.push_str(space);
        }
        out
    }
}
