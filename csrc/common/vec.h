// Vectors of float and double for the kernels: one policy, three instruction sets and any other
// CPU.
//
// Built on the compilers' vector extensions (g++ and clang++), 64, 32 or 16 bytes wide by the flags
// of the translation unit. Everything lives in a namespace of the instruction set: inline functions
// that two translation units share may be merged by the linker into the copy with the wider
// instructions.
#pragma once
#include <cstdint>
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

#include "common/types.h"

#ifndef FASTMETA_ISA
#error "compile with -DFASTMETA_ISA=baseline, avx2 or avx512"
#endif

#define FASTMETA_INLINE_MEMBER inline __attribute__((always_inline))
#define FASTMETA_INLINE static FASTMETA_INLINE_MEMBER
#if defined(__clang__)
#define FASTMETA_UNROLL _Pragma("clang loop unroll(full)")
#else
#define FASTMETA_UNROLL _Pragma("GCC unroll 32")
#endif

namespace fastmeta::FASTMETA_ISA {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif

// Vec<T>: kWidth<T> lanes; IntVec<T>: integers of the same lane size.
template <class T>
struct VecTypes;
template <>
struct VecTypes<float> {
  typedef float Vector __attribute__((vector_size(kVecBytes)));
  typedef float Unaligned __attribute__((vector_size(kVecBytes), aligned(4), may_alias));
  typedef int32_t Int __attribute__((vector_size(kVecBytes)));
  typedef int32_t IntUnaligned __attribute__((vector_size(kVecBytes), aligned(4), may_alias));
  typedef uint16_t Half __attribute__((vector_size(kVecBytes / 2)));
  typedef uint16_t HalfUnaligned __attribute__((vector_size(kVecBytes / 2), aligned(2), may_alias));
  typedef uint32_t Word __attribute__((vector_size(kVecBytes)));
};
template <>
struct VecTypes<double> {
  typedef double Vector __attribute__((vector_size(kVecBytes)));
  typedef double Unaligned __attribute__((vector_size(kVecBytes), aligned(8), may_alias));
  typedef int64_t Int __attribute__((vector_size(kVecBytes)));
  typedef int64_t IntUnaligned __attribute__((vector_size(kVecBytes), aligned(8), may_alias));
};
template <class T>
using Vec = typename VecTypes<T>::Vector;
template <class T>
using IntVec = typename VecTypes<T>::Int;
template <class T>
constexpr int kWidth = kVecBytes / static_cast<int>(sizeof(T));

// The type sums run in: float for the 16-bit storage types.
template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccOf<T>::type;
template <class T>
constexpr bool kIsHalf = sizeof(T) == 2;

template <class T>
FASTMETA_INLINE T min_of(T a, T b) {
  return a < b ? a : b;
}
template <class T>
FASTMETA_INLINE T max_of(T a, T b) {
  return a < b ? b : a;
}
FASTMETA_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
FASTMETA_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};  // keeps -0, and compilers fold it
}
template <class T>
FASTMETA_INLINE IntVec<T> bits_of(Vec<T> x) {
  return reinterpret_cast<IntVec<T>>(x);
}
template <class T>
FASTMETA_INLINE Vec<T> from_bits(IntVec<T> x) {
  return reinterpret_cast<Vec<T>>(x);
}

