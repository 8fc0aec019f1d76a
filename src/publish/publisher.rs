//! Staging, tensors in the order of the plan, and publishing.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use crate::error::ConvertError;
use crate::observe::{Event, Observer};
use crate::source::ModelSource;
use crate::target::{Emit, OutTensor};
use crate::write::{Leftover, Mark, Progress, ShardPlan, StagedWriter, Staging, StagingOptions, WriteError};

/// The folder that a command writes.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// Path at which it appears.
    pub output: &'a Path,
    /// Whether a model that lies there is replaced.
    pub overwrite: bool,
    /// What to do with an unfinished run for the same output.
    pub leftover: Leftover,
    /// Bytes of all its weights.
    pub bytes: u64,
}

/// Check that `place` can be written from `source`, lock it, and open a staging folder beside it.
///
/// # Errors
/// [`WriteError`]: an output that exists, overlaps the source or is being written, an unfinished run, a full disk.
pub fn stage(source: &ModelSource, place: &Place<'_>) -> Result<Staging, ConvertError> {
    let options = StagingOptions {
        overwrite: place.overwrite,
        source: Some(source.dir.clone()),
        // Zeros that take no room in the source are skipped in the output too.
        needed_bytes: place.bytes.saturating_sub(source.tensors.hole_bytes()),
        leftover: place.leftover,
    };
    Ok(Staging::create(place.output, &options)?)
}

/// Gives the values of the tensors that a command computes, [`Origin::Computed`], when their turn comes.
///
/// [`Origin::Computed`]: crate::target::Origin::Computed
pub trait Compute<K> {
    /// Row-major values of the tensor that `key` names; `None` where there is no such tensor.
    ///
    /// # Errors
    /// Whatever keeps them from being computed.
    fn values(&mut self, key: &K) -> Result<Option<Cow<'_, [f64]>>, ConvertError>;
}

/// Tensors that were computed beforehand, by their place in the list.
impl Compute<usize> for &[OutTensor] {
    fn values(&mut self, key: &usize) -> Result<Option<Cow<'_, [f64]>>, ConvertError> {
        Ok(self.get(*key).map(|tensor| Cow::Borrowed(tensor.values.as_slice())))
    }
}

/// No computed tensor: every one of the list comes from the source.
#[derive(Debug, Clone, Copy, Default)]
pub struct Nothing;

impl<K> Compute<K> for Nothing {
    fn values(&mut self, _: &K) -> Result<Option<Cow<'_, [f64]>>, ConvertError> {
        Ok(None)
    }
}

/// Writes one model folder. Dropped before [`Publisher::finish`], it leaves nothing but what a journal makes worth keeping.
pub struct Publisher<'a> {
    pub(super) source: &'a ModelSource,
    pub(super) writer: StagedWriter,
    observer: &'a dyn Observer,
    /// Block scales of the FP8 tensor that was written last, as stored.
    pub(super) scales: Vec<u8>,
}

impl<'a> Publisher<'a> {
    /// A publisher of a model made from `source`, whose weight files are laid out by `plan`.
    pub fn new(source: &'a ModelSource, staging: Staging, plan: ShardPlan, observer: &'a dyn Observer) -> Self {
        Self { source, writer: StagedWriter::new(staging, plan), observer, scales: Vec::new() }
    }

    /// The same, after the tensors that an earlier run had written up to a mark.
    ///
    /// # Errors
    /// I/O errors.
    pub fn resume(
        source: &'a ModelSource,
        staging: Staging,
        plan: ShardPlan,
        progress: Progress,
        observer: &'a dyn Observer,
    ) -> Result<Self, ConvertError> {
        let writer = StagedWriter::resume(staging, plan, progress)?;
        Ok(Self { source, writer, observer, scales: Vec::new() })
    }

    /// The staging folder: its path, for files that a run needs and does not publish.
    pub fn staging(&self) -> &Staging {
        self.writer.staging()
    }

    /// The same, to write its journal, or to say whether it is worth keeping after an error.
    pub fn staging_mut(&mut self) -> &mut Staging {
        self.writer.staging_mut()
    }

    /// Wait until all tensors so far are on the disk, and say how far that is: what a journal records.
    ///
    /// # Errors
    /// I/O errors.
    pub fn mark(&mut self) -> Result<Mark, ConvertError> {
        Ok(self.writer.mark()?)
    }

    /// Write the next tensors of the plan. Every one is reported as [`Event::Written`].
    ///
    /// # Errors
    /// A tensor that is not the next of the plan, values that are not finite in the planned dtype
    /// ([`ConvertError::Produced`]), a source or an output that cannot be read or written.
    pub fn write<K>(&mut self, list: &[Emit<K>], computed: &mut dyn Compute<K>) -> Result<(), ConvertError> {
        for emit in list {
            let name = &emit.planned.name;
            let next = self.writer.next_tensor().map(|(name, _)| name.to_owned());
            if next.as_ref() != Some(name) {
                return Err(WriteError::OutOfOrder { expected: next, found: name.clone() }.into());
            }
            self.tensor(emit, computed)?;
            self.observer.event(Event::Written { tensor: name.clone() });
        }
        Ok(())
    }

    /// Publish the folder: index, manifest, a wait for the disk, one rename. Returns its absolute path. What could not be
    /// removed afterwards is reported as a warning.
    ///
    /// # Errors
    /// [`WriteError::Incomplete`] where tensors are missing; I/O errors. The output is as it was, except with
    /// [`WriteError::NotSynced`].
    pub fn finish(self) -> Result<PathBuf, ConvertError> {
        let published = self.writer.finish()?;
        if let Some(left) = published.left_behind {
            self.observer.event(Event::Warning(format!("could not be removed: {}", left.display())));
        }
        Ok(published.path)
    }
}
