//! SIGINT and SIGTERM: stop at the next event of the library, let guards clean up, end with 128 + signal.
//!
//! The first signal only leaves its number here. The next [`Event`](gqa2mla::observe::Event) then unwinds out of the
//! library, so that staging folders and temporary files go by their own destructors, and [`catch`] turns the unwinding
//! into an exit status. A second signal ends the process at once: the first one restores the default action.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicI32, Ordering};

static SIGNAL: AtomicI32 = AtomicI32::new(0);

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
    }

    extern "C" fn remember(number: i32) {
        SIGNAL.store(number, Ordering::Relaxed);
        // SAFETY: `signal` is on POSIX's list of async-signal-safe functions, and SIG_DFL is a valid action.
        unsafe { signal(number, SIG_DFL) };
    }

    for number in [SIGINT, SIGTERM] {
        // SAFETY: `remember` has the signature of a handler and does only what a handler may: it stores to a lock-free
        // atomic and calls `signal`.
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
