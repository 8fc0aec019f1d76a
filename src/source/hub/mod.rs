//! Fetching a model from the hub into the local cache, and checking what came.
//!
//! What a hub is called, where its cache lies and how that is laid out is `hf-hub`'s ([`environment`], [`store`]). Its client is not
//! used: it neither checks sizes nor knows `HF_HUB_OFFLINE`, waits for ever for a server that says nothing, and takes a body
//! cut short without a transport error for the file. Requests are made here ([`client`]), large files are fetched so that
//! what came of them is kept ([`part`]), and every file is compared with what the hub announces before it is used.

mod client;
mod environment;
mod failure;
mod part;
mod proxy;
mod store;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use fs_err as fs;

use super::open::OpenOptions;
use super::path::plain_file_name;
use super::{SourceError, index, sha256_file, side};
use crate::observe::{Event, Observer};
use client::{Client, Entry};
use failure::Failure;
use part::Part;
use proxy::Proxies;
use store::Store;

/// A model in the cache.
pub(super) struct Snapshot {
    /// `<cache>/models--org--name/snapshots/<commit>`.
    pub(super) dir: PathBuf,
    /// Commit, 40 hexadecimal digits.
    pub(super) commit: String,
}

/// What is fetched, from where and to where.
#[derive(Clone)]
struct Target {
    /// `org/name`.
    repo: String,
    revision: String,
    client: Arc<Client>,
    store: Store,
}

/// How often an observer hears from a download at which nothing happens: it may want to end it.
const TICK: Duration = Duration::from_millis(200);
/// How much later than the download itself its watch loses patience.
const GRACE: Duration = Duration::from_secs(1);

impl Target {
    fn error(&self, file: Option<&str>, failure: Failure) -> SourceError {
        let repo = self.repo.clone();
        if let Failure::Length { expected, found } = failure {
            let (expected, file) = (format!("{expected} bytes"), file.unwrap_or("?").to_owned());
            return SourceError::Download { repo, file, expected, found };
        }
        let (revision, file) = (self.revision.clone(), file.map(str::to_owned));
        SourceError::Hub { repo, revision, file, reason: failure.reason(), hint: failure.hint().to_owned() }
    }
}

/// Splits `org/name[@revision]`; `None` when it is not of that form.
fn parse_id(spec: &str) -> Option<(&str, &str, Option<&str>)> {
    let (id, revision) = spec.split_once('@').map_or((spec, None), |(id, r)| (id, Some(r)));
    let (owner, name) = id.split_once('/')?;
    let word = |s: &str| {
        !s.is_empty()
            && s.len() <= 96
            && !s.starts_with(['.', '-'])
            && !s.contains("..")
            && s.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'))
    };
    (word(owner) && word(name) && revision.is_none_or(is_reference)).then_some((owner, name, revision))
}

/// Whether `s` can be a branch, tag or commit. It becomes part of a path in the cache; git itself forbids `..` and leading
/// slashes.
fn is_reference(s: &str) -> bool {
    !s.is_empty()
        && !s.contains("..")
        && !s.starts_with('/')
        && s.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | '/'))
}

