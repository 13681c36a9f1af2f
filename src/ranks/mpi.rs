//! Ranks that are processes of MPI, through its C library.

use super::Ranks;
use crate::{Error, Result};
use ::mpi::Threading;
use ::mpi::environment::Universe;
use ::mpi::topology::SimpleCommunicator;
use ::mpi::traits::{Communicator, Destination, Root, Source};

/// Bytes of a message at most: MPI counts them with an i32.
const MOST: usize = i32::MAX as usize;

/// This process as one of `MPI_COMM_WORLD`. Only the thread that made it calls MPI. An error inside MPI ends all processes.
pub struct Mpi {
    world: SimpleCommunicator,
    /// Ends MPI when it is dropped.
    _universe: Universe,
}

impl Mpi {
    /// Starts MPI; once in a process.
    ///
    /// # Errors
    /// Returns [`Error::Invalid`] if it was started before.
    pub fn start() -> Result<Self> {
        // Other threads compute meanwhile, and never call MPI.
        let Some((universe, provided)) = ::mpi::initialize_with_threading(Threading::Funneled) else {
            return Err(Error::Invalid("MPI: expected to start it, found it started".into()));
        };
        if provided < Threading::Funneled {
            return Err(Error::Invalid(format!(
                "MPI: expected a library that allows threads (funneled), found {provided:?}"
            )));
        }
        Ok(Self { world: universe.world(), _universe: universe })
    }
}

fn check(message: &[u8]) -> Result<()> {
    if message.len() > MOST {
        return Err(Error::Invalid(format!(
            "MPI: expected a message of at most {MOST} bytes, found {}",
            message.len()
        )));
    }
    Ok(())
}

impl Ranks for Mpi {
    fn rank(&self) -> usize {
        self.world.rank() as usize
    }

    fn size(&self) -> usize {
        self.world.size() as usize
    }

    fn gather(&self, message: Vec<u8>) -> Result<Vec<Vec<u8>>> {
        check(&message)?;
        if self.rank() > 0 {
            self.world.process_at_rank(0).send(&message[..]);
            return Ok(Vec::new());
        }
        let others =
            (1..self.world.size()).map(|rank| self.world.process_at_rank(rank).receive_vec::<u8>().0);
        Ok(std::iter::once(message).chain(others).collect())
    }

    fn broadcast(&self, mut message: Vec<u8>) -> Result<Vec<u8>> {
        check(&message)?;
        let first = self.world.process_at_rank(0);
        let mut bytes = message.len() as u64;
        first.broadcast_into(&mut bytes);
        message.resize(bytes as usize, 0);
        first.broadcast_into(&mut message[..]);
        Ok(message)
    }

    fn abort(&self, code: i32) {
        self.world.abort(code);
    }
}

impl Drop for Mpi {
    fn drop(&mut self) {
        // The others would wait for a process that panicked, and it for them.
        if std::thread::panicking() {
            self.abort(101);
        }
    }
}
