//! Fetching from a hub: a server on the loopback device that speaks the few requests the client makes.

mod environment;
mod server;

use std::path::Path;

use gqa2mla::observe::{Event, Silent};
use gqa2mla::source::{ModelSource, SourceError};

use crate::common::checkpoint::{Recorder, samples, write};
use server::{COMMIT, Hub, Manner};

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
    let source = ModelSource::open("org/pico", &options, &Silent).unwrap();
    assert_eq!(source.tensors.len(), samples().len());
    let requests = hub.requests.lock().unwrap().clone();
    assert!(!requests.iter().any(|r| r.starts_with("GET") && r.contains("model-00001-of-")), "{requests:?}");
    // Nor is the half that came.
    let half = good_size(&hub, &shard).div_ceil(2);
    assert!(
        requests.iter().any(|r| r.starts_with("GET") && r.ends_with(&format!("{shard} from {half}"))),
        "{requests:?}"
    );
}

#[test]
fn a_small_file_that_does_not_come_is_given_up() {
    let (root, hub) = setup();
    hub.change("config.json", |f| f.manner = Manner::Stalled);
    let mut options = hub.options(&root.path().join("cache"));
    options.hub_stall = Some(std::time::Duration::from_secs(1));
    let start = std::time::Instant::now();
    let text = ModelSource::open("org/pico", &options, &Silent).unwrap_err().to_string();
    assert!(text.contains("`config.json`") && text.contains("sent nothing for 1 seconds"), "{text}");
    assert!(start.elapsed() < std::time::Duration::from_secs(10), "{:?}", start.elapsed());
    // A revision that would lead out of the cache is none.
    options.revision = Some("../../x".to_owned());
    let error = ModelSource::open("org/pico", &options, &Silent).unwrap_err();
    assert!(matches!(error, SourceError::NotFound { .. }), "{error:?}");
}

fn good_size(hub: &Hub, shard: &str) -> usize {
    hub.files.lock().unwrap()[shard].body.len()
}

/// Files below `dir` whose name ends so.
fn ending(dir: &Path, end: &str) -> usize {
    let entries = fs_err::read_dir(dir).unwrap().map(|e| e.unwrap());
    let count = |e: fs_err::DirEntry| match e.file_type().unwrap().is_dir() {
        true => ending(&e.path(), end),
        false => usize::from(e.file_name().to_string_lossy().ends_with(end)),
    };
    entries.map(count).sum()
}

#[test]
fn what_came_of_a_file_is_kept_and_the_rest_is_asked_for() {
    let (root, hub) = setup();
    let shard = a_shard(&hub);
    let whole = hub.files.lock().unwrap()[&shard].body.clone();
    let step = whole.len() / 3 + 1;
    for (n, manner) in [Manner::Cut(step), Manner::Broken(step)].into_iter().enumerate() {
        hub.change(&shard, |f| f.manner = manner);
        hub.requests.lock().unwrap().clear();
        let cache = root.path().join(format!("a{n}"));
        // Within one run: three requests bring it.
        ModelSource::open("org/pico", &hub.options(&cache), &Silent).unwrap();
        let requests = hub.requests.lock().unwrap().clone();
        let asked: Vec<_> = requests.iter().filter(|r| r.starts_with("GET") && r.contains(&shard)).collect();
        assert_eq!(asked.len(), 3, "{requests:?}");
        assert!(asked[1].ends_with(&format!("from {step}")) && asked[2].ends_with(&format!("from {}", 2 * step)));
        let cached = cache.join("models--org--pico/snapshots").join(COMMIT).join(&shard);
        assert_eq!(fs_err::read(cached).unwrap(), whole);
        assert_eq!(ending(&cache, "-part"), 0);
    }
    // From one run to the next: after some bytes the server has no more.
    let cache = root.path().join("b");
    hub.change(&shard, |f| f.body.truncate(step));
    let error = ModelSource::open("org/pico", &hub.options(&cache), &Silent).unwrap_err();
    assert!(matches!(error, SourceError::Download { .. }), "{error:?}");
    assert_eq!(ending(&cache, "-part"), 1);
    assert!(
        !cache.join("models--org--pico/snapshots").join(COMMIT).join(&shard).exists(),
        "a part is taken for the file"
    );
    hub.change(&shard, |f| (f.body, f.manner) = (whole.clone(), Manner::Plain));
    hub.requests.lock().unwrap().clear();
    ModelSource::open("org/pico", &hub.options(&cache), &Silent).unwrap();
    let requests = hub.requests.lock().unwrap().clone();
    assert!(requests.iter().any(|r| r.ends_with(&format!("{shard} from {step}"))), "{requests:?}");
    assert_eq!(requests.iter().filter(|r| r.starts_with("GET") && r.contains(&shard)).count(), 1, "{requests:?}");
    assert_eq!(ending(&cache, "-part"), 0);
}

