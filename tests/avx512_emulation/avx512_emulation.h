// The AVX-512 kernels on a machine that has AVX2 only: the few intrinsics that csrc/ names, each as
// two of AVX2. Vectors of 64 bytes are the compiler's own (vector_size), which it splits by itself.
// Included before everything else by tests/avx512_emulation/c++; what the kernels do with 16 lanes,
// 32 registers' worth of tile and masked loads is then run, only the instructions are not.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cmath>

// Every set counts as present, so that the dispatcher takes the AVX-512 kernels.
#define __builtin_cpu_supports(name) 1

#if defined(FASTMETA_EMULATE_AVX512)
#define __AVX512F__ 1

namespace fastmeta_avx512_emulation {

typedef float Floats __attribute__((vector_size(64)));
typedef double Doubles __attribute__((vector_size(64)));
typedef unsigned short Halves __attribute__((vector_size(32)));
typedef unsigned short Shorts __attribute__((vector_size(64)));
typedef unsigned Words __attribute__((vector_size(64)));

template <class Half>
struct Two {
  Half half[2];
};

template <class Whole, class Half, class F>
static inline __attribute__((always_inline)) Whole by_halves(Whole a, Whole b, F f) {
  const auto x = __builtin_bit_cast(Two<Half>, a), y = __builtin_bit_cast(Two<Half>, b);
  return __builtin_bit_cast(Whole, Two<Half>{{f(x.half[0], y.half[0]), f(x.half[1], y.half[1])}});
}

#define FASTMETA_BY_HALVES(name, Whole, Half, ...)                                                \
  static inline __attribute__((always_inline)) Whole name(unsigned, Whole a, Whole b = Whole{}) { \
    return by_halves<Whole, Half>(a, b, [](Half x, Half y) -> Half {                              \
      (void)y;                                                                                    \
      return __VA_ARGS__;                                                                         \
    });                                                                                           \
  }
FASTMETA_BY_HALVES(max_ps, Floats, __m256, _mm256_max_ps(x, y))
FASTMETA_BY_HALVES(min_ps, Floats, __m256, _mm256_min_ps(x, y))
FASTMETA_BY_HALVES(sqrt_ps, Floats, __m256, _mm256_sqrt_ps(x))
FASTMETA_BY_HALVES(round_ps, Floats, __m256,
                   _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))
FASTMETA_BY_HALVES(max_pd, Doubles, __m256d, _mm256_max_pd(x, y))
FASTMETA_BY_HALVES(min_pd, Doubles, __m256d, _mm256_min_pd(x, y))
FASTMETA_BY_HALVES(sqrt_pd, Doubles, __m256d, _mm256_sqrt_pd(x))
FASTMETA_BY_HALVES(round_pd, Doubles, __m256d,
                   _mm256_round_pd(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))
#undef FASTMETA_BY_HALVES

// a * 2^floor(b), rounded once; exponents past every number's are as good as larger ones.
template <class Whole>
static inline Whole scalef(Whole a, Whole b) {
  for (int i = 0; i < static_cast<int>(sizeof(a) / sizeof(a[0])); ++i) {
    const auto n = std::floor(b[i] + 0);
    a[i] = n != n ? n : std::scalbn(a[i] + 0, static_cast<int>(std::clamp<double>(n, -9000, 9000)));
  }
  return a;
}

// Lanes that the mask leaves out are neither read nor written.
template <class Whole, class T>
static inline Whole masked_load(unsigned mask, const T* p) {
  Whole x = {};
  for (int i = 0; i < 64 / (int)sizeof(T); ++i) {
    if (mask >> i & 1) x[i] = p[i];
  }
  return x;
}
template <class Whole, class T>
static inline void masked_store(T* p, unsigned mask, Whole x) {
  for (int i = 0; i < 64 / (int)sizeof(T); ++i) {
    if (mask >> i & 1) p[i] = x[i];
  }
}

// Sums of two products a lane, of bfloat16 in the halves of words: the upper product is added
// first, each with one rounding to nearest; what is below the normal range is zero, before and
// after.
static inline __m256 flushed(__m256 x) {
  const __m256 tiny = _mm256_set1_ps(0x1p-126f), sign = _mm256_set1_ps(-0.0f);
  const __m256 is_tiny = _mm256_cmp_ps(_mm256_andnot_ps(sign, x), tiny, _CMP_LT_OQ);
  return _mm256_andnot_ps(_mm256_andnot_ps(sign, is_tiny), x);
}
static inline __m256 dot_pairs(__m256 sum, __m256i a, __m256i b) {
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  const auto add = [](__m256 s, __m256i x, __m256i y) {
    return flushed(_mm256_fmadd_ps(flushed(_mm256_castsi256_ps(x)), flushed(_mm256_castsi256_ps(y)),
                                   flushed(s)));
  };
  sum = add(sum, _mm256_and_si256(a, upper), _mm256_and_si256(b, upper));
  return add(sum, _mm256_slli_epi32(a, 16), _mm256_slli_epi32(b, 16));
}
static inline Floats dot_pairs(Floats sum, Floats a, Floats b) {
  const auto s = __builtin_bit_cast(Two<__m256>, sum);
  const auto x = __builtin_bit_cast(Two<__m256i>, a), y = __builtin_bit_cast(Two<__m256i>, b);
  return __builtin_bit_cast(Floats, Two<__m256>{{dot_pairs(s.half[0], x.half[0], y.half[0]),
                                                 dot_pairs(s.half[1], x.half[1], y.half[1])}});
}

