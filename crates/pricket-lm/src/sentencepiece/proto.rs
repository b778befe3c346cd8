//! The file `tokenizer.model`: reads and writes the fields of sentencepiece's `ModelProto` that affect encoding
//! (google/sentencepiece, sentencepiece_model.proto).

/// Type of a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

impl Kind {
    /// Returns the type with this number in `ModelProto`. GGUF files use the same numbers.
    pub(crate) fn of(number: u64) -> Option<Self> {
        let kinds = [Kind::Normal, Kind::Unknown, Kind::Control, Kind::UserDefined, Kind::Unused, Kind::Byte];
        kinds.into_iter().find(|kind| kind.number() == number)
    }

    pub(crate) fn number(self) -> u64 {
        match self {
            Kind::Normal => 1,
            Kind::Unknown => 2,
            Kind::Control => 3,
            Kind::UserDefined => 4,
            Kind::Unused => 5,
            Kind::Byte => 6,
        }
    }
}

/// A piece: a token of the model.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Piece {
    pub(crate) text: String,
    pub(crate) score: f32,
    pub(crate) kind: Kind,
}

/// Settings of the normalization of a text.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools, reason = "the file has these fields")]
pub(crate) struct NormalizerSpec {
    pub(crate) charsmap: Vec<u8>,
    pub(crate) add_dummy_prefix: bool,
    pub(crate) remove_extra_whitespaces: bool,
    pub(crate) escape_whitespaces: bool,
    pub(crate) whitespace_is_suffix: bool,
}

/// The contents of a `tokenizer.model` file.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Model {
    pub(crate) pieces: Vec<Piece>,
    /// Whether the model is a unigram model. If not, it is a BPE model.
    pub(crate) is_unigram: bool,
    pub(crate) byte_fallback: bool,
    pub(crate) unknown_surface: String,
    /// Id of the unknown token; -1 for none. Likewise `begin` (first token of a text) and `end` (end token).
    pub(crate) unknown: i64,
    pub(crate) begin: i64,
    pub(crate) end: i64,
    pub(crate) normalizer: NormalizerSpec,
}

/// Maximum number of pieces in a model.
const MAX_PIECES: usize = 1 << 20;

/// Value of a protobuf field. A 64-bit fixed value, which no field here has, is read as `Number(0)`.
enum Field<'a> {
    Number(u64),
    Fixed(u32),
    Bytes(&'a [u8]),
}

/// Reader of the fields of a protobuf message, in order. Holds the bytes that are left.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn varint(&mut self) -> Option<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.0.split_first()?;
            self.0 = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }

    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    /// Returns the number and value of the next field, `None` at the end, or an error if the field is malformed.
    fn next(&mut self) -> Result<Option<(u64, Field<'a>)>, String> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let mut field = || {
            let tag = self.varint()?;
            let value = match tag & 7 {
                0 => Field::Number(self.varint()?),
                1 => {
                    self.take(8)?;
                    Field::Number(0)
                }
                2 => {
                    let len = usize::try_from(self.varint()?).ok()?;
                    Field::Bytes(self.take(len)?)
                }
                5 => Field::Fixed(u32::from_le_bytes(*self.take(4)?.first_chunk()?)),
                _ => return None,
            };
            Some((tag >> 3, value))
        };
        field().map(Some).ok_or_else(|| "not a sentencepiece model: a field is malformed or truncated".into())
    }
}

