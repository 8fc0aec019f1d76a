//! Exit codes, and which error gets which.

use std::io::ErrorKind;
use std::process::ExitCode;

/// How the process ends. `docs/cli.md` promises these numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitStatus {
    /// Done.
    Done,
    /// A check did not hold (`verify`, `convert --verify`, `compare` with a failed method).
    CheckFailed,
    /// Input or arguments that cannot be used.
    Unusable,
    /// An I/O or resource failure: the same command may succeed later or elsewhere.
    Resource,
    /// Stopped by this signal (SIGINT 2, SIGTERM 15).
    Interrupted(u8),
}

impl From<ExitStatus> for ExitCode {
    fn from(status: ExitStatus) -> Self {
        ExitCode::from(match status {
            ExitStatus::Done => 0,
            ExitStatus::CheckFailed => 1,
            ExitStatus::Unusable => 2,
            ExitStatus::Resource => 3,
            ExitStatus::Interrupted(signal) => 128 + signal,
        })
    }
}

/// The status for an error: an I/O error that says something about the machine, not about the user's paths, is a
/// resource failure; so is an unreachable hub; everything else is input that cannot be used.
pub fn classify(error: &anyhow::Error) -> ExitStatus {
    use gqa2mla::source::SourceError;
    let hub = error.chain().any(|e| matches!(e.downcast_ref(), Some(SourceError::Hub { .. })));
    let io = error.chain().find_map(|e| {
        let wrapped = match e.downcast_ref::<SourceError>() {
            Some(SourceError::Io(io)) => Some(io),
            _ => None,
        };
        e.downcast_ref::<std::io::Error>().or(wrapped)
    });
    match io.map(std::io::Error::kind) {
        _ if hub => ExitStatus::Resource,
        None => ExitStatus::Unusable,
        Some(
            ErrorKind::NotFound
            | ErrorKind::NotADirectory
            | ErrorKind::IsADirectory
            | ErrorKind::InvalidInput
            | ErrorKind::InvalidData
            | ErrorKind::InvalidFilename
            | ErrorKind::AlreadyExists,
        ) => ExitStatus::Unusable,
        Some(_) => ExitStatus::Resource,
    }
}

/// Whether the error is that the reader of our output went away.
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|e| e.downcast_ref::<std::io::Error>().is_some_and(|io| io.kind() == ErrorKind::BrokenPipe))
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    #[test]
    fn the_kind_decides_however_deep_it_lies() {
        let of = |kind: ErrorKind| {
            let e: Result<(), _> = Err(std::io::Error::from(kind));
            classify(&e.context("writing").context("converting").expect_err("an error"))
        };
        assert_eq!(of(ErrorKind::StorageFull), ExitStatus::Resource);
        assert_eq!(of(ErrorKind::PermissionDenied), ExitStatus::Resource);
        assert_eq!(of(ErrorKind::NotFound), ExitStatus::Unusable);
        assert_eq!(classify(&anyhow::anyhow!("no such method")), ExitStatus::Unusable);
    }
}
