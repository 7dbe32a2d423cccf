// Device code of sgd_update: many tensors in one launch, descriptors in the kernel's parameters.
//
// A launch takes a TensorList by value (under the 4 KB that every architecture allows), so no
// table is copied to the device and a CUDA graph captures it whole. A block finds its tensor by
// bisection over first_block (uniform reads of the constant bank) and handles one chunk of the
// tensor's elements, flattened as t * N + n; the division into t and n is done only for operands
// that are broadcast.
//
// - sgd_kernel: reads param and grad, writes out: 3 * b bytes an element, 2 FLOPs; b bytes a
//   scalar
// - sgd_backward_kernel: reads grad_out (and grad where lr has a number per element), writes
//   grad_grad (and grad_lr): 2 to 4 * b bytes an element, 1 to 2 FLOPs
// - sgd_reduce_kernel: reads grad_out and grad once: 2 * b bytes an element, 2 FLOPs
// - bound: all by memory (2.0 TB/s on A100, 3.35 on H100), at under one FLOP a byte. A thread
//   has kPacks packs of each operand in flight, 16 bytes each of float32, where rows are aligned
//   and N is a multiple of kPack; else single elements, coalesced either way
// - shared memory: one number a warp, for the sums: no conflicts
//
// grad_lr is reduced in a fixed order: a block sums a chunk (threads stride it, lanes by
// butterfly, warps in order), sgd_finish_kernel sums the chunks of a row; or, with one number per
// element of a task, a thread adds the tasks in their order, kTaskGroup at a time, because one
// long float sum of 65535 tasks loses digits. No atomics: equal inputs give equal bits.
#pragma once
#include "common/device.cuh"

namespace fastmeta::update::cuda {

using namespace ::fastmeta::device;  // NOLINT(build/namespaces): device code

inline constexpr int kThreads = 256;
inline constexpr int kWarps = kThreads / kWarpSize;
inline constexpr int kPacks = 2;  // packs a thread has in flight
inline constexpr int64_t kChunk = int64_t{kThreads} * kPack * kPacks;  // elements of a block
inline constexpr int64_t kReduceChunk = 8 * kChunk;  // elements of one partial sum
inline constexpr int64_t kTaskGroup = 64;            // tasks summed on their own
inline constexpr int kListBytes = 3840;              // leaves room in 4 KB for the list's own head

// Where element (t, n) of an operand lies.
enum class Layout : uint8_t {
  kOwn,      // t * N + n
  kShared,   // n: one set for all tasks
  kPerTask,  // t: one number a task
  kOne,      // one number
};

template <class Tensor>
struct TensorList {
  static constexpr int kCapacity = kListBytes / sizeof(Tensor);
  int64_t blocks;  // work items, all tensors together
  int count;
  Tensor tensors[kCapacity];
};

template <class scalar_t>
struct SgdItem {
  int64_t first_block, total, num_elements;  // total = T * N
  const scalar_t* param;
  const scalar_t* grad;
  const acc_t<scalar_t>* lr;
  scalar_t* out;
  Layout param_layout, grad_layout, lr_layout;
  bool vector;
};

template <class scalar_t>
struct SgdBackwardItem {
  int64_t first_block, total, num_elements;
  const scalar_t* grad_out;
  const scalar_t* grad;
  const acc_t<scalar_t>* lr;
  scalar_t* grad_grad;       // nullptr: not wanted
  acc_t<scalar_t>* grad_lr;  // nullptr: not wanted, or left to the reduction
  Layout grad_out_layout, grad_layout, lr_layout;
  bool vector;
};

template <class scalar_t>
struct ReduceItem {
  int64_t first_block, num_tasks, num_elements;
  int64_t length,
      chunks;  // of a row, and partial sums of it; chunks = 0: sum over tasks, by column
  const scalar_t* grad_out;
  const scalar_t* grad;
  acc_t<scalar_t>* target;  // [rows, chunks] partial sums, or grad_lr itself
  Layout grad_out_layout, grad_layout;
  bool vector, final;  // final: target is grad_lr, which takes the negated sum
};

template <class acc>
struct FinishItem {
  int64_t first_block, chunks;
  const acc* partial;  // [rows, chunks]
  acc* grad_lr;        // [rows]
};

// The tensor that work item `block` belongs to: the last whose first_block is not above it.
template <class Tensor>
__device__ __forceinline__ const Tensor& find(const TensorList<Tensor>& list, int64_t block) {
  int low = 0, high = list.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (list.tensors[middle].first_block <= block) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return list.tensors[low];
}

// `width` neighbours of one task from flat index i = task * N + element on.
template <int width, class scalar_t>
__device__ __forceinline__ void fetch(const scalar_t* data, Layout layout, int64_t i,
                                      int64_t num_elements, acc_t<scalar_t> (&value)[width]) {
  if (layout == Layout::kOwn) return load<width>(data + i, value);
  if (layout == Layout::kShared) {
    return load<width>(data + (i - divide(i, num_elements) * num_elements), value);
  }
  const auto number = to_acc(data[layout == Layout::kPerTask ? divide(i, num_elements) : 0]);
#pragma unroll
  for (int k = 0; k < width; ++k) value[k] = number;
}

// Sum over the block in a fixed order, to thread 0.
template <class acc>
__device__ __forceinline__ acc block_sum(acc value) {
  FASTMETA_SHARED(acc[kWarps], parts);
  value = lane_sum(value);
  if (threadIdx.x % kWarpSize == 0) parts[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    value = parts[0];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) value += parts[warp];
  }
  __syncthreads();  // parts may be written again
  return value;
}

