// Device code that the updates share: many tensors in one launch, descriptors in the kernel's
// parameters. An update is a formula of one element; see sgd_update_kernel.cuh for the simplest.
//
// A launch takes a TensorList by value (under the 4 KB that every architecture allows, 25 to 60
// tensors), so no table is copied to the device and a CUDA graph captures it whole. A block finds
// its tensor by bisection over first_block (at most six uniform reads of the constant bank) and
// handles a chunk of its elements, flattened as t * N + n; the division into t and n is done only
// for tensors with an operand that is broadcast.
//
// - step_kernel: every operand read once, every result written once
// - backward_kernel: the same, and the gradient of the rate in the same pass: written per element,
//   or summed by blocks into partial sums, which finish_kernel adds up. An operand that only the
//   rate's gradient needs is not read where that is not wanted
// - bound: all by memory, at about one FLOP a byte; each update's header has its bytes and FLOPs
// - tiles: a block of 256 threads handles kPacks * 1024 elements, so that 32 tasks of a Conv4 (3.6
//   million elements) are 1750 to 3500 blocks, four times and more what A100 (108 multiprocessors)
//   or H100 (132) hold at once, and the last wave weighs little. A partial sum covers 8192
//   elements, to keep these few, and 64 tasks where the tasks share a rate per element
// - vector width: packs of four elements: 16 bytes of float32, 8 of 16-bit types, two times 16 of
//   float64, coalesced within a warp. Single elements, coalesced as well, at the end of a tensor,
//   where memory is not aligned, and where N is no multiple of 4 and an operand is broadcast
// - in flight: a thread loads all operands of its kPacks packs before it computes: 32 to 96 bytes
//   in float32; three blocks a multiprocessor make that 24 to 72 KB, where Little's law asks for
//   13 KB on A100 (2.0 TB/s * 0.7 us / 108) and 20 KB on H100 (3.35 TB/s * 0.8 us / 132)
// - shared memory: one number a warp, for the sums: written by one lane each, then read by one
//   thread, so no two lanes meet in a bank
// - distance from the floor, as designed (no GPU has measured it yet): a copy reaches about 90 % of
//   either peak, and so should large lists; one that ends within 10 us pays some 3 us of launch,
//   and finish_kernel is a second one. Furthest off is a rate per element shared by few tasks: 32
//   tasks of a Conv4 give 110 blocks of columns, one a multiprocessor with 16 KB in flight
//
// Sums have a fixed order: a thread adds its elements, lanes by butterfly, warps in order, chunks
// in finish_kernel. No atomics: equal inputs give equal bits, whatever the grid.
#pragma once
#include "common/device.cuh"

