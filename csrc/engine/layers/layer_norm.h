// Layer normalisation (Ba, Kiros, Hinton 2016, arXiv:1607.06450) over a whole row: features, or the
// channels and pixels of an image. Weights lie as a row does: [pixels, ld].
//
// saved: for each row the mean, 1 / sqrt(var + eps) and, after a dual forward, their tangents.
#pragma once
#include "engine/layers/lanes.h"

namespace fastmeta::engine::FASTMETA_ISA::layer_norm {

template <class T>
struct Statistic {
  T mean, inverse, dmean, dinverse;
};

template <class T = double>
int64_t saved_bytes(const Node&, int64_t rows) {
  return rows * static_cast<int64_t>(sizeof(Statistic<T>));
}
template <class T = double>
int64_t scratch_bytes(const Node&, int64_t) {
  return 0;
}

// body(offset, keep) for the vectors of a row, keep(v) zeroing the padding lanes.
template <class T, class Body>
FASTMETA_INLINE void over_row(const Shape& shape, Body&& body) {
  const auto all = [](Vec<T> v) { return v; };
  for (int64_t pixel = 0; pixel < shape.pixels(); ++pixel) {
    const int64_t begin = pixel * shape.ld;
    int64_t c = 0;
    for (; c + kWidth<T> <= shape.channels; c += kWidth<T>) body(begin + c, all);
    for (; c < shape.ld; c += kWidth<T>) {
      const int64_t left = shape.channels - c;
      body(begin + c, [left](Vec<T> v) { return keep_first<T>(v, left); });
    }
  }
}

// Sum over a row of several quantities, body(offset) -> Sums<T, N>; by blocks of pixels, whose sums
// join one by one.
template <class T, int kN>
struct Sums {
  Vec<T> of[kN] = {};
};
template <int kN, class T, class Body>
FASTMETA_INLINE void sum_row(const Shape& shape, Body&& body, T* sums) {
  constexpr int64_t kBlock = 16;
  Sums<T, kN> total;
  for (int64_t begin = 0; begin < shape.pixels(); begin += kBlock) {
    Sums<T, kN> part;
    const int64_t end = min_of(begin + kBlock, shape.pixels());
    for (int64_t pixel = begin; pixel < end; ++pixel) {
      for (int64_t c = 0; c < shape.channels; c += kWidth<T>) {
        const Sums<T, kN> more = body(pixel * shape.ld + c);
        FASTMETA_UNROLL
        for (int k = 0; k < kN; ++k) part.of[k] += keep_first<T>(more.of[k], shape.channels - c);
      }
    }
    FASTMETA_UNROLL
    for (int k = 0; k < kN; ++k) total.of[k] += part.of[k];
  }
  FASTMETA_UNROLL
  for (int k = 0; k < kN; ++k) sums[k] = hsum<T>(total.of[k]);
}

template <bool kDx, class T>
Statistic<T> statistic(const Node& node, const T* x, const T* dx) {
  const T count = static_cast<T>(node.in.pixels() * node.in.channels);
  T first[2] = {}, second[2] = {};
  sum_row<kDx ? 2 : 1, T>(
      node.in,
      [&](int64_t at) {
        Sums<T, kDx ? 2 : 1> s;
        s.of[0] = load(x + at);
        if constexpr (kDx) s.of[1] = load(dx + at);
        return s;
      },
      first);
  Statistic<T> to{};
  to.mean = first[0] / count;
  to.dmean = first[1] / count;
  sum_row<kDx ? 2 : 1, T>(
      node.in,
      [&](int64_t at) {
        const Vec<T> centred = load(x + at) - to.mean;
        Sums<T, kDx ? 2 : 1> s;
        s.of[0] = centred * centred;
        if constexpr (kDx) s.of[1] = centred * (load(dx + at) - to.dmean);
        return s;
      },
      second);
  to.inverse = T(1) / sqrt_of<T>(second[0] / count + static_cast<T>(node.eps));
  to.dinverse = -to.inverse * to.inverse * to.inverse * (second[1] / count);
  return to;
}

template <class T>
void forward(const LayerCall<T>& call) {
  const Node& node = *call.node;
  Statistic<T>* saved = static_cast<Statistic<T>*>(call.saved);
  for (int64_t r = 0; r < call.rows; ++r) {
    const T* x = call.x + r * node.in.row();
    T* y = call.y + r * node.in.row();
    const Statistic<T> s = saved[r] = statistic<false, T>(node, x, nullptr);
    over_row<T>(node.in, [&](int64_t at, auto keep) {
      const Vec<T> normal = keep((load(x + at) - s.mean) * s.inverse);
      store(y + at, normal * load_or(call.w, at, T(1)) + load_or(call.b, at, T(0)));
    });
  }
}

template <bool kDx, class T>
void dual_forward_of(const LayerCall<T>& call) {
  const Node& node = *call.node;
  Statistic<T>* saved = static_cast<Statistic<T>*>(call.saved);
  for (int64_t r = 0; r < call.rows; ++r) {
    const T* x = call.x + r * node.in.row();
    const T* dx = kDx ? call.dx + r * node.in.row() : nullptr;
    T *y = call.y + r * node.in.row(), *dy = call.dy + r * node.in.row();
    const Statistic<T> s = saved[r] = statistic<kDx, T>(node, x, dx);
    over_row<T>(node.in, [&](int64_t at, auto keep) {
      const Vec<T> centred = load(x + at) - s.mean, w = load_or(call.w, at, T(1));
      const Vec<T> normal = keep(centred * s.inverse);
      store(y + at, normal * w + load_or(call.b, at, T(0)));
      Vec<T> v = normal * load_or(call.dw, at, T(0)) + load_or(call.db, at, T(0));
      if constexpr (kDx) {
        v += w * keep((load(dx + at) - s.dmean) * s.inverse + centred * s.dinverse);
      }
      store(dy + at, v);
    });
  }
}

template <class T>
void dual_forward(const LayerCall<T>& call) {
  if (call.dx != nullptr) {
    dual_forward_of<true>(call);
  } else {
    dual_forward_of<false>(call);
  }
}

// With n = (x - mean) inverse and A, B the means of w gy and w gy n over the row:
//   gx = inverse (w gy - A - n B).
template <class T>
void backward(const LayerCall<T>& call) {
  const Node& node = *call.node;
  const T count = static_cast<T>(node.in.pixels() * node.in.channels);
  const Statistic<T>* saved = static_cast<const Statistic<T>*>(call.saved);
  for (int64_t r = 0; r < call.rows; ++r) {
    const T *x = call.x + r * node.in.row(), *gy = call.gy + r * node.in.row();
    const Statistic<T> s = saved[r];
    T means[2];
    sum_row<2, T>(
        node.in,
        [&](int64_t at) {
          const Vec<T> h = load(gy + at), normal = (load(x + at) - s.mean) * s.inverse;
          if (call.gw != nullptr) accumulate(call.gw + at, h * normal);
          if (call.gb != nullptr) accumulate(call.gb + at, h);
          Sums<T, 2> sums;
          sums.of[0] = h * load_or(call.w, at, T(1));
          sums.of[1] = sums.of[0] * normal;
          return sums;
        },
        means);
    if (call.gx == nullptr) continue;
    T* gx = call.gx + r * node.in.row();
    const T a = means[0] / count, b = means[1] / count;
    over_row<T>(node.in, [&](int64_t at, auto keep) {
      const Vec<T> h = load(gy + at) * load_or(call.w, at, T(1));
      const Vec<T> normal = (load(x + at) - s.mean) * s.inverse;
      give(gx + at, keep((h - a - normal * b) * s.inverse), call.add_gx);
    });
  }
}

// One vector of a row in a dual backward: n and w gy with their tangents.
template <bool kDx, class T>
struct DualPoint {
  Vec<T> normal, dnormal, h, dh, weighted, dweighted;

