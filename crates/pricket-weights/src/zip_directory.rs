//! A reader of the central directory at the end of a zip file.
//!
//! Zip libraries read the header of every entry to locate its bytes. For a remote file that is one request per entry,
//! and a checkpoint has hundreds of entries. This module reads only the directory (APPNOTE 6.3.10, sections 4.3.12 to
//! 4.3.16), and the header of an entry when its bytes are needed.

use std::collections::BTreeMap;

use crate::error::clip;
use crate::source::Source;
use crate::{Error, Result};

/// Maximum size of a directory in bytes, ten times that of a 20B checkpoint.
const MAX_DIRECTORY: u64 = 4 << 20;

const END: u32 = 0x0605_4b50;
const END_64: u32 = 0x0606_4b50;
const END_64_LOCATOR: u32 = 0x0706_4b50;
const END_LEN: usize = 22;
const LOCATOR_LEN: usize = 20;
const CENTRAL: u32 = 0x0201_4b50;
const LOCAL: u32 = 0x0403_4b50;

/// An entry without compression.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Record {
    /// Offset of the header of the entry.
    header: usize,
    /// Size of the entry in bytes.
    pub(crate) size: usize,
}

/// A reader of little-endian fields.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(n)?;
        self.0 = rest;
        Some(head)
    }

    fn u16(&mut self) -> Option<u64> {
        Some(u16::from_le_bytes(*self.take(2)?.first_chunk()?).into())
    }

    fn u32(&mut self) -> Option<u64> {
        Some(u32::from_le_bytes(*self.take(4)?.first_chunk()?).into())
    }

    fn u64(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(*self.take(8)?.first_chunk()?))
    }

    fn is(&mut self, signature: u32) -> Option<()> {
        (self.u32()? == u64::from(signature)).then_some(())
    }
}

/// Reads the directory. Returns the entries by name, without the leading folder.
pub(crate) fn read(file: &Source) -> Result<BTreeMap<String, Record>> {
    let bad = |what: &str| file.corrupt(format!("not a readable PyTorch zip file: {what}"));
    let (count, size, start) = end(file)?.ok_or_else(|| bad("its directory was not found; it may be truncated"))?;
    if size > MAX_DIRECTORY {
        return Err(bad("its directory is too large"));
    }
    let directory = file.read(usize::try_from(start).unwrap_or(usize::MAX), size as usize)?;
    let mut fields = Fields(&directory);
    let mut records = BTreeMap::new();
    // `count` is not trusted: the loop ends with an error at the end of the directory.
    for _ in 0..count {
        let (name, record) = entry(file, &mut fields)?.ok_or_else(|| bad("its directory ends inside an entry"))?;
        if records.insert(name, record).is_some() {
            return Err(bad("its directory has an entry twice"));
        }
    }
    Ok(records)
}

/// Finds the end record. Returns the number of entries, the size in bytes and the offset of the directory.
fn end(file: &Source) -> Result<Option<(u64, u64, u64)>> {
    // The end record has 22 bytes and a comment. PyTorch writes no comment; other programs may.
    let tail_len = file.len().min(END_LEN + LOCATOR_LEN);
    let mut tail = file.read(file.len() - tail_len, tail_len)?;
    let mut at = tail.len().checked_sub(END_LEN).filter(|&at| tail[at..].starts_with(&END.to_le_bytes()));
    if at.is_none() {
        let tail_len = file.len().min(END_LEN + LOCATOR_LEN + 0xffff);
        tail = file.read(file.len() - tail_len, tail_len)?;
        at = tail.windows(4).rposition(|window| window == END.to_le_bytes());
    }
    let Some(at) = at else { return Ok(None) };
    let parse = || {
        let mut fields = Fields(&tail[at + 4..]);
        fields.take(4)?;
        let (_, count, size, start) = (fields.u16()?, fields.u16()?, fields.u32()?, fields.u32()?);
        Some((count, size, start))
    };
    let Some(small) = parse() else { return Ok(None) };
    if small.0 != 0xffff && small.1 != 0xffff_ffff && small.2 != 0xffff_ffff {
        return Ok(Some(small));
    }
    // A field is at its maximum: a locator before the end record gives the offset of the 64-bit record.
    let locate = || {
        let mut fields = Fields(tail.get(at.checked_sub(LOCATOR_LEN)?..at)?);
        fields.is(END_64_LOCATOR)?;
        fields.take(4)?;
        usize::try_from(fields.u64()?).ok()
    };
    let Some(wide) = locate() else { return Ok(Some(small)) };
    let record = file.read(wide, 56)?;
    let parse = || {
        let mut fields = Fields(&record);
        fields.is(END_64)?;
        fields.take(8 + 2 + 2 + 4 + 4 + 8)?;
        Some((fields.u64()?, fields.u64()?, fields.u64()?))
    };
    Ok(parse())
}

