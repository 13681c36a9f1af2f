//! The emulator, for tests: the text of `kernels/` compiled by the host's C++ compiler. The kernels' threads are fibers
//! (`kernels/emulated.h`), and tensors stay on the CPU.

use super::{Kernel, KernelParameters};
use crate::{Error, Result};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Device, Shape, Storage, Tensor};
use libloading::Library;
use rayon::prelude::*;
use std::cell::Cell;
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, OnceLock};
use std::thread::LocalKey;

/// The emulator's side of a launch: `struct Launch` of `kernels/emulated.h`.
#[repr(C)]
struct Launch {
    grid: [u32; 3],
    threads: u32,
    shared_bytes: u32,
    order: u32,
    buffers: u32,
    reserved: u32,
    pointers: [*mut c_void; 16],
    bytes: [u64; 16],
    parameters: *const c_void,
    parameter_bytes: u64,
}

type Emulate = unsafe extern "C" fn(*const c_char, *const Launch, *mut c_char, u64) -> c_int;

thread_local! {
    static ON: Cell<Option<u32>> = const { Cell::new(None) };
}

/// Whether this thread's ops run on the emulator.
pub(crate) fn is_on() -> bool {
    ON.get().is_some()
}

/// Sets a thread's flag back to its default when it is dropped.
struct Reset<T: Default + 'static>(&'static LocalKey<Cell<T>>);

impl<T: Default> Drop for Reset<T> {
    fn drop(&mut self) {
        self.0.set(T::default());
    }
}

/// Runs `f` with this thread's ops on the emulator. `order` is the order in which threads and blocks run: 0 ascending, 1
/// descending, others a shuffle.
pub(crate) fn emulate<R>(order: u32, f: impl FnOnce() -> R) -> R {
    ON.set(Some(order));
    let _off = Reset(&ON);
    f()
}

thread_local! {
    static ADDS: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread's products add a matrix, as CUDA's do.
pub(super) fn adds_in_products() -> bool {
    is_on() && ADDS.get()
}

/// As [`emulate`], with products that add a matrix, as a model runs on CUDA.
pub(crate) fn emulate_cuda<R>(order: u32, f: impl FnOnce() -> R) -> R {
    ADDS.set(true);
    let _off = Reset(&ADDS);
    emulate(order, f)
}

/// A tensor of NaN, or of the largest integers.
pub(super) fn poisoned(shape: Shape, dtype: DType) -> Result<Tensor> {
    Ok(match dtype {
        DType::U32 => Tensor::full(u32::MAX, shape, &Device::Cpu)?,
        _ => Tensor::full(f32::NAN, shape, &Device::Cpu)?.to_dtype(dtype)?,
    })
}

fn name(element: DType) -> &'static str {
    match element {
        DType::F32 => "ELEMENT_F32",
        DType::BF16 => "ELEMENT_BF16",
        DType::F16 => "ELEMENT_F16",
        other => panic!("no kernels for {other:?}"),
    }
}

/// Compiles kernel files for one dtype to a shared library in `folder`, and loads it.
pub(crate) fn compile(files: &[PathBuf], element: DType, folder: &Path) -> Library {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let run = |command: &mut Command| {
        let ran = command
            .output()
            .unwrap_or_else(|e| panic!("{compiler}: {e}; the kernels' tests need a C++ compiler"));
        assert!(ran.status.success(), "{compiler}: {}", String::from_utf8_lossy(&ran.stderr));
    };
    // As many at a time as there are cores.
    let host = root.join("emulated/emulate.cpp");
    let files: Vec<&PathBuf> = files.iter().chain([&host]).collect();
    let objects = files.par_iter().map(|file| {
        let object = folder.join(file.file_name().expect("a kernel's file")).with_extension("o");
        let mut command = Command::new(&compiler);
        command.args(["-std=c++17", "-O1", "-fPIC", "-Wall", "-Werror", "-include"]);
        command.arg(root.join("emulated.h")).arg(format!("-D{}", name(element)));
        run(command.args(["-x", "c++", "-c"]).arg(file).arg("-o").arg(&object));
        object
    });
    let objects: Vec<PathBuf> = objects.collect();
    let library = folder.join("kernels.so");
    run(Command::new(&compiler).arg("-shared").args(&objects).arg("-o").arg(&library));
    // SAFETY: the library was just made from this project's kernels; its initialisers fill a table of names.
    unsafe { Library::new(&library) }.unwrap_or_else(|e| panic!("{}: {e}", library.display()))
}

fn library(element: DType) -> &'static Library {
    static LIBRARIES: OnceLock<Mutex<HashMap<DType, &'static Library>>> = OnceLock::new();
    let mut all =
        LIBRARIES.get_or_init(Mutex::default).lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    all.entry(element).or_insert_with(|| {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
        let entries =
            std::fs::read_dir(&folder).expect("the folder of kernels").map(|e| e.expect("an entry").path());
        let mut files: Vec<PathBuf> = entries.filter(|p| p.extension().is_some_and(|e| e == "cu")).collect();
        files.sort();
        let out = tempfile::tempdir().expect("a folder for the library");
        // An open library does not need its file.
        Box::leak(Box::new(compile(&files, element, out.path())))
    })
}

