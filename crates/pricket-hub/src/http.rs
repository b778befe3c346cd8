//! HTTP requests with redirects, authorization and retries.
//!
//! Redirects are followed here rather than by the HTTP library, so that the token is sent only to the origin of the
//! Hub. Failures are classified into those that a retry may solve and those that it cannot.

use std::hash::{BuildHasher, RandomState};
use std::io::Read;
use std::time::{Duration, Instant};

use crate::address::origin;
use crate::settings::{Patience, Settings};
use crate::{Error, Progress, Result};

const MAX_REDIRECTS: usize = 10;
/// Bytes read at once. Four connections buffer eight chunks (512 KiB), half of the most that an interruption may lose.
pub(crate) const CHUNK: usize = 64 << 10;
/// Number of received bytes from which a failed attempt counts as progress.
pub(crate) const WORTHWHILE: u64 = 64 << 10;

/// A connection pool with its settings.
pub(crate) struct Http {
    agent: wire::Agent,
    settings: Settings,
}

/// A response whose body has not been read yet.
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// The URL that sent this response, if redirects led there.
    pub(crate) moved: Option<String>,
    headers: Vec<(String, String)>,
    /// Length of the body, if the response gives it.
    pub(crate) length: Option<u64>,
    pub(crate) body: Box<dyn Read>,
}

impl Answer {
    /// Returns the value of a header, by its name in lower case.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// Rejects a compressed body: it was not requested, and byte offsets would not match.
    fn plain(self, url: &str) -> Result<Self, Failure> {
        match self.header("content-encoding").filter(|encoding| *encoding != "identity") {
            Some(encoding) => Err(Failure::again(url, format!("the response has the content encoding {encoding:?}"))),
            None => Ok(self),
        }
    }
}

/// The reason why a request failed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// A retry may succeed. `after` is the wait that the server asks for; `reached` is false if no server was reached.
    Again { url: String, what: String, after: Option<Duration>, reached: bool },
    /// The server answered with an error status. `code` is the `X-Error-Code` header.
    Status { url: String, status: u16, code: String },
    /// A retry cannot succeed.
    Fatal(Error),
}

impl Failure {
    pub(crate) fn again(url: &str, what: impl Into<String>) -> Self {
        Failure::Again { url: bare(url), what: what.into(), after: None, reached: true }
    }
}

/// Removes the query, the user name and the password from a URL: each may be a secret.
fn bare(url: &str) -> String {
    let url = &url[..url.find(['?', '#']).unwrap_or(url.len())];
    let Some((scheme, rest)) = url.split_once("://") else { return url.into() };
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    format!("{scheme}://{}{path}", authority.rsplit_once('@').map_or(authority, |(_, host)| host))
}

/// Resolves the target of a `Location` or `Link` header against `url`.
pub(crate) fn join(url: &str, location: &str) -> Option<String> {
    if location.starts_with("http://") || location.starts_with("https://") {
        return Some(location.into());
    }
    let (scheme, rest) = url.split_once("://")?;
    let host = &rest[..rest.find(['/', '?', '#']).unwrap_or(rest.len())];
    match location {
        _ if location.starts_with("//") => Some(format!("{scheme}:{location}")),
        _ if location.starts_with('/') => Some(format!("{scheme}://{host}{location}")),
        // Other schemes and paths relative to the directory are rejected: the Hub never sends them.
        _ => None,
    }
}

impl Http {
    pub(crate) fn new(settings: &Settings) -> Self {
        Self { agent: wire::Agent::new(settings), settings: settings.clone() }
    }

    pub(crate) fn patience(&self) -> &Patience {
        &self.settings.patience
    }

    /// Closes all connections, so that requests in progress fail at once.
    pub(crate) fn shutdown(&self) {
        self.agent.shutdown();
    }

    /// Sends a GET request and follows redirects. The response has status 200 or 206. `is_moved` means that `url` is
    /// the target of an earlier redirect.
    pub(crate) fn get(&self, url: &str, range: Option<(u64, u64)>, is_moved: bool) -> Result<Answer, Failure> {
        self.ask("GET", url, range, is_moved)
    }

    /// Sends a HEAD request for a file. Returns the response that gives its size and hash, usually a redirect to
    /// another host, which is not followed.
    pub(crate) fn head(&self, url: &str) -> Result<Answer, Failure> {
        self.ask("HEAD", url, None, false)
    }

