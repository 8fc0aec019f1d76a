//! An open card: its context, memory, kernels and cuBLAS, all on one stream of work.
//!
//! Nothing here fails at once. The first thing that goes wrong is kept, everything after it has no effect, and reading
//! back tells. Work runs in the order it is given, so memory may be used again as soon as its last use is on its way.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::{null_mut, without_provenance, without_provenance_mut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::cublas::sys as blas;
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use super::gemm::Gemm;
use super::kernels::{Kernel, Source, Target, compile};
use crate::runtime::RuntimeError;
use crate::runtime::accelerator::{Failure, FirstFailure, panic_text};

/// Bytes kept of memory nobody uses.
const IDLE_BYTES: usize = 2 << 30;
/// Memory that cuBLAS may use besides its operands, as its manual advises for Hopper. Given, not left to it: which
/// algorithm it picks, and so the bits, must not depend on what is free.
const WORKSPACE: usize = 32 << 20;

/// An argument of a kernel. Every argument takes eight bytes; hosts of CUDA are little-endian, so narrower ones are read
/// at the start.
#[derive(Debug, Clone, Copy)]
pub(super) enum Arg<'a> {
    Memory(&'a Memory),
    /// Behind so many bytes of it.
    Behind(&'a Memory, usize),
    Null,
    Size(usize),
    Word(u32),
    Float(f32),
}

impl Arg<'_> {
    fn bits(self) -> u64 {
        match self {
            Self::Memory(m) => m.address,
            Self::Behind(m, bytes) => m.address + bytes as u64,
            Self::Null => 0,
            Self::Size(n) => n as u64,
            Self::Word(n) => n.into(),
            Self::Float(x) => x.to_bits().into(),
        }
    }
}

/// Memory on a card.
#[derive(Debug)]
pub(super) struct Memory {
    stream: Arc<Stream>,
    address: sys::CUdeviceptr,
    bytes: usize,
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.stream.recycle(self.address, self.bytes);
    }
}

/// A kernel that is loaded.
#[derive(Debug, Clone, Copy)]
struct Function(sys::CUfunction);

// SAFETY: the handle belongs to a module that lives as long as the stream, and the driver's functions take it on any thread.
unsafe impl Send for Function {}

#[derive(Debug, Clone, Copy)]
struct Module(sys::CUmodule);

// SAFETY: as for `Function`.
unsafe impl Send for Module {}

#[derive(Debug, Clone, Copy)]
struct Handle(blas::cublasHandle_t);

// SAFETY: cuBLAS takes a handle on any thread, one at a time; it is only used under the lock of `Stream::state`.
unsafe impl Send for Handle {}

#[derive(Debug, Default)]
struct State {
    blas: Option<Handle>,
    workspace: Option<sys::CUdeviceptr>,
    modules: BTreeMap<Source, Module>,
    functions: BTreeMap<Kernel, Function>,
    idle: BTreeMap<usize, Vec<sys::CUdeviceptr>>,
    idle_bytes: usize,
}

/// A card with the work it was given.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) name: String,
    device: sys::CUdevice,
    context: sys::CUcontext,
    target: Target,
    state: Mutex<State>,
    failure: FirstFailure,
}

// SAFETY: a context may be made current on any thread, which every function here does before it uses it.
unsafe impl Send for Stream {}
// SAFETY: as above; what must not be used by two threads at once is in `state`.
unsafe impl Sync for Stream {}

fn text(e: DriverError) -> String {
    let name = e.error_name().map_or_else(|_| format!("{:?}", e.0), |s| s.to_string_lossy().into_owned());
    e.error_string().map_or(name.clone(), |s| format!("{name}: {}", s.to_string_lossy()))
}

fn failure(e: DriverError) -> Failure {
    match e.0 {
        sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => Failure::Memory(text(e)),
        _ => Failure::Other(text(e)),
    }
}

