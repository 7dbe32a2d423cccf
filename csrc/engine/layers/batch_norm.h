// Batch normalisation (Ioffe, Szegedy 2015, arXiv:1502.03167): statistics of each channel over the
// rows and pixels of the pass, biased variance; or running statistics, which are constants. With
// the activation behind it, where the plan has joined the two.
//
// saved: mean, 1 / sqrt(var + eps) and, after a dual forward, their tangents, [ld] each.
#pragma once
#include "engine/layers/activations.h"
#include "engine/layers/channel_norm.h"

namespace fastmeta::engine::FASTMETA_ISA::batch_norm {

constexpr int64_t kSavedArrays = 4, kScratchArrays = 12;

template <class T = double>
int64_t saved_bytes(const Node& node, int64_t) {
  return kSavedArrays * node.in.ld * static_cast<int64_t>(sizeof(T));
}
template <class T = double>
int64_t scratch_bytes(const Node& node, int64_t) {
  return kScratchArrays * node.in.ld * static_cast<int64_t>(sizeof(T));
}

// An activation as channel_norm.h wants it.
template <class T, class Function>
struct Bent {
  static constexpr bool kBends = true;
  Function function;
  [[gnu::always_inline]] Vec<T> value(Vec<T> y) const { return function(y).value; }
  [[gnu::always_inline]] Vec<T> slope(Vec<T> y) const { return function(y).first; }
};

// body(activation of the node)
template <class T, class Body>
FASTMETA_INLINE void with_activation(const Node& node, Body&& body) {
  if (!node.activation) {
    body(channel_norm::Straight<T>{});
  } else if (*node.activation == Kind::kRelu) {
    body(Bent<T, activations::Relu<T>>{activations::Relu<T>(node)});
  } else {
    body(Bent<T, activations::LeakyRelu<T>>{activations::LeakyRelu<T>(node)});
  }
}

// One call with its arrays named.
template <class T>
struct Pass {
  const LayerCall<T>& call;
  int64_t n, ld;
  T *mean, *inverse, *dmean, *dinverse;  // saved
  T* scratch[kScratchArrays];

  explicit Pass(const LayerCall<T>& c) : call(c) {
    n = c.rows * c.node->in.pixels();
    ld = c.node->in.ld;
    mean = static_cast<T*>(c.saved);
    inverse = mean + ld;
    dmean = inverse + ld;
    dinverse = dmean + ld;
    for (int64_t k = 0; k < kScratchArrays; ++k) scratch[k] = static_cast<T*>(c.scratch) + k * ld;
  }
  bool constant() const { return call.mean != nullptr; }

