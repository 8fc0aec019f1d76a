//! The devices of this machine behind one type, chosen by name.

mod choice;
mod list;

use std::ops::Range;

use ndarray::{Array2, ArrayView2};

use super::{
    AttentionShape, Backend, Cpu, HeadColumns, HeadPart, HostWeight, MlpWeights, Rotation, RuntimeError, Span,
};
use crate::arch::Activation;

#[cfg(feature = "cuda")]
use super::cuda::{self, Cuda, CudaTensor};
#[cfg(feature = "gpu")]
use super::gpu::{self, Gpu, GpuTensor};

pub use choice::{DeviceChoice, Precision};
#[cfg(feature = "gpu")]
use list::choose;
use list::no_device;
pub use list::{DeviceDescription, devices};

/// An open device. A [`Backend`] by itself: code that is told the device at run time needs no type parameter.
#[derive(Debug)]
pub enum Device {
    /// The processor.
    Cpu(Cpu),
    /// A GPU.
    #[cfg(feature = "gpu")]
    Gpu(Gpu),
    /// An NVIDIA card, through CUDA.
    #[cfg(feature = "cuda")]
    Cuda(Cuda),
}

/// A matrix on a [`Device`].
#[derive(Debug)]
pub enum DeviceTensor {
    /// In host memory.
    Cpu(Array2<f32>),
    /// On a GPU.
    #[cfg(feature = "gpu")]
    Gpu(GpuTensor),
    /// On an NVIDIA card.
    #[cfg(feature = "cuda")]
    Cuda(CudaTensor),
}

/// The weight of a linear layer on a [`Device`].
#[derive(Debug)]
pub enum DeviceWeight {
    /// In host memory, or in place in its file.
    Cpu(HostWeight),
    /// On a GPU.
    #[cfg(feature = "gpu")]
    Gpu(GpuTensor),
    /// On an NVIDIA card.
    #[cfg(feature = "cuda")]
    Cuda(CudaTensor),
}

impl Device {
    /// Open what was chosen. Where `auto` finds a GPU whose driver fails, it takes the next one, at last the processor.
    ///
    /// # Errors
    /// [`RuntimeError::NoDevice`] for one that is not there, with what is; [`RuntimeError::Device`] for one that fails.
    pub fn open(choice: DeviceChoice) -> Result<Self, RuntimeError> {
        match choice {
            DeviceChoice::Cpu => Ok(Self::Cpu(Cpu)),
            DeviceChoice::Auto => Ok(best_card().or_else(best_gpu).unwrap_or(Self::Cpu(Cpu))),
            DeviceChoice::Cuda(number, precision) => open_card(choice, number, precision),
            DeviceChoice::Gpu(_) | DeviceChoice::Vulkan | DeviceChoice::Metal => open_gpu(choice),
        }
    }

    /// Whether it is the processor pretending to be a GPU.
    pub fn is_software_gpu(&self) -> bool {
        match self {
            #[cfg(feature = "gpu")]
            Self::Gpu(gpu) => gpu.is_software(),
            _ => false,
        }
    }
}

#[cfg(feature = "cuda")]
fn best_card() -> Option<Device> {
    let index = cuda::cards().ok()?.iter().position(|c| c.unusable.is_none())?;
    cuda::open(index, Precision::F32).ok().map(Device::Cuda)
}

#[cfg(not(feature = "cuda"))]
fn best_card() -> Option<Device> {
    None
}

#[cfg(feature = "cuda")]
fn open_card(choice: DeviceChoice, number: Option<usize>, precision: Precision) -> Result<Device, RuntimeError> {
    let found = cuda::cards().unwrap_or_default();
    let index = match number {
        None => found.iter().position(|c| c.unusable.is_none()),
        Some(n) => found.get(n).map(|_| n),
    };
    index.map_or_else(|| Err(no_device(choice)), |index| cuda::open(index, precision).map(Device::Cuda))
}

#[cfg(not(feature = "cuda"))]
fn open_card(choice: DeviceChoice, _: Option<usize>, _: Precision) -> Result<Device, RuntimeError> {
    Err(no_device(choice))
}

#[cfg(feature = "gpu")]
fn best_gpu() -> Option<Device> {
    let index = gpu::adapters().ok().and_then(|found| choose(&found))?;
    gpu::open(index).ok().map(Device::Gpu)
}

