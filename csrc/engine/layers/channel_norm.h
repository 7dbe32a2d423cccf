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
#pragma once
#include "engine/layers/lanes.h"

namespace fastmeta::engine::FASTMETA_ISA::channel_norm {

// Pixels that are read twice while they are in the first cache: once for their mean, once for the
// squares around it. Sums over more pixels join chunk by chunk, which also keeps float sums
// accurate.
constexpr int64_t kChunk = 64;

// Arrays of [ld]. Sums of squares m2 around the mean; co: sums of (x - m)(dx - dm).
template <class T>
struct Moments {
  T *mean, *m2, *dmean, *co;
};

// kDual takes the tangents' moments, too.
template <bool kDual, class T>
void moments(const T* x, const T* dx, int64_t n, int64_t ld, const Moments<T>& to) {
  over_channels<T, kDual ? 2 : 4>(ld, [&](auto vectors, int64_t c) {
    constexpr int kN = vectors, kW = kWidth<T>;
    Vec<T> mean[kN] = {}, m2[kN] = {}, dmean[kN] = {}, co[kN] = {};
    for (int64_t begin = 0; begin < n; begin += kChunk) {
      const int64_t count = min_of(kChunk, n - begin);
      const T* px = x + begin * ld + c;
      const T* pdx = kDual ? dx + begin * ld + c : nullptr;
      Vec<T> sum[kN] = {}, dsum[kN] = {};
      for (int64_t i = 0; i < count; ++i) {
        FASTMETA_UNROLL
        for (int k = 0; k < kN; ++k) {
          sum[k] += load(px + i * ld + k * kW);
          if constexpr (kDual) dsum[k] += load(pdx + i * ld + k * kW);
        }
      }
      const T share = T(1) / static_cast<T>(count);
      FASTMETA_UNROLL
      for (int k = 0; k < kN; ++k) {
        sum[k] *= share;
        dsum[k] *= share;
      }
      Vec<T> squares[kN] = {}, products[kN] = {};
      for (int64_t i = 0; i < count; ++i) {
        FASTMETA_UNROLL
        for (int k = 0; k < kN; ++k) {
          const Vec<T> d = load(px + i * ld + k * kW) - sum[k];
          squares[k] += d * d;
          if constexpr (kDual) products[k] += d * (load(pdx + i * ld + k * kW) - dsum[k]);
        }
      }
      // Join with what came before: Chan, Golub, LeVeque (1979).
      const T part = static_cast<T>(count) / static_cast<T>(begin + count);
      const T weight = part * static_cast<T>(begin);
      FASTMETA_UNROLL
      for (int k = 0; k < kN; ++k) {
        const Vec<T> step = sum[k] - mean[k];
        mean[k] += step * part;
        m2[k] += squares[k] + step * step * weight;
        if constexpr (kDual) {
          const Vec<T> dstep = dsum[k] - dmean[k];
          dmean[k] += dstep * part;
          co[k] += products[k] + step * dstep * weight;
        }
      }
    }
    FASTMETA_UNROLL
    for (int k = 0; k < kN; ++k) {
      store(to.mean + c + k * kW, mean[k]);
      store(to.m2 + c + k * kW, m2[k]);
      if constexpr (kDual) {
        store(to.dmean + c + k * kW, dmean[k]);
        store(to.co + c + k * kW, co[k]);
      }
    }
  });
}

// Arrays of [ld]; dmean is used where dx is there.
template <class T>
struct Scaling {
  const T *mean, *scale, *shift, *dmean, *dscale, *dshift;
};

template <class T>
void normalize(const T* x, int64_t n, int64_t ld, const Scaling<T>& by, T* y) {
  over_channels<T, 4>(ld, [&](auto vectors, int64_t c) {
    constexpr int kN = vectors, kW = kWidth<T>;
    Vec<T> mean[kN], scale[kN], shift[kN];
    FASTMETA_UNROLL
    for (int k = 0; k < kN; ++k) {
      mean[k] = load(by.mean + c + k * kW);
      scale[k] = load(by.scale + c + k * kW);
      shift[k] = load(by.shift + c + k * kW);
    }
    for (int64_t at = c; at < n * ld; at += ld) {
      FASTMETA_UNROLL
      for (int k = 0; k < kN; ++k) {
        store(y + at + k * kW, (load(x + at + k * kW) - mean[k]) * scale[k] + shift[k]);
      }
    }
  });
}

template <bool kDx, class T>
void dual_normalize(const T* x, const T* dx, int64_t n, int64_t ld, const Scaling<T>& by, T* y,
                    T* dy) {
  over_channels<T, 2>(ld, [&](auto vectors, int64_t c) {
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
    for (int64_t at = c; at < n * ld; at += ld) {
      FASTMETA_UNROLL
      for (int k = 0; k < kN; ++k) {
        const Vec<T> centred = load(x + at + k * kW) - mean[k];
        store(y + at + k * kW, centred * scale[k] + shift[k]);
        Vec<T> v = centred * dscale[k] + dshift[k];
        if constexpr (kDx) v += (load(dx + at + k * kW) - dmean[k]) * scale[k];
        store(dy + at + k * kW, v);
      }
    }
  });
}

// Arrays of [ld]: sums over the pixels of h, of h (x - m), and of their tangents dh and
// dh (x - m) + h (dx - dm).
template <class T>
struct Sums {
  T *plain, *centred, *dplain, *dcentred;
};

template <bool kDual, bool kDx, class T>
void sum_cotangents(const T* x, const T* dx, const T* gy, const T* dgy, int64_t n, int64_t ld,
                    const T* mean, const T* dmean, const Sums<T>& to) {
  over_channels<T, kDual ? 2 : 4>(ld, [&](auto vectors, int64_t c) {
    constexpr int kN = vectors, kW = kWidth<T>;
    Vec<T> m[kN], dm[kN], total[4][kN] = {};
    FASTMETA_UNROLL
    for (int k = 0; k < kN; ++k) {
      m[k] = load(mean + c + k * kW);
      if constexpr (kDx) dm[k] = load(dmean + c + k * kW);
    }
    for (int64_t begin = 0; begin < n; begin += kChunk) {
      Vec<T> sum[4][kN] = {};
      const int64_t end = min_of(begin + kChunk, n) * ld;
      for (int64_t at = begin * ld + c; at < end; at += ld) {
        FASTMETA_UNROLL
        for (int k = 0; k < kN; ++k) {
          const Vec<T> h = load(gy + at + k * kW), d = load(x + at + k * kW) - m[k];
          sum[0][k] += h;
          sum[1][k] += h * d;
          if constexpr (kDual) {
            const Vec<T> dh = load(dgy + at + k * kW);
            sum[2][k] += dh;
            sum[3][k] += dh * d;
            if constexpr (kDx) sum[3][k] += h * (load(dx + at + k * kW) - dm[k]);
          }
        }
      }
      FASTMETA_UNROLL
      for (int j = 0; j < (kDual ? 4 : 2); ++j) {
        FASTMETA_UNROLL
        for (int k = 0; k < kN; ++k) total[j][k] += sum[j][k];
      }
    }
    FASTMETA_UNROLL
    for (int k = 0; k < kN; ++k) {
      store(to.plain + c + k * kW, total[0][k]);
      store(to.centred + c + k * kW, total[1][k]);
      if constexpr (kDual) {
        store(to.dplain + c + k * kW, total[2][k]);
        store(to.dcentred + c + k * kW, total[3][k]);
      }
    }
  });
}

// Arrays of [ld], named as above.
template <class T>
struct Spreading {
  const T *mean, *p, *q, *v, *dmean, *dp, *dq, *dv;
};

template <class T>
void spread(const T* x, const T* gy, int64_t n, int64_t ld, const Spreading<T>& by, bool add,
            T* gx) {
  over_channels<T, 2>(ld, [&](auto vectors, int64_t c) {
    constexpr int kN = vectors, kW = kWidth<T>;
    Vec<T> mean[kN], p[kN], q[kN], v[kN];
    FASTMETA_UNROLL
    for (int k = 0; k < kN; ++k) {
      mean[k] = load(by.mean + c + k * kW);
      p[k] = load(by.p + c + k * kW);
      q[k] = load(by.q + c + k * kW);
      v[k] = load(by.v + c + k * kW);
    }
    for (int64_t at = c; at < n * ld; at += ld) {
      FASTMETA_UNROLL
      for (int k = 0; k < kN; ++k) {
        const Vec<T> centred = load(x + at + k * kW) - mean[k];
        give(gx + at + k * kW, load(gy + at + k * kW) * p[k] - q[k] - centred * v[k], add);
      }
    }
  });
}

// gx or dgx may be null.
template <bool kDx, class T>
void dual_spread(const T* x, const T* dx, const T* gy, const T* dgy, int64_t n, int64_t ld,
                 const Spreading<T>& by, bool add, T* gx, T* dgx) {
  over_channels<T, 1>(ld, [&](auto, int64_t c) {
    const Vec<T> mean = load(by.mean + c), p = load(by.p + c), q = load(by.q + c),
                 v = load(by.v + c), dmean = load(by.dmean + c), dp = load(by.dp + c),
                 dq = load(by.dq + c), dv = load(by.dv + c);
    for (int64_t at = c; at < n * ld; at += ld) {
      const Vec<T> h = load(gy + at), centred = load(x + at) - mean;
      if (gx != nullptr) give(gx + at, h * p - q - centred * v, add);
      if (dgx != nullptr) {
        Vec<T> out = load(dgy + at) * p + h * dp - dq - centred * dv;
        if constexpr (kDx) out -= (load(dx + at) - dmean) * v;
        give(dgx + at, out, add);
      }
    }
  });
}

}  // namespace fastmeta::engine::FASTMETA_ISA::channel_norm
