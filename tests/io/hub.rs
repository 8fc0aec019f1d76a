//! Fetching from a hub: a server on the loopback device that speaks the few requests the client makes.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use gqa2mla::observe::{Event, Silent};
use gqa2mla::source::{ModelSource, OpenOptions, SourceError};

use crate::{Recorder, samples, write};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A file of the repository: what is announced, and what is sent.
#[derive(Clone)]
struct Served {
    announced: u64,
    etag: String,
    body: Vec<u8>,
    manner: Manner,
}

/// How a file is sent.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Manner {
    Plain,
    /// From another place, as large files are.
    Redirected,
    /// Half of it, and then nothing more.
    Stalled,
    /// With a `content-length` that is this much off.
    Claimed(i64),
    /// In circles.
    Circling,
}

#[derive(Clone)]
struct Hub {
    endpoint: String,
    files: Arc<Mutex<BTreeMap<String, Served>>>,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Hub {
    /// Serves the files of `dir` as `org/pico` until the process ends.
    fn start(dir: &Path) -> Self {
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

    fn change(&self, name: &str, change: impl FnOnce(&mut Served)) {
        change(self.files.lock().unwrap().get_mut(name).unwrap());
    }

    /// One request per connection. Without a length, the body ends where the connection does: this is how a body cut
    /// short goes unnoticed by the transport.
    fn answer(&self, mut stream: TcpStream) -> Option<()> {
        let mut reader = BufReader::new(stream.try_clone().ok()?);
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        loop {
            let mut header = String::new();
            if reader.read_line(&mut header).ok()? == 0 || header == "\r\n" {
                break;
            }
        }
        let mut words = line.split(' ');
        let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
        self.requests.lock().unwrap().push(format!("{method} {target}"));
        let path = target.split('?').next()?;
        let files = self.files.lock().unwrap().clone();
        let response = if path.starts_with("/api/models/org/pico/tree/") {
            let list: Vec<_> = files
                .iter()
                .map(|(n, f)| serde_json::json!({"type": "file", "oid": "0", "size": f.announced, "path": n}))
                .collect();
            let body = serde_json::to_vec(&list).ok()?;
            let mut r = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n\r\n".to_vec();
            r.extend(body);
            r
        } else if let Some((name, file)) = path
            .strip_prefix("/org/pico/resolve/")
            .and_then(|rest| rest.split_once('/'))
            .and_then(|(_, name)| files.get_key_value(name))
        {
            let place = match file.manner {
                Manner::Redirected => format!("location: {}/cdn/{name}\r\n", self.endpoint),
                Manner::Circling => format!("location: {}{path}\r\n", self.endpoint),
                Manner::Claimed(off) if method == "GET" => {
                    format!("content-length: {}\r\n", file.body.len() as i64 + off)
                }
                _ => String::new(),
            };
            let status = if place.starts_with("location") { "302 Found" } else { "200 OK" };
            let mut r = format!(
                "HTTP/1.1 {status}\r\netag: \"{0}\"\r\nx-linked-etag: \"{0}\"\r\nx-repo-commit: {COMMIT}\r\n\
                 x-linked-size: {1}\r\n{place}connection: close\r\n\r\n",
                file.etag, file.announced
            )
            .into_bytes();
            if method == "GET" && status == "200 OK" {
                r.extend(&file.body);
            }
            if method == "GET" && file.manner == Manner::Stalled {
                r.truncate(r.len() - file.body.len() / 2);
                stream.write_all(&r).ok()?;
                std::thread::sleep(std::time::Duration::from_secs(30));
                return None;
            }
            r
        } else if let Some(file) = path.strip_prefix("/cdn/").and_then(|name| files.get(name)) {
            let mut r = b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n".to_vec();
            r.extend(&file.body);
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

    fn options(&self, cache: &Path) -> OpenOptions {
        let mut options = OpenOptions::default();
        options.hub_offline = Some(false);
        options.hub_cache = Some(cache.to_owned());
        options.hub_endpoint = Some(self.endpoint.clone());
        options
    }
}

fn setup() -> (tempfile::TempDir, Hub) {
    let root = tempfile::tempdir().unwrap();
    let model = root.path().join("model");
    write(&model, &samples(), 100, false).unwrap();
    fs_err::write(model.join("pytorch_model.bin"), "never fetched").unwrap();
    fs_err::write(model.join("modeling_pico.py"), "never fetched").unwrap();
    let hub = Hub::start(&model);
    (root, hub)
}

#[test]
fn a_model_is_fetched_once_and_found_off_line() {
    let (root, hub) = setup();
    let cache = root.path().join("cache");
    let recorder = Recorder::default();
    let source = ModelSource::open("org/pico", &hub.options(&cache), &recorder).unwrap();
    assert_eq!(source.revision.as_deref(), Some(COMMIT));
    assert_eq!(source.spec, "org/pico");
    for (tensor, bytes) in samples() {
        assert_eq!(source.tensors.view(&tensor.name).unwrap().bytes, bytes);
    }
    let requests = hub.requests.lock().unwrap().clone();
    assert!(!requests.iter().any(|r| r.ends_with(".bin") || r.ends_with(".py")), "{requests:?}");
    let events = recorder.0.into_inner().unwrap();
    assert!(
        events.iter().any(|e| matches!(e, Event::Download { file, done, total }
        if file.ends_with(".safetensors") && Some(*done) == *total && *done > 0)),
        "{events:?}"
    );

    // Again: no weight is fetched a second time.
    hub.requests.lock().unwrap().clear();
    ModelSource::open("org/pico@main", &hub.options(&cache), &Silent).unwrap();
    let again = hub.requests.lock().unwrap().clone();
    assert!(!again.iter().any(|r| r.contains(".safetensors")), "{again:?}");

    // Off line: no request at all, from the branch name and from the commit.
    hub.requests.lock().unwrap().clear();
    let mut options = hub.options(&cache);
    options.hub_offline = Some(true);
    for spec in ["org/pico".to_owned(), format!("org/pico@{COMMIT}")] {
        assert_eq!(ModelSource::open(&spec, &options, &Silent).unwrap().tensors.len(), samples().len());
    }
    let missing = ModelSource::open("org/other", &options, &Silent).unwrap_err();
    assert!(matches!(missing, SourceError::NotCached { .. }), "{missing:?}");
    assert!(hub.requests.lock().unwrap().is_empty());
}

#[test]
fn an_unknown_repository_is_named() {
    let (root, hub) = setup();
    let error = ModelSource::open("org/nothing", &hub.options(&root.path().join("cache")), &Silent).unwrap_err();
    let text = error.to_string();
    assert!(
        matches!(error, SourceError::Hub { .. }) && text.contains("org/nothing") && text.contains("hint:"),
        "{text}"
    );
}

#[test]
fn damaged_downloads_are_refused_and_fetched_anew() {
    let (root, hub) = setup();
    let cache = root.path().join("cache");
    let second = |name: &&String| name.starts_with("model-00002-of-") && name.ends_with(".safetensors");
    let shard = hub.files.lock().unwrap().keys().find(second).unwrap().clone();
    let shard = shard.as_str();
    let good = hub.files.lock().unwrap()[shard].clone();
    let open = || ModelSource::open("org/pico", &hub.options(&cache), &Silent);
    let flipped = {
        let mut b = good.body.clone();
        *b.last_mut().unwrap() ^= 1;
        b
    };
    let damages = [
        (good.body[..good.body.len() - 1].to_vec(), "bytes"),
        (b"<html>rate limit</html>".to_vec(), "bytes"),
        (flipped, "sha256"),
    ];
    for (body, kind) in damages {
        hub.change(shard, |f| f.body = body);
        for _ in 0..2 {
            match open() {
                Err(SourceError::Download { file, expected, .. }) => {
                    assert_eq!(file, shard);
                    assert!(expected.contains(kind), "{expected}");
                }
                other => panic!("{other:?}"),
            }
        }
    }
    hub.change(shard, |f| f.body = good.body.clone());
    open().unwrap();
    // A cached file cut by something else is noticed by its size and replaced.
    let cached = fs_err::canonicalize(cache.join("models--org--pico/snapshots").join(COMMIT).join(shard)).unwrap();
    fs_err::write(&cached, &good.body[..10]).unwrap();
    open().unwrap();
    assert_eq!(fs_err::read(&cached).unwrap(), good.body);
}

/// The second weight file, and the model opened from the hub.
fn a_shard(hub: &Hub) -> String {
    let files = hub.files.lock().unwrap();
    files.keys().find(|n| n.starts_with("model-00002-of-") && n.ends_with(".safetensors")).unwrap().clone()
}

#[test]
fn redirects_are_followed_and_circles_end() {
    let (root, hub) = setup();
    let shard = a_shard(&hub);
    hub.change(&shard, |f| f.manner = Manner::Redirected);
    let source = ModelSource::open("org/pico", &hub.options(&root.path().join("a")), &Silent).unwrap();
    assert_eq!(source.tensors.len(), samples().len());
    assert!(hub.requests.lock().unwrap().iter().any(|r| r.contains(&format!("/cdn/{shard}"))));
    hub.change(&shard, |f| f.manner = Manner::Circling);
    let error = ModelSource::open("org/pico", &hub.options(&root.path().join("b")), &Silent).unwrap_err();
    assert!(matches!(error, SourceError::Hub { .. }), "{error:?}");
}

#[test]
fn a_server_that_says_nothing_is_given_up() {
    let (root, hub) = setup();
    let shard = a_shard(&hub);
    hub.change(&shard, |f| f.manner = Manner::Stalled);
    let mut options = hub.options(&root.path().join("cache"));
    options.hub_stall = Some(std::time::Duration::from_secs(1));
    let start = std::time::Instant::now();
    let error = ModelSource::open("org/pico", &options, &Silent).unwrap_err();
    assert!(start.elapsed() < std::time::Duration::from_secs(10), "{:?}", start.elapsed());
    let text = error.to_string();
    assert!(text.contains(&shard) && text.contains("sent nothing for 1 seconds"), "{text}");
    // What came whole is not asked for again, and half a file is not taken for one.
    hub.change(&shard, |f| f.manner = Manner::Plain);
    hub.requests.lock().unwrap().clear();
    options.hub_cache = Some(root.path().join("cache"));
    // The download that was given up still holds the client's lock on the file; another process would not meet it.
    let again = ModelSource::open("org/pico", &options, &Silent);
    let requests = hub.requests.lock().unwrap().clone();
    assert!(!requests.iter().any(|r| r.starts_with("GET") && r.contains("model-00001-of-")), "{requests:?}");
    if let Ok(source) = again {
        assert_eq!(source.tensors.len(), samples().len());
    }
}

#[test]
fn lengths_that_are_lies_are_found_out() {
    let (root, hub) = setup();
    let shard = a_shard(&hub);
    for (n, off) in [-1, 1, 1 << 40].into_iter().enumerate() {
        hub.change(&shard, |f| f.manner = Manner::Claimed(off));
        let options = hub.options(&root.path().join(format!("a{n}")));
        let error = ModelSource::open("org/pico", &options, &Silent).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, SourceError::Hub { .. } | SourceError::Download { .. }), "{off}: {error:?}");
        assert!(text.contains(&shard), "{off}: {text}");
    }
    // The listing lies: the file is whole, but not what was announced.
    hub.change(&shard, |f| f.manner = Manner::Plain);
    for (n, announced) in [0, 1 << 50, u64::MAX].into_iter().enumerate() {
        hub.change(&shard, |f| f.announced = announced);
        let error =
            ModelSource::open("org/pico", &hub.options(&root.path().join(format!("b{n}"))), &Silent).unwrap_err();
        assert!(matches!(error, SourceError::Hub { .. } | SourceError::Download { .. }), "{announced}: {error:?}");
    }
}

#[test]
fn pages_in_place_of_files_are_refused() {
    for name in ["config.json", "tokenizer.json", "model.safetensors.index.json"] {
        let (root, hub) = setup();
        let page = b"<!DOCTYPE html><html><body>Please log in</body></html>".to_vec();
        // With the length of the page announced too: as a proxy that answers everything itself.
        for announced in [None, Some(page.len() as u64)] {
            hub.change(name, |f| {
                f.body = page.clone();
                f.announced = announced.unwrap_or(f.announced);
            });
            let options = hub.options(&root.path().join(format!("cache-{}", announced.is_some())));
            let opened = ModelSource::open("org/pico", &options, &Silent);
            let opened = opened.and_then(|source| source.tokenizer().map(|_| ()));
            let text = opened.expect_err(name).to_string();
            assert!(text.contains(name), "{name}: {text}");
        }
    }
}
