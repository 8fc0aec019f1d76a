//! Fetching a model from the hub into the local cache, and checking what came.
//!
//! The client neither checks sizes nor knows `HF_HUB_OFFLINE`, it waits for ever for a server that says nothing, a body cut
//! short without a transport error would enter its cache, and what it begins it begins from the first byte; so downloads
//! are watched here, large files are fetched here ([`part`]), and every file is compared with what the hub announces before
//! it is used.

mod part;

use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use fs_err as fs;
use hf_hub::progress::{DownloadEvent, ProgressEvent, ProgressHandler};
use hf_hub::repository::RepoTreeEntry;
use hf_hub::{HFClient, HFClientSync, HFError, HFRepositorySync, RepoTypeModel};

use super::open::OpenOptions;
use super::path::plain_file_name;
use super::{SourceError, index, sha256_file, side};
use crate::observe::{Event, Observer};
use part::Part;

/// A model in the cache.
pub(super) struct Snapshot {
    /// `<cache>/models--org--name/snapshots/<commit>`.
    pub(super) dir: PathBuf,
    /// Commit, 40 hexadecimal digits.
    pub(super) commit: String,
}

/// What is fetched, and how the client for it is made.
#[derive(Debug, Clone)]
struct Target {
    owner: String,
    name: String,
    revision: String,
    cache: Option<PathBuf>,
    endpoint: Option<String>,
}

/// Why a request gave nothing.
enum Failure {
    Client(HFError),
    /// No byte came for this long.
    Stalled(Duration),
    /// More or fewer bytes than were announced.
    Length {
        expected: u64,
        found: String,
    },
}

impl From<HFError> for Failure {
    fn from(e: HFError) -> Self {
        Failure::Client(e)
    }
}

/// How often an observer hears from a download at which nothing happens: it may want to end it.
const TICK: Duration = Duration::from_millis(200);
/// How long nothing may happen, where neither options nor `HF_HUB_DOWNLOAD_TIMEOUT` say.
const STALL: Duration = Duration::from_secs(60);

impl Target {
    fn repo(&self) -> String {
        format!("{}/{}", self.owner, self.name)
    }

    fn client(&self) -> Result<HFClient, HFError> {
        let mut builder = HFClient::builder();
        if let Some(cache) = &self.cache {
            builder = builder.cache_dir(cache);
        }
        if let Some(endpoint) = &self.endpoint {
            builder = builder.endpoint(endpoint.trim_end_matches('/'));
        }
        builder.build()
    }

    fn error(&self, file: Option<&str>, e: impl Into<Failure>) -> SourceError {
        let (reason, hint) = match e.into() {
            Failure::Client(e) => (without_queries(&e.to_string()), hint(&e)),
            Failure::Stalled(after) => (
                format!("the server sent nothing for {} seconds", after.as_secs_f64()),
                "check the network and try again: files that are whole are not fetched again; HF_HUB_DOWNLOAD_TIMEOUT sets \
                 how many seconds to wait",
            ),
            Failure::Length { expected, found } => {
                let (expected, file) = (format!("{expected} bytes"), file.unwrap_or("?").to_owned());
                return SourceError::Download { repo: self.repo(), file, expected, found };
            }
        };
        let (revision, file) = (self.revision.clone(), file.map(str::to_owned));
        SourceError::Hub { repo: self.repo(), revision, file, reason, hint: hint.to_owned() }
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
    // A revision becomes part of a path in the cache; git itself forbids `..` and leading slashes.
    let reference = |s: &str| {
        !s.is_empty()
            && !s.contains("..")
            && !s.starts_with('/')
            && s.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | '/'))
    };
    (word(owner) && word(name) && revision.is_none_or(reference)).then_some((owner, name, revision))
}

