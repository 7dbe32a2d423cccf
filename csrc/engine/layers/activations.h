// Elementwise nonlinearities: each a functor that gives the value and two derivatives at once; the
// passes take what they need of it and the compiler drops the rest.
//
// Where a derivative jumps it has torch's value: 0 at 0 for relu, the slope at 0 for leaky_relu,
// alpha at 0 for elu.
#pragma once
#include "common/vec_math.h"
#include "engine/layers/lanes.h"

namespace fastmeta::engine::FASTMETA_ISA::activations {

template <class T>
struct Jet {
  Vec<T> value, first, second;
};

template <class T>
struct Relu {
  explicit Relu(const Node&) {}
  [[gnu::always_inline]] Jet<T> operator()(Vec<T> x) const {
    // NaN is kept, as the second operand; so is its cotangent.
    return {vmax<T>(Vec<T>{}, x), x <= T(0) ? Vec<T>{} : splat<T>(1), Vec<T>{}};
  }
};

template <class T>
struct LeakyRelu {
  T slope;
  explicit LeakyRelu(const Node& node) : slope(static_cast<T>(node.a)) {}
  [[gnu::always_inline]] Jet<T> operator()(Vec<T> x) const {
    const Vec<T> first = x > T(0) ? splat<T>(1) : splat<T>(slope);
    return {x * first, first, Vec<T>{}};
  }
};

template <class T>
struct Elu {
  T alpha;
  explicit Elu(const Node& node) : alpha(static_cast<T>(node.a)) {}
  [[gnu::always_inline]] Jet<T> operator()(Vec<T> x) const {
    const Vec<T> below = alpha * vexpm1<T>(vmin<T>(Vec<T>{}, x));
    return {x > T(0) ? x : below, x > T(0) ? splat<T>(1) : below + alpha,
            x < T(0) ? below + alpha : Vec<T>{}};  // at 0 as torch has it
  }
};

template <class T>
struct Tanh {
  explicit Tanh(const Node&) {}
  [[gnu::always_inline]] Jet<T> operator()(Vec<T> x) const {
    const Vec<T> t = vtanh<T>(x), first = T(1) - t * t;
    return {t, first, T(-2) * t * first};
  }
};

template <class T>
struct Sigmoid {
  explicit Sigmoid(const Node&) {}
  [[gnu::always_inline]] Jet<T> operator()(Vec<T> x) const {
    const Vec<T> s = vsigmoid<T>(x), first = s * (T(1) - s);
    return {s, first, first * (T(1) - T(2) * s)};
  }
};

template <class T>
struct Silu {
  explicit Silu(const Node&) {}
  [[gnu::always_inline]] Jet<T> operator()(Vec<T> x) const {
    const Vec<T> s = vsigmoid<T>(x), r = T(1) - s;
    return {x * s, s + x * s * r, s * r * (T(2) + x * (r - s))};
  }
};

// beta and the threshold on beta * x, from where on it is the identity.
template <class T>
struct Softplus {
  T beta, threshold;
  explicit Softplus(const Node& node)
      : beta(static_cast<T>(node.a)), threshold(static_cast<T>(node.threshold)) {}
  [[gnu::always_inline]] Jet<T> operator()(Vec<T> x) const {
    const Vec<T> z = beta * x, s = vsigmoid<T>(z);
    return {z > threshold ? x : vsoftplus<T>(z) / beta, z > threshold ? splat<T>(1) : s,
            z < threshold ? beta * s * (T(1) - s) : Vec<T>{}};
  }
};

// Derivatives of both forms of gelu are constant far out; there x^2 must not become infinity, which
// zero would turn into NaN. A NaN passes as the second operand.
template <class T>
FASTMETA_INLINE Vec<T> gelu_range(Vec<T> x) {
  return vmax<T>(splat<T>(-40), vmin<T>(splat<T>(40), x));
}

template <class T>
struct Gelu {
  explicit Gelu(const Node&) {}
  [[gnu::always_inline]] Jet<T> operator()(Vec<T> x) const {
    const Vec<T> cdf = T(0.5) * (T(1) + verf<T>(x * T(0.707106781186547524)));
    const Vec<T> near = gelu_range<T>(x), square = near * near;
    const Vec<T> density = T(0.398942280401432678) * vexp<T>(T(-0.5) * square);
    return {x * cdf, cdf + near * density, density * (T(2) - square)};
  }
};

template <class T>
struct GeluTanh {
  explicit GeluTanh(const Node&) {}
  [[gnu::always_inline]] Jet<T> operator()(Vec<T> x) const {
    constexpr T kScale = T(0.797884560802865356), kCubic = T(0.044715);
    const Vec<T> near = gelu_range<T>(x), square = near * near;
    const Vec<T> t = vtanh<T>(kScale * near * (T(1) + kCubic * square));
    const Vec<T> half = T(0.5) * (T(1) + t), slope = T(1) - t * t;
    const Vec<T> inner = kScale * (T(1) + T(3) * kCubic * square);  // derivative of tanh's argument
    const Vec<T> bend = T(6) * kScale * kCubic * near;
    return {x * half, half + T(0.5) * near * slope * inner,
            slope * (inner + T(0.5) * near * (bend - T(2) * t * inner * inner))};
  }
};

template <class T, class Pass>
FASTMETA_INLINE void with_function(const Node& node, Pass&& pass) {
  switch (node.kind) {
    case Kind::kRelu:
      return pass(Relu<T>(node));
    case Kind::kLeakyRelu:
      return pass(LeakyRelu<T>(node));
    case Kind::kElu:
      return pass(Elu<T>(node));
    case Kind::kTanh:
      return pass(Tanh<T>(node));
    case Kind::kSigmoid:
      return pass(Sigmoid<T>(node));
    case Kind::kSilu:
      return pass(Silu<T>(node));
    case Kind::kSoftplus:
      return pass(Softplus<T>(node));
    case Kind::kGelu:
      return node.tanh_gelu ? pass(GeluTanh<T>(node)) : pass(Gelu<T>(node));
    default:
      return;  // the dispatcher (layers.h) sends no other kind here
  }
}

template <class T = double>
int64_t saved_bytes(const Node&, int64_t) {
  return 0;
}
template <class T = double>
int64_t scratch_bytes(const Node&, int64_t) {
  return 0;
}

// f(i) for the places of the output's vectors. What f uses it holds by value: a call that it refers
// to would be read again after each store.
template <class T, class F>
FASTMETA_INLINE void over_vectors(const LayerCall<T>& call, F f) {
  const int64_t n = output_size(*call.node, call.rows);
  for (int64_t i = 0; i < n; i += kWidth<T>) f(i);
}

template <class T>
void forward(const LayerCall<T>& call) {
  with_function<T>(*call.node, [&](const auto& function) {
    over_vectors(call, [=, x = call.x, y = call.y](int64_t i) {
      store(y + i, function(load(x + i)).value);
    });
  });
}

template <class T>
void backward(const LayerCall<T>& call) {
  if (call.gx == nullptr) return;
  with_function<T>(*call.node, [&](const auto& function) {
    over_vectors(call, [=, x = call.x, gy = call.gy, gx = call.gx, add = call.add_gx](int64_t i) {
      give(gx + i, load(gy + i) * function(load(x + i)).first, add);
    });
  });
}

template <class T>
void dual_forward(const LayerCall<T>& call) {
  if (call.dx == nullptr) {
    forward(call);
    clear(call.dy, output_size(*call.node, call.rows));
    return;
  }
  with_function<T>(*call.node, [&](const auto& function) {
    over_vectors(call, [=, x = call.x, dx = call.dx, y = call.y, dy = call.dy](int64_t i) {
      const auto at = function(load(x + i));
      store(y + i, at.value);
      store(dy + i, at.first * load(dx + i));
    });
  });
}

template <class T>
void dual_backward(const LayerCall<T>& call) {
  with_function<T>(*call.node, [&](const auto& function) {
    over_vectors(call, [=, x = call.x, dx = call.dx, gy = call.gy, dgy = call.dgy, gx = call.gx,
                        dgx = call.dgx, add = call.add_gx](int64_t i) {
      const auto at = function(load(x + i));
      const Vec<T> g = load(gy + i);
      if (gx != nullptr) give(gx + i, g * at.first, add);
      if (dgx != nullptr) {
        Vec<T> v = load(dgy + i) * at.first;
        if (dx != nullptr) v += g * at.second * load(dx + i);
        give(dgx + i, v, add);
      }
    });
  });
}

}  // namespace fastmeta::engine::FASTMETA_ISA::activations
