//! Tensors on their way to the writer.

use super::{ConvertError, Job};
use crate::methods::MlaLayer;
use crate::observe::{Event, Observer};
use crate::source::{Dtype, TensorView};
use crate::target::encode;
use crate::write::{StagedWriter, WriteError};

/// Hands tensors to the writer in the order of [`Job::planned_tensors`].
pub(super) struct Sink<'a> {
    pub job: &'a Job<'a>,
    pub writer: StagedWriter,
    pub observer: &'a dyn Observer,
}

impl Sink<'_> {
    /// The dtype and name that come next in the plan, for a tensor that is `made`.
    fn next(&self, made: &str) -> Result<(String, Dtype), ConvertError> {
        match self.writer.next_tensor() {
            Some(t) => Ok((t.name.clone(), t.dtype)),
            None => Err(WriteError::OutOfOrder { expected: None, found: made.to_owned() }.into()),
        }
    }

    fn put(&mut self, made: &str, values: &[f64]) -> Result<(), ConvertError> {
        let (name, dtype) = self.next(made)?;
        self.writer.write_tensor(&name, &finite(&name, values, dtype)?)?;
        self.observer.event(Event::Written { tensor: name });
        Ok(())
    }

    /// Copy a source tensor to the next place, times `scale`: bit for bit where that is 1 and the dtype is the same. A few
    /// megabytes of it are in memory at a time.
    fn copy_scaled(&mut self, from: &str, scale: f64) -> Result<(), ConvertError> {
        let (name, dtype) = self.next(from)?;
        let (tensors, writer) = (&self.job.source.tensors, &mut self.writer);
        // An empty tensor has no piece that would end it.
        let Some(stored) = tensors.get(from).filter(|t| t.bytes() > 0).map(|t| t.dtype) else {
            let view = tensors.view(from)?;
            return self.put(view.name, &view.to_f64());
        };
        tensors.for_each_piece::<ConvertError>(from, |piece| {
            if dtype == stored && scale == 1.0 {
                return Ok(writer.write_piece(&name, piece)?);
            }
            let shape = [piece.len() / stored.size()];
            let mut values = TensorView { name: from, dtype: stored, shape: &shape, bytes: piece.into() }.to_f64();
            if scale != 1.0 {
                values.iter_mut().for_each(|v| *v *= scale);
            }
            Ok(writer.write_piece(&name, &finite(&name, &values, dtype)?)?)
        })?;
        self.observer.event(Event::Written { tensor: name });
        Ok(())
    }

    /// Copy a source tensor to the next place.
    pub fn copy(&mut self, from: &str) -> Result<(), ConvertError> {
        self.copy_scaled(from, 1.0)
    }

    /// A source tensor times the stream scale.
    pub fn stream_scaled(&mut self, from: &str) -> Result<(), ConvertError> {
        self.copy_scaled(from, self.job.spec.stream_scale)
    }

    /// All tensors of one layer, in the order of [`Job::planned_tensors`].
    pub fn layer(&mut self, index: usize, mla: &MlaLayer, gain: &[f64]) -> Result<(), ConvertError> {
        let names = self.job.arch.names.layer(index);
        self.copy(&names.role("input_norm"))?;
        for tensor in self.job.spec.attention_tensors(self.job.arch, index, mla, gain) {
            self.put(&tensor.name, &tensor.values)?;
        }
        self.copy(&names.weight("gate"))?;
        self.copy(&names.weight("up"))?;
        self.stream_scaled(&names.weight("down"))?;
        self.copy(&names.role("post_norm"))
    }
}

/// Values as stored, if all of them are finite.
fn finite(name: &str, values: &[f64], dtype: Dtype) -> Result<Vec<u8>, ConvertError> {
    if values.iter().any(|v| !v.is_finite()) {
        return Err(ConvertError::Produced { name: name.to_owned() });
    }
    Ok(encode(values, dtype))
}
