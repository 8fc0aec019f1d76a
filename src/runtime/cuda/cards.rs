//! What NVIDIA cards there are, and opening one.

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};
use ndarray::Array2;

use super::Cuda;
use super::kernels::{Target, known_targets};
use super::stream::Stream;
use crate::runtime::accelerator::guarded;
use crate::runtime::{Backend, Precision, RuntimeError};

/// An NVIDIA card.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CardDescription {
    /// Name of the device.
    pub name: String,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Shares the processor's memory.
    pub integrated: bool,
    /// Compute capability, `(9, 0)` for Hopper.
    pub capability: (i32, i32),
    /// CUDA version of the driver, `(13, 0)`.
    pub driver: (i32, i32),
    /// Why it cannot be used, if so.
    pub unusable: Option<String>,
}

/// Bytes that the parts of a product take at a time, before they are summed.
const PART_BYTES: usize = 1 << 30;
/// What to do without a library.
const INSTEAD: &str = "use `--device gpu` (Vulkan) or `--device cpu` instead";

/// Every card, in the driver's order.
///
/// # Errors
/// A driver that is not there or fails, in one line.
pub fn cards() -> Result<Vec<CardDescription>, String> {
    guarded(|| {
        // SAFETY: opens the library and closes it again.
        if !unsafe { sys::is_culib_present() } {
            return Err(format!("libcuda, which comes with NVIDIA's driver, was not found; {INSTEAD}"));
        }
        let failed = |e: DriverError| format!("NVIDIA's driver does not start: {e}; {INSTEAD}");
        result::init().map_err(failed)?;
        let missing = missing_library();
        let known = if missing.is_none() { known_targets() } else { Ok(Vec::new()) };
        let count = result::device::get_count().map_err(failed)?;
        (0..count).map(|n| describe(n, missing.as_deref(), &known).map_err(failed)).collect()
    })
    .and_then(|inner| inner)
}

/// Libraries besides the driver, in the order they are needed.
fn missing_library() -> Option<String> {
    // SAFETY: opens the libraries and closes them again.
    let present = unsafe {
        [("libnvrtc", cudarc::nvrtc::sys::is_culib_present()), ("libcublas", cudarc::cublas::sys::is_culib_present())]
    };
    let (name, _) = present.into_iter().find(|(_, present)| !present)?;
    Some(format!("{name} of CUDA 12 or 13 was not found (is its folder in LD_LIBRARY_PATH?); {INSTEAD}"))
}

fn capability(device: sys::CUdevice) -> Result<(i32, i32), DriverError> {
    // SAFETY: the caller has the device from the driver.
    unsafe {
        Ok((
            result::device::get_attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            result::device::get_attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ))
    }
}

fn target((major, minor): (i32, i32), known: &[i32]) -> Result<Target, String> {
    Target::choose(10 * major + minor, known)
        .ok_or_else(|| format!("compute capability {major}.{minor} is older than NVRTC compiles for; {INSTEAD}"))
}

fn describe(n: i32, missing: Option<&str>, known: &Result<Vec<i32>, String>) -> Result<CardDescription, DriverError> {
    let device = result::device::get(n)?;
    let capability = capability(device)?;
    let unusable = match (missing, known) {
        (Some(why), _) => Some(why.to_owned()),
        (None, Err(why)) => Some(format!("{why}; {INSTEAD}")),
        (None, Ok(known)) => target(capability, known).err(),
    };
    let mut version = 0;
    // SAFETY: writes one number; the device comes from the driver.
    let (memory, integrated) = unsafe {
        sys::cuDriverGetVersion(&raw mut version).result()?;
        let integrated = result::device::get_attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_INTEGRATED)?;
        (result::device::total_mem(device)?, integrated)
    };
    Ok(CardDescription {
        name: result::device::get_name(device)?,
        memory_bytes: memory as u64,
        integrated: integrated != 0,
        capability,
        driver: (version / 1000, version % 1000 / 10),
        unusable,
    })
}

/// Open card `index` of [`cards`] and let it compute something, so that what cannot work is told now.
///
/// # Errors
/// [`RuntimeError::Device`] when there is no such card, a library is missing, or the card fails or computes wrong;
/// [`RuntimeError::DeviceMemory`] when others have all its memory.
pub fn open(index: usize, precision: Precision) -> Result<Cuda, RuntimeError> {
    open_limited(index, precision, PART_BYTES)
}

/// As [`open`], with parts of products of so many bytes at a time.
///
/// # Errors
/// As [`open`].
pub fn open_limited(index: usize, precision: Precision, part_bytes: usize) -> Result<Cuda, RuntimeError> {
    let failed = |message: String| RuntimeError::Device { device: format!("cuda:{index}"), message };
    let found = cards().map_err(failed)?;
    let card = found.get(index).ok_or_else(|| failed("there is no such card".to_owned()))?;
    if let Some(why) = &card.unusable {
        return Err(failed(why.clone()));
    }
    let opened = guarded(|| {
        let target = known_targets().and_then(|known| target(card.capability, &known)).map_err(failed)?;
        let device = result::device::get(index as i32).map_err(|e| failed(e.to_string()))?;
        let name = format!("cuda:{index} ({})", card.name);
        // SAFETY: the device comes from the driver, which `cards` has initialised.
        let cuda = Cuda::new(unsafe { Stream::open(name, device, target) }?, precision, part_bytes);
        try_out(&cuda)?;
        Ok(cuda)
    });
    opened.map_err(failed).and_then(|inner| inner)
}

/// Products by cuBLAS and by kernels, of integers: exact in any order and in bf16.
fn try_out(cuda: &Cuda) -> Result<(), RuntimeError> {
    let integers = |rows, columns| Array2::from_shape_fn((rows, columns), |(i, j)| ((i * 7 + j * 3) % 11) as f32 - 5.0);
    for rows in [1, 16] {
        let (x, w) = (integers(rows, 12), integers(20, 12));
        for weight in [cuda.upload(w.clone()), cuda.upload_weight(w.clone().into())] {
            let found = cuda.download(cuda.linear(&cuda.upload(x.clone()), &weight, None))?;
            if found != x.dot(&w.t()) {
                let message = "a product of small integers comes out wrong".to_owned();
                return Err(RuntimeError::Device { device: cuda.name().to_owned(), message });
            }
        }
    }
    Ok(())
}
