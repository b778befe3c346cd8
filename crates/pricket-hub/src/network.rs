//! Proxies and certificate files from environment variables, with the rules of curl.

use std::path::PathBuf;

use crate::address::origin;
use crate::{Error, Result};

/// Looks up an environment variable.
pub(crate) type Env<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Proxies, and the hosts that are reached without one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Proxies {
    /// Proxy for `http://` URLs.
    pub(crate) http: Option<String>,
    /// Proxy for `https://` URLs.
    pub(crate) https: Option<String>,
    /// Hosts and domains of `no_proxy`.
    direct: Vec<String>,
}

impl Proxies {
    /// Reads `https_proxy`, `http_proxy`, `all_proxy` and `no_proxy`. The lower-case name takes precedence over the
    /// upper-case one.
    ///
    /// # Errors
    /// Returns [`Error::Input`] if a proxy is of an unsupported kind, since ignoring the variable would bypass the
    /// proxy.
    pub(crate) fn from(env: Env<'_>) -> Result<Self> {
        let direct = first(env, &["no_proxy", "NO_PROXY"]).map(|(_, list)| list).unwrap_or_default();
        let entry = |entry: &str| entry.trim().trim_start_matches('.').to_ascii_lowercase();
        Ok(Self {
            http: proxy(env, &["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])?,
            https: proxy(env, &["https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"])?,
            direct: direct.split(',').map(entry).filter(|entry| !entry.is_empty()).collect(),
        })
    }

    /// Returns the proxy for a URL, or `None` for a direct connection.
    pub(crate) fn of(&self, url: &str) -> Option<&str> {
        // `origin` rejects a URL with a user name and password, which needs the proxy too, so both are removed first.
        let (scheme, rest) = url.split_once("://")?;
        let authority = &rest[..rest.find(['/', '?', '#']).unwrap_or(rest.len())];
        let server = authority.rsplit_once('@').map_or(authority, |(_, server)| server);
        let plain = format!("{scheme}://{server}/");
        let (scheme, host, _) = origin(&plain)?;
        let is_below = |entry: &String| host.strip_suffix(entry.as_str()).is_some_and(|rest| rest.ends_with('.'));
        if self.direct.iter().any(|entry| entry == "*" || host == *entry || is_below(entry)) {
            return None;
        }
        if scheme == "https" { self.https.as_deref() } else { self.http.as_deref() }
    }
}

/// Returns the first of the variables that is set and not blank, with its name.
fn first(env: Env<'_>, names: &[&'static str]) -> Option<(&'static str, String)> {
    names.iter().find_map(|name| Some((*name, env(name).filter(|value| !value.trim().is_empty())?)))
}

/// Returns the proxy that the first set variable names.
fn proxy(env: Env<'_>, names: &[&'static str]) -> Result<Option<String>> {
    let Some((name, value)) = first(env, names) else { return Ok(None) };
    let value = value.trim();
    match value.split_once("://").map_or("http", |(scheme, _)| scheme) {
        "http" | "https" => Ok(Some(value.into())),
        // The message leaves out the URL, which may contain a password.
        scheme => {
            let what =
                "only http:// and https:// proxies are supported; remove the variable to connect without a proxy";
            Err(Error::Input(format!("{name} names a {scheme}:// proxy: {what}")))
        }
    }
}

/// Returns the certificate file that replaces the platform's store, with the variable that names it. The variables are
/// those of requests, curl and OpenSSL.
pub(crate) fn certificates(env: Env<'_>) -> Option<(&'static str, PathBuf)> {
    first(env, &["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"]).map(|(name, path)| (name, path.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxies(variables: &[(&str, &str)]) -> Result<Proxies> {
        Proxies::from(&|name| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned()))
    }

    #[test]
    fn each_scheme_has_its_own_proxy() {
        let both =
            proxies(&[("https_proxy", "http://a:1"), ("http_proxy", "b:2"), ("ALL_PROXY", "http://c:3")]).unwrap();
        assert_eq!((both.of("https://x/y"), both.of("http://x/y")), (Some("http://a:1"), Some("b:2")));
        // A proxy for https does not apply to http.
        let one = proxies(&[("HTTPS_PROXY", "http://a:1")]).unwrap();
        assert_eq!((one.of("https://x/"), one.of("http://x/")), (Some("http://a:1"), None));
        let all = proxies(&[("ALL_PROXY", "http://c:3"), ("HTTPS_PROXY", " ")]).unwrap();
        assert_eq!((all.of("https://x/"), all.of("http://x/")), (Some("http://c:3"), Some("http://c:3")));
        assert_eq!(
            all.of("http://me:secret@x/y"),
            Some("http://c:3"),
            "a URL with a name and a password takes the proxy too"
        );
        let lower = proxies(&[("HTTPS_PROXY", "http://upper:1"), ("https_proxy", "http://lower:1")]).unwrap();
        assert_eq!(lower.of("https://x/"), Some("http://lower:1"));
        assert_eq!(proxies(&[]).unwrap(), Proxies::default());
    }

    #[test]
    fn hosts_of_no_proxy_are_asked_directly() {
        let some = |no_proxy: &str| proxies(&[("all_proxy", "http://p:1"), ("no_proxy", no_proxy)]).unwrap();
        let direct = some("example.org, .internal,10.0.0.7");
        for url in [
            "https://example.org/x",
            "https://a.example.org:8080/x",
            "http://hub.internal",
            "http://internal",
            "http://10.0.0.7:1/x",
            "https://EXAMPLE.org/",
        ] {
            assert_eq!(direct.of(url), None, "{url}");
        }
        for url in ["https://notexample.org/", "https://example.org.evil.com/", "http://10.0.0.77/"] {
            assert_eq!(direct.of(url), Some("http://p:1"), "{url}");
        }
        assert_eq!(some("*").of("https://anything/"), None);
    }

    #[test]
    fn a_proxy_that_cannot_be_used_is_an_error_without_its_password() {
        for kind in ["socks5", "socks5h", "socks4", "socks", "quic"] {
            let refused = proxies(&[("ALL_PROXY", &format!("{kind}://me:secret@host:1"))]).unwrap_err().to_string();
            assert!(
                refused.contains("ALL_PROXY") && refused.contains(kind) && !refused.contains("secret"),
                "{refused}"
            );
        }
    }
}