/// Brings the model `spec` into the cache (or finds it there) and checks every file.
pub(super) fn fetch(spec: &str, options: &OpenOptions, observer: &dyn Observer) -> Result<Snapshot, SourceError> {
    let not_found = || SourceError::NotFound { spec: spec.to_owned() };
    let (owner, name, revision) = parse_id(spec).ok_or_else(not_found)?;
    let revision = revision.or(options.revision.as_deref()).unwrap_or("main");
    if !is_reference(revision) {
        return Err(SourceError::NotFound { spec: format!("{spec}@{revision}") });
    }
    let get = &environment::process;
    // Said also off line: whoever sets it means it.
    let endpoint = environment::endpoint(options.hub_endpoint.as_deref(), get)?;
    let stall = options.hub_stall.unwrap_or_else(|| environment::stall(get));
    let cache = options.hub_cache.clone().unwrap_or_else(|| environment::cache(get));
    let (token, agent) = (environment::token(get), environment::user_agent(get));
    let target = Target {
        repo: format!("{owner}/{name}"),
        revision: revision.to_owned(),
        client: Arc::new(Client::new(endpoint, token, agent, Proxies::of(get), stall)),
        store: Store::new(cache.clone(), format!("{owner}/{name}")),
    };
    let snapshot = |commit: &str| Snapshot { dir: target.store.snapshot(commit), commit: commit.to_owned() };

    if options.hub_offline.unwrap_or_else(|| environment::offline(get)) {
        let cached = target.store.commit(revision).map(|commit| snapshot(&commit));
        let cached = cached.filter(|s| fs::metadata(s.dir.join("config.json")).is_ok());
        return cached.ok_or(SourceError::NotCached { repo: target.repo, revision: target.revision, cache });
    }

    // By the revision as typed, so that the cache knows which commit it stands for: that is what makes the model found
    // later when off line. Everything else is fetched by commit, so that a push in between cannot mix files.
    let watch = Watch { observer, stall };
    let own = target.clone();
    let config =
        watch.run("config.json", move |progress| own.store.fetch(&own.client, &own.revision, "config.json", &progress));
    let config = config.map_err(|e| target.error(Some("config.json"), e))?;
    let commit = config.parent().and_then(Path::file_name).and_then(|n| n.to_str()).ok_or_else(not_found)?;
    let snapshot = snapshot(commit);

    let (own, commit) = (target.clone(), snapshot.commit.clone());
    let listing = watch.run("the list of files", move |_| own.client.list(&own.store.at(&commit)));
    let listing = listing.map_err(|e| target.error(None, e))?;
    for file in &choose(listing) {
        fetch_file(&target, &snapshot, file, &watch)?;
    }
    Ok(snapshot)
}

/// A file of the listing.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Remote {
    name: String,
    size: u64,
    sha256: Option<String>,
    /// Git's name for the content, where it is a large file: what is fetched in pieces.
    large: Option<String>,
}

/// The top-level files a conversion needs: config, weights by the rule of [`index::open_weights`], side files.
fn choose(listing: Vec<Entry>) -> Vec<Remote> {
    let file = |entry: Entry| {
        let Entry { path: name, size, oid, lfs, .. } = entry;
        let large = lfs.is_some() && store::is_commit(&oid);
        Remote { name, size, sha256: lfs.and_then(|l| l.oid), large: large.then_some(oid) }
    };
    let all: Vec<Remote> =
        listing.into_iter().filter(|e| e.kind == "file" && plain_file_name(&e.path)).map(file).collect();
    let has = |name: &str| all.iter().any(|f| f.name == name);
    let (single, index) = (has(index::SINGLE), has(index::INDEX));
    let keep = |f: &Remote| match f.name.as_str() {
        "config.json" => true,
        index::SINGLE => true,
        index::INDEX => !single,
        // With an index, other formats of the same weights (`consolidated.safetensors`) are left out by their name.
        n if n.ends_with(".safetensors") => {
            !single && (!index || n.starts_with("model-")) && !n.starts_with("adapter_")
        }
        n => side::wanted(n),
    };
    all.iter().filter(|f| keep(f)).cloned().collect()
}

/// Downloads one file, unless the cache has it whole, and checks it.
fn fetch_file(target: &Target, snapshot: &Snapshot, file: &Remote, watch: &Watch<'_>) -> Result<(), SourceError> {
    let place = snapshot.dir.join(&file.name);
    let cached = fs::metadata(&place).is_ok_and(|m| m.len() == file.size);
    if cached && file.name != "config.json" {
        return Ok(());
    }
    // Present with another size: left by an interrupted run of some tool. Fetch it anew.
    if fs::symlink_metadata(&place).is_ok() && !cached {
        discard(&place);
    }
    let (own, name, commit) = (target.clone(), file.name.clone(), snapshot.commit.clone());
    let part = Part::of(&target.store, &snapshot.commit, file);
    let (made, path) = watch
        .run(&file.name, move |progress| {
            let made = match &part {
                Some(part) => part.fetch(&own.client, &progress)?,
                None => None,
            };
            // Where `blobs` holds the content that the hub announces, this only links to it.
            let path = own.store.fetch(&own.client, &commit, &name, &progress)?;
            Ok((made.map(|m| m.blob), path))
        })
        .map_err(|e| target.error(Some(&file.name), e))?;
    let linked = fs::canonicalize(&path).ok();
    if let Some(blob) = made {
        if fs::canonicalize(&blob).ok() == linked {
            // Of this size, and named by the hash of what was written.
            return Ok(());
        }
        // Its hash is not what the hub announces; the file has been fetched once more.
        let _ = fs::remove_file(&blob);
    }
    if let Err(fault) = check(&path, file) {
        discard(&path);
        let (expected, found) = fault?;
        return Err(SourceError::Download { repo: target.repo.clone(), file: file.name.clone(), expected, found });
    }
    Ok(())
}

