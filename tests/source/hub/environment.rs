//! The binary against a hub that the environment names: variables, tokens, proxies, refusals, and the cache that is left.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use gqa2mla::observe::Silent;
use gqa2mla::source::ModelSource;

use super::server::{COMMIT, Hub, Manner};
use crate::common::command::gqa2mla;

const MODEL: &str = "fixtures/pico-llama";
const WEIGHTS: &str = "model.safetensors";

fn hub() -> (tempfile::TempDir, Hub) {
    let hub = Hub::start(&Path::new(env!("CARGO_MANIFEST_DIR")).join(MODEL));
    (tempfile::tempdir().unwrap(), hub)
}

/// `inspect`, with nothing of this machine's environment that bears on hubs.
fn inspect(spec: &str, hub: &Hub, home: &Path) -> Command {
    let mut command = gqa2mla(&["inspect", spec]);
    for name in
        ["HF_HUB_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN_PATH", "HF_HUB_DISABLE_IMPLICIT_TOKEN"]
    {
        command.env_remove(name);
    }
    for name in ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "REQUEST_METHOD"] {
        command.env_remove(name).env_remove(name.to_ascii_lowercase());
    }
    command.env("HF_HOME", home).env("HF_ENDPOINT", &hub.endpoint).env("HF_HUB_DOWNLOAD_TIMEOUT", "20");
    command
}

fn run(command: &mut Command) -> (Option<i32>, String) {
    text(&command.output().expect("the binary starts"))
}

fn text(out: &Output) -> (Option<i32>, String) {
    (out.status.code(), format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr)))
}

/// Files and links below `dir`, as paths from it.
fn all(dir: &Path) -> Vec<PathBuf> {
    fn walk(dir: &Path, root: &Path, into: &mut Vec<PathBuf>) {
        for entry in fs_err::read_dir(dir).unwrap().map(Result::unwrap) {
            match entry.file_type().unwrap().is_dir() {
                true => walk(&entry.path(), root, into),
                false => into.push(entry.path().strip_prefix(root).unwrap().to_owned()),
            }
        }
    }
    let mut found = Vec::new();
    walk(dir, dir, &mut found);
    found.sort();
    found
}

#[test]
fn the_cache_is_the_one_that_python_reads() {
    let (home, hub) = hub();
    let (code, said) = run(&mut inspect("org/pico", &hub, home.path()));
    assert_eq!(code, Some(0), "{said}");
    let (code, said) = run(&mut inspect("org/pico@refs/pr/1", &hub, home.path()));
    assert_eq!(code, Some(0), "{said}");
    let model = home.path().join("hub/models--org--pico");
    for reference in ["main", "refs/pr/1"] {
        assert_eq!(fs_err::read_to_string(model.join("refs").join(reference)).unwrap(), COMMIT);
    }
    let files = hub.files.lock().unwrap().clone();
    let snapshot = model.join("snapshots").join(COMMIT);
    let fetched = all(&snapshot);
    assert!(fetched.contains(&PathBuf::from("config.json")) && fetched.contains(&PathBuf::from(WEIGHTS)));
    for name in &fetched {
        let served = &files[name.to_str().unwrap()];
        if cfg!(unix) {
            let link = fs_err::read_link(snapshot.join(name)).unwrap();
            assert_eq!(link, Path::new("../../blobs").join(&served.etag), "{name:?}");
        }
        assert_eq!(fs_err::read(model.join("blobs").join(&served.etag)).unwrap(), served.body, "{name:?}");
    }
    // Nothing else is left, and locks lie beside the models.
    assert_eq!(all(&model.join("blobs")).len(), fetched.len());
    let locks = all(&home.path().join("hub/.locks"));
    assert!(locks.iter().all(|l| l.starts_with("models--org--pico") && l.extension().is_some_and(|e| e == "lock")));
    assert_eq!(all(&home.path().join("hub")).len(), 2 + 2 * fetched.len() + locks.len());

    // Off line, by branch and by commit, also where the reference ends with a line break.
    hub.requests.lock().unwrap().clear();
    fs_err::write(model.join("refs/main"), format!("{COMMIT}\n")).unwrap();
    for spec in ["org/pico".to_owned(), "org/pico@refs/pr/1".to_owned(), format!("org/pico@{COMMIT}")] {
        let (code, said) = run(inspect(&spec, &hub, home.path()).env("HF_HUB_OFFLINE", "true"));
        assert_eq!(code, Some(0), "{said}");
    }
    let (_, said) = run(inspect("org/pico@other", &hub, home.path()).env("HF_HUB_OFFLINE", "1"));
    assert!(said.contains("not in the local cache") && said.contains("HF_HUB_OFFLINE"), "{said}");
    assert!(hub.requests.lock().unwrap().is_empty());
}

