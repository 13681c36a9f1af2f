//! One matrix product by cuBLASLt: its description, its algorithms, and its launch (cuBLAS documentation, "Using the cuBLASLt
//! API"; `cublasLt.h`).
//!
//! cuBLASLt stores matrices by columns, so it computes the transposed product. With the letters of [`super::super::MatrixProduct`]:
//!
//! ```text
//! Dᵀ [n, m] = scale * A [n, k] B [k, m] + beta * Cᵀ [n, m] + bias [n] in every column
//!
//! A   op T of a matrix [k, n] with leading dimension k     if `b` is [n, k] (forward)
//!     op N of a matrix [n, k] with leading dimension n     if `b` is [k, n] (backward)
//! B   op N of a matrix [k, m] with leading dimension k     `a` [m, k]
//! C,D matrices [n, m] with leading dimension n             [m, n]; they may be one buffer if beta is 0
//! ```

use crate::Result;
use crate::ops::gpu::products::{Algorithm, ProductDtype};
use candle_core::cuda_backend::cudarc::cublas::sys::cublasOperation_t;
use candle_core::cuda_backend::cudarc::cublaslt::{result as lt, sys};
use std::ffi::c_void;

/// The most algorithms that the library is asked for.
pub(super) const CANDIDATES: usize = 8;

/// The library on a device. It holds no memory of the device's.
pub(super) struct Handle(sys::cublasLtHandle_t);
// SAFETY: "The cublasLt handle can be used from any thread"; here it is used only behind a lock.
unsafe impl Send for Handle {}

impl Handle {
    /// On the device whose context is current on this thread. It lives as long as the process.
    pub(super) fn new() -> Result<Self> {
        lt::create_handle().map(Self).map_err(|e| failed("cublasLtCreate", e.0))
    }
}

/// Version of the library, as 130100.
pub(super) fn version() -> usize {
    // SAFETY: it takes nothing and reads a constant.
    unsafe { sys::cublasLtGetVersion() }
}

/// The error of a call that returned `status`.
fn failed(call: &str, status: sys::cublasStatus_t) -> crate::Error {
    candle_core::Error::msg(format!("{call}: {status:?}")).into()
}

/// Whether a status means that this algorithm does not support this product, and not that something failed.
fn is_refusal(status: sys::cublasStatus_t) -> bool {
    matches!(
        status,
        sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED
            | sys::cublasStatus_t::CUBLAS_STATUS_INVALID_VALUE
            | sys::cublasStatus_t::CUBLAS_STATUS_ARCH_MISMATCH
    )
}

/// Addresses of a product's operands, in the letters of the module.
#[derive(Debug, Clone, Copy)]
pub(super) struct ProductOperands {
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) transposed: bool,
    pub(super) element: ProductDtype,
    /// `b`.
    pub(super) a: u64,
    /// `a`.
    pub(super) b: u64,
    pub(super) bias: Option<u64>,
    /// The matrix that is added; its factor beta is 1.
    pub(super) add: Option<u64>,
    pub(super) out: u64,
    pub(super) scale: f32,
}

/// Memory that an algorithm may use while it runs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Workspace {
    pub(super) address: u64,
    pub(super) bytes: usize,
}

struct MatrixLayout(sys::cublasLtMatrixLayout_t);

impl MatrixLayout {
    /// A matrix [rows, columns] whose columns begin `rows` elements apart.
    fn new(dtype: sys::cudaDataType, rows: usize, columns: usize) -> Result<Self> {
        lt::create_matrix_layout(dtype, rows as u64, columns as u64, rows as i64)
            .map(Self)
            .map_err(|e| failed("cublasLtMatrixLayoutCreate", e.0))
    }
}

impl Drop for MatrixLayout {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and destroyed once.
        let _freed = unsafe { lt::destroy_matrix_layout(self.0) };
    }
}

struct Description(sys::cublasLtMatmulDesc_t);

impl Description {
    fn new(operands: &ProductOperands) -> Result<Self> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let this = lt::create_matmul_desc(compute, sys::cudaDataType_t::CUDA_R_32F)
            .map(Self)
            .map_err(|e| failed("cublasLtMatmulDescCreate", e.0))?;
        let op = match operands.transposed {
            true => cublasOperation_t::CUBLAS_OP_T,
            false => cublasOperation_t::CUBLAS_OP_N,
        };
        this.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &(op as i32))?;
        if let Some(bias) = operands.bias {
            // Its dtype is the product's unless another one is set.
            let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS as u32;
            this.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
            this.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias)?;
        }
        Ok(this)
    }

    /// Sets an attribute. The value has the type and size that the library documents for it.
    fn set<T: Copy>(&self, attribute: sys::cublasLtMatmulDescAttributes_t, value: &T) -> Result<()> {
        let value = (&raw const *value).cast::<c_void>();
        // SAFETY: the description is alive, and the value is read during the call alone.
        unsafe { lt::set_matmul_desc_attribute(self.0, attribute, value, size_of::<T>()) }
            .map_err(|e| failed("cublasLtMatmulDescSetAttribute", e.0))
    }
}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and destroyed once.
        let _freed = unsafe { lt::destroy_matmul_desc(self.0) };
    }
}