// ---- maximum, minimum, square root. When one operand is NaN the second is returned, so keep the
// data second where a NaN must survive.
// The zero-masking forms, with all lanes on: g++ 12 warns about the operand that the plain ones
// leave undefined.
#if defined(__AVX512F__)
#define FASTMETA_PS(op, ...) (Vec<T>)_mm512_maskz_##op##_ps(0xffff, __VA_ARGS__)
#define FASTMETA_PD(op, ...) (Vec<T>)_mm512_maskz_##op##_pd(0xff, __VA_ARGS__)
#elif defined(__AVX2__)
#define FASTMETA_PS(op, ...) (Vec<T>)_mm256_##op##_ps(__VA_ARGS__)
#define FASTMETA_PD(op, ...) (Vec<T>)_mm256_##op##_pd(__VA_ARGS__)
#elif defined(__SSE2__)
#define FASTMETA_PS(op, ...) (Vec<T>)_mm_##op##_ps(__VA_ARGS__)
#define FASTMETA_PD(op, ...) (Vec<T>)_mm_##op##_pd(__VA_ARGS__)
#endif
#if defined(FASTMETA_PS)
template <class T>
FASTMETA_INLINE Vec<T> vmax(Vec<T> a, Vec<T> b) {
  if constexpr (sizeof(T) == 4) {
    return FASTMETA_PS(max, a, b);
  } else {
    return FASTMETA_PD(max, a, b);
  }
}
template <class T>
FASTMETA_INLINE Vec<T> vmin(Vec<T> a, Vec<T> b) {
  if constexpr (sizeof(T) == 4) {
    return FASTMETA_PS(min, a, b);
  } else {
    return FASTMETA_PD(min, a, b);
  }
}
template <class T>
FASTMETA_INLINE Vec<T> vsqrt(Vec<T> a) {
  if constexpr (sizeof(T) == 4) {
    return FASTMETA_PS(sqrt, a);
  } else {
    return FASTMETA_PD(sqrt, a);
  }
}
#else
template <class T>
FASTMETA_INLINE Vec<T> vmax(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}
template <class T>
FASTMETA_INLINE Vec<T> vmin(Vec<T> a, Vec<T> b) {
  return a < b ? a : b;
}
template <class T>
FASTMETA_INLINE Vec<T> vsqrt(Vec<T> a) {
  for (int i = 0; i < kWidth<T>; ++i) {
    if constexpr (sizeof(T) == 4) {
      a[i] = __builtin_sqrtf(a[i]);
    } else {
      a[i] = __builtin_sqrt(a[i]);
    }
  }
  return a;
}
#endif
#undef FASTMETA_PS
#undef FASTMETA_PD

template <class T>
FASTMETA_INLINE T sqrt_of(T x) {
  if constexpr (sizeof(T) == 4) {
    return __builtin_sqrtf(x);
  } else {
    return __builtin_sqrt(x);
  }
}

// ---- loads and stores. load_n / store_n touch the first n lanes only (0 < n <= width); the other
// lanes load as 0.
FASTMETA_INLINE Vec<float> load(const float* p) {
  return *reinterpret_cast<const VecTypes<float>::Unaligned*>(p);
}
FASTMETA_INLINE Vec<double> load(const double* p) {
  return *reinterpret_cast<const VecTypes<double>::Unaligned*>(p);
}
FASTMETA_INLINE void store(float* p, Vec<float> x) {
  *reinterpret_cast<VecTypes<float>::Unaligned*>(p) = x;
}
FASTMETA_INLINE void store(double* p, Vec<double> x) {
  *reinterpret_cast<VecTypes<double>::Unaligned*>(p) = x;
}

using HalfVec = VecTypes<float>::Half;
using WordVec = VecTypes<float>::Word;

FASTMETA_INLINE Vec<float> widen(HalfVec h, bfloat16) {
  return reinterpret_cast<Vec<float>>(__builtin_convertvector(h, WordVec) << 16);
}
FASTMETA_INLINE HalfVec narrow(Vec<float> x, bfloat16) {
  WordVec u = reinterpret_cast<WordVec>(x);
  // Round to nearest even; a NaN keeps its sign and becomes quiet.
  const WordVec rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const WordVec nan = (u >> 16) | 0x40u;
  const WordVec is_nan = reinterpret_cast<WordVec>(x != x);
  return __builtin_convertvector((nan & is_nan) | (rounded & ~is_nan), HalfVec);
}
FASTMETA_INLINE Vec<float> widen(HalfVec h, float16) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)h);
#elif defined(__F16C__)
  return (Vec<float>)_mm256_cvtph_ps((__m128i)h);
#else
  const WordVec w = __builtin_convertvector(h, WordVec);
  const WordVec magnitude = (w & 0x7fffu) << 13;
  const WordVec sign = (w & 0x8000u) << 16;
  // Exponents meet by a multiplication, which also normalises subnormals; infinity and NaN have
  // none.
  const Vec<float> scaled = reinterpret_cast<Vec<float>>(magnitude) * 0x1p112f;
  const WordVec special = reinterpret_cast<WordVec>(magnitude >= 0x0f800000u);
  const WordVec value =
      (reinterpret_cast<WordVec>(scaled) & ~special) | ((magnitude | 0x7f800000u) & special);
  return reinterpret_cast<Vec<float>>(value | sign);
