// Device code of the double backward of matching_attention and matching_nll: the formulas of
// matching_attention.h, in three passes over the pairs.
//
// First class_means_kernel, a block for 64 queries, streams the valid supports in class order and
// makes m, M and from them the gradient of grad. Then second_kernel, twice: a block owns 64 queries
// and streams the valid supports (also partial sums for scale and weight), or owns 64 supports and
// streams the queries. Every output has one owner, nothing is added atomically, and nothing of
// size Q x S leaves a block. Similarities are taken relative to that of the query's first support
// wherever they are multiplied by numbers that sum to zero.
//
// - gradients: a tile's coefficients are made once and then multiplied with the other side's rows
//   and directions, 64 features after another. A block that takes several such slices of more than
//   one tile leaves the sums in memory between tiles (`sums`: the output itself, or scratch for
//   16-bit types); one slice stays in registers. Slices are shared by blocks only where row blocks
//   are too few to fill a GPU, and then the tile is made once in each
// - FLOPs: 6 * Q * S * D for a pass's tiles and 4 for a side's gradients, 26 in all for dot
//   products; 30 for differences; for additive a tanh each
// - bytes: a tile reads 2 * b * 96 * D for the pairs and 2 * b * 32 * D for the gradients from L2,
//   with several slices 512 * D more for the sums: 1024 to 1536 * D in float32 for 20480 * D FLOPs
// - bound: by FP32 units, at 13 to 20 FLOPs a byte against a ridge of 4 on A100 (19.5 TFLOP/s at
//   about 5 TB/s of L2) and 12 on H100 (67 at 5.5); T=32, S=25, Q=75, D=512 is 0.8 GFLOP: 41 us
//   and 12 us. Few-shot sizes by the number of blocks, as the forward
// - no tensor cores: pairs with two coefficients of opposite signs would need all of them split in
//   two terms of TF32. Where TF32 made the forward's scores, shares sum to one within its rounding
// - shared memory: 30 KB in float32 and 16-bit types, so two blocks a multiprocessor on every
//   architecture (second_kernel of differences and additive one, by registers); 58 KB in float64,
//   one block where 64 or 100 KB are all there is
// - banks: coefficients have pitch 68: 16-byte stores two ways in conflict, twice a tile, and read
//   at one address by 16 lanes; the streamed rows are stored and read by neighbouring lanes
// - vector width: 16 bytes of float32, 8 of 16-bit types
#pragma once
#include "matching/matching_double_backward_gradient_kernel.cuh"

namespace fastmeta::matching::cuda {

// stretch[row] = <row, dot> * factor^2, for cosine: a warp a row, bound by memory.
template <class scalar_t>
__global__ void __launch_bounds__(kThreads, 4)
    stretch_kernel(const scalar_t* __restrict__ rows, const scalar_t* __restrict__ dots,
                   const acc_t<scalar_t>* __restrict__ factor, int64_t num_rows, int64_t dim,
                   acc_t<scalar_t>* __restrict__ stretch) {
  using acc = acc_t<scalar_t>;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / kWarpSize);
  int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarpSize) + threadIdx.x / kWarpSize;
  for (; row < num_rows; row += warps) {
    const acc scale = factor[row];
    acc sum = 0;
    for (int64_t k = lane; k < dim; k += kWarpSize) {  // scaled first: no square overflows
      sum += scale * to_acc(rows[row * dim + k]) * (scale * to_acc(dots[row * dim + k]));
    }
    sum = lane_sum(sum);
    if (lane == 0) stretch[row] = sum;
  }
}

// Support at `position` of the task's class order as other row `place`.
template <class scalar_t, class acc = acc_t<scalar_t>>
__device__ __forceinline__ void set_other_support(const SecondParams<scalar_t>& params,
                                                  SecondShared<acc>& shared, int place,
                                                  int64_t position, int64_t num_valid) {
  const int64_t first = shared.task * params.problem.num_supports;
  const int64_t row = position < num_valid ? first + params.problem.order[first + position] : -1;
  set_second_support(params, place, row, shared.other, shared.cls);
}

