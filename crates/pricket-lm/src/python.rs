//! Parts of Python that lm-evaluation-harness relies on: random numbers, string methods and literals.

mod literal;

use rand_mt::Mt;

pub(crate) use literal::{literal_eval, repr, text};

/// Python's `random.Random(seed)`: the Mersenne Twister with the derived functions of Python's standard library.
#[derive(Clone, Debug)]
pub(crate) struct Random(Mt);

impl Random {
    pub(crate) fn new(seed: u32) -> Self {
        Self(Mt::new_with_key([seed]))
    }

    /// Implements `random()`: returns a number in `[0, 1)` with 53 random bits.
    pub(crate) fn random(&mut self) -> f64 {
        let (high, low) = (self.0.next_u32() >> 5, self.0.next_u32() >> 6);
        (f64::from(high) * 67_108_864.0 + f64::from(low)) / 9_007_199_254_740_992.0
    }

    /// Implements `randrange(n)`, for `n` from 1 to 2³².
    fn below(&mut self, n: usize) -> usize {
        let bits = usize::BITS - n.leading_zeros();
        loop {
            let drawn = (self.0.next_u32() >> (32 - bits.min(32))) as usize;
            if drawn < n {
                return drawn;
            }
        }
    }

    /// Implements `sample(range(n), k)`, for `k` up to `n`.
    pub(crate) fn sample(&mut self, n: usize, k: usize) -> Vec<usize> {
        // Python's rule for the choice between a partial shuffle and a set of the drawn numbers.
        let mut set_size = 21;
        if k > 5 {
            set_size += 4usize.pow((k as f64 * 3.0).log(4.0).ceil() as u32);
        }
        if n <= set_size {
            let mut pool: Vec<usize> = (0..n).collect();
            return (0..k)
                .map(|i| {
                    let j = self.below(n - i);
                    let last = pool[n - i - 1];
                    std::mem::replace(&mut pool[j], last)
                })
                .collect();
        }
        let mut taken = std::collections::HashSet::new();
        let mut draw = || loop {
            let j = self.below(n);
            if taken.insert(j) {
                return j;
            }
        };
        (0..k).map(|_| draw()).collect()
    }

    /// Implements a single draw of `choices(range(n))`.
    pub(crate) fn choice(&mut self, n: usize) -> usize {
        (self.random() * n as f64) as usize
    }
}

/// Implements `str.isspace` for a character.
pub(crate) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// Implements `str.capitalize`.
pub(crate) fn capitalize(text: &str) -> String {
    let Some(first) = text.chars().next() else { return String::new() };
    // Lowercases the whole text, since the lowercase form of a sigma depends on the preceding letters.
    let lower = text.to_lowercase();
    let rest: String = lower.chars().skip(first.to_lowercase().count()).collect();
    title(first) + &rest
}

/// Returns the title case of a letter. It differs from the upper case for digraphs and for letters such as the Georgian
/// ones.
fn title(letter: char) -> String {
    let moved = |by: i32| char::from_u32((letter as i32 + by) as u32).unwrap_or(letter).to_string();
    match letter {
        'Ǆ' | 'ǅ' | 'ǆ' => "ǅ".into(),
        'Ǉ' | 'ǈ' | 'ǉ' => "ǈ".into(),
        'Ǌ' | 'ǋ' | 'ǌ' => "ǋ".into(),
        'Ǳ' | 'ǲ' | 'ǳ' => "ǲ".into(),
        'ŉ' => "ʼN".into(),
        // Greek letters with an iota subscript.
        '\u{1f80}'..='\u{1f87}' | '\u{1f90}'..='\u{1f97}' | '\u{1fa0}'..='\u{1fa7}' => moved(8),
        '\u{1fb3}' | '\u{1fc3}' | '\u{1ff3}' => moved(9),
        // Greek title-case letters, and Georgian letters, whose capitals are used only in text that is all capitals.
        '\u{1f88}'..='\u{1f8f}'
        | '\u{1f98}'..='\u{1f9f}'
        | '\u{1fa8}'..='\u{1faf}'
        | '\u{1fbc}'
        | '\u{1fcc}'
        | '\u{1ffc}'
        | '\u{10d0}'..='\u{10ff}' => letter.to_string(),
        _ => {
            let mut upper = letter.to_uppercase();
            upper.next().into_iter().chain(upper.flat_map(char::to_lowercase)).collect()
        }
    }
}

/// Returns the number that Python's `float` makes of a text, or `None` if it refuses the text.
pub(crate) fn float(text: &str) -> Option<f64> {
    let text = text.trim_matches(is_space);
    // Underscores may stand between digits.
    let is_digit = |c: Option<&u8>| c.is_some_and(u8::is_ascii_digit);
    let bytes = text.as_bytes();
    let misplaced = |(i, &c): (usize, &u8)| {
        c == b'_' && !(is_digit(i.checked_sub(1).and_then(|i| bytes.get(i))) && is_digit(bytes.get(i + 1)))
    };
    if bytes.iter().enumerate().any(misplaced) {
        return None;
    }
    text.replace('_', "").parse().ok()
}

/// Returns Python's `repr` of a float.
pub(crate) fn float_repr(x: f64) -> String {
    match x {
        _ if x.is_finite() => repr(&x.into()),
        _ if x.is_nan() => "nan".into(),
        _ => if x > 0.0 { "inf" } else { "-inf" }.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Expected values are from CPython 3.11.
    #[test]
    fn random_numbers_are_pythons() {
        let mut random = Random::new(1234);
        assert_eq!(random.sample(12, 3), [7, 1, 0]);
        assert_eq!(random.sample(12, 3), [1, 9, 0]);
        assert_eq!(random.sample(16_000, 4), [11002, 11355, 1375, 1612]);
        assert_eq!(random.sample(100, 12), [98, 45, 30, 2, 3, 44, 82, 79, 61, 78, 59, 19]);
        assert_eq!(Random::new(0).random(), 0.844_421_851_525_048_1);
        let mut random = Random::new(0);
        assert_eq!((0..6).map(|_| random.choice(48)).collect::<Vec<_>>(), [40, 36, 20, 12, 24, 19]);
    }

    #[test]
    fn strings_are_pythons() {
        assert_eq!(capitalize("then THE man"), "Then the man");
        assert_eq!(capitalize("ßa"), "Ssa");
        assert_eq!(capitalize(""), "");
        assert_eq!(capitalize("ǆ OR"), "ǅ or");
        assert_eq!(capitalize("AΣ"), "Aς");
        assert_eq!(capitalize("İA"), "İa");
        assert!(is_space('\x1f') && is_space('\u{a0}') && !is_space('\u{200b}'));
    }
}