#[cfg(not(feature = "gpu"))]
fn best_gpu() -> Option<Device> {
    None
}

#[cfg(feature = "gpu")]
fn open_gpu(choice: DeviceChoice) -> Result<Device, RuntimeError> {
    let found = gpu::adapters().unwrap_or_default();
    let by_interface = |name: &str| found.iter().position(|a| a.interface == name && a.unusable.is_none());
    let index = match choice {
        DeviceChoice::Gpu(None) => found.iter().position(|a| a.unusable.is_none()),
        DeviceChoice::Gpu(Some(n)) => Some(n).filter(|n| *n < found.len()),
        DeviceChoice::Vulkan => by_interface("vulkan"),
        DeviceChoice::Metal => by_interface("metal"),
        DeviceChoice::Auto | DeviceChoice::Cpu | DeviceChoice::Cuda(..) => None,
    };
    index.map_or_else(|| Err(no_device(choice)), |index| gpu::open(index).map(Device::Gpu))
}

#[cfg(not(feature = "gpu"))]
fn open_gpu(choice: DeviceChoice) -> Result<Device, RuntimeError> {
    Err(no_device(choice))
}

/// Functions that open a matrix of one device.
macro_rules! open {
    ($variant:ident, $tensor:ty, $weight:ty, $get:ident, $get_mut:ident, $into:ident) => {
        // The only device there is, if all features are off.
        #[allow(unreachable_patterns)]
        impl DeviceTensor {
            fn $get(&self) -> &$tensor {
                match self {
                    Self::$variant(t) => t,
                    _ => unreachable!("a matrix of another device"),
                }
            }

            fn $get_mut(&mut self) -> &mut $tensor {
                match self {
                    Self::$variant(t) => t,
                    _ => unreachable!("a matrix of another device"),
                }
            }

            fn $into(self) -> $tensor {
                match self {
                    Self::$variant(t) => t,
                    _ => unreachable!("a matrix of another device"),
                }
            }
        }

        #[allow(unreachable_patterns)]
        impl DeviceWeight {
            fn $get(&self) -> &$weight {
                match self {
                    Self::$variant(w) => w,
                    _ => unreachable!("a weight of another device"),
                }
            }
        }
    };
}

open!(Cpu, Array2<f32>, HostWeight, cpu, cpu_mut, into_cpu);
#[cfg(feature = "gpu")]
open!(Gpu, GpuTensor, GpuTensor, gpu, gpu_mut, into_gpu);
#[cfg(feature = "cuda")]
open!(Cuda, CudaTensor, CudaTensor, cuda, cuda_mut, into_cuda);

/// Do the same on any device: `$b` is its backend, `$get`, `$get_mut` and `$into` open matrices, `$made` wraps one.
macro_rules! on {
    ($device:expr, |$b:ident, $get:ident, $get_mut:ident, $into:ident, $made:ident| $e:expr) => {
        match $device {
            Device::Cpu($b) => {
                #[allow(unused_variables)]
                let ($get, $get_mut, $into, $made) =
                    (DeviceTensor::cpu, DeviceTensor::cpu_mut, DeviceTensor::into_cpu, DeviceTensor::Cpu);
                $e
            }
            #[cfg(feature = "gpu")]
            Device::Gpu($b) => {
                #[allow(unused_variables)]
                let ($get, $get_mut, $into, $made) =
                    (DeviceTensor::gpu, DeviceTensor::gpu_mut, DeviceTensor::into_gpu, DeviceTensor::Gpu);
                $e
            }
            #[cfg(feature = "cuda")]
            Device::Cuda($b) => {
                #[allow(unused_variables)]
                let ($get, $get_mut, $into, $made) =
                    (DeviceTensor::cuda, DeviceTensor::cuda_mut, DeviceTensor::into_cuda, DeviceTensor::Cuda);
                $e
            }
        }
    };
}

/// As [`on`], for what takes weights: `$weight` opens one.
macro_rules! on_weights {
    ($device:expr, |$b:ident, $get:ident, $weight:ident, $made:ident| $e:expr) => {
        match $device {
            Device::Cpu($b) => {
                let ($get, $weight, $made) = (DeviceTensor::cpu, DeviceWeight::cpu, DeviceTensor::Cpu);
                $e
            }
            #[cfg(feature = "gpu")]
            Device::Gpu($b) => {
                let ($get, $weight, $made) = (DeviceTensor::gpu, DeviceWeight::gpu, DeviceTensor::Gpu);
                $e
            }
            #[cfg(feature = "cuda")]
            Device::Cuda($b) => {
                let ($get, $weight, $made) = (DeviceTensor::cuda, DeviceWeight::cuda, DeviceTensor::Cuda);
                $e
            }
        }
    };
}

