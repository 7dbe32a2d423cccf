// What the launchers of matching attention share: the problem as kernels see it, dispatch over what
// a similarity sums up, and how many slices of features a block takes.
#pragma once
#include "common/launch.cuh"
#include "matching/matching_attention.h"
#include "matching/matching_backward_kernel.cuh"

namespace fastmeta::matching::cuda {

inline constexpr int64_t kRowsPerBlock = kThreads / kWarpSize;  // of kernels that give a row a warp

inline int64_t row_blocks(int64_t rows) { return ceil_div(rows, kTile); }

template <class scalar_t>
void launch_inverse_length(const scalar_t* rows, int64_t num_rows, int64_t dim,
                           acc_t<scalar_t>* factor, void* stream) {
  launch("matching_attention: row lengths", inverse_length_kernel<scalar_t>,
         geometry(ceil_div(num_rows, kRowsPerBlock), kThreads), stream, rows, num_rows, dim,
         factor);
}

// The problem as kernels see it; for cosine also launches what fills the rows' factors.
template <class scalar_t>
ProblemParams<scalar_t> prepare(const Problem& p, const Sorted& sorted,
                                acc_t<scalar_t>* query_factor, acc_t<scalar_t>* support_factor,
                                void* stream) {
  using acc = acc_t<scalar_t>;
  ProblemParams<scalar_t> params{};
  params.similarity = p.similarity;
  params.num_tasks = p.num_tasks;
  params.num_queries = p.num_queries;
  params.num_supports = p.num_supports;
  params.num_classes = p.num_classes;
  params.dim = p.dim;
  params.scale_stride = p.scale_stride;
  params.weight_stride = p.weight_stride;
  params.query = static_cast<const scalar_t*>(p.query);
  params.support = static_cast<const scalar_t*>(p.support);
  params.labels = p.labels;
  params.targets = p.targets;
  params.scale = static_cast<const acc*>(p.scale);
  params.order = sorted.order;
  params.class_start = sorted.class_start;
  params.vector = packable(params.query, p.dim) && packable(params.support, p.dim);
  if (p.similarity == Similarity::kAdditive) params.weight = static_cast<const acc*>(p.weight);
  if (p.similarity == Similarity::kCosine) {
    launch_inverse_length(params.query, p.num_tasks * p.num_queries, p.dim, query_factor, stream);
    launch_inverse_length(params.support, p.num_tasks * p.num_supports, p.dim, support_factor,
                          stream);
    params.query_factor = query_factor;
    params.support_factor = support_factor;
  }
  return params;
}

// sum[t, q] of grad over the classes that have a probability, for attention.
template <class acc>
void launch_grad_sum(const Problem& p, const acc* grad, const acc* log_p, acc* sum, void* stream) {
  if (p.targets != nullptr) return;
  const int64_t rows = p.num_tasks * p.num_queries;
  launch("matching_attention: sums of grad", grad_sum_kernel<acc>,
         geometry(ceil_div(rows, kRowsPerBlock), kThreads), stream, grad, log_p, rows,
         p.num_classes, sum);
}

// sum[t, 0..width) of the partial sums of the task's blocks.
template <class acc>
void launch_totals(const Problem& p, const acc* partial, int64_t blocks, int64_t width, void* sum,
                   void* stream) {
  launch("matching_attention: totals", sum_partials_kernel<acc>,
         geometry(ceil_div(p.num_tasks * width, kThreads), kThreads), stream, partial, p.num_tasks,
         blocks, width, static_cast<acc*>(sum));
}

// Calls body(Product{}) for what the similarity sums up over the features, on FP32 (FP64) units.
template <class Body>
void dispatch_product(const Problem& p, Body&& body) {
  switch (p.similarity) {
    case Similarity::kDot:
    case Similarity::kCosine:
      return body(DotProduct{});
    case Similarity::kSqEuclidean:
    case Similarity::kEuclidean:
      return body(SquaredDifference{});
    case Similarity::kAdditive:
      return body(WeightedTanh{});
  }
  throw std::runtime_error("fastmeta: unknown similarity " +
                           std::to_string(static_cast<int>(p.similarity)));
}

// The same, on tensor cores where they may be used.
template <class scalar_t, class Body>
void dispatch_tensor_product(const Problem& p, Body&& body) {
  if constexpr (!std::is_same_v<scalar_t, double>) {
    const bool multiplies = p.similarity == Similarity::kDot || p.similarity == Similarity::kCosine;
    const bool rounds = std::is_same_v<scalar_t, float>;  // to TF32
    if (multiplies && (p.allow_tf32 || !rounds) && has_tensor_cores()) return body(TensorDot{});
  }
  dispatch_product(p, body);
}

// Hands out parts of a workspace, one after another; without memory it only counts.
template <class acc>
class Parts {
 public:
  explicit Parts(void* memory) : memory_(static_cast<acc*>(memory)) {}
  acc* take(bool needed, int64_t elements) {
    acc* const part = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += needed ? elements : 0;
    return part;
  }
  int64_t bytes() const { return used_ * static_cast<int64_t>(sizeof(acc)); }

 private:
  acc* memory_;
  int64_t used_ = 0;
};

// Blocks that fill the device: two a multiprocessor.
inline int64_t enough_blocks() { return 2 * int64_t{multiprocessors()}; }

// Parts of the rows that blocks stream, for blocks that would be too few: as many as make blocks
// enough, each of `least` tiles and more. One where there are enough.
struct Splits {
  int64_t count, size;  // rows of a part
};

inline Splits splits_of(int64_t blocks, int64_t rows, int64_t least, int64_t enough) {
  const int64_t tiles = std::max<int64_t>(1, ceil_div(rows, kTile));
  const int64_t wanted = std::min(enough / std::max<int64_t>(1, blocks), tiles / least);
  const int64_t tiles_of_part = ceil_div(tiles, std::max<int64_t>(1, wanted));
  return {ceil_div(tiles, tiles_of_part), tiles_of_part * kTile};
}

// Slices that a backward block takes: as many as leave blocks enough.
inline int backward_slices(int64_t row_blocks, int64_t slices) {
  const int64_t parts = ceil_div(enough_blocks(), std::max<int64_t>(1, row_blocks));
  return static_cast<int>(ceil_div(slices, std::min(parts, slices)));
}

}  // namespace fastmeta::matching::cuda
