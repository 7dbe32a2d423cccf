// CUDA's vocabulary on the emulated machine: qualifiers, indices, barriers, warp collectives,
// maths. Only what the kernels use; a name that is missing here fails to compile.
#pragma once
#include <bit>
#include <cmath>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (::cuemu::machine().current->thread)
#define blockIdx (::cuemu::machine().block_index)
#define blockDim (::cuemu::machine().block_size)
#define gridDim (::cuemu::machine().grid_size)

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuemu::block_barrier(0, "__syncthreads", file, line);
}

inline int __syncthreads_or(int predicate, const char* file = __builtin_FILE(),
                            int line = __builtin_LINE()) {
  return cuemu::block_barrier(predicate, "__syncthreads_or", file, line) != 0;
}

inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) {
  cuemu::warp_collective(mask, 0, "__syncwarp", line, true,
                         [](auto, unsigned, uint32_t) { return 0; });
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int line = __builtin_LINE()) {
  return cuemu::warp_collective(
      mask, value, "__shfl_xor_sync", line, false,
      [lanes](auto get, unsigned lane, uint32_t) { return get(lane ^ lanes); });
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane_of_group, int width = 32,
              int line = __builtin_LINE()) {
  return cuemu::warp_collective(mask, value, "__shfl_sync", line, false,
                                [=](auto get, unsigned lane, uint32_t) {
                                  return get(lane / width * width + lane_of_group % width);
                                });
}

inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return cuemu::warp_collective(mask, predicate, "__ballot_sync", line, false,
                                [](auto get, unsigned, uint32_t lanes) {
                                  unsigned votes = 0;
                                  for (unsigned l = 0; l < cuemu::kLanes; ++l) {
                                    if (lanes >> l & 1) votes |= unsigned{get(l) != 0} << l;
                                  }
                                  return votes;
                                });
}

inline int __popc(unsigned x) { return std::popcount(x); }