    fn ask(&self, method: &str, url: &str, range: Option<(u64, u64)>, is_moved: bool) -> Result<Answer, Failure> {
        let ours = origin(&self.settings.endpoint);
        let mut url = url.to_owned();
        let mut seen = Vec::new();
        loop {
            let mut headers = vec![("accept-encoding", "identity".to_owned())];
            if let Some((start, end)) = range {
                headers.push(("range", format!("bytes={start}-{}", end - 1)));
            }
            if let Some(token) = self.settings.token.as_ref().filter(|_| ours.is_some() && origin(&url) == ours) {
                headers.push(("authorization", token.bearer()));
            }
            let mut answer = self.agent.ask(method, &url, &headers)?;
            let is_moved = is_moved || !seen.is_empty();
            match answer.status {
                200 | 206 => {
                    answer.moved = is_moved.then(|| url.clone());
                    return answer.plain(&url);
                }
                // The redirect to another host has the size and hash of a large file in its headers.
                302 | 307 if method == "HEAD" && answer.header("x-linked-size").is_some() => return Ok(answer),
                301 | 302 | 303 | 307 | 308 => {
                    let location = answer.header("location").unwrap_or_default().to_owned();
                    // Reads the body to its end, so that the connection can be reused.
                    let _ = std::io::copy(&mut answer.body.take(CHUNK as u64), &mut std::io::sink());
                    let Some(next) = join(&url, &location) else {
                        return Err(Failure::again(&url, format!("invalid redirect to {:?}", bare(&location))));
                    };
                    seen.push(std::mem::replace(&mut url, next));
                    if seen.len() > MAX_REDIRECTS || seen.contains(&url) {
                        return Err(Failure::again(&seen[0], "redirect loop or too many redirects"));
                    }
                }
                // Statuses 501 and 505 are left out: a retry does not change them.
                status @ (408 | 429 | 500 | 502..=504 | 506..=599) => {
                    let after = answer.header("retry-after").and_then(wire::retry_after);
                    let after = after.or_else(|| rate_limit(answer.header("ratelimit")?));
                    return Err(Failure::Again {
                        url: bare(&url),
                        what: format!("status {status}"),
                        after,
                        reached: true,
                    });
                }
                // The usual cause is an expired signature. A retry gets a new one from the original URL. A 401 does not
                // change.
                status if is_moved && status != 401 => {
                    return Err(Failure::again(&url, format!("status {status} after a redirect")));
                }
                status => {
                    let code = answer.header("x-error-code").unwrap_or_default().to_owned();
                    return Err(Failure::Status { url: bare(&url), status, code });
                }
            }
        }
    }

    /// Fetches a body of at most `limit` bytes. Returns its `Link` header and the bytes.
    pub(crate) fn text(&self, url: &str, limit: u64) -> Result<(Option<String>, Vec<u8>), Failure> {
        let mut answer = self.get(url, None, false)?;
        let deadline = Instant::now() + self.settings.patience.answer;
        let mut out = Vec::new();
        let mut chunk = vec![0; CHUNK];
        loop {
            let n = answer.body.read(&mut chunk).map_err(|e| Failure::again(url, reason(&e)))?;
            out.extend_from_slice(&chunk[..n]);
            if out.len() as u64 > limit {
                let what = format!("the response exceeds the limit of {limit} bytes");
                return Err(Failure::Fatal(Error::Protocol { url: bare(url), what }));
            }
            if n == 0 {
                break;
            }
            if Instant::now() > deadline {
                return Err(Failure::again(url, "the response took too long"));
            }
        }
        match answer.length {
            Some(expected) if expected != out.len() as u64 => {
                Err(Failure::again(url, format!("received {} of {expected} bytes", out.len())))
            }
            _ => Ok((answer.header("link").map(str::to_owned), out)),
        }
    }
}

/// The wrapper of the HTTP library, `ureq`. Only this module and [`crate::forward`] use its types.
#[cfg(feature = "http")]
mod wire {
    use std::io::ErrorKind::{ConnectionRefused, HostUnreachable, NetworkDown, NetworkUnreachable};
    use std::time::{Duration, SystemTime};

