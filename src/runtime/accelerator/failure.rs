//! The first thing that went wrong on a device that works asynchronously.

use std::sync::{Arc, Mutex, PoisonError};

use crate::runtime::RuntimeError;

/// What went wrong.
#[derive(Debug, Clone)]
pub(in crate::runtime) enum Failure {
    /// Too little memory.
    Memory(String),
    /// Anything else.
    Other(String),
}

/// Keeps the first failure; clones share it.
#[derive(Debug, Clone, Default)]
pub(in crate::runtime) struct FirstFailure(Arc<Mutex<Option<Failure>>>);

impl FirstFailure {
    /// Keep this one, if it is the first.
    pub(in crate::runtime) fn keep(&self, failure: Failure) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(failure);
    }

    /// Whether anything went wrong.
    pub(in crate::runtime) fn happened(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// The failure as an error of a device.
    pub(in crate::runtime) fn check(&self, device: &str) -> Result<(), RuntimeError> {
        let device = device.to_owned();
        match self.0.lock().unwrap_or_else(PoisonError::into_inner).clone() {
            None => Ok(()),
            Some(Failure::Memory(message)) => Err(RuntimeError::DeviceMemory { device, message }),
            Some(Failure::Other(message)) => Err(RuntimeError::Device { device, message }),
        }
    }
}
