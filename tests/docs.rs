//! The documents: their commands run, their links lead somewhere, and the table of contents is complete.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::common::{files, root};

/// The documents of the repository that readers follow.
fn documents() -> Vec<PathBuf> {
    let mut out = vec![root().join("README.md"), root().join("CONTRIBUTING.md"), root().join("crates/README.md")];
    out.extend(files(&root().join("docs")).into_iter().filter(|path| path.extension().is_some_and(|end| end == "md")));
    out
}

/// The lines of the `sh` blocks of a document.
fn commands(document: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(document).unwrap();
    let blocks = text.split("```sh\n").skip(1).map(|rest| rest.split("```").next().unwrap().to_owned());
    blocks.flat_map(|block| block.lines().map(str::to_owned).collect::<Vec<_>>()).collect()
}

/// Splits a command into words, with double quotes around words that have spaces.
fn words(command: &str) -> Vec<String> {
    let mut out = vec![String::new()];
    let mut is_quoted = false;
    for c in command.chars() {
        match c {
            '"' => is_quoted = !is_quoted,
            ' ' if !is_quoted => out.push(String::new()),
            c => out.last_mut().unwrap().push(c),
        }
    }
    out.retain(|word| !word.is_empty());
    out
}

/// Every command of the documents succeeds as it is written, in the order of its page. Models of the Hub come from a local server.
#[cfg(unix)]
#[test]
fn commands_run_as_written() {
    use crate::common::{example, tiny_steps};
    use crate::world::World;

    let mut repo = pricket_testhub::Repo::default();
    for (branch, step) in [
        ("main", "step4000"),
        ("step0", "step0"),
        ("step1", "step1"),
        ("step1000", "step1000"),
        ("step3000", "step512"),
    ] {
        let commit = repo.commit_directory(&tiny_steps().join(step)).unwrap();
        repo.branch(branch, &commit);
    }
    let world = World::new([("EleutherAI/pythia-70m", repo)]);
    let mut failures = Vec::new();
    let mut count = 0;
    for document in documents() {
        let directory = tempfile::tempdir().unwrap();
        for entry in ["README.md", "CONTRIBUTING.md", "docs", "models", "tests"] {
            std::os::unix::fs::symlink(root().join(entry), directory.path().join(entry)).unwrap();
        }
        for command in commands(&document) {
            let words = words(&command);
            assert_eq!(words[0], "cargo", "{}: {command}: expected a cargo command", document.display());
            // The gate runs the tests themselves, and the example that needs another feature.
            if words[1] == "test" || words.iter().any(|word| word == "candle-transformers") {
                continue;
            }
            assert_eq!(words[1..3], ["run", "--example"], "{}: {command}", document.display());
            let args = words.iter().skip_while(|word| *word != "--").skip(1);
            let output = example(&words[3])
                .args(args)
                .current_dir(directory.path())
                .env("HF_ENDPOINT", world.server.url())
                .env("HF_HUB_CACHE", world.cache.path())
                .env_remove("HF_TOKEN")
                .stdin(std::process::Stdio::null())
                .output()
                .unwrap();
            count += 1;
            if !output.status.success() {
                let said = String::from_utf8_lossy(&output.stderr).into_owned();
                failures.push(format!("{}: {command}\n{}: {said}", document.display(), output.status));
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert!(count >= 40, "{count} commands");
}

/// The anchor of a heading, as GitHub and mdBook make it.
fn anchor(heading: &str) -> String {
    let is_kept = |c: &char| c.is_alphanumeric() || [' ', '-', '_'].contains(c);
    heading.to_lowercase().chars().filter(is_kept).map(|c| if c == ' ' { '-' } else { c }).collect()
}

fn anchors(document: &Path) -> BTreeSet<String> {
    let text = std::fs::read_to_string(document).unwrap();
    let mut is_code = false;
    let is_heading = |line: &&str| {
        is_code ^= line.starts_with("```");
        !is_code && line.starts_with('#')
    };
    text.lines().filter(is_heading).map(|line| anchor(line.trim_start_matches('#').trim())).collect()
}

/// Relative links of the documents lead to files, and to headings that exist.
#[test]
fn links_lead_somewhere() {
    let mut broken = Vec::new();
    let mut count = 0;
    for document in documents() {
        let text = std::fs::read_to_string(&document).unwrap();
        for (at, _) in text.match_indices("](") {
            let target = text[at + 2..].split(')').next().unwrap().trim();
            if target.starts_with("http") || target.contains(['\n', ' ']) {
                continue;
            }
            let (file, heading) = target.split_once('#').unwrap_or((target, ""));
            let path = if file.is_empty() { document.clone() } else { document.parent().unwrap().join(file) };
            count += 1;
            let is_good = path.exists() && (heading.is_empty() || anchors(&path).contains(heading));
            if !is_good {
                broken.push(format!("{}: {target}", document.display()));
            }
        }
    }
    assert!(broken.is_empty(), "{}", broken.join("\n"));
    assert!(count >= 50, "{count} links");
}

#[test]
fn every_page_is_in_the_table_of_contents() {
    let summary = std::fs::read_to_string(root().join("docs/SUMMARY.md")).unwrap();
    for document in files(&root().join("docs")) {
        let name = document.file_name().unwrap().to_string_lossy().into_owned();
        if document.extension().is_some_and(|end| end == "md") && name != "SUMMARY.md" {
            assert!(summary.contains(&format!("({name})")), "{name} is not in docs/SUMMARY.md");
        }
    }
}
