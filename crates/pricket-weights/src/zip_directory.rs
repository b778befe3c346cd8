//! The directory of a zip file, which is at its end: where each entry lies, without a look at the entries.
//!
//! The zip libraries read the header of every entry to say where its bytes are. That costs nothing in a file on disk and a
//! request each in one that is not, and a checkpoint has hundreds; so this reads the directory alone (APPNOTE 6.3.10,
//! sections 4.3.12 to 4.3.16) and an entry's own header when its bytes are wanted.

use std::collections::BTreeMap;

use crate::error::clip;
use crate::source::Source;
use crate::{Error, Result};

/// Bytes of a directory that is read: that of a 20B checkpoint takes a tenth.
const MAX_DIRECTORY: u64 = 4 << 20;

const END: u32 = 0x0605_4b50;
const END_64: u32 = 0x0606_4b50;
const END_64_LOCATOR: u32 = 0x0706_4b50;
const END_LEN: usize = 22;
const LOCATOR_LEN: usize = 20;
const CENTRAL: u32 = 0x0201_4b50;
const LOCAL: u32 = 0x0403_4b50;

/// An entry that is stored plain.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Record {
    header: usize,
    /// Bytes of the entry.
    pub(crate) size: usize,
}

/// Little-endian fields of a record.
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

/// Every entry by its name without the leading folder.
pub(crate) fn read(file: &Source) -> Result<BTreeMap<String, Record>> {
    let bad = |what: &str| file.corrupt(format!("not a readable PyTorch zip file: {what}"));
    let (count, size, start) = end(file)?.ok_or_else(|| bad("its directory is not where its end says, or cut off"))?;
    if size > MAX_DIRECTORY {
        return Err(bad("its directory is out of all proportion"));
    }
    let directory = file.read(usize::try_from(start).unwrap_or(usize::MAX), size as usize)?;
    let mut fields = Fields(&directory);
    let mut records = BTreeMap::new();
    // The directory's size bounds the entries, whatever their number is said to be.
    for _ in 0..count {
        let (name, record) = entry(file, &mut fields)?.ok_or_else(|| bad("its directory ends inside an entry"))?;
        if records.insert(name, record).is_some() {
            return Err(bad("its directory names an entry twice"));
        }
    }
    Ok(records)
}

/// Entries, bytes and place of the directory.
fn end(file: &Source) -> Result<Option<(u64, u64, u64)>> {
    // The end is 22 bytes and a comment, which PyTorch does not write and others may.
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
    // Too large for these fields: a locator before the end says where the wide ones are.
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
                // The wide fields stand for those that are full, in this order.
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
        return Err(bad("is encrypted; PyTorch stores its entries plain"));
    }
    if method != 0 || packed != size {
        return Err(bad("is compressed; PyTorch stores its entries plain"));
    }
    let fits = header.checked_add(30).and_then(|n| n.checked_add(size)).is_some_and(|end| end <= file.len() as u64);
    if !fits {
        return Err(bad(&format!("claims {size} bytes and the file is shorter")));
    }
    Ok(Some((name, Record { header: header as usize, size: size as usize })))
}

impl Record {
    /// Where the bytes begin: after the entry's own header, whose length only it knows.
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
            what: format!("a zip entry of {} bytes is not where the directory says, or cut off", self.size),
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

        /// What another library writes, with wide sizes or not, aligned or not, with a comment or not.
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

        /// Whatever is changed or cut off, the answer is an answer.
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
        // The method of the only entry of the directory.
        let at = bytes.windows(4).rposition(|window| window == CENTRAL.to_le_bytes()).unwrap() + 10;
        bytes[at] = 8;
        assert!(read(&opened(bytes)).unwrap_err().to_string().contains("compressed"));
    }
}
