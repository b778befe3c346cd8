//! Settings of the Hub client, with the environment variables of `huggingface_hub`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::{Error, Result};

/// Settings of a [`crate::Hub`]: endpoint, cache, token, parallelism and timeouts.
///
/// [`Settings::from_env`] reads the environment variables of Python's `huggingface_hub`:
///
/// | variable | alternative | setting |
/// |---|---|---|
/// | `HF_ENDPOINT` | | URL of the Hub |
/// | `HF_HOME` | `XDG_CACHE_HOME` | parent directory of the cache and the token file |
/// | `HF_HUB_CACHE` | `HUGGINGFACE_HUB_CACHE` | cache directory |
/// | `HF_TOKEN` | `HUGGING_FACE_HUB_TOKEN` | token |
/// | `HF_TOKEN_PATH` | | file with the token |
/// | `HF_HUB_DISABLE_IMPLICIT_TOKEN` | | sends no token |
/// | `HF_HUB_OFFLINE` | `TRANSFORMERS_OFFLINE` | offline mode |
/// | `HF_HUB_DOWNLOAD_TIMEOUT` | | [`Patience::stall`] in seconds |
/// | `HF_HUB_ETAG_TIMEOUT` | | [`Patience::answer`] in seconds |
/// | `HF_HUB_DISABLE_SYMLINKS` | | snapshots hold files instead of links |
///
/// Variables in paths are expanded: `HF_HOME='$SCRATCH/hf'`.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Settings {
    /// URL of the Hub, such as `https://huggingface.co`.
    pub endpoint: String,
    /// Cache directory, which contains the `models--owner--name` folders.
    pub cache: PathBuf,
    /// Token of the Hub. It is sent only to `endpoint`.
    pub token: Option<Token>,
    /// Whether to use only the cache and send no requests.
    pub offline: bool,
    /// Whether snapshots link to blobs. Otherwise they hold the files themselves, as on systems without links.
    pub symlinks: bool,
    /// Number of files to fetch at once (default 4).
    pub files: usize,
    /// Number of ranges of one file to fetch at once (default 4).
    pub ranges: usize,
    /// Bytes per range (default 32 MiB). An interruption loses less: the bytes received of each range are recorded.
    pub range_bytes: u64,
    /// Timeouts and retries.
    pub patience: Patience,
}

/// Timeouts and retries.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Patience {
    /// Timeout of a connection (default 10 s).
    pub connect: Duration,
    /// Timeout of the head of a response and of a complete listing (default 30 s).
    pub answer: Duration,
    /// Timeout of the next byte of a body (default 20 s). Over this time, at least 1 KiB per second must arrive.
    pub stall: Duration,
    /// Number of failures in a row, with less than 64 KiB received in between, after which a request fails (default 8).
    pub tries: u32,
    /// Pause after the first failure (default 0.5 s). It doubles with each failure up to `longest_pause`, and is
    /// shortened at random by up to one half.
    pub pause: Duration,
    /// Longest pause between attempts, unless the server asks for a longer one (default 30 s).
    pub longest_pause: Duration,
    /// Longest pause that a server may ask for with `Retry-After` (default 10 minutes). The request fails if it asks
    /// for more.
    pub longest_asked: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            answer: Duration::from_secs(30),
            stall: Duration::from_secs(20),
            tries: 8,
            pause: Duration::from_millis(500),
            longest_pause: Duration::from_secs(30),
            longest_asked: Duration::from_mins(10),
        }
    }
}

/// An access token of the Hub. `Debug` does not show it.
#[derive(Clone)]
pub struct Token(String);

impl Token {
    /// Creates a token from printable ASCII text without spaces. Surrounding white space is removed.
    ///
    /// # Errors
    /// Returns [`Error::Input`] for any other text. The message does not contain the text.
    pub fn new(text: &str) -> Result<Self> {
        let text = text.trim();
        if !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic()) {
            Ok(Self(text.into()))
        } else {
            Err(Error::Input("invalid Hub token: expected printable ASCII characters without spaces".into()))
        }
    }

    pub(crate) fn bearer(&self) -> String {
        format!("Bearer {}", self.0)
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(..)")
    }
}

impl Settings {
    /// Creates the default settings for an endpoint and a cache directory.
    pub fn new(endpoint: &str, cache: impl Into<PathBuf>) -> Self {
        Self {
            endpoint: endpoint.trim_end_matches('/').into(),
            cache: cache.into(),
            token: None,
            offline: false,
            symlinks: cfg!(unix),
            files: 4,
            ranges: 4,
            range_bytes: 32 << 20,
            patience: Patience::default(),
        }
    }

    /// Reads the settings from environment variables.
    ///
    /// # Errors
    /// Returns [`Error::Input`] if a variable is invalid, or if neither a cache directory nor a home directory is
    /// known.
    pub fn from_env() -> Result<Self> {
        Self::from_vars(|name| std::env::var_os(name).and_then(|value| value.into_string().ok()))
    }

