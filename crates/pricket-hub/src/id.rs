//! Ids of repositories and names of revisions.

use std::fmt;
use std::str::FromStr;

use crate::{Error, Result};

/// Prefix of dataset ids, as in the URLs of the Hub.
const DATASETS: &str = "datasets/";

/// The id of a repository: `owner/name` for models, `datasets/owner/name` for datasets. Some old models have a bare
/// `name`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RepoId(String);

impl RepoId {
    /// Returns the id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the name of its folder in a cache, such as `models--owner--name`.
    pub fn folder(&self) -> String {
        self.known().folder_name()
    }

    /// Returns whether this is the id of a dataset.
    pub fn is_dataset(&self) -> bool {
        self.0.starts_with(DATASETS)
    }

    /// Returns its path in the Hub's API, such as `models/owner/name`.
    pub(crate) fn api(&self) -> String {
        if self.is_dataset() { self.0.clone() } else { format!("models/{}", self.0) }
    }

    /// Converts the id for `hf-hub`, which defines the layout of the cache.
    pub(crate) fn known(&self) -> hf_hub::Repo {
        match self.0.strip_prefix(DATASETS) {
            Some(name) => hf_hub::Repo::dataset(name.into()),
            None => hf_hub::Repo::model(self.0.clone()),
        }
    }

    /// Parses the name of a cache folder, the inverse of [`RepoId::folder`]. Returns `None` for any other name.
    pub fn from_folder(folder: &str) -> Option<Self> {
        match folder.strip_prefix("datasets--") {
            Some(name) => format!("{DATASETS}{}", name.replace("--", "/")).parse().ok(),
            None => folder.strip_prefix("models--")?.replace("--", "/").parse().ok(),
        }
    }
}

impl fmt::Display for RepoId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for RepoId {
    type Err = Error;

    /// Parses an id by the rules of the Hub. Valid ids cannot lead outside the cache directory.
    ///
    /// # Errors
    /// Returns [`Error::Input`] if `text` is not a valid id.
    fn from_str(text: &str) -> Result<Self> {
        let part = |part: &str| {
            !part.is_empty()
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
                && !part.starts_with(['-', '.'])
                && !part.ends_with(['-', '.'])
        };
        let name = text.strip_prefix(DATASETS).unwrap_or(text);
        let good = name.len() <= 96
            && !name.contains("--")
            && !name.contains("..")
            && name.split('/').count() <= 2
            && name.split('/').all(part);
        if good {
            Ok(Self(text.into()))
        } else {
            Err(Error::Input(format!("{text:?} is not a valid repository id; expected owner/name")))
        }
    }
}

/// A repository and a revision: `owner/name@revision`. The revision is `main` if the text has none.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ModelId {
    /// The repository.
    pub repo: RepoId,
    /// Branch, tag or commit.
    pub revision: String,
}

impl ModelId {
    /// Creates an id from a repository and the name of a revision.
    ///
    /// # Errors
    /// Returns [`Error::Input`] if `revision` is not a valid name in git.
    pub fn new(repo: RepoId, revision: impl Into<String>) -> Result<Self> {
        let revision = revision.into();
        if is_revision(&revision) {
            Ok(Self { repo, revision })
        } else {
            Err(Error::Input(format!("{revision:?} is not a valid revision; expected a branch, tag or commit")))
        }
    }
}

impl fmt::Display for ModelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.revision == "main" { self.repo.fmt(f) } else { write!(f, "{}@{}", self.repo, self.revision) }
    }
}

impl FromStr for ModelId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (repo, revision) = text.split_once('@').unwrap_or((text, "main"));
        Self::new(repo.parse()?, revision)
    }
}

/// Returns whether git allows `name` for a branch or tag and it is safe as a relative path.
pub(crate) fn is_revision(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 255
        && !name.contains(|c: char| c.is_control() || " ~^:?*[\\@{<>|\"".contains(c))
        && is_relative_path(name)
}

/// Returns whether `path` stays below any directory that it is joined to, on every platform.
pub(crate) fn is_relative_path(path: &str) -> bool {
    path.split('/').all(|part| !part.is_empty() && part != "." && part != ".." && part.len() <= 255)
        && !path.contains(|c: char| c.is_control() || matches!(c, '\\' | ':'))
}

/// Returns whether `text` is a complete commit hash: 40 lower-case hexadecimal digits.
pub fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_read_and_nonsense_is_not() {
        let id: ModelId = "EleutherAI/pythia-410m@step3000".parse().unwrap();
        assert_eq!((id.repo.as_str(), id.revision.as_str()), ("EleutherAI/pythia-410m", "step3000"));
        assert_eq!(id.repo.folder(), "models--EleutherAI--pythia-410m");
        assert_eq!(RepoId::from_folder(&id.repo.folder()), Some(id.repo.clone()));
        let data: ModelId = "datasets/Rowan/hellaswag@refs/convert/parquet".parse().unwrap();
        assert_eq!((data.repo.folder(), data.repo.api()), ("datasets--Rowan--hellaswag".into(), data.repo.to_string()));
        assert_eq!(RepoId::from_folder("datasets--Rowan--hellaswag"), Some(data.repo));
        assert_eq!("a/b@refs/pr/6".parse::<ModelId>().unwrap().revision, "refs/pr/6");
        assert_eq!("a/b".parse::<ModelId>().unwrap().to_string(), "a/b");
        for bad in [
            "",
            "/",
            "a/",
            "../x",
            "a/b/c",
            "datasets/",
            "datasets/a/b/c",
            "datasets/../x",
            "a/..",
            "a b/c",
            "a/b@",
            "a/b@../c",
            "a/b@x/../y",
            "a/b@/x",
            "a--b/c",
            "-a/b",
        ] {
            assert!(bad.parse::<ModelId>().is_err(), "{bad}");
        }
    }
}