template <class scalar_t, int width>
__device__ __forceinline__ void sgd_chunk(const SgdItem<scalar_t>& item, int64_t begin) {
  using acc = acc_t<scalar_t>;
#pragma unroll
  for (int k = 0; k < kPacks * kPack / width; ++k) {
    const int64_t i = begin + (k * kThreads + static_cast<int>(threadIdx.x)) * width;
    if (i >= item.total) continue;
    acc param[width], grad[width], lr[width];
    fetch<width>(item.param, item.param_layout, i, item.num_elements, param);
    fetch<width>(item.grad, item.grad_layout, i, item.num_elements, grad);
    fetch<width>(item.lr, item.lr_layout, i, item.num_elements, lr);
#pragma unroll
    for (int j = 0; j < width; ++j) param[j] -= lr[j] * grad[j];
    store<width>(item.out + i, param);
  }
}

template <class scalar_t>
__global__ void __launch_bounds__(kThreads)
    sgd_kernel(const __grid_constant__ TensorList<SgdItem<scalar_t>> list) {
  for (int64_t block = blockIdx.x; block < list.blocks; block += gridDim.x) {
    const SgdItem<scalar_t>& item = find(list, block);
    const int64_t begin = (block - item.first_block) * kChunk;
    if (item.vector) {
      sgd_chunk<scalar_t, kPack>(item, begin);
    } else {
      sgd_chunk<scalar_t, 1>(item, begin);
    }
  }
}

template <class scalar_t, int width>
__device__ __forceinline__ void sgd_backward_chunk(const SgdBackwardItem<scalar_t>& item,
                                                   int64_t begin) {
  using acc = acc_t<scalar_t>;
#pragma unroll
  for (int k = 0; k < kPacks * kPack / width; ++k) {
    const int64_t i = begin + (k * kThreads + static_cast<int>(threadIdx.x)) * width;
    if (i >= item.total) continue;
    acc grad_out[width], other[width], result[width];
    fetch<width>(item.grad_out, item.grad_out_layout, i, item.num_elements, grad_out);
    if (item.grad_grad != nullptr) {
      fetch<width>(item.lr, item.lr_layout, i, item.num_elements, other);
#pragma unroll
      for (int j = 0; j < width; ++j) result[j] = -other[j] * grad_out[j];
      store<width>(item.grad_grad + i, result);
    }
    if (item.grad_lr != nullptr) {
      fetch<width>(item.grad, item.grad_layout, i, item.num_elements, other);
#pragma unroll
      for (int j = 0; j < width; ++j) result[j] = -grad_out[j] * other[j];
      store<width>(item.grad_lr + i, result);
    }
  }
}

