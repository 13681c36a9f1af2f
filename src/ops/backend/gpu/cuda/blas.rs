//! Matrix products by cuBLASLt, or by `cublasGemmEx` if cuBLASLt has no algorithm.
//!
//! A product runs by the algorithm of its class ([`super::super::products`]) if one was chosen, and otherwise by the library's
//! first proposal for its exact sizes.

use super::address;
use super::lt::{self, CANDIDATES, Handle, Operation, ProductOperands, Workspace};
use crate::ops::gpu::products::{self, Algorithm, ChoiceTable, ProductChoices, ProductClass, ProductDtype};
use crate::ops::gpu::{self, MatrixProduct};
use crate::{Error, Result};
use candle_core::cuda_backend::cudarc::cublas::{result as cublas, sys};
use candle_core::cuda_backend::cudarc::driver::sys as driver;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use candle_core::cuda_backend::{DeviceId, WrapErr};
use candle_core::{CudaDevice, Tensor};
use std::collections::HashSet;
use std::collections::hash_map::{Entry, HashMap};
use std::ffi::c_void;
use std::sync::{Arc, Mutex, OnceLock};

/// Bytes of workspace: the size that NVIDIA recommends on Hopper, and that cuBLAS allocates there by default. With a workspace
/// of this process, its choice of algorithm does not depend on the amount of free memory. cuBLAS and cuBLASLt share it: their
/// work is on one stream, and both write before they read.
const WORKSPACE: usize = 32 << 20;

/// Runs of an algorithm that are timed together, after one that loads its code.
const TIMED_RUNS: usize = 3;

/// The libraries, the workspace and the choices of a device.
struct Blas {
    handle: Handle,
    stream: Arc<CudaStream>,
    workspace: CudaSlice<u8>,
    table: ChoiceTable,
    /// The last number of rows of each class, and the library's first proposal for it; `None` if it has no algorithm.
    first: HashMap<ProductClass, (usize, Option<Algorithm>)>,
    /// The device and the library ([`ProductChoices::library`]).
    name: String,
    warned: HashSet<&'static str>,
}

/// Runs `f` with the [`Blas`] of `device`, which is made at the first use.
fn with<R>(device: &CudaDevice, f: impl FnOnce(&mut Blas) -> Result<R>) -> Result<R> {
    static ALL: OnceLock<Mutex<HashMap<DeviceId, Blas>>> = OnceLock::new();
    let mut all = ALL.get_or_init(Mutex::default).lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    f(match all.entry(device.id()) {
        Entry::Occupied(made) => made.into_mut(),
        Entry::Vacant(place) => place.insert(Blas::new(device)?),
    })
}

/// Makes the [`Blas`] of `device`.
///
/// # Errors
/// Returns an error if the libraries cannot be opened or there is too little memory.
pub(super) fn prepare(device: &CudaDevice) -> Result<()> {
    with(device, |_| Ok(()))
}

/// As [`products::set_timing`].
pub(in crate::ops::backend::gpu) fn set_timing(device: &CudaDevice, timing: bool) -> Result<()> {
    with(device, |blas| {
        blas.table.timing = timing;
        Ok(())
    })
}

/// As [`products::export`].
pub(in crate::ops::backend::gpu) fn export(device: &CudaDevice) -> Result<Option<ProductChoices>> {
    with(device, |blas| Ok(blas.table.export(&blas.name)))
}

/// As [`products::import`].
pub(in crate::ops::backend::gpu) fn import(
    device: &CudaDevice,
    choices: &ProductChoices,
) -> Result<Option<String>> {
    with(device, |blas| Ok(blas.table.import(choices, &blas.name)))
}

/// The product; sums of bf16 and f16 are f32.
///
/// # Errors
/// Returns an error if the operands have several dtypes or are not contiguous, or a device operation fails.
pub(in crate::ops::backend::gpu) fn matmul(device: &CudaDevice, product: &MatrixProduct) -> Result<Tensor> {
    let (m, k) = product.a.dims2()?;
    let (rows, columns) = product.b.dims2()?;
    let n = if product.transposed { rows } else { columns };
    check(product, (m, n, k))?;
    let out = gpu::empty((m, n), product.a.dtype(), product.a)?;
    if m == 0 || n == 0 {
        return Ok(out);
    }
    device.cuda_stream().context().bind_to_thread().w()?;
    let operands = ProductOperands {
        m,
        n,
        k,
        transposed: product.transposed,
        element: ProductDtype::new(product.a.dtype())?,
        a: address(product.b)?,
        b: address(product.a)?,
        bias: product.bias.map(address).transpose()?,
        add: product.add.map(address).transpose()?,
        out: address(&out)?,
        scale: product.scale as f32,
    };
    if with(device, |blas| blas.run(operands))? { Ok(out) } else { gemm_ex(device, product, operands, out) }
}