impl Backend for Device {
    type Tensor = DeviceTensor;
    type Weight = DeviceWeight;

    fn name(&self) -> &str {
        on!(self, |b, get, get_mut, into, made| b.name())
    }

    fn upload(&self, host: Array2<f32>) -> DeviceTensor {
        on!(self, |b, get, get_mut, into, made| made(b.upload(host)))
    }

    fn upload_view(&self, host: ArrayView2<'_, f32>) -> DeviceTensor {
        on!(self, |b, get, get_mut, into, made| made(b.upload_view(host)))
    }

    fn upload_weight(&self, host: HostWeight) -> DeviceWeight {
        match self {
            Self::Cpu(b) => DeviceWeight::Cpu(b.upload_weight(host)),
            #[cfg(feature = "gpu")]
            Self::Gpu(b) => DeviceWeight::Gpu(b.upload_weight(host)),
            #[cfg(feature = "cuda")]
            Self::Cuda(b) => DeviceWeight::Cuda(b.upload_weight(host)),
        }
    }

    fn weight_shape(&self, weight: &DeviceWeight) -> (usize, usize) {
        match self {
            Self::Cpu(b) => b.weight_shape(weight.cpu()),
            #[cfg(feature = "gpu")]
            Self::Gpu(b) => b.weight_shape(weight.gpu()),
            #[cfg(feature = "cuda")]
            Self::Cuda(b) => b.weight_shape(weight.cuda()),
        }
    }

    fn takes_weights_in_place(&self) -> bool {
        on!(self, |b, get, get_mut, into, made| b.takes_weights_in_place())
    }

    fn download(&self, tensor: DeviceTensor) -> Result<Array2<f32>, RuntimeError> {
        on!(self, |b, get, get_mut, into, made| b.download(into(tensor)))
    }

    fn shape(&self, tensor: &DeviceTensor) -> (usize, usize) {
        on!(self, |b, get, get_mut, into, made| b.shape(get(tensor)))
    }

    fn zeros(&self, rows: usize, columns: usize) -> DeviceTensor {
        on!(self, |b, get, get_mut, into, made| made(b.zeros(rows, columns)))
    }

    fn write_rows(&self, target: &mut DeviceTensor, to: &[usize], rows: &DeviceTensor) {
        on!(self, |b, get, get_mut, into, made| b.write_rows(get_mut(target), to, get(rows)));
    }

    fn rows(&self, x: &DeviceTensor, rows: Range<usize>) -> DeviceTensor {
        on!(self, |b, get, get_mut, into, made| made(b.rows(get(x), rows)))
    }

    fn linear(&self, x: &DeviceTensor, weight: &DeviceWeight, bias: Option<&DeviceTensor>) -> DeviceTensor {
        on_weights!(self, |b, get, w, made| made(b.linear(get(x), w(weight), bias.map(get))))
    }

    fn head_linear(
        &self,
        x: &DeviceTensor,
        weight: &DeviceWeight,
        of: HeadColumns,
        heads: usize,
        absorb: bool,
    ) -> DeviceTensor {
        on_weights!(self, |b, get, w, made| made(b.head_linear(get(x), w(weight), of, heads, absorb)))
    }

    fn absorb(&self, x: &DeviceTensor, weight: &DeviceWeight, of: HeadColumns, heads: usize) -> DeviceTensor {
        on_weights!(self, |b, get, w, made| made(b.absorb(get(x), w(weight), of, heads)))
    }

    fn rms_norm(&self, x: &DeviceTensor, gain: &DeviceTensor, eps: f64) -> DeviceTensor {
        on!(self, |b, get, get_mut, into, made| made(b.rms_norm(get(x), get(gain), eps)))
    }

    fn rope(&self, x: &mut DeviceTensor, rotation: &Rotation, positions: &[usize], columns: HeadColumns, heads: usize) {
        on!(self, |b, get, get_mut, into, made| b.rope(get_mut(x), rotation, positions, columns, heads));
    }