    use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};
    use ureq::unversioned::resolver::DefaultResolver;
    use ureq::unversioned::transport::{ConnectProxyConnector, Connector, RustlsConnector, TcpConnector};

    use super::{Answer, CHUNK, Failure, bare, reason};
    use crate::forward::Forward;
    use crate::network::{Env, Proxies, certificates};
    use crate::{Error, Result as HubResult, Settings};

    /// The agents, or the message of an error in the environment, such as an unsupported proxy. Such an error fails
    /// every request.
    pub(super) struct Agent(Result<Agents, String>);

    struct Agents {
        proxies: Proxies,
        direct: ureq::Agent,
        http: ureq::Agent,
        https: ureq::Agent,
    }

    impl Agents {
        fn new(settings: &Settings, env: Env<'_>) -> HubResult<Self> {
            let proxies = Proxies::from(env)?;
            let roots = roots(env)?;
            let agent = |proxy: Option<&String>| -> HubResult<ureq::Agent> {
                let wrong = |e: ureq::Error| Error::Input(format!("invalid proxy address: {e}"));
                let proxy = proxy.map(|proxy| ureq::Proxy::new(proxy)).transpose().map_err(wrong)?;
                Ok(Self::agent(settings, proxy, &roots))
            };
            let (http, https) = (agent(proxies.http.as_ref())?, agent(proxies.https.as_ref())?);
            Ok(Self { direct: agent(None)?, http, https, proxies })
        }

        fn of(&self, url: &str) -> &ureq::Agent {
            match self.proxies.of(url) {
                None => &self.direct,
                Some(_) if url.starts_with("https:") => &self.https,
                Some(_) => &self.http,
            }
        }

        fn agent(settings: &Settings, proxy: Option<ureq::Proxy>, roots: &RootCerts) -> ureq::Agent {
            let patience = &settings.patience;
            let connections = settings.files.saturating_mul(settings.ranges);
            let config = |proxy: Option<ureq::Proxy>| {
                ureq::Agent::config_builder()
                    .user_agent(concat!("pricket/", env!("CARGO_PKG_VERSION")))
                    .http_status_as_error(false)
                    .max_redirects(0)
                    .max_redirects_will_error(false)
                    .timeout_resolve(Some(patience.connect))
                    .timeout_connect(Some(patience.connect))
                    .timeout_recv_response(Some(patience.answer))
                    .timeout_per_read(Some(patience.stall))
                    .timeout_per_write(Some(patience.stall))
                    .input_buffer_size(CHUNK)
                    .max_idle_connections_per_host(connections)
                    .max_idle_connections(connections)
                    .proxy(proxy)
                    .tls_config(TlsConfig::builder().root_certs(roots.clone()).build())
                    .build()
            };
            let connector =
                ().chain(Forward { direct: config(None) })
                    .chain(ConnectProxyConnector::default())
                    .chain(TcpConnector::default())
                    .chain(RustlsConnector::default());
            ureq::Agent::with_parts(config(proxy), connector, DefaultResolver::default())
        }
    }

    /// Returns the trusted root certificates: those of the file that the environment names, or else of the platform's
    /// store. If the store is empty, the certificates of Mozilla are used.
    pub(super) fn roots(env: Env<'_>) -> HubResult<RootCerts> {
        let Some((name, path)) = certificates(env) else {
            let store = rustls_native_certs::load_native_certs().certs;
            if store.is_empty() {
                return Ok(RootCerts::WebPki);
            }
            return Ok(store
                .iter()
                .map(|certificate| Certificate::from_der(certificate).to_owned())
                .collect::<Vec<_>>()
                .into());
        };
        let wrong = |what: String| Error::Input(format!("{name}: {}: {what}", path.display()));
        let pem = std::fs::read(&path).map_err(|e| wrong(e.to_string()))?;
        let mut certificates = Vec::new();
        for item in parse_pem(&pem) {
            if let PemItem::Certificate(certificate) = item.map_err(|e| wrong(e.to_string()))? {
                certificates.push(certificate);
            }
        }
        if certificates.is_empty() {
            return Err(wrong("no certificate in PEM format".into()));
        }
        Ok(RootCerts::from(certificates))
    }

    impl Agent {
        pub(super) fn new(settings: &Settings) -> Self {
            Self(Agents::new(settings, &|name| std::env::var(name).ok()).map_err(|e| e.to_string()))
        }

        pub(super) fn shutdown(&self) {
            for agent in self.0.iter().flat_map(|agents| [&agents.direct, &agents.http, &agents.https]) {
                agent.clone().shutdown();
            }
        }

        pub(super) fn ask(&self, method: &str, url: &str, headers: &[(&str, String)]) -> Result<Answer, Failure> {
            let agents = self.0.as_ref().map_err(|e| Failure::Fatal(Error::Input(e.clone())))?;
            let agent = agents.of(url);
            let request = if method == "HEAD" { agent.head(url) } else { agent.get(url) };
            let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, value));
            let (head, body) = request.call().map_err(|e| failure(url, e))?.into_parts();
            let header = |(name, value): (&ureq::http::HeaderName, &ureq::http::HeaderValue)| {
                Some((name.as_str().to_owned(), value.to_str().ok()?.to_owned()))
            };
            Ok(Answer {
                status: head.status.as_u16(),
                moved: None,
                headers: head.headers.iter().filter_map(header).collect(),
                length: body.content_length(),
                body: Box::new(body.into_with_config().limit(u64::MAX).reader()),
            })
        }
    }

    fn failure(url: &str, e: ureq::Error) -> Failure {
        let (what, reached) = match e {
            ureq::Error::BadUri(_) | ureq::Error::Http(_) | ureq::Error::InvalidProxyUrl => {
                let what = format!("invalid URL: {e}");
                return Failure::Fatal(Error::Protocol { url: bare(url), what });
            }
            // A retry does not fix a certificate.
            ureq::Error::Rustls(_) | ureq::Error::Tls(_) => {
                return Failure::Fatal(Error::Network { url: bare(url), what: e.to_string() });
            }
            ureq::Error::Io(e) if e.kind() == std::io::ErrorKind::InvalidData => {
                return Failure::Fatal(Error::Network { url: bare(url), what: e.to_string() });
            }
            ureq::Error::Io(e) => {
                let nowhere = [ConnectionRefused, HostUnreachable, NetworkDown, NetworkUnreachable];
                // Errors of the resolver have no error kind, so their text decides.
                let unknown = e.to_string().starts_with("failed to lookup");
                (reason(&e), !unknown && !nowhere.contains(&e.kind()))
            }
            ureq::Error::HostNotFound
            | ureq::Error::ConnectionFailed
            | ureq::Error::Timeout(ureq::Timeout::Resolve | ureq::Timeout::Connect) => (e.to_string(), false),
            e => (e.to_string(), true),
        };
        Failure::Again { url: bare(url), what, after: None, reached }
    }

    /// Parses a `Retry-After` header: seconds or a date.
    pub(super) fn retry_after(text: &str) -> Option<Duration> {
        match text.trim().parse::<f64>() {
            Ok(seconds) => Duration::try_from_secs_f64(seconds).ok(),
            Err(_) => httpdate::parse_http_date(text).ok()?.duration_since(SystemTime::now()).ok(),
        }
    }
}

