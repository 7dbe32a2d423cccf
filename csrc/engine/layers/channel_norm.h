// Normalisation by statistics of channels, the parts that batch_norm and group_norm share. Each is
// one loop over n pixels of [n, ld] with the channels in vectors, channel constants in registers.
//
// Notation: m mean, r = 1 / sqrt(var + eps), h = gy; d marks a tangent.
//
//   y  = s (x - m) + b                            s = r w
//   dy = s (dx - dm) + ds (x - m) + db
//
// With A the mean of w h, B the mean of w h r (x - m), over what shares a statistic:
//
//   gx  = p h - q - v (x - m)                     p = r w, q = r A, v = r^2 B
//   dgx = p dh + dp h - dq - dv (x - m) - v (dx - dm)
//
// An activation f behind the scaling makes f(y) of y and f'(y) dy of dy; and then h is f'(y) times
// the cotangent that comes in, with y computed once more. f is piecewise linear, so f'' is 0.
#pragma once
#include "engine/layers/lanes.h"

namespace fastmeta::engine::FASTMETA_ISA::channel_norm {

// Pixels whose sums are taken alone before they join the total: float sums stay accurate, and what
// is read twice (for the mean, and for the squares around it) is still in the cache.
constexpr int64_t kChunk = 64;
// Pixels of a tile where elements are written: few enough for the first cache.
constexpr int64_t kTile = 16;

// No activation. One has the same members, and kBends = true.
template <class T>
struct Straight {
  static constexpr bool kBends = false;
  [[gnu::always_inline]] Vec<T> value(Vec<T> y) const { return y; }
  [[gnu::always_inline]] Vec<T> slope(Vec<T>) const { return splat<T>(1); }
};

// Arrays of [ld]. Sums of squares m2 around the mean; co: sums of (x - m)(dx - dm).
template <class T>
struct Moments {
  T *mean, *m2, *dmean, *co;
};

// kDual takes the tangents' moments, too. n > 0.
template <bool kDual, class T>
void moments(const T* x, const T* dx, int64_t n, int64_t ld, const Moments<T>& to) {
  const auto body = [&](auto vectors, int64_t c, int64_t begin, int64_t end) {
    constexpr int kN = vectors, kW = kWidth<T>;
    Vec<T> mean[kN] = {}, dmean[kN] = {};
    for (int64_t at = begin * ld + c; at < end * ld; at += ld) {
      FASTMETA_UNROLL
      for (int k = 0; k < kN; ++k) {
        mean[k] += load(x + at + k * kW);
        if constexpr (kDual) dmean[k] += load(dx + at + k * kW);
      }
    }
    const T share = T(1) / static_cast<T>(end - begin);
    FASTMETA_UNROLL
    for (int k = 0; k < kN; ++k) {
      mean[k] *= share;
      dmean[k] *= share;
    }
    Vec<T> m2[kN] = {}, co[kN] = {};
    for (int64_t at = begin * ld + c; at < end * ld; at += ld) {
      FASTMETA_UNROLL
      for (int k = 0; k < kN; ++k) {
        const Vec<T> d = load(x + at + k * kW) - mean[k];
        m2[k] += d * d;
        if constexpr (kDual) co[k] += d * (load(dx + at + k * kW) - dmean[k]);
      }
    }
    // Join with the chunks before: Chan, Golub, LeVeque (1979).
    const T part = static_cast<T>(end - begin) / static_cast<T>(end);
    const T weight = part * static_cast<T>(begin);
    FASTMETA_UNROLL
    for (int k = 0; k < kN; ++k) {
      const int64_t at = c + k * kW;
      if (begin > 0) {
        const Vec<T> before = load(to.mean + at), step = mean[k] - before;
        mean[k] = before + step * part;
        m2[k] += load(to.m2 + at) + step * step * weight;
        if constexpr (kDual) {
          const Vec<T> dbefore = load(to.dmean + at), dstep = dmean[k] - dbefore;
          dmean[k] = dbefore + dstep * part;
          co[k] += load(to.co + at) + step * dstep * weight;
        }
      }
      store(to.mean + at, mean[k]);
      store(to.m2 + at, m2[k]);
      if constexpr (kDual) {
        store(to.dmean + at, dmean[k]);
        store(to.co + at, co[k]);
      }
    }
  };
  over_tiles<T, kDual ? 2 : 4, kChunk>(n, ld, body);
}

// Arrays of [ld]; dmean is used where dx is there.
template <class T>
struct Scaling {
  const T *mean, *scale, *shift, *dmean, *dscale, *dshift;
};

template <class T, class F = Straight<T>>
void normalize(const T* x, int64_t n, int64_t ld, const Scaling<T>& by, T* y, const F& f = {}) {
  const auto body = [&](auto vectors, int64_t c, int64_t begin, int64_t end) {
    constexpr int kN = vectors, kW = kWidth<T>;
    Vec<T> mean[kN], scale[kN], shift[kN];
    FASTMETA_UNROLL
    for (int k = 0; k < kN; ++k) {
      mean[k] = load(by.mean + c + k * kW);
      scale[k] = load(by.scale + c + k * kW);
      shift[k] = load(by.shift + c + k * kW);
    }
    for (int64_t at = begin * ld + c; at < end * ld; at += ld) {
      FASTMETA_UNROLL
      for (int k = 0; k < kN; ++k) {
        store(y + at + k * kW, f.value((load(x + at + k * kW) - mean[k]) * scale[k] + shift[k]));
      }
    }
  };
  over_tiles<T, 4, kTile>(n, ld, body);
}

template <bool kDx, class T, class F = Straight<T>>
void dual_normalize(const T* x, const T* dx, int64_t n, int64_t ld, const Scaling<T>& by, T* y,
                    T* dy, const F& f = {}) {
  const auto body = [&](auto vectors, int64_t c, int64_t begin, int64_t end) {
    constexpr int kN = vectors, kW = kWidth<T>;
    Vec<T> mean[kN], scale[kN], shift[kN], dmean[kN], dscale[kN], dshift[kN];
    FASTMETA_UNROLL
    for (int k = 0; k < kN; ++k) {
      mean[k] = load(by.mean + c + k * kW);
      scale[k] = load(by.scale + c + k * kW);
      shift[k] = load(by.shift + c + k * kW);
      dmean[k] = load(by.dmean + c + k * kW);
      dscale[k] = load(by.dscale + c + k * kW);
      dshift[k] = load(by.dshift + c + k * kW);
    }
    for (int64_t at = begin * ld + c; at < end * ld; at += ld) {
      FASTMETA_UNROLL
      for (int k = 0; k < kN; ++k) {
        const Vec<T> centred = load(x + at + k * kW) - mean[k];
        const Vec<T> inner = centred * scale[k] + shift[k];
        store(y + at + k * kW, f.value(inner));
        Vec<T> v = centred * dscale[k] + dshift[k];
        if constexpr (kDx) v += (load(dx + at + k * kW) - dmean[k]) * scale[k];
        store(dy + at + k * kW, v * f.slope(inner));
      }
    }
  };
  over_tiles<T, 2, kTile>(n, ld, body);
}

// Arrays of [ld]: sums over the pixels of h, of h (x - m), and of their tangents dh and
// dh (x - m) + h (dx - dm).
template <class T>
struct Sums {
  T *plain, *centred, *dplain, *dcentred;
};

template <bool kDual, bool kDx, class T, class F = Straight<T>>
void sum_cotangents(const T* x, const T* dx, const T* gy, const T* dgy, int64_t n, int64_t ld,
                    const Scaling<T>& by, const Sums<T>& to, const F& f = {}) {
  const auto body = [&](auto vectors, int64_t c, int64_t begin, int64_t end) {
    constexpr int kN = vectors, kW = kWidth<T>;
    Vec<T> m[kN], dm[kN], scale[kN], shift[kN], sum[4][kN] = {};
    FASTMETA_UNROLL
    for (int k = 0; k < kN; ++k) {
      m[k] = load(by.mean + c + k * kW);
      if constexpr (kDx) dm[k] = load(by.dmean + c + k * kW);
      if constexpr (F::kBends) {
        scale[k] = load(by.scale + c + k * kW);
        shift[k] = load(by.shift + c + k * kW);
      }
    }
    for (int64_t at = begin * ld + c; at < end * ld; at += ld) {
      FASTMETA_UNROLL
      for (int k = 0; k < kN; ++k) {
        const Vec<T> d = load(x + at + k * kW) - m[k];
        Vec<T> slope = splat<T>(1);
        if constexpr (F::kBends) slope = f.slope(d * scale[k] + shift[k]);
        const Vec<T> h = load(gy + at + k * kW) * slope;
        sum[0][k] += h;
        sum[1][k] += h * d;
        if constexpr (kDual) {
          const Vec<T> dh = load(dgy + at + k * kW) * slope;
          sum[2][k] += dh;
          sum[3][k] += dh * d;
          if constexpr (kDx) sum[3][k] += h * (load(dx + at + k * kW) - dm[k]);
        }
      }
    }
    T* const totals[] = {to.plain, to.centred, to.dplain, to.dcentred};
    FASTMETA_UNROLL
    for (int j = 0; j < (kDual ? 4 : 2); ++j) {
      FASTMETA_UNROLL
      for (int k = 0; k < kN; ++k) give(totals[j] + c + k * kW, sum[j][k], begin > 0);
    }
  };
  over_tiles<T, F::kBends || kDual ? 2 : 4, kChunk>(n, ld, body);
}

// Arrays of [ld], named as above; p is the scale, and shift is used by activations alone.
template <class T>
struct Spreading {
  const T *mean, *p, *q, *v, *dmean, *dp, *dq, *dv, *shift = nullptr;
};

template <class T, class F = Straight<T>>
void spread(const T* x, const T* gy, int64_t n, int64_t ld, const Spreading<T>& by, bool add, T* gx,
            const F& f = {}) {
  const auto body = [&](auto vectors, int64_t c, int64_t begin, int64_t end) {
    constexpr int kN = vectors, kW = kWidth<T>;
    Vec<T> mean[kN], p[kN], q[kN], v[kN], shift[kN];
    FASTMETA_UNROLL
    for (int k = 0; k < kN; ++k) {
      mean[k] = load(by.mean + c + k * kW);
      p[k] = load(by.p + c + k * kW);
      q[k] = load(by.q + c + k * kW);
      v[k] = load(by.v + c + k * kW);
      if constexpr (F::kBends) shift[k] = load(by.shift + c + k * kW);
    }
    for (int64_t at = begin * ld + c; at < end * ld; at += ld) {
      FASTMETA_UNROLL
      for (int k = 0; k < kN; ++k) {
        const Vec<T> centred = load(x + at + k * kW) - mean[k];
        Vec<T> h = load(gy + at + k * kW);
        if constexpr (F::kBends) h *= f.slope(centred * p[k] + shift[k]);
        give(gx + at + k * kW, h * p[k] - q[k] - centred * v[k], add);
      }
    }
  };
  over_tiles<T, 2, kTile>(n, ld, body);
}

// gx or dgx may be null.
template <bool kDx, class T, class F = Straight<T>>
void dual_spread(const T* x, const T* dx, const T* gy, const T* dgy, int64_t n, int64_t ld,
                 const Spreading<T>& by, bool add, T* gx, T* dgx, const F& f = {}) {
  const auto body = [&](auto, int64_t c, int64_t begin, int64_t end) {
    const Vec<T> mean = load(by.mean + c), p = load(by.p + c), q = load(by.q + c),
                 v = load(by.v + c), dmean = load(by.dmean + c), dp = load(by.dp + c),
                 dq = load(by.dq + c), dv = load(by.dv + c);
    Vec<T> shift{};
    if constexpr (F::kBends) shift = load(by.shift + c);
    for (int64_t at = begin * ld + c; at < end * ld; at += ld) {
      const Vec<T> centred = load(x + at) - mean;
      Vec<T> slope = splat<T>(1);
      if constexpr (F::kBends) slope = f.slope(centred * p + shift);
      const Vec<T> h = load(gy + at) * slope;
      if (gx != nullptr) give(gx + at, h * p - q - centred * v, add);
      if (dgx != nullptr) {
        Vec<T> out = load(dgy + at) * slope * p + h * dp - dq - centred * dv;
        if constexpr (kDx) out -= (load(dx + at) - dmean) * v;
        give(dgx + at, out, add);
      }
    }
  };
  over_tiles<T, 1, kTile>(n, ld, body);
}

}  // namespace fastmeta::engine::FASTMETA_ISA::channel_norm
