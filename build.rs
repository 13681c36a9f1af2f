//! With the feature `cuda`: compiles each file of kernels/ for each dtype, and writes the table that
//! `src/ops/backend/gpu/cuda.rs` finds the machine code in.
//!
//! The code is for compute capability 8.0, 8.9 and 9.0, for 10.0 and 12.0 (Blackwell) if nvcc knows them, and PTX of 8.0
//! that the driver compiles for all newer ones.

use std::env;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

const ELEMENTS: [&str; 3] = ["F32", "BF16", "F16"];

/// Compute capabilities without the dot: the one that PTX is compiled for, and those whose machine code is assembled from
/// that PTX. 10.0 and 12.0 need CUDA 12.8 or newer. PTX of 8.9 and 12.0 would give the same machine code, and compiling to
/// PTX takes most of the time (LOG.md, 2026-11-30).
const ARCHITECTURES: [(&str, &[&str]); 3] =
    [("80", &["80", "89"]), ("90", &["90"]), ("100", &["100", "120"])];

fn main() {
    println!("cargo:rerun-if-changed=kernels");
    println!("cargo:rerun-if-changed=build.rs");
    for variable in ["NVCC", "CUDA_HOME", "CUDA_PATH", "CUDA_COMPUTE_CAP"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let files = kernels();
    let work: Vec<(&str, &str)> =
        files.iter().flat_map(|file| ELEMENTS.map(|element| (file.as_str(), element))).collect();
    // Candle compiles its own kernels for this one target; `src/ops/backend/gpu/cuda.rs` names it if they do not load.
    let candles =
        env::var("CUDA_COMPUTE_CAP").unwrap_or_else(|_| "the GPU of the machine that built it".into());
    println!("cargo:rustc-env=GNEISS_CANDLE_CUDA_TARGET={candles}");
    let nvcc = nvcc();
    let (targets, next) = (targets(&nvcc), Mutex::new(work.iter()));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let Some((file, element)) = next.lock().expect("no compilation panics").next() else {
                        break;
                    };
                    compile(&nvcc, &targets, file, element, &out);
                }
            });
        }
    });
    let mut table = String::from("fn fatbin(file: &str, element: DType) -> Option<&'static [u8]> {\n");
    table.push_str("    Some(match (file, element) {\n");
    for (file, element) in &work {
        let path = fatbin(&out, file, element);
        writeln!(table, "        ({file:?}, DType::{element}) => include_bytes!({path:?}),")
            .expect("a string grows");
    }
    table.push_str("        _ => return None,\n    })\n}\n");
    std::fs::write(out.join("fatbins.rs"), table).expect("OUT_DIR can be written");
}

/// Names of the kernel files, without their ending.
fn kernels() -> Vec<String> {
    let entries = std::fs::read_dir("kernels").expect("kernels/ stands beside build.rs");
    let mut names: Vec<String> = entries
        .map(|entry| entry.expect("an entry of kernels/").path())
        .filter(|path| path.extension().is_some_and(|e| e == "cu"))
        .filter_map(|path| Some(path.file_stem()?.to_str()?.to_owned()))
        .collect();
    names.sort();
    names
}

fn nvcc() -> PathBuf {
    if let Some(nvcc) = env::var_os("NVCC") {
        return nvcc.into();
    }
    let of_home = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os);
    let found = of_home.map(|home| Path::new(&home).join("bin/nvcc")).find(|nvcc| nvcc.exists());
    found.unwrap_or_else(|| "nvcc".into())
}

/// Values of `-gencode` for those of [`ARCHITECTURES`] that this nvcc knows, and PTX of 8.0.
fn targets(nvcc: &Path) -> Vec<String> {
    let ran =
        Command::new(nvcc).arg("--list-gpu-arch").output().unwrap_or_else(|error| missing(nvcc, &error));
    let known = String::from_utf8_lossy(&ran.stdout);
    let known: Vec<&str> = known.lines().filter_map(|line| line.trim().strip_prefix("compute_")).collect();
    assert!(
        known.contains(&"80"),
        "{} --list-gpu-arch: expected compute_80 in the list, found {known:?}; use CUDA 11.4 or newer",
        nvcc.display()
    );
    let mut targets = Vec::new();
    for (ptx, machines) in ARCHITECTURES {
        let machines = machines.iter().filter(|machine| known.contains(machine));
        let mut code: Vec<String> = machines.map(|machine| format!("sm_{machine}")).collect();
        code.extend((ptx == "80").then(|| "compute_80".into()));
        if known.contains(&ptx) {
            targets.push(format!("arch=compute_{ptx},code=[{}]", code.join(",")));
        }
    }
    targets
}

fn missing(nvcc: &Path, error: &std::io::Error) -> ! {
    panic!(
        "{}: {error}; the feature cuda needs nvcc: set NVCC or CUDA_HOME, or put it on PATH",
        nvcc.display()
    )
}

fn fatbin(out: &Path, file: &str, element: &str) -> PathBuf {
    out.join(format!("{file}_{element}.fatbin"))
}

fn compile(nvcc: &Path, targets: &[String], file: &str, element: &str, out: &Path) {
    let mut command = Command::new(nvcc);
    command.args(["-fatbin", "-std=c++17", "-O3", "-Xfatbin", "-compress-all"]);
    for target in targets {
        command.args(["-gencode", target]);
    }
    command.args(["-include", "kernels/cuda.h"]);
    command.arg(format!("-DELEMENT_{element}")).arg("-o").arg(fatbin(out, file, element));
    command.arg(format!("kernels/{file}.cu"));
    let ran = command.output().unwrap_or_else(|error| missing(nvcc, &error));
    let said = String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.success(), "{} of kernels/{file}.cu for {element}: {said}", nvcc.display());
}