/// The replacement without the feature `http`: every request fails with [`Error::Network`].
#[cfg(not(feature = "http"))]
#[allow(clippy::unused_self)]
mod wire {
    use std::time::Duration;

    use super::{Answer, Failure, bare};
    use crate::{Error, Settings};

    pub(super) struct Agent;

    impl Agent {
        pub(super) fn new(_: &Settings) -> Self {
            Self
        }

        pub(super) fn shutdown(&self) {}

        pub(super) fn ask(&self, _: &str, url: &str, _: &[(&str, String)]) -> Result<Answer, Failure> {
            let what = "this program was built without network support; build it with the feature `hub`".into();
            Err(Failure::Fatal(Error::Network { url: bare(url), what }))
        }
    }

    pub(super) fn retry_after(_: &str) -> Option<Duration> {
        None
    }
}

/// Parses the wait from a header such as `RateLimit: "resolvers";r=0;t=120`, which the Hub sends instead of
/// `Retry-After`.
fn rate_limit(text: &str) -> Option<Duration> {
    let field = |name: &str| text.split(';').find_map(|part| part.trim().strip_prefix(name)?.parse::<u64>().ok());
    (field("r=") == Some(0)).then(|| field("t=")).flatten().map(Duration::from_secs)
}

/// Describes an I/O error in one line.
pub(crate) fn reason(e: &std::io::Error) -> String {
    match e.kind() {
        std::io::ErrorKind::UnexpectedEof => "the connection closed early".into(),
        std::io::ErrorKind::TimedOut => "timed out waiting for data".into(),
        _ => e.to_string(),
    }
}

/// Counter of failures in a row, which decides between a retry and an error.
pub(crate) struct Tries<'a> {
    patience: &'a Patience,
    progress: &'a dyn Progress,
    failures: u32,
    /// Number of attempts if no server can be reached.
    unreached: u32,
}

impl<'a> Tries<'a> {
    pub(crate) fn new(patience: &'a Patience, progress: &'a dyn Progress) -> Self {
        Self { patience, progress, failures: 0, unreached: patience.tries }
    }

    /// Creates a counter for metadata requests, which fails after two attempts if no server can be reached.
    pub(crate) fn of_a_question(patience: &'a Patience, progress: &'a dyn Progress) -> Self {
        Self { unreached: patience.tries.min(2), ..Self::new(patience, progress) }
    }

