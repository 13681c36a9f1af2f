//! Who uses the device: the server's steps and those of a tuning run take turns.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// A lock of the device that is given in the order in which it was asked for.
///
/// A tuning run holds it for one optimizer step at a time. The server holds it for as long as it has requests, but, while
/// a run waits, for a limited time. So a request waits for one optimizer step at most before its first step, and a run
/// goes on under any load.
pub struct DeviceTurns {
    tickets: Mutex<Tickets>,
    changed: Condvar,
}

struct Tickets {
    /// The ticket of the next one who asks.
    next: u64,
    /// The ticket of the one whose turn it is.
    current: u64,
}

impl DeviceTurns {
    /// A device that no one uses.
    pub fn new() -> Arc<Self> {
        Arc::new(Self { tickets: Mutex::new(Tickets { next: 0, current: 0 }), changed: Condvar::new() })
    }

    /// Waits until everyone who asked before has finished, and returns the turn.
    pub fn take(self: &Arc<Self>) -> DeviceTurn {
        let mut tickets = self.lock();
        let ticket = tickets.next;
        tickets.next += 1;
        while tickets.current != ticket {
            tickets = self.changed.wait(tickets).unwrap_or_else(PoisonError::into_inner);
        }
        drop(tickets);
        DeviceTurn { turns: self.clone(), since: Instant::now() }
    }

    /// Whether someone waits for the end of the current turn.
    pub fn is_wanted(&self) -> bool {
        let tickets = self.lock();
        tickets.next - tickets.current > 1
    }

    fn lock(&self) -> MutexGuard<'_, Tickets> {
        self.tickets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The device is the holder's until this value is dropped.
pub struct DeviceTurn {
    turns: Arc<DeviceTurns>,
    /// Start of the turn.
    pub since: Instant,
}

impl Drop for DeviceTurn {
    fn drop(&mut self) {
        self.turns.lock().current += 1;
        self.turns.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn turns_are_given_in_the_order_of_asking() {
        let turns = DeviceTurns::new();
        let (sender, order) = mpsc::channel();
        let first = turns.take();
        assert!(!turns.is_wanted());
        let threads: Vec<_> = (0..4)
            .map(|i| {
                let (turns, sender) = (turns.clone(), sender.clone());
                let waiting = turns.lock().next;
                let thread = {
                    let turns = turns.clone();
                    std::thread::spawn(move || {
                        let _turn = turns.take();
                        sender.send(i).unwrap();
                    })
                };
                while turns.lock().next == waiting {
                    std::thread::yield_now();
                }
                thread
            })
            .collect();
        assert!(turns.is_wanted());
        assert!(order.try_recv().is_err(), "the first turn has not ended");
        drop(first);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(order.try_iter().collect::<Vec<_>>(), [0, 1, 2, 3]);
        assert!(!turns.is_wanted());
    }
}
