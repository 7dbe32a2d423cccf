// One gradient step for all parameters of all tasks, on the CPU: the formulas. update_cpu.h has the
// loops.
#include "update/sgd_update.h"
#include "update/update_cpu.h"

namespace fastmeta::update::FASTMETA_ISA {

namespace {

struct Step {
  using Tensor = SgdTensor;
  static constexpr bool kHasLrTerm = false;

  template <class A>
  FASTMETA_INLINE void apply(const Vec<A>* in, Vec<A> lr, Vec<A>* out) {
    out[0] = in[0] - lr * in[1];
  }
};

struct StepBackward {
  using Tensor = SgdBackwardTensor;
  static constexpr bool kHasLrTerm = true;

  template <class A>
  FASTMETA_INLINE Vec<A> apply(const Vec<A>* in, Vec<A> lr, Vec<A>* out) {
    out[0] = -lr * in[0];
    return in[0] * in[1];
  }
};

}  // namespace

void sgd(const Sgd& args, ParallelFor par) {
  with_storage(args.dtype,
               [&](auto s) { run_step<decltype(s)>(Step{}, args.tensors, args.num_tensors, par); });
}

void sgd_backward(const SgdBackward& args, ParallelFor par) {
  with_storage(args.dtype, [&](auto s) {
    run_backward<decltype(s)>(StepBackward{}, args.tensors, args.num_tensors, par);
  });
}

}  // namespace fastmeta::update::FASTMETA_ISA