    /// Waits before another attempt, or returns an error if no further attempt makes sense. `gained` is the number of
    /// bytes that the failed attempt received.
    pub(crate) fn failed(&mut self, failure: Failure, gained: u64, stop: &dyn Fn() -> bool) -> Result<()> {
        let (url, what, after, reached) = match failure {
            Failure::Fatal(e) => return Err(e),
            Failure::Status { url, status, .. } => {
                return Err(Error::Network { url, what: format!("status {status}") });
            }
            Failure::Again { url, what, after, reached } => (url, what, after, reached),
        };
        if self.progress.cancelled() || stop() {
            return Err(Error::Cancelled);
        }
        self.failures = if gained >= WORTHWHILE { 1 } else { self.failures + 1 };
        if self.failures >= if reached { self.patience.tries } else { self.unreached } {
            let what = format!("{what}; gave up after {} attempts", self.failures);
            return Err(Error::Network { url, what });
        }
        let doubled = self.patience.pause.saturating_mul(1 << (self.failures - 1).min(16));
        let own = doubled.min(self.patience.longest_pause).mul_f64(0.5 + 0.5 * chance());
        let pause = match after {
            Some(asked) if asked > self.patience.longest_asked => {
                let what = format!("{what}; the server asks for a wait of {} s, which is too long", asked.as_secs());
                return Err(Error::Network { url, what });
            }
            Some(asked) => asked.max(own),
            None => own,
        };
        self.progress.notice(&format!("{url}: {what}; retrying in {:.1} s", pause.as_secs_f64()));
        let end = Instant::now() + pause;
        loop {
            if self.progress.cancelled() || stop() {
                return Err(Error::Cancelled);
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(Duration::from_millis(50)));
        }
    }
}

/// Returns a random number from 0 to 1. Random pauses keep processes from retrying at the same moments.
fn chance() -> f64 {
    let bits = RandomState::new().hash_one(Instant::now());
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(feature = "http")]
    #[test]
    fn certificates_come_from_the_file_that_the_environment_names() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("own.pem");
        let roots = |name: &'static str| wire::roots(&|asked| (asked == name).then(|| path.display().to_string()));
        let refused = roots("SSL_CERT_FILE").unwrap_err().to_string();
        assert!(refused.contains("SSL_CERT_FILE") && refused.contains("own.pem"), "{refused}");
        std::fs::write(&path, "no certificate").unwrap();
        assert!(roots("REQUESTS_CA_BUNDLE").unwrap_err().to_string().contains("no certificate"));
        let one = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        std::fs::write(&path, one.repeat(2)).unwrap();
        for name in ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"] {
            assert!(matches!(roots(name).unwrap(), ureq::tls::RootCerts::Specific(both) if both.len() == 2), "{name}");
        }
        let other = roots("OTHER").unwrap();
        assert!(
            !matches!(&other, ureq::tls::RootCerts::Specific(list) if list.len() == 1),
            "the certificates of the platform, or Mozilla's"
        );
    }

    #[test]
    fn addresses() {
        assert_eq!(bare("https://cdn/x?Signature=secret"), "https://cdn/x");
        assert_eq!(bare("https://me:secret@cdn/a@b"), "https://cdn/a@b");
        assert_eq!(rate_limit("\"resolvers\";r=0;t=120"), Some(Duration::from_mins(2)));
        assert_eq!(rate_limit("\"api\";r=5;t=120"), None);
        assert_eq!(origin("https://Hub.co/x"), origin("https://hub.co:443/y"));
        assert_eq!(origin("http://[::1]:80/x"), origin("http://[::1]/"));
        assert_ne!(origin("https://hub.co/x"), origin("https://hub.co\\@evil.org/x"));
        assert_ne!(origin("https://hub.co/x"), origin("http://hub.co/x"));
        assert_ne!(origin("https://hub.co/x"), origin("https://hub.co.evil.org/x"));
        assert_ne!(origin("https://hub.co/x"), origin("https://hub.co@evil.org/x"));
        assert_eq!(join("http://a:1/b?c", "/d").as_deref(), Some("http://a:1/d"));
        assert_eq!(join("http://a:1/b", "//e/f").as_deref(), Some("http://e/f"));
        assert_eq!(join("http://a:1/b", "ftp://e"), None);
    }

    #[cfg(feature = "http")]
    #[test]
    fn a_time_to_wait_is_seconds_or_a_date() {
        use wire::retry_after;
        assert_eq!(retry_after("2"), Some(Duration::from_secs(2)));
        assert_eq!(retry_after("-1"), None);
        assert!(retry_after("Fri, 31 Dec 2100 23:59:59 GMT").unwrap() > Duration::from_hours(1));
    }
}
