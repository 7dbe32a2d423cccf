// Launches of matching_attention and matching_nll on the caller's stream.
#include "common/launch.cuh"
#include "matching/matching_attention.h"
#include "matching/matching_attention_kernel.cuh"
#include "matching/matching_backward_kernel.cuh"

namespace fastmeta::matching::cuda {
namespace {

constexpr int64_t kRowsPerBlock = kThreads / kWarpSize;  // of kernels that give a row a warp

int64_t row_blocks(int64_t rows) { return ceil_div(rows, kTile); }

// Scratch in the accumulation type, in this order; each part may be empty.
struct Workspace {
  int64_t query_factor, support_factor, grad_sum, scale_partial, weight_partial;  // elements

  int64_t bytes(DType dtype) const {
    const int64_t elements =
        query_factor + support_factor + grad_sum + scale_partial + weight_partial;
    return elements * (dtype == DType::kFloat64 ? 8 : 4);
  }
};

Workspace workspace_of(const Problem& p, bool backward) {
  const bool scales = p.similarity == Similarity::kCosine;
  const bool weighs = p.similarity == Similarity::kAdditive;
  const int64_t queries = p.num_tasks * p.num_queries;
  const int64_t blocks = p.num_tasks * row_blocks(p.num_queries);
  Workspace sizes{scales ? queries : 0, scales ? p.num_tasks * p.num_supports : 0, 0, 0, 0};
  if (backward) {
    sizes.grad_sum = p.targets == nullptr ? queries : 0;
    sizes.scale_partial = blocks;
    sizes.weight_partial = weighs ? blocks * p.dim : 0;
  }
  return sizes;
}

template <class scalar_t>
void launch_inverse_length(const scalar_t* rows, int64_t num_rows, int64_t dim,
                           acc_t<scalar_t>* factor, void* stream) {
  launch("matching_attention: row lengths", inverse_length_kernel<scalar_t>,
         geometry(ceil_div(num_rows, kRowsPerBlock), kThreads), stream, rows, num_rows, dim,
         factor);
}

// The problem as kernels see it; for cosine also launches what fills the rows' factors.
template <class scalar_t>
ProblemParams<scalar_t> prepare(const Problem& p, const Sorted& sorted, const Workspace& sizes,
                                acc_t<scalar_t>* workspace, void* stream) {
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
    acc* support_factor = workspace + sizes.query_factor;
    launch_inverse_length(params.query, sizes.query_factor, p.dim, workspace, stream);
    launch_inverse_length(params.support, sizes.support_factor, p.dim, support_factor, stream);
    params.query_factor = workspace;
    params.support_factor = support_factor;
  }
  return params;
}

// Calls body(Product{}) for what the similarity sums up over the features, and with what.
template <class scalar_t, class Body>
void dispatch_product(const Problem& p, Body&& body) {
  switch (p.similarity) {
    case Similarity::kDot:
    case Similarity::kCosine:
      if constexpr (!std::is_same_v<scalar_t, double>) {
        const bool rounds = std::is_same_v<scalar_t, float>;  // to TF32
        if ((p.allow_tf32 || !rounds) && has_tensor_cores()) return body(TensorDot{});
      }
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

// Slices that a backward block takes: as many as leave kEnoughBlocks, two a multiprocessor on the
// largest GPUs.
int backward_slices(int64_t row_blocks, int64_t slices) {
  constexpr int64_t kEnoughBlocks = 256;
  const int64_t parts = ceil_div(kEnoughBlocks, std::max<int64_t>(1, row_blocks));
  return static_cast<int>(ceil_div(slices, std::min(parts, slices)));
}

template <class scalar_t>
void run_forward(const Forward& args, const Sorted& sorted, void* workspace, void* stream) {
  using acc = acc_t<scalar_t>;
  const Problem& p = args.problem;
  ForwardParams<scalar_t> params{};
  params.problem =
      prepare<scalar_t>(p, sorted, workspace_of(p, false), static_cast<acc*>(workspace), stream);
  params.query_blocks = row_blocks(p.num_queries);
  params.out = static_cast<acc*>(args.out);
  params.lse = static_cast<acc*>(args.lse);
  dispatch_product<scalar_t>(p, [&](auto product) {
    using Product = decltype(product);
    launch(
        "matching_attention", forward_kernel<scalar_t, Product>,
        geometry(p.num_tasks * params.query_blocks, kThreads, sizeof(ForwardShared<Product, acc>)),
        stream, params);
  });
}

template <class scalar_t>
void run_backward(const Backward& args, const Sorted& sorted, void* workspace, void* stream) {
  using acc = acc_t<scalar_t>;
  const Problem& p = args.problem;
  const Workspace sizes = workspace_of(p, true);
  acc* scratch = static_cast<acc*>(workspace);
  acc* grad_sum = scratch + sizes.query_factor + sizes.support_factor;
  acc* scale_partial = grad_sum + sizes.grad_sum;
  acc* weight_partial = scale_partial + sizes.scale_partial;

  BackwardParams<scalar_t> params{};
  params.problem = prepare<scalar_t>(p, sorted, sizes, scratch, stream);
  params.grad = static_cast<const acc*>(args.grad);
  params.out = static_cast<const acc*>(args.out);
  params.lse = static_cast<const acc*>(args.lse);
  params.grad_sum = grad_sum;
  params.scale_partial = scale_partial;
  params.weight_partial = weight_partial;
  const auto* grad_query = static_cast<const scalar_t*>(args.grad_query);
  const auto* grad_support = static_cast<const scalar_t*>(args.grad_support);
  params.problem.vector =
      params.problem.vector && packable(grad_query, p.dim) && packable(grad_support, p.dim);

  launch("matching_attention_backward: sums of grad", grad_sum_kernel<acc>,
         geometry(ceil_div(sizes.grad_sum, kRowsPerBlock), kThreads), stream, params.grad,
         sorted.class_start, p.num_tasks, p.num_queries, p.num_classes, grad_sum);
  dispatch_product<scalar_t>(p, [&](auto product) {
    using Product = decltype(product);
    // One where D = 0, for the sums over rows.
    params.slices = static_cast<int>(std::max<int64_t>(1, ceil_div(p.dim, kSlice<Product, acc>)));
    const auto launch_side = [&](auto kernel, int64_t rows, int64_t others, void* grad_rows) {
      const int64_t tiles = ceil_div(others, kTile);
      const bool keeps = params.slices > 1 && tiles <= kMaxTiles<acc>;
      params.row_blocks = row_blocks(rows);
      params.tiles = keeps ? static_cast<int>(std::max<int64_t>(1, tiles)) : 1;
      params.block_slices =
          keeps ? backward_slices(p.num_tasks * params.row_blocks, params.slices) : 1;
      params.parts = (params.slices + params.block_slices - 1) / params.block_slices;
      params.grad_rows = static_cast<scalar_t*>(grad_rows);
      launch("matching_attention_backward", kernel,
             geometry(p.num_tasks * params.row_blocks * params.parts, kThreads,
                      sizeof(BackwardShared<Product, acc>) +
                          params.tiles * sizeof(SlopeTile<Product, acc>)),
             stream, params);
    };
    launch_side(backward_kernel<scalar_t, Product, true>, p.num_queries, p.num_supports,
                args.grad_query);
    launch_side(backward_kernel<scalar_t, Product, false>, p.num_supports, p.num_queries,
                args.grad_support);
  });

  const auto launch_sum = [&](const acc* partial, int64_t width, void* sum) {
    launch("matching_attention_backward: totals", sum_partials_kernel<acc>,
           geometry(ceil_div(p.num_tasks * width, kThreads), kThreads), stream, partial,
           p.num_tasks, row_blocks(p.num_queries), width, static_cast<acc*>(sum));
  };
  launch_sum(scale_partial, 1, args.grad_scale);
  if (p.similarity == Similarity::kAdditive) launch_sum(weight_partial, p.dim, args.grad_weight);
}

}  // namespace

int64_t forward_workspace(const Problem& problem) {
  return workspace_of(problem, false).bytes(problem.dtype);
}

void forward(const Forward& args, const Sorted& sorted, void* workspace, void* stream) {
  dispatch(args.problem.dtype, [&](auto type) {
    run_forward<typename decltype(type)::type>(args, sorted, workspace, stream);
  });
}

int64_t backward_workspace(const Problem& problem) {
  return workspace_of(problem, true).bytes(problem.dtype);
}

void backward(const Backward& args, const Sorted& sorted, void* workspace, void* stream) {
  dispatch(args.problem.dtype, [&](auto type) {
    run_backward<typename decltype(type)::type>(args, sorted, workspace, stream);
  });
}

}  // namespace fastmeta::matching::cuda