    fn from_vars(var: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let var = &|name: &str| var(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty());
        let yes = |name: &str| var(name).is_some_and(|v| matches!(&*v.to_uppercase(), "1" | "ON" | "YES" | "TRUE"));
        let seconds = |name: &str| -> Result<Option<Duration>> {
            let Some(text) = var(name) else { return Ok(None) };
            let parsed = text.parse().ok().and_then(|s| Duration::try_from_secs_f64(s).ok());
            match parsed.filter(|time| !time.is_zero()) {
                Some(time) => Ok(Some(time)),
                None => Err(Error::Input(format!("{name} is {text:?}; expected seconds"))),
            }
        };
        let home = || var("HOME").or_else(|| std::env::home_dir()?.into_os_string().into_string().ok());
        let path = |name: &str, text: &str| {
            expanded(text, home, var).map_err(|what| Error::Input(format!("{name} is {text:?}: {what}")))
        };
        let hf_home = match (var("HF_HOME"), var("XDG_CACHE_HOME")) {
            (Some(text), _) => path("HF_HOME", &text)?,
            (None, Some(cache)) => path("XDG_CACHE_HOME", &format!("{cache}/huggingface"))?,
            (None, None) => match home() {
                Some(home) => format!("{home}/.cache/huggingface"),
                None => return Err(Error::Input("no home directory; set HF_HOME or HF_HUB_CACHE".into())),
            },
        };
        // Python expands the value of HF_HOME twice, so a variable may name another variable.
        let cache = match (var("HF_HUB_CACHE"), var("HUGGINGFACE_HUB_CACHE")) {
            (Some(text), _) => path("HF_HUB_CACHE", &text)?,
            (None, Some(text)) => path("HUGGINGFACE_HUB_CACHE", &text)?,
            (None, None) => path("HF_HOME", &format!("{hf_home}/hub"))?,
        };
        let endpoint = var("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        if crate::address::origin(&endpoint).is_none() {
            let what = "HF_ENDPOINT is invalid: expected an http or https URL without a user name and password";
            return Err(Error::Input(what.into()));
        }
        let mut settings = Self::new(&endpoint, cache);
        let token_file = match var("HF_TOKEN_PATH") {
            Some(text) => path("HF_TOKEN_PATH", &text)?,
            None => path("HF_HOME", &format!("{hf_home}/token"))?,
        };
        settings.token = match var("HF_TOKEN").or_else(|| var("HUGGING_FACE_HUB_TOKEN")) {
            _ if yes("HF_HUB_DISABLE_IMPLICIT_TOKEN") => None,
            Some(token) => Some(Token::new(&token)?),
            None => read_token(Path::new(&token_file))?,
        };
        settings.offline = yes("HF_HUB_OFFLINE") || yes("TRANSFORMERS_OFFLINE");
        settings.symlinks &= !yes("HF_HUB_DISABLE_SYMLINKS");
        let patience = &mut settings.patience;
        patience.stall = seconds("HF_HUB_DOWNLOAD_TIMEOUT")?.unwrap_or(patience.stall);
        patience.answer = seconds("HF_HUB_ETAG_TIMEOUT")?.unwrap_or(patience.answer);
        Ok(settings)
    }
}

/// Expands a leading `~`, then `$VAR` and `${VAR}`, as Python's `expanduser` and `expandvars` do. On Windows also
/// expands `%VAR%`. Variables that are not set stay unchanged.
fn expanded(
    text: &str,
    home: impl Fn() -> Option<String>,
    var: &dyn Fn(&str) -> Option<String>,
) -> Result<String, &'static str> {
    let text = match text.strip_prefix('~') {
        None => text.to_owned(),
        Some(rest) if rest.is_empty() || rest.starts_with(std::path::is_separator) => {
            home().ok_or("no home directory was found")? + rest
        }
        Some(_) => return Err("the home directory of another user is not supported; write its path"),
    };
    let (mut out, mut rest) = (String::new(), text.as_str());
    while let Some(at) = rest.find(|c| c == '$' || (cfg!(windows) && c == '%')) {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let (name, len) = if let Some(inner) = rest.strip_prefix("${") {
            inner.split_once('}').map_or(("", 1), |(name, _)| (name, name.len() + 3))
        } else if let Some(inner) = rest.strip_prefix('%') {
            inner.split_once('%').map_or(("", 1), |(name, _)| (name, name.len() + 2))
        } else {
            let inner = &rest[1..];
            let name = &inner[..inner.find(|c| !is_name(c)).unwrap_or(inner.len())];
            (name, name.len() + 1)
        };
        match var(name).filter(|_| !name.is_empty()) {
            Some(value) => out.push_str(&value),
            None => out.push_str(&rest[..len]),
        }
        rest = &rest[len..];
    }
    out.push_str(rest);
    Ok(out)
}

