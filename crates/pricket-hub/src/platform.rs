//! Functions that differ between operating systems: symbolic links, lock files, and reads and writes at offsets.

use std::fs::{File, Metadata};
use std::io::Result;
use std::path::Path;

pub(crate) use imp::{bytes_on_disk, read_exact_at, same_file, share_with_group, symlink, write_all_at};

#[cfg(unix)]
mod imp {
    use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};

    use super::{File, Metadata, Path, Result};

    /// Creates the symbolic link `pointer` to `target`.
    pub(crate) fn symlink(target: &str, pointer: &Path) -> Result<()> {
        std::os::unix::fs::symlink(target, pointer)
    }

    /// Lets members of the group write to the file, so that users who share a cache can use its locks. Python does the
    /// same.
    pub(crate) fn share_with_group(file: &File) {
        let _ = file.set_permissions(std::fs::Permissions::from_mode(0o664));
    }

    /// Returns whether `path` names the open file.
    pub(crate) fn same_file(file: &File, path: &Path) -> bool {
        let inode = |meta: Result<Metadata>| meta.ok().map(|meta| (meta.dev(), meta.ino()));
        inode(file.metadata()).is_some_and(|ours| inode(std::fs::metadata(path)) == Some(ours))
    }

    /// Returns the bytes that a file takes on disk, without holes.
    pub(crate) fn bytes_on_disk(meta: &Metadata) -> u64 {
        meta.blocks() * 512
    }

    /// Writes all bytes at offset `at`, independent of the file position.
    pub(crate) fn write_all_at(file: &File, bytes: &[u8], at: u64) -> Result<()> {
        FileExt::write_all_at(file, bytes, at)
    }

    /// Fills `bytes` from offset `at`, independent of the file position.
    pub(crate) fn read_exact_at(file: &File, bytes: &mut [u8], at: u64) -> Result<()> {
        FileExt::read_exact_at(file, bytes, at)
    }
}

#[cfg(windows)]
mod imp {
    use std::os::windows::fs::FileExt;

    use super::{File, Metadata, Path, Result};

    /// Always fails: links need a privilege that few users have, so snapshots hold the files themselves, as with
    /// Python.
    pub(crate) fn symlink(_: &str, _: &Path) -> Result<()> {
        Err(std::io::ErrorKind::Unsupported.into())
    }

    pub(crate) fn share_with_group(_: &File) {}

    /// Returns true: on Windows an open file cannot be deleted.
    pub(crate) fn same_file(_: &File, _: &Path) -> bool {
        true
    }

    /// Returns the length of the file, since the size on disk is not part of the metadata.
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
