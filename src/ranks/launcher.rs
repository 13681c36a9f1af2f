//! How a process finds out that a launcher started it as one of several: by variables that Open MPI's and MPICH's mpirun and
//! Slurm's srun set.

use crate::{Error, Result};

/// What a launcher says of this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launched {
    /// The variable with the number of processes.
    pub variable: &'static str,
    /// Processes that were started.
    pub size: usize,
    /// The number of this one among those of its machine, from 0.
    pub local_rank: usize,
    /// Processes on this machine, if the launcher says so.
    pub local_size: Option<usize>,
}

/// Variables of one launcher.
struct Variables {
    size: &'static str,
    local_rank: &'static str,
    local_size: &'static str,
}

/// In this order: mpirun within a job of Slurm sets its own.
const LAUNCHERS: [Variables; 3] = [
    // Open MPI.
    Variables {
        size: "OMPI_COMM_WORLD_SIZE",
        local_rank: "OMPI_COMM_WORLD_LOCAL_RANK",
        local_size: "OMPI_COMM_WORLD_LOCAL_SIZE",
    },
    // MPICH and Intel MPI; srun with PMI-2.
    Variables { size: "PMI_SIZE", local_rank: "MPI_LOCALRANKID", local_size: "MPI_LOCALNRANKS" },
    // srun. SLURM_NTASKS is no sign: it is set in a batch script too, which is one process.
    Variables {
        size: "SLURM_STEP_NUM_TASKS",
        local_rank: "SLURM_LOCALID",
        local_size: "SLURM_STEP_TASKS_PER_NODE",
    },
];

impl Launched {
    /// What the environment says; `None` if it names no launcher, or one that started this process alone.
    pub fn from_env() -> Option<Self> {
        Self::from_variables(|name| std::env::var(name).ok())
    }

    /// As [`Launched::from_env`], from the variables that `get` returns.
    pub fn from_variables(get: impl Fn(&str) -> Option<String>) -> Option<Self> {
        let number = |name: &str| get(name)?.trim().parse::<usize>().ok();
        LAUNCHERS.iter().find_map(|Variables { size: variable, local_rank, local_size }| {
            let size = number(variable).filter(|size| *size > 1)?;
            let local_rank = number(local_rank).or_else(|| number("SLURM_LOCALID")).unwrap_or(0);
            // Slurm's is a list, such as 4(x2),3; its machines differ by one at most.
            let first = |list: String| list.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok();
            let local_size = get(local_size).and_then(first);
            Some(Self { variable, size, local_rank, local_size })
        })
    }

    /// The error of a command, or of a build, that is one process.
    pub fn refused(&self, what: &str, hint: &str) -> Error {
        let Self { variable, size, .. } = self;
        Error::Invalid(format!(
            "{what}: expected one process, found {size} ({variable}={size}), each of which would do the same work; hint: {hint}"
        ))
    }

    /// Checks that MPI has as many ranks as the launcher started.
    ///
    /// # Errors
    /// Returns [`Error::Invalid`] if it has another number: the launcher is of another MPI than this build.
    pub fn check_size(&self, ranks: usize) -> Result<()> {
        let Self { variable, size, .. } = self;
        if ranks == *size {
            return Ok(());
        }
        Err(Error::Invalid(format!(
            "MPI: expected {size} ranks, as {variable} says, found {ranks}: the launcher belongs to another MPI library than \
             this build; hint: start it with the mpirun of that library, or under Slurm with srun --mpi=pmix"
        )))
    }
}

/// Threads for a process that may run on `allowed` of the `online` cores of a machine with `local_size` such processes.
pub fn threads(allowed: usize, online: usize, local_size: usize) -> usize {
    allowed.min((online / local_size.max(1)).max(1))
}

/// The warning about a process that a launcher has bound to fewer cores than its share of the machine.
pub fn binding_warning(allowed: usize, online: usize, local_size: usize) -> Option<String> {
    let share = online / local_size.max(1);
    (allowed == 1 && share > 1).then(|| {
        format!(
            "bound to 1 of {online} cores, though {local_size} ranks share them: mpirun binds each rank to a core unless it is told \
             otherwise; hint: mpirun --bind-to none, or srun --cpus-per-task={share}"
        )
    })
}

