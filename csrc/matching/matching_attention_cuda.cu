// Launches of matching_attention and matching_nll on the caller's stream.
#include "matching/matching_attention_kernel.cuh"
#include "matching/matching_launch.cuh"

namespace fastmeta::matching::cuda {
namespace {

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

// Parts of the supports that blocks of the forward share: as many as make blocks enough, each of
// kLeastTiles and more; one where the queries make enough.
struct Splits {
  int64_t count, size;
};

Splits forward_splits(const Problem& p) {
  constexpr int64_t kLeastTiles = 4;  // of fewer, the merge costs what the split saves
  const int64_t blocks = std::max<int64_t>(1, p.num_tasks * row_blocks(p.num_queries));
  const int64_t tiles = std::max<int64_t>(1, ceil_div(p.num_supports, kTile));
  const int64_t wanted = std::min(enough_blocks() / blocks, tiles / kLeastTiles);
  const int64_t split_tiles = ceil_div(tiles, std::max<int64_t>(1, wanted));
  return {ceil_div(tiles, split_tiles), split_tiles * kTile};
}

template <class acc>
int64_t split_bytes(const Problem& p) {
  const int64_t splits = forward_splits(p).count;
  const auto bytes = static_cast<int64_t>(sizeof(SplitSums<acc>));
  return splits > 1 ? p.num_tasks * p.num_queries * splits * bytes : 0;
}

template <class scalar_t>
void run_forward(const Forward& args, const Sorted& sorted, void* workspace, void* stream) {
  using acc = acc_t<scalar_t>;
  const Problem& p = args.problem;
  ForwardParams<scalar_t> params{};
  const Workspace sizes = workspace_of(p, false);
  const Splits splits = forward_splits(p);
  acc* scratch = static_cast<acc*>(workspace);
  params.problem = prepare<scalar_t>(p, sorted, scratch, scratch + sizes.query_factor, stream);
  params.splits = splits.count;
  params.split_size = splits.size;
  if (splits.count > 1) {
    acc* rest = scratch + sizes.query_factor + sizes.support_factor;
    params.partial = reinterpret_cast<SplitSums<acc>*>(rest);
  }
  params.query_blocks = row_blocks(p.num_queries);
  params.out = static_cast<acc*>(args.out);
  params.lse = static_cast<acc*>(args.lse);
  dispatch_tensor_product<scalar_t>(p, [&](auto product) {
    using Product = decltype(product);
    launch("matching_attention", forward_kernel<scalar_t, Product>,
           geometry(p.num_tasks * params.query_blocks * params.splits, kThreads,
                    sizeof(ForwardShared<Product, acc>)),
           stream, params);
  });
  if (params.partial == nullptr) return;
  launch("matching_attention: splits", merge_splits_kernel<acc>,
         geometry(ceil_div(p.num_tasks * p.num_queries, kRowsPerBlock), kThreads), stream,
         params.partial, sorted.class_start, p.targets, p.num_tasks, p.num_queries, p.num_classes,
         params.splits, params.split_size, params.out, params.lse);
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
  params.problem = prepare<scalar_t>(p, sorted, scratch, scratch + sizes.query_factor, stream);
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

  launch_grad_sum(p, sorted, params.grad, grad_sum, stream);
  dispatch_tensor_product<scalar_t>(p, [&](auto product) {
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

  launch_totals(p, scale_partial, 1, args.grad_scale, stream);
  if (p.similarity == Similarity::kAdditive) {
    launch_totals(p, weight_partial, p.dim, args.grad_weight, stream);
  }
}

}  // namespace

int64_t forward_workspace(const Problem& problem) {
  const bool wide = problem.dtype == DType::kFloat64;
  return workspace_of(problem, false).bytes(problem.dtype) +
         (wide ? split_bytes<double>(problem) : split_bytes<float>(problem));
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
