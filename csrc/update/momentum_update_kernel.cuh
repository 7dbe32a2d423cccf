// The formulas of momentum_update.h, one element each; update_kernel.cuh has the kernels, and the
// reasons for tiles, vector width and shared memory.
//
// b bytes a scalar of dtype, s of the state (float32, or float64); a rate that is one number costs
// nothing. For 32 tasks of a Conv4 (3.6 million elements) in float32 at 2.0 TB/s (A100) and 3.35
// TB/s (H100):
// - forward: reads param, grad and buffer, writes param and buffer: 3 * b + 2 * s bytes and 8 FLOPs
//   an element; 72 MB, 36 us and 21 us
// - backward: reads grad_out and grad_out_buffer, writes grad_grad and grad_buffer: 2 * b + 2 * s
//   bytes, 7 FLOPs; 57 MB, 29 us and 17 us
// - backward with the rate's gradient: reads grad and buffer as well: 3 * b + 3 * s bytes, 12
//   FLOPs; 86 MB, 43 us and 26 us
#pragma once
#include "update/momentum_update.h"
#include "update/update_kernel.cuh"

namespace fastmeta::update::cuda {

template <class acc>
struct MomentumStep {
  using Tensor = MomentumTensor;
  static constexpr bool kBackward = false;

  explicit MomentumStep(const MomentumCoefficients& c)
      : step_grad(static_cast<acc>(c.step_grad)),
        step_buffer(static_cast<acc>(c.step_buffer)),
        keep_grad(static_cast<acc>(c.keep_grad)),
        keep_buffer(static_cast<acc>(c.keep_buffer)) {}

  __device__ __forceinline__ acc step(acc grad, acc buffer) const {
    return step_grad * grad + step_buffer * buffer;
  }

  __device__ __forceinline__ void apply(const acc (&in)[3], acc lr, acc (&out)[2]) const {
    const acc param = in[0], grad = in[1], buffer = in[2];
    out[0] = param - lr * step(grad, buffer);
    out[1] = keep_grad * grad + keep_buffer * buffer;
  }

  acc step_grad, step_buffer, keep_grad, keep_buffer;
};

template <class acc>
struct MomentumBackwardStep : private MomentumStep<acc> {
  using Tensor = MomentumBackwardTensor;
  static constexpr bool kBackward = true;
  static constexpr unsigned kForLrGrad = 0b1010;  // grad and buffer

  using MomentumStep<acc>::MomentumStep;

  __device__ __forceinline__ acc apply(const acc (&in)[4], acc lr, acc (&out)[2]) const {
    const acc grad_out = in[0], grad = in[1], grad_out_buffer = in[2], buffer = in[3];
    const acc to_step = lr * grad_out;
    out[0] = this->keep_grad * grad_out_buffer - this->step_grad * to_step;
    out[1] = this->keep_buffer * grad_out_buffer - this->step_buffer * to_step;
    return grad_out * this->step(grad, buffer);
  }
};

}  // namespace fastmeta::update::cuda
