//! Commands that several processes run together, started by mpirun or srun.

use super::process;
use gneiss::config::ModelOptions;
use gneiss::device::{self, DeviceChoice};
use gneiss::ranks::launcher::{self, Launched};
use gneiss::ranks::{Alone, Ranks};
use gneiss::session::{self, Session};
use gneiss::{Error, Result};
use std::fmt;

/// The error of a rank has been printed, or rank 0 prints it for all: the process ends with this code.
#[derive(Debug)]
pub struct Reported(pub u8);

impl fmt::Display for Reported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "exit code {}", self.0)
    }
}

impl std::error::Error for Reported {}

/// Refuses a command that is for one process, if a launcher started several.
pub fn refuse(command: &str) -> Result<()> {
    match Launched::from_env() {
        None => Ok(()),
        Some(launched) => Err(launched.refused(
            &format!("gneiss {command}"),
            "start it without mpirun or srun, or with one process; gneiss tune, sweep and eval use several, and gneiss sweep --shard needs no MPI",
        )),
    }
}

/// Runs `work` as one of the ranks that a launcher started, or alone. An error that only this rank has ends all of them.
pub fn with_ranks(work: impl FnOnce(&dyn Ranks) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let Some(launched) = Launched::from_env() else { return work(&Alone) };
    let ranks = start(&launched)?;
    use_cores(&launched, &*ranks)?;
    let Err(error) = work(&*ranks) else { return Ok(()) };
    let is_shared = is_of_all_ranks(&error);
    let code = match (ranks.rank(), is_shared) {
        // Before MPI ends: a launcher kills the others as soon as one has ended with an error.
        (0, _) => super::exit::report(&error, ""),
        (_, true) => super::exit::code(&error),
        (rank, false) => super::exit::report(&error, &format!("[rank {rank}] ")),
    };
    if !is_shared {
        ranks.abort(code.into());
    }
    Err(Reported(code).into())
}

/// Whether every rank has this error, at the same place of its work.
fn is_of_all_ranks(error: &anyhow::Error) -> bool {
    error.is::<super::interrupt::Interrupted>()
        || matches!(
            error.downcast_ref(),
            Some(Error::Ranks { .. } | Error::NotFinite { .. } | Error::OutOfMemory { .. })
        )
}

/// The own value of each rank, if all have one; otherwise an error on all.
pub fn all<T>(ranks: &dyn Ranks, own: anyhow::Result<T>) -> anyhow::Result<T> {
    if ranks.size() == 1 {
        return own;
    }
    let own = own.map_err(|error| match error.downcast::<Error>() {
        Ok(error) => error,
        Err(error) => Error::Invalid(format!("{error:#}")),
    });
    Ok(ranks.all(own)?)
}

#[cfg(feature = "mpi")]
fn start(launched: &Launched) -> Result<Box<dyn Ranks>> {
    let ranks = gneiss::ranks::Mpi::start()?;
    launched.check_size(ranks.size())?;
    Ok(Box::new(ranks))
}

#[cfg(not(feature = "mpi"))]
fn start(launched: &Launched) -> Result<Box<dyn Ranks>> {
    Err(launched.refused("this build of gneiss", "build it with MPI (make mpi), or start one process"))
}

/// Shares the cores of this machine among its ranks, unless `RAYON_NUM_THREADS` says how many threads there are. Warns if the
/// launcher has bound this rank to a single core.
fn use_cores(launched: &Launched, ranks: &dyn Ranks) -> anyhow::Result<()> {
    let allowed = std::thread::available_parallelism()?.get();
    let (online, local_size) = (process::online_cores().unwrap_or(allowed), launched.local_size.unwrap_or(1));
    if let Some(text) = launcher::binding_warning(allowed, online, local_size) {
        super::warn(format_args!("[rank {}] {text}", ranks.rank()));
    }
    if std::env::var_os("RAYON_NUM_THREADS").is_none() {
        let threads = launcher::threads(allowed, online, local_size);
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    }
    Ok(())
}

/// Opens the model on every rank; rank 0 shows the progress.
pub fn open(options: &ModelOptions, ranks: &dyn Ranks) -> anyhow::Result<Session> {
    let mut options = options.clone();
    ranks.all(place(&mut options, ranks))?;
    let opened = match ranks.rank() {
        0 => super::progress::open(&options),
        _ => session::open(&options, &mut |_, _| ()).map_err(Into::into),
    };
    all(ranks, opened)
}

/// Chooses the GPU of this rank: that of its number on its machine. Ranks that share a device share its memory.
///
/// # Errors
/// Returns [`Error::Invalid`] if the configuration names one GPU for all ranks of this machine.
fn place(options: &mut ModelOptions, ranks: &dyn Ranks) -> Result<()> {
    let Some(launched) = Launched::from_env().filter(|_| ranks.size() > 1) else { return Ok(()) };
    let local_size = launched.local_size.unwrap_or(1);
    let visible = device::cuda_devices();
    match options.device {
        DeviceChoice::Cuda(index @ 1..) if local_size > 1 => {
            return Err(Error::Invalid(format!(
                "model.device: expected \"cuda\", with which each rank takes the GPU of its number on its machine, found \
                 \"cuda:{index}\" for {local_size} ranks; hint: CUDA_VISIBLE_DEVICES chooses GPUs"
            )));
        }
        DeviceChoice::Auto if visible == 0 => device::share(local_size),
        DeviceChoice::Auto | DeviceChoice::Cuda(0) => {
            let (index, is_shared) = launcher::gpu(launched.local_rank, local_size, visible);
            if is_shared {
                super::warn(format_args!("[rank {}] {local_size} ranks share {visible} GPUs", ranks.rank()));
            }
            options.device = DeviceChoice::Cuda(index);
            device::share(local_size.div_ceil(visible.max(1)));
        }
        DeviceChoice::Cpu | DeviceChoice::Metal => device::share(local_size),
        DeviceChoice::Cuda(_) => {}
    }
    Ok(())
}
