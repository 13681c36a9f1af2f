//! The kernels' source with other compilers: nvcc if it is installed (registers, spills), and clang in place of Metal's
//! compiler, with Metal's address spaces.

use rayon::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const ELEMENTS: [&str; 3] = ["F32", "BF16", "F16"];
/// build.rs's, for `-gencode`.
const TARGETS: [&str; 3] = [
    "arch=compute_80,code=[sm_80,sm_89,compute_80]",
    "arch=compute_90,code=[sm_90]",
    "arch=compute_100,code=[sm_100,sm_120]",
];
/// Those of the targets, each with the bytes that a kernel may store and load again for want of registers: what ptxas of
/// CUDA 13.0 makes of `attention_mma` on Blackwell (the forward kernels of heads of 128), and of `rms_norm` on sm_100.
const ARCHITECTURES: [(&str, usize); 5] =
    [("sm_80", 0), ("sm_89", 0), ("sm_90", 0), ("sm_100", 32), ("sm_120", 64)];

/// Most `LDSM` (512 bytes of shared memory) for each `HMMA` in the kernels on tensor cores. A multiprocessor of an H100
/// reads 128 bytes a cycle, and starts an `HMMA` of `mma.sync` about every 1.6 cycles: above 0.4 reading takes longer.
/// The counts are of a kernel's text, which has the products twice: once for keys to which all queries attend, and once
/// group by group, with operands that registers do not hold read again. The first alone has 0.25 and 0.31 (forward, pairs
/// of heads of 64 and of 128), 0.25 and 0.42 (dQ), 0.5 and 0.56 (dK and dV). Products of an expert's few rows wait for its
/// weights, not for operands.
const OPERAND_READS: [(&str, f64); 14] = [
    ("attention_mma_forward_64", 0.71),
    ("attention_mma_forward_128", 0.71),
    ("attention_mma_forward_pair_64", 0.30),
    ("attention_mma_forward_pair_128", 0.46),
    ("attention_mma_dq_64", 0.80),
    ("attention_mma_dq_128", 0.80),
    ("attention_mma_dq_pair_64", 0.30),
    ("attention_mma_dq_pair_128", 0.55),
    ("attention_mma_dkv_64", 0.55),
    ("attention_mma_dkv_128", 0.67),
    ("experts_mma_forward_16", 0.75),
    ("experts_mma_forward_64", 0.375),
    ("experts_mma_backward_16", 0.75),
    ("experts_mma_backward_64", 0.375),
];

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Names of the kernel files, without their ending.
fn files() -> BTreeSet<String> {
    let paths = std::fs::read_dir(root("kernels")).unwrap().map(|entry| entry.unwrap().path());
    let files = paths.filter(|path| path.extension().is_some_and(|e| e == "cu"));
    files.map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned()).collect()
}

/// A compiler that may be missing; `GNEISS_REQUIRE_<name>` makes its absence a failure.
fn find(name: &str, candidates: &[Option<PathBuf>]) -> Option<PathBuf> {
    let runs =
        |path: &&PathBuf| Command::new(path).arg("--version").output().is_ok_and(|o| o.status.success());
    let found = candidates.iter().flatten().find(runs).cloned();
    let required = format!("GNEISS_REQUIRE_{name}");
    assert!(found.is_some() || std::env::var_os(&required).is_none(), "{required} is set, and there is none");
    if found.is_none() {
        eprintln!("skipped: no {name} here");
    }
    found
}

fn ran(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

/// The figures that ptxas prints for one kernel on one architecture.
struct Usage {
    kernel: String,
    architecture: String,
    registers: usize,
    spilled: usize,
}

fn usage(said: &str) -> Vec<Usage> {
    let number = |line: &str, before: &str| -> usize {
        let digits = line.split(before).next().unwrap().trim_end().rsplit([' ', ',']).next().unwrap();
        digits.parse().unwrap_or_else(|_| panic!("a number before `{before}` in {line}"))
    };
    let (mut all, mut entry, mut spilled) = (Vec::new(), None, 0);
    for line in said.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            entry = rest.split_once("' for '").map(|(kernel, rest)| (kernel, rest.trim_end_matches('\'')));
        } else if line.contains("bytes spill stores") {
            spilled = number(line, " bytes spill stores") + number(line, " bytes spill loads");
        } else if line.contains("Used ") && line.contains(" registers") {
            let (kernel, architecture) = entry.unwrap_or_else(|| panic!("an entry function before {line}"));
            let (kernel, architecture) = (kernel.to_owned(), architecture.to_owned());
            all.push(Usage { kernel, architecture, registers: number(line, " registers"), spilled });
        }
    }
    all
}