/// Reads the next entry of the directory, or returns `None` if the directory ends inside it.
fn entry(file: &Source, fields: &mut Fields<'_>) -> Result<Option<(String, Record)>> {
    let mut parse = || {
        fields.is(CENTRAL)?;
        fields.take(2 + 2)?;
        let (flags, method) = (fields.u16()?, fields.u16()?);
        fields.take(2 + 2 + 4)?;
        let (packed, size) = (fields.u32()?, fields.u32()?);
        let (name_len, extra_len, comment_len) = (fields.u16()?, fields.u16()?, fields.u16()?);
        fields.take(2 + 2 + 4)?;
        let header = fields.u32()?;
        let name = fields.take(name_len as usize)?;
        let mut sizes = [(size, 0xffff_ffff), (packed, 0xffff_ffff), (header, 0xffff_ffff)];
        let mut extra = Fields(fields.take(extra_len as usize)?);
        fields.take(comment_len as usize)?;
        while let (Some(kind), Some(len)) = (extra.u16(), extra.u16()) {
            let mut field = Fields(extra.take(len as usize)?);
            if kind == 1 {
                // The 64-bit fields replace the fields at their maximum, in this order.
                for (value, full) in &mut sizes {
                    if value == full {
                        *value = field.u64()?;
                    }
                }
            }
        }
        let [(size, _), (packed, _), (header, _)] = sizes;
        Some((String::from_utf8_lossy(name).into_owned(), flags, method, packed, size, header))
    };
    let Some((full, flags, method, packed, size, header)) = parse() else { return Ok(None) };
    let name = full.split_once('/').map_or(&*full, |(_, rest)| rest).to_owned();
    let bad = |what: &str| file.corrupt(format!("zip entry {} {what}", clip(&name)));
    if flags & 1 != 0 {
        return Err(bad("is encrypted, which is not supported"));
    }
    if method != 0 || packed != size {
        return Err(bad("is compressed, which is not supported; PyTorch stores entries without compression"));
    }
    let fits = header.checked_add(30).and_then(|n| n.checked_add(size)).is_some_and(|end| end <= file.len() as u64);
    if !fits {
        return Err(bad(&format!("of {size} bytes exceeds the end of the file")));
    }
    Ok(Some((name, Record { header: header as usize, size: size as usize })))
}

impl Record {
    /// Returns the offset of the bytes. They follow the header of the entry, which gives its own length.
    pub(crate) fn start(&self, file: &Source) -> Result<usize> {
        let header = file.read(self.header, 30)?;
        let parse = || {
            let mut fields = Fields(&header);
            fields.is(LOCAL)?;
            fields.take(22)?;
            let (name_len, extra_len) = (fields.u16()? as usize, fields.u16()? as usize);
            let start = self.header.checked_add(30 + name_len + extra_len)?;
            start.checked_add(self.size).filter(|&end| end <= file.len()).map(|_| start)
        };
        let e = || Error::Corrupt {
            path: file.path().into(),
            what: format!("a zip entry of {} bytes was not found at its offset; it may be truncated", self.size),
        };
        parse().ok_or_else(e)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;
    use zip::write::SimpleFileOptions;
    use zip::{CompressionMethod, ZipWriter};

    use super::*;

    fn written(entries: &[(String, Vec<u8>)], wide: bool, align: u16, comment: &str) -> Vec<u8> {
        let mut zip = ZipWriter::new(std::io::Cursor::new(Vec::new()));
        for (name, bytes) in entries {
            let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
            zip.start_file(format!("archive/{name}"), options.large_file(wide).with_alignment(align)).unwrap();
            zip.write_all(bytes).unwrap();
        }
        zip.set_comment(comment).unwrap();
        zip.finish().unwrap().into_inner()
    }

    fn opened(bytes: Vec<u8>) -> Source {
        Source::Embedded(bytes.leak())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Reads files of another library: with and without 64-bit sizes, alignment and comments.
        #[test]
        fn every_entry_is_where_it_was_written(
            sizes in proptest::collection::vec(0usize..300, 0..20),
            wide: bool,
            align in proptest::sample::select(vec![1u16, 64]),
            comment in "[a-z]{0,40}",
        ) {
            let entries: Vec<(String, Vec<u8>)> =
                sizes.iter().enumerate().map(|(i, &n)| (format!("data/{i}"), vec![i as u8; n])).collect();
            let file = opened(written(&entries, wide, align, &comment));
            let records = read(&file).unwrap();
            prop_assert_eq!(records.len(), entries.len());
            for (name, bytes) in &entries {
                let record = records[name];
                prop_assert_eq!(&*file.read(record.start(&file).unwrap(), record.size).unwrap(), &bytes[..]);
            }
        }

        /// Damaged files give entries inside the file or an error, never a panic.
        #[test]
        fn damage_is_read_or_refused(at in 0usize..2000, to: u8, cut in 0usize..600) {
            let entries = [("data.pkl".to_owned(), vec![1; 200]), ("data/0".to_owned(), vec![2; 100])];
            let mut bytes = written(&entries, true, 1, "");
            let at = at % bytes.len();
            bytes[at] = to;
            bytes.truncate(bytes.len() - cut.min(bytes.len()));
            let file = opened(bytes);
            if let Ok(records) = read(&file) {
                for record in records.values() {
                    if let Ok(start) = record.start(&file) {
                        prop_assert!(start + record.size <= file.len());
                    }
                }
            }
        }
    }

    #[test]
    fn a_packed_entry_is_refused() {
        let mut zip = ZipWriter::new(std::io::Cursor::new(Vec::new()));
        zip.start_file("a/data.pkl", SimpleFileOptions::default().compression_method(CompressionMethod::Stored))
            .unwrap();
        zip.write_all(&[1; 100]).unwrap();
        let mut bytes = zip.finish().unwrap().into_inner();
        // Changes the compression method of the only entry in the directory.
        let at = bytes.windows(4).rposition(|window| window == CENTRAL.to_le_bytes()).unwrap() + 10;
        bytes[at] = 8;
        assert!(read(&opened(bytes)).unwrap_err().to_string().contains("compressed"));
    }
}
