//! Whole conversions on the fixtures.

mod bytes;
mod hybrid;
mod output;
mod refusals;
mod resume;

use std::panic::resume_unwind;

use gqa2mla::convert::{CalibrationSettings, ConvertSettings, MethodChoice};
use gqa2mla::observe::{Event, Observer};

fn settings(method: impl Into<MethodChoice>) -> ConvertSettings {
    let calibration = CalibrationSettings { samples: 48, seq_len: 128, ..CalibrationSettings::default() };
    ConvertSettings { method: method.into(), calibration, ..ConvertSettings::default() }
}

/// Stops the run, as a signal does, once `done` layers are finished.
struct StopAt(u64);

impl Observer for StopAt {
    fn event(&self, event: Event) {
        if matches!(event, Event::Checkpoint { done, .. } if done == self.0) {
            resume_unwind(Box::new("stopped"));
        }
    }
}