  // The scaling of the values, in the last arrays of the scratch.
  channel_norm::Scaling<T> scaling() const {
    T *scale = scratch[kScratchArrays - 2], *shift = scratch[kScratchArrays - 1];
    for (int64_t c = 0; c < ld; c += kWidth<T>) {
      store(scale + c, load(inverse + c) * load_or(call.w, c, T(1)));
      store(shift + c, load_or(call.b, c, T(0)));
    }
    return {mean, scale, shift, dmean, nullptr, nullptr};
  }
};

// Fills the saved arrays. Without dx the tangents are zero. Padding lanes get an inverse of 0, so
// that no eps makes infinities of them.
template <class T>
void statistics(const Pass<T>& pass, const T* dx, bool dual) {
  const LayerCall<T>& call = pass.call;
  const channel_norm::Moments<T> to{pass.mean, pass.inverse, pass.dmean, pass.dinverse};
  const bool moving = dual && dx != nullptr && !pass.constant();
  if (moving) {
    channel_norm::moments<true>(call.x, dx, pass.n, pass.ld, to);
  } else if (!pass.constant()) {
    channel_norm::moments<false>(call.x, dx, pass.n, pass.ld, to);
  }
  const T eps = static_cast<T>(call.node->eps), count = static_cast<T>(pass.n);
  for (int64_t c = 0; c < pass.ld; c += kWidth<T>) {
    Vec<T> var;
    if (pass.constant()) {
      store(pass.mean + c, load(call.mean + c));
      var = load(call.var + c);
    } else {
      var = load(pass.inverse + c) / count;
    }
    const Vec<T> inverse = keep_first<T>(T(1) / vsqrt<T>(var + eps), call.node->in.channels - c);
    store(pass.inverse + c, inverse);
    if (!dual) continue;
    if (moving) {
      const Vec<T> half_dvar = load(pass.dinverse + c) / count;
      store(pass.dinverse + c, -inverse * inverse * inverse * half_dvar);
    } else {
      store(pass.dmean + c, Vec<T>{});
      store(pass.dinverse + c, Vec<T>{});
    }
  }
}

template <class T>
void forward(const LayerCall<T>& call) {
  const Pass<T> pass(call);
  if (pass.n == 0) return;
  statistics<T>(pass, nullptr, false);
  const channel_norm::Scaling<T> by = pass.scaling();
  with_activation<T>(*call.node, [&](const auto& f) {
    channel_norm::normalize<T>(call.x, pass.n, pass.ld, by, call.y, f);
  });
}

template <class T>
void dual_forward(const LayerCall<T>& call) {
  const Pass<T> pass(call);
  if (pass.n == 0) return;
  statistics<T>(pass, call.dx, true);
  T *dscale = pass.scratch[0], *dshift = pass.scratch[1];
  for (int64_t c = 0; c < pass.ld; c += kWidth<T>) {
    const Vec<T> inverse = load(pass.inverse + c), w = load_or(call.w, c, T(1));
    store(dscale + c, load(pass.dinverse + c) * w + inverse * load_or(call.dw, c, T(0)));
    store(dshift + c, load_or(call.db, c, T(0)));
  }
  channel_norm::Scaling<T> by = pass.scaling();
  by.dscale = dscale;
  by.dshift = dshift;
  with_activation<T>(*call.node, [&](const auto& f) {
    if (call.dx != nullptr) {
      channel_norm::dual_normalize<true>(call.x, call.dx, pass.n, pass.ld, by, call.y, call.dy, f);
    } else {
      channel_norm::dual_normalize<false>(call.x, call.dx, pass.n, pass.ld, by, call.y, call.dy, f);
    }
  });
}

// From the sums over the pixels: parameter gradients, and the constants of the spreading. Running
// statistics have no share in gx: q and v are 0.
template <class T>
void finish_sums(const Pass<T>& pass, const channel_norm::Sums<T>& sums, bool dual, T* const* to) {
  const LayerCall<T>& call = pass.call;
  const T share = pass.constant() ? T(0) : T(1) / static_cast<T>(pass.n);
  for (int64_t c = 0; c < pass.ld; c += kWidth<T>) {
    const Vec<T> inverse = load(pass.inverse + c), w = load_or(call.w, c, T(1));
    const Vec<T> plain = load(sums.plain + c), centred = load(sums.centred + c);
    if (call.gb != nullptr) accumulate(call.gb + c, plain);
    if (call.gw != nullptr) accumulate(call.gw + c, inverse * centred);
    const Vec<T> a = w * plain * share, b = w * inverse * centred * share;
    store(to[0] + c, inverse * w);
    store(to[1] + c, inverse * a);
    store(to[2] + c, inverse * inverse * b);
    if (!dual) continue;
    const Vec<T> dinverse = load(pass.dinverse + c), dw = load_or(call.dw, c, T(0));
    const Vec<T> dplain = load(sums.dplain + c);
    const Vec<T> dnormal = dinverse * centred + inverse * load(sums.dcentred + c);
    if (call.dgb != nullptr) accumulate(call.dgb + c, dplain);
    if (call.dgw != nullptr) accumulate(call.dgw + c, dnormal);
    const Vec<T> da = (dw * plain + w * dplain) * share;
    const Vec<T> db = (dw * inverse * centred + w * dnormal) * share;
    store(to[3] + c, dinverse * w + inverse * dw);
    store(to[4] + c, dinverse * a + inverse * da);
    store(to[5] + c, T(2) * inverse * dinverse * b + inverse * inverse * db);
  }
}

template <class T>
void backward(const LayerCall<T>& call) {
  const Pass<T> pass(call);
  if (pass.n == 0) return;
  const channel_norm::Sums<T> sums{pass.scratch[0], pass.scratch[1], nullptr, nullptr};
  T* const* to = pass.scratch + 4;
  const channel_norm::Scaling<T> by = pass.scaling();
  with_activation<T>(*call.node, [&](const auto& f) {
    channel_norm::sum_cotangents<false, false, T>(call.x, nullptr, call.gy, nullptr, pass.n,
                                                  pass.ld, by, sums, f);
    finish_sums(pass, sums, false, to);
    if (call.gx == nullptr) return;
    channel_norm::spread<T>(
        call.x, call.gy, pass.n, pass.ld,
        {pass.mean, to[0], to[1], to[2], nullptr, nullptr, nullptr, nullptr, by.shift}, call.add_gx,
        call.gx, f);
  });
}

template <bool kDx, class T>
void dual_backward_of(const LayerCall<T>& call) {
  const Pass<T> pass(call);
  if (pass.n == 0) return;
  const channel_norm::Sums<T> sums{pass.scratch[0], pass.scratch[1], pass.scratch[2],
                                   pass.scratch[3]};
  T* const* to = pass.scratch + 4;
  const channel_norm::Scaling<T> by = pass.scaling();
  with_activation<T>(*call.node, [&](const auto& f) {
    channel_norm::sum_cotangents<true, kDx, T>(call.x, call.dx, call.gy, call.dgy, pass.n, pass.ld,
                                               by, sums, f);
    finish_sums(pass, sums, true, to);
    if (call.gx == nullptr && call.dgx == nullptr) return;
    channel_norm::dual_spread<kDx, T>(
        call.x, call.dx, call.gy, call.dgy, pass.n, pass.ld,
        {pass.mean, to[0], to[1], to[2], pass.dmean, to[3], to[4], to[5], by.shift}, call.add_gx,
        call.gx, call.dgx, f);
  });
}

template <class T>
void dual_backward(const LayerCall<T>& call) {
  if (call.dx != nullptr) {
    dual_backward_of<true>(call);
  } else {
    dual_backward_of<false>(call);
  }
}

}  // namespace fastmeta::engine::FASTMETA_ISA::batch_norm
