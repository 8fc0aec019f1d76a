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
            (name, Served { announced: body.len() as u64, etag, body })
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
        } else if let Some(file) = path
            .strip_prefix("/org/pico/resolve/")
            .and_then(|rest| rest.split_once('/'))
            .and_then(|(_, name)| files.get(name))
        {
            let mut r = format!(
                "HTTP/1.1 200 OK\r\netag: \"{}\"\r\nx-repo-commit: {COMMIT}\r\nx-linked-size: {}\r\nconnection: close\r\n\r\n",
                file.etag, file.announced
            )
            .into_bytes();
            if method == "GET" {
                r.extend(&file.body);
            }
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