/// Address and bytes of a contiguous CPU tensor's elements.
fn elements(tensor: &Tensor) -> Result<(*mut c_void, u64)> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cpu(cpu) = &*storage else {
        return Err(Error::Invalid(format!("expected a tensor on the CPU, found {:?}", tensor.device())));
    };
    let base = match cpu {
        CpuStorage::F32(v) => v.as_ptr().cast::<c_void>(),
        CpuStorage::BF16(v) => v.as_ptr().cast::<c_void>(),
        CpuStorage::F16(v) => v.as_ptr().cast::<c_void>(),
        CpuStorage::U32(v) => v.as_ptr().cast::<c_void>(),
        other => {
            return Err(Error::Invalid(format!("expected f32, bf16, f16 or u32, found {:?}", other.dtype())));
        }
    };
    let size = tensor.dtype().size_in_bytes();
    let address = base.cast_mut().wrapping_byte_add(layout.start_offset() * size);
    Ok((address, (tensor.elem_count() * size) as u64))
}

/// Runs a kernel of `library`.
///
/// # Safety
/// Nothing else accesses the elements that the kernel writes while it runs.
pub(crate) unsafe fn launch_in<P: KernelParameters>(
    library: &Library,
    kernel: &Kernel,
    buffers: &[&Tensor],
    parameters: &P,
) -> Result<()> {
    let mut launch = Launch {
        grid: kernel.grid.map(super::uint),
        threads: super::uint(kernel.threads),
        shared_bytes: super::uint(kernel.shared),
        order: ON.get().unwrap_or(0),
        buffers: super::uint(buffers.len()),
        reserved: 0,
        pointers: [std::ptr::null_mut(); 16],
        bytes: [0; 16],
        parameters: std::ptr::from_ref(parameters).cast(),
        parameter_bytes: size_of::<P>() as u64,
    };
    for (i, buffer) in buffers.iter().enumerate() {
        (launch.pointers[i], launch.bytes[i]) = elements(buffer)?;
    }
    let name = CString::new(kernel.name).expect("a kernel's name has no zero");
    let mut message = [0 as c_char; 2048];
    // SAFETY: the emulator checks every access against the sizes given; the buffers are alive; the caller's promise.
    let (code, message) = unsafe {
        let run = library.get::<Emulate>(b"emulate\0").expect("the emulator's entry");
        let code = run(name.as_ptr(), &raw const launch, message.as_mut_ptr(), message.len() as u64);
        (code, CStr::from_ptr(message.as_ptr()).to_string_lossy())
    };
    if code == 0 { Ok(()) } else { Err(Error::Invalid(format!("emulator: {message}"))) }
}

/// # Safety
/// As for [`launch_in`].
pub(super) unsafe fn launch<P: KernelParameters>(
    kernel: &Kernel,
    element: DType,
    buffers: &[&Tensor],
    parameters: &P,
) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe { launch_in(library(element), kernel, buffers, parameters) }
        .map_err(|e| Error::Invalid(format!("kernels/{}.cu: {e}", kernel.file)))
}

#[cfg(test)]
mod tests {
    use super::*;

    super::super::parameters!(FaultParameters { width: u32 });

    /// Runs a kernel of tests/emulator/faults.cu, compiled for bf16, on 64 threads; returns the emulator's message.
    fn run(library: &Library, name: &'static str, width: u32, blocks: usize, order: u32) -> String {
        let dtype = if name == "fault_missing_wait" { DType::BF16 } else { DType::F32 };
        let x = Tensor::ones(64, dtype, &Device::Cpu).expect("a tensor");
        let y = Tensor::zeros(64, DType::F32, &Device::Cpu).expect("a tensor");
        let y = if name == "fault_overlap" { x.clone() } else { y };
        let kernel = Kernel::new("faults", name, blocks, 64);
        let buffers = [&x, &y];
        // SAFETY: nothing else uses the buffers.
        match emulate(order, || unsafe { launch_in(library, &kernel, &buffers, &FaultParameters { width }) })
        {
            Ok(()) => String::new(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn faults_are_found_in_every_order() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = [Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/emulator/faults.cu")];
        let library = compile(&file, DType::BF16, folder.path());
        for order in [0, 1, 7] {
            let message = |name, width, blocks| run(&library, name, width, blocks, order);
            assert_eq!(message("fault_none", 64, 1), "");
            for (name, width, blocks, expected) in [
                ("fault_out_of_bounds", 1, 1, "x[64] of 64"),
                ("fault_missing_barrier", 64, 1, "tile["),
                ("fault_diverged_barrier", 40, 1, "barrier"),
                ("fault_two_barriers", 40, 1, "barrier"),
                ("fault_diverged_warp", 40, 1, "warp_sum"),
                ("fault_unwritten_shared", 40, 1, "tile["),
                ("fault_two_blocks", 3, 2, "y["),
                ("fault_misaligned", 1, 1, "16"),
                ("fault_overlap", 3, 1, "overlap"),
                ("fault_too_much_shared", 3, 1, "shared"),
                ("fault_missing_wait", 64, 1, "tile["),
            ] {
                let found = message(name, width, blocks);
                assert!(found.contains(expected), "{name}, order {order}: {found}");
            }
            // Without their fault the same kernels are right.
            for (name, width) in
                [("fault_out_of_bounds", 0), ("fault_unwritten_shared", 64), ("fault_misaligned", 8)]
            {
                assert_eq!(message(name, width, 1), "", "{name}, order {order}");
            }
        }
    }
}
