// The formulas of adam_update.h, one element each; update_kernel.cuh has the kernels, and the
// reasons for tiles, vector width and shared memory.
//
// b bytes a scalar of dtype, s of the state (float32, or float64); a rate that is one number costs
// nothing. For 32 tasks of a Conv4 (3.6 million elements) in float32 at 2.0 TB/s (A100) and 3.35
// TB/s (H100):
// - forward: reads param, grad, mean and square, writes param, mean and square: 3 * b + 4 * s bytes
//   and 16 FLOPs an element, a root and a division among them; 100 MB, 50 us and 30 us
// - backward: reads grad_out, grad, the cotangents of mean and square, mean and square, writes
//   grad_grad, grad_mean and grad_square: 3 * b + 6 * s bytes and 30 FLOPs, a root and two
//   divisions among them; 129 MB, 65 us and 39 us; the rate's gradient takes two FLOPs more
// - root and divisions round correctly, at about ten instructions each: some 60 and 110 in all,
//   which are 22 and 41 us on A100 (9.7 T a second), 7 and 13 us on H100 (30 T): behind memory. In
//   float64 a GPU with few double-precision units is bound by them instead
#pragma once
#include "update/adam_update.h"
#include "update/update_kernel.cuh"

namespace fastmeta::update::cuda {

template <class acc>
struct AdamNumbers {
  explicit AdamNumbers(const AdamCoefficients& c)
      : beta1(static_cast<acc>(c.beta1)),
        beta2(static_cast<acc>(c.beta2)),
        rest1(static_cast<acc>(1 - c.beta1)),
        rest2(static_cast<acc>(1 - c.beta2)),
        eps(static_cast<acc>(c.eps)),
        eps_root(static_cast<acc>(c.eps_root)),
        mean_scale(static_cast<acc>(c.mean_scale)),
        square_scale(static_cast<acc>(c.square_scale)) {}

  acc beta1, beta2, rest1, rest2, eps, eps_root, mean_scale, square_scale;
};

// mean', square', root and step of one element.
template <class acc>
struct Moments {
  __device__ __forceinline__ Moments(const AdamNumbers<acc>& c, acc grad, acc old_mean,
                                     acc old_square)
      : mean(c.beta1 * old_mean + c.rest1 * grad),
        square(c.beta2 * old_square + c.rest2 * (grad * grad)),
        root(sqrt_(c.square_scale * square + c.eps_root)),
        inverse(acc(1) / (root + c.eps)),
        step(c.mean_scale * mean * inverse) {}

  acc mean, square, root, inverse, step;  // inverse = 1 / (root + eps)
};

template <class acc>
struct AdamStep {
  using Tensor = AdamTensor;
  static constexpr bool kBackward = false;

  explicit AdamStep(const AdamCoefficients& coefficients) : c(coefficients) {}

  __device__ __forceinline__ void apply(const acc (&in)[4], acc lr, acc (&out)[3]) const {
    const Moments<acc> m(c, in[1], in[2], in[3]);
    out[0] = in[0] - lr * m.step;
    out[1] = m.mean;
    out[2] = m.square;
  }

  AdamNumbers<acc> c;
};

template <class acc>
struct AdamBackwardStep {
  using Tensor = AdamBackwardTensor;
  static constexpr bool kBackward = true;
  static constexpr unsigned kForLrGrad = 0;  // every operand serves the other gradients too

  explicit AdamBackwardStep(const AdamCoefficients& coefficients) : c(coefficients) {}

  __device__ __forceinline__ acc apply(const acc (&in)[6], acc lr, acc (&out)[3]) const {
    const acc grad_out = in[0], grad = in[1];
    const Moments<acc> m(c, grad, in[4], in[5]);
    const acc to_step = lr * grad_out * m.inverse;  // over root + eps, which both terms have
    const acc to_mean = in[2] - c.mean_scale * to_step;
    acc to_square = in[3];
    if (m.root != acc(0)) {  // at 0 it has no derivative, which is left out
      to_square += c.square_scale * to_step * m.step / (m.root + m.root);
    }
    out[0] = c.rest1 * to_mean + acc(2) * c.rest2 * grad * to_square;
    out[1] = c.beta1 * to_mean;
    out[2] = c.beta2 * to_square;
    return grad_out * m.step;
  }

  AdamNumbers<acc> c;
};

}  // namespace fastmeta::update::cuda