// m, M, reference and the gradient of grad, for attention (m - M) or nll (M - m of the target).
template <class scalar_t, class Product>
__global__ void __launch_bounds__(kThreads, kBlocks<acc_t<scalar_t>>)
    class_means_kernel(const __grid_constant__ SecondParams<scalar_t> params) {
  using acc = acc_t<scalar_t>;
  constexpr int kParts = kThreads / kTile;  // threads of a query when its pairs are summed
  FASTMETA_DYNAMIC_SHARED(SecondShared<acc>, shared);
  const ProblemParams<scalar_t>& p = params.problem;
  const int thread = threadIdx.x, ty = thread / kAcross, tx = thread % kAcross;
  const int i = thread / kParts, part = thread % kParts;
  const bool nll = p.targets != nullptr;

  for (int64_t work = blockIdx.x; work < p.num_tasks * params.row_blocks; work += gridDim.x) {
    const int64_t task = work / params.row_blocks, own0 = work % params.row_blocks * kTile;
    __syncthreads();  // the last work item is done with shared memory
    if (thread == 0) shared->task = task;
    bool active = false;
    if (thread < kTile) {
      const int64_t query = own0 + thread < p.num_queries ? own0 + thread : -1;
      const int64_t row = query < 0 ? -1 : task * p.num_queries + query;
      set_second_query<false>(params, thread, row, shared->own, shared->terms);
      active = shared->own.row[thread] >= 0;
    }
    const bool any_active = __syncthreads_or(active);
    const int64_t* class_start = p.class_start + task * (p.num_classes + 1);
    const int64_t num_valid = any_active ? class_start[p.num_classes] : 0;
    const acc scale = p.scale[task * p.scale_stride];
    const acc scale_dot = params.scale_dot != nullptr ? params.scale_dot[task] : acc(0);

    const int64_t row = shared->own.row[i];
    const acc* out = params.out + row * p.num_classes;  // of attention
    acc* grad_grad = params.grad_grad + row * p.num_classes;
    acc reference[4] = {}, running = 0, other_move = 0, total = 0;
    for (int64_t support0 = 0; support0 < num_valid; support0 += kOthers) {
      if (support0 > 0) __syncthreads();  // the last tile's pairs have been read
      if (thread < kOthers) {
        const int64_t position = support0 + thread;
        set_other_support(params, *shared, thread, position, num_valid);
        const int64_t cls = shared->cls[thread];
        shared->class_end[thread] = cls >= 0 ? class_start[cls + 1] : position + 1;
      }
      __syncthreads();
      acc sum[4][kColumns], tangent[4][kColumns];
      second_product<Product>(params, *shared, true, sum, tangent);
      if (support0 == 0) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const acc similarity = similarity_of(p.similarity, sum[r][0]);
          reference[r] = __shfl_sync(kFullMask, similarity, 0, kAcross);
          const int64_t query = shared->own.row[ty * 4 + r];
          if (tx == 0 && query >= 0) params.reference[query] = reference[r];
        }
      }
      store_patch(shared->tile, sum, tangent);
#pragma unroll 1
      for (int c = tx * kColumns; c < (tx + 1) * kColumns; ++c) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int own = ty * 4 + r;
          const acc similarity = similarity_of(p.similarity, shared->tile.first[c][own]);
          const acc derivative =
              derivative_of(p.similarity, similarity, shared->tile.second[c][own],
                            shared->own.stretch[own] + shared->other.stretch[c]);
          const Share<acc> share = share_of<false>(params, shared->terms, own, shared->own.row[own],
                                                   shared->cls[c], scale * similarity);
          shared->tile.first[c][own] =
              share.weight * (scale * derivative + scale_dot * (similarity - reference[r]));
        }
      }
      __syncthreads();

      const int64_t left = num_valid - support0;
      const int count = static_cast<int>(left < kOthers ? left : int64_t{kOthers});
      if (nll) {
        for (int c = part; c < count; c += kParts) {
          const bool is_target = shared->cls[c] == shared->terms.target[i];
          running += is_target ? shared->tile.first[c][i] : acc(0);
          other_move += is_target ? acc(0) : shared->tile.first[c][i];
        }
        continue;
      }
      for (int column = 0; column < count;) {
        const int64_t cls = shared->cls[column], class_end = shared->class_end[column] - support0;
        const int end = class_end < count ? static_cast<int>(class_end) : count;
        for (int c = column + part; c < end; c += kParts) running += shared->tile.first[c][i];
        column = end;
        if (class_end > count) break;  // the class goes on in the next tile
        const acc mean = lane_sum<kParts>(running);
        running = 0;
        if (row < 0) continue;
        total += exp_(out[cls]) * mean;
        if ((cls & (kParts - 1)) == part) grad_grad[cls] = mean;
      }
    }

    if (nll) {
      const acc mean = lane_sum<kParts>(running);
      total = lane_sum<kParts>(other_move);
      if (row >= 0) total += exp_(-shared->terms.nll[i]) * mean;
      if (part == 0 && own0 + i < p.num_queries) {
        params.grad_grad[task * p.num_queries + own0 + i] = row >= 0 ? total - mean : acc(0);
      }
    } else if (row >= 0) {
      // Class c is written and read by the query's thread c % kParts alone.
      for (int64_t c = part; c < p.num_classes; c += kParts) {
        grad_grad[c] = out[c] == -infinity<acc>() ? acc(0) : grad_grad[c] - total;
      }
    }
    if (part == 0 && row >= 0) params.move[row] = total;
  }
}

// Blocks a multiprocessor that registers must leave room for: slopes that depend on the own row
// keep it and its direction beside the gradients, which with two blocks spills.
template <class Product, class acc>
inline constexpr int kSecondBlocks = Product::kSlopeReadsOwn ? 1 : kBlocks<acc>;

