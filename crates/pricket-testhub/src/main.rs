//! Serves directories as repositories: `pricket-testhub owner/name=DIRECTORY ...`.
//!
//! Every subdirectory of DIRECTORY is a branch. The program prints its URL and runs until it is stopped. `--random
//! owner/name=FILESxBYTES` serves a repository of random files; `--rate BYTES` limits the bytes per second.

use std::path::Path;

use pricket_testhub::{Content, Repo, TestHub};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let hub = TestHub::start();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        if argument == "--rate" {
            hub.throttle(arguments.next().ok_or("--rate needs a value")?.parse()?);
            continue;
        }
        let random = argument == "--random";
        let argument = if random { arguments.next().ok_or("--random needs a value")? } else { argument };
        let (id, what) = argument.split_once('=').ok_or("expected owner/name=DIRECTORY or owner/name=FILESxBYTES")?;
        let mut repo = Repo::default();
        if random {
            let (files, bytes) = what.split_once('x').ok_or("expected FILESxBYTES")?;
            let (files, bytes): (u64, usize) = (files.parse()?, bytes.parse()?);
            let named: Vec<(String, Content)> =
                (0..files).map(|i| (format!("model-{i}.safetensors"), Content::lfs(noise(i, bytes)))).collect();
            let commit = repo.commit(named.iter().map(|(name, content)| (name.as_str(), content.clone())));
            repo.branch("main", &commit);
        } else {
            for entry in std::fs::read_dir(Path::new(what))?.flatten().filter(|entry| entry.path().is_dir()) {
                let commit = repo.commit_directory(&entry.path())?;
                repo.branch(&entry.file_name().to_string_lossy(), &commit);
            }
        }
        hub.add(id, repo);
    }
    println!("{}", hub.url());
    loop {
        std::thread::park();
    }
}

/// Returns reproducible random bytes, which cannot be compressed.
fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out = Vec::with_capacity(bytes + 8);
    while out.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(bytes);
    out
}
