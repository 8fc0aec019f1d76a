//! Weights of linear layers in host memory, in the dtype in which they are held.

use std::ops::Range;

use half::bf16;
use half::slice::HalfBitsSliceExt;
use ndarray::{Array2, ArrayView2, s};

use crate::arch::Part;
use crate::source::{Dtype, DtypeExt, MappedBytes, SourceError, TensorDirectory};

/// The weight of a linear layer in host memory, `[out, in]`: f32, or bf16 where its file holds bf16 and it is read in place.
///
/// In place means in a read-only map of the file, without a copy. A tensor that is misaligned in its file is copied, and
/// stays as narrow as it is.
#[derive(Debug, Clone)]
pub struct HostWeight {
    held: Held,
    rows: usize,
    columns: usize,
}

#[derive(Debug, Clone)]
enum Held {
    /// In standard layout, as the next.
    F32(Array2<f32>),
    Bf16(Array2<bf16>),
    /// Aligned, and as many as the shape says.
    F32InPlace(MappedBytes),
    Bf16InPlace(MappedBytes),
}

impl From<Array2<f32>> for HostWeight {
    fn from(weight: Array2<f32>) -> Self {
        let (rows, columns) = weight.dim();
        Self { held: Held::F32(standard(weight)), rows, columns }
    }
}

impl From<Array2<bf16>> for HostWeight {
    fn from(weight: Array2<bf16>) -> Self {
        let (rows, columns) = weight.dim();
        Self { held: Held::Bf16(standard(weight)), rows, columns }
    }
}

fn standard<E: Clone>(weight: Array2<E>) -> Array2<E> {
    if weight.is_standard_layout() { weight } else { weight.as_standard_layout().into_owned() }
}

impl HostWeight {
    /// A stored matrix, or some rows of one, in place. `None` for what cannot be used as it is stored: other dtypes than f32
    /// and bf16, files that cannot be mapped, processors with the other byte order.
    ///
    /// # Errors
    /// As [`TensorDirectory::in_place`].
    pub(super) fn in_place(tensors: &TensorDirectory, part: &Part) -> Result<Option<Self>, SourceError> {
        let Some(info) = tensors.get(&part.name) else { return Ok(None) };
        let (Dtype::F32 | Dtype::BF16, [_, columns]) = (info.dtype, info.shape.as_slice()) else { return Ok(None) };
        if *columns == 0 || cfg!(target_endian = "big") {
            return Ok(None);
        }
        let Some(bytes) = tensors.in_place(&part.name, part.rows.clone())? else { return Ok(None) };
        bytes.read_ahead();
        let (rows, columns) = (bytes.len() / info.dtype.byte_size() / columns, *columns);
        let held = match info.dtype {
            Dtype::F32 if bytemuck::try_cast_slice::<u8, f32>(&bytes).is_ok() => Held::F32InPlace(bytes),
            Dtype::F32 => return Ok(copied(&bytes, (rows, columns), f32::from_le_bytes)),
            _ if bytemuck::try_cast_slice::<u8, u16>(&bytes).is_ok() => Held::Bf16InPlace(bytes),
            _ => return Ok(copied(&bytes, (rows, columns), bf16::from_le_bytes)),
        };
        Ok(Some(Self { held, rows, columns }))
    }

    /// `(out, in)`.
    pub fn shape(&self) -> (usize, usize) {
        (self.rows, self.columns)
    }

    /// Bytes of memory that are its own, beside what is mapped.
    pub fn own_bytes(&self) -> usize {
        match &self.held {
            Held::F32(values) => values.len() * size_of::<f32>(),
            Held::Bf16(values) => values.len() * size_of::<bf16>(),
            Held::F32InPlace(_) | Held::Bf16InPlace(_) => 0,
        }
    }

    /// All values.
    pub(crate) fn view(&self) -> WeightView<'_> {
        match &self.held {
            Held::F32(values) => WeightView::F32(values.view()),
            Held::Bf16(values) => WeightView::Bf16(values.view()),
            Held::F32InPlace(bytes) => WeightView::F32(self.matrix(bytemuck::cast_slice(bytes))),
            Held::Bf16InPlace(bytes) => {
                WeightView::Bf16(self.matrix(bytemuck::cast_slice::<u8, u16>(bytes).reinterpret_cast()))
            }
        }
    }

    fn matrix<'a, E>(&self, values: &'a [E]) -> ArrayView2<'a, E> {
        ArrayView2::from_shape((self.rows, self.columns), values).expect("as many values as the shape says")
    }

    /// In f32, in memory of its own.
    pub fn into_f32(self) -> Array2<f32> {
        match self.held {
            Held::F32(values) => values,
            _ => match self.view() {
                WeightView::F32(values) => values.to_owned(),
                WeightView::Bf16(values) => values.mapv(widened),
            },
        }
    }
}

/// A weight whose values are misaligned in its file.
fn copied<const N: usize, E>(bytes: &[u8], shape: (usize, usize), value: impl Fn([u8; N]) -> E) -> Option<HostWeight>
where
    HostWeight: From<Array2<E>>,
{
    let values = bytes.as_chunks().0.iter().map(|bytes| value(*bytes)).collect();
    Array2::from_shape_vec(shape, values).ok().map(HostWeight::from)
}

/// A bf16 is the upper half of an f32. Said this way it is one shift, where `bf16::to_f32` keeps NaN quiet by a branch.
#[inline(always)]
pub(super) fn widened(x: bf16) -> f32 {
    f32::from_bits(u32::from(x.to_bits()) << 16)
}

/// A weight, or a part of one, `[out, in]`.
#[derive(Debug, Clone, Copy)]
pub(crate) enum WeightView<'a> {
    F32(ArrayView2<'a, f32>),
    Bf16(ArrayView2<'a, bf16>),
}

impl<'a> WeightView<'a> {
    /// `(out, in)`.
    pub(super) fn dim(&self) -> (usize, usize) {
        match self {
            Self::F32(w) => w.dim(),
            Self::Bf16(w) => w.dim(),
        }
    }

    /// Some outputs of it.
    pub(super) fn rows(self, rows: Range<usize>) -> Self {
        match self {
            Self::F32(w) => Self::F32(w.slice_move(s![rows, ..])),
            Self::Bf16(w) => Self::Bf16(w.slice_move(s![rows, ..])),
        }
    }

    /// Some inputs of it.
    pub(super) fn columns(self, columns: Range<usize>) -> Self {
        match self {
            Self::F32(w) => Self::F32(w.slice_move(s![.., columns])),
            Self::Bf16(w) => Self::Bf16(w.slice_move(s![.., columns])),
        }
    }
}
