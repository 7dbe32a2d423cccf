// One step of gradient descent with momentum, on the CPU: the formulas of momentum_update.h.
#include "update/momentum_update.h"
#include "update/update_cpu.h"

namespace fastmeta::update::FASTMETA_ISA {

namespace {

struct Step {
  using Tensor = MomentumTensor;
  static constexpr bool kHasLrTerm = false;

  template <class A>
  FASTMETA_INLINE_MEMBER void apply(const Vec<A>* in, Vec<A> lr, Vec<A>* out) const {
    const Vec<A> grad = in[1], buffer = in[2];
    const Vec<A> step = static_cast<A>(c.step_grad) * grad + static_cast<A>(c.step_buffer) * buffer;
    out[0] = in[0] - lr * step;
    out[1] = static_cast<A>(c.keep_grad) * grad + static_cast<A>(c.keep_buffer) * buffer;
  }

  MomentumCoefficients c;
};

struct StepBackward {
  using Tensor = MomentumBackwardTensor;
  static constexpr bool kHasLrTerm = true;

  template <class A>
  FASTMETA_INLINE_MEMBER Vec<A> apply(const Vec<A>* in, Vec<A> lr, Vec<A>* out) const {
    const A step_grad = static_cast<A>(c.step_grad), step_buffer = static_cast<A>(c.step_buffer);
    const Vec<A> grad_out = in[0], grad = in[1], grad_out_buffer = in[2], buffer = in[3];
    const Vec<A> to_step = lr * grad_out;
    out[0] = static_cast<A>(c.keep_grad) * grad_out_buffer - step_grad * to_step;
    out[1] = static_cast<A>(c.keep_buffer) * grad_out_buffer - step_buffer * to_step;
    return grad_out * (step_grad * grad + step_buffer * buffer);
  }

  MomentumCoefficients c;
};

}  // namespace

void momentum(const Momentum& args, ParallelFor par) {
  with_storage(args.dtype, [&](auto s) {
    run_step<decltype(s)>(Step{args.coefficients}, args.tensors, args.num_tensors, par);
  });
}

void momentum_backward(const MomentumBackward& args, ParallelFor par) {
  with_storage(args.dtype, [&](auto s) {
    run_backward<decltype(s)>(StepBackward{args.coefficients}, args.tensors, args.num_tensors, par);
  });
}

}  // namespace fastmeta::update::FASTMETA_ISA
