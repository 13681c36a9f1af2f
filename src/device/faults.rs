//! A device that runs out of memory when a test asks for it.

use super::Work;
use crate::{Error, Result};
use std::cell::RefCell;

type Fails = Box<dyn FnMut(Work, usize) -> bool>;

thread_local! {
    static FAILS: RefCell<Option<Fails>> = const { RefCell::new(None) };
}

/// Runs `f`; on this thread, work of a number of rows for which `fails` returns true runs out of memory as on CUDA.
pub(crate) fn with<R>(fails: impl FnMut(Work, usize) -> bool + 'static, f: impl FnOnce() -> R) -> R {
    struct Off;
    impl Drop for Off {
        fn drop(&mut self) {
            FAILS.set(None);
        }
    }
    FAILS.set(Some(Box::new(fails)));
    let _off = Off;
    f()
}

pub(super) fn before(what: Work, rows: usize) -> Result<()> {
    let fails = FAILS.with_borrow_mut(|fails| fails.as_mut().is_some_and(|fails| fails(what, rows)));
    if !fails {
        return Ok(());
    }
    let error = candle_core::Error::Msg(format!("CUDA_ERROR_OUT_OF_MEMORY, {what:?} of {rows} rows"));
    Err(Error::Candle(error))
}
