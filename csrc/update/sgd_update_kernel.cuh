// The formulas of sgd_update, one element each; update_kernel.cuh has the kernels, and the reasons
// for tiles, vector width and shared memory.
//
// b bytes a scalar, a rate that is one number costs nothing; for 32 tasks of a Conv4 (3.6 million
// elements) in float32 at 2.0 TB/s (A100) and 3.35 TB/s (H100):
// - forward: reads param and grad, writes out: 3 * b bytes and 2 FLOPs an element; 43 MB, 22 us and
//   13 us
// - backward: reads grad_out, writes grad_grad: 2 * b bytes, 1 FLOP; 29 MB, 14 us and 9 us
// - backward with the rate's gradient: reads grad as well: 3 * b bytes, 3 FLOPs; 43 MB, 22 us and
//   13 us; a rate per element is read and its gradient written once for all tasks
#pragma once
#include "update/sgd_update.h"
#include "update/update_kernel.cuh"

namespace fastmeta::update::cuda {

template <class acc>
struct SgdStep {
  using Tensor = SgdTensor;
  static constexpr bool kBackward = false;

  __device__ __forceinline__ void apply(const acc (&in)[2], acc lr, acc (&out)[1]) const {
    out[0] = in[0] - lr * in[1];
  }
};

template <class acc>
struct SgdBackwardStep {
  using Tensor = SgdBackwardTensor;
  static constexpr bool kBackward = true;
  static constexpr unsigned kForLrGrad = 0b10;  // grad

  __device__ __forceinline__ acc apply(const acc (&in)[2], acc lr, acc (&out)[1]) const {
    out[0] = -lr * in[0];
    return in[0] * in[1];
  }
};

}  // namespace fastmeta::update::cuda