fn blas_failure(status: blas::cublasStatus_t) -> Result<(), Failure> {
    match status {
        blas::cublasStatus_t::CUBLAS_STATUS_SUCCESS => Ok(()),
        blas::cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED => Err(Failure::Memory(format!("cuBLAS: {status:?}"))),
        _ => Err(Failure::Other(format!("cuBLAS: {status:?}"))),
    }
}

impl Stream {
    /// Open a device of a driver that is initialised.
    ///
    /// # Safety
    /// `device` is a handle of that driver.
    pub(super) unsafe fn open(name: String, device: sys::CUdevice, target: Target) -> Result<Arc<Self>, RuntimeError> {
        let device_name = name.clone();
        let failed = |message| RuntimeError::Device { device: device_name, message };
        // SAFETY: as promised; released when the stream is dropped.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(|e| failed(text(e)))?;
        let state = Mutex::new(State::default());
        let stream = Arc::new(Self { name, device, context, target, state, failure: FirstFailure::default() });
        stream.run(|state| stream.start_blas(state));
        stream.failure.check(&stream.name)?;
        Ok(stream)
    }

    fn start_blas(&self, state: &mut State) -> Result<(), Failure> {
        let mut handle = null_mut();
        // SAFETY: the context is current; the handle is made first and destroyed when the stream is dropped, the
        // workspace after it.
        unsafe {
            blas_failure(blas::cublasCreate_v2(&raw mut handle))?;
            state.blas = Some(Handle(handle));
            let workspace = result::malloc_sync(WORKSPACE).map_err(failure)?;
            state.workspace = Some(workspace);
            // All of these are what the manual calls the default, except for the workspace; said, so that it stays so.
            // The default mode computes f32 in f32, never in TF32.
            blas_failure(blas::cublasSetMathMode(handle, blas::cublasMath_t::CUBLAS_DEFAULT_MATH))?;
            let atomics = blas::cublasAtomicsMode_t::CUBLAS_ATOMICS_NOT_ALLOWED;
            blas_failure(blas::cublasSetAtomicsMode(handle, atomics))?;
            let workspace = without_provenance_mut(workspace as usize);
            blas_failure(blas::cublasSetWorkspace_v2(handle, workspace, WORKSPACE))
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // What a panic left behind is still what was loaded.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Run what enters the driver, unless something failed before. A failure or panic is kept.
    fn run<T>(&self, f: impl FnOnce(&mut State) -> Result<T, Failure>) -> Option<T> {
        if self.failure.happened() {
            return None;
        }
        let entered = catch_unwind(AssertUnwindSafe(|| {
            // SAFETY: the context is retained until the stream is dropped.
            unsafe { result::ctx::set_current(self.context) }.map_err(failure)?;
            f(&mut self.lock())
        }));
        match entered.unwrap_or_else(|panic| Err(Failure::Other(panic_text(panic.as_ref())))) {
            Ok(value) => Some(value),
            Err(first) => {
                self.failure.keep(first);
                None
            }
        }
    }

    /// Memory with anything in it. After a failure none, which nothing will use.
    pub(super) fn scratch(self: &Arc<Self>, bytes: usize) -> Memory {
        // Eight sizes per octave: at most an eighth is wasted, and sizes repeat. No size is 0, nor beyond counting.
        let wanted = bytes.clamp(256, 1 << 50);
        let size = wanted.next_multiple_of((wanted.next_power_of_two() / 16).max(256));
        let address = self.run(|state| {
            if let Some(address) = state.idle.get_mut(&size).and_then(Vec::pop) {
                state.idle_bytes -= size;
                return Ok(address);
            }
            if state.idle_bytes > IDLE_BYTES {
                free_idle(state);
            }
            // SAFETY: the context is current; given back in `recycle`.
            unsafe { result::malloc_sync(size) }.or_else(|e| {
                if e.0 != sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY || state.idle_bytes == 0 {
                    return Err(memory_failure(e, size));
                }
                free_idle(state);
                // SAFETY: as above.
                unsafe { result::malloc_sync(size) }.map_err(|e| memory_failure(e, size))
            })
        });
        Memory { stream: Arc::clone(self), address: address.unwrap_or(0), bytes: size }
    }

    fn recycle(&self, address: sys::CUdeviceptr, bytes: usize) {
        if address != 0 {
            let mut state = self.lock();
            state.idle.entry(bytes).or_default().push(address);
            state.idle_bytes += bytes;
        }
    }

    /// Memory with these contents.
    pub(super) fn filled<T: Copy>(self: &Arc<Self>, values: &[T]) -> Memory {
        let memory = self.scratch(size_of_val(values));
        if !values.is_empty() {
            // SAFETY: as many bytes were allocated; the copy is over when the function returns.
            self.run(|_| unsafe { result::memcpy_htod_sync(memory.address, values) }.map_err(failure));
        }
        memory
    }

    /// Zero the first bytes.
    pub(super) fn clear(&self, memory: &Memory, bytes: usize) {
        if bytes > 0 {
            self.run(|_| {
                assert!(bytes <= memory.bytes, "clearing within the memory");
                // SAFETY: within the memory.
                unsafe { result::memset_d8_async(memory.address, 0, bytes, null_mut()) }.map_err(failure)
            });
        }
    }

    /// Copy bytes from an offset to the start.
    pub(super) fn copy(&self, from: &Memory, offset: usize, to: &Memory, bytes: usize) {
        if bytes > 0 {
            self.run(|_| {
                assert!(offset + bytes <= from.bytes && bytes <= to.bytes, "copying within the memory");
                let address = from.address + offset as u64;
                // SAFETY: within both.
                unsafe { result::memcpy_dtod_async(to.address, address, bytes, null_mut()) }.map_err(failure)
            });
        }
    }

    /// Wait for all work, and read from the start of a memory.
    pub(super) fn read(&self, memory: &Memory, out: &mut [f32]) -> Result<(), RuntimeError> {
        self.run(|_| {
            assert!(size_of_val(out) <= memory.bytes, "reading within the memory");
            // SAFETY: the context is current; within the memory; the copy is over when the function returns.
            unsafe {
                result::ctx::synchronize().map_err(failure)?;
                if out.is_empty() { Ok(()) } else { result::memcpy_dtoh_sync(out, memory.address).map_err(failure) }
            }
        });
        self.failure.check(&self.name)
    }

    /// Fail because of something that cannot be done.
    pub(super) fn refuse(&self, what: String) {
        self.failure.keep(Failure::Other(what));
    }

    /// Give the card a kernel with blocks of `threads`. The arguments are those of its source, in that order.
    pub(super) fn launch(&self, kernel: Kernel, grid: (usize, usize, usize), threads: usize, args: &[Arg<'_>]) {
        if grid.0 == 0 || grid.1 == 0 || grid.2 == 0 {
            return;
        }
        // What every card allows since compute capability 3.0.
        if grid.0 > 0x7fff_ffff || grid.1 > 0xffff || grid.2 > 0xffff {
            return self.refuse(format!("{kernel:?} needs {grid:?} blocks, more than a card takes at once"));
        }
        self.run(|state| {
            let function = self.function(state, kernel)?;
            let mut bits: Vec<u64> = args.iter().map(|a| a.bits()).collect();
            let mut params: Vec<*mut c_void> = bits.iter_mut().map(|b| (&raw mut *b).cast()).collect();
            let grid = (grid.0 as u32, grid.1 as u32, grid.2 as u32);
            // SAFETY: the function is loaded; the arguments are copied before the call returns, and fit the source,
            // which `mod.rs` and `attention.rs` see to.
            unsafe { result::launch_kernel(function.0, grid, (threads as u32, 1, 1), 0, null_mut(), &mut params) }
                .map_err(|e| Failure::Other(format!("{kernel:?}: {}", text(e))))
        });
    }

    fn function(&self, state: &mut State, kernel: Kernel) -> Result<Function, Failure> {
        if let Some(found) = state.functions.get(&kernel) {
            return Ok(*found);
        }
        let source = kernel.source();
        let module = match state.modules.get(&source) {
            Some(found) => *found,
            None => {
                let image = compile(source, self.target).map_err(Failure::Other)?;
                // SAFETY: what NVRTC made, PTX with its zero.
                let module = Module(unsafe { result::module::load_data(image.as_ptr().cast()) }.map_err(failure)?);
                state.modules.insert(source, module);
                module
            }
        };
        // SAFETY: the module stays loaded until the stream is dropped.
        let found = unsafe { result::module::get_function(module.0, kernel.name().to_owned()) }.map_err(failure)?;
        state.functions.insert(kernel, Function(found));
        Ok(Function(found))
    }

    /// Products by cuBLAS, of bf16 with bf16 or f32 with f32 to f32. The weight and the result lie so many elements after
    /// the start of their memories.
    pub(super) fn gemm(&self, gemm: &Gemm, bf16: bool, w: (&Memory, usize), x: &Memory, y: (&Memory, usize)) {
        let at = |(memory, first): (&Memory, usize), width| memory.address as usize + width * first;
        let (a, b, c) = (at(w, if bf16 { 2 } else { 4 }), at((x, 0), 0), at(y, 4));
        let (one, zero) = (1.0f32, 0.0f32);
        self.run(|state| {
            let Some(handle) = state.blas else { return Ok(()) };
            let f32 = blas::cudaDataType_t::CUDA_R_32F;
            let operands = if bf16 { blas::cudaDataType_t::CUDA_R_16BF } else { f32 };
            let (yes, no) = (blas::cublasOperation_t::CUBLAS_OP_T, blas::cublasOperation_t::CUBLAS_OP_N);
            // SAFETY: the context is current, the handle is used under the lock, factors are read before the call
            // returns, and `gemm.rs` sees to sizes.
            blas_failure(unsafe {
                blas::cublasGemmStridedBatchedEx(
                    handle.0,
                    if gemm.transpose_a { yes } else { no },
                    no,
                    gemm.m,
                    gemm.n,
                    gemm.k,
                    (&raw const one).cast(),
                    without_provenance(a),
                    operands,
                    gemm.lda,
                    gemm.stride_a,
                    without_provenance(b),
                    operands,
                    gemm.ldb,
                    gemm.stride_b,
                    (&raw const zero).cast(),
                    without_provenance_mut(c),
                    f32,
                    gemm.ldc,
                    gemm.stride_c,
                    gemm.batches,
                    blas::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                    blas::cublasGemmAlgo_t::CUBLAS_GEMM_DFALT,
                )
            })
        });
    }
}

fn memory_failure(e: DriverError, size: usize) -> Failure {
    match failure(e) {
        Failure::Memory(text) => Failure::Memory(format!("{size} bytes more: {text}")),
        other => other,
    }
}

/// Give memory nobody uses back to the driver, which waits for work that is on its way.
fn free_idle(state: &mut State) {
    for address in std::mem::take(&mut state.idle).into_values().flatten() {
        // SAFETY: allocated by `scratch`, and nobody has it.
        let _ = unsafe { result::free_sync(address) };
    }
    state.idle_bytes = 0;
}

impl Drop for Stream {
    fn drop(&mut self) {
        let state = std::mem::take(self.state.get_mut().unwrap_or_else(PoisonError::into_inner));
        let (context, device) = (self.context, self.device);
        // Nobody is left to be told of a failure.
        let _ = catch_unwind(AssertUnwindSafe(move || {
            let mut state = state;
            // SAFETY: everything was made by this stream and is used by nobody else: memories hold the stream.
            unsafe {
                let _ = result::ctx::set_current(context);
                if let Some(handle) = state.blas {
                    let _ = blas::cublasDestroy_v2(handle.0);
                }
                free_idle(&mut state);
                if let Some(workspace) = state.workspace {
                    let _ = result::free_sync(workspace);
                }
                for module in state.modules.into_values() {
                    let _ = result::module::unload(module.0);
                }
                let _ = result::primary_ctx::release(device);
            }
        }));
    }
}
