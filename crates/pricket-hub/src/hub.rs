//! The client of the Hub's API: branches and tags, commits, and listings of files.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::address::origin;
use crate::http::{Failure, Http, Tries, join};
use crate::id::{is_relative_path, is_revision};
use crate::layout::Layout;
use crate::records::{Entry, MAX_FILE, MAX_LISTING, read_record};
use crate::{Digest, Error, Listed, ModelId, Phase, Progress, RepoId, Result, Settings, is_commit};

/// Maximum number of files of a commit.
const MAX_FILES: usize = 100_000;
/// Maximum number of pages of a listing.
const MAX_PAGES: usize = 10_000;
/// Maximum number of files of a commit that are described by one HEAD request each.
const MAX_SIBLINGS: usize = 2_000;

/// A client of the Hugging Face Hub, or of another server with its protocol, and of the local cache.
///
/// Cloning is cheap. A client can be shared between threads.
#[derive(Clone)]
pub struct Hub {
    pub(crate) settings: Arc<Settings>,
    http: Arc<Http>,
}

impl std::fmt::Debug for Hub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Hub({}, {})", self.settings.endpoint, self.settings.cache.display())
    }
}

/// Branches and tags of a repository, each with its commit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Refs {
    /// Commits by branch, such as `main` or `step3000`.
    pub branches: BTreeMap<String, String>,
    /// Commits by tag.
    pub tags: BTreeMap<String, String>,
}

impl Refs {
    /// Returns the commit of a branch or tag.
    pub fn commit(&self, revision: &str) -> Option<&str> {
        self.branches.get(revision).or_else(|| self.tags.get(revision)).map(String::as_str)
    }

    fn names(&self) -> Vec<String> {
        self.branches.keys().chain(self.tags.keys()).cloned().collect()
    }
}

/// The files of a commit.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Listing {
    /// The files.
    pub files: Vec<Listed>,
    /// Whether `files` are all files of the commit. Otherwise they are the cached ones.
    pub is_complete: bool,
}

/// JSON responses of the Hub.
mod wire {
    use serde::Deserialize;

    #[derive(Deserialize)]
    pub(super) struct Refs {
        #[serde(default)]
        pub(super) branches: Vec<Ref>,
        #[serde(default)]
        pub(super) tags: Vec<Ref>,
    }

    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    pub(super) struct Ref {
        pub(super) name: String,
        pub(super) target_commit: String,
    }

    #[derive(Deserialize)]
    pub(super) struct Info {
        pub(super) sha: String,
        #[serde(default)]
        pub(super) siblings: Vec<Sibling>,
    }

    #[derive(Deserialize)]
    pub(super) struct Sibling {
        pub(super) rfilename: String,
    }

    #[derive(Deserialize)]
    pub(super) struct File {
        #[serde(rename = "type")]
        pub(super) kind: String,
        pub(super) path: String,
        pub(super) size: u64,
        pub(super) oid: String,
        pub(super) lfs: Option<Lfs>,
    }

    #[derive(Deserialize)]
    pub(super) struct Lfs {
        pub(super) oid: String,
        pub(super) size: u64,
    }
}

impl Hub {
    /// Creates a client with the settings of the environment; see [`Settings::from_env`].
    ///
    /// # Errors
    /// Returns [`Error::Input`] if an environment variable is invalid.
    pub fn from_env() -> Result<Self> {
        Ok(Self::new(Settings::from_env()?))
    }

    /// Creates a client with the given settings.
    pub fn new(settings: Settings) -> Self {
        Self { http: Arc::new(Http::new(&settings)), settings: Arc::new(settings) }
    }