template <class scalar_t>
__global__ void __launch_bounds__(kThreads)
    sgd_backward_kernel(const __grid_constant__ TensorList<SgdBackwardItem<scalar_t>> list) {
  for (int64_t block = blockIdx.x; block < list.blocks; block += gridDim.x) {
    const SgdBackwardItem<scalar_t>& item = find(list, block);
    const int64_t begin = (block - item.first_block) * kChunk;
    if (item.vector) {
      sgd_backward_chunk<scalar_t, kPack>(item, begin);
    } else {
      sgd_backward_chunk<scalar_t, 1>(item, begin);
    }
  }
}

// Sum of grad_out * grad over flat indices [begin, end), this thread's share.
template <class scalar_t, int width>
__device__ __forceinline__ acc_t<scalar_t> product_sum(const ReduceItem<scalar_t>& item,
                                                       int64_t begin, int64_t end) {
  using acc = acc_t<scalar_t>;
  acc sum[width] = {};
#pragma unroll 2
  for (int64_t i = begin + static_cast<int>(threadIdx.x) * width; i < end; i += kThreads * width) {
    acc grad_out[width], grad[width];
    fetch<width>(item.grad_out, item.grad_out_layout, i, item.num_elements, grad_out);
    fetch<width>(item.grad, item.grad_layout, i, item.num_elements, grad);
#pragma unroll
    for (int j = 0; j < width; ++j) sum[j] += grad_out[j] * grad[j];
  }
  acc total = sum[0];
#pragma unroll
  for (int j = 1; j < width; ++j) total += sum[j];
  return total;
}

template <class scalar_t>
__global__ void __launch_bounds__(kThreads, 3)
    sgd_reduce_kernel(const __grid_constant__ TensorList<ReduceItem<scalar_t>> list) {
  using acc = acc_t<scalar_t>;
  for (int64_t block = blockIdx.x; block < list.blocks; block += gridDim.x) {
    const ReduceItem<scalar_t>& item = find(list, block);
    const int64_t local = block - item.first_block;
    if (item.chunks == 0) {  // one number per element: a thread adds the tasks of its column
      const int64_t element = local * kThreads + threadIdx.x;
      if (element >= item.num_elements) continue;
      acc sum = 0;
      for (int64_t task0 = 0; task0 < item.num_tasks; task0 += kTaskGroup) {
        const int64_t end =
            task0 + kTaskGroup < item.num_tasks ? task0 + kTaskGroup : item.num_tasks;
        acc group = 0;
#pragma unroll 4
        for (int64_t task = task0; task < end; ++task) {
          const int64_t i = task * item.num_elements + element;
          acc grad_out[1], grad[1];
          fetch<1>(item.grad_out, item.grad_out_layout, i, item.num_elements, grad_out);
          fetch<1>(item.grad, item.grad_layout, i, item.num_elements, grad);
          group += grad_out[0] * grad[0];
        }
        sum += group;
      }
      item.target[element] = acc(0) - sum;
      continue;
    }
    const int64_t row = divide(local, item.chunks), chunk = local - row * item.chunks;
    const int64_t row_end = (row + 1) * item.length;
    const int64_t begin = row * item.length + chunk * kReduceChunk;
    const int64_t end = begin + kReduceChunk < row_end ? begin + kReduceChunk : row_end;
    const acc sum = block_sum(item.vector ? product_sum<scalar_t, kPack>(item, begin, end)
                                          : product_sum<scalar_t, 1>(item, begin, end));
    if (threadIdx.x == 0) item.target[local] = item.final ? acc(0) - sum : sum;
  }
}

template <class acc>
__global__ void __launch_bounds__(kThreads)
    sgd_finish_kernel(const __grid_constant__ TensorList<FinishItem<acc>> list) {
  for (int64_t block = blockIdx.x; block < list.blocks; block += gridDim.x) {
    const FinishItem<acc>& item = find(list, block);
    const int64_t row = block - item.first_block;
    acc sum = 0;
    for (int64_t chunk = threadIdx.x; chunk < item.chunks; chunk += kThreads) {
      sum += item.partial[row * item.chunks + chunk];
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) item.grad_lr[row] = acc(0) - sum;
  }
}

}  // namespace fastmeta::update::cuda
