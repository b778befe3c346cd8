//! The HTTP server.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::{Content, Fault, Repo};

/// A request received by the server.
#[derive(Clone, Debug)]
pub struct Request {
    /// Number of the request, from 0.
    pub number: u64,
    /// Method: GET or HEAD.
    pub method: String,
    /// Path and query.
    pub target: String,
    /// Requested range: the first and, if given, the last byte.
    pub range: Option<(u64, Option<u64>)>,
    /// The `Authorization` header.
    pub authorization: Option<String>,
    /// Whether the request was sent to the address of the large files.
    pub cdn: bool,
    /// Hash of the requested file.
    pub etag: Option<String>,
    sent: Arc<AtomicU64>,
}

impl Request {
    /// Returns the number of body bytes written to the socket so far.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Returns whether the request is for the contents of a file.
    pub fn is_body(&self) -> bool {
        self.method == "GET" && (self.cdn || self.target.contains("/resolve-cache/"))
    }
}

type Plan = dyn Fn(&Request) -> Option<Fault> + Send + Sync;

struct State {
    repos: Mutex<BTreeMap<String, Repo>>,
    plan: Mutex<Option<Arc<Plan>>>,
    log: Mutex<Vec<Request>>,
    count: AtomicU64,
    page: AtomicU64,
    /// Limit of all connections together in bytes per second; 0 means no limit.
    rate: AtomicU64,
    /// Time when the next bytes may be sent under the limit.
    free: Mutex<Instant>,
    stop: AtomicBool,
    api: SocketAddr,
    cdn: SocketAddr,
}

impl State {
    /// Waits until `bytes` may be sent under the rate limit.
    fn wait_for_the_line(&self, bytes: usize) {
        let rate = self.rate.load(Ordering::Relaxed);
        if rate == 0 {
            return;
        }
        let until = {
            let mut free = lock(&self.free);
            *free = (*free).max(Instant::now()) + Duration::from_secs_f64(bytes as f64 / rate as f64);
            *free
        };
        std::thread::sleep(until.saturating_duration_since(Instant::now()));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A running server. It stops when it is dropped. It has two addresses: one for the Hub and one for the large files.
pub struct TestHub {
    state: Arc<State>,
}

impl std::fmt::Debug for TestHub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TestHub({})", self.url())
    }
}

impl Default for TestHub {
    fn default() -> Self {
        Self::start()
    }
}

impl TestHub {
    /// Starts a server on free local ports.
    ///
    /// # Panics
    /// Panics if no local port can be bound.
    pub fn start() -> Self {
        let bind = || TcpListener::bind("127.0.0.1:0").expect("a free port");
        let (api, cdn) = (bind(), bind());
        let address = |listener: &TcpListener| listener.local_addr().expect("a bound socket");
        let state = Arc::new(State {
            repos: Mutex::default(),
            plan: Mutex::new(None),
            log: Mutex::default(),
            count: AtomicU64::new(0),
            page: AtomicU64::new(1000),
            rate: AtomicU64::new(0),
            free: Mutex::new(Instant::now()),
            stop: AtomicBool::new(false),
            api: address(&api),
            cdn: address(&cdn),
        });
        for listener in [api, cdn] {
            let state = Arc::clone(&state);
            std::thread::spawn(move || {
                let is_cdn = address(&listener) == state.cdn;
                for stream in listener.incoming().flatten() {
                    if state.stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let state = Arc::clone(&state);
                    std::thread::spawn(move || {
                        let _ = serve(&state, stream, is_cdn);
                    });
                }
            });
        }
        Self { state }
    }

    /// Returns the URL of the server, the value for `HF_ENDPOINT`.
    pub fn url(&self) -> String {
        format!("http://{}", self.state.api)
    }

    /// Adds or replaces a repository.
    pub fn add(&self, id: &str, repo: Repo) {
        lock(&self.state.repos).insert(id.into(), repo);
    }

    /// Injects the faults that `plan` returns for requests from now on. `None` means a correct response.
    pub fn misbehave(&self, plan: impl Fn(&Request) -> Option<Fault> + Send + Sync + 'static) {
        *lock(&self.state.plan) = Some(Arc::new(plan));
    }

    /// Stops injecting faults.
    pub fn behave(&self) {
        *lock(&self.state.plan) = None;
    }

    /// Sets the number of files on a page of a listing (default 1000).
    pub fn page(&self, files: u64) {
        self.state.page.store(files, Ordering::Relaxed);
    }