  [[gnu::always_inline]] DualPoint(const LayerCall<T>& call, const Statistic<T>& s, int64_t row,
                                   int64_t at) {
    const Vec<T> centred = load(call.x + row + at) - s.mean;
    normal = centred * s.inverse;
    dnormal = Vec<T>{};
    if constexpr (kDx) {
      dnormal = (load(call.dx + row + at) - s.dmean) * s.inverse + centred * s.dinverse;
    }
    h = load(call.gy + row + at);
    dh = load(call.dgy + row + at);
    const Vec<T> w = load_or(call.w, at, T(1));
    weighted = w * h;
    dweighted = load_or(call.dw, at, T(0)) * h + w * dh;
  }
};

template <bool kDx, class T>
void dual_backward_of(const LayerCall<T>& call) {
  const Node& node = *call.node;
  const T count = static_cast<T>(node.in.pixels() * node.in.channels);
  const Statistic<T>* saved = static_cast<const Statistic<T>*>(call.saved);
  for (int64_t r = 0; r < call.rows; ++r) {
    const int64_t row = r * node.in.row();
    const Statistic<T> s = saved[r];
    T means[4];
    sum_row<4, T>(
        node.in,
        [&](int64_t at) {
          const DualPoint<kDx, T> p(call, s, row, at);
          if (call.gw != nullptr) accumulate(call.gw + at, p.h * p.normal);
          if (call.gb != nullptr) accumulate(call.gb + at, p.h);
          if (call.dgw != nullptr) accumulate(call.dgw + at, p.dh * p.normal + p.h * p.dnormal);
          if (call.dgb != nullptr) accumulate(call.dgb + at, p.dh);
          Sums<T, 4> sums;
          sums.of[0] = p.weighted;
          sums.of[1] = p.weighted * p.normal;
          sums.of[2] = p.dweighted;
          sums.of[3] = p.dweighted * p.normal + p.weighted * p.dnormal;
          return sums;
        },
        means);
    if (call.gx == nullptr && call.dgx == nullptr) continue;
    const T a = means[0] / count, b = means[1] / count, da = means[2] / count,
            db = means[3] / count;
    over_row<T>(node.in, [&](int64_t at, auto keep) {
      const DualPoint<kDx, T> p(call, s, row, at);
      const Vec<T> inner = p.weighted - a - p.normal * b;
      if (call.gx != nullptr) give(call.gx + row + at, keep(inner * s.inverse), call.add_gx);
      if (call.dgx != nullptr) {
        const Vec<T> dinner = p.dweighted - da - p.dnormal * b - p.normal * db;
        give(call.dgx + row + at, keep(inner * s.dinverse + dinner * s.inverse), call.add_gx);
      }
    });
  }
}

template <class T>
void dual_backward(const LayerCall<T>& call) {
  if (call.dx != nullptr) {
    dual_backward_of<true>(call);
  } else {
    dual_backward_of<false>(call);
  }
}

}  // namespace fastmeta::engine::FASTMETA_ISA::layer_norm