/// Returns an error for operands of other shapes or dtypes than the library would read.
fn check(product: &MatrixProduct, (m, n, k): (usize, usize, usize)) -> Result<()> {
    let MatrixProduct { a, b, transposed, bias, add, .. } = *product;
    let b_shape = if transposed { [n, k] } else { [k, n] };
    let shapes = b.dims() == b_shape
        && bias.is_none_or(|bias| bias.dims() == [n])
        && add.is_none_or(|add| add.dims() == [m, n]);
    let all = [Some(a), Some(b), bias, add];
    let mut all = all.into_iter().flatten();
    if shapes && all.all(|t| t.is_contiguous() && t.dtype() == a.dtype()) {
        return Ok(());
    }
    let found =
        [Some(a), Some(b), bias, add].map(|t| t.map(|t| (t.shape().clone(), t.dtype(), t.is_contiguous())));
    Err(Error::shape(
        "linear",
        format!("contiguous operands of one dtype for [{m}, {k}] x [{k}, {n}]"),
        format!("(shape, dtype, contiguous) {found:?}"),
    ))
}

impl Blas {
    fn new(device: &CudaDevice) -> Result<Self> {
        let stream = device.cuda_stream();
        let context = stream.context();
        context.bind_to_thread().w()?;
        // SAFETY: only cuBLAS and cuBLASLt use the memory, and they write it before they read it.
        let workspace = unsafe { stream.alloc::<u8>(WORKSPACE) }.w()?;
        let blas = device.cublas_handle();
        let address = workspace.device_ptr(&stream).0 as *mut c_void;
        // Sums of 16-bit products stay f32 when cuBLAS splits them over k: its default mode may add up the parts in the
        // output's dtype (cuBLAS documentation, `cublasMath_t`). f32 products take no TF32 in either mode.
        let mode = sys::cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
        // SAFETY: the handle is alive, and the workspace lives as long as the process.
        unsafe {
            sys::cublasSetMathMode(*blas.handle(), mode).result().w()?;
            sys::cublasSetWorkspace_v2(*blas.handle(), address, WORKSPACE).result().w()?;
        }
        let multiprocessors = driver::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let name = format!(
            "{}, {} multiprocessors, cuBLASLt {}",
            context.name().w()?,
            context.attribute(multiprocessors).w()?,
            lt::version()
        );
        let (table, first, warned) = (ChoiceTable::default(), HashMap::new(), HashSet::new());
        Ok(Self { handle: Handle::new()?, stream, workspace, table, first, name, warned })
    }

    /// Enqueues the product on the stream; returns `false` if cuBLASLt has no algorithm for it.
    fn run(&mut self, operands: ProductOperands) -> Result<bool> {
        let ProductOperands { m, n, k, transposed, element, a, b, bias, add, out, .. } = operands;
        let addresses = [Some(a), Some(b), Some(out), bias, add].into_iter().flatten();
        let class = ProductClass {
            rows: ProductClass::rows_for(m),
            n,
            k,
            transposed,
            element,
            bias: bias.is_some(),
            add: add.is_some(),
            alignment: ProductClass::common_alignment(addresses),
        };
        let operation = Operation::new(operands)?;
        if self.table.is_to_time(&class) {
            let chosen = self.time(&operation, &class)?;
            self.table.choose(class, chosen);
        }
        if let Some(Some(algorithm)) = self.table.get(&class) {
            if self.run_by(&operation, algorithm)? {
                return Ok(true);
            }
            self.table.choose(class, None);
            self.warn(
                "the algorithm that was chosen for a matrix product does not run for another number of rows",
            );
        }
        let first = match self.first.get(&class) {
            Some((rows, first)) if *rows == m => *first,
            _ => {
                let first = operation.algorithms(&self.handle, (WORKSPACE, class.alignment), 1)?.pop();
                self.first.insert(class, (m, first));
                first
            }
        };
        let ran = match first {
            Some(algorithm) => self.run_by(&operation, algorithm)?,
            None => false,
        };
        if !ran {
            self.warn("cuBLASLt has no algorithm for some matrix products, which run by cublasGemmEx");
        }
        Ok(ran)
    }