// Gradients of one side; owning queries, also the partial sums for scale and weight.
template <class scalar_t, class Product>
__global__ void __launch_bounds__(kThreads, kSecondBlocks<Product, acc_t<scalar_t>>)
    second_kernel(const __grid_constant__ SecondParams<scalar_t> params) {
  using acc = acc_t<scalar_t>;
  FASTMETA_DYNAMIC_SHARED(SecondShared<acc>, shared);
  const ProblemParams<scalar_t>& p = params.problem;
  const int thread = threadIdx.x, ty = thread / kAcross, tx = thread % kAcross;
  const int64_t num_own = params.owns_queries ? p.num_queries : p.num_supports;

  const int64_t work_items = p.num_tasks * params.row_blocks * params.parts;
  for (int64_t work = blockIdx.x; work < work_items; work += gridDim.x) {
    const int slice0 = static_cast<int>(work % params.parts) * params.block_slices;
    __syncthreads();  // the last work item is done with shared memory
    const int64_t row_block = work / params.parts, task = row_block / params.row_blocks;
    const int64_t own0 = row_block % params.row_blocks * kTile;
    if (thread == 0) {
      shared->task = task;
      shared->own0 = own0;
    }
    bool active = false;
    if (thread < kTile) {
      const int64_t row = own0 + thread < num_own ? task * num_own + own0 + thread : -1;
      if (params.owns_queries) {
        set_second_query<true>(params, thread, row, shared->own, shared->terms);
      } else {
        set_second_support(params, thread, row, shared->own, shared->cls);
      }
      active = shared->own.row[thread] >= 0;
    }
    const bool any_active = __syncthreads_or(active);
    int64_t num_other = params.owns_queries
                            ? p.class_start[task * (p.num_classes + 1) + p.num_classes]
                            : p.num_queries;
    if (!any_active) num_other = 0;  // padding, or ignored queries: only zeros to write

    // Tiles are counted in 32 bits, which is rows in 36. Without others there is an empty one.
    const int tiles = num_other > 0 ? static_cast<int>((num_other + kOthers - 1) / kOthers) : 1;
    const int last_count = static_cast<int>(num_other - int64_t{tiles - 1} * kOthers);
    PairSums<acc> pairs;
    acc gradient[4][kPack] = {};
    for (int tile = 0; tile < tiles; ++tile) {
      const bool is_last = tile + 1 == tiles, keeps = params.block_slices == 1;
      const int count = is_last ? last_count : kOthers;
      if (count > 0) {
        // The last tile's products read its coefficients and staged rows, nothing of what is set.
        if (thread < kOthers) {
          const int64_t position = int64_t{tile} * kOthers + thread;
          if (params.owns_queries) {
            const int64_t num_valid = int64_t{tile} * kOthers + count;
            set_other_support(params, *shared, thread, position, num_valid);
          } else {
            const int64_t row = thread < count ? shared->task * p.num_queries + position : -1;
            set_second_query<true>(params, thread, row, shared->other, shared->terms);
          }
        }
        __syncthreads();
        fill_coefficients<Product>(params, *shared, pairs);
      }
      if (is_last) pairs.sum_lanes();
      for (int slice = slice0; slice < slice0 + params.block_slices && slice < params.slices;
           ++slice) {
        const int64_t feature0 = int64_t{slice} * kTile, feature = feature0 + tx * kPack;
        acc weight_sum[kPack] = {};
        if (!keeps) load_sums(params, *shared, tile == 0, feature, gradient);
        add_second_tile<Product>(params, *shared, count, feature0, gradient, weight_sum);
        if (is_last) {
          write_second<Product>(params, *shared, feature, pairs, gradient);
        } else if (!keeps) {
          store_sums(params, *shared, feature, gradient);
        }
        if constexpr (Product::kWeighs) {
          if (!params.owns_queries) continue;
          static_assert(kAcross == kDepth);
          __syncthreads();  // the rows have been read: their place takes the sums of the weight
          store<kPack>(&shared->tile.rows[0][ty][tx * kPack], weight_sum);
          __syncthreads();
          if (thread < kTile && feature0 + thread < p.dim) {
            acc* partial = params.weight_partial + work / params.parts * p.dim + feature0 + thread;
            acc total = tile == 0 ? acc(0) : *partial;
#pragma unroll
            for (int r = 0; r < kAcross; ++r) total += shared->tile.rows[0][r][thread];
            *partial = total;
          }
        }
      }
    }
    if (params.owns_queries && slice0 == 0) {
      const acc sum = lane_sum(pairs.scale);
      if (thread % kWarpSize == 0) shared->warp_sum[thread / kWarpSize] = sum;
      __syncthreads();
      if (thread == 0) {
        acc total = 0;
        for (int w = 0; w < kThreads / kWarpSize; ++w) total += shared->warp_sum[w];
        params.scale_partial[work / params.parts] = total;
      }
    }
  }
}

}  // namespace fastmeta::matching::cuda
