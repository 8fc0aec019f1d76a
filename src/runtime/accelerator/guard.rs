//! Drivers that panic.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};

/// Run what enters a driver; a panic becomes its message, and prints nothing.
pub(in crate::runtime) fn guarded<T>(f: impl FnOnce() -> T) -> Result<T, String> {
    let hook = take_hook();
    set_hook(Box::new(|_| {}));
    let result = catch_unwind(AssertUnwindSafe(f));
    set_hook(hook);
    result.map_err(|panic| panic_text(panic.as_ref()))
}

/// What a panic said.
pub(in crate::runtime) fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
    format!("the driver panicked: {}", text.unwrap_or("it does not say why"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_that_panics_is_an_error() {
        assert_eq!(guarded(|| 7), Ok(7));
        let text = guarded(|| panic!("no {}", "library")).unwrap_err();
        assert_eq!(text, "the driver panicked: no library");
        assert!(guarded(|| std::panic::panic_any(3)).unwrap_err().contains("does not say why"));
    }
}