    /// Limits the rate of all connections together, in bytes per second. 0 means no limit.
    pub fn throttle(&self, bytes_a_second: u64) {
        self.state.rate.store(bytes_a_second, Ordering::Relaxed);
    }

    /// Returns all requests since the last call and clears the log.
    pub fn take_log(&self) -> Vec<Request> {
        std::mem::take(&mut *lock(&self.state.log))
    }
}

impl Drop for TestHub {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::Relaxed);
        // Both threads block until the next connection, so one is made to each address.
        for address in [self.state.api, self.state.cdn] {
            let _ = TcpStream::connect(address);
        }
    }
}

/// A response before faults are applied.
struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Body,
}

enum Body {
    Bytes(Vec<u8>),
    /// A range of a file, as first byte and end.
    File(Content, u64, u64),
}

impl Body {
    fn bytes(&self) -> &[u8] {
        match self {
            Body::Bytes(bytes) => bytes,
            Body::File(content, first, end) => &content.bytes[*first as usize..*end as usize],
        }
    }
}

impl Answer {
    fn json(value: &Value) -> Self {
        let headers = vec![("Content-Type", "application/json".into())];
        Self { status: 200, headers, body: Body::Bytes(value.to_string().into_bytes()) }
    }

    fn error(status: u16, code: &str, message: &str) -> Self {
        let headers = vec![("X-Error-Code", code.into()), ("X-Error-Message", message.into())];
        let body = json!({ "error": message }).to_string().into_bytes();
        Self { status, headers, body: Body::Bytes(body) }
    }

    fn redirect(status: u16, location: String) -> Self {
        let body = format!("Found. Redirecting to {location}").into_bytes();
        Self { status, headers: vec![("Location", location)], body: Body::Bytes(body) }
    }
}

/// Answers the requests of one connection.
fn serve(state: &State, stream: TcpStream, cdn: bool) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut stream = stream;
    loop {
        let Some(mut request) = read_request(state, &mut reader, cdn)? else { return Ok(()) };
        let plan = lock(&state.plan).clone();
        let fault = plan.and_then(|plan| plan(&request));
        if let Some(Fault::MoveMain(commit)) = &fault {
            for repo in lock(&state.repos).values_mut() {
                repo.branches.insert("main".into(), commit.clone());
            }
        }
        let answer = answer(state, &mut request);
        lock(&state.log).push(request.clone());
        let result = respond(state, &mut stream, &request, answer, fault.as_ref());
        if !result? {
            let _ = stream.shutdown(Shutdown::Both);
            return Ok(());
        }
    }
}

fn read_request(state: &State, reader: &mut impl BufRead, cdn: bool) -> std::io::Result<Option<Request>> {
    let mut line = String::new();
    if reader.take(64 << 10).read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace();
    let (method, target) = (words.next().unwrap_or("").to_owned(), words.next().unwrap_or("/").to_owned());
    let (mut range, mut authorization, mut length) = (None, None, 0);
    loop {
        let mut line = String::new();
        if reader.take(64 << 10).read_line(&mut line)? == 0 || line.trim().is_empty() {
            break;
        }
        let Some((name, value)) = line.split_once(':') else { continue };
        let value = value.trim();
        match name.to_ascii_lowercase().as_str() {
            "range" => {
                range = value
                    .strip_prefix("bytes=")
                    .and_then(|v| v.split_once('-'))
                    .and_then(|(first, last)| Some((first.parse().ok()?, last.parse().ok())));
            }
            "authorization" => authorization = Some(value.to_owned()),
            "content-length" => length = value.parse().unwrap_or(0),
            _ => {}
        }
    }
    std::io::copy(&mut reader.take(length), &mut std::io::sink())?;
    let number = state.count.fetch_add(1, Ordering::Relaxed);
    Ok(Some(Request { number, method, target, range, authorization, cdn, etag: None, sent: Arc::default() }))
}

