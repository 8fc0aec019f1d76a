//! Why a request to a hub gave nothing, in words, and what to do next.

use std::path::PathBuf;
use std::time::Duration;

/// Why a request gave nothing.
#[derive(Debug)]
pub(super) enum Failure {
    /// The hub answered with an error.
    Refused(Refusal),
    /// No answer, or half of one.
    Transport { error: ureq::Error, url: String },
    /// An answer in which something is missing or odd.
    Odd { what: String, url: String },
    /// The variable that names a proxy holds something else.
    Proxy(&'static str),
    /// The cache could not be written or read.
    Io(std::io::Error),
    /// Another process holds the lock of a small file for long.
    Busy(PathBuf),
    /// No byte came for this long.
    Stalled(Duration),
    /// More or fewer bytes than were announced.
    Length { expected: u64, found: String },
}

/// An answer that is an error.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) status: u16,
    /// The header `x-error-code`, such as `GatedRepo`.
    pub(super) code: Option<String>,
    /// What the hub says about it.
    pub(super) message: Option<String>,
    pub(super) url: String,
}

impl From<std::io::Error> for Failure {
    fn from(e: std::io::Error) -> Self {
        Failure::Io(e)
    }
}

/// What a refusal means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Meaning {
    NoRepository,
    Gated,
    NoRevision,
    NoFile,
    Disabled,
    NotAllowed,
    Forbidden,
    TooMany,
    Other,
}

impl Refusal {
    fn meaning(&self) -> Meaning {
        match (self.code.as_deref(), self.status) {
            (Some("RepoNotFound"), _) => Meaning::NoRepository,
            (Some("GatedRepo"), _) => Meaning::Gated,
            (Some("RevisionNotFound"), _) => Meaning::NoRevision,
            (Some("EntryNotFound"), _) => Meaning::NoFile,
            (Some("DisabledRepo"), _) => Meaning::Disabled,
            (_, 401) => Meaning::NotAllowed,
            (_, 403) => Meaning::Forbidden,
            (_, 404) => Meaning::NoFile,
            (_, 429) => Meaning::TooMany,
            _ => Meaning::Other,
        }
    }

    /// Whether the hub has no such file in a repository that it has.
    pub(super) fn no_file(&self) -> bool {
        self.status == 404 && self.meaning() == Meaning::NoFile
    }

    /// Whether the same request may succeed a moment later.
    pub(super) fn passes(status: u16) -> bool {
        matches!(status, 408 | 429 | 500 | 502 | 503 | 504)
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self.meaning() {
            Meaning::NoRepository => "the hub has no such repository, or does not show it without a token",
            Meaning::Gated => "the repository is gated: its terms have to be accepted",
            Meaning::NoRevision => "the repository has no such revision",
            Meaning::NoFile => "the repository has no such file",
            Meaning::Disabled => "the repository has been disabled",
            Meaning::NotAllowed => "the hub asks for a valid token",
            Meaning::Forbidden => "the hub does not allow it",
            Meaning::TooMany => "the hub has had too many requests",
            Meaning::Other => "the hub answered with an error",
        })?;
        write!(f, " (HTTP {}", self.status)?;
        if let Some(message) = self.message.as_deref().filter(|m| !m.is_empty()) {
            write!(f, ": {message}")?;
        }
        write!(f, ", {})", self.url)
    }
}

impl Failure {
    /// What happened, without what must not be shown.
    pub(super) fn reason(&self) -> String {
        without_secrets(&match self {
            Failure::Refused(refusal) => refusal.to_string(),
            Failure::Transport { error, url } => format!("no answer, or a broken one: {error} ({url})"),
            Failure::Odd { what, url } => format!("{what} ({url})"),
            Failure::Proxy(name) => format!("{name} is not the address of a proxy"),
            Failure::Io(e) => e.to_string(),
            Failure::Busy(lock) => format!("another process holds `{}`", lock.display()),
            Failure::Stalled(after) => format!("the server sent nothing for {} seconds", after.as_secs_f64()),
            Failure::Length { expected, found } => format!("expected {expected} bytes, found {found}"),
        })
    }