namespace fastmeta::update::cuda {

using namespace ::fastmeta::device;  // NOLINT(build/namespaces): device code

inline constexpr int kThreads = 256;
inline constexpr int kWarps = kThreads / kWarpSize;
inline constexpr int64_t kSumChunk = int64_t{kThreads} * kPack * 8;  // elements of a partial sum
inline constexpr int64_t kTaskGroup = 64;  // tasks of a partial sum, of a rate that they share
inline constexpr int kListBytes = 3840;    // leaves room in 4 KB for the list's head and a formula

// Where element (t, n) of an operand lies.
enum class Layout : uint8_t {
  kOwn,      // t * N + n
  kShared,   // n: one set for all tasks
  kPerTask,  // t: one number a task
  kOne,      // one number
};

// What becomes of the terms of the rate's gradient.
enum class LrGrad : uint8_t {
  kNone,     // not wanted
  kElement,  // written where they arise
  kRows,     // summed over neighbouring elements: of one task, or of all
  kColumns,  // summed over the tasks, element by element
};

template <class Tensor>
struct TensorList {
  static constexpr int kCapacity = kListBytes / sizeof(Tensor);
  int64_t blocks;  // work items, all tensors together
  int count;
  Tensor tensors[kCapacity];
};

// One tensor of a step, whose plain struct is Tensor. Where no operand needs the task, all tasks
// are one row: num_elements = total.
template <class scalar_t, class Tensor>
struct StepItem {
  static constexpr int kOperands = Tensor::kIn + Tensor::kStateIn;
  static constexpr int kResults = Tensor::kOut + Tensor::kStateOut;
  int64_t first_block, total, num_elements;  // total = T * N
  const void* in[kOperands];                 // kIn of scalar_t, then acc
  const acc_t<scalar_t>* lr;
  void* out[kResults];
  Layout layouts[kOperands], lr_layout;
  bool vector;   // packs can be read and written at every multiple of kPack
  bool by_task;  // some operand needs t or n
};

template <class scalar_t, class Tensor>
struct BackwardItem : StepItem<scalar_t, Tensor> {
  acc_t<scalar_t>* lr_target;  // grad_lr, or the partial sums
  int64_t length, chunks;      // kRows: elements of a row; chunks of a row, or groups of tasks
  LrGrad lr_grad;
  bool final;  // lr_target is grad_lr, which takes the negated sum
};

// The gradient of a rate from its partial sums: [rows, chunks], or [chunks, columns].
template <class acc>
struct FinishItem {
  int64_t first_block, chunks, columns;  // columns = 0: by row, a block each
  const acc* partial;
  acc* grad_lr;
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

// `width` neighbours as they lie in memory. 16-bit numbers are decoded where they are used and not
// where they are loaded, so that a thread need not wait for one load before it issues the next.
template <class T>
struct alignas(alignof(Pack<T>)) RawPack {
  uint32_t words[sizeof(Pack<T>) / sizeof(uint32_t)];
};
template <int width, class T>
using Raw = std::conditional_t<width == kPack, RawPack<T>, T>;

template <int width, class T>
__device__ __forceinline__ acc_t<T> decode(const Raw<width, T>& raw, int i) {
  if constexpr (width == kPack) {
    return to_acc(bit_cast<Pack<T>>(raw).v[i]);
  } else {
    return to_acc(raw);
  }
}

// `width` neighbours of one task from flat index i = task * N + element on.
template <int width, class T>
__device__ __forceinline__ void fetch(const void* from, Layout layout, int64_t i, int64_t task,
                                      int64_t num_elements, Raw<width, T>& raw) {
  const T* data = static_cast<const T*>(from);
  if (layout == Layout::kOwn || layout == Layout::kShared) {
    const T* at = data + (layout == Layout::kOwn ? i : i - task * num_elements);
    raw = *reinterpret_cast<const Raw<width, T>*>(at);
    return;
  }
  const T number = data[layout == Layout::kPerTask ? task : 0];
  if constexpr (width == kPack) {
    raw = bit_cast<RawPack<T>>(Pack<T>{{number, number, number, number}});
  } else {
    raw = number;
  }
}

// Packs of every operand that a thread loads before it computes: two, or one where two would cost a
// resident block: of more than three operands, and in float64, whose packs are twice as wide.
template <class scalar_t, class Tensor>
inline constexpr int kPacks =
    Tensor::kIn + Tensor::kStateIn <= 3 && sizeof(acc_t<scalar_t>) == 4 ? 2 : 1;

template <class scalar_t, class Tensor>  // elements of a block
inline constexpr int64_t kChunk = int64_t{kThreads} * kPack * kPacks<scalar_t, Tensor>;

template <class scalar_t>  // blocks that a multiprocessor has room for
inline constexpr int kBlocks = sizeof(acc_t<scalar_t>) == 4 ? 3 : 2;

// Whether operand k is needed: some serve the rate's gradient alone, which may not be wanted.
template <class Formula, class Item>
__device__ __forceinline__ bool is_read(const Item& item, int k) {
  if constexpr (Formula::kBackward) {
    return item.lr_grad != LrGrad::kNone || (Formula::kForLrGrad >> k & 1u) == 0;
  } else {
    return true;
  }
}

// The elements of one thread: `width` neighbours at i, i + stride, ... before `end`. A backward
// formula's terms of the rate's gradient are added to `sum`, in this order.
template <int width, class scalar_t, class Formula, class Item>
__device__ __forceinline__ void walk(const Item& item, const Formula& formula, int64_t i,
                                     int64_t stride, int64_t end, acc_t<scalar_t> (&sum)[width]) {
  using acc = acc_t<scalar_t>;
  using Tensor = typename Formula::Tensor;
  constexpr int packs = kPacks<scalar_t, Tensor>;
  for (; i < end; i += packs * stride) {
    Raw<width, scalar_t> own[packs][Tensor::kIn];
    Raw<width, acc> state[packs][Tensor::kStateIn > 0 ? Tensor::kStateIn : 1], lr[packs];
#pragma unroll
    for (int p = 0; p < packs; ++p) {
      const int64_t at = i + p * stride;
      if (at >= end) continue;
      const int64_t task = item.by_task ? divide(at, item.num_elements) : 0;
#pragma unroll
      for (int k = 0; k < Tensor::kIn; ++k) {
        if (!is_read<Formula>(item, k)) continue;
        fetch<width, scalar_t>(item.in[k], item.layouts[k], at, task, item.num_elements, own[p][k]);
      }
#pragma unroll
      for (int k = 0; k < Tensor::kStateIn; ++k) {
        const int operand = Tensor::kIn + k;
        if (!is_read<Formula>(item, operand)) continue;
        fetch<width, acc>(item.in[operand], item.layouts[operand], at, task, item.num_elements,
                          state[p][k]);
      }
      fetch<width, acc>(item.lr, item.lr_layout, at, task, item.num_elements, lr[p]);
    }
#pragma unroll
    for (int p = 0; p < packs; ++p) {
      const int64_t at = i + p * stride;
      if (at >= end) continue;
      acc out[Item::kResults][width], term[width];
#pragma unroll
      for (int j = 0; j < width; ++j) {
        acc x[Item::kOperands], y[Item::kResults];
#pragma unroll
        for (int k = 0; k < Tensor::kIn; ++k) x[k] = decode<width, scalar_t>(own[p][k], j);
#pragma unroll
        for (int k = 0; k < Tensor::kStateIn; ++k) {
          x[Tensor::kIn + k] = decode<width, acc>(state[p][k], j);
        }
        const acc rate = decode<width, acc>(lr[p], j);
        if constexpr (Formula::kBackward) {
          term[j] = formula.apply(x, rate, y);
        } else {
          formula.apply(x, rate, y);
        }
#pragma unroll
        for (int k = 0; k < Item::kResults; ++k) out[k][j] = y[k];
      }
#pragma unroll
      for (int k = 0; k < Item::kResults; ++k) {
        if (k < Tensor::kOut) {
          store<width>(static_cast<scalar_t*>(item.out[k]) + at, out[k]);
        } else {
          store<width>(static_cast<acc*>(item.out[k]) + at, out[k]);
        }
      }
      if constexpr (Formula::kBackward) {
        if (item.lr_grad == LrGrad::kElement) {
#pragma unroll
          for (int j = 0; j < width; ++j) term[j] = acc(0) - term[j];
          store<width>(item.lr_target + at, term);
        } else if (item.lr_grad != LrGrad::kNone) {
#pragma unroll
          for (int j = 0; j < width; ++j) sum[j] += term[j];
        }
      }
    }
  }
}

template <class scalar_t, template <class> class F>
__global__ void __launch_bounds__(kThreads, kBlocks<scalar_t>) step_kernel(
    const __grid_constant__ TensorList<StepItem<scalar_t, typename F<acc_t<scalar_t>>::Tensor>>
        list,
    const __grid_constant__ F<acc_t<scalar_t>> formula) {
  using acc = acc_t<scalar_t>;
  constexpr int64_t chunk = kChunk<scalar_t, typename F<acc>::Tensor>;
  for (int64_t block = blockIdx.x; block < list.blocks; block += gridDim.x) {
    const auto& item = find(list, block);
    const int64_t begin = (block - item.first_block) * chunk;
    const int64_t end = begin + chunk < item.total ? begin + chunk : item.total;
    const int64_t middle = item.vector ? begin + (end - begin) / kPack * kPack : begin;
    acc unused[kPack], none[1];
    walk<kPack, scalar_t>(item, formula, begin + static_cast<int>(threadIdx.x) * kPack,
                          kThreads * kPack, middle, unused);
    walk<1, scalar_t>(item, formula, middle + threadIdx.x, kThreads, end, none);
  }
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

template <class scalar_t, template <class> class F>
__global__ void __launch_bounds__(kThreads, kBlocks<scalar_t>) backward_kernel(
    const __grid_constant__ TensorList<BackwardItem<scalar_t, typename F<acc_t<scalar_t>>::Tensor>>
        list,
    const __grid_constant__ F<acc_t<scalar_t>> formula) {
  using acc = acc_t<scalar_t>;
  for (int64_t block = blockIdx.x; block < list.blocks; block += gridDim.x) {
    const auto& item = find(list, block);
    const int64_t local = block - item.first_block;
    const bool columns = item.lr_grad == LrGrad::kColumns;
    const int width = item.vector ? kPack : 1;
    int64_t begin, end, stride, column = 0, group = 0;
    if (columns) {  // a thread takes `width` columns of a group of tasks
      const int64_t slice = divide(local, item.chunks);
      group = local - slice * item.chunks;
      column = (slice * kThreads + threadIdx.x) * width;
      begin = group * kTaskGroup * item.num_elements;
      end = begin + kTaskGroup * item.num_elements;
      end = column >= item.num_elements ? begin : end < item.total ? end : item.total;
      begin += column;
      stride = item.num_elements;
    } else {
      const int64_t size =
          item.lr_grad == LrGrad::kRows ? kSumChunk : kChunk<scalar_t, typename F<acc>::Tensor>;
      const int64_t row = divide(local, item.chunks), chunk = local - row * item.chunks;
      const int64_t row_end = (row + 1) * item.length;
      begin = row * item.length + chunk * size;
      end = begin + size < row_end ? begin + size : row_end;
      stride = kThreads * width;
    }
    acc sum[kPack] = {}, rest[1] = {};
    int64_t middle = begin;
    if (item.vector) {
      middle = columns ? end : begin + (end - begin) / kPack * kPack;
      const int64_t first = columns ? begin : begin + static_cast<int>(threadIdx.x) * kPack;
      walk<kPack, scalar_t>(item, formula, first, stride, middle, sum);
    }
    walk<1, scalar_t>(item, formula, columns && !item.vector ? begin : middle + threadIdx.x,
                      item.vector ? kThreads : stride, end, rest);
    if (columns) {
      if (column >= item.num_elements) continue;
      acc* target = item.lr_target + group * item.num_elements + column;
      if (!item.vector) {
        target[0] = item.final ? acc(0) - rest[0] : rest[0];
      } else {
#pragma unroll
        for (int j = 0; j < kPack; ++j) sum[j] = item.final ? acc(0) - sum[j] : sum[j];
        store<kPack>(target, sum);
      }
    } else if (item.lr_grad == LrGrad::kRows) {
      const acc total = block_sum((sum[0] + sum[1]) + (sum[2] + sum[3]) + rest[0]);
      if (threadIdx.x == 0) item.lr_target[local] = item.final ? acc(0) - total : total;
    }
  }
}

template <class acc>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const __grid_constant__ TensorList<FinishItem<acc>> list) {
  for (int64_t block = blockIdx.x; block < list.blocks; block += gridDim.x) {
    const FinishItem<acc>& item = find(list, block);
    const int64_t local = block - item.first_block;
    const bool rows = item.columns == 0;
    const int64_t target = rows ? local : local * kThreads + threadIdx.x;
    const acc* partial = rows ? item.partial + local * item.chunks : item.partial + target;
    const int64_t stride = rows ? 1 : item.columns;
    acc sum = 0;
    if (rows || target < item.columns) {
      for (int64_t chunk = rows ? threadIdx.x : 0; chunk < item.chunks;
           chunk += rows ? kThreads : 1) {
        sum += partial[chunk * stride];
      }
    }
    if (rows) {
      sum = block_sum(sum);
      if (threadIdx.x == 0) item.grad_lr[target] = acc(0) - sum;
    } else if (target < item.columns) {
      item.grad_lr[target] = acc(0) - sum;
    }
  }
}

}  // namespace fastmeta::update::cuda