    /// Returns the settings of this client.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    pub(crate) fn http(&self) -> &Http {
        &self.http
    }

    pub(crate) fn layout(&self, repo: &RepoId) -> Layout {
        Layout::new(&self.settings.cache, repo)
    }

    /// Returns all branches and tags, in one request. In offline mode, returns the branches recorded in the cache.
    ///
    /// # Errors
    /// - [`Error::Repository`] if the Hub does not show the repository;
    /// - [`Error::Network`] if the Hub cannot be reached;
    /// - [`Error::Refused`] if the server does not support the request;
    /// - [`Error::Offline`] if offline mode is on and the cache has no branches of the repository.
    pub fn refs(&self, repo: &RepoId, progress: &dyn Progress) -> Result<Refs> {
        if self.settings.offline {
            return self.cached_refs(repo);
        }
        let url = format!("{}/api/{}/refs", self.settings.endpoint, repo.api());
        let parse = |refs: wire::Refs| Some(Refs { branches: commits(refs.branches)?, tags: commits(refs.tags)? });
        Ok(self.json(repo, "main", &url, progress, parse)?.0)
    }

    /// Returns the result of [`Hub::refs`]. If the server does not list branches, returns the cached ones and `main`,
    /// with a notice.
    ///
    /// # Errors
    /// Returns the error of [`Hub::refs`] if `main` cannot be resolved either.
    pub fn refs_or_main(&self, repo: &RepoId, progress: &dyn Progress) -> Result<Refs> {
        match self.refs(repo, progress) {
            Err(e @ (Error::Repository { .. } | Error::Refused { .. })) => {
                let main = ModelId::new(repo.clone(), "main")?;
                let Ok(commit) = self.ask_revision(&main, progress) else { return Err(e) };
                progress.notice(&format!(
                    "{repo}: the server does not list branches ({e}); using main and the branches in the cache"
                ));
                let mut refs = self.cached_refs(repo).unwrap_or_default();
                refs.branches.insert("main".into(), commit);
                Ok(refs)
            }
            answer => answer,
        }
    }

    /// Returns the local cache.
    pub fn cache(&self) -> crate::Cache {
        crate::Cache::new(&self.settings.cache)
    }

    /// Returns the path of a cached file of a commit, or `None` if it is not in the cache with the listed length.
    pub fn cached(&self, repo: &RepoId, commit: &str, file: &Listed) -> Option<std::path::PathBuf> {
        (is_commit(commit) && is_relative_path(&file.path)).then(|| self.layout(repo).present(commit, file)).flatten()
    }

    /// Returns the revisions recorded in the cache, with their commits at the last fetch. All of them are listed as
    /// branches.
    ///
    /// # Errors
    /// Returns [`Error::Offline`] if there are none.
    pub fn cached_refs(&self, repo: &RepoId) -> Result<Refs> {
        let layout = self.layout(repo);
        let mut refs = Refs::default();
        for name in crate::cache::files_below(&layout.root().join("refs")) {
            if let Some(commit) = layout.read_reference(&name) {
                refs.branches.insert(name, commit);
            }
        }
        if refs.branches.is_empty() {
            let what = format!("{repo} is not in the cache ({})", self.settings.cache.display());
            return Err(Error::Offline { what });
        }
        Ok(refs)
    }

    /// Returns the commit of a revision: a branch, a tag or a commit.
    ///
    /// If the network or the Hub fails, returns the commit recorded in the cache and reports that to
    /// [`Progress::fallback`].
    ///
    /// # Errors
    /// - [`Error::Revision`], with the existing revisions, if the revision does not exist;
    /// - [`Error::Repository`] if the Hub does not show the repository;
    /// - [`Error::Network`] or [`Error::Protocol`] if the Hub cannot be reached or its response is invalid;
    /// - [`Error::Offline`] if offline mode is on and the revision is not in the cache.
    pub fn resolve(&self, id: &ModelId, progress: &dyn Progress) -> Result<String> {
        let ModelId { repo, revision } = id;
        if is_commit(revision) {
            return Ok(revision.clone());
        }
        let cached = self.layout(repo).read_reference(revision);
        if self.settings.offline {
            return cached.ok_or_else(|| {
                let known = self.cached_refs(repo).map(|refs| refs.names()).unwrap_or_default();
                let what = match &known[..] {
                    [] => format!("{repo} is not in the cache ({})", self.settings.cache.display()),
                    known => format!("{id} is not in the cache{}", crate::error::listed(known)),
                };
                Error::Offline { what }
            });
        }
        match self.ask_commit(id, progress) {
            // The cache also serves repositories that were removed from the Hub.
            Err(e) if (e.is_network() || matches!(e, Error::Repository { .. })) && cached.is_some() => {
                progress.fallback(&format!("{e}; using the cached commit of {id}"));
                Ok(cached.unwrap_or_default())
            }
            answer => answer,
        }
    }

    fn ask_commit(&self, id: &ModelId, progress: &dyn Progress) -> Result<String> {
        let ModelId { repo, revision } = id;
        let refs = match self.refs(repo, progress) {
            Ok(refs) => refs,
            // Some mirrors do not list branches, and some proxies refuse unknown requests.
            Err(e @ (Error::Repository { .. } | Error::Refused { .. })) => {
                return self.ask_revision(id, progress).map_err(|second| match second {
                    second @ (Error::Network { .. } | Error::Protocol { .. } | Error::Revision { .. }) => second,
                    _ => e,
                });
            }
            Err(e) => return Err(e),
        };
        if let Some(commit) = refs.commit(revision) {
            return Ok(commit.into());
        }
        // Pull requests and shortened commits are not part of the list.
        match self.ask_revision(id, progress) {
            Err(Error::Revision { repo, revision, .. }) => Err(Error::Revision { repo, revision, known: refs.names() }),
            answer => answer,
        }
    }

    fn ask_revision(&self, id: &ModelId, progress: &dyn Progress) -> Result<String> {
        let ModelId { repo, revision } = id;
        let url = format!("{}/api/{}/revision/{}", self.settings.endpoint, repo.api(), encode(revision, ""));
        let parse = |info: wire::Info| is_commit(&info.sha).then_some(info.sha);
        Ok(self.json(repo, revision, &url, progress, parse)?.0)
    }

    /// Returns the files of a commit.
    ///
    /// A commit never changes, so its listing is kept in the cache after the first fetch and not requested again. In
    /// offline mode, or if the network fails, the result may be only the cached files; see [`Listing::is_complete`].
    ///
    /// # Errors
    /// Returns the errors of [`Hub::refs`], and [`Error::Protocol`] if a listed path leads outside the repository.
    pub fn files(&self, repo: &RepoId, commit: &str, progress: &dyn Progress) -> Result<Listing> {
        if !is_commit(commit) {
            return Err(Error::Input(format!("{commit:?} is not a commit hash; expected 40 hexadecimal digits")));
        }
        let layout = self.layout(repo);
        if let Some(files) = read_record(&layout, commit) {
            return Ok(Listing { files, is_complete: true });
        }
        let cached = || Some(Listing { files: crate::cache::snapshot_files(&layout, commit)?, is_complete: false });
        if self.settings.offline {
            return cached().ok_or_else(|| Error::Offline {
                what: format!("{repo}@{commit} is not in the cache ({})", self.settings.cache.display()),
            });
        }
        let listed = match self.ask_files(repo, commit, progress) {
            // The description of the revision also names the files. A HEAD request for each gives its size and hash.
            Err(e @ (Error::Repository { .. } | Error::Refused { .. })) => {
                self.ask_siblings(repo, commit, progress).map_err(|second| match second {
                    Error::Repository { .. } | Error::Refused { .. } => e,
                    second => second,
                })
            }
            answer => answer,
        };
        match listed.map(|files| Listing { files, is_complete: true }) {
            Err(Error::Revision { repo: name, revision, .. }) => {
                let known = self.refs(repo, progress).map(|refs| refs.names()).unwrap_or_default();
                Err(Error::Revision { repo: name, revision, known })
            }
            Err(e) if e.is_network() || matches!(e, Error::Repository { .. }) => match cached() {
                Some(files) => {
                    progress.fallback(&format!("{e}; using the cached files of {repo}@{commit}"));
                    Ok(files)
                }
                None => Err(e),
            },
            answer => answer,
        }
    }

    /// Lists the files of a commit for servers that do not list trees: names from the `siblings` of the revision, size
    /// and hash from one HEAD request each.
    fn ask_siblings(&self, repo: &RepoId, commit: &str, progress: &dyn Progress) -> Result<Vec<Listed>> {
        let url = format!("{}/api/{}/revision/{commit}", self.settings.endpoint, repo.api());
        let (names, _) = self.json(repo, commit, &url, progress, |info: wire::Info| Some(info.siblings))?;
        let names: Vec<String> = names.into_iter().map(|file| file.rfilename).collect();
        if let Some(name) = names.iter().find(|name| leaves(name)) {
            let what = format!("the listing has the invalid path {name:?}");
            return Err(Error::Protocol { url, what });
        }
        if names.len() > MAX_SIBLINGS {
            return Err(Error::Protocol { url, what: format!("the listing has more than {MAX_SIBLINGS} files") });
        }
        names
            .into_iter()
            .filter(|name| is_relative_path(name))
            .map(|name| self.describe(repo, commit, name, progress))
            .collect()
    }

    /// Returns the size and hash of a file, from a HEAD request.
    fn describe(&self, repo: &RepoId, commit: &str, path: String, progress: &dyn Progress) -> Result<Listed> {
        let url = self.file_url(repo, commit, &path);
        let mut tries = Tries::of_a_question(self.http.patience(), progress);
        loop {
            if progress.cancelled() {
                return Err(Error::Cancelled);
            }
            match self.http.head(&url) {
                Ok(answer) => {
                    // The response to a HEAD request has no body, so the length comes from its headers.
                    let size = answer.header("x-linked-size").or(answer.header("content-length"));
                    let size = size.and_then(|size| size.parse().ok()).filter(|&size: &u64| size <= MAX_FILE);
                    let etag = answer.header("x-linked-etag").or(answer.header("etag")).unwrap_or_default();
                    let digest = Digest::from_hex(etag.trim_start_matches("W/").trim_matches('"'));
                    let Some(size) = size else {
                        return Err(Error::Protocol { url, what: "the response has no valid file size".into() });
                    };
                    return Ok(Listed { path, size, digest });
                }
                Err(Failure::Status { url, status, code }) => {
                    return Err(self.refused(repo, commit, url, status, &code));
                }
                Err(failure) => tries.failed(failure, 0, &|| false)?,
            }
        }
    }

    fn ask_files(&self, repo: &RepoId, commit: &str, progress: &dyn Progress) -> Result<Vec<Listed>> {
        let mut url = format!("{}/api/{}/tree/{commit}?recursive=true", self.settings.endpoint, repo.api());
        let mut out = Vec::new();
        for _ in 0..MAX_PAGES {
            let parse = |page: Vec<wire::File>| {
                // The Hub lists submodules as "unknown".
                let files = page.into_iter().filter(|file| file.kind != "directory" && file.kind != "unknown");
                files.map(listed).collect::<Option<Vec<Listed>>>()
            };
            let (page, next) = self.json(repo, commit, &url, progress, parse)?;
            if let Some(file) = page.iter().find(|file| leaves(&file.path)) {
                let what = format!("the listing has the invalid path {:?}", file.path);
                return Err(Error::Protocol { url, what });
            }
            // Skips names that git allows but some supported file systems do not.
            out.extend(page.into_iter().filter(|file| is_relative_path(&file.path)));
            match next {
                Some(_) if out.len() > MAX_FILES => {
                    return Err(Error::Protocol { url, what: format!("the listing has more than {MAX_FILES} files") });
                }
                Some(next) => url = next,
                None => return Ok(out),
            }
        }
        Err(Error::Protocol { url, what: "the listing has too many pages".into() })
    }

    /// Writes the listing of a commit to the cache, unless it is there or lacks hashes.
    pub(crate) fn record(&self, repo: &RepoId, commit: &str, files: &[Listed]) -> Result<()> {
        let layout = self.layout(repo);
        let path = layout.record(commit);
        if read_record(&layout, commit).is_some() || files.iter().any(|file| file.digest.is_none()) {
            return Ok(());
        }
        let entries: Vec<Entry> = files
            .iter()
            .map(|file| Entry {
                path: file.path.clone(),
                size: file.size,
                oid: file.digest.as_ref().map_or_else(String::new, |digest| digest.hex().into()),
            })
            .collect();
        let json = serde_json::to_vec_pretty(&entries).map_err(|e| Error::io(&path)(e.into()))?;
        layout.replace(&path, &json)
    }

    /// Fetches JSON and parses it with `parse`. Also returns the URL of the next page, if the response has one.
    fn json<W: serde::de::DeserializeOwned, T>(
        &self,
        repo: &RepoId,
        revision: &str,
        url: &str,
        progress: &dyn Progress,
        parse: impl Fn(W) -> Option<T>,
    ) -> Result<(T, Option<String>)> {
        progress.phase(repo.as_str(), Phase::Metadata);
        let mut tries = Tries::of_a_question(self.http.patience(), progress);
        loop {
            if progress.cancelled() {
                return Err(Error::Cancelled);
            }
            let answer = self.http.text(url, MAX_LISTING).and_then(|(link, body)| {
                // Retries, since a proxy may have sent an error page with status 200.
                let nonsense = |e: String| Failure::again(url, format!("invalid response{e}"));
                let value = serde_json::from_slice(&body).map_err(|e| nonsense(format!(": {e}")))?;
                let value = parse(value).ok_or_else(|| nonsense(String::new()))?;
                let next = match link.as_deref().and_then(next_page) {
                    None => None,
                    Some(next) => {
                        let next = join(url, next).filter(|next| origin(next).is_some() && origin(next) == origin(url));
                        Some(
                            next.filter(|next| next != url)
                                .ok_or_else(|| nonsense(": the URL of the next page is invalid".into()))?,
                        )
                    }
                };
                Ok((value, next))
            });
            match answer {
                Ok(answer) => return Ok(answer),
                Err(Failure::Status { url, status, code }) => {
                    return Err(self.refused(repo, revision, url, status, &code));
                }
                Err(failure) => tries.failed(failure, 0, &|| false)?,
            }
        }
    }

    /// Converts an error status that a retry does not change into an error.
    pub(crate) fn refused(&self, repo: &RepoId, revision: &str, url: String, status: u16, code: &str) -> Error {
        let token =
            if self.settings.token.is_some() { "with the given token" } else { "without a token (set HF_TOKEN)" };
        let what = match (status, code) {
            (404, "RevisionNotFound") => {
                let (repo, revision) = (repo.to_string(), revision.into());
                return Error::Revision { repo, revision, known: Vec::new() };
            }
            (404, "EntryNotFound") => {
                let what = format!("the Hub has no file at {url}");
                return Error::NoFile { repo: repo.to_string(), revision: revision.into(), what };
            }
            (_, "GatedRepo") => format!("gated repository: accept its terms on the Hub first; requested {token}"),
            (401 | 404, _) => format!("the repository does not exist or is private; requested {token}"),
            (403, _) => format!("access to the repository is denied; requested {token}"),
            (400 | 405 | 406 | 410 | 415 | 501 | 505, _) => {
                return Error::Refused { url, status };
            }
            _ => return Error::Network { url, what: format!("status {status}") },
        };
        Error::Repository { repo: repo.to_string(), status, what }
    }

    /// Returns the URL of a file of a commit.
    pub(crate) fn file_url(&self, repo: &RepoId, commit: &str, path: &str) -> String {
        format!("{}/{repo}/resolve/{commit}/{}", self.settings.endpoint, encode(path, "/"))
    }
}

