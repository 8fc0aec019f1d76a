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
    Cuda(Option<usize>, Precision),
}

/// What products of matrices are computed in. Sums are f32 either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// As exact as f32 is.
    #[default]
    F32,
    /// Of activations and weights rounded to bf16, as models are served: three times as fast on tensor cores.
    Bf16,
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let (device, precision) = match s.strip_suffix(":bf16") {
            Some(device) => (device, Precision::Bf16),
            None => (s, Precision::F32),
        };
        let (name, number) = match device.split_once(':') {
            Some((name, number)) => (name, Some(number.parse::<usize>().map_err(|_| UNKNOWN.to_owned())?)),
            None => (device, None),
        };
        if precision != Precision::F32 && name != "cuda" {
            return Err("bf16 products are computed on cuda alone: use cuda:bf16 or cuda:N:bf16".to_owned());
        }
        match (name, number) {
            ("auto", None) => Ok(Self::Auto),
            ("cpu", None) => Ok(Self::Cpu),
            ("gpu", n) => Ok(Self::Gpu(n)),
            ("vulkan", None) => Ok(Self::Vulkan),
            ("metal", None) => Ok(Self::Metal),
            ("cuda", n) => Ok(Self::Cuda(n, precision)),
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
    "expected auto, cpu, gpu[:N], vulkan, metal or cuda[:N][:bf16]; `gqa2mla devices` lists what this machine has";

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Gpu(None) => f.write_str("gpu"),
            Self::Gpu(Some(n)) => write!(f, "gpu:{n}"),
            Self::Vulkan => f.write_str("vulkan"),
            Self::Metal => f.write_str("metal"),
            Self::Cuda(number, precision) => {
                f.write_str("cuda")?;
                number.map_or(Ok(()), |n| write!(f, ":{n}"))?;
                f.write_str(match precision {
                    Precision::F32 => "",
                    Precision::Bf16 => ":bf16",
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for name in ["auto", "cpu", "gpu", "gpu:3", "vulkan", "metal", "cuda", "cuda:1", "cuda:bf16", "cuda:2:bf16"] {
            assert_eq!(name.parse::<DeviceChoice>().map(|d| d.to_string()), Ok(name.to_owned()));
        }
        for bad in
            ["", "GPU", "gpu:", "gpu:-1", "cpu:0", "rocm", "vulkan:1", "gpu:1:2", "cuda:fp8", "cuda:bf16:1", ":bf16"]
        {
            assert!(bad.parse::<DeviceChoice>().is_err(), "{bad}");
        }
        for other in ["cpu:bf16", "gpu:0:bf16", "auto:bf16"] {
            assert!(other.parse::<DeviceChoice>().unwrap_err().contains("cuda:bf16"), "{other}");
        }
    }
}
