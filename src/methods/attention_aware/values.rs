//! The value refit: each head's value up-projection, fitted on what the converted attention really pools.

use ndarray::{Array1, Array2, ArrayViewMut2, Axis, s};
use rayon::prelude::*;

use super::Step;
use super::layer::{Inputs, RIDGE_NOTE};
use crate::calibrate::PooledMoments;
use crate::error::ConvertError;
use crate::factor::FactorError;
use crate::factor::linalg::matmul_f32_into;
use crate::factor::refit::refit;
use crate::mla::{LatentAttention, MlaLayer};

/// Ridge of the value refit, as a share of the mean pooled energy: enough to hold directions that hardly vary.
const VALUE_RIDGE: f64 = 1e-4;
/// Heads whose values are refitted side by side, so that one's copies and solves run beside the other's products.
const HEADS: usize = 2;

/// Each head's value up-projection, refitted so that what the converted attention pools gives the source's head output.
/// Returns the head outputs `[T, H d_V]`.
pub(super) fn refit_values(
    inputs: &Inputs<'_>,
    layer: &mut MlaLayer,
    notes: &mut Vec<String>,
) -> Result<Array2<f32>, ConvertError> {
    let (value, heads) = (layer.value_dim(), layer.heads);
    let tokens = inputs.x.nrows();
    let mut out = Array2::zeros((tokens, heads * value));
    let mut ups = layer.v_up.clone();
    let mut constants = Array1::zeros(heads * value);
    {
        let attention = LatentAttention::new(layer, inputs.x, inputs.windows).capped(inputs.source.score_softcap);

        let of_head = |h: usize, pooled: &mut Array2<f32>, out: ArrayViewMut2<'_, f32>| {
            attention.pool(h, pooled.view_mut());
            if !inputs.steps.has(Step::ValueRefit) {
                attention.head_output(h, pooled.view(), out);
                return Ok(None);
            }
            let mut moments = PooledMoments::new(pooled.ncols(), value);
            moments.add(pooled.view(), inputs.target.heads.slice(s![.., h * value..(h + 1) * value]));
            let fit = refit(&moments.gram(), &moments.cross(), None, VALUE_RIDGE, inputs.bias, "pooled latents")?;
            let up = fit.weight.mapv(|v| v as f32);
            matmul_f32_into(out, pooled.view(), up.t());
            Ok(Some(fit))
        };
        let mut pooled = vec![Array2::zeros((tokens, layer.latent.nrows())); HEADS.min(heads)];
        let mut places: Vec<_> = out.axis_chunks_iter_mut(Axis(1), value).enumerate().collect();
        for now in places.chunks_mut(HEADS) {
            let work = pooled.par_iter_mut().zip(now.par_iter_mut());
            let fits = work.map(|(pooled, (h, out))| of_head(*h, pooled, out.view_mut()));
            let fits = fits.collect::<Result<Vec<_>, FactorError>>().map_err(ConvertError::layer(inputs.index))?;
            for (&mut (h, _), fit) in now.iter_mut().zip(fits) {
                let Some(fit) = fit else { continue };
                let columns = h * value..(h + 1) * value;
                if fit.ridge > VALUE_RIDGE * RIDGE_NOTE {
                    notes.push(format!(
                        "head {h}: singular pooled latents, value refit regularised by {:.0e}",
                        fit.ridge
                    ));
                }
                ups.slice_mut(s![columns.clone(), ..]).assign(&fit.weight);
                constants.slice_mut(s![columns]).assign(&fit.offset);
            }
        }
    }
    if inputs.steps.has(Step::ValueRefit) {
        layer.v_up = ups;
        if inputs.bias {
            // The offsets replace every constant the closed form had carried: the targets hold the value bias already.
            let carried = layer.wo.dot(&constants);
            layer.wo_bias = Some(inputs.source.bo.as_ref().map_or(carried.clone(), |b| b + &carried));
        }
    }
    Ok(out)
}