/// Returns whether a path could lead outside the directory that it is joined to.
fn leaves(path: &str) -> bool {
    path.split(['/', '\\']).any(|part| part.is_empty() || part == "." || part == "..")
}

/// Returns the commits by name, or `None` if a commit hash is invalid.
fn commits(refs: Vec<wire::Ref>) -> Option<BTreeMap<String, String>> {
    // Skips names that git allows but that cannot be file names in the cache.
    let named = refs.into_iter().filter(|r| is_revision(&r.name));
    named.map(|r| is_commit(&r.target_commit).then_some((r.name, r.target_commit))).collect()
}

fn listed(file: wire::File) -> Option<Listed> {
    if file.kind != "file" {
        return None;
    }
    let (size, digest) = match file.lfs {
        Some(lfs) => (lfs.size, Digest::from_hex(lfs.oid.strip_prefix("sha256:").unwrap_or(&lfs.oid))?),
        None => (file.size, Digest::from_hex(&file.oid)?),
    };
    (size <= MAX_FILE).then_some(Listed { path: file.path, size, digest: Some(digest) })
}

/// Returns the URL of the `rel="next"` entry of a `Link` header.
fn next_page(link: &str) -> Option<&str> {
    let links = link.split('<').skip(1).filter_map(|part| part.split_once('>'));
    let is_next = |rest: &str| {
        let rest = rest.split('<').next().unwrap_or_default();
        rest.split(';').any(|field| matches!(field.trim().trim_end_matches(','), "rel=\"next\"" | "rel=next"))
    };
    links.into_iter().find(|(_, rest)| is_next(rest)).map(|(url, _)| url)
}

/// Percent-encodes a part of a URL path, except for the characters in `keep`.
fn encode(text: &str, keep: &str) -> String {
    use std::fmt::Write;
    let mut out = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || keep.as_bytes().contains(&byte) {
            out.push(byte as char);
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}
