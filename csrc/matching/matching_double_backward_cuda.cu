// Launches of the double backward of matching_attention and matching_nll on the caller's stream.
#include "matching/matching_double_backward_kernel.cuh"
#include "matching/matching_launch.cuh"

namespace fastmeta::matching::cuda {
namespace {

// Parts of the workspace, in the accumulation type. Made without memory they are only counted.
template <class scalar_t>
struct SecondScratch {
  using acc = acc_t<scalar_t>;
  // Gradients that wait for the next tile: float32 and float64 leave them in the output.
  acc* sums;
  acc *query_factor, *support_factor, *query_stretch, *support_stretch;  // cosine
  acc* grad_sum;                                                         // attention
  acc *reference, *move, *scale_partial, *weight_partial;
  int64_t bytes;

  SecondScratch(const Problem& p, void* memory) {
    Parts<acc> parts(memory);
    const int64_t queries = p.num_tasks * p.num_queries, supports = p.num_tasks * p.num_supports;
    const int64_t blocks = p.num_tasks * row_blocks(p.num_queries);
    const bool cosine = p.similarity == Similarity::kCosine;
    const bool waits = !std::is_same_v<scalar_t, acc> && p.dim > kTile &&
                       std::max(p.num_queries, p.num_supports) > kOthers;
    sums = parts.take(waits, std::max(queries, supports) * p.dim);  // first: aligned for packs
    query_factor = parts.take(cosine, queries);
    support_factor = parts.take(cosine, supports);
    query_stretch = parts.take(cosine, queries);
    support_stretch = parts.take(cosine, supports);
    grad_sum = parts.take(p.targets == nullptr, queries);
    reference = parts.take(true, queries);
    move = parts.take(true, queries);
    scale_partial = parts.take(true, blocks);
    weight_partial = parts.take(p.similarity == Similarity::kAdditive, blocks * p.dim);
    bytes = parts.bytes();
  }
};

template <class scalar_t>
void launch_stretch(const scalar_t* rows, const scalar_t* dots, const acc_t<scalar_t>* factor,
                    int64_t num_rows, int64_t dim, acc_t<scalar_t>* stretch, void* stream) {
  launch("matching_double_backward: row stretches", stretch_kernel<scalar_t>,
         geometry(ceil_div(num_rows, kRowsPerBlock), kThreads), stream, rows, dots, factor,
         num_rows, dim, stretch);
}

template <class scalar_t>
SecondParams<scalar_t> second_params(const DoubleBackward& args, const Sorted& sorted,
                                     const SecondScratch<scalar_t>& scratch, void* stream) {
  using acc = acc_t<scalar_t>;
  const Problem& p = args.problem;
  SecondParams<scalar_t> params{};
  params.problem =
      prepare<scalar_t>(p, sorted, scratch.query_factor, scratch.support_factor, stream);
  params.grad = static_cast<const acc*>(args.grad);
  params.out = static_cast<const acc*>(args.out);
  params.lse = static_cast<const acc*>(args.lse);
  params.grad_sum = scratch.grad_sum;
  params.scale_partial = scratch.scale_partial;
  params.weight_partial = scratch.weight_partial;
  params.query_dot = static_cast<const scalar_t*>(args.query_dot);
  params.support_dot = static_cast<const scalar_t*>(args.support_dot);
  params.scale_dot = static_cast<const acc*>(args.scale_dot);
  params.weight_dot = static_cast<const acc*>(args.weight_dot);
  params.reference = scratch.reference;
  params.move = scratch.move;
  params.grad_grad = static_cast<acc*>(args.grad_grad);
  params.slices = static_cast<int>(std::max<int64_t>(1, ceil_div(p.dim, kTile)));  // D = 0: sums
  const auto packs = [&](const void* rows) {
    return packable(static_cast<const scalar_t*>(rows), p.dim);
  };
  params.problem.vector = params.problem.vector && packs(args.query_dot) &&
                          packs(args.support_dot) && packs(args.grad_query) &&
                          packs(args.grad_support);
  if (p.similarity == Similarity::kCosine) {
    const int64_t queries = p.num_tasks * p.num_queries, supports = p.num_tasks * p.num_supports;
    if (params.query_dot != nullptr) {
      launch_stretch(params.problem.query, params.query_dot, scratch.query_factor, queries, p.dim,
                     scratch.query_stretch, stream);
      params.query_stretch = scratch.query_stretch;
    }
    if (params.support_dot != nullptr) {
      launch_stretch(params.problem.support, params.support_dot, scratch.support_factor, supports,
                     p.dim, scratch.support_stretch, stream);
      params.support_stretch = scratch.support_stretch;
    }
  }
  return params;
}

template <class scalar_t>
void run(const DoubleBackward& args, const Sorted& sorted, void* workspace, void* stream) {
  using acc = acc_t<scalar_t>;
  const Problem& p = args.problem;
  const SecondScratch<scalar_t> scratch(p, workspace);
  SecondParams<scalar_t> params = second_params(args, sorted, scratch, stream);
  launch_grad_sum(p, params.grad, params.out, scratch.grad_sum, stream);
  dispatch_product(p, [&](auto product) {
    using Product = decltype(product);
    params.row_blocks = row_blocks(p.num_queries);
    launch("matching_double_backward: class means", class_means_kernel<scalar_t, Product>,
           geometry(p.num_tasks * params.row_blocks, kThreads, sizeof(SecondShared<acc>)), stream,
           params);
    const auto launch_side = [&](bool owns_queries, int64_t rows, void* grad_rows) {
      params.owns_queries = owns_queries;
      params.row_blocks = row_blocks(rows);
      params.block_slices = backward_slices(p.num_tasks * params.row_blocks, params.slices);
      params.parts = (params.slices + params.block_slices - 1) / params.block_slices;
      params.grad_rows = static_cast<scalar_t*>(grad_rows);
      params.sums = scratch.sums;
      if constexpr (std::is_same_v<scalar_t, acc>) params.sums = params.grad_rows;
      launch("matching_double_backward", second_kernel<scalar_t, Product>,
             geometry(p.num_tasks * params.row_blocks * params.parts, kThreads,
                      sizeof(SecondShared<acc>)),
             stream, params);
    };
    launch_side(true, p.num_queries, args.grad_query);
    launch_side(false, p.num_supports, args.grad_support);
  });
  launch_totals(p, scratch.scale_partial, row_blocks(p.num_queries), 1, args.grad_scale, stream);
  if (p.similarity == Similarity::kAdditive) {
    launch_totals(p, scratch.weight_partial, row_blocks(p.num_queries), p.dim, args.grad_weight,
                  stream);
  }
}

}  // namespace

int64_t double_backward_workspace(const Problem& problem) {
  int64_t bytes = 0;
  dispatch(problem.dtype, [&](auto type) {
    bytes = SecondScratch<typename decltype(type)::type>(problem, nullptr).bytes;
  });
  return bytes;
}

void double_backward(const DoubleBackward& args, const Sorted& sorted, void* workspace,
                     void* stream) {
  dispatch(args.problem.dtype,
           [&](auto type) { run<typename decltype(type)::type>(args, sorted, workspace, stream); });
}

}  // namespace fastmeta::matching::cuda