/// The CUDA compiler: `NVCC`, that of a toolkit, or the one that `make nvcc` downloaded.
fn find_nvcc() -> Option<PathBuf> {
    let home = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(std::env::var_os);
    let mut candidates = vec![std::env::var_os("NVCC").map(PathBuf::from)];
    candidates.extend(home.map(|home| Some(Path::new(&home).join("bin/nvcc"))));
    candidates.extend([Some("nvcc".into()), Some(root(".cuda/wheels/nvidia/cu13/bin/nvcc"))]);
    find("NVCC", &candidates)
}

/// Compiles a kernel file for one dtype and every architecture. nvcc's intermediate files, the cubins among them, stay in
/// `folder`.
fn compile(nvcc: &Path, file: &str, element: &str, folder: &Path) -> Vec<Usage> {
    std::fs::create_dir(folder).unwrap();
    let mut command = Command::new(nvcc);
    command.current_dir(root("")).args(["-fatbin", "-std=c++17", "-O3", "-Xptxas", "-v"]);
    command.args(["-Werror", "all-warnings", "-include", "kernels/cuda.h", "--keep", "--keep-dir"]);
    command.arg(folder).args(TARGETS.iter().flat_map(|target| ["-gencode", target]));
    command.arg(format!("-DELEMENT_{element}")).arg("-o").arg(folder.join("fatbin"));
    usage(&String::from_utf8_lossy(&ran(command.arg(format!("kernels/{file}.cu"))).stderr))
}

#[test]
fn nvcc_compiles_every_kernel_for_every_architecture() {
    let Some(nvcc) = find_nvcc() else { return };
    let folder = tempfile::tempdir().unwrap();
    let files = files();
    let work: Vec<_> = files.iter().flat_map(|file| ELEMENTS.map(|element| (file, element))).collect();
    let compile_and_check = |(file, element): &(&String, &'static str)| {
        let kernels = compile(&nvcc, file, element, &folder.path().join(format!("{file}-{element}")));
        let none = file.ends_with("_mma") && *element == "F32";
        assert!(none || !kernels.is_empty(), "{file} for {element}: no kernel");
        for Usage { kernel, architecture, spilled, .. } in &kernels {
            let (_, most) = ARCHITECTURES.iter().find(|(name, _)| name == architecture).unwrap();
            assert!(spilled <= most, "{kernel} for {element} on {architecture} spills {spilled}");
        }
        (*element, kernels)
    };
    let compiled: Vec<_> = work.par_iter().map(compile_and_check).collect();
    let mut kernels: BTreeMap<(String, &str), BTreeMap<String, usize>> = BTreeMap::new();
    for (element, compiled) in compiled {
        for Usage { kernel, architecture, registers, .. } in compiled {
            let before =
                kernels.entry((kernel.clone(), element)).or_default().insert(architecture, registers);
            assert!(before.is_none(), "{kernel} for {element}: two of this name");
        }
    }
    // Not through the test harness, which captures output: these figures are for reading.
    let mut report = format!("{:<45}", "registers of each kernel");
    report.extend(ARCHITECTURES.map(|(arch, _)| format!(" {arch:>6}")));
    report.push('\n');
    for ((kernel, element), registers) in kernels {
        assert_eq!(registers.len(), ARCHITECTURES.len(), "{kernel} for {element}: {registers:?}");
        report += &format!("{kernel:<40} {element:<4}");
        report.extend(ARCHITECTURES.map(|(arch, _)| format!(" {:>6}", registers[arch])));
        report.push('\n');
    }
    std::io::stderr().write_all(report.as_bytes()).unwrap();
    tensor_cores_are_not_kept_waiting_by_reads(folder.path());
}

/// How often each kernel of a disassembly reads operands from shared memory, and multiplies.
fn operand_reads(text: &str) -> BTreeMap<String, (usize, usize)> {
    let (mut all, mut kernel) = (BTreeMap::new(), None);
    for line in text.lines() {
        let name = line.strip_prefix(".text.").and_then(|rest| rest.strip_suffix(':'));
        kernel = name.map(str::to_owned).or(kernel);
        let Some(kernel) = &kernel else { continue };
        let (reads, products) = all.entry(kernel.clone()).or_insert((0, 0));
        *reads += usize::from(line.contains(" LDSM."));
        *products += usize::from(line.contains(" HMMA."));
    }
    all
}