/// Reads the token file. A missing or empty file means no token.
fn read_token(path: &Path) -> Result<Option<Token>> {
    let meta = std::fs::metadata(path).ok().filter(|meta| meta.is_file() && meta.len() < 4096);
    let text = meta.and_then(|_| std::fs::read_to_string(path).ok());
    text.filter(|text| !text.trim().is_empty()).map(|text| Token::new(&text)).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(vars: &[(&str, &str)]) -> Result<Settings> {
        Settings::from_vars(|name| vars.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).into()))
    }

    /// The expected paths were checked against huggingface_hub 2.4.
    #[test]
    fn variables_in_paths_are_expanded_as_python_expands_them() {
        let cache = |name: &str, value: &str| {
            let vars = [("HOME", "/h"), ("SCRATCH", "/s"), ("USER_1", "ann"), ("NEST", "$SCRATCH"), (name, value)];
            with(&vars).map(|settings| settings.cache.to_string_lossy().into_owned())
        };
        for (value, expected) in [
            ("$SCRATCH/hf", "/s/hf/hub"),
            ("${SCRATCH}/${USER_1}", "/s/ann/hub"),
            ("~/$USER_1", "/h/ann/hub"),
            ("~", "/h/hub"),
            ("/a~/b", "/a~/b/hub"),
            ("$NEST/hf", "/s/hf/hub"),
            ("/x/$UNSET/${UNSET}", "/x/$UNSET/${UNSET}/hub"),
            ("/x/$$SCRATCH", "/x/$/s/hub"),
            ("/x/$SCRATCHy/$-/${SCRATCH", "/x/$SCRATCHy/$-/${SCRATCH/hub"),
            ("'$SCRATCH'", "'/s'/hub"),
        ] {
            assert_eq!(cache("HF_HOME", value).unwrap(), expected, "{value}");
        }
        assert_eq!(cache("XDG_CACHE_HOME", "$SCRATCH/c").unwrap(), "/s/c/huggingface/hub");
        assert_eq!(cache("HF_HUB_CACHE", "$SCRATCH/c").unwrap(), "/s/c");
        assert_eq!(cache("HUGGINGFACE_HUB_CACHE", "~/c").unwrap(), "/h/c");
        assert!(cache("HF_HOME", "~bob/c").unwrap_err().to_string().contains("HF_HOME is \"~bob/c\""));
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("tok"), "hf_of_a_file").unwrap();
        let place = dir.path().to_string_lossy().into_owned();
        let settings = with(&[("HOME", &place), ("HF_TOKEN_PATH", "$HOME/tok")]).unwrap();
        assert_eq!(settings.token.unwrap().bearer(), "Bearer hf_of_a_file");
    }

    #[test]
    fn the_environment_is_read_as_python_reads_it() {
        let settings = with(&[("HOME", "/h")]).unwrap();
        assert_eq!(settings.cache, Path::new("/h/.cache/huggingface/hub"));
        assert_eq!((&*settings.endpoint, settings.offline), ("https://huggingface.co", false));
        assert_eq!(with(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")]).unwrap().cache, Path::new("/x/huggingface/hub"));
        assert_eq!(with(&[("HOME", "/h"), ("HF_HOME", "~/y")]).unwrap().cache, Path::new("/h/y/hub"));
        let settings = with(&[
            ("HF_HOME", "/y"),
            ("HF_HUB_CACHE", "/z"),
            ("HF_ENDPOINT", "http://localhost:1/"),
            ("HF_TOKEN", " hf_secret\n"),
            ("HF_HUB_OFFLINE", "yes"),
            ("HF_HUB_DOWNLOAD_TIMEOUT", "0.5"),
        ])
        .unwrap();
        assert_eq!((&*settings.endpoint, settings.offline), ("http://localhost:1", true));
        assert_eq!((settings.cache.as_path(), settings.patience.stall), (Path::new("/z"), Duration::from_millis(500)));
        assert_eq!(settings.token.as_ref().unwrap().bearer(), "Bearer hf_secret");
        assert!(!format!("{settings:?}").contains("secret"));
        let error = with(&[("HF_HOME", "/y"), ("HF_TOKEN", "hf_\nsecret")]).unwrap_err();
        assert!(!error.to_string().contains("secret"), "{error}");
        let unasked = with(&[("HF_HOME", "/y"), ("HF_TOKEN", "hf_x"), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]).unwrap();
        assert!(unasked.token.is_none());
        let error = with(&[("HF_HOME", "/y"), ("HF_ENDPOINT", "https://me:secret@hub")]).unwrap_err();
        assert!(!error.to_string().contains("secret"), "{error}");
        for bad in [("HF_ENDPOINT", "ftp://x"), ("HF_HUB_DOWNLOAD_TIMEOUT", "soon"), ("HF_HUB_ETAG_TIMEOUT", "-1")] {
            assert!(with(&[("HF_HOME", "/y"), bad]).is_err());
        }
    }
}