#endif
}
FASTMETA_INLINE HalfVec narrow(Vec<float> x, float16) {
#if defined(__AVX512F__)
  return (HalfVec)_mm512_maskz_cvtps_ph(0xffff, (__m512)x,
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return (HalfVec)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const WordVec u = reinterpret_cast<WordVec>(x);
  const WordVec sign = (u >> 16) & 0x8000u;
  const WordVec mag = u & 0x7fffffffu;
  const WordVec normal = (mag + 0xc8000fffu + ((mag >> 13) & 1u)) >> 13;
  // Below 2^-14 adding 0.5 lets the adder round to the subnormal's place.
  const WordVec sub =
      reinterpret_cast<WordVec>(reinterpret_cast<Vec<float>>(mag) + 0.5f) - 0x3f000000u;
  const WordVec is_sub = reinterpret_cast<WordVec>(mag < 0x38800000u);
  const WordVec is_inf = reinterpret_cast<WordVec>(mag >= 0x477ff000u);
  const WordVec is_nan = reinterpret_cast<WordVec>(mag > 0x7f800000u);
  WordVec r = (sub & is_sub) | (normal & ~is_sub);
  r = (r & ~is_inf) | (0x7c00u & is_inf);
  r = (r & ~is_nan) | ((0x7e00u | (mag >> 13)) & 0x7fffu & is_nan);
  return __builtin_convertvector(r | sign, HalfVec);
#endif
}
template <class H>
FASTMETA_INLINE Vec<float> load_half(const H* p) {
  return widen(static_cast<HalfVec>(*reinterpret_cast<const VecTypes<float>::HalfUnaligned*>(p)),
               H{});
}
template <class H>
FASTMETA_INLINE void store_half(H* p, Vec<float> x) {
  *reinterpret_cast<VecTypes<float>::HalfUnaligned*>(p) = narrow(x, H{});
}
FASTMETA_INLINE Vec<float> load(const bfloat16* p) { return load_half(p); }
FASTMETA_INLINE Vec<float> load(const float16* p) { return load_half(p); }
FASTMETA_INLINE void store(bfloat16* p, Vec<float> x) { store_half(p, x); }
FASTMETA_INLINE void store(float16* p, Vec<float> x) { store_half(p, x); }

// Stores past the caches, for results too large to be read back from them: without it every line is
// read before it is written. p is aligned to a vector; stream_fence() before other threads read.
FASTMETA_INLINE void stream(float* p, Vec<float> x) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)x);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)x);
#elif defined(__SSE2__)
  _mm_stream_ps(p, (__m128)x);
#else
  store(p, x);
#endif
}
FASTMETA_INLINE void stream(double* p, Vec<double> x) {
#if defined(__AVX512F__)
  _mm512_stream_pd(p, (__m512d)x);
#elif defined(__AVX2__)
  _mm256_stream_pd(p, (__m256d)x);
#elif defined(__SSE2__)
  _mm_stream_pd(p, (__m128d)x);
#else
  store(p, x);
#endif
}
FASTMETA_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// 0, 1, 2, ...
template <class T>
FASTMETA_INLINE IntVec<T> lane_numbers() {
  IntVec<T> lanes{};
  FASTMETA_UNROLL
  for (int i = 0; i < kWidth<T>; ++i) lanes[i] = i;
  return lanes;
}

template <class S>
FASTMETA_INLINE Vec<Acc<S>> load_n(const S* p, int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) {
    return (Vec<float>)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1u), p);
  } else if constexpr (sizeof(S) == 8) {
    return (Vec<double>)_mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1u), p);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(S) == 4) {
    return (Vec<float>)_mm256_maskload_ps(p, (__m256i)(lane_numbers<S>() < n));
  } else if constexpr (sizeof(S) == 8) {
    return (Vec<double>)_mm256_maskload_pd(p, (__m256i)(lane_numbers<S>() < n));
  }
#endif
  if constexpr (sizeof(S) == 2) {
    HalfVec h{};
    for (int i = 0; i < n; ++i) h[i] = p[i].bits;
    return widen(h, S{});
  } else {
    constexpr int kW = kWidth<Acc<S>>;
    alignas(kVecBytes) S lanes[kW] = {};
    for (int i = 0; i < n; ++i) lanes[i] = p[i];
    return load(lanes);
  }
}
template <class S>
FASTMETA_INLINE void store_n(S* p, Vec<Acc<S>> x, int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) {
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1u), (__m512)x);
    return;
  } else if constexpr (sizeof(S) == 8) {
    _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1u), (__m512d)x);
    return;
  }
