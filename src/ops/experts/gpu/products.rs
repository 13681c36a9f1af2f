//! The experts' products. The host does not know how many rows an expert has: they are launched with a block for each tile that
//! there may be.

use crate::ops::cpu::check_same_dtype;
use crate::ops::experts::{ExpertLinear, Routing};
use crate::ops::gpu::{self, Kernel};
use crate::{Error, Result};
use candle_core::{DType, Tensor};

gpu::parameters!(ExpertProductParameters {
    experts: u32,
    depth: u32,
    columns: u32,
    scale: f32,
    aligned: u32,
});

/// Rows of a product's tile: few if experts have few rows on average, as in a step of generation.
pub(super) fn tile_rows(pairs: usize, experts: usize) -> usize {
    if pairs <= 16 * experts { 16 } else { 64 }
}

/// The most tiles that the rows of all experts can fill.
fn most_tiles(pairs: usize, experts: usize) -> usize {
    pairs / tile_rows(pairs, experts) + experts.min(pairs)
}

/// The kernels of a direction, for tiles of 16 and of 64 rows.
pub(super) struct ProductKernels {
    portable: [&'static str; 2],
    tensor_cores: [&'static str; 2],
}

pub(super) const FORWARD: ProductKernels = ProductKernels {
    portable: ["experts_forward_16", "experts_forward_64"],
    tensor_cores: ["experts_mma_forward_16", "experts_mma_forward_64"],
};
pub(super) const BACKWARD: ProductKernels = ProductKernels {
    portable: ["experts_backward_16", "experts_backward_64"],
    tensor_cores: ["experts_mma_backward_16", "experts_mma_backward_64"],
};

impl ProductKernels {
    /// A launch for tiles of `rows` rows of `columns` columns. `aligned`: every row of every matrix begins at a multiple of 16
    /// bytes, which the tensor cores' kernels copy at a time.
    fn launch(&self, rows: usize, columns: usize, aligned: bool, like: &Tensor) -> Kernel {
        let index = usize::from(rows > 16);
        let is_16_bit = matches!(like.dtype(), DType::BF16 | DType::F16);
        let (file, name, tile_columns, threads, shared) =
            if aligned && is_16_bit && gpu::has_tensor_cores(like) {
                // Three stages of 64 values for each row and column of a tile.
                ("experts_mma", self.tensor_cores[index], 128, 128, 3 * (rows + 128) * 64 * 2)
            } else {
                ("experts", self.portable[index], 64, 256, 0)
            };
        Kernel { file, name, grid: [columns.div_ceil(tile_columns), 1, 1], threads, shared }
    }
}

/// A direction of the products.
pub(super) struct ExpertProduct {
    pub(super) op: &'static str,
    pub(super) kernels: &'static ProductKernels,
    /// Columns of the output.
    pub(super) columns: usize,
    pub(super) scale: f64,
}

/// The product [S, columns] of `x` [S, depth].
pub(super) fn product(
    layer: &ExpertLinear,
    x: &Tensor,
    routing: &Routing,
    direction: &ExpertProduct,
) -> Result<Tensor> {
    let ExpertProduct { op, kernels, columns, scale } = *direction;
    let weight = layer.projection().weight()?;
    check_same_dtype(op, &weight, x.dtype())?;
    let Some(tiles) = &routing.sorted.tiles else {
        return Err(Error::Invalid(format!("{op}: expected a routing that was made on a GPU")));
    };
    let ((pairs, depth), experts) = (x.dims2()?, routing.experts);
    let y = gpu::empty((pairs, columns), x.dtype(), x)?;
    let aligned = gpu::aligned(&[depth, columns], &[x, &weight]);
    let parameters = ExpertProductParameters {
        experts: gpu::uint(experts),
        depth: gpu::uint(depth),
        columns: gpu::uint(columns),
        scale: scale as f32,
        aligned,
    };
    let mut kernel = kernels.launch(tile_rows(pairs, experts), columns, aligned == 1, x);
    kernel.grid[1] = most_tiles(pairs, experts);
    // SAFETY: the module has checked shapes and dtypes; the routing's kernels wrote its indices, which lie inside the matrices.
    unsafe {
        gpu::launch(&kernel, x.dtype(), &[x, &weight, &routing.sorted.offsets, tiles, &y], &parameters)
    }?;
    Ok(y)
}