    fn gather_heads(&self, parts: &[HeadPart<'_, DeviceTensor>], heads: usize) -> DeviceTensor {
        on!(self, |b, get, get_mut, into, made| {
            let parts: Vec<_> = parts.iter().map(|p| HeadPart { from: get(p.from), columns: p.columns }).collect();
            made(b.gather_heads(&parts, heads))
        })
    }

    fn attention(
        &self,
        q: &DeviceTensor,
        k: &DeviceTensor,
        v: &DeviceTensor,
        shape: &AttentionShape,
        spans: &[Span],
    ) -> DeviceTensor {
        on!(self, |b, get, get_mut, into, made| made(b.attention(get(q), get(k), get(v), shape, spans)))
    }

    fn silu_mul(&self, gate: DeviceTensor, up: &DeviceTensor) -> DeviceTensor {
        on!(self, |b, get, get_mut, into, made| made(b.silu_mul(into(gate), get(up))))
    }

    fn add(&self, x: &mut DeviceTensor, y: &DeviceTensor) {
        on!(self, |b, get, get_mut, into, made| b.add(get_mut(x), get(y)));
    }

    fn copy_to_host(&self, x: &DeviceTensor) -> Result<Array2<f32>, RuntimeError> {
        on!(self, |b, get, get_mut, into, made| b.copy_to_host(get(x)))
    }

    fn mlp(
        &self,
        x: &DeviceTensor,
        mlp: &MlpWeights<'_, DeviceWeight, DeviceTensor>,
    ) -> Result<DeviceTensor, RuntimeError> {
        on_weights!(self, |b, get, of, made| {
            let mlp = MlpWeights {
                gate: mlp.gate.as_ref().map(|gate| gate.map(of, get)),
                up: mlp.up.map(of, get),
                down: mlp.down.map(of, get),
                activation: mlp.activation,
            };
            b.mlp(get(x), &mlp).map(made)
        })
    }

    fn gated(
        &self,
        gate: DeviceTensor,
        up: &DeviceTensor,
        activation: Activation,
    ) -> Result<DeviceTensor, RuntimeError> {
        on!(self, |b, get, get_mut, into, made| b.gated(into(gate), get(up), activation).map(made))
    }

    fn activated(&self, x: DeviceTensor, activation: Activation) -> Result<DeviceTensor, RuntimeError> {
        on!(self, |b, get, get_mut, into, made| b.activated(into(x), activation).map(made))
    }

    fn rms_norm_heads(
        &self,
        x: &mut DeviceTensor,
        gain: &DeviceTensor,
        eps: f64,
        columns: HeadColumns,
        heads: usize,
    ) -> Result<(), RuntimeError> {
        on!(self, |b, get, get_mut, into, made| b.rms_norm_heads(get_mut(x), get(gain), eps, columns, heads))
    }

    fn capped_attention(
        &self,
        q: &DeviceTensor,
        k: &DeviceTensor,
        v: &DeviceTensor,
        shape: &AttentionShape,
        cap: f64,
        spans: &[Span],
    ) -> Result<DeviceTensor, RuntimeError> {
        on!(self, |b, get, get_mut, into, made| {
            b.capped_attention(get(q), get(k), get(v), shape, cap, spans).map(made)
        })
    }

    fn softcap(&self, x: DeviceTensor, cap: f64) -> Result<DeviceTensor, RuntimeError> {
        on!(self, |b, get, get_mut, into, made| b.softcap(into(x), cap).map(made))
    }

    fn gather_rows(&self, x: &DeviceTensor, rows: &[usize]) -> Result<DeviceTensor, RuntimeError> {
        on!(self, |b, get, get_mut, into, made| b.gather_rows(get(x), rows).map(made))
    }

    fn scatter_add_rows(
        &self,
        target: &mut DeviceTensor,
        rows: &[usize],
        weights: &[f32],
        y: &DeviceTensor,
    ) -> Result<(), RuntimeError> {
        on!(self, |b, get, get_mut, into, made| b.scatter_add_rows(get_mut(target), rows, weights, get(y)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_absent_device_is_an_error_with_those_there_are() {
        let error = Device::open(DeviceChoice::Cuda(Some(3), Precision::F32)).unwrap_err().to_string();
        assert!(error.contains("cuda:3") && error.contains("cpu:") && error.contains("--device gpu"), "{error}");
        assert!(Device::open(DeviceChoice::Gpu(Some(99))).is_err());
    }
}
