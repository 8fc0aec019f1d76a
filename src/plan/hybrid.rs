//! Which layers become MLA, where only some do.

use crate::error::ConvertError;
use crate::methods::{ConvertSettings, Made, MlaLayers, SourceStream};
use crate::stream::{Keep, Walk};

/// Layers that keep the source's attention as far as the settings say it: `[layers]`, empty where all become MLA, none yet
/// where they are to be chosen.
///
/// # Errors
/// A layer that the model does not have.
pub(super) fn kept(settings: &ConvertSettings, layers: usize) -> Result<Vec<bool>, ConvertError> {
    let Some(asked) = &settings.mla_layers else { return Ok(Vec::new()) };
    let last = layers.saturating_sub(1);
    match asked {
        MlaLayers::List(ranges) => {
            if let Some((first, end)) = ranges.iter().find(|r| r.1 >= layers) {
                let named = if first == end { end.to_string() } else { format!("{first}-{end}") };
                return Err(ConvertError::refused(
                    format!("--mla-layers names {named}, the model has layers 0 to {last}"),
                    "layers are counted from 0",
                ));
            }
            let kept: Vec<bool> = (0..layers).map(|i| !ranges.iter().any(|(a, b)| (*a..=*b).contains(&i))).collect();
            Ok(if kept.contains(&true) { kept } else { Vec::new() })
        }
        MlaLayers::Auto(count) => match count.of(layers) {
            n if n > layers => Err(ConvertError::refused(
                format!("--mla-layers auto:{n} asks for more layers than the model's {layers}"),
                "leave the option out to convert all layers",
            )),
            _ => Ok(Vec::new()),
        },
    }
}

/// Layers that keep the source's attention, `[layers]`, and why.
pub(super) struct Chosen {
    pub kept: Vec<bool>,
    pub decision: String,
}

/// Choose layers where the settings leave it open: those whose conversion changes the hidden state least,
///
/// ```text
/// |converted attention output - source's|^2 / |hidden state after the layer's attention|^2
/// ```
///
/// over the survey's windows, each layer converted alone on the source's hidden states. Ties go to the lower layer.
///
/// # Errors
/// A layer that cannot be converted.
pub(super) fn choose(made: &Made<'_>, walk: &Walk<'_>) -> Result<Option<Chosen>, ConvertError> {
    let settings = made.case.settings;
    let Some(MlaLayers::Auto(count)) = &settings.mla_layers else { return Ok(None) };
    let layers = made.case.arch.layers;
    let wanted = count.of(layers);
    let energy = |m: &ndarray::Array2<f32>| m.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
    let mut change = Vec::new();
    let keep = match settings.method.streams().source {
        SourceStream::Pass(keep) => keep,
        SourceStream::None | SourceStream::Inputs => Keep::default(),
    };
    walk.layers(keep, |visit| {
        let error = settings.method.trial(made, &visit)?;
        let (stream, output) = (visit.stream, &visit.pass.output);
        let after = &stream.hidden + output;
        // The error is relative to what varies in the output.
        let n = output.nrows().max(1) as f64;
        let mean = output.fold_axis(ndarray::Axis(0), 0.0, |s, v| s + f64::from(*v)) / n;
        let varies = energy(output) - n * mean.dot(&mean);
        change.push(error * varies.max(0.0) / energy(&after).max(f64::MIN_POSITIVE));
        Ok(())
    })?;
    let mut order: Vec<usize> = (0..layers).collect();
    order.sort_by(|a, b| change[*a].total_cmp(&change[*b]).then(a.cmp(b)));
    let mut kept = vec![true; layers];
    order.iter().take(wanted).for_each(|i| kept[*i] = false);
    let mut names: Vec<usize> = order.iter().take(wanted).copied().collect();
    names.sort_unstable();
    let names: Vec<String> = names.iter().map(ToString::to_string).collect();
    let decision = format!(
        "layers {} become MLA, {wanted} of {layers}: those whose conversion changes the hidden state least on the survey's \
         windows",
        names.join(", ")
    );
    Ok(Some(Chosen { kept: if kept.contains(&true) { kept } else { Vec::new() }, decision }))
}
