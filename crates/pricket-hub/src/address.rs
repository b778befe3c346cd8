//! Origins of request URLs.

/// Returns the scheme, host and port of a URL. The token is sent only to the origin of the Hub.
///
/// Returns `None` if any of the three is ambiguous, for example because the URL contains a user name.
pub(crate) fn origin(url: &str) -> Option<(&str, String, u16)> {
    let (scheme, rest) = url.split_once("://")?;
    let authority = &rest[..rest.find(['/', '?', '#']).unwrap_or(rest.len())];
    let default = match scheme {
        "https" => 443,
        "http" => 80,
        _ => return None,
    };
    let (host, port) = match authority.rsplit_once(':').filter(|(_, port)| !port.ends_with(']')) {
        Some((host, port)) => (host, port.parse().ok()?),
        None => (authority, default),
    };
    (!host.is_empty() && !host.contains(['@', '\\'])).then(|| (scheme, host.to_ascii_lowercase(), port))
}