    /// Enqueues the product on the stream; returns `false` if the algorithm does not support it.
    fn run_by(&self, operation: &Operation, algorithm: Algorithm) -> Result<bool> {
        let address = self.workspace.device_ptr(&self.stream).0;
        let workspace = Workspace { address, bytes: WORKSPACE };
        // SAFETY: `matmul` made the operation of live tensors whose shapes, dtypes and strides it checked; all work is on
        // this one stream, and the workspace lives as long as `self`.
        unsafe { operation.run(&self.handle, algorithm, workspace, self.stream.cu_stream().cast()) }
    }

    /// The fastest of the algorithms that the library proposes; each of them computes the product.
    fn time(&self, operation: &Operation, class: &ProductClass) -> Result<Option<Algorithm>> {
        let proposed = operation.algorithms(&self.handle, (WORKSPACE, class.alignment), CANDIDATES)?;
        products::fastest(&proposed, |algorithm| {
            if !self.run_by(operation, algorithm)? {
                return Ok(None);
            }
            let flags = Some(driver::CUevent_flags::CU_EVENT_DEFAULT);
            let begin = self.stream.record_event(flags).w()?;
            for _ in 0..TIMED_RUNS {
                self.run_by(operation, algorithm)?;
            }
            let end = self.stream.record_event(flags).w()?;
            Ok(Some(begin.elapsed_ms(&end).w()?))
        })
    }

    /// Prints once what is slower than it should be.
    fn warn(&mut self, what: &'static str) {
        if self.warned.insert(what) {
            eprintln!("warning: {what}; results are right, and this is slower ({})", self.name);
        }
    }
}

/// The product by cuBLAS. Its C is its D, so a matrix to be added is copied to `out` before, and a bias is added after.
fn gemm_ex(
    device: &CudaDevice,
    product: &MatrixProduct,
    operands: ProductOperands,
    out: Tensor,
) -> Result<Tensor> {
    let ProductOperands { m, n, k, transposed, element, a, b, scale, .. } = operands;
    let (out, beta) = match product.add {
        Some(add) => (add.copy()?, 1f32),
        None => (out, 0f32),
    };
    let to = address(&out)?;
    let dtype = match element {
        ProductDtype::F32 => sys::cudaDataType::CUDA_R_32F,
        ProductDtype::Bf16 => sys::cudaDataType::CUDA_R_16BF,
        ProductDtype::F16 => sys::cudaDataType::CUDA_R_16F,
    };
    let int = |size: usize| {
        i32::try_from(size)
            .map_err(|_| Error::Invalid(format!("linear: expected sizes under 2^31, found {size}")))
    };
    let (m, n, k) = (int(m)?, int(n)?, int(k)?);
    let (op, leading) = match transposed {
        true => (sys::cublasOperation_t::CUBLAS_OP_T, k),
        false => (sys::cublasOperation_t::CUBLAS_OP_N, n),
    };
    // SAFETY: cuBLAS counts columns first, as cuBLASLt does (`lt`): outᵀ [n, m] = A [n, k] B [k, m], whose leading
    // dimensions are the rows' lengths here. Addresses and sizes are those of live contiguous tensors; alpha and beta are
    // f32, as the compute type asks.
    unsafe {
        cublas::gemm_ex(
            *device.cublas_handle().handle(),
            op,
            sys::cublasOperation_t::CUBLAS_OP_N,
            n,
            m,
            k,
            (&raw const scale).cast::<c_void>(),
            a as *const c_void,
            dtype,
            leading,
            b as *const c_void,
            dtype,
            k,
            (&raw const beta).cast::<c_void>(),
            to as *mut c_void,
            dtype,
            n,
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
        )
    }
    .w()?;
    Ok(match product.bias {
        Some(bias) => out.broadcast_add(bias)?,
        None => out,
    })
}
