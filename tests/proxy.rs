//! Requests through a proxy.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use crate::common::example;
use crate::world::{World, tiny_repo};

/// Request lines with the proxy credentials, and the number of the connection of each.
type Seen = Arc<Mutex<Vec<(usize, String)>>>;

/// An `http://` proxy as in restricted networks: only the proxy can resolve hub.invalid, and it opens no tunnels.
fn proxy(hub: SocketAddr) -> (SocketAddr, Seen) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let seen = Seen::default();
    let log = Arc::clone(&seen);
    std::thread::spawn(move || {
        for (number, client) in listener.incoming().flatten().enumerate() {
            let log = Arc::clone(&log);
            // A client that disconnects early is not an error of the proxy.
            std::thread::spawn(move || serve(&client, number, hub, &log).ok());
        }
    });
    (address, seen)
}

/// Forwards the requests of a connection, which all go to one host.
fn serve(mut client: &TcpStream, number: usize, hub: SocketAddr, seen: &Seen) -> std::io::Result<()> {
    let mut requests = BufReader::new(client.try_clone()?);
    let mut server: Option<TcpStream> = None;
    loop {
        let mut head = Vec::new();
        while head.last().is_none_or(|line: &String| line != "\r\n") {
            let mut line = String::new();
            if requests.read_line(&mut line)? == 0 {
                return Ok(());
            }
            head.push(line);
        }
        let credentials = head.iter().find(|line| line.starts_with("Proxy-Authorization")).cloned().unwrap_or_default();
        seen.lock().unwrap().push((number, format!("{} {}", head[0].trim_end(), credentials.trim_end())));
        let (method, url) = head[0].split_once(' ').unwrap();
        let Some((host, path)) = url.strip_prefix("http://").and_then(|rest| rest.split_once('/')) else {
            return client
                .write_all(b"HTTP/1.1 405 Method Not Allowed\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        };
        let request = format!("{method} /{path}");
        if server.is_none() {
            let to = if host == "hub.invalid" { TcpStream::connect(hub)? } else { TcpStream::connect(host)? };
            let (mut answers, mut back) = (to.try_clone()?, client.try_clone()?);
            std::thread::spawn(move || {
                std::io::copy(&mut answers, &mut back).ok();
                back.shutdown(std::net::Shutdown::Both).ok();
            });
            server = Some(to);
        }
        let kept = head[1..].iter().filter(|line| !line.starts_with("Proxy-")).cloned().collect::<Vec<_>>();
        server.as_ref().unwrap().write_all((request + &kept.concat()).as_bytes())?;
    }
}

/// The requests that reach the proxy from a program that loads from `endpoint` with these credentials.
fn asked(world: &World, credentials: &str) -> Vec<(usize, String)> {
    let hub = world.server.url().strip_prefix("http://").unwrap().trim_end_matches('/').parse().unwrap();
    let (proxy, seen) = proxy(hub);
    let mut command = example("generate");
    command.args(["--model", "test/tiny", "-n", "4", "--temperature", "0"]);
    for name in ["https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY", "HF_HUB_OFFLINE"] {
        command.env_remove(name);
    }
    let cache = tempfile::tempdir().unwrap();
    command.env("http_proxy", format!("http://{credentials}{proxy}")).env("HF_HUB_CACHE", cache.path());
    let output = command.env("HF_ENDPOINT", "http://hub.invalid").output().unwrap();
    let seen = seen.lock().unwrap().clone();
    assert!(output.status.success(), "{}\n{seen:?}", String::from_utf8_lossy(&output.stderr));
    seen
}

#[test]
fn plain_http_goes_through_a_proxy_without_a_tunnel() {
    let world = World::new([("test/tiny", tiny_repo(&[]))]);
    for (credentials, header) in [
        // RFC 7617 encodes `me:pass word` and `me:` in this way.
        ("me:pass%20word@", " Proxy-Authorization: Basic bWU6cGFzcyB3b3Jk"),
        ("me@", " Proxy-Authorization: Basic bWU6"),
        ("", " "),
    ] {
        let seen = asked(&world, credentials);
        assert!(seen.len() > 4 && seen[0].1.contains("http://hub.invalid/api/models/test/tiny"), "{seen:?}");
        for (_, line) in &seen {
            assert!(line.starts_with("GET http://") || line.starts_with("HEAD http://"), "{line}");
            assert!(line.ends_with(&format!(" HTTP/1.1{header}")), "{line}");
        }
        // Requests on a kept connection have the same form.
        let connections = seen.iter().map(|(number, _)| number).max().unwrap() + 1;
        assert!(connections < seen.len(), "{seen:?}");
    }
}