#[test]
fn a_part_that_is_not_of_the_file_never_becomes_it() {
    let (root, hub) = setup();
    let shard = a_shard(&hub);
    let served = hub.files.lock().unwrap()[&shard].clone();
    let open = |cache: &Path| ModelSource::open("org/pico", &hub.options(cache), &Silent);
    let place = |cache: &Path| cache.join("models--org--pico/snapshots").join(COMMIT).join(&shard);
    let part = |cache: &Path, bytes: &[u8]| {
        let blobs = cache.join("models--org--pico/blobs");
        fs_err::create_dir_all(&blobs).unwrap();
        fs_err::write(blobs.join(format!("{}.gqa2mla-part", &served.etag[..40])), bytes).unwrap();
    };
    let flipped = |n: usize| served.body[..n].iter().map(|b| b ^ 1).collect::<Vec<u8>>();
    let long = [served.body.clone(), vec![0; 9]].concat();
    let clean = root.path().join("clean");
    open(&clean).unwrap();
    let blobs = |cache: &Path| fs_err::read_dir(cache.join("models--org--pico/blobs")).unwrap().count();
    let parts = [b"<html>rate limit</html>".to_vec(), flipped(20), flipped(served.body.len()), vec![0; 64], long];
    for (n, bytes) in parts.iter().enumerate() {
        let cache = root.path().join(format!("{n}"));
        part(&cache, bytes);
        open(&cache).unwrap();
        assert_eq!(fs_err::read(place(&cache)).unwrap(), served.body, "part {n}");
        assert_eq!(ending(&cache, "-part"), 0);
        // Nothing is left of what was wrong.
        assert_eq!(blobs(&cache), blobs(&clean), "part {n}");
    }
    // A server that sends all of the file whatever is asked for.
    hub.change(&shard, |f| f.manner = Manner::Rangeless(served.body.len() / 2));
    let cache = root.path().join("rangeless");
    part(&cache, &served.body[..30]);
    open(&cache).unwrap_err();
    hub.change(&shard, |f| f.manner = Manner::Rangeless(usize::MAX));
    part(&cache, &served.body[..30]);
    open(&cache).unwrap();
    assert_eq!(fs_err::read(place(&cache)).unwrap(), served.body);
}

#[test]
fn lengths_that_are_lies_are_found_out() {
    let (root, hub) = setup();
    let shard = a_shard(&hub);
    for (n, off) in [-1, 1, 1 << 40].into_iter().enumerate() {
        hub.change(&shard, |f| f.manner = Manner::Claimed(off));
        let cache = root.path().join(format!("a{n}"));
        match ModelSource::open("org/pico", &hub.options(&cache), &Silent) {
            // All of it came, whatever length was claimed: its size and hash are those of the listing.
            Ok(_) => {
                let place = cache.join("models--org--pico/snapshots").join(COMMIT).join(&shard);
                assert!(off > 0 && fs_err::read(place).unwrap() == hub.files.lock().unwrap()[&shard].body, "{off}");
            }
            Err(error) => {
                let text = error.to_string();
                assert!(matches!(error, SourceError::Hub { .. } | SourceError::Download { .. }), "{off}: {error:?}");
                assert!(text.contains(&shard), "{off}: {text}");
            }
        }
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
