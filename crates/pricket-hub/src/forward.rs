//! Requests for `http://` URLs through a proxy, with the absolute URL in the request line (RFC 9112, section 3.2.2), as
//! curl sends them.
//!
//! `ureq` opens a tunnel (CONNECT) for every scheme, which many proxies allow only for `https://`.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use ureq::config::Config;
use ureq::unversioned::transport::{Buffers, ConnectionDetails, Connector, Either, NextTimeout, Transport};

/// Connects to the configured proxy instead of the host if the URL does not need TLS.
pub(crate) struct Forward {
    /// Configuration without the proxy, for the connection to the proxy itself.
    pub(crate) direct: Config,
}

impl std::fmt::Debug for Forward {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Forward")
    }
}

impl<In: Transport> Connector<In> for Forward {
    type Out = Either<In, Box<dyn Transport>>;

    fn connect(&self, details: &ConnectionDetails<'_>, chained: Option<In>) -> Result<Option<Self::Out>, ureq::Error> {
        if let Some(transport) = chained {
            return Ok(Some(Either::A(transport)));
        }
        let Some(proxy) = details.config.proxy().filter(|_| !details.needs_tls()) else { return Ok(None) };
        let to_proxy = ConnectionDetails {
            uri: proxy.uri(),
            addrs: details.resolver.resolve(proxy.uri(), &self.direct, details.timeout)?,
            config: &self.direct,
            request_level: details.request_level,
            resolver: details.resolver,
            now: details.now,
            timeout: details.timeout,
            current_time: details.current_time.clone(),
            run_connector: details.run_connector.clone(),
            register_shutdown: details.register_shutdown.clone(),
        };
        let transport = (details.run_connector)(&to_proxy)?;
        let authority = details.uri.authority().map(ToString::to_string).unwrap_or_default();
        let authority = authority.rsplit_once('@').map_or(&*authority, |(_, server)| server);
        let credentials = proxy.username().map(|user| {
            let pair = format!("{user}:{}", proxy.password().unwrap_or_default());
            format!("Proxy-Authorization: Basic {}\r\n", BASE64_STANDARD.encode(pair))
        });
        let whole =
            Whole { transport, origin: format!("http://{authority}"), credentials: credentials.unwrap_or_default() };
        Ok(Some(Either::B(Box::new(whole))))
    }
}

/// A connection to a proxy that sends requests with the absolute URL.
struct Whole {
    transport: Box<dyn Transport>,
    /// Scheme and authority of the URL.
    origin: String,
    /// The `Proxy-Authorization` header line, or an empty string.
    credentials: String,
}

impl std::fmt::Debug for Whole {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Whole({})", self.origin)
    }
}

impl Whole {
    /// Rewrites the head of a request for the proxy. Returns `None` for bytes that do not begin with a request line.
    fn head(&self, bytes: &[u8]) -> Option<Vec<u8>> {
        let method = [&b"GET "[..], b"HEAD "].into_iter().find(|method| bytes.starts_with(method))?;
        let end = bytes.windows(2).position(|pair| pair == b"\r\n")? + 2;
        let line = bytes.get(method.len()..end)?;
        Some([method, self.origin.as_bytes(), line, self.credentials.as_bytes(), &bytes[end..]].concat())
    }
}

impl Transport for Whole {
    fn buffers(&mut self) -> &mut dyn Buffers {
        self.transport.buffers()
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), ureq::Error> {
        let head = self.transport.buffers().output().get(..amount).map(<[u8]>::to_vec);
        let Some(head) = head.and_then(|bytes| self.head(&bytes)) else {
            return self.transport.transmit_output(amount, timeout);
        };
        let room = self.transport.buffers().output().len().max(1);
        for part in head.chunks(room) {
            self.transport.buffers().output()[..part.len()].copy_from_slice(part);
            self.transport.transmit_output(part.len(), timeout)?;
        }
        Ok(())
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, ureq::Error> {
        self.transport.await_input(timeout)
    }

    fn is_open(&mut self) -> bool {
        self.transport.is_open()
    }
}
