// Group normalisation (Wu, He 2018, arXiv:1803.08494): statistics of each row over its pixels and
// the channels of a group, biased variance. Groups of one channel are instance normalisation.
//
// saved: for each row and group the mean, 1 / sqrt(var + eps) and, after a dual forward, their
// tangents.
#pragma once
#include "engine/layers/channel_norm.h"

namespace fastmeta::engine::FASTMETA_ISA::group_norm {

constexpr int64_t kScratchArrays = 14;

template <class T>
struct Statistic {
  T mean, inverse, dmean, dinverse;
};

template <class T = double>
int64_t saved_bytes(const Node& node, int64_t rows) {
  return rows * node.groups * static_cast<int64_t>(sizeof(Statistic<T>));
}
template <class T = double>
int64_t scratch_bytes(const Node& node, int64_t) {
  return kScratchArrays * node.in.ld * static_cast<int64_t>(sizeof(T));
}

// One call with its arrays named.
template <class T>
struct Pass {
  const LayerCall<T>& call;
  const Node& node;
  int64_t pixels, ld, row, width;  // width: channels of a group
  T* scratch[kScratchArrays];      // [ld] each, zeros at first: padding lanes stay so

  explicit Pass(const LayerCall<T>& c) : call(c), node(*c.node) {
    pixels = node.in.pixels();
    ld = node.in.ld;
    row = node.in.row();
    width = node.in.channels / node.groups;
    clear(static_cast<T*>(c.scratch), kScratchArrays * ld);
    for (int64_t k = 0; k < kScratchArrays; ++k) scratch[k] = static_cast<T*>(c.scratch) + k * ld;
  }
  Statistic<T>* statistics(int64_t r) const {
    return static_cast<Statistic<T>*>(call.saved) + r * node.groups;
  }
  const T* dx(int64_t r) const { return call.dx != nullptr ? call.dx + r * row : nullptr; }
};

template <class T>
FASTMETA_INLINE T entry(const T* p, int64_t c, T otherwise) {
  return p != nullptr ? p[c] : otherwise;
}

// Joins the moments of a group's channels.
template <class T>
Statistic<T> join(const Pass<T>& pass, const channel_norm::Moments<T>& of, int64_t first,
                  bool moving) {
  const T pixels = static_cast<T>(pass.pixels), width = static_cast<T>(pass.width);
  Statistic<T> s{};
  for (int64_t c = first; c < first + pass.width; ++c) {
    s.mean += of.mean[c];
    if (moving) s.dmean += of.dmean[c];
  }
  s.mean /= width;
  s.dmean /= width;
  T m2 = 0, co = 0;
  for (int64_t c = first; c < first + pass.width; ++c) {
    const T step = of.mean[c] - s.mean;
    m2 += of.m2[c] + pixels * step * step;
    if (moving) co += of.co[c] + pixels * step * (of.dmean[c] - s.dmean);
  }
  s.inverse = T(1) / sqrt_of<T>(m2 / (pixels * width) + static_cast<T>(pass.node.eps));
  s.dinverse = -s.inverse * s.inverse * s.inverse * (co / (pixels * width));
  return s;
}

template <bool kDual, class T>
void forward_of(const LayerCall<T>& call) {
  const Pass<T> pass(call);
  const bool moving = kDual && call.dx != nullptr;
  const channel_norm::Moments<T> moments{pass.scratch[0], pass.scratch[1], pass.scratch[2],
                                         pass.scratch[3]};
  T *mean = pass.scratch[4], *scale = pass.scratch[5], *shift = pass.scratch[6],
    *dmean = pass.scratch[7], *dscale = pass.scratch[8], *dshift = pass.scratch[9];
  for (int64_t r = 0; r < call.rows; ++r) {
    const T *x = call.x + r * pass.row, *dx = pass.dx(r);
    if (moving) {
      channel_norm::moments<true>(x, dx, pass.pixels, pass.ld, moments);
    } else {
      channel_norm::moments<false>(x, dx, pass.pixels, pass.ld, moments);
    }
    for (int64_t g = 0; g < pass.node.groups; ++g) {
      const Statistic<T> s = join(pass, moments, g * pass.width, moving);
      pass.statistics(r)[g] = s;
      for (int64_t c = g * pass.width; c < (g + 1) * pass.width; ++c) {
        const T w = entry(call.w, c, T(1));
        mean[c] = s.mean;
        scale[c] = s.inverse * w;
        shift[c] = entry(call.b, c, T(0));
        if constexpr (kDual) {
          dmean[c] = s.dmean;
          dscale[c] = s.dinverse * w + s.inverse * entry(call.dw, c, T(0));
          dshift[c] = entry(call.db, c, T(0));
        }
      }
    }
    const channel_norm::Scaling<T> by{mean, scale, shift, dmean, dscale, dshift};
    T* y = call.y + r * pass.row;
    if constexpr (!kDual) {
      channel_norm::normalize(x, pass.pixels, pass.ld, by, y);
    } else if (moving) {
      channel_norm::dual_normalize<true>(x, dx, pass.pixels, pass.ld, by, y,
                                         call.dy + r * pass.row);
    } else {
      channel_norm::dual_normalize<false>(x, dx, pass.pixels, pass.ld, by, y,
                                          call.dy + r * pass.row);
    }
  }
}

template <class T>
void forward(const LayerCall<T>& call) {
  forward_of<false>(call);
}
template <class T>
void dual_forward(const LayerCall<T>& call) {
  forward_of<true>(call);
}

// Parameter gradients of a group's channels, and the constants of its spreading, from their sums.
template <bool kDual, class T>
void finish_group(const Pass<T>& pass, const channel_norm::Sums<T>& sums, int64_t first,
                  const Statistic<T>& s, T* const* to) {
  const LayerCall<T>& call = pass.call;
  T a = 0, b = 0, da = 0, db = 0;
  for (int64_t c = first; c < first + pass.width; ++c) {
    const T w = entry(call.w, c, T(1)), normal = s.inverse * sums.centred[c];
    if (call.gb != nullptr) call.gb[c] += sums.plain[c];
    if (call.gw != nullptr) call.gw[c] += normal;
    a += w * sums.plain[c];
    b += w * normal;
    if constexpr (kDual) {
      const T dw = entry(call.dw, c, T(0));
      const T dnormal = s.dinverse * sums.centred[c] + s.inverse * sums.dcentred[c];
      if (call.dgb != nullptr) call.dgb[c] += sums.dplain[c];
      if (call.dgw != nullptr) call.dgw[c] += dnormal;
      da += dw * sums.plain[c] + w * sums.dplain[c];
      db += dw * normal + w * dnormal;
    }
  }
  const T share = T(1) / static_cast<T>(pass.pixels * pass.width);
  a *= share;
  b *= share;
  da *= share;
  db *= share;
  for (int64_t c = first; c < first + pass.width; ++c) {
    const T w = entry(call.w, c, T(1));
    to[0][c] = s.inverse * w;
    to[1][c] = s.inverse * a;
    to[2][c] = s.inverse * s.inverse * b;
    if constexpr (kDual) {
      to[3][c] = s.dinverse * w + s.inverse * entry(call.dw, c, T(0));
      to[4][c] = s.dinverse * a + s.inverse * da;
      to[5][c] = T(2) * s.inverse * s.dinverse * b + s.inverse * s.inverse * db;
    }
  }
}

template <bool kDual, bool kDx, class T>
void backward_of(const LayerCall<T>& call) {
  const Pass<T> pass(call);
  const channel_norm::Sums<T> sums{pass.scratch[0], pass.scratch[1], pass.scratch[2],
                                   pass.scratch[3]};
  T *mean = pass.scratch[4], *dmean = pass.scratch[5];
  T* const* to = pass.scratch + 6;
  for (int64_t r = 0; r < call.rows; ++r) {
    const T *x = call.x + r * pass.row, *dx = pass.dx(r), *gy = call.gy + r * pass.row;
    const T* dgy = kDual ? call.dgy + r * pass.row : nullptr;
    const Statistic<T>* statistics = pass.statistics(r);
    for (int64_t c = 0; c < pass.node.in.channels; ++c) {
      mean[c] = statistics[c / pass.width].mean;
      if constexpr (kDual) dmean[c] = statistics[c / pass.width].dmean;
    }
    channel_norm::sum_cotangents<kDual, kDx, T>(x, dx, gy, dgy, pass.pixels, pass.ld,
                                                {mean, nullptr, nullptr, dmean, nullptr, nullptr},
                                                sums);
    for (int64_t g = 0; g < pass.node.groups; ++g) {
      finish_group<kDual>(pass, sums, g * pass.width, statistics[g], to);
    }
    const channel_norm::Spreading<T> by{mean, to[0], to[1], to[2], dmean, to[3], to[4], to[5]};
    T* gx = call.gx != nullptr ? call.gx + r * pass.row : nullptr;
    T* dgx = kDual && call.dgx != nullptr ? call.dgx + r * pass.row : nullptr;
    if constexpr (kDual) {
      channel_norm::dual_spread<kDx>(x, dx, gy, dgy, pass.pixels, pass.ld, by, call.add_gx, gx,
                                     dgx);
    } else if (gx != nullptr) {
      channel_norm::spread(x, gy, pass.pixels, pass.ld, by, call.add_gx, gx);
    }
  }
}

template <class T>
void backward(const LayerCall<T>& call) {
  backward_of<false, false>(call);
}
template <class T>
void dual_backward(const LayerCall<T>& call) {
  if (call.dx != nullptr) {
    backward_of<true, true>(call);
  } else {
    backward_of<true, false>(call);
  }
}

}  // namespace fastmeta::engine::FASTMETA_ISA::group_norm