// To bfloat16, to nearest, numbers below the normal range to zero: `lower` in the lower half.
static inline Words to_bfloat16(Floats x) {
  const Words u = __builtin_bit_cast(Words, x), size = u & 0x7fffffffu;
  const Words nan = __builtin_bit_cast(Words, size > 0x7f800000u);
  const Words tiny = __builtin_bit_cast(Words, size < 0x00800000u);
  const Words rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return (tiny & u >> 16 & 0x8000u) | (~tiny & nan & (u >> 16 | 0x40u)) | (~tiny & ~nan & rounded);
}
static inline Shorts to_bfloat16(Floats upper, Floats lower) {
  const Words low = to_bfloat16(lower), high = to_bfloat16(upper);
  Shorts x;
  for (int i = 0; i < 32; ++i) x[i] = static_cast<unsigned short>(i < 16 ? low[i] : high[i - 16]);
  return x;
}

static inline Floats from_halves(Halves h) {
  const auto x = __builtin_bit_cast(Two<__m128i>, h);
  return __builtin_bit_cast(Floats,
                            Two<__m256>{{_mm256_cvtph_ps(x.half[0]), _mm256_cvtph_ps(x.half[1])}});
}
static inline Halves to_halves(Floats f) {
  const auto x = __builtin_bit_cast(Two<__m256>, f);
  return __builtin_bit_cast(
      Halves, Two<__m128i>{{_mm256_cvtps_ph(x.half[0], 0), _mm256_cvtps_ph(x.half[1], 0)}});
}

static inline void stream(float* p, Floats x) {
  const __m256* half = (const __m256*)&x;
  _mm256_stream_ps(p, half[0]);
  _mm256_stream_ps(p + 8, half[1]);
}
static inline void stream(double* p, Doubles x) {
  const __m256d* half = (const __m256d*)&x;
  _mm256_stream_pd(p, half[0]);
  _mm256_stream_pd(p + 4, half[1]);
}

}  // namespace fastmeta_avx512_emulation

#define FASTMETA_EMULATED ::fastmeta_avx512_emulation::
#define __m512 FASTMETA_EMULATED Floats
#define __m512d FASTMETA_EMULATED Doubles
#define __m512bh FASTMETA_EMULATED Floats
#define FASTMETA_BF16_TARGET
#define _mm512_dpbf16_ps FASTMETA_EMULATED dot_pairs
#define _mm512_cvtne2ps_pbh FASTMETA_EMULATED to_bfloat16
#define _mm512_maskz_loadu_epi16(mask, p) \
  FASTMETA_EMULATED masked_load<FASTMETA_EMULATED Shorts>(mask, (const unsigned short*)(p))
#define _mm512_maskz_max_ps FASTMETA_EMULATED max_ps
#define _mm512_maskz_min_ps FASTMETA_EMULATED min_ps
#define _mm512_maskz_sqrt_ps FASTMETA_EMULATED sqrt_ps
#define _mm512_maskz_max_pd FASTMETA_EMULATED max_pd
#define _mm512_maskz_min_pd FASTMETA_EMULATED min_pd
#define _mm512_maskz_sqrt_pd FASTMETA_EMULATED sqrt_pd
#define _mm512_maskz_roundscale_ps(mask, x, mode) FASTMETA_EMULATED round_ps(mask, x)
#define _mm512_maskz_roundscale_pd(mask, x, mode) FASTMETA_EMULATED round_pd(mask, x)
#define _mm512_maskz_scalef_ps(mask, a, b) FASTMETA_EMULATED scalef(a, b)
#define _mm512_maskz_scalef_pd(mask, a, b) FASTMETA_EMULATED scalef(a, b)
#define _mm512_maskz_loadu_ps(mask, p) FASTMETA_EMULATED masked_load<__m512>(mask, p)
#define _mm512_maskz_loadu_pd(mask, p) FASTMETA_EMULATED masked_load<__m512d>(mask, p)
#define _mm512_mask_storeu_ps(p, mask, x) FASTMETA_EMULATED masked_store(p, mask, x)
#define _mm512_mask_storeu_pd(p, mask, x) FASTMETA_EMULATED masked_store(p, mask, x)
#define _mm512_maskz_cvtph_ps(mask, h) FASTMETA_EMULATED from_halves((FASTMETA_EMULATED Halves)(h))
#define _mm512_maskz_cvtps_ph(mask, x, mode) (__m256i) FASTMETA_EMULATED to_halves(x)
#define _mm512_stream_ps FASTMETA_EMULATED stream
#define _mm512_stream_pd FASTMETA_EMULATED stream
#endif
