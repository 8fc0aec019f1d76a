//! Exit codes, and which error gets which.

use std::io::{self, ErrorKind};
use std::process::ExitCode;

use gqa2mla::analyze::AnalyzeError;
use gqa2mla::arch::ArchError;
use gqa2mla::convert::ConvertError;
use gqa2mla::runtime::RuntimeError;
use gqa2mla::source::SourceError;
use gqa2mla::verify::VerifyError;
use gqa2mla::write::WriteError;

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

/// The status for an error: what says something about the machine, the disk or the network, not about the user's input,
/// is a resource failure; everything else is input that cannot be used.
pub fn classify(error: &anyhow::Error) -> ExitStatus {
    error.chain().find_map(judge).unwrap_or(ExitStatus::Unusable)
}

/// Verdict on one link of a chain. Transparent variants hide the error they hold from the chain, so they are opened.
fn judge(e: &(dyn std::error::Error + 'static)) -> Option<ExitStatus> {
    if let Some(io) = e.downcast_ref::<io::Error>() {
        return Some(of_io(io));
    }
    match e.downcast_ref::<ConvertError>() {
        Some(ConvertError::Arch(inner)) => return judge(inner),
        Some(ConvertError::Source(inner)) => return judge(inner),
        Some(ConvertError::Write(inner)) => return judge(inner),
        _ => {}
    }
    match e.downcast_ref::<SourceError>() {
        Some(SourceError::Io(inner)) => return Some(of_io(inner)),
        Some(SourceError::Hub { .. }) => return Some(ExitStatus::Resource),
        _ => {}
    }
    match e.downcast_ref::<RuntimeError>() {
        Some(RuntimeError::Source(inner)) => return judge(inner),
        Some(RuntimeError::Device { .. } | RuntimeError::DeviceMemory { .. }) => return Some(ExitStatus::Resource),
        _ => {}
    }
    if let Some(VerifyError::Run { error, .. }) = e.downcast_ref() {
        return judge(error.as_ref());
    }
    if let Some(AnalyzeError::Runtime(inner)) = e.downcast_ref() {
        return judge(inner);
    }
    if let Some(ArchError::Source(inner)) = e.downcast_ref() {
        return judge(inner);
    }
    match e.downcast_ref::<WriteError>()? {
        WriteError::Io(inner) => Some(of_io(inner)),
        WriteError::Full { .. }
        | WriteError::NoSpace { .. }
        | WriteError::Locked { .. }
        | WriteError::BadLock { .. }
        | WriteError::NotSynced { .. } => Some(ExitStatus::Resource),
        _ => None,
    }
}

fn of_io(e: &io::Error) -> ExitStatus {
    match e.kind() {
        ErrorKind::NotFound
        | ErrorKind::NotADirectory
        | ErrorKind::IsADirectory
        | ErrorKind::InvalidInput
        | ErrorKind::InvalidData
        | ErrorKind::InvalidFilename
        | ErrorKind::AlreadyExists => ExitStatus::Unusable,
        _ => ExitStatus::Resource,
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
        let hidden = ConvertError::Source(SourceError::Io(ErrorKind::PermissionDenied.into()));
        assert_eq!(classify(&anyhow::Error::new(hidden).context("converting")), ExitStatus::Resource);
        assert_eq!(classify(&anyhow::anyhow!("no such method")), ExitStatus::Unusable);
    }
}