/// Reads the cubins that [`compile`] kept in `folder`.
fn tensor_cores_are_not_kept_waiting_by_reads(folder: &Path) {
    let tools = [std::env::var_os("NVDISASM").map(PathBuf::from), Some("nvdisasm".into())];
    let fetched = Some(root(".cuda/wheels/nvidia/cu13/bin/nvdisasm"));
    let Some(nvdisasm) = find("NVDISASM", &[&tools[..], &[fetched]].concat()) else { return };
    for arch in ["80.sm_80", "90", "100.sm_120"] {
        let mut counts = BTreeMap::new();
        for file in ["attention_mma", "experts_mma"] {
            let cubin = folder.join(format!("{file}-BF16/{file}.compute_{arch}.cubin"));
            let text = ran(Command::new(&nvdisasm).arg("-c").arg(cubin)).stdout;
            counts.extend(operand_reads(&String::from_utf8_lossy(&text)));
        }
        assert_eq!(counts.len(), OPERAND_READS.len(), "{:?}", counts.keys());
        for (kernel, most) in OPERAND_READS {
            let (reads, products) = counts[kernel];
            let ratio = reads as f64 / products as f64;
            let report =
                format!("{kernel:<32} {arch:<10} LDSM {reads:>4} HMMA {products:>4} ratio {ratio:.2}\n");
            std::io::stderr().write_all(report.as_bytes()).unwrap();
            assert!(products > 0 && ratio <= most, "{report}: at most {most}");
        }
    }
}

#[test]
fn reads_and_products_are_counted() {
    let text = ".section\n.text.f:\n  /*0010*/  LDSM.16.M88.4 R4, [R2] ;\n  /*0020*/  HMMA.16816.F32.BF16 R8, R4, R6, R8 ;\n\
                  /*0030*/  HMMA.16816.F32.BF16 R8, R4, R6, R8 ;\n.text.g:\n  /*0010*/  EXIT ;\n";
    let expected = [("f".to_owned(), (1, 2)), ("g".to_owned(), (0, 0))];
    assert_eq!(operand_reads(text), BTreeMap::from(expected));
}

#[test]
fn clang_takes_the_portable_kernels_for_metal() {
    let candidates = [std::env::var_os("CLANGXX").map(PathBuf::from), Some("clang++".into())];
    let Some(clang) = find("CLANG", &candidates) else { return };
    for file in files().iter().filter(|file| !file.ends_with("_mma")) {
        for element in ELEMENTS {
            let mut command = Command::new(&clang);
            command.current_dir(root("")).args(["--target=aarch64-linux-gnu", "-std=c++17", "-fsyntax-only"]);
            command.args(["-nostdinc", "-Wall", "-Werror", "-Wdouble-promotion", "-Wno-unknown-attributes"]);
            command.args(["-Wno-unused-function", "-Xclang", "-fallow-half-arguments-and-returns"]);
            command.args([
                "-I", "tests/metal", "-include", "kernels/metal.h", "-include", "tests/metal/shared.h",
            ]);
            command.arg(format!("-DELEMENT_{element}")).args(["-x", "c++"]).arg(format!("kernels/{file}.cu"));
            ran(&mut command);
        }
    }
}

#[test]
fn metal_is_given_every_portable_kernel() {
    let text = std::fs::read_to_string(root("src/ops/backend/gpu/metal.rs")).unwrap();
    for file in files().iter().filter(|file| !file.ends_with("_mma")) {
        assert!(
            text.contains(&format!("(\"{file}\", include_str!(\"../../../../kernels/{file}.cu\"))")),
            "{file}"
        );
    }
}

#[test]
fn the_usage_of_registers_is_read() {
    let said = "ptxas info    : Compiling entry function 'f' for 'sm_90'\n\
                ptxas info    : Function properties for f\n    0 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\n\
                ptxas info    : Used 40 registers, used 1 barriers, 128 bytes smem\n";
    let [Usage { kernel, architecture, registers, spilled }] = &usage(said)[..] else { panic!("one kernel") };
    assert_eq!((kernel.as_str(), architecture.as_str(), *registers, *spilled), ("f", "sm_90", 40, 12));
}
