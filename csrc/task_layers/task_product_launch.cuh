// Launch of task_linear_kernel.cuh: tiles, parts of the depth, the choice of units.
#pragma once
#include "common/launch.cuh"
#include "task_layers/task_linear_kernel.cuh"

namespace fastmeta::task_layers::cuda {

// Sizes of a product, from which alone it is decided into how many parts the depth is split.
struct ProductShape {
  int64_t tasks, groups, rows, columns, depth;

  int64_t row_tiles() const { return ceil_div(rows, kTile); }
  int64_t column_tiles() const { return ceil_div(columns, kTile); }
  int64_t tiles() const { return tasks * groups * row_tiles() * column_tiles(); }
  int64_t size() const { return tasks * groups * rows * columns; }
  // As many parts as leave kEnoughBlocks, two a multiprocessor on the largest GPUs, of sums that
  // are still long.
  int64_t part_depth() const {
    constexpr int64_t kEnoughBlocks = 256, kLeastDepth = 256;
    const int64_t wanted = ceil_div(kEnoughBlocks, std::max<int64_t>(1, tiles()));
    const int64_t parts = std::max<int64_t>(1, std::min(wanted, depth / kLeastDepth));
    return std::max<int64_t>(1, ceil_div(ceil_div(depth, parts), kDeepestChunk)) * kDeepestChunk;
  }
  int64_t parts() const { return std::max<int64_t>(1, ceil_div(depth, part_depth())); }
  int64_t workspace(DType dtype) const {
    return parts() == 1 ? 0 : parts() * size() * (dtype == DType::kFloat64 ? 8 : 4);
  }
};

template <class scalar_t, class Right>
void launch_product(const char* what, const ProductShape& shape, const Matrix<scalar_t>& left,
                    const Right& right, Result<scalar_t> out, bool allow_tf32, void* workspace,
                    void* stream) {
  using acc = acc_t<scalar_t>;
  out.size = shape.size();
  out.partial = shape.parts() > 1 ? static_cast<acc*>(workspace) : nullptr;
  const ProductParams<scalar_t, Right> params{
      shape.tasks,          shape.groups, shape.parts(), shape.row_tiles(),
      shape.column_tiles(), shape.rows,   shape.columns, shape.depth,
      shape.part_depth(),   left,         right,         out};
  const Geometry blocks = geometry(shape.tiles() * shape.parts(), kThreads);
  bool tensor = false;
  if constexpr (!std::is_same_v<scalar_t, double>) {
    constexpr bool rounds = std::is_same_v<scalar_t, float>;  // to TF32
    tensor = (allow_tf32 || !rounds) && has_tensor_cores();
    if (tensor) launch(what, product_kernel<scalar_t, Right, true>, blocks, stream, params);
  }
  if (!tensor) launch(what, product_kernel<scalar_t, Right, false>, blocks, stream, params);
  if (out.partial != nullptr) {
    launch("task_layers: sums of parts", sum_parts_kernel<scalar_t>,
           geometry(ceil_div(out.size, kThreads), kThreads), stream, out.partial, shape.parts(),
           out.size, out.data);
  }
}

}  // namespace fastmeta::task_layers::cuda
