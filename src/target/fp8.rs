//! FP8 weights as DeepSeek-V3 stores them: e4m3 values, one f32 scale per block of 128 x 128 (docs/targets.md, section 8).

use rayon::prelude::*;
use serde_json::{Value, json};

pub use crate::arch::BLOCK;
use crate::arch::SCALE_SUFFIX;

/// Largest e4m3 value.
const LARGEST: f64 = 448.0;

/// Whether the format stores this tensor in FP8: weights of linear layers inside attention, MLP and experts.
pub fn is_quantised(name: &str) -> bool {
    let linear = ["q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"];
    let mlp = ["gate_proj", "up_proj", "down_proj"];
    name.strip_suffix(".weight")
        .and_then(|stem| stem.rsplit('.').next())
        .is_some_and(|last| linear.contains(&last) || mlp.contains(&last))
}

/// `quantization_config` of a model whose linear layers are stored so.
pub fn config() -> Value {
    json!({
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]
    })
}

/// Name of the scales of a weight.
pub fn scale_name(weight: &str) -> String {
    format!("{weight}{SCALE_SUFFIX}")
}

/// Quantise a matrix of `columns` columns, row-major: its e4m3 bytes, and the scales, which multiply them back,
/// `[ceil(rows / 128), ceil(columns / 128)]`. A block of zeros has scale 1.
pub fn quantise(values: &[f64], columns: usize) -> (Vec<u8>, Vec<f32>) {
    let columns = columns.max(1);
    let across = columns.div_ceil(BLOCK);
    let mut bytes = vec![0_u8; values.len()];
    let scales: Vec<Vec<f32>> = bytes
        .par_chunks_mut(BLOCK * columns)
        .zip(values.par_chunks(BLOCK * columns))
        .map(|(out, rows)| {
            let mut largest = vec![0.0_f64; across];
            for row in rows.chunks(columns) {
                for (m, block) in largest.iter_mut().zip(row.chunks(BLOCK)) {
                    *m = block.iter().fold(*m, |m, v| m.max(v.abs()));
                }
            }
            // The scale is what is stored, so values are divided by its f32.
            let scale = |m: &f64| if *m > 0.0 { ((m / LARGEST) as f32).max(f32::MIN_POSITIVE) } else { 1.0 };
            let scales: Vec<f32> = largest.iter().map(scale).collect();
            for (out, row) in out.chunks_mut(columns).zip(rows.chunks(columns)) {
                for ((out, row), scale) in out.chunks_mut(BLOCK).zip(row.chunks(BLOCK)).zip(&scales) {
                    out.iter_mut().zip(row).for_each(|(o, v)| *o = e4m3(v / f64::from(*scale)));
                }
            }
            scales
        })
        .collect();
    (bytes, scales.concat())
}

/// The nearest e4m3 value, ties to even, saturating at 448; subnormals kept.
fn e4m3(value: f64) -> u8 {
    let sign = if value.is_sign_negative() { 0x80 } else { 0 };
    let a = value.abs();
    if a >= LARGEST {
        return sign | 0x7e;
    }
    // Below 2^-6 the step is 2^-9; above, an eighth of the power of two. Bits run on across the border.
    let exponent = if a < 2.0_f64.powi(-6) { -6 } else { (a.to_bits() >> 52) as i32 - 1023 };
    let steps = (a / 2.0_f64.powi(exponent - 3)).round_ties_even() as i32;
    let bits = if exponent == -6 { steps } else { ((exponent + 6) << 3) + steps };
    sign | bits.min(0x7e) as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::{Dtype, TensorView};

    fn decoded(bytes: &[u8]) -> Vec<f64> {
        let shape = [bytes.len()];
        TensorView { name: "t", dtype: Dtype::F8_E4M3, shape: &shape, bytes: bytes.into() }.to_f64()
    }

    #[test]
    fn every_value_encodes_to_itself_and_halfway_goes_to_even() {
        let all: Vec<u8> = (0..=255).filter(|b| b & 0x7f != 0x7f).collect();
        let values = decoded(&all);
        for (bits, value) in all.iter().zip(&values) {
            assert_eq!(e4m3(*value), *bits, "{value}");
        }
        for pair in all[..126].windows(2) {
            let [a, b] = [values[usize::from(pair[0])], values[usize::from(pair[1])]];
            let even = if pair[0].is_multiple_of(2) { pair[0] } else { pair[1] };
            assert_eq!(e4m3((a + b) / 2.0), even);
        }
        assert_eq!((e4m3(1e9), e4m3(-460.0), e4m3(0.0)), (0x7e, 0xfe, 0));
    }

    #[test]
    fn blocks_come_back_within_the_format_s_error() {
        let (rows, columns) = (200, 150);
        let values: Vec<f64> =
            (0..rows * columns).map(|i| ((i * 37 % 1009) as f64 - 500.0) * 1e-4 * (1 + i / 9000) as f64).collect();
        let (bytes, scales) = quantise(&values, columns);
        assert_eq!(scales.len(), 4);
        for (i, (v, q)) in values.iter().zip(decoded(&bytes)).enumerate() {
            let scale = f64::from(scales[i / columns / BLOCK * 2 + i % columns / BLOCK]);
            // Half a step: 2^-4 of the value, or of the smallest normal number.
            assert!((q * scale - v).abs() <= v.abs().max(scale / 64.0) / 16.0 * (1.0 + 1e-9), "{i}: {v} {q}");
        }
    }

    #[test]
    fn only_linear_layers_are_quantised() {
        for (name, quantised) in [
            ("model.layers.0.self_attn.kv_b_proj.weight", true),
            ("model.layers.0.mlp.experts.3.up_proj.weight", true),
            ("model.layers.0.mlp.gate.weight", false),
            ("model.layers.0.self_attn.o_proj.bias", false),
            ("lm_head.weight", false),
        ] {
            assert_eq!(is_quantised(name), quantised, "{name}");
        }
    }
}
