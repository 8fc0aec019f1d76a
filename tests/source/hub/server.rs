//! The server.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use gqa2mla::source::OpenOptions;

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A file of the repository: what is announced, and what is sent.
#[derive(Clone)]
pub struct Served {
    pub announced: u64,
    pub etag: String,
    pub body: Vec<u8>,
    pub manner: Manner,
}

/// How a file is sent.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    Plain,
    /// From another place, as large files are.
    Redirected,
    /// Half of it, and then nothing more.
    Stalled,
    /// With a `content-length` that is this much off.
    Claimed(i64),
    /// In circles.
    Circling,
    /// At most this many bytes to a request, and then the connection ends as if that were all.
    Cut(usize),
    /// As `Cut`, with a length that tells the client of it.
    Broken(usize),
    /// Whole, whatever range is asked for; cut short at first.
    Rangeless(usize),
    /// So long after it was asked for.
    Late(Duration),
}

#[derive(Clone)]
pub struct Hub {
    pub endpoint: String,
    pub files: Arc<Mutex<BTreeMap<String, Served>>>,
    pub requests: Arc<Mutex<Vec<String>>>,
    /// What the requests had for `authorization`.
    pub authorizations: Arc<Mutex<Vec<Option<String>>>>,
    instead: Arc<Mutex<Vec<Instead>>>,
}

/// An answer in place of the usual one.
struct Instead {
    /// Requests whose method and target begin so.
    to: String,
    /// Status line and headers.
    head: String,
    body: String,
    /// How often.
    times: usize,
}

impl Hub {
    /// Serves the files of `dir` as `org/pico` until the process ends.
    pub fn start(dir: &Path) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let files = fs_err::read_dir(dir).unwrap().map(|entry| {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            let body = fs_err::read(entry.path()).unwrap();
            let large = name.ends_with(".safetensors");
            let digest = gqa2mla::source::sha256_file(&entry.path()).unwrap().sha256;
            let etag = if large { digest } else { digest[..40].to_owned() };
            (name, Served { announced: body.len() as u64, etag, body, manner: Manner::Plain })
        });
        let hub = Hub {
            endpoint: format!("http://{}", listener.local_addr().unwrap()),
            files: Arc::new(Mutex::new(files.collect())),
            requests: Arc::default(),
            authorizations: Arc::default(),
            instead: Arc::default(),
        };
        let server = hub.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let server = server.clone();
                std::thread::spawn(move || server.answer(stream));
            }
        });
        hub
    }

    pub fn change(&self, name: &str, change: impl FnOnce(&mut Served)) {
        change(self.files.lock().unwrap().get_mut(name).unwrap());
    }

    /// Answers the next requests that begin with `to` otherwise: `head` is the status line and further headers.
    pub fn instead(&self, to: &str, head: &str, body: &str, times: usize) {
        let (to, head, body) = (to.to_owned(), head.to_owned(), body.to_owned());
        self.instead.lock().unwrap().push(Instead { to, head, body, times });
    }

    fn replaced(&self, request: &Request) -> Option<Vec<u8>> {
        let line = format!("{} {}", request.method, request.target);
        let mut all = self.instead.lock().unwrap();
        let found = all.iter_mut().find(|i| i.times > 0 && line.starts_with(&i.to))?;
        found.times -= 1;
        let body = if request.method == "HEAD" { "" } else { &found.body };
        Some(format!("HTTP/1.1 {}\r\nconnection: close\r\n\r\n{body}", found.head.replace('\n', "\r\n")).into_bytes())
    }

    /// One request per connection. Without a length, the body ends where the connection does: this is how a body cut
    /// short goes unnoticed by the transport.
    fn answer(&self, mut stream: TcpStream) -> Option<()> {
        let mut reader = BufReader::new(stream.try_clone().ok()?);
        let mut request = Request::read(&mut reader)?;
        if request.method == "CONNECT" {
            // A proxy, and whatever it is asked for is this hub.
            self.requests.lock().unwrap().push(format!("CONNECT {}", request.target));
            stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").ok()?;
            request = Request::read(&mut reader)?;
        }
        self.authorizations.lock().unwrap().push(request.authorization.clone());
        let from = request.range.map_or_else(String::new, |n| format!(" from {n}"));
        self.requests.lock().unwrap().push(format!("{} {}{from}", request.method, request.target));
        let path = request.target.split('?').next()?;
        let files = self.files.lock().unwrap().clone();
        let file = path.strip_prefix("/org/pico/resolve/").and_then(|rest| rest.split_once('/'));
        let response = if let Some(response) = self.replaced(&request) {
            response
        } else if path.starts_with("/api/models/org/pico/tree/") {
            listing(&files)?
        } else if let Some((name, file)) = file.and_then(|(_, name)| files.get_key_value(name)) {
            let mut r = self.file(&request, path, name, file);
            if let (Manner::Late(time), "GET") = (file.manner, request.method.as_str()) {
                std::thread::sleep(time);
            }
            if request.method == "GET" && file.manner == Manner::Stalled {
                r.truncate(r.len() - file.body.len() / 2);
                stream.write_all(&r).ok()?;
                std::thread::sleep(Duration::from_secs(30));
                return None;
            }
            r
        } else if let Some(file) = path.strip_prefix("/cdn/").and_then(|name| files.get(name)) {
            let start = request.range.unwrap_or(0).min(file.body.len());
            let status = if start > 0 { "206 Partial Content" } else { "200 OK" };
            let mut r = format!("HTTP/1.1 {status}\r\nconnection: close\r\n\r\n").into_bytes();
            r.extend(&file.body[start..]);
            r
        } else {
            b"HTTP/1.1 404 Not Found\r\nx-error-code: RepoNotFound\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
                .to_vec()
        };
        stream.write_all(&response).ok()?;
        stream.shutdown(std::net::Shutdown::Write).ok()?;
        // Wait for the client to close, so that no reset overtakes the answer.
        let _ = reader.read(&mut [0; 1]);
        Some(())
    }

    /// The answer to a request for a file, in its manner.
    fn file(&self, request: &Request, path: &str, name: &str, file: &Served) -> Vec<u8> {
        let get = request.method == "GET";
        let start = if matches!(file.manner, Manner::Rangeless(_)) { 0 } else { request.range.unwrap_or(0) };
        let place = match file.manner {
            Manner::Redirected => format!("location: {}/cdn/{name}\r\n", self.endpoint),
            Manner::Circling => format!("location: {}{path}\r\n", self.endpoint),
            Manner::Claimed(off) if get => {
                format!("content-length: {}\r\n", (file.body.len() - start) as i64 + off)
            }
            Manner::Broken(_) if get => format!("content-length: {}\r\n", file.body.len() - start),
            _ => String::new(),
        };
        let status = match () {
            () if place.starts_with("location") => "302 Found",
            () if start > file.body.len() || start == file.body.len() && start > 0 => "416 Range Not Satisfiable",
            () if start > 0 => "206 Partial Content",
            () => "200 OK",
        };
        let mut r = format!(
            "HTTP/1.1 {status}\r\netag: \"{0}\"\r\nx-linked-etag: \"{0}\"\r\nx-repo-commit: {COMMIT}\r\n\
             x-linked-size: {1}\r\n{place}connection: close\r\n\r\n",
            file.etag, file.announced
        )
        .into_bytes();
        if get && status.starts_with("20") {
            let most = match file.manner {
                Manner::Cut(n) | Manner::Broken(n) => n,
                // Only the first request is cut.
                Manner::Rangeless(n) if request.range.is_none() => n,
                _ => usize::MAX,
            };
            r.extend(file.body[start..].iter().take(most));
        }
        r
    }

    pub fn options(&self, cache: &Path) -> OpenOptions {
        let mut options = OpenOptions::default();
        options.hub_offline = Some(false);
        options.hub_cache = Some(cache.to_owned());
        options.hub_endpoint = Some(self.endpoint.clone());
        options
    }
}

