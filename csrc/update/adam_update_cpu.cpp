// One step of Adam, on the CPU: the formulas of adam_update.h. A square root and two divisions a
// vector hide behind its memory traffic (7 numbers an element forward, 9 backward).
#include "update/adam_update.h"
#include "update/update_cpu.h"

namespace fastmeta::update::FASTMETA_ISA {

namespace {

// mean', square', root and step of one vector.
template <class A>
struct Moments {
  Vec<A> mean, square, root, inverse, step;  // inverse = 1 / (root + eps)

  FASTMETA_INLINE Moments of(const AdamCoefficients& c, Vec<A> grad, Vec<A> mean, Vec<A> square) {
    Moments m;
    m.mean = static_cast<A>(c.beta1) * mean + static_cast<A>(1 - c.beta1) * grad;
    m.square = static_cast<A>(c.beta2) * square + static_cast<A>(1 - c.beta2) * (grad * grad);
    m.root = vsqrt<A>(static_cast<A>(c.square_scale) * m.square + static_cast<A>(c.eps_root));
    m.inverse = A(1) / (m.root + static_cast<A>(c.eps));
    m.step = static_cast<A>(c.mean_scale) * m.mean * m.inverse;
    return m;
  }
};

struct Step {
  using Tensor = AdamTensor;
  static constexpr bool kHasLrTerm = false;

  template <class A>
  FASTMETA_INLINE_MEMBER void apply(const Vec<A>* in, Vec<A> lr, Vec<A>* out) const {
    const Moments<A> m = Moments<A>::of(c, in[1], in[2], in[3]);
    out[0] = in[0] - lr * m.step;
    out[1] = m.mean;
    out[2] = m.square;
  }

  AdamCoefficients c;
};

struct StepBackward {
  using Tensor = AdamBackwardTensor;
  static constexpr bool kHasLrTerm = true;

  template <class A>
  FASTMETA_INLINE_MEMBER Vec<A> apply(const Vec<A>* in, Vec<A> lr, Vec<A>* out) const {
    const Vec<A> grad_out = in[0], grad = in[1];
    const Moments<A> m = Moments<A>::of(c, grad, in[4], in[5]);
    const Vec<A> to_step = lr * grad_out * m.inverse;  // over root + eps, which both terms have
    // Where the root is 0 its derivative is left out: a quotient of 0 by 1 there.
    const auto flat = m.root == Vec<A>{};
    const Vec<A> divisor = m.root + m.root + from_bits<A>(flat & bits_of<A>(splat<A>(A(1))));
    Vec<A> to_square = static_cast<A>(c.square_scale) * to_step * m.step / divisor;
    to_square = from_bits<A>(bits_of<A>(to_square) & ~flat);
    const Vec<A> to_mean = in[2] - static_cast<A>(c.mean_scale) * to_step;
    to_square += in[3];
    out[0] = static_cast<A>(1 - c.beta1) * to_mean +
             static_cast<A>(2 * (1 - c.beta2)) * grad * to_square;
    out[1] = static_cast<A>(c.beta1) * to_mean;
    out[2] = static_cast<A>(c.beta2) * to_square;
    return grad_out * m.step;
  }

  AdamCoefficients c;
};

}  // namespace

void adam(const Adam& args, ParallelFor par) {
  with_storage(args.dtype, [&](auto s) {
    run_step<decltype(s)>(Step{args.coefficients}, args.tensors, args.num_tensors, par);
  });
}

void adam_backward(const AdamBackward& args, ParallelFor par) {
  with_storage(args.dtype, [&](auto s) {
    run_backward<decltype(s)>(StepBackward{args.coefficients}, args.tensors, args.num_tensors, par);
  });
}

}  // namespace fastmeta::update::FASTMETA_ISA
