//! Names of checkpoints in numbered files: `model-00001-of-00003.safetensors`, as in transformers and llama.cpp.

/// Maximum number of parts, more than any checkpoint has.
const MAX_PARTS: u32 = 4096;

/// The parsed file name of a numbered part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part<'a> {
    stem: &'a str,
    extension: &'a str,
    /// Number of this part, from 1.
    pub(crate) number: u32,
    /// Number of all parts.
    pub(crate) count: u32,
}

impl<'a> Part<'a> {
    /// Parses `STEM-00001-of-00003.EXTENSION`. Returns `None` for other names.
    pub(crate) fn of(name: &'a str) -> Option<Self> {
        let (rest, extension) = name.rsplit_once('.')?;
        let (rest, count) = rest.rsplit_once("-of-")?;
        let (stem, number) = rest.rsplit_once('-')?;
        let digits = |text: &str| {
            (text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit()))
                .then(|| text.parse::<u32>().ok())
                .flatten()
        };
        let (number, count) = (digits(number)?, digits(count)?);
        (number >= 1 && number <= count && count <= MAX_PARTS).then_some(Self { stem, extension, number, count })
    }

    fn name(&self, number: u32) -> String {
        format!("{}-{number:05}-of-{:05}.{}", self.stem, self.count, self.extension)
    }

    /// Returns the file names of all parts, in order.
    pub(crate) fn names(&self) -> Vec<String> {
        (1..=self.count).map(|number| self.name(number)).collect()
    }
}

/// Returns the file names of all parts of a checkpoint, in order, given the name of one part. Returns `None` for a file
/// that is not split.
///
/// ```
/// let parts = pricket_weights::parts_of("model-00002-of-00002.safetensors").unwrap();
/// assert_eq!(parts, ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]);
/// assert_eq!(pricket_weights::parts_of("model.safetensors"), None);
/// assert_eq!(pricket_weights::parts_of("model-00001-of-00001.safetensors"), None);
/// ```
pub fn parts_of(name: &str) -> Option<Vec<String>> {
    Part::of(name).filter(|part| part.count > 1).map(|part| part.names())
}

/// Keeps one name for each checkpoint: the first of its parts in `names`.
pub(crate) fn representatives<'a>(names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut seen = std::collections::BTreeSet::new();
    names
        .filter(|name| Part::of(name).is_none_or(|part| seen.insert((part.stem, part.count, part.extension))))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_parts_are_told_from_others() {
        let part = Part::of("a-of-b-00003-of-00012.gguf").unwrap();
        assert_eq!((part.stem, part.extension, part.number, part.count), ("a-of-b", "gguf", 3, 12));
        for other in [
            "a-00000-of-00002.bin",
            "a-00003-of-00002.bin",
            "a-1-of-2.bin",
            "a-00001-of-99999.bin",
            "a.bin",
            "00001-of-00002.bin",
        ] {
            assert_eq!(Part::of(other), None, "{other}");
        }
        let names = ["a-00001-of-00002.gguf", "a-00002-of-00002.gguf", "b.gguf", "a-00001-of-00003.gguf"];
        assert_eq!(representatives(names.into_iter()), ["a-00001-of-00002.gguf", "b.gguf", "a-00001-of-00003.gguf"]);
    }
}