impl Model {
    /// Parses the bytes of a tokenizer.model.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, String> {
        let mut model = Self {
            pieces: Vec::new(),
            is_unigram: true,
            byte_fallback: false,
            unknown_surface: " \u{2047} ".into(),
            unknown: 0,
            begin: 1,
            end: 2,
            normalizer: NormalizerSpec {
                charsmap: Vec::new(),
                add_dummy_prefix: true,
                remove_extra_whitespaces: true,
                escape_whitespaces: true,
                whitespace_is_suffix: false,
            },
        };
        let mut fields = Fields(bytes);
        while let Some(field) = fields.next()? {
            match field {
                (1, Field::Bytes(piece)) => model.pieces.push(Piece::parse(piece)?),
                (2, Field::Bytes(trainer)) => model.read_trainer(trainer)?,
                (3, Field::Bytes(normalizer)) => model.normalizer.read(normalizer)?,
                _ => {}
            }
            if model.pieces.len() > MAX_PIECES {
                return Err(format!("the model has more than {MAX_PIECES} pieces"));
            }
        }
        if model.pieces.is_empty() {
            return Err("not a sentencepiece model: it has no pieces".into());
        }
        Ok(model)
    }

    fn read_trainer(&mut self, bytes: &[u8]) -> Result<(), String> {
        let mut fields = Fields(bytes);
        while let Some(field) = fields.next()? {
            match field {
                (3, Field::Number(kind)) => {
                    self.is_unigram = match kind {
                        1 => true,
                        2 => false,
                        other => return Err(format!("model type {other} is neither unigram (1) nor BPE (2)")),
                    }
                }
                (24, Field::Number(flag)) => self.normalizer.whitespace_is_suffix = flag != 0,
                (35, Field::Number(flag)) => self.byte_fallback = flag != 0,
                // Protobuf writes negative numbers as 64-bit two's complement.
                (40, Field::Number(id)) => self.unknown = id as i64,
                (41, Field::Number(id)) => self.begin = id as i64,
                (42, Field::Number(id)) => self.end = id as i64,
                (44, Field::Bytes(text)) => self.unknown_surface = string(text)?,
                _ => {}
            }
        }
        Ok(())
    }

    /// Returns the model as the bytes of a tokenizer.model.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for piece in &self.pieces {
            let mut inner = Vec::new();
            bytes(&mut inner, 1, piece.text.as_bytes());
            inner.push(2 << 3 | 5);
            inner.extend(piece.score.to_le_bytes());
            number(&mut inner, 3, piece.kind.number());
            bytes(&mut out, 1, &inner);
        }
        let mut trainer = Vec::new();
        number(&mut trainer, 3, if self.is_unigram { 1 } else { 2 });
        number(&mut trainer, 24, self.normalizer.whitespace_is_suffix.into());
        number(&mut trainer, 35, self.byte_fallback.into());
        for (field, id) in [(40, self.unknown), (41, self.begin), (42, self.end)] {
            number(&mut trainer, field, id as u64);
        }
        bytes(&mut trainer, 44, self.unknown_surface.as_bytes());
        bytes(&mut out, 2, &trainer);
        let (mut inner, spec) = (Vec::new(), &self.normalizer);
        bytes(&mut inner, 2, &spec.charsmap);
        for (field, flag) in
            [(3, spec.add_dummy_prefix), (4, spec.remove_extra_whitespaces), (5, spec.escape_whitespaces)]
        {
            number(&mut inner, field, flag.into());
        }
        bytes(&mut out, 3, &inner);
        out
    }
}

impl NormalizerSpec {
    fn read(&mut self, bytes: &[u8]) -> Result<(), String> {
        let mut fields = Fields(bytes);
        while let Some(field) = fields.next()? {
            match field {
                (2, Field::Bytes(charsmap)) => self.charsmap = charsmap.to_vec(),
                (3, Field::Number(flag)) => self.add_dummy_prefix = flag != 0,
                (4, Field::Number(flag)) => self.remove_extra_whitespaces = flag != 0,
                (5, Field::Number(flag)) => self.escape_whitespaces = flag != 0,
                _ => {}
            }
        }
        Ok(())
    }
}

impl Piece {
    fn parse(bytes: &[u8]) -> Result<Self, String> {
        let mut piece = Self { text: String::new(), score: 0.0, kind: Kind::Normal };
        let mut fields = Fields(bytes);
        while let Some(field) = fields.next()? {
            match field {
                (1, Field::Bytes(text)) => piece.text = string(text)?,
                (2, Field::Fixed(bits)) => piece.score = f32::from_bits(bits),
                (3, Field::Number(kind)) => {
                    piece.kind = Kind::of(kind).ok_or_else(|| format!("a piece has the unknown type {kind}"))?;
                }
                _ => {}
            }
        }
        if piece.score.is_nan() {
            return Err(format!("the score of piece {:?} is NaN", pricket_nn::clip(&piece.text)));
        }
        Ok(piece)
    }
}

fn string(bytes: &[u8]) -> Result<String, String> {
    String::from_utf8(bytes.to_vec()).map_err(|_| "a piece is not valid UTF-8".into())
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn number(out: &mut Vec<u8>, field: u64, value: u64) {
    varint(out, field << 3);
    varint(out, value);
}

fn bytes(out: &mut Vec<u8>, field: u64, value: &[u8]) {
    varint(out, field << 3 | 2);
    varint(out, value.len() as u64);
    out.extend_from_slice(value);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_comes_back_as_it_was_written() {
        let piece = |text: &str, score, kind| Piece { text: text.into(), score, kind };
        let model = Model {
            pieces: vec![piece("<unk>", 0.0, Kind::Unknown), piece("\u{2581}a", -1.5, Kind::Normal)],
            is_unigram: false,
            byte_fallback: true,
            unknown_surface: " ? ".into(),
            unknown: 0,
            begin: -1,
            end: 300,
            normalizer: NormalizerSpec {
                charsmap: vec![1, 2, 200],
                add_dummy_prefix: false,
                remove_extra_whitespaces: true,
                escape_whitespaces: true,
                whitespace_is_suffix: false,
            },
        };
        assert_eq!(Model::parse(&model.to_bytes()).unwrap(), model);
    }

    #[test]
    fn what_is_no_model_is_an_error() {
        for bytes in [&b""[..], b"{}", b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x02\x0a\x05", b"\x0a\x02\x18\x09"] {
            assert!(Model::parse(bytes).is_err(), "{bytes:?}");
        }
    }
}
