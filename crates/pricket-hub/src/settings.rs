use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::{Error, Result};

/// Where the Hub and the cache are, and how patient to be.
///
/// [`Settings::from_env`] reads what Python's `huggingface_hub` reads: `HF_ENDPOINT`; `HF_HOME` (or `XDG_CACHE_HOME`),
/// `HF_HUB_CACHE` (or `HUGGINGFACE_HUB_CACHE`); `HF_TOKEN` (or `HUGGING_FACE_HUB_TOKEN`), `HF_TOKEN_PATH`,
/// `HF_HUB_DISABLE_IMPLICIT_TOKEN`; `HF_HUB_OFFLINE` (or `TRANSFORMERS_OFFLINE`); `HF_HUB_DOWNLOAD_TIMEOUT`,
/// `HF_HUB_ETAG_TIMEOUT`; `HF_HUB_DISABLE_SYMLINKS`.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Settings {
    /// The Hub, as `https://huggingface.co`.
    pub endpoint: String,
    /// The directory with the `models--owner--name` folders.
    pub cache: PathBuf,
    /// Sent to the endpoint and to nobody else.
    pub token: Option<Token>,
    /// Whether the cache is all there is.
    pub offline: bool,
    /// Whether snapshots link to blobs; else they hold the files themselves, as on systems without links.
    pub symlinks: bool,
    /// Files fetched at once.
    pub files: usize,
    /// Ranges of one file fetched at once.
    pub ranges: usize,
    /// Bytes of a range. What has arrived of each is remembered, so this is not what an interruption costs.
    pub range_bytes: u64,
    /// How long to wait for what.
    pub patience: Patience,
}

/// How long to wait for what, and how often to try.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Patience {
    /// For a connection.
    pub connect: Duration,
    /// For the head of an answer, and for the whole of a listing.
    pub answer: Duration,
    /// For the next byte of a body. In this time at least 1 KiB a second must arrive.
    pub stall: Duration,
    /// Failures in a row, without 64 KiB in between, before giving up.
    pub tries: u32,
    /// The pause after the first failure; it doubles with each, up to `longest_pause`, less a random part.
    pub pause: Duration,
    /// The longest pause of our own.
    pub longest_pause: Duration,
    /// The longest pause that a server may ask for (`Retry-After`).
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

/// A secret. It is sent, and never shown.
#[derive(Clone)]
pub struct Token(String);

impl Token {
    /// Takes what may stand in a header.
    ///
    /// # Errors
    /// [`Error::Input`] for anything else; the message does not repeat it.
    pub fn new(text: &str) -> Result<Self> {
        let text = text.trim();
        if !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic()) {
            Ok(Self(text.into()))
        } else {
            Err(Error::Input("the Hub token holds characters that no token has".into()))
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
    /// The defaults, over the cache at `cache`.
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

    /// What the environment says.
    ///
    /// # Errors
    /// [`Error::Input`] for a token or a number that is none, or if there is no home directory to keep a cache in.
    pub fn from_env() -> Result<Self> {
        Self::from_vars(|name| std::env::var_os(name).and_then(|value| value.into_string().ok()))
    }

    fn from_vars(var: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let var = |name: &str| var(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty());
        let yes = |name: &str| var(name).is_some_and(|v| matches!(&*v.to_uppercase(), "1" | "ON" | "YES" | "TRUE"));
        let seconds = |name: &str| -> Result<Option<Duration>> {
            let Some(text) = var(name) else { return Ok(None) };
            let parsed = text.parse().ok().and_then(|s| Duration::try_from_secs_f64(s).ok());
            match parsed.filter(|time| !time.is_zero()) {
                Some(time) => Ok(Some(time)),
                None => Err(Error::Input(format!("{name} is {text:?}; expected seconds"))),
            }
        };
        let home = || var("HOME").map(PathBuf::from).or_else(std::env::home_dir);
        let path = |text: String| match text.strip_prefix("~/") {
            Some(rest) => home().map_or_else(|| PathBuf::from(&text), |home| home.join(rest)),
            None => PathBuf::from(text),
        };
        let hf_home = match var("HF_HOME").or_else(|| var("XDG_CACHE_HOME").map(|cache| format!("{cache}/huggingface")))
        {
            Some(text) => path(text),
            None => home()
                .ok_or_else(|| Error::Input("no home directory; set HF_HOME or HF_HUB_CACHE".into()))?
                .join(".cache/huggingface"),
        };
        let cache =
            var("HF_HUB_CACHE").or_else(|| var("HUGGINGFACE_HUB_CACHE")).map_or_else(|| hf_home.join("hub"), path);
        let endpoint = var("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        if crate::http::origin(&endpoint).is_none() {
            let what = "HF_ENDPOINT is no address of a Hub; expected http or https, without a user and a password";
            return Err(Error::Input(what.into()));
        }
        let mut settings = Self::new(&endpoint, cache);
        let token_file = var("HF_TOKEN_PATH").map_or_else(|| hf_home.join("token"), path);
        settings.token = match var("HF_TOKEN").or_else(|| var("HUGGING_FACE_HUB_TOKEN")) {
            _ if yes("HF_HUB_DISABLE_IMPLICIT_TOKEN") => None,
            Some(token) => Some(Token::new(&token)?),
            None => read_token(&token_file)?,
        };
        settings.offline = yes("HF_HUB_OFFLINE") || yes("TRANSFORMERS_OFFLINE");
        settings.symlinks &= !yes("HF_HUB_DISABLE_SYMLINKS");
        let patience = &mut settings.patience;
        patience.stall = seconds("HF_HUB_DOWNLOAD_TIMEOUT")?.unwrap_or(patience.stall);
        patience.answer = seconds("HF_HUB_ETAG_TIMEOUT")?.unwrap_or(patience.answer);
        Ok(settings)
    }
}

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
