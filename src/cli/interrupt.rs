//! SIGINT and SIGTERM: stop at the next event of the library, let guards clean up, end with 128 + signal.
//!
//! The first signal leaves its number here and says so on stderr. The next [`Event`](gqa2mla::observe::Event) then unwinds out of the
//! library, so that staging folders and temporary files go by their own destructors, and [`catch`] turns the unwinding
//! into an exit status. A second signal ends the process at once, unless it comes with the first: some programs that end
//! others send a signal to the process and to its group.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::time::Instant;

static SIGNAL: AtomicI32 = AtomicI32::new(0);
/// When the first signal came, in milliseconds after [`START`].
static WHEN: AtomicU64 = AtomicU64::new(0);
static START: OnceLock<Instant> = OnceLock::new();
/// Signals this close together count as one, in milliseconds.
const ONE: u64 = 300;

/// What unwinds: the signal's number.
struct Interrupted(u8);

/// Unwind out of the library if a signal asked for it. Runs no panic hook: nothing is printed.
pub fn unwind_if_asked() {
    if let Ok(signal @ 1..) = u8::try_from(SIGNAL.load(Ordering::Relaxed)) {
        resume_unwind(Box::new(Interrupted(signal)));
    }
}

/// Run `f`; `Err` carries the signal that stopped it. Any other panic goes on.
pub fn catch<T>(f: impl FnOnce() -> T) -> Result<T, u8> {
    listen();
    // Nothing of what `f` touched is used after an interruption but to be dropped.
    catch_unwind(AssertUnwindSafe(f)).map_err(|payload: Box<dyn Any + Send>| match payload.downcast::<Interrupted>() {
        Ok(i) => i.0,
        Err(other) => resume_unwind(other),
    })
}

#[cfg(unix)]
fn listen() {
    const SIGINT: i32 = 2;
    const SIGTERM: i32 = 15;
    const SIG_DFL: usize = 0;

    unsafe extern "C" {
        /// POSIX `signal(3)` of the C library that std links. `handler`: a function pointer, or 0 for the default.
        fn signal(number: i32, handler: usize) -> usize;
        /// POSIX `raise(3)`.
        fn raise(number: i32) -> i32;
    }

    extern "C" fn remember(number: i32) {
        // Reads a clock that was started before: no lock, no allocation.
        let now = START.get().map_or(0, |s| s.elapsed().as_millis() as u64);
        if SIGNAL.load(Ordering::Relaxed) != 0 {
            if now > WHEN.load(Ordering::Relaxed) + ONE {
                // SAFETY: `signal` and `raise` are on POSIX's list of async-signal-safe functions, and SIG_DFL is a valid
                // action. The signal is blocked until this handler returns, and then ends the process.
                unsafe {
                    signal(number, SIG_DFL);
                    raise(number);
                }
            }
            return;
        }
        WHEN.store(now, Ordering::Relaxed);
        SIGNAL.store(number, Ordering::Relaxed);
        if number == SIGINT {
            let text = b"\ngqa2mla: stopping after the tensor at work (again: at once)\n";
            // SAFETY: the descriptor is only borrowed for this call, and a closed one makes it fail. `write(2)`, to which
            // rustix adds nothing, is async-signal-safe.
            let _ = rustix::io::write(unsafe { std::os::fd::BorrowedFd::borrow_raw(2) }, text);
        }
    }

    START.get_or_init(Instant::now);
    for number in [SIGINT, SIGTERM] {
        // SAFETY: `remember` has the signature of a handler and does only what a handler may: it loads and stores
        // lock-free atomics and calls async-signal-safe functions. glibc, musl and the BSDs keep a handler installed
        // after it ran.
        unsafe { signal(number, remember as extern "C" fn(i32) as usize) };
    }
}

#[cfg(not(unix))]
fn listen() {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_interruptions_are_caught() {
        assert_eq!(catch(|| 7), Ok(7));
        assert_eq!(catch(|| resume_unwind(Box::new(Interrupted(15)))), Err::<(), _>(15));
        let other = catch_unwind(|| catch(|| resume_unwind(Box::new("a bug"))));
        assert!(other.is_err());
    }
}
