//! Memory limits of Linux's control groups, which containers and job schedulers set: the host may have far more memory.
//!
//! In version 2 they are in the files `memory.max`, `memory.current` and `memory.stat` of the group and of its parents,
//! in version 1 in `memory.limit_in_bytes`, `memory.usage_in_bytes` and `memory.stat`
//! (<https://docs.kernel.org/admin-guide/cgroup-v2.html>, <https://docs.kernel.org/admin-guide/cgroup-v1/memory.html>).
//! Cached pages of files that were not used recently count as used there; the kernel drops them before it refuses
//! memory.

use std::path::{Path, PathBuf};

/// The file names of one version.
struct CgroupFiles {
    limit: &'static str,
    usage: &'static str,
    /// Key of `memory.stat` for cached pages of files that the kernel may drop.
    cached: &'static str,
}

const V2: CgroupFiles = CgroupFiles { limit: "memory.max", usage: "memory.current", cached: "inactive_file" };
const V1: CgroupFiles = CgroupFiles {
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    cached: "total_inactive_file",
};

/// Memory that this process may still use within its groups' limits, bytes; `None` without a limit.
pub(super) fn free() -> Option<usize> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    free_in(Path::new("/sys/fs/cgroup"), &groups)
}

/// As [`free`]; `groups` is the text of `/proc/self/cgroup`, and the groups' folders are under `mount`.
fn free_in(mount: &Path, groups: &str) -> Option<usize> {
    groups.lines().filter_map(|line| free_by_line(mount, line)).min()
}

/// Free memory by one line: `0::/path` of version 2, `4:memory:/path` of version 1.
fn free_by_line(mount: &Path, line: &str) -> Option<usize> {
    let mut parts = line.splitn(3, ':');
    let (number, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
    let (root, names) = match (number, controllers) {
        ("0", "") => (mount.to_owned(), V2),
        (_, controllers) if controllers.split(',').any(|name| name == "memory") => (mount.join("memory"), V1),
        _ => return None,
    };
    // In a container the path may be the host's. Then only the container's own group is mounted, as the root.
    let folders = Path::new(path.trim_start_matches('/')).ancestors().map(|path| root.join(path));
    folders.filter_map(|folder: PathBuf| free_in_group(&folder, &names)).min()
}

fn free_in_group(folder: &Path, names: &CgroupFiles) -> Option<usize> {
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).ok();
    // `max` means no limit. Without a limit version 1 has a number near 2^63, which is above the host's memory.
    let limit: usize = read(names.limit)?.trim().parse().ok()?;
    let used: usize = read(names.usage)?.trim().parse().ok()?;
    let stat = read("memory.stat").unwrap_or_default();
    let cached = stat.lines().find_map(|line| line.strip_prefix(names.cached)?.trim().parse::<usize>().ok());
    Some(limit.saturating_sub(used.saturating_sub(cached.unwrap_or(0))))
}

/// The smaller of two amounts, each of which may be unknown.
pub(super) fn least(a: Option<usize>, b: Option<usize>) -> Option<usize> {
    [a, b].into_iter().flatten().min()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes files under a folder that stands for `/sys/fs/cgroup`.
    fn mount(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn free_in_version_2_is_the_least_of_the_group_and_those_above() {
        let root = mount(&[
            ("memory.current", "9000\n"),
            ("job/memory.max", "5000\n"),
            ("job/memory.current", "4500\n"),
            ("job/memory.stat", "anon 10\ninactive_file 700\nactive_file 900\n"),
            ("job/step/memory.max", "max\n"),
            ("job/step/memory.current", "4000\n"),
            ("job/large/memory.max", "9000\n"),
            ("job/large/memory.current", "1000\n"),
            ("job/small/memory.max", "3000\n"),
            ("job/small/memory.current", "2900\n"),
        ]);
        let free = |groups: &str| free_in(root.path(), groups);
        assert_eq!(free("0::/job/step\n"), Some(5000 - (4500 - 700)));
        assert_eq!((free("0::/job/small\n"), free("0::/job/large\n")), (Some(100), Some(1200)));
        assert_eq!((free("0::/\n"), free("0::/other\n"), free("")), (None, None, None));
    }

    #[test]
    fn free_in_version_1_is_that_of_the_memory_controller() {
        let root = mount(&[
            ("memory/memory.limit_in_bytes", "2000\n"),
            ("memory/memory.usage_in_bytes", "1500\n"),
            ("memory/memory.stat", "inactive_file 1\ntotal_inactive_file 300\n"),
            ("cpu/memory.limit_in_bytes", "1\n"),
        ]);
        // The path is the host's: of its folders only the container's own is there, as the root.
        let groups = "12:cpu,cpuacct:/docker/f00\n4:memory:/docker/f00\n0::/docker/f00\n";
        assert_eq!(free_in(root.path(), groups), Some(800));
        assert_eq!(free_in(root.path(), "12:cpu,cpuacct:/docker/f00\n"), None);
    }

    #[test]
    fn a_group_that_is_over_its_limit_leaves_nothing() {
        let root = mount(&[("memory.max", "100"), ("memory.current", "140")]);
        assert_eq!(free_in(root.path(), "0::/"), Some(0));
        assert_eq!(
            (least(Some(3), None), least(None, None), least(Some(3), Some(2))),
            (Some(3), None, Some(2))
        );
    }
}
