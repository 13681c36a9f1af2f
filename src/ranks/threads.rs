//! Ranks that are threads of one process.

use super::Ranks;
use crate::{Error, Result};
use std::sync::mpsc::{Receiver, Sender, channel};

/// A rank that is a thread. A rank that ends early ends those that wait for it with
/// an error.
pub struct Threads {
    rank: usize,
    size: usize,
    /// On rank 0 one for each other rank in rank order, on the others that to rank 0 alone.
    links: Vec<Link>,
}

/// A channel in each direction between two ranks.
struct Link {
    rank: usize,
    to: Sender<Vec<u8>>,
    from: Receiver<Vec<u8>>,
}

impl Threads {
    /// What `work` returns on each of `size` ranks, one at least, in rank order. A rank that panics panics here.
    pub fn run<T: Send>(size: usize, work: impl Fn(&dyn Ranks) -> T + Sync) -> Vec<T> {
        let work = &work;
        std::thread::scope(|scope| {
            let started = Self::new(size).into_iter().map(|ranks| scope.spawn(move || work(&ranks)));
            let started: Vec<_> = started.collect();
            let joined = started.into_iter().map(|thread| thread.join());
            joined.map(|value| value.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
        })
    }

    /// `size` ranks, one at least, in rank order.
    fn new(size: usize) -> Vec<Self> {
        let size = size.max(1);
        let mut first = Self { rank: 0, size, links: Vec::new() };
        let mut others = Vec::new();
        for rank in 1..size {
            let ((to, of_rank), (of_first, from)) = (channel(), channel());
            first.links.push(Link { rank, to, from });
            others.push(Self { rank, size, links: vec![Link { rank: 0, to: of_first, from: of_rank }] });
        }
        others.insert(0, first);
        others
    }
}

impl Link {
    fn send(&self, message: Vec<u8>) -> Result<()> {
        self.to.send(message).map_err(|_| self.ended())
    }

    fn receive(&self) -> Result<Vec<u8>> {
        self.from.recv().map_err(|_| self.ended())
    }

    fn ended(&self) -> Error {
        Error::Ranks { problem: format!("rank {} has ended", self.rank), is_bad_input: false }
    }
}

impl Ranks for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn gather(&self, message: Vec<u8>) -> Result<Vec<Vec<u8>>> {
        if self.rank > 0 {
            self.links.iter().try_for_each(|link| link.send(message.clone()))?;
            return Ok(Vec::new());
        }
        let others = self.links.iter().map(Link::receive);
        std::iter::once(Ok(message)).chain(others).collect()
    }

    fn broadcast(&self, message: Vec<u8>) -> Result<Vec<u8>> {
        if let (1.., [first]) = (self.rank, &self.links[..]) {
            return first.receive();
        }
        self.links.iter().try_for_each(|link| link.send(message.clone()))?;
        Ok(message)
    }

    /// The thread that calls it ends by itself.
    fn abort(&self, _code: i32) {}
}
