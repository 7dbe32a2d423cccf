// Device code that sorts the supports of few-shot tasks by class, for the matching kernels.
//
// A block has a task. A support's place is the number of supports before it: those of lower
// classes, and of its own class those that stand before it, so the order is stable and padding,
// whose class is C, comes last. Class and place make one number, so that is one comparison a pair.
//
// - bytes: 8 * (2 * S + C) a task; comparisons: S * S a task, at most 2^18
// - bound: by latency. A launch stands where a dozen would for torch's sort and search, which take
//   the tasks of more than kOrderRows supports or kOrderClasses classes
// - banks: all threads read one number at a time, or 8-byte neighbours
#pragma once
#include "common/device.cuh"

namespace fastmeta::matching::cuda {

inline constexpr int kOrderRows = 512;  // supports of a task, at most
inline constexpr int kOrderThreads = 128;
inline constexpr int64_t kOrderClasses = 64 * kOrderThreads;  // at most: a block writes them all

struct ClassOrderShared {
  int64_t key[kOrderRows];     // class, then place
  int64_t sorted[kOrderRows];  // the classes in order
};

// order [T, S] lists a task's supports by class, class_start [T, C + 1] where each class begins.
__global__ void __launch_bounds__(kOrderThreads)
    class_order_kernel(const int64_t* __restrict__ labels, int64_t num_tasks, int64_t num_supports,
                       int64_t num_classes, int64_t* __restrict__ order,
                       int64_t* __restrict__ class_start) {
  FASTMETA_DYNAMIC_SHARED(ClassOrderShared, shared);
  const int rows = static_cast<int>(num_supports), thread = threadIdx.x;
  for (int64_t task = blockIdx.x; task < num_tasks; task += gridDim.x) {
    __syncthreads();  // the last task's classes have been read
    for (int i = thread; i < rows; i += kOrderThreads) {
      int64_t label = labels[task * num_supports + i];
      if (label < 0 || label >= num_classes) label = num_classes;
      shared->key[i] = label * kOrderRows + i;
    }
    __syncthreads();
    for (int i = thread; i < rows; i += kOrderThreads) {
      const int64_t key = shared->key[i];
      int place = 0;
#pragma unroll 8
      for (int j = 0; j < rows; ++j) place += shared->key[j] < key;
      shared->sorted[place] = key / kOrderRows;
      order[task * num_supports + place] = i;
    }
    __syncthreads();
    for (int64_t c = thread; c <= num_classes; c += kOrderThreads) {
      int begin = 0, end = rows;  // the first place whose class is c or above is within
      while (begin < end) {
        const int middle = (begin + end) / 2;
        if (shared->sorted[middle] < c) {
          begin = middle + 1;
        } else {
          end = middle;
        }
      }
      class_start[task * (num_classes + 1) + c] = begin;
    }
  }
}

}  // namespace fastmeta::matching::cuda