/// Decodes percent-encoding.
fn decode(text: &str) -> String {
    let mut out = Vec::new();
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte == b'%' {
            let digits: String = bytes.by_ref().take(2).map(char::from).collect();
            out.push(u8::from_str_radix(&digits, 16).unwrap_or(b'?'));
        } else {
            out.push(byte);
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Returns the correct response to a request.
fn answer(state: &State, request: &mut Request) -> Answer {
    let (path, query) = request.target.split_once('?').unwrap_or((&request.target, ""));
    let path = path.to_owned();
    let query: BTreeMap<String, String> =
        query.split('&').filter_map(|pair| pair.split_once('=')).map(|(k, v)| (k.into(), decode(v))).collect();
    let repos = lock(&state.repos);
    if request.cdn {
        let oid = path.trim_start_matches("/file/");
        let all = repos.values().flat_map(|repo| repo.commits.values()).flat_map(BTreeMap::values);
        let mut found = all.filter(|content| content.etag() == oid);
        return match found.next().cloned() {
            Some(content) => file(request, content, None),
            None => Answer::error(404, "", "no such object"),
        };
    }
    let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
    // The ids of datasets have the prefix "datasets/". Removing it lets datasets share the code for models.
    let (parts, prefix) = match parts[..] {
        ["datasets", ref rest @ ..] => (rest.to_vec(), "datasets/"),
        ["api", "datasets", ref rest @ ..] => ([&["api", "models"], rest].concat(), "datasets/"),
        ["api", "resolve-cache", "datasets", ref rest @ ..] => {
            ([&["api", "resolve-cache", "models"], rest].concat(), "datasets/")
        }
        _ => (parts, ""),
    };
    let kind = if prefix.is_empty() { "models" } else { "datasets" };
    let hidden = || Answer::error(401, "RepoNotFound", "Repository not found");
    let visible = |owner: &str, name: &str| {
        let repo = repos.get(&format!("{prefix}{owner}/{name}"))?;
        let token = request.authorization.as_deref().and_then(|text| text.strip_prefix("Bearer "));
        (repo.token.is_none() || repo.token.as_deref() == token).then_some(repo)
    };
    match parts[..] {
        ["api", "models", owner, name, ref rest @ ..] => {
            let Some(repo) = visible(owner, name) else { return hidden() };
            api(state, repo, &format!("{kind}/{owner}/{name}"), rest, &query)
        }
        ["api", "resolve-cache", "models", owner, name, commit, ref rest @ ..] => {
            let Some(repo) = visible(owner, name) else { return hidden() };
            match repo.files(commit).and_then(|files| files.get(&decode(&rest.join("/")))) {
                Some(content) => file(request, content.clone(), Some(commit)),
                None => Answer::error(404, "EntryNotFound", "Entry not found"),
            }
        }
        [owner, name, "resolve", revision, ref rest @ ..] => {
            let Some(repo) = visible(owner, name) else { return hidden() };
            let revision = decode(revision);
            let Some(commit) = repo.resolve(&revision) else {
                return Answer::error(404, "RevisionNotFound", "Invalid rev id");
            };
            let path = rest.join("/");
            let Some(content) = repo.commits[commit].get(&decode(&path)) else {
                let mut answer = Answer::error(404, "EntryNotFound", "Entry not found");
                answer.headers.push(("X-Repo-Commit", commit.into()));
                return answer;
            };
            request.etag = Some(content.etag().into());
            let mut answer = match &content.sha256 {
                Some(oid) => {
                    let location = format!("http://{}/file/{oid}?Signature=very-secret", state.cdn);
                    let mut answer = Answer::redirect(302, location);
                    answer.headers.push(("X-Linked-Size", content.bytes.len().to_string()));
                    answer.headers.push(("X-Linked-Etag", format!("\"{oid}\"")));
                    answer
                }
                None => Answer::redirect(307, format!("/api/resolve-cache/{kind}/{owner}/{name}/{commit}/{path}")),
            };
            answer.headers.push(("X-Repo-Commit", commit.into()));
            answer.headers.push(("ETag", format!("\"{}\"", content.etag())));
            answer
        }
        _ => Answer::error(404, "", "Not found"),
    }
}

/// Returns the response to an API request about a repository.
fn api(state: &State, repo: &Repo, id: &str, rest: &[&str], query: &BTreeMap<String, String>) -> Answer {
    let resolve = |revision: &str| repo.resolve(&decode(revision)).map(str::to_owned);
    let unknown = || Answer::error(404, "RevisionNotFound", "Invalid rev id");
    let name = id.split_once('/').map_or(id, |(_, name)| name);
    match rest {
        [] | ["revision", _] => {
            let Some(commit) = resolve(rest.get(1).unwrap_or(&"main")) else { return unknown() };
            let siblings: Vec<Value> = repo.commits[&commit].keys().map(|path| json!({ "rfilename": path })).collect();
            Answer::json(&json!({
                "_id": "0", "id": name, "modelId": name, "sha": commit, "private": false, "gated": false, "disabled": false,
                "downloads": 0, "likes": 0, "tags": [], "siblings": siblings,
            }))
        }
        ["refs"] => {
            let list = |refs: &BTreeMap<String, String>, kind: &str| -> Vec<Value> {
                let one = |(name, commit): (&String, &String)| json!({ "name": name, "ref": format!("refs/{kind}/{name}"), "targetCommit": commit });
                refs.iter().map(one).collect()
            };
            Answer::json(&json!({
                "branches": list(&repo.branches, "heads"), "converts": [], "tags": list(&repo.tags, "tags"),
            }))
        }
        ["tree", revision] => {
            let Some(commit) = resolve(revision) else { return unknown() };
            let entry = |(path, content): (&String, &Content)| {
                let size = content.bytes.len();
                let mut entry = json!({ "type": "file", "oid": content.oid, "size": size, "path": path });
                if let Some(sha256) = &content.sha256 {
                    entry["lfs"] = json!({ "oid": sha256, "size": size, "pointerSize": 134 });
                }
                entry
            };
            let page = state.page.load(Ordering::Relaxed) as usize;
            let from: usize = query.get("cursor").and_then(|cursor| cursor.parse().ok()).unwrap_or(0);
            let files = &repo.commits[&commit];
            let mut entries: Vec<Value> = files.iter().skip(from).take(page).map(entry).collect();
            if from == 0 {
                let folders: BTreeSet<&str> = files.keys().filter_map(|path| Some(path.rsplit_once('/')?.0)).collect();
                let folder =
                    |path: &str| json!({ "type": "directory", "oid": "0".repeat(40), "size": 0, "path": path });
                entries.extend(folders.into_iter().map(folder));
            }
            let mut answer = Answer::json(&json!(entries));
            if from + page < files.len() {
                let next = format!(
                    "<http://{}/api/{id}/tree/{commit}?recursive=true&cursor={}>; rel=\"next\"",
                    state.api,
                    from + page
                );
                answer.headers.push(("Link", next));
            }
            answer
        }
        _ => Answer::error(404, "", "Not found"),
    }
}

/// Returns a file or its requested range.
fn file(request: &mut Request, content: Content, commit: Option<&str>) -> Answer {
    let size = content.bytes.len() as u64;
    let mut headers = vec![("Accept-Ranges", "bytes".into()), ("ETag", format!("\"{}\"", content.etag()))];
    if let Some(commit) = commit {
        headers.push(("X-Repo-Commit", commit.into()));
    }
    request.etag = Some(content.etag().into());
    match request.range {
        Some((first, _)) if first >= size => {
            headers.push(("Content-Range", format!("bytes */{size}")));
            Answer { status: 416, headers, body: Body::Bytes(Vec::new()) }
        }
        Some((first, last)) => {
            let end = last.map_or(size, |last| size.min(last.saturating_add(1))).max(first + 1);
            headers.push(("Content-Range", format!("bytes {first}-{}/{size}", end - 1)));
            Answer { status: 206, headers, body: Body::File(content, first, end) }
        }
        None => Answer { status: 200, headers, body: Body::File(content, 0, size) },
    }
}

const PAGE: &[u8] = b"<html><body>Our servers are having a rest. Please come back later.</body></html>";

/// Applies faults that change the status, headers or body of a response. [`respond`] applies the others.
fn changed(state: &State, request: &Request, mut answer: Answer, fault: Option<&Fault>) -> Answer {
    let here = || format!("http://{}{}", if request.cdn { state.cdn } else { state.api }, request.target);
    let is_range = answer.status == 206;
    match fault {
        Some(Fault::Status(status)) => Answer::error(*status, "", "injected"),
        Some(Fault::TooMany(after)) => {
            answer = Answer::error(429, "", "injected");
            answer.headers.push(("Retry-After", after.clone()));
            answer
        }
        Some(Fault::RateLimit(limit)) => {
            answer = Answer::error(429, "", "injected");
            answer.headers.push(("RateLimit", limit.clone()));
            answer
        }
        Some(Fault::NextPage(url)) => {
            answer.headers.retain(|(name, _)| *name != "Link");
            answer.headers.push(("Link", format!("<{url}>; rel=\"next\"")));
            answer
        }
        Some(Fault::ErrorPage) => Answer { status: 200, headers: Vec::new(), body: Body::Bytes(PAGE.to_vec()) },
        Some(Fault::ErrorPageOfLength) => {
            let length = answer.body.bytes().len();
            answer.body = Body::Bytes(PAGE.iter().copied().cycle().take(length).collect());
            answer
        }
        Some(Fault::RedirectLoop) => Answer::redirect(302, here()),
        Some(Fault::RedirectChain) => {
            let mark = if request.target.contains('?') { "&" } else { "?" };
            Answer::redirect(302, format!("{}{mark}again={}", here(), request.number))
        }
        Some(Fault::WrongTotal) => {
            answer
                .headers
                .iter_mut()
                .filter(|(name, _)| *name == "Content-Range")
                .for_each(|(_, value)| value.push('7'));
            answer
        }
        Some(Fault::Packed) => {
            answer.headers.push(("Content-Encoding", "gzip".into()));
            answer
        }
        Some(fault @ (Fault::IgnoreRange | Fault::OtherRange | Fault::LyingRange)) if is_range => {
            let Body::File(content, first, end) = answer.body else { return answer };
            let size = content.bytes.len() as u64;
            if *fault == Fault::IgnoreRange {
                return Answer { status: 200, headers: Vec::new(), body: Body::File(content, 0, size) };
            }
            let other = if first == 0 { size.min(1) } else { first - 1 };
            let until = size.min(other + (end - first));
            let said = if *fault == Fault::OtherRange { other } else { first };
            let range = format!("bytes {said}-{}/{size}", said + (until - other).max(1) - 1);
            Answer { status: 206, headers: vec![("Content-Range", range)], body: Body::File(content, other, until) }
        }
        _ => answer,
    }
}

/// Writes a response with its fault. Returns whether the connection can be reused.
fn respond(
    state: &State,
    stream: &mut TcpStream,
    request: &Request,
    answer: Answer,
    fault: Option<&Fault>,
) -> std::io::Result<bool> {
    match fault {
        Some(Fault::Close) => return Ok(false),
        Some(Fault::Silence) => return wait_for_the_end(stream),
        _ => {}
    }
    let answer = changed(state, request, answer, fault);
    let body = answer.body.bytes();
    let length = match fault {
        Some(Fault::WrongLength(off)) => (body.len() as i64 + off).max(0) as u64,
        _ => body.len() as u64,
    };
    let mut head = format!("HTTP/1.1 {} Answer\r\n", answer.status);
    for (name, value) in &answer.headers {
        let _ = write!(head, "{name}: {value}\r\n");
    }
    if fault == Some(&Fault::NoLength) {
        head.push_str("Connection: close\r\n");
    } else {
        let _ = write!(head, "Content-Length: {length}\r\n");
    }
    head.push_str("\r\n");
    stream.write_all(head.as_bytes())?;
    if request.method == "HEAD" {
        return Ok(true);
    }
    let mut send = |bytes: &[u8]| -> std::io::Result<()> {
        for piece in bytes.chunks(256 << 10) {
            state.wait_for_the_line(piece.len());
            request.sent.fetch_add(piece.len() as u64, Ordering::Relaxed);
            stream.write_all(piece)?;
        }
        Ok(())
    };
    match fault {
        Some(Fault::Truncate(n)) => send(&body[..body.len().min(*n as usize)]).map(|()| false),
        Some(Fault::Stall(n)) => {
            send(&body[..body.len().min(*n as usize)])?;
            wait_for_the_end(stream)
        }
        Some(Fault::Trickle(pause)) => {
            for byte in body {
                send(&[*byte])?;
                std::thread::sleep(*pause);
            }
            Ok(true)
        }
        Some(Fault::Corrupt(at)) if !body.is_empty() => {
            let mut body = body.to_vec();
            let at = *at as usize % body.len();
            body[at] ^= 0x20;
            send(&body).map(|()| true)
        }
        Some(Fault::WrongLength(_) | Fault::NoLength) => send(body).map(|()| false),
        _ => send(body).map(|()| true),
    }
}

/// Waits until the client closes the connection. Returns `false`, since the connection cannot be reused.
fn wait_for_the_end(stream: &mut TcpStream) -> std::io::Result<bool> {
    std::io::copy(stream, &mut std::io::sink())?;
    Ok(false)
}
