// Launches of matching_attention and matching_nll on the caller's stream.
#include "matching/class_order_kernel.cuh"
#include "matching/matching_attention_kernel.cuh"
#include "matching/matching_launch.cuh"

namespace fastmeta::matching::cuda {
namespace {

// Of fewer tiles, the merge costs what the split saves.
constexpr int64_t kLeastTiles = 4;

// Blocks of the forward that fill the device.
int64_t enough_forward_blocks(const Problem& p) {
  int64_t blocks = 0;
  dispatch(p.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    dispatch_tensor_product<scalar_t>(p, [&](auto product) {
      blocks = forward_blocks<decltype(product), acc_t<scalar_t>, false>(capability());
    });
  });
  return blocks * multiprocessors();
}

Splits forward_splits(const Problem& p) {
  return splits_of(p.num_tasks * row_blocks(p.num_queries), p.num_supports, kLeastTiles,
                   enough_forward_blocks(p));
}

// The parts of the forward's workspace.
template <class acc>
struct ForwardScratch {
  acc *query_factor, *support_factor;  // cosine
  SplitSums<acc>* partial;             // nullptr where supports are not split
  int64_t bytes;

  ForwardScratch(const Problem& p, void* memory) {
    Parts<acc> parts(memory);
    const int64_t queries = p.num_tasks * p.num_queries, supports = p.num_tasks * p.num_supports;
    query_factor = parts.take(p.similarity == Similarity::kCosine, queries);
    support_factor = parts.take(p.similarity == Similarity::kCosine, supports);
    const int64_t splits = forward_splits(p).count;
    acc* const sums = parts.take(splits > 1, queries * splits * kSumsElements);
    partial = splits > 1 ? reinterpret_cast<SplitSums<acc>*>(sums) : nullptr;
    bytes = parts.bytes();
  }

 private:
  static constexpr int64_t kSumsElements = sizeof(SplitSums<acc>) / sizeof(acc);
};

// How the blocks of a side share the work: the rows they own, the features, and the rows of the
// other side, which they stream.
template <class Product, class acc>
struct SidePlan {
  int64_t row_blocks;
  int slices, block_slices, parts, tiles;
  Splits splits;

  SidePlan(const Problem& p, bool owns_queries) {
    const int64_t rows = owns_queries ? p.num_queries : p.num_supports;
    const int64_t others = owns_queries ? p.num_supports : p.num_queries;
    const int64_t others_tiles = ceil_div(others, kTile);
    row_blocks = cuda::row_blocks(rows);
    // One where D = 0, for the sums over rows.
    slices = static_cast<int>(std::max<int64_t>(1, ceil_div(p.dim, kSlice<Product, acc>)));
    const bool keeps = slices > 1 && others_tiles <= kMaxTiles<acc>;
    tiles = keeps ? static_cast<int>(std::max<int64_t>(1, others_tiles)) : 1;
    block_slices = keeps ? backward_slices(p.num_tasks * row_blocks, slices) : 1;
    parts = (slices + block_slices - 1) / block_slices;
    splits = splits_of(p.num_tasks * row_blocks * parts, others, 2 * kLeastTiles, enough_blocks());
  }
  // Elements of what a block leaves where others have the rest of the rows it streams.
  int64_t partial_rows(const Problem& p, bool owns_queries) const {
    if (splits.count == 1) return 0;
    return splits.count * p.num_tasks * (owns_queries ? p.num_queries : p.num_supports);
  }
};

// The same for the backward.
template <class acc>
struct BackwardScratch {
  // Where a side is split, its gradients by splits, and sums of dL/dz * similarity; [1] of the
  // queries. First: aligned for packs.
  acc *partial[2], *partial_sum[2];
  acc *query_factor, *support_factor, *grad_sum, *scale_partial, *weight_partial;
  int64_t bytes;