/// What was expected and what was found; the inner error is an I/O failure while checking.
type Fault = Result<(String, String), SourceError>;

fn check(path: &Path, file: &Remote) -> Result<(), Fault> {
    let found = fs::metadata(path).map_err(|e| Err(e.into()))?.len();
    if found != file.size {
        return Err(Ok((format!("{} bytes", file.size), format!("{found} bytes"))));
    }
    // Large files are stored under their SHA-256 in the cache; small ones under a git hash of 40 digits.
    let blob = fs::canonicalize(path).ok();
    let blob = blob.as_deref().and_then(Path::file_name).and_then(|n| n.to_str());
    let announced =
        file.sha256.as_deref().or(blob).filter(|h| h.len() == 64 && h.bytes().all(|b| b.is_ascii_hexdigit()));
    if let Some(expected) = announced {
        let found = sha256_file(path).map_err(|e| Err(e.into()))?.sha256;
        if !found.eq_ignore_ascii_case(expected) {
            return Err(Ok((format!("sha256 {expected}"), format!("sha256 {found}"))));
        }
    }
    Ok(())
}

/// Removes a damaged file from the cache: the link and the blob it points to.
fn discard(path: &Path) {
    let blob = fs::canonicalize(path);
    // Best effort: the error about the damage matters more than one about cleaning up.
    let _ = fs::remove_file(path);
    if let Ok(blob) = blob
        && blob.parent().and_then(Path::file_name).is_some_and(|n| n == "blobs")
    {
        let _ = fs::remove_file(blob);
    }
}

/// Watches downloads.
struct Watch<'a> {
    observer: &'a dyn Observer,
    stall: Duration,
}

impl Watch<'_> {
    /// Runs `download` on a thread of its own and hands its progress, `(done, total)` in bytes, to the observer on this one:
    /// an observer is only borrowed and is promised one caller at a time. A download at which nothing happens ends itself;
    /// where it cannot, it is left to itself.
    fn run<T: Send + 'static>(
        &self,
        file: &str,
        download: impl FnOnce(Sender<(u64, u64)>) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Failure> {
        let (sender, events) = mpsc::channel();
        let worker = std::thread::spawn(move || download(sender));
        let (mut counts, mut since) = ((0, 0), Instant::now());
        loop {
            match events.recv_timeout(TICK) {
                Ok(next) if next != counts => (counts, since) = (next, Instant::now()),
                Ok(_) | Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            if since.elapsed() > self.stall.saturating_add(GRACE) {
                return Err(Failure::Stalled(self.stall));
            }
            let (done, total) = counts;
            let total = (total > 0).then_some(total);
            self.observer.event(Event::Download { file: file.to_owned(), done, total });
        }
        worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids() {
        assert_eq!(parse_id("org/name"), Some(("org", "name", None)));
        assert_eq!(parse_id("org/na.me-1@refs/pr/3"), Some(("org", "na.me-1", Some("refs/pr/3"))));
        for bad in ["name", "a/b/c", "../x", "a/..", "./x", "/x", "a/", "a/b@", "a/b@../c", "a b/c", "a/b@/x"] {
            assert_eq!(parse_id(bad), None, "{bad}");
        }
    }
}