#endif
  if constexpr (sizeof(S) == 2) {
    const HalfVec h = narrow(x, S{});
    for (int i = 0; i < n; ++i) p[i].bits = h[i];
  } else {
    alignas(kVecBytes) S lanes[kWidth<Acc<S>>];
    store(lanes, x);
    for (int i = 0; i < n; ++i) p[i] = lanes[i];
  }
}

template <class S>
FASTMETA_INLINE Acc<S> load_one(const S* p) {
  if constexpr (sizeof(S) == 2) {
    return load_n(p, 1)[0];
  } else {
    return *p;
  }
}
template <class S>
FASTMETA_INLINE void store_one(S* p, Acc<S> x) {
  if constexpr (sizeof(S) == 2) {
    store_n(p, splat<float>(x), 1);
  } else {
    *p = x;
  }
}

// ---- sums over lanes and transposition
template <int... I>
struct Lanes {};
template <int N, int... I>
struct MakeLanes : MakeLanes<N - 1, N - 1, I...> {};
template <int... I>
struct MakeLanes<0, I...> {
  using type = Lanes<I...>;
};

// Grains of kGrain lanes of a and b in turn, taken from the lower (kUpper 0) or the upper half of
// each kPart lanes: <1, 4, 0> is a0 b0 a1 b1 a4 b4 a5 b5 ...
template <int kGrain, int kPart, int kUpper, class V, int... I>
FASTMETA_INLINE V zip_lanes(V a, V b, Lanes<I...>) {
  constexpr int kN = sizeof...(I);
  return __builtin_shufflevector(
      a, b,
      (I / kPart * kPart + kUpper * (kPart / 2) + I % kPart / kGrain / 2 * kGrain + I % kGrain +
       I / kGrain % 2 * kN)...);
}
// Transposes the grains that r[0], r[kStep], ... (kRows of them) have in each kPart lanes.
template <int kGrain, int kPart, int kRows, int kStep, class T>
FASTMETA_INLINE void transpose_grains(Vec<T>* r) {
  using All = typename MakeLanes<kWidth<T>>::type;
  FASTMETA_UNROLL
  for (int stage = 1; stage < kRows; stage *= 2) {
    Vec<T> t[kRows];
    FASTMETA_UNROLL
    for (int i = 0; i < kRows / 2; ++i) {
      const Vec<T> a = r[i * kStep], b = r[(i + kRows / 2) * kStep];
      t[2 * i] = zip_lanes<kGrain, kPart, 0>(a, b, All{});
      t[2 * i + 1] = zip_lanes<kGrain, kPart, 1>(a, b, All{});
    }
    FASTMETA_UNROLL
    for (int i = 0; i < kRows; ++i) r[i * kStep] = t[i];
  }
}
// Squares of 16 bytes a side first: within those instructions permute fastest.
template <class T>
FASTMETA_INLINE void transpose(Vec<T>* r) {
  constexpr int kW = kWidth<T>, kSquare = 16 / sizeof(T);
  FASTMETA_UNROLL
  for (int i = 0; i < kW; i += kSquare) transpose_grains<1, kSquare, kSquare, 1, T>(r + i);
  FASTMETA_UNROLL
  for (int i = 0; i < kSquare; ++i) transpose_grains<kSquare, kW, kW / kSquare, kSquare, T>(r + i);
}
template <int Shift, class V, int... I>
FASTMETA_INLINE V rotate_lanes(V a, Lanes<I...>) {
  return __builtin_shufflevector(a, a, ((I + Shift) % static_cast<int>(sizeof...(I)))...);
}
template <class T>
FASTMETA_INLINE T hsum(Vec<T> x) {
  constexpr int kW = kWidth<T>;
  using All = typename MakeLanes<kW>::type;
  if constexpr (kW >= 16) x += rotate_lanes<8 % kW>(x, All{});
  if constexpr (kW >= 8) x += rotate_lanes<4 % kW>(x, All{});
  if constexpr (kW >= 4) x += rotate_lanes<2 % kW>(x, All{});
  x += rotate_lanes<1>(x, All{});
  return x[0];
}

}  // namespace fastmeta::FASTMETA_ISA