/// Requirements for algorithms.
struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    /// At most `workspace` bytes, operands at multiples of `alignment` bytes, and sums that stay f32 if they are split over k.
    fn new(workspace: usize, alignment: u32) -> Result<Self> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let this =
            lt::create_matmul_pref().map(Self).map_err(|e| failed("cublasLtMatmulPreferenceCreate", e.0))?;
        this.set(Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &(workspace as u64))?;
        // Sums that are not split are allowed too; there is no bit for them.
        let schemes = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        this.set(Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &schemes)?;
        for attribute in [
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ] {
            this.set(attribute, &alignment)?;
        }
        Ok(this)
    }

    fn set<T: Copy>(&self, attribute: sys::cublasLtMatmulPreferenceAttributes_t, value: &T) -> Result<()> {
        let value = (&raw const *value).cast::<c_void>();
        // SAFETY: the preference is alive, and the value is read during the call alone.
        unsafe { lt::set_matmul_pref_attribute(self.0, attribute, value, size_of::<T>()) }
            .map_err(|e| failed("cublasLtMatmulPreferenceSetAttribute", e.0))
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and destroyed once.
        let _freed = unsafe { lt::destroy_matmul_pref(self.0) };
    }
}

/// A product described to the library.
pub(super) struct Operation {
    description: Description,
    a: MatrixLayout,
    b: MatrixLayout,
    /// Of C and D.
    out: MatrixLayout,
    operands: ProductOperands,
}

impl Operation {
    pub(super) fn new(operands: ProductOperands) -> Result<Self> {
        let ProductOperands { m, n, k, transposed, element, .. } = operands;
        let dtype = match element {
            ProductDtype::F32 => sys::cudaDataType_t::CUDA_R_32F,
            ProductDtype::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
            ProductDtype::F16 => sys::cudaDataType_t::CUDA_R_16F,
        };
        let (rows, columns) = if transposed { (k, n) } else { (n, k) };
        Ok(Self {
            description: Description::new(&operands)?,
            a: MatrixLayout::new(dtype, rows, columns)?,
            b: MatrixLayout::new(dtype, k, m)?,
            out: MatrixLayout::new(dtype, n, m)?,
            operands,
        })
    }

    /// At most `most` (up to [`CANDIDATES`]) algorithms that support the product with `workspace` bytes and addresses that are
    /// multiples of `alignment`, in the library's order; none if it has none.
    pub(super) fn algorithms(
        &self,
        handle: &Handle,
        (workspace, alignment): (usize, u32),
        most: usize,
    ) -> Result<Vec<Algorithm>> {
        let preference = Preference::new(workspace, alignment)?;
        // SAFETY: zeros are a value of each field; a status of 0 is SUCCESS.
        let mut found: [sys::cublasLtMatmulHeuristicResult_t; CANDIDATES] = unsafe { std::mem::zeroed() };
        let mut count = 0;
        // SAFETY: descriptors and handle are alive, and `found` has room for as many as are asked for.
        let status = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                handle.0,
                self.description.0,
                self.a.0,
                self.b.0,
                self.out.0,
                self.out.0,
                preference.0,
                most.min(CANDIDATES) as i32,
                found.as_mut_ptr(),
                &raw mut count,
            )
        };
        match status {
            sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS => {}
            // "If no heuristic function is available for the current configuration".
            sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED => return Ok(Vec::new()),
            other => return Err(failed("cublasLtMatmulAlgoGetHeuristic", other)),
        }
        let found = found.iter().take(usize::try_from(count).unwrap_or(0));
        Ok(found
            .filter(|result| result.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS)
            .map(|result| result.algo.data)
            .collect())
    }

    /// Enqueues the product on the stream; returns `false` if `algorithm` does not support it.
    ///
    /// # Safety
    /// The operands' addresses are those of live contiguous matrices of the sizes and dtype described, the workspace is
    /// alive, and all of them are used on `stream` alone.
    pub(super) unsafe fn run(
        &self,
        handle: &Handle,
        algorithm: Algorithm,
        workspace: Workspace,
        stream: *mut c_void,
    ) -> Result<bool> {
        let ProductOperands { a, b, add, out, scale, .. } = self.operands;
        let beta = if add.is_some() { 1f32 } else { 0f32 };
        let algorithm = sys::cublasLtMatmulAlgo_t { data: algorithm };
        // SAFETY: by this function's contract; scale and beta are f32 on the host, as the description says.
        let status = unsafe {
            sys::cublasLtMatmul(
                handle.0,
                self.description.0,
                (&raw const scale).cast(),
                a as *const c_void,
                self.a.0,
                b as *const c_void,
                self.b.0,
                (&raw const beta).cast(),
                add.unwrap_or(out) as *const c_void,
                self.out.0,
                out as *mut c_void,
                self.out.0,
                &raw const algorithm,
                workspace.address as *mut c_void,
                workspace.bytes,
                stream.cast(),
            )
        };
        match status {
            sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS => Ok(true),
            status if is_refusal(status) => Ok(false),
            other => Err(failed("cublasLtMatmul", other)),
        }
    }
}