/// Brings the model `spec` into the cache (or finds it there) and checks every file.
pub(super) fn fetch(spec: &str, options: &OpenOptions, observer: &dyn Observer) -> Result<Snapshot, SourceError> {
    let not_found = || SourceError::NotFound { spec: spec.to_owned() };
    let (owner, name, revision) = parse_id(spec).ok_or_else(not_found)?;
    let revision = revision.or(options.revision.as_deref()).unwrap_or("main");
    let target = Target {
        owner: owner.to_owned(),
        name: name.to_owned(),
        revision: revision.to_owned(),
        cache: options.hub_cache.clone(),
        endpoint: options.hub_endpoint.clone(),
    };

    let client = target.client().map_err(|e| target.error(None, e))?;
    let cache = client.cache_dir().to_owned();
    let client = HFClientSync::from_inner(client).map_err(|e| target.error(None, e))?;
    let repo = client.model(owner, name);

    if options.hub_offline.unwrap_or_else(offline_by_environment) {
        let config = repo.download_file().filename("config.json").revision(revision).local_files_only(true).send();
        let config =
            config.map_err(|_| SourceError::NotCached { repo: target.repo(), revision: target.revision, cache })?;
        return snapshot_of(&config).ok_or_else(not_found);
    }

    // By the revision as typed, so that the client records which commit it stands for: that is what makes the model
    // found later when off line. Everything else is fetched by commit, so that a push in between cannot mix files.
    let stall = options.hub_stall.unwrap_or_else(stall_by_environment);
    let watch = Watch { observer, stall };
    let (own, wanted) = (repo.clone(), revision.to_owned());
    let config = watch.run("config.json", move |progress| {
        own.download_file().filename("config.json").revision(wanted).progress(progress).send()
    });
    let config = config.map_err(|e| target.error(Some("config.json"), e))?;
    let snapshot = snapshot_of(&config).ok_or_else(not_found)?;

    let (own, commit) = (repo.clone(), snapshot.commit.clone());
    let listing = watch.run("the list of files", move |_| own.list_tree().revision(commit).send());
    let listing = listing.map_err(|e| target.error(None, e))?;
    for file in &choose(listing) {
        fetch_file(&repo, &target, &snapshot, file, &watch)?;
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
fn choose(listing: Vec<RepoTreeEntry>) -> Vec<Remote> {
    let all: Vec<Remote> = listing
        .into_iter()
        .filter_map(|entry| match entry {
            RepoTreeEntry::File { oid, path, size, lfs, .. } if plain_file_name(&path) => {
                let large = lfs.is_some() && oid.len() == 40 && oid.bytes().all(|b| b.is_ascii_hexdigit());
                let sha256 = lfs.and_then(|l| l.sha256);
                Some(Remote { name: path, size, sha256, large: large.then_some(oid) })
            }
            _ => None,
        })
        .collect();
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
fn fetch_file(
    repo: &HFRepositorySync<RepoTypeModel>,
    target: &Target,
    snapshot: &Snapshot,
    file: &Remote,
    watch: &Watch<'_>,
) -> Result<(), SourceError> {
    let place = snapshot.dir.join(&file.name);
    let cached = fs::metadata(&place).is_ok_and(|m| m.len() == file.size);
    if cached && file.name != "config.json" {
        return Ok(());
    }
    // Present with another size: left by an interrupted run of some tool. Fetch it anew.
    if fs::symlink_metadata(&place).is_ok() && !cached {
        discard(&place);
    }
    let (own, name, commit) = (repo.clone(), file.name.clone(), snapshot.commit.clone());
    let part = Part::of(snapshot, file);
    let request = part.clone().map(|part| (part, target.clone(), watch.stall));
    let (made, path) = watch
        .run(&file.name, move |progress| {
            let made = match &request {
                Some((part, target, stall)) => part.fetch(target, *stall, &progress.0)?,
                None => None,
            };
            // Where `blobs` holds the content that the hub announces, the client only links to it.
            let path = own.download_file().filename(name).revision(commit).progress(progress).send()?;
            Ok::<_, Failure>((made, path))
        })
        .map_err(|e| target.error(Some(&file.name), e))?;
    let linked = fs::canonicalize(&path).ok();
    if let Some(blob) = made {
        if fs::canonicalize(&blob).ok() == linked {
            // Of this size, and named by the hash of what was written.
            return Ok(());
        }
        // Its hash is not what the hub announces; the client has fetched the file once more.
        let _ = fs::remove_file(&blob);
    }
    if let Err(fault) = check(&path, file) {
        discard(&path);
        let (expected, found) = fault?;
        return Err(SourceError::Download { repo: target.repo(), file: file.name.clone(), expected, found });
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

/// Folder and commit of `<repo>/snapshots/<commit>/config.json`.
fn snapshot_of(config: &Path) -> Option<Snapshot> {
    let dir = config.parent()?;
    let commit = dir.file_name()?.to_str()?.to_owned();
    Some(Snapshot { dir: dir.to_owned(), commit })
}

/// Watches downloads.
struct Watch<'a> {
    observer: &'a dyn Observer,
    stall: Duration,
}

impl Watch<'_> {
    /// Runs `download` on a thread of its own and hands its progress to the observer on this one: the client wants a
    /// handler that outlives everything, an observer is only borrowed and is promised one caller at a time. A download at
    /// which nothing happens is left to itself.
    fn run<T: Send + 'static, E: Into<Failure> + Send + 'static>(
        &self,
        file: &str,
        download: impl FnOnce(Forward) -> Result<T, E> + Send + 'static,
    ) -> Result<T, Failure> {
        let (sender, events) = mpsc::channel();
        let worker = std::thread::spawn(move || download(Forward(sender)));
        let (mut counts, mut since) = ((0, 0), Instant::now());
        loop {
            match events.recv_timeout(TICK) {
                Ok(next) if next != counts => (counts, since) = (next, Instant::now()),
                Ok(_) | Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            if since.elapsed() > self.stall {
                return Err(Failure::Stalled(self.stall));
            }
            let (done, total) = counts;
            let total = (total > 0).then_some(total);
            self.observer.event(Event::Download { file: file.to_owned(), done, total });
        }
        worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)).map_err(Into::into)
    }
}

/// Sends `(done, total)` bytes along.
struct Forward(mpsc::Sender<(u64, u64)>);

impl ProgressHandler for Forward {
    fn on_progress(&self, event: &ProgressEvent) {
        let ProgressEvent::Download(event) = event else { return };
        let counts = match event {
            DownloadEvent::Start { total_bytes, .. } => Some((0, *total_bytes)),
            DownloadEvent::Progress { files } => files.last().map(|f| (f.bytes_completed, f.total_bytes)),
            DownloadEvent::AggregateProgress { bytes_completed, total_bytes, .. } => {
                Some((*bytes_completed, *total_bytes))
            }
            DownloadEvent::Complete => None,
        };
        if let Some(counts) = counts {
            // The receiver is only gone when the download no longer matters.
            let _ = self.0.send(counts);
        }
    }
}

fn stall_by_environment() -> Duration {
    let seconds = std::env::var("HF_HUB_DOWNLOAD_TIMEOUT").ok().and_then(|v| v.parse().ok());
    seconds.and_then(|s| Duration::try_from_secs_f64(s).ok()).filter(|d| !d.is_zero()).unwrap_or(STALL)
}

fn offline_by_environment() -> bool {
    let value = std::env::var("HF_HUB_OFFLINE").unwrap_or_default().to_ascii_lowercase();
    matches!(value.as_str(), "1" | "on" | "yes" | "true")
}

/// `text` with the query of every address removed: signed links carry credentials there.
fn without_queries(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut dropping = false;
    for c in text.chars() {
        if dropping && (c.is_whitespace() || matches!(c, ')' | '"' | '`' | ',')) {
            dropping = false;
        }
        if c == '?' && out.rsplit(char::is_whitespace).next().is_some_and(|w| w.contains("://")) {
            dropping = true;
        }
        if !dropping {
            out.push(if c.is_control() { ' ' } else { c });
        }
    }
    out
}

fn hint(e: &HFError) -> &'static str {
    match e {
        HFError::RepoNotFound { .. } | HFError::AuthRequired { .. } => {
            "check the spelling of the id; a private or gated model needs HF_TOKEN, with its terms accepted on its page"
        }
        HFError::Forbidden { .. } => "accept the terms of the model on its page, and check what the token may read",
        HFError::RevisionNotFound { .. } => "check the branch, tag or commit after `@`",
        HFError::EntryNotFound { .. } => "give a model repository with `config.json` and safetensors weights",
        HFError::RateLimited { .. } => "wait and try again, or set HF_TOKEN",
        HFError::Request { .. } => {
            "check the network and HF_ENDPOINT; HF_HUB_OFFLINE=1 uses only what the local cache holds"
        }
        HFError::CacheLockTimeout { .. } => "another download of this model is running; wait for it",
        HFError::Io(_) => "check space and permissions of the hub cache (HF_HUB_CACHE)",
        _ => "try again; if it persists, download the model with another tool and give its folder",
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

    #[test]
    fn queries_are_dropped() {
        let text = "GET https://host/x?X-Signature=secret&y=1 (really?) failed";
        assert_eq!(without_queries(text), "GET https://host/x (really?) failed");
    }
}
