//! The output refit: the output projection, fitted on the source's attention output.

use ndarray::Array2;

use super::layer::{Inputs, RIDGE_NOTE};
use crate::calibrate::PooledMoments;
use crate::error::ConvertError;
use crate::factor::refit::refit;
use crate::mla::MlaLayer;

/// Ridge of the output refit towards the present projection (docs/maths.md, section 4).
const OUTPUT_RIDGE: f64 = 0.01;

/// The output projection, refitted on the source's attention output.
pub(super) fn refit_output(
    inputs: &Inputs<'_>,
    layer: &mut MlaLayer,
    heads: &Array2<f32>,
    notes: &mut Vec<String>,
) -> Result<(), ConvertError> {
    let mut moments = PooledMoments::new(heads.ncols(), layer.hidden());
    moments.add(heads.view(), inputs.target.output.view());
    let fit = refit(&moments.gram(), &moments.cross(), Some(&layer.wo), OUTPUT_RIDGE, inputs.bias, "head outputs")
        .map_err(ConvertError::layer(inputs.index))?;
    if fit.ridge > OUTPUT_RIDGE * RIDGE_NOTE {
        notes.push(format!("singular head outputs, output refit regularised by {:.0e}", fit.ridge));
    }
    layer.wo = fit.weight;
    if inputs.bias {
        layer.wo_bias = Some(fit.offset);
    }
    Ok(())
}
