//! The calibration text of a conversion, as tokens.

use super::Checked;
use crate::calibrate::{CalibrationText, calibration_text, read_texts};
use crate::error::ConvertError;
use crate::observe::{Event, Observer};

/// Calibration text as the settings and the method ask, empty for a method that needs none; and a decision where less is used
/// than was asked for.
///
/// # Errors
/// Settings that leave no text, files that cannot be read, text that is too short.
pub fn read_calibration(
    checked: &Checked<'_>,
    observer: &dyn Observer,
) -> Result<(CalibrationText, Option<String>), ConvertError> {
    let (case, settings) = (&checked.case, checked.case.settings);
    if !settings.method.compresses() {
        return Ok((CalibrationText::default(), None));
    }
    let mut calibration = settings.calibration.clone();
    if calibration.seq_len < 2 {
        return Err(ConvertError::refused("--calib-seq-len has to be at least 2", "256 is the default"));
    }
    if calibration.seq_len > case.arch.max_position {
        calibration.seq_len = case.arch.max_position;
        observer.event(Event::Note(format!(
            "calibration windows of {} tokens: the model has no more positions",
            calibration.seq_len
        )));
    }
    let asked = &settings.calibration;
    if let Some(longest) = asked.max_seq_len.filter(|n| *n < asked.seq_len) {
        return Err(ConvertError::refused(
            format!("--calib-max-seq-len {longest} is less than --calib-seq-len {}", asked.seq_len),
            "the same number of tokens for both gives windows of one length",
        ));
    }
    if calibration.samples == 0 {
        return Err(ConvertError::refused("--calib-samples 0 leaves nothing to calibrate on", "128 is the default"));
    }
    let Some(need) = settings.method.text(case, &checked.candidates)? else {
        return Ok((CalibrationText::default(), None));
    };
    calibration.max_seq_len = Some(need.longest);
    calibration.samples = need.samples;
    let why = format!(", four for each of the {} cached values", need.least / 4);
    let tokenizer = case.source.tokenizer()?;
    let texts = read_texts(&calibration.files)?;
    let text = calibration_text(&tokenizer, &texts, &calibration, need.longer, need.least, &why)?;
    let windows = text.windows.iter().map(Vec::len).sum::<usize>() / calibration.seq_len;
    let mut decision = None;
    if windows < calibration.samples && !need.measures {
        observer.event(Event::Note(format!(
            "the calibration text holds {windows} windows of {} tokens, {} were asked for",
            calibration.seq_len, calibration.samples
        )));
    } else if windows < asked.samples && !need.measures {
        let tokens = |windows: usize| windows * calibration.seq_len;
        decision = Some(format!(
            "calibrated on {} of the {} tokens asked for (--fit-tokens)",
            tokens(windows),
            tokens(asked.samples)
        ));
    }
    Ok((text, decision))
}