/// What a client asks for.
struct Request {
    method: String,
    target: String,
    /// The first byte that it wants.
    range: Option<usize>,
    authorization: Option<String>,
}

impl Request {
    fn read(reader: &mut impl BufRead) -> Option<Self> {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let (mut range, mut authorization) = (None, None);
        loop {
            let mut header = String::new();
            if reader.read_line(&mut header).ok()? == 0 || header == "\r\n" {
                break;
            }
            if header.to_ascii_lowercase().starts_with("authorization:") {
                authorization = header.split_once(':').map(|(_, value)| value.trim().to_owned());
            }
            if let Some(bytes) = header.to_ascii_lowercase().strip_prefix("range: bytes=") {
                range = bytes.split('-').next().and_then(|n| n.parse::<usize>().ok());
            }
        }
        let mut words = line.split(' ');
        Some(Self { method: words.next()?.to_owned(), target: words.next()?.to_owned(), range, authorization })
    }
}

/// The list of files, as the hub gives it.
fn listing(files: &BTreeMap<String, Served>) -> Option<Vec<u8>> {
    let one = |(n, f): (&String, &Served)| {
        let lfs = serde_json::json!({"oid": f.etag, "size": f.announced, "pointerSize": 134});
        let lfs = if n.ends_with(".safetensors") { lfs } else { serde_json::Value::Null };
        serde_json::json!({"type": "file", "oid": f.etag[..40], "size": f.announced, "path": n, "lfs": lfs})
    };
    let list: Vec<_> = files.iter().map(one).collect();
    let mut r = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n\r\n".to_vec();
    r.extend(serde_json::to_vec(&list).ok()?);
    Some(r)
}
