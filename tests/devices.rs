//! GPUs against the CPU. A binary of its own: a driver brings threads, memory and faults of its own into the process, and
//! `scripts/check_cuda.sh` runs it on libraries that stand in for a card's.

#[cfg(any(feature = "cuda", feature = "gpu"))]
mod common {
    pub mod logits;
    pub mod models;
}

mod device {
    #[cfg(feature = "cuda")]
    mod cuda;
    #[cfg(feature = "gpu")]
    mod gpu;
    #[cfg(any(feature = "cuda", feature = "gpu"))]
    mod properties;
}
