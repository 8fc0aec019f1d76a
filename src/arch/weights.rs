//! Reading a stored weight, or some rows of one, whatever it is stored as.

use ndarray::{Array1, Array2};

use super::{ArchError, Part};
use crate::source::{Dtype, DtypeExt, ModelSource, SourceError, TensorDirectory, TensorView};

/// What follows `.weight` in the name of the scales of a block-quantised weight.
pub const SCALE_SUFFIX: &str = "_scale_inv";
/// Side of the blocks that share a scale (DeepSeek-V3's format; docs/targets.md, section 8).
pub const BLOCK: usize = 128;

/// Rows of a stored weight.
#[derive(Debug, Clone)]
pub struct StoredPart<'a> {
    /// The whole stored tensor, its bytes cut to the rows.
    view: TensorView<'a>,
    /// First row.
    first: usize,
    rows: usize,
    /// Scales of an FP8 weight, whole: `[ceil(out / 128), ceil(in / 128)]`.
    scales: Option<TensorView<'a>>,
}

impl<'a> StoredPart<'a> {
    /// Find a weight's rows.
    ///
    /// # Errors
    /// [`SourceError`] for a tensor that is not there.
    pub fn find(tensors: &'a TensorDirectory, part: &Part) -> Result<Self, SourceError> {
        let view = tensors.rows(&part.name, part.rows.clone())?;
        let first = part.rows.as_ref().map_or(0, |rows| rows.start);
        let scales = match view.dtype {
            Dtype::F8_E4M3 => Some(tensors.view(&format!("{}{SCALE_SUFFIX}", part.name))?),
            _ => None,
        };
        let row: usize = view.shape.iter().skip(1).product::<usize>() * view.dtype.byte_size();
        let rows = view.bytes.len().checked_div(row).unwrap_or(0);
        Ok(Self { view, first, rows, scales })
    }

    /// Stored element type.
    pub fn dtype(&self) -> Dtype {
        self.view.dtype
    }

    /// Stored bytes of the rows.
    pub fn bytes(&self) -> &[u8] {
        &self.view.bytes
    }

    /// Shape of the rows: `[rows, ..]`.
    pub fn shape(&self) -> Vec<usize> {
        let mut shape = self.view.shape.to_vec();
        if let Some(first) = shape.first_mut() {
            *first = self.rows;
        }
        shape
    }

    /// Values, row-major.
    pub fn to_f64(&self) -> Vec<f64> {
        match &self.scales {
            None => self.view.to_f64(),
            Some(scales) => {
                let mut values = self.view.to_f64();
                self.scale(scales, &mut values, |v, s| *v *= s);
                values
            }
        }
    }

    /// Values in f32, row-major.
    pub fn to_f32(&self) -> Vec<f32> {
        match &self.scales {
            None => self.view.to_f32(),
            Some(scales) => {
                let mut values = self.view.to_f32();
                self.scale(scales, &mut values, |v, s| *v *= s as f32);
                values
            }
        }
    }

    fn scale<T>(&self, scales: &TensorView<'_>, values: &mut [T], apply: impl Fn(&mut T, f64)) {
        let columns = self.view.shape.get(1).copied().unwrap_or(1).max(1);
        let scale = scales.to_f64();
        let across = columns.div_ceil(BLOCK);
        for (i, row) in values.chunks_exact_mut(columns).enumerate() {
            let down = (self.first + i) / BLOCK;
            for (j, block) in row.chunks_mut(BLOCK).enumerate() {
                // The number of scales was checked when the model was opened.
                let Some(&s) = scale.get(down * across + j) else { return };
                block.iter_mut().for_each(|v| apply(v, s));
            }
        }
    }
}

/// A matrix in f64, times `factor`.
pub(super) fn matrix(source: &ModelSource, part: &Part, factor: f64) -> Result<Array2<f64>, ArchError> {
    let stored = StoredPart::find(&source.tensors, part)?;
    let shape = stored.shape();
    let (rows, columns) = (stored.rows, shape.get(1).copied().unwrap_or(1));
    let mut values = stored.to_f64();
    if factor != 1.0 {
        values.iter_mut().for_each(|v| *v *= factor);
    }
    // The shape was checked against the config, and the byte length against the shape, when the model was opened.
    Array2::from_shape_vec((rows, columns), values)
        .map_err(|_| ArchError::Mismatch { lines: vec![format!("tensor `{}`: {shape:?} is not a matrix", part.name)] })
}

/// A vector in f64, times `factor`.
pub(super) fn vector(source: &ModelSource, part: &Part, factor: f64) -> Result<Array1<f64>, ArchError> {
    let values = StoredPart::find(&source.tensors, part)?.to_f64();
    Ok(Array1::from_vec(values) * factor)
}
