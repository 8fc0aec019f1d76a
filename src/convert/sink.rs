//! Tensors on their way to the writer.

use super::{ConvertError, Job};
use crate::arch::{Part, StoredPart};
use crate::observe::{Event, Observer};
use crate::source::{Dtype, DtypeExt, TensorView};
use crate::target::{Emit, Origin, OutTensor, encode, fp8};
use crate::write::{StagedWriter, WriteError};

/// Hands tensors to the writer in the order of [`Job::planned_tensors`].
pub(super) struct Sink<'a> {
    pub job: &'a Job<'a>,
    pub writer: StagedWriter,
    pub observer: &'a dyn Observer,
    /// Block scales of the FP8 tensor that was written last, as stored.
    pub scales: Vec<u8>,
}

impl Sink<'_> {
    /// Write a run of tensors. `attention` holds what [`Origin::Attention`] counts.
    ///
    /// # Errors
    /// A tensor beyond the plan, values that are not finite, a source or output that cannot be read or written.
    pub fn emit(&mut self, list: &[Emit], attention: &[OutTensor]) -> Result<(), ConvertError> {
        for emit in list {
            let planned = &emit.planned;
            let next = self.writer.next_tensor().map(|(name, _)| name.to_owned());
            if next.as_ref() != Some(&planned.name) {
                return Err(WriteError::OutOfOrder { expected: next, found: planned.name.clone() }.into());
            }
            match &emit.from {
                Origin::Source { part, scale, offset } => self.stored(emit, part, *scale, *offset)?,
                Origin::Attention(i) => match attention.get(*i) {
                    Some(tensor) => self.put(emit, &tensor.values)?,
                    None => {
                        return Err(WriteError::OutOfOrder { expected: next, found: format!("attention {i}") }.into());
                    }
                },
                Origin::Spread { part, places, offset } => {
                    let stored = StoredPart::find(&self.job.source.tensors, part)?.to_f64();
                    let value = |place: &Option<usize>| place.map_or(1.0, |i| stored[i] + offset);
                    self.put(emit, &places.iter().map(value).collect::<Vec<f64>>())?;
                }
                Origin::Zero => self.put(emit, &vec![0.0; planned.shape.iter().product()])?,
                Origin::Scales => {
                    let scales = std::mem::take(&mut self.scales);
                    self.writer.write_tensor(&planned.name, &scales)?;
                }
            }
            self.observer.event(Event::Written { tensor: planned.name.clone() });
        }
        Ok(())
    }

    /// Write values in the planned dtype.
    fn put(&mut self, emit: &Emit, values: &[f64]) -> Result<(), ConvertError> {
        let (name, dtype) = (&emit.planned.name, emit.planned.dtype);
        if dtype != Dtype::F8_E4M3 {
            return Ok(self.writer.write_tensor(name, &finite(name, values, dtype)?)?);
        }
        if values.iter().any(|v| !v.is_finite()) {
            return Err(ConvertError::Produced { name: name.clone() });
        }
        let columns = emit.planned.shape.last().copied().unwrap_or(1);
        let (bytes, scales) = fp8::quantise(values, columns);
        self.writer.write_tensor(name, &bytes)?;
        self.scales = scales.iter().flat_map(|s| s.to_le_bytes()).collect();
        Ok(())
    }

    /// Rows of a source tensor times `scale` plus `offset`: bit for bit where those change nothing and the dtype is the same.
    /// A few megabytes of it are in memory at a time, except where blocks of FP8 have to be seen whole.
    fn stored(&mut self, emit: &Emit, part: &Part, scale: f64, offset: f64) -> Result<(), ConvertError> {
        let tensors = &self.job.source.tensors;
        let info = tensors.get(&part.name).filter(|t| t.bytes() > 0);
        let whole = |dtype: Dtype| dtype == Dtype::F8_E4M3;
        let (name, dtype) = (&emit.planned.name, emit.planned.dtype);
        let Some(info) = info.filter(|t| !whole(t.dtype) && !whole(dtype)) else {
            // An empty tensor has no piece that would end it.
            let mut values = StoredPart::find(tensors, part)?.to_f64();
            values.iter_mut().for_each(|v| *v = *v * scale + offset);
            return self.put(emit, &values);
        };
        let stored = info.dtype;
        let writer = &mut self.writer;
        tensors.for_each_piece_of_rows::<ConvertError>(&part.name, part.rows.clone(), |piece| {
            if dtype == stored && scale == 1.0 && offset == 0.0 {
                return Ok(writer.write_piece(name, piece)?);
            }
            let shape = [piece.len() / stored.byte_size()];
            let mut values = TensorView { name, dtype: stored, shape: &shape, bytes: piece.into() }.to_f64();
            values.iter_mut().for_each(|v| *v = *v * scale + offset);
            Ok(writer.write_piece(name, &finite(name, &values, dtype)?)?)
        })
    }
}

/// Values as stored, if all of them are finite.
fn finite(name: &str, values: &[f64], dtype: Dtype) -> Result<Vec<u8>, ConvertError> {
    if values.iter().any(|v| !v.is_finite()) {
        return Err(ConvertError::Produced { name: name.to_owned() });
    }
    Ok(encode(values, dtype))
}
