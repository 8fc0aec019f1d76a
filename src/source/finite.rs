//! Finds NaN and infinity in stored weights, by their exponent bits.

use rayon::prelude::*;

use super::{Dtype, DtypeExt, SourceError, TensorDirectory, TensorView};

/// Values that are not finite in one tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NonFinite {
    /// How many.
    pub count: u64,
    /// Index of the first in row-major order, one number per dimension.
    pub first_index: Vec<usize>,
    /// Its value: `NaN`, `inf` or `-inf`.
    pub value: String,
}

/// Elements per task; a multiple of every vector width.
const CHUNK: usize = 1 << 16;

/// Counts the values of `view` that are NaN or infinite; `None` when there are none. Integer and boolean tensors are
/// always finite. FP8 follows the OCP formats: E4M3 has NaN (`S.1111.111`) and no infinity.
pub fn find_non_finite(view: &TensorView<'_>) -> Option<NonFinite> {
    let mut scan = Scan::new(view.dtype);
    scan.add(&view.bytes);
    scan.finish(view.shape)
}

/// As [`find_non_finite`], for a stored tensor of any size: a few megabytes of it are in memory at a time.
///
/// # Errors
/// A tensor that is not there or cannot be read.
pub fn scan_non_finite(tensors: &TensorDirectory, name: &str) -> Result<Option<NonFinite>, SourceError> {
    let Some(info) = tensors.get(name) else {
        return Err(tensors.view(name).err().unwrap_or(SourceError::MissingTensor { name: name.into(), near: vec![] }));
    };
    let mut scan = Scan::new(info.dtype);
    tensors.for_each_piece(name, |piece| {
        scan.add(piece);
        Ok::<(), SourceError>(())
    })?;
    Ok(scan.finish(&info.shape))
}

/// What was found in the pieces of a tensor so far.
struct Scan {
    dtype: Dtype,
    elements: usize,
    count: u64,
    /// Position and value of the first.
    first: Option<(usize, &'static str)>,
}

impl Scan {
    fn new(dtype: Dtype) -> Self {
        Scan { dtype, elements: 0, count: 0, first: None }
    }

    fn add(&mut self, b: &[u8]) {
        let (count, first) = match self.dtype {
            Dtype::BF16 => scan::<2>(b, |x| u16::from_le_bytes(x) & 0x7f80 == 0x7f80),
            Dtype::F16 => scan::<2>(b, |x| u16::from_le_bytes(x) & 0x7c00 == 0x7c00),
            Dtype::F32 => scan::<4>(b, |x| u32::from_le_bytes(x) & 0x7f80_0000 == 0x7f80_0000),
            Dtype::F64 => scan::<8>(b, |x| u64::from_le_bytes(x) & (0x7ff << 52) == 0x7ff << 52),
            Dtype::F8_E5M2 => scan::<1>(b, |x| x[0] & 0x7c == 0x7c),
            Dtype::F8_E4M3 => scan::<1>(b, |x| x[0] & 0x7f == 0x7f),
            _ => (0, None),
        };
        let size = self.dtype.byte_size();
        if let (None, Some(at)) = (self.first, first) {
            self.first = Some((self.elements + at, describe(self.dtype, &b[at * size..(at + 1) * size])));
        }
        self.count += count;
        self.elements += b.len() / size;
    }

    fn finish(self, shape: &[usize]) -> Option<NonFinite> {
        let (mut rest, value) = self.first?;
        let mut index = vec![0; shape.len()];
        for (i, &dim) in index.iter_mut().zip(shape).rev() {
            *i = rest % dim.max(1);
            rest /= dim.max(1);
        }
        Some(NonFinite { count: self.count, first_index: index, value: value.to_owned() })
    }
}

/// Count and first position of the elements of `N` bytes for which `bad` holds.
fn scan<const N: usize>(bytes: &[u8], bad: impl Fn([u8; N]) -> bool + Sync + Send) -> (u64, Option<usize>) {
    let elements = bytes.as_chunks::<N>().0;
    elements
        .par_chunks(CHUNK)
        .enumerate()
        .map(|(i, chunk)| {
            let count = chunk.iter().map(|&e| u32::from(bad(e))).sum::<u32>();
            let first = (count > 0).then(|| chunk.iter().position(|&e| bad(e))).flatten();
            (u64::from(count), first.map(|p| i * CHUNK + p))
        })
        .reduce(|| (0, None), |a, b| (a.0 + b.0, a.1.into_iter().chain(b.1).min()))
}

/// `NaN`, `inf` or `-inf`, from the bits of a value known not to be finite.
fn describe(dtype: Dtype, le: &[u8]) -> &'static str {
    let mut wide = [0u8; 8];
    wide[..le.len()].copy_from_slice(le);
    let bits = u64::from_le_bytes(wide);
    let (sign, mantissa) = match dtype {
        Dtype::BF16 => (15, 0x7f),
        Dtype::F16 => (15, 0x3ff),
        Dtype::F32 => (31, 0x7f_ffff),
        Dtype::F64 => (63, (1 << 52) - 1),
        Dtype::F8_E5M2 => (7, 0x3),
        _ => (7, 0x7),
    };
    if bits & mantissa != 0 {
        "NaN"
    } else if bits >> sign & 1 == 1 {
        "-inf"
    } else {
        "inf"
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};

    fn view<'a>(dtype: Dtype, shape: &'a [usize], bytes: &'a [u8]) -> TensorView<'a> {
        TensorView { name: "t", dtype, shape, bytes: bytes.into() }
    }

    #[test]
    fn every_16_bit_pattern_agrees_with_half() {
        for bits in 0..=u16::MAX {
            let bytes = bits.to_le_bytes();
            for (dtype, x) in
                [(Dtype::BF16, bf16::from_bits(bits).to_f32()), (Dtype::F16, f16::from_bits(bits).to_f32())]
            {
                let found = find_non_finite(&view(dtype, &[1], &bytes));
                assert_eq!(found.is_some(), !x.is_finite(), "{dtype} {bits:#x}");
                if let Some(f) = found {
                    assert_eq!(f.value, x.to_string(), "{dtype} {bits:#x}");
                }
            }
        }
    }

    #[test]
    fn counts_and_finds_the_first_across_chunks() {
        let shape = [3, CHUNK, 2];
        let mut values = vec![1.0f32; 6 * CHUNK];
        values[5 * CHUNK + 7] = f32::NEG_INFINITY;
        values[2 * CHUNK + 5] = f32::NAN;
        values[6 * CHUNK - 1] = f32::INFINITY;
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        let found = find_non_finite(&view(Dtype::F32, &shape, &bytes)).unwrap();
        // 2 CHUNK + 5 = 1 * (2 CHUNK) + 2 * 2 + 1
        assert_eq!(found, NonFinite { count: 3, first_index: vec![1, 2, 1], value: "NaN".to_owned() });
    }

    #[test]
    fn scalars_integers_and_empty() {
        assert_eq!(find_non_finite(&view(Dtype::I32, &[1], &[0xff; 4])), None);
        assert_eq!(find_non_finite(&view(Dtype::F32, &[0, 4], &[])), None);
        let found = find_non_finite(&view(Dtype::F64, &[], &f64::NAN.to_le_bytes())).unwrap();
        assert_eq!((found.count, found.first_index), (1, vec![]));
        assert_eq!(find_non_finite(&view(Dtype::F8_E4M3, &[2], &[0x7e, 0x7f])).unwrap().first_index, [1]);
    }
}