    /// The next step.
    pub(super) fn hint(&self) -> &'static str {
        match self {
            Failure::Refused(refusal) => match refusal.meaning() {
                Meaning::NoRepository | Meaning::NotAllowed => {
                    "check the spelling of the id; a private or gated model needs HF_TOKEN, with its terms accepted on \
                     its page"
                }
                Meaning::Gated | Meaning::Forbidden => {
                    "accept the terms of the model on its page, set HF_TOKEN, and check what the token may read"
                }
                Meaning::NoRevision => "check the branch, tag or commit after `@`",
                Meaning::NoFile => "give a model repository with `config.json` and safetensors weights",
                Meaning::TooMany => "wait and try again, or set HF_TOKEN",
                Meaning::Disabled | Meaning::Other => OTHERWISE,
            },
            Failure::Transport { .. } => {
                "check the network and HF_ENDPOINT; HF_HUB_OFFLINE=1 uses only what the local cache holds"
            }
            Failure::Proxy(_) => "give it as `http://host:port`, or unset it",
            Failure::Busy(_) => "another download of this model is running; wait for it",
            Failure::Io(_) => "check space and permissions of the hub cache (HF_HUB_CACHE)",
            Failure::Stalled(_) => {
                "check the network and try again: files that are whole are not fetched again; HF_HUB_DOWNLOAD_TIMEOUT \
                 sets how many seconds to wait"
            }
            Failure::Odd { .. } | Failure::Length { .. } => OTHERWISE,
        }
    }

    /// Whether the same request may succeed a moment later.
    pub(super) fn may_pass(&self) -> bool {
        match self {
            Failure::Refused(refusal) => Refusal::passes(refusal.status),
            // A certificate that is not trusted arrives as `InvalidData`.
            Failure::Transport { error: ureq::Error::Io(e), .. } => e.kind() != std::io::ErrorKind::InvalidData,
            Failure::Transport { error, .. } => matches!(
                error,
                ureq::Error::HostNotFound
                    | ureq::Error::ConnectionFailed
                    | ureq::Error::ConnectProxyFailed(_)
                    | ureq::Error::Protocol(_)
                    | ureq::Error::BodyStalled
            ),
            _ => false,
        }
    }
}

const OTHERWISE: &str = "try again; if it persists, download the model with another tool and give its folder";

/// `text` with the query and the user of every address removed: signed links and passwords of hubs stand there.
fn without_secrets(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    // Where the authority of the address that is being copied begins in `out`.
    let mut authority = None;
    let mut dropping = false;
    for c in text.chars() {
        let ends = c.is_whitespace() || matches!(c, ')' | '"' | '`' | ',');
        if ends {
            (dropping, authority) = (false, None);
        }
        match (c, authority) {
            ('@', Some(start)) => {
                out.truncate(start);
                continue;
            }
            ('?', _) if out.rsplit(char::is_whitespace).next().is_some_and(|w| w.contains("://")) => dropping = true,
            _ => {}
        }
        if !dropping {
            out.push(if c.is_control() { ' ' } else { c });
            match c {
                '/' if out.ends_with("://") => authority = Some(out.len()),
                '/' => authority = None,
                _ => {}
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_dropped() {
        let text = "GET https://host/x?X-Signature=secret&y=1 (really?) failed";
        assert_eq!(without_secrets(text), "GET https://host/x (really?) failed");
        let text = "no (https://me:se@cret@host:8/x@y?z=secret) and http://h a@b";
        assert_eq!(without_secrets(text), "no (https://host:8/x@y) and http://h a@b");
    }

    #[test]
    fn refusals_say_what_they_mean() {
        let of = |status, code: Option<&str>| {
            let url = "https://hub/org/name".to_owned();
            Failure::Refused(Refusal { status, code: code.map(str::to_owned), message: Some("why".to_owned()), url })
        };
        for (status, code, words, hint) in [
            (401, Some("GatedRepo"), "gated", "terms"),
            (403, Some("GatedRepo"), "gated", "terms"),
            (401, Some("RepoNotFound"), "no such repository", "spelling"),
            (404, Some("RepoNotFound"), "no such repository", "spelling"),
            (404, Some("RevisionNotFound"), "no such revision", "after `@`"),
            (404, Some("EntryNotFound"), "no such file", "config.json"),
            (404, None, "no such file", "config.json"),
            (401, None, "valid token", "HF_TOKEN"),
            (403, None, "does not allow", "token may read"),
            (429, None, "too many", "wait"),
            (418, None, "418", "try again"),
        ] {
            let failure = of(status, code);
            let reason = failure.reason();
            assert!(reason.contains(words) && reason.contains(": why,"), "{status} {code:?}: {reason}");
            assert!(failure.hint().contains(hint), "{status} {code:?}: {}", failure.hint());
            assert_eq!(failure.may_pass(), status == 429);
        }
    }
}
