//! Weights in bf16 where nothing is lost by it.

/// The upper halves of the values, two to a word with the first in the lower half, if the lower halves are all zero: the
/// values as bf16 in a row, on a little-endian device.
pub(in crate::runtime) fn pack(values: &[f32]) -> Option<Vec<u32>> {
    if values.iter().fold(0, |bits, v| bits | v.to_bits() & 0xffff) != 0 {
        return None;
    }
    Some(values.chunks(2).map(|v| v[0].to_bits() >> 16 | v.get(1).map_or(0, |v| v.to_bits())).collect())
}

/// The nearest bf16 of each value, halves to even, laid out as by [`pack`].
#[cfg(feature = "cuda")]
pub(in crate::runtime) fn pack_rounded(values: &[f32]) -> Vec<u32> {
    let bits = |v: &f32| u32::from(half::bf16::from_f32(*v).to_bits());
    values.chunks(2).map(|v| bits(&v[0]) | v.get(1).map_or(0, |v| bits(v) << 16)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_values_that_are_bf16_are_packed() {
        let values = [1.0f32, -2.5, 0.15625, f32::NAN, 3.0];
        let packed = pack(&values.map(|v| f32::from_bits(v.to_bits() & 0xffff_0000))).unwrap();
        assert_eq!(packed.len(), 3);
        for (i, v) in values.iter().enumerate() {
            let word = packed[i / 2];
            let bits = if i % 2 == 1 { word & 0xffff_0000 } else { word << 16 };
            assert_eq!(bits, v.to_bits() & 0xffff_0000);
        }
        assert!(pack(&[1.0, 0.1]).is_none());
    }
}
