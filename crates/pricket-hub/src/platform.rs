//! What systems do in ways of their own: links, locks' files, places in files. Nothing else in this crate asks which system it
//! is on.

use std::fs::{File, Metadata};
use std::io::Result;
use std::path::Path;

pub(crate) use imp::{bytes_on_disk, read_exact_at, same_file, share_with_group, symlink, write_all_at};

#[cfg(unix)]
mod imp {
    use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};

    use super::{File, Metadata, Path, Result};

    /// Makes `pointer` a link to `target`; `Unsupported` where there are none.
    pub(crate) fn symlink(target: &str, pointer: &Path) -> Result<()> {
        std::os::unix::fs::symlink(target, pointer)
    }

    /// Members of the group wait for each other on a cache that they share, as Python has it.
    pub(crate) fn share_with_group(file: &File) {
        let _ = file.set_permissions(std::fs::Permissions::from_mode(0o664));
    }

    /// Whether the file of this name is the one that is open.
    pub(crate) fn same_file(file: &File, path: &Path) -> bool {
        let inode = |meta: Result<Metadata>| meta.ok().map(|meta| (meta.dev(), meta.ino()));
        inode(file.metadata()).is_some_and(|ours| inode(std::fs::metadata(path)) == Some(ours))
    }

    /// What a file takes, holes left out where that can be told.
    pub(crate) fn bytes_on_disk(meta: &Metadata) -> u64 {
        meta.blocks() * 512
    }

    /// Writes at a place, whatever the place of the file is.
    pub(crate) fn write_all_at(file: &File, bytes: &[u8], at: u64) -> Result<()> {
        FileExt::write_all_at(file, bytes, at)
    }

    /// Reads at a place, whatever the place of the file is.
    pub(crate) fn read_exact_at(file: &File, bytes: &mut [u8], at: u64) -> Result<()> {
        FileExt::read_exact_at(file, bytes, at)
    }
}

#[cfg(windows)]
mod imp {
    use std::os::windows::fs::FileExt;

    use super::{File, Metadata, Path, Result};

    /// Links need a privilege that few users have: the files themselves lie in the snapshots, as with Python.
    pub(crate) fn symlink(_: &str, _: &Path) -> Result<()> {
        Err(std::io::ErrorKind::Unsupported.into())
    }

    pub(crate) fn share_with_group(_: &File) {}

    /// An open file cannot be deleted.
    pub(crate) fn same_file(_: &File, _: &Path) -> bool {
        true
    }

    pub(crate) fn bytes_on_disk(meta: &Metadata) -> u64 {
        meta.len()
    }

    pub(crate) fn write_all_at(file: &File, mut bytes: &[u8], mut at: u64) -> Result<()> {
        while !bytes.is_empty() {
            let n = file.seek_write(bytes, at)?;
            (bytes, at) = (&bytes[n..], at + n as u64);
        }
        Ok(())
    }

    pub(crate) fn read_exact_at(file: &File, mut bytes: &mut [u8], mut at: u64) -> Result<()> {
        while !bytes.is_empty() {
            let n = file.seek_read(bytes, at)?;
            if n == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            (bytes, at) = (&mut bytes[n..], at + n as u64);
        }
        Ok(())
    }
}