/// The GPU for the process `local_rank` of a machine, of the `visible` ones; and whether several processes share it. A launcher
/// that shows each process its own GPU shows one.
pub fn gpu(local_rank: usize, local_size: usize, visible: usize) -> (usize, bool) {
    match visible {
        0 | 1 => (0, false),
        _ => (local_rank % visible, local_size > visible),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launched(variables: &[(&str, &str)]) -> Option<Launched> {
        let get =
            |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        Launched::from_variables(get)
    }

    #[test]
    fn launched_is_read_from_each_launcher() {
        assert_eq!(launched(&[]), None);
        let of_open_mpi = [
            ("OMPI_COMM_WORLD_SIZE", "4"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
            ("SLURM_STEP_NUM_TASKS", "9"),
        ];
        let expected =
            Launched { variable: "OMPI_COMM_WORLD_SIZE", size: 4, local_rank: 1, local_size: Some(2) };
        assert_eq!(launched(&of_open_mpi), Some(expected));
        let found =
            launched(&[("PMI_SIZE", "2"), ("MPI_LOCALRANKID", "1"), ("MPI_LOCALNRANKS", "2")]).unwrap();
        assert_eq!((found.size, found.local_rank, found.local_size), (2, 1, Some(2)));
        let slurm =
            [("SLURM_STEP_NUM_TASKS", "8"), ("SLURM_LOCALID", "3"), ("SLURM_STEP_TASKS_PER_NODE", "4(x2)")];
        let found = launched(&slurm).unwrap();
        assert_eq!((found.size, found.local_rank, found.local_size), (8, 3, Some(4)));
    }

    /// A batch script of Slurm, a task of an array, and mpirun -n 1 are one process.
    #[test]
    fn launched_is_none_for_one_process() {
        assert_eq!(launched(&[("SLURM_NTASKS", "4"), ("SLURM_PROCID", "0"), ("SLURM_LOCALID", "0")]), None);
        assert_eq!(launched(&[("SLURM_NTASKS", "1"), ("SLURM_STEP_NUM_TASKS", "1")]), None);
        assert_eq!(launched(&[("OMPI_COMM_WORLD_SIZE", "1"), ("OMPI_COMM_WORLD_LOCAL_RANK", "0")]), None);
        assert_eq!(launched(&[("PMI_SIZE", "none")]), None);
    }

    #[test]
    fn refused_names_the_variable_and_the_hint() {
        let launched = launched(&[("PMI_SIZE", "3")]).unwrap();
        let text = launched.refused("gneiss eval", "start it without mpirun").to_string();
        assert!(text.contains("PMI_SIZE=3") && text.ends_with("hint: start it without mpirun"), "{text}");
        assert!(launched.check_size(3).is_ok());
        let text = launched.check_size(1).unwrap_err().to_string();
        assert!(text.contains("expected 3 ranks") && text.contains("found 1"), "{text}");
    }

    #[test]
    fn threads_share_a_machine() {
        assert_eq!(threads(2, 2, 2), 1, "unbound");
        assert_eq!(threads(16, 64, 4), 16, "bound to a part");
        assert_eq!(threads(64, 64, 4), 16);
        assert_eq!(threads(1, 64, 4), 1);
        assert_eq!(threads(2, 2, 5), 1, "more ranks than cores");
        assert_eq!(threads(4, 64, 1), 4, "a container");
    }

    #[test]
    fn binding_warning_is_for_one_core_of_several() {
        let text = binding_warning(1, 64, 4).unwrap();
        assert!(text.contains("1 of 64") && text.contains("--bind-to none"), "{text}");
        assert_eq!(binding_warning(1, 2, 2), None, "one core is its share");
        assert_eq!(binding_warning(16, 64, 4), None);
        assert_eq!(binding_warning(64, 64, 4), None);
    }

    #[test]
    fn gpu_is_that_of_the_local_rank() {
        assert_eq!(
            (0..4).map(|rank| gpu(rank, 4, 4)).collect::<Vec<_>>(),
            [(0, false), (1, false), (2, false), (3, false)]
        );
        assert_eq!(gpu(3, 4, 8), (3, false));
        assert_eq!((gpu(2, 4, 2), gpu(3, 4, 2)), ((0, true), (1, true)));
        // Slurm's --gpus-per-task shows each rank its own as number 0.
        assert_eq!(gpu(3, 4, 1), (0, false));
        assert_eq!(gpu(1, 2, 0), (0, false));
    }
}
