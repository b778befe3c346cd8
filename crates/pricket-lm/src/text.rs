//! Streaming of generated text, with stop strings.

use crate::{TextDecoder, Tokenizer};

/// Decoder of the ids of one row that detects stop strings, also across token boundaries.
///
/// Text that may be the beginning of a stop string is held back until the following tokens decide. The stop string
/// itself is never emitted. The caller ends the row when [`TextStream::stopped`] returns true.
#[derive(Clone, Debug)]
pub struct TextStream {
    decoder: TextDecoder,
    stop: Vec<String>,
    held: String,
    stopped: bool,
}

impl TextStream {
    /// Creates a stream for text that continues a prompt and ends at one of `stop`. Empty stop strings are ignored.
    pub fn new(tokenizer: &Tokenizer, stop: &[String]) -> Self {
        let stop = stop.iter().filter(|s| !s.is_empty()).cloned().collect();
        Self { decoder: tokenizer.decoder_of_part(), stop, held: String::new(), stopped: false }
    }

    /// Adds a token and returns the text that can be emitted after it, which may be empty.
    pub fn push(&mut self, id: u32) -> String {
        if self.stopped {
            return String::new();
        }
        if !self.decoder_skips(id) {
            let text = self.decoder.push(id);
            self.held.push_str(&text);
        }
        if let Some(at) = self.stop.iter().filter_map(|s| self.held.find(s.as_str())).min() {
            self.stopped = true;
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        let keep = self.stop.iter().map(|s| overlap(&self.held, s)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        std::mem::replace(&mut self.held, rest)
    }

    /// Returns the text that was held back. Call it at the end of the row.
    pub fn finish(&mut self) -> String {
        if !self.stopped {
            let text = self.decoder.finish();
            self.held.push_str(&text);
        }
        std::mem::take(&mut self.held)
    }

    /// Returns the text that was held back, without an ending that may be the beginning of a stop string. Call it
    /// instead of [`TextStream::finish`] for a row that was cut off.
    pub fn finish_cut(&mut self) -> String {
        let mut text = self.finish();
        let keep = self.stop.iter().map(|s| overlap(&text, s)).max().unwrap_or(0);
        text.truncate(text.len() - keep);
        text
    }

    /// Returns whether the text has reached a stop string.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    fn decoder_skips(&self, id: u32) -> bool {
        // Special tokens are not text. An exception is a special token that is itself a stop string.
        self.decoder.is_special(id) && !self.stop.iter().any(|s| s.as_bytes() == self.decoder.bytes(id))
    }
}

/// Returns the length in bytes of the longest ending of `text` that is a beginning of `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    let longest = stop.len().min(text.len());
    (1..=longest)
        .rev()
        .find(|&n| stop.is_char_boundary(n) && text.as_bytes().ends_with(&stop.as_bytes()[..n]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::{TextStream, overlap};
    use crate::Tokenizer;

    #[test]
    fn a_row_that_is_cut_ends_before_the_first_part_of_a_stop_string() {
        let words: Vec<Vec<u8>> = ["a", "<", "h"].map(|word| word.as_bytes().to_vec()).to_vec();
        let tokenizer = Tokenizer::from_vocabulary(&words, &[], &[], "test").unwrap();
        let end = |ids: &[u32], cut: bool| {
            let mut stream = TextStream::new(&tokenizer, &["<human>".to_owned(), "ab".to_owned()]);
            let text: String = ids.iter().map(|&id| stream.push(id)).collect();
            text + &if cut { stream.finish_cut() } else { stream.finish() }
        };
        assert_eq!((end(&[2, 1, 2], true).as_str(), end(&[2, 1, 2], false).as_str()), ("h", "h<h"));
        assert_eq!((end(&[1, 0], true).as_str(), end(&[1, 2, 1], true).as_str()), ("<", "<h"));
        assert_eq!(end(&[2, 2], true), "hh");
    }

    #[test]
    fn overlap_is_the_longest_beginning_of_the_stop_string() {
        assert_eq!(overlap("one <hum", "<human>"), 4);
        assert_eq!(overlap("<<<", "<<human>"), 2);
        assert_eq!(overlap("abc", "xyz"), 0);
        assert_eq!(overlap("caf\u{e9}", "\u{e9}\u{e9}"), 2);
    }
}