  template <class Product>
  BackwardScratch(Product, const Problem& p, void* memory) {
    Parts<acc> parts(memory);
    const SidePlan<Product, acc> sides[2] = {{p, false}, {p, true}};
    for (int side = 0; side < 2; ++side) {
      partial[side] = parts.take(true, sides[side].partial_rows(p, side == 1) * p.dim);
    }
    for (int side = 0; side < 2; ++side) {
      partial_sum[side] = parts.take(true, sides[side].partial_rows(p, side == 1));
    }
    const int64_t queries = p.num_tasks * p.num_queries, supports = p.num_tasks * p.num_supports;
    const int64_t blocks = p.num_tasks * sides[1].row_blocks * sides[1].splits.count;
    query_factor = parts.take(p.similarity == Similarity::kCosine, queries);
    support_factor = parts.take(p.similarity == Similarity::kCosine, supports);
    grad_sum = parts.take(p.targets == nullptr, queries);
    scale_partial = parts.take(true, blocks);
    weight_partial = parts.take(p.similarity == Similarity::kAdditive, blocks * p.dim);
    bytes = parts.bytes();
  }
};

template <class scalar_t>
void run_forward(const Forward& args, const Sorted& sorted, void* workspace, void* stream) {
  using acc = acc_t<scalar_t>;
  const Problem& p = args.problem;
  ForwardParams<scalar_t> params{};
  const ForwardScratch<acc> scratch(p, workspace);
  const Splits splits = forward_splits(p);
  params.problem =
      prepare<scalar_t>(p, sorted, scratch.query_factor, scratch.support_factor, stream);
  params.splits = splits.count;
  params.split_size = splits.size;
  params.partial = scratch.partial;
  params.query_blocks = row_blocks(p.num_queries);
  params.out = static_cast<acc*>(args.out);
  params.lse = static_cast<acc*>(args.lse);
  params.scores = static_cast<acc*>(args.scores);
  dispatch_tensor_product<scalar_t>(p, [&](auto product) {
    using Product = decltype(product);
    const auto kernel = params.scores == nullptr ? forward_kernel<scalar_t, Product, false>
                                                 : forward_kernel<scalar_t, Product, true>;
    launch("matching_attention", kernel,
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

template <class scalar_t, class Product>
void run_backward(Product product, const Backward& args, const Sorted& sorted, void* workspace,
                  void* stream) {
  using acc = acc_t<scalar_t>;
  const Problem& p = args.problem;
  const BackwardScratch<acc> scratch(product, p, workspace);
  BackwardParams<scalar_t> params{};
  params.problem =
      prepare<scalar_t>(p, sorted, scratch.query_factor, scratch.support_factor, stream);
  params.grad = static_cast<const acc*>(args.grad);
  params.out = static_cast<const acc*>(args.out);
  params.lse = static_cast<const acc*>(args.lse);
  params.grad_sum = scratch.grad_sum;
  params.scores = static_cast<const acc*>(args.scores);
  params.scale_partial = scratch.scale_partial;
  params.weight_partial = scratch.weight_partial;
  const auto* grad_query = static_cast<const scalar_t*>(args.grad_query);
  const auto* grad_support = static_cast<const scalar_t*>(args.grad_support);
  params.problem.vector =
      params.problem.vector && packable(grad_query, p.dim) && packable(grad_support, p.dim);
  const auto side_of = [&](bool owns_queries) {
    const SidePlan<Product, acc> plan(p, owns_queries);
    BackwardParams<scalar_t> side = params;
    side.row_blocks = plan.row_blocks;
    side.slices = plan.slices;
    side.block_slices = plan.block_slices;
    side.parts = plan.parts;
    side.tiles = plan.tiles;
    side.splits = plan.splits.count;
    side.work_items = p.num_tasks * side.row_blocks * side.parts * side.splits;
    side.blocks = geometry(std::min(side.work_items, kMaxGrid / 2), kThreads).grid;
    side.split_size = plan.splits.size;
    if (plan.splits.count > 1) side.partial = scratch.partial[owns_queries];
    side.partial_sum = scratch.partial_sum[owns_queries];
    side.grad_rows = static_cast<scalar_t*>(owns_queries ? args.grad_query : args.grad_support);
    return side;
  };
  const BackwardParams<scalar_t> queries = side_of(true), supports = side_of(false);

  launch_grad_sum(p, params.grad, params.out, scratch.grad_sum, stream);
  launch("matching_attention_backward", backward_kernel<scalar_t, Product>,
         {queries.blocks + supports.blocks, kThreads,
          sizeof(BackwardShared<Product, acc>) +
              std::max(queries.tiles, supports.tiles) * sizeof(SlopeTile<Product, acc>)},
         stream, queries, supports);
  const auto merge = [&](auto kernel, const BackwardParams<scalar_t>& side, int64_t rows) {
    if (side.partial == nullptr) return;
    const int64_t packs = params.problem.vector ? p.dim / kPack : p.dim;
    launch("matching_attention_backward: splits", kernel,
           geometry(ceil_div(p.num_tasks * rows * packs, kThreads), kThreads), stream, side);
  };
  merge(merge_gradients_kernel<scalar_t, true>, queries, p.num_queries);
  merge(merge_gradients_kernel<scalar_t, false>, supports, p.num_supports);

  const int64_t blocks = queries.row_blocks * queries.splits;
  launch_totals(p, scratch.scale_partial, blocks, 1, args.grad_scale, stream);
  if (p.similarity == Similarity::kAdditive) {
    launch_totals(p, scratch.weight_partial, blocks, p.dim, args.grad_weight, stream);
  }
}

}  // namespace

int64_t scores_size(const Problem& problem) {
  const int64_t pairs = problem.num_queries * problem.num_supports;
  const int64_t elements = (problem.num_queries + problem.num_supports) * problem.dim;
  bool small = false;  // at most half of the memory of query and support
  dispatch(problem.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    const auto scalar_bytes = static_cast<int64_t>(sizeof(scalar_t));
    const auto acc_bytes = static_cast<int64_t>(sizeof(acc_t<scalar_t>));
    small = 2 * pairs * acc_bytes <= elements * scalar_bytes;
  });
  return small ? pairs : 0;
}

bool sorts_by_class(const Problem& problem) {
  return problem.num_supports <= kOrderRows && problem.num_classes <= kOrderClasses;
}

void sort_by_class(const Problem& problem, int64_t* order, int64_t* class_start, void* stream) {
  launch("matching_attention: class order", class_order_kernel,
         geometry(problem.num_tasks, kOrderThreads, sizeof(ClassOrderShared)), stream,
         problem.labels, problem.num_tasks, problem.num_supports, problem.num_classes, order,
         class_start);
}

int64_t forward_workspace(const Problem& problem) {
  const bool wide = problem.dtype == DType::kFloat64;
  return wide ? ForwardScratch<double>(problem, nullptr).bytes
              : ForwardScratch<float>(problem, nullptr).bytes;
}

void forward(const Forward& args, const Sorted& sorted, void* workspace, void* stream) {
  dispatch(args.problem.dtype, [&](auto type) {
    run_forward<typename decltype(type)::type>(args, sorted, workspace, stream);
  });
}

int64_t backward_workspace(const Problem& problem) {
  int64_t bytes = 0;
  dispatch(problem.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    dispatch_tensor_product<scalar_t>(problem, [&](auto product) {
      bytes = BackwardScratch<acc_t<scalar_t>>(product, problem, nullptr).bytes;
    });
  });
  return bytes;
}

void backward(const Backward& args, const Sorted& sorted, void* workspace, void* stream) {
  dispatch(args.problem.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    dispatch_tensor_product<scalar_t>(args.problem, [&](auto product) {
      run_backward<scalar_t>(product, args, sorted, workspace, stream);
    });
  });
}

}  // namespace fastmeta::matching::cuda
