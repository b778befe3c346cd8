use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::{Error, Result};

/// Where the Hub and the cache are, and how patient to be.
///
/// [`Settings::from_env`] reads what Python's `huggingface_hub` reads: `HF_ENDPOINT`; `HF_HOME` (or `XDG_CACHE_HOME`),
/// `HF_HUB_CACHE` (or `HUGGINGFACE_HUB_CACHE`); `HF_TOKEN` (or `HUGGING_FACE_HUB_TOKEN`), `HF_TOKEN_PATH`,
/// `HF_HUB_DISABLE_IMPLICIT_TOKEN`; `HF_HUB_OFFLINE` (or `TRANSFORMERS_OFFLINE`); `HF_HUB_DOWNLOAD_TIMEOUT`,
/// `HF_HUB_ETAG_TIMEOUT`; `HF_HUB_DISABLE_SYMLINKS`. Variables in paths are expanded: `HF_HOME='$SCRATCH/hf'`.
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
            let what = "HF_ENDPOINT is no address of a Hub; expected http or https, without a user and a password";
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

/// A path with `~` at its beginning, then `$VAR` and `${VAR}`, replaced as Python's `expanduser` and `expandvars` do it; on
/// Windows `%VAR%` too. A variable that is not set stays as it is written.
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
        Some(_) => return Err("the home of another user is not looked up; write its path"),
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

    /// Checked against huggingface_hub 2.4.
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
