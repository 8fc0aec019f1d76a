//! Which layers become MLA, where only some do.

use super::survey::{Survey, convert_on_trial, walk};
use super::{ConvertError, ConvertSettings, Job, Method, MlaLayers, TargetKind};
use crate::observe::Observer;
use crate::runtime::Device;

/// Layers that keep the source's attention as far as the settings say it: `[layers]`, empty where all become MLA, none yet
/// where they are to be chosen.
///
/// # Errors
/// A layer that the model does not have, a method that compresses nothing.
pub(super) fn kept(settings: &ConvertSettings, layers: usize) -> Result<Vec<bool>, ConvertError> {
    let Some(asked) = &settings.mla_layers else { return Ok(Vec::new()) };
    if settings.method == Method::Exact {
        return Err(ConvertError::refused(
            "`--method exact` compresses no layer: --mla-layers chooses nothing",
            "use `--method attention-aware` to compress",
        ));
    }
    let last = layers.saturating_sub(1);
    match asked {
        MlaLayers::List(ranges) => {
            if let Some((first, end)) = ranges.iter().find(|r| r.1 >= layers) {
                let found = if first == end { end.to_string() } else { format!("{first}-{end}") };
                return Err(ConvertError::refused(
                    format!("--mla-layers names {found}, the model has layers 0 to {last}"),
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

/// The target that holds layers of both kinds.
///
/// # Errors
/// A stock class was asked for.
pub(super) fn target(settings: &ConvertSettings) -> Result<TargetKind, ConvertError> {
    match settings.target {
        TargetKind::Auto | TargetKind::HfRemote => Ok(TargetKind::HfRemote),
        kind => Err(ConvertError::refused(
            format!("the target `{}` has one kind of attention for all layers, --mla-layers makes two", kind.name()),
            "`--target hf-remote` holds both",
        )),
    }
}

/// Choose layers where the settings leave it open: those whose conversion changes the hidden state least,
///
/// ```text
/// |converted attention output - source's|^2 / |hidden state behind the layer's attention|^2
/// ```
///
/// over the survey's windows, each layer converted alone on the source's hidden states. Ties go to the lower layer.
pub(super) fn choose(
    job: &mut Job<'_>,
    backend: &Device,
    windows: &[Vec<u32>],
    found: &mut Survey,
    observer: &dyn Observer,
) -> Result<(), ConvertError> {
    let Some(MlaLayers::Auto(count)) = &job.settings.mla_layers else { return Ok(()) };
    let layers = job.arch.layers;
    let wanted = count.of(layers);
    let energy = |m: &ndarray::Array2<f32>| m.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
    let mut change = Vec::new();
    let aware = job.settings.method == Method::AttentionAware;
    walk(job, backend, windows, observer, aware, |index, layer, pass, stream| {
        let error = convert_on_trial(job, found, index, layer, pass, &stream.windows)?;
        let behind = &stream.hidden + &pass.output;
        // The error is relative to what varies in the output.
        let n = pass.output.nrows().max(1) as f64;
        let mean = pass.output.fold_axis(ndarray::Axis(0), 0.0, |s, v| s + f64::from(*v)) / n;
        let varies = energy(&pass.output) - n * mean.dot(&mean);
        change.push(error * varies.max(0.0) / energy(&behind).max(f64::MIN_POSITIVE));
        Ok(())
    })?;
    let mut order: Vec<usize> = (0..layers).collect();
    order.sort_by(|a, b| change[*a].total_cmp(&change[*b]).then(a.cmp(b)));
    let mut kept = vec![true; layers];
    order.iter().take(wanted).for_each(|i| kept[*i] = false);
    let mut names: Vec<usize> = order.iter().take(wanted).copied().collect();
    names.sort_unstable();
    let names: Vec<String> = names.iter().map(ToString::to_string).collect();
    job.decisions.push(format!(
        "layers {} become MLA, {wanted} of {layers}: those whose conversion changes the hidden state least on the survey's \
         windows",
        names.join(", ")
    ));
    found.kept = if kept.contains(&true) { kept } else { Vec::new() };
    job.spec.kept.clone_from(&found.kept);
    Ok(())
}
