//! What matrix products set aside.

use std::path::Path;

/// Address space in bytes that matrix products set aside for operands, untouched: as much as the last-level caches hold, for
/// each of two operands and each of `threads` threads. Virtual machines show a processor's whole cache. Zero where the system
/// does not tell.
pub fn reserved(threads: u64) -> u64 {
    let cache = Path::new("/sys/devices/system/cpu/cpu0/cache/index3");
    let read = |file: &str| fs_err::read_to_string(cache.join(file)).unwrap_or_default();
    let size: u64 = read("size").trim().trim_end_matches('K').parse().unwrap_or(0) << 10;
    let sharing: u32 = read("shared_cpu_map").chars().filter_map(|c| c.to_digit(16)).map(u32::count_ones).sum();
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get) as u64;
    2 * threads * size * processors.div_ceil(u64::from(sharing.max(1)))
}
