//! Naming a device.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

/// Which device to compute on, as a user says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// The best GPU that is no software, else the CPU.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// A GPU by its number in [`devices`](super::devices), or the first.
    Gpu(Option<usize>),
    /// The first GPU that is reached through Vulkan.
    Vulkan,
    /// The first GPU that is reached through Metal.
    Metal,
    /// An NVIDIA card through CUDA, by its number, or the first.
    Cuda(Option<usize>),
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let (name, number) = match s.split_once(':') {
            Some((name, number)) => (name, Some(number.parse::<usize>().map_err(|_| UNKNOWN.to_owned())?)),
            None => (s, None),
        };
        match (name, number) {
            ("auto", None) => Ok(Self::Auto),
            ("cpu", None) => Ok(Self::Cpu),
            ("gpu", n) => Ok(Self::Gpu(n)),
            ("vulkan", None) => Ok(Self::Vulkan),
            ("metal", None) => Ok(Self::Metal),
            ("cuda", n) => Ok(Self::Cuda(n)),
            _ => Err(UNKNOWN.to_owned()),
        }
    }
}

impl Serialize for DeviceChoice {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

const UNKNOWN: &str =
    "expected auto, cpu, gpu, gpu:N, vulkan, metal, cuda or cuda:N; `gqa2mla devices` lists what this machine has";

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Gpu(None) => f.write_str("gpu"),
            Self::Gpu(Some(n)) => write!(f, "gpu:{n}"),
            Self::Vulkan => f.write_str("vulkan"),
            Self::Metal => f.write_str("metal"),
            Self::Cuda(None) => f.write_str("cuda"),
            Self::Cuda(Some(n)) => write!(f, "cuda:{n}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for name in ["auto", "cpu", "gpu", "gpu:3", "vulkan", "metal", "cuda", "cuda:1"] {
            assert_eq!(name.parse::<DeviceChoice>().map(|d| d.to_string()), Ok(name.to_owned()));
        }
        for bad in ["", "GPU", "gpu:", "gpu:-1", "cpu:0", "rocm", "vulkan:1", "gpu:1:2"] {
            assert!(bad.parse::<DeviceChoice>().is_err(), "{bad}");
        }
    }
}
