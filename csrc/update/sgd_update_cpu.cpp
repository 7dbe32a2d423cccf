// One gradient step for all parameters of all tasks, on the CPU: the formulas. update_cpu.h has the
// loops.
#include "update/sgd_update.h"
#include "update/update_cpu.h"

namespace fastmeta::update::FASTMETA_ISA {

namespace {

struct Step {
  using Tensor = SgdTensor;
  static constexpr int kIn = 2, kStateIn = 0, kOut = 1, kStateOut = 0;
  static constexpr bool kHasLrTerm = false;
  static const Operand& operand(const Tensor& x, int i) { return i == 0 ? x.param : x.grad; }
  static void* result(const Tensor& x, int) { return x.out; }

  template <class A>
  FASTMETA_INLINE void apply(const Vec<A>* in, Vec<A> lr, Vec<A>* out) {
    out[0] = in[0] - lr * in[1];
  }
};

struct StepBackward {
  using Tensor = SgdBackwardTensor;
  static constexpr int kIn = 2, kStateIn = 0, kOut = 1, kStateOut = 0;
  static constexpr bool kHasLrTerm = true;
  static const Operand& operand(const Tensor& x, int i) { return i == 0 ? x.grad_out : x.grad; }
  static void* result(const Tensor& x, int) { return x.grad_grad; }

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
