//! Turns panics of libraries on malformed files into errors, without printing them.

use std::any::Any;
use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;

thread_local! {
    /// Whether this thread is inside [`catch_panic`].
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// The result of `work`, or the message of its panic. After a panic, values that `work` changed
/// must not be used.
pub(crate) fn catch_panic<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !QUIET.try_with(Cell::get).unwrap_or(false) {
                usual(info);
            }
        }));
    });
    let before = QUIET.replace(true);
    let done = panic::catch_unwind(AssertUnwindSafe(work));
    QUIET.set(before);
    done.map_err(|said| words(&*said))
}

fn words(said: &(dyn Any + Send)) -> String {
    let text = said.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| said.downcast_ref::<String>().cloned()).unwrap_or_else(|| "it does not say why".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panic_message_is_returned_and_values_pass() {
        assert_eq!(catch_panic(|| 3), Ok(3));
        let index = |at: usize| catch_panic(move || [1, 2].get(at..).expect("in it").len());
        assert_eq!((index(1), index(5)), (Ok(1), Err("in it".to_owned())));
        assert_eq!(catch_panic(|| panic!("{} is odd", 3)), Err::<(), _>("3 is odd".to_owned()));
        assert!(!QUIET.get());
    }
}
