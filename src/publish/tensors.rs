//! One tensor, from where its values are to the writer.

use std::ops::Range;

use super::publisher::{Compute, Publisher};
use super::rounding::{check_finite, rounded};
use crate::arch::{Part, StoredPart};
use crate::error::ConvertError;
use crate::source::{Dtype, DtypeExt, TensorView};
use crate::target::{Cut, Emit, Origin, fp8};
use crate::write::{PlannedTensor, WriteError};

/// Bytes that are made or gathered at a time.
const PIECE: usize = 16 << 20;

impl Publisher<'_> {
    pub(super) fn tensor<K>(
        &mut self,
        Emit { planned, from }: &Emit<K>,
        computed: &mut dyn Compute<K>,
    ) -> Result<(), ConvertError> {
        match from {
            Origin::Stored { name, cut } => self.stored(planned, name, cut),
            Origin::Source { part, scale, offset } => self.scaled(planned, part, *scale, *offset),
            Origin::Widened(part) => {
                let values = StoredPart::find(&self.source.tensors, part)?.to_f64();
                self.values(planned, &values)
            }
            Origin::Computed(key) => match computed.values(key)? {
                Some(values) => self.values(planned, &values),
                None => Err(bad(planned, "its values were not computed".to_owned())),
            },
            Origin::Spread { part, places, offset } => {
                let stored = StoredPart::find(&self.source.tensors, part)?.to_f64();
                let value = |place: &Option<usize>| place.map_or(Some(1.0), |i| Some(stored.get(i)? + offset));
                match places.iter().map(value).collect::<Option<Vec<f64>>>() {
                    Some(values) => self.values(planned, &values),
                    None => Err(bad(planned, format!("`{}` has {} values only", part.name, stored.len()))),
                }
            }
            Origin::Zero => self.zeros(planned),
            Origin::Scales => {
                let scales = std::mem::take(&mut self.scales);
                Ok(self.writer.write_tensor(&planned.name, &scales)?)
            }
        }
    }

    /// Values in the planned dtype; those of FP8 leave the scales of their blocks for the tensor that follows.
    fn values(&mut self, planned: &PlannedTensor, values: &[f64]) -> Result<(), ConvertError> {
        let PlannedTensor { name, dtype, shape } = planned;
        if *dtype != Dtype::F8_E4M3 {
            return Ok(self.writer.write_tensor(name, &rounded(name, values, *dtype)?)?);
        }
        check_finite(name, values)?;
        let columns = shape.last().copied().unwrap_or(1);
        let (bytes, scales) = fp8::quantise(values, columns);
        self.writer.write_tensor(name, &bytes)?;
        self.scales = scales.iter().flat_map(|s| s.to_le_bytes()).collect();
        Ok(())
    }

    /// Rows of a source tensor times `scale` plus `offset`: bit for bit where those change nothing and the dtype is the same.
    /// A few megabytes of it are in memory at a time, except where blocks of FP8 have to be seen whole.
    fn scaled(&mut self, planned: &PlannedTensor, part: &Part, scale: f64, offset: f64) -> Result<(), ConvertError> {
        let tensors = &self.source.tensors;
        let info = tensors.get(&part.name).filter(|t| t.bytes() > 0);
        let whole = |dtype: Dtype| dtype == Dtype::F8_E4M3;
        let (name, dtype) = (&planned.name, planned.dtype);
        let Some(info) = info.filter(|t| !whole(t.dtype) && !whole(dtype)) else {
            // An empty tensor has no piece that would end it.
            let mut values = StoredPart::find(tensors, part)?.to_f64();
            values.iter_mut().for_each(|v| *v = *v * scale + offset);
            return self.values(planned, &values);
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
            Ok(writer.write_piece(name, &rounded(name, &values, dtype)?)?)
        })
    }

    /// Bytes as they are stored, some megabytes at a time.
    fn stored(&mut self, planned: &PlannedTensor, from: &str, cut: &Cut) -> Result<(), ConvertError> {
        let tensors = &self.source.tensors;
        // No row: what is known of the tensor, or the error that it is not there.
        let TensorView { dtype, shape, .. } = tensors.rows(from, Some(0..0))?;
        if dtype != planned.dtype {
            return Err(bad(planned, format!("it is planned as {}, its bytes are {dtype}", planned.dtype)));
        }
        let name = &planned.name;
        if planned.shape.contains(&0) {
            // An empty tensor has no piece that would end it.
            return Ok(self.writer.write_tensor(name, &[])?);
        }
        let writer = &mut self.writer;
        let mut run = |rows: Option<Range<usize>>| {
            tensors.for_each_piece_of_rows::<ConvertError>(from, rows, |piece| Ok(writer.write_piece(name, piece)?))
        };
        match cut {
            Cut::Whole => run(None),
            Cut::Rows(runs) => runs.iter().try_for_each(|rows| run(Some(rows.clone()))),
            Cut::Columns(columns) => {
                let &[rows, width] = shape else {
                    return Err(bad(planned, format!("`{from}` of shape {shape:?} has no columns")));
                };
                if columns.end > width {
                    return Err(bad(planned, format!("`{from}` has {width} columns, not {}", columns.end)));
                }
                let (row, bytes) =
                    (width * dtype.byte_size(), columns.start * dtype.byte_size()..columns.end * dtype.byte_size());
                let height = (PIECE / row).max(1);
                for first in (0..rows).step_by(height) {
                    let block = tensors.rows(from, Some(first..rows.min(first + height)))?;
                    let mut cut = Vec::with_capacity(height.min(rows) * bytes.len());
                    block.bytes.chunks_exact(row).for_each(|row| cut.extend_from_slice(&row[bytes.clone()]));
                    self.writer.write_piece(name, &cut)?;
                }
                Ok(())
            }
        }
    }

    /// Zeros, some megabytes at a time; in FP8 with the scales that blocks of zeros have.
    fn zeros(&mut self, planned: &PlannedTensor) -> Result<(), ConvertError> {
        let PlannedTensor { name, dtype, shape } = planned;
        let elements: usize = shape.iter().product();
        if *dtype == Dtype::F8_E4M3 {
            return self.values(planned, &vec![0.0; elements]);
        }
        let bytes = elements * dtype.byte_size();
        let zeros = vec![0; bytes.min(PIECE)];
        // At least one piece, which ends an empty tensor.
        for first in (0..bytes.max(1)).step_by(PIECE) {
            self.writer.write_piece(name, &zeros[..PIECE.min(bytes - first)])?;
        }
        Ok(())
    }
}

fn bad(planned: &PlannedTensor, reason: String) -> ConvertError {
    WriteError::BadTensor { name: planned.name.clone(), reason }.into()
}
