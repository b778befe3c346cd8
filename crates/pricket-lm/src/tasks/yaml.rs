//! YAML parser with a limit on the expanded size, since repeated aliases can expand a small file to a huge value.

use std::cell::Cell;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, EnumAccess, Error, MapAccess, SeqAccess, VariantAccess, Visitor};
use yaml_serde::Value;

/// Maximum number of values in a file after the expansion of aliases. Each byte of a string counts as another value.
const MAX_VALUES: usize = 16 << 20;

/// Parses a YAML text.
pub(super) fn parse(text: &str) -> Result<Value, String> {
    let left = Cell::new(MAX_VALUES);
    Count(&left).deserialize(yaml_serde::Deserializer::from_str(text)).map_err(|e| e.to_string())?;
    yaml_serde::from_str(text).map_err(|e| e.to_string())
}

/// Counts the values of a document without storing them. Holds the number of values that remain.
struct Count<'a>(&'a Cell<usize>);

impl Count<'_> {
    fn add<E: Error>(&self, count: usize) -> Result<(), E> {
        let left = self.0.get().checked_sub(count + 1);
        let left = left.ok_or_else(|| E::custom(format!("the file expands to more than {MAX_VALUES} values")))?;
        self.0.set(left);
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for Count<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Count<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<(), E> {
        self.add(0)
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<(), E> {
        self.add(0)
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<(), E> {
        self.add(0)
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<(), E> {
        self.add(0)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<(), E> {
        self.add(text.len())
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        self.add(0)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        self.add(0)?;
        while items.next_element_seed(Count(self.0))?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<(), A::Error> {
        self.add(0)?;
        while entries.next_key_seed(Count(self.0))?.is_some() {
            entries.next_value_seed(Count(self.0))?;
        }
        Ok(())
    }

    fn visit_enum<A: EnumAccess<'de>>(self, tagged: A) -> Result<(), A::Error> {
        self.add(0)?;
        let ((), value) = tagged.variant_seed(Count(self.0))?;
        value.newtype_variant_seed(self)
    }
}