#[test]
fn the_token_goes_to_the_hub_alone() {
    let (home, hub) = hub();
    let (_other, storage) = self::hub();
    let head = format!("302 Found\nlocation: {}/cdn/{WEIGHTS}\netag: \"x\"\nx-repo-commit: {COMMIT}", storage.endpoint);
    fs_err::write(home.path().join("token"), "hf_stored\n").unwrap();
    let own = ("HF_TOKEN", "hf_set");
    let cases = [
        (vec![], Some("Bearer hf_stored")),
        (vec![own], Some("Bearer hf_set")),
        (vec![own, ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")], None),
    ];
    for (n, (variables, expected)) in cases.into_iter().enumerate() {
        hub.instead(&format!("GET /org/pico/resolve/{COMMIT}/{WEIGHTS}"), &head, "", 1);
        hub.authorizations.lock().unwrap().clear();
        let mut command = inspect("org/pico", &hub, home.path());
        command.env("HF_HUB_CACHE", home.path().join(format!("{n}"))).envs(variables);
        let (code, said) = run(&mut command);
        assert_eq!(code, Some(0), "{said}");
        assert!(home.path().join(format!("{n}/models--org--pico/refs/main")).exists());
        let sent = hub.authorizations.lock().unwrap().clone();
        assert!(sent.len() > 3 && sent.iter().all(|a| a.as_deref() == expected), "{sent:?}");
        let sent = std::mem::take(&mut *storage.authorizations.lock().unwrap());
        assert_eq!(sent, [None]);
    }
    // Nor to the log, which tells of requests.
    let mut command = inspect("org/pico", &hub, home.path());
    let (code, said) = run(command.env("HF_HUB_CACHE", home.path().join("log")).env("RUST_LOG", "trace"));
    assert!(code == Some(0) && said.contains("/org/pico/resolve/main/config.json"), "{said}");
    assert!(!said.contains("hf_s") && !said.contains("Bearer"), "{said}");
}

#[test]
fn an_endpoint_that_is_no_address_is_named() {
    let (home, hub) = hub();
    for (endpoint, reason) in
        [("", "empty"), ("hub.example", "https://"), ("127.0.0.1:9", "https://"), ("http://", "server")]
    {
        for offline in ["0", "1"] {
            let mut command = inspect("org/pico", &hub, home.path());
            let (code, said) = run(command.env("HF_ENDPOINT", endpoint).env("HF_HUB_OFFLINE", offline));
            assert_eq!(code, Some(2), "{said}");
            let named = format!("HF_ENDPOINT is `{endpoint}`");
            assert!(said.contains(&named) && said.contains(reason) && said.contains("hint: give an address"), "{said}");
        }
        // A folder needs no hub.
        let (code, said) = run(inspect(MODEL, &hub, home.path()).env("HF_ENDPOINT", endpoint));
        assert_eq!(code, Some(0), "{said}");
    }
}

#[test]
fn refusals_name_the_model_and_the_reason() {
    let (home, hub) = hub();
    let message = "x-error-message: Access is restricted.";
    for (head, reason, hint) in [
        (format!("401 Unauthorized\nx-error-code: GatedRepo\n{message}"), "gated", "accept the terms"),
        (format!("403 Forbidden\nx-error-code: GatedRepo\n{message}"), "gated", "accept the terms"),
        ("401 Unauthorized\nx-error-code: RepoNotFound".to_owned(), "no such repository", "spelling"),
        ("404 Not Found\nx-error-code: RevisionNotFound".to_owned(), "no such revision", "after `@`"),
        ("404 Not Found\nx-error-code: EntryNotFound".to_owned(), "no such file", "config.json"),
        ("401 Unauthorized".to_owned(), "valid token", "HF_TOKEN"),
        ("200 OK".to_owned(), "what the content is called", "another tool"),
        ("200 OK\netag: \"abc\"".to_owned(), "which commit", "another tool"),
    ] {
        hub.instead("HEAD /org/pico/resolve/v1/config.json", &head, "", 1);
        let (code, said) = run(&mut inspect("org/pico@v1", &hub, home.path()));
        assert_eq!(code, Some(3), "{said}");
        for part in ["`config.json` of `org/pico` at revision `v1`", reason, hint] {
            assert!(said.contains(part), "{part}: {said}");
        }
        assert_eq!(head.contains(message), said.contains("Access is restricted."), "{said}");
    }
    // Of an error without such headers, what the answer says.
    hub.instead("GET /api/models/org/pico/tree/", "403 Forbidden", r#"{"error": "Not from here."}"#, 1);
    let (code, said) = run(&mut inspect("org/pico", &hub, home.path()));
    assert!(
        code == Some(3) && said.contains("the file list of `org/pico`") && said.contains("Not from here."),
        "{said}"
    );
    // A file that a commit lacks is noted as Python does.
    let head = format!("404 Not Found\nx-error-code: EntryNotFound\nx-repo-commit: {COMMIT}");
    hub.instead("HEAD /org/pico/resolve/v2/config.json", &head, "", 1);
    run(&mut inspect("org/pico@v2", &hub, home.path()));
    let model = home.path().join("hub/models--org--pico");
    assert!(model.join(".no_exist").join(COMMIT).join("config.json").exists());
    assert_eq!(fs_err::read_to_string(model.join("refs/v2")).unwrap(), COMMIT);
}

#[test]
fn what_passes_is_tried_again() {
    let (home, hub) = hub();
    hub.instead("HEAD /org/pico/resolve/main/config.json", "503 Service Unavailable", "", 2);
    hub.instead("GET /api/models/org/pico/tree/", "429 Too Many Requests", "", 1);
    hub.instead(&format!("GET /org/pico/resolve/{COMMIT}/{WEIGHTS}"), "500 Internal Server Error", "", 1);
    let (code, said) = run(&mut inspect("org/pico", &hub, home.path()));
    assert_eq!(code, Some(0), "{said}");
    // Not for ever.
    hub.instead("HEAD /org/pico/resolve/main/config.json", "503 Service Unavailable", "", usize::MAX);
    hub.requests.lock().unwrap().clear();
    let (code, said) = run(&mut inspect("org/pico", &hub, home.path()));
    assert!(code == Some(3) && said.contains("HTTP 503"), "{said}");
    assert!((2..10).contains(&hub.requests.lock().unwrap().len()));
}

#[test]
fn names_that_moved_and_lists_in_pages_are_followed() {
    let (home, hub) = hub();
    // Relative, as the hub answers for other capitals and former names.
    let moved = "307 Temporary Redirect\nlocation: /org/pico/resolve/main/config.json";
    hub.instead("HEAD /Org/Pico/resolve/main/config.json", moved, "", 1);
    hub.instead("GET /Org/Pico/resolve/main/config.json", moved, "", 1);
    // Two pages: the first holds nothing that is wanted.
    let first = r#"[{"type": "directory", "path": "onnx", "oid": "", "size": 0}]"#;
    let next = format!("200 OK\nlink: <{}/api/models/org/pico/tree/{COMMIT}?cursor=a%2Fb>; rel=\"next\"", hub.endpoint);
    hub.instead(&format!("GET /api/models/Org/Pico/tree/{COMMIT}"), &next, first, 1);
    for name in hub.files.lock().unwrap().keys() {
        for method in ["HEAD", "GET"] {
            let from = format!("{method} /Org/Pico/resolve/{COMMIT}/{name}");
            let to = format!("307 Temporary Redirect\nlocation: /org/pico/resolve/{COMMIT}/{name}");
            hub.instead(&from, &to, "", 1);
        }
    }
    let (code, said) = run(&mut inspect("Org/Pico", &hub, home.path()));
    assert_eq!(code, Some(0), "{said}");
    assert!(hub.requests.lock().unwrap().iter().any(|r| r.ends_with("?cursor=a%2Fb")));
    // The cache has it by the name that was asked for.
    assert!(home.path().join("hub/models--Org--Pico/snapshots").join(COMMIT).join(WEIGHTS).exists());
}

#[test]
fn proxies_of_the_environment_are_used() {
    let (home, hub) = hub();
    // No such host: only the proxy can know it.
    let with = |variables: &[(&str, &str)], cache: &str| {
        hub.requests.lock().unwrap().clear();
        let mut command = inspect("org/pico", &hub, home.path());
        command.env("HF_ENDPOINT", "http://hub.invalid").env("HF_HUB_CACHE", home.path().join(cache));
        command.envs(variables.iter().copied());
        let (code, said) = run(&mut command);
        let through = hub.requests.lock().unwrap().iter().filter(|r| *r == "CONNECT hub.invalid:80").count();
        (code, through, said)
    };
    let proxy = hub.endpoint.as_str();
    for (n, name) in ["HTTP_PROXY", "http_proxy", "ALL_PROXY"].into_iter().enumerate() {
        let (code, through, said) = with(&[(name, proxy)], &n.to_string());
        assert!(code == Some(0) && through > 3, "{name} {through}: {said}");
    }
    for variables in [&[("HTTPS_PROXY", proxy)][..], &[("HTTP_PROXY", proxy), ("NO_PROXY", "localhost,.invalid")]] {
        let (code, through, said) = with(variables, "none");
        assert_eq!((code, through), (Some(3), 0), "{said}");
    }
    let (code, _, said) = with(&[("HTTP_PROXY", "gopher://x")], "none");
    assert!(code == Some(3) && said.contains("HTTP_PROXY is not the address of a proxy"), "{said}");
}

#[test]
fn processes_at_once_fetch_weights_once() {
    let (home, hub) = hub();
    hub.change(WEIGHTS, |f| f.manner = Manner::Late(Duration::from_secs(1)));
    let start = || {
        let mut command = inspect("org/pico", &hub, home.path());
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
        command.spawn().expect("the binary starts")
    };
    let running = [(); 3].map(|()| start());
    for child in running {
        let (code, said) = text(&child.wait_with_output().expect("it ends"));
        assert_eq!(code, Some(0), "{said}");
    }
    let requests = hub.requests.lock().unwrap().clone();
    let weights = requests.iter().filter(|r| r.starts_with("GET") && r.contains(WEIGHTS)).count();
    assert_eq!(weights, 1, "{requests:?}");
}

#[test]
fn what_a_hub_says_never_leads_out_of_the_cache() {
    let (home, hub) = hub();
    let cache = home.path().join("in/cache");
    for etag in ["../../../evil", "/evil", "..", ""] {
        let head = format!("200 OK\netag: \"{etag}\"\nx-repo-commit: {COMMIT}");
        hub.instead("HEAD /org/pico/resolve/main/config.json", &head, "", 1);
        assert!(ModelSource::open("org/pico", &hub.options(&cache), &Silent).is_err(), "{etag}");
    }
    for commit in ["../../evil", "/evil", ".."] {
        let head = format!("200 OK\netag: \"abc\"\nx-repo-commit: {commit}");
        hub.instead("HEAD /org/pico/resolve/main/config.json", &head, "", 1);
        assert!(ModelSource::open("org/pico", &hub.options(&cache), &Silent).is_err(), "{commit}");
    }
    let left = all(home.path());
    assert!(left.iter().all(|p| p.starts_with("in/cache")), "{left:?}");
}
