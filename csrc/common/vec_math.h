// exp2, exp, expm1, log2, log, tanh, erf, sigmoid and softplus on vectors.
//
// Largest errors against long double, in units of the last place (tests/csrc/vec_test.cpp holds
// them):
//   exp2, exp   float 2, double 2     results below the smallest normal number may flush to 0
//   log2, log   float 3, double 3     subnormal arguments are not supported; log(0) = -inf, log(<0)
//   = NaN tanh        float 3, double 3
//   expm1       float 4, double 4     arguments up to 0 only
//   erf         float 2, double 2
//   sigmoid     float 3, double 3     1 / (1 + exp(-x))
//   softplus    float 4, double 4     log(1 + exp(x)); relative to a normal number, as exp
// A NaN argument gives NaN. exp2 and exp overflow to +inf from 2^127.5 (2^1023.5) on.
#pragma once
#include "common/vec.h"

namespace fastmeta::FASTMETA_ISA {

// Where exponents are scaled by an instruction results underflow gradually; elsewhere the
// exponent's bits are made by hand, and the lowest power of two that can be made so is 0.
#if defined(__AVX512F__)
constexpr bool kGradual = true;
#else
constexpr bool kGradual = false;
#endif

template <class T>
struct MathConstants;
template <>
struct MathConstants<float> {
  static constexpr float kMagic =
      0x1.8p23f;  // adding it rounds to an integer, kept in the low bits
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr float kLowest = -0x1.fffffep127f, kInfinity = __builtin_huge_valf();
  static constexpr float kMinExp2 = kGradual ? -200.f : -127.f, kMaxExp2 = 128.f;
  static constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.69314718055994531f;
  static constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
  static constexpr int32_t kSqrtHalfBits = 0x3f3504f3;
};
template <>
struct MathConstants<double> {
  static constexpr double kMagic = 0x1.8p52;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kLowest = -0x1.fffffffffffffp1023, kInfinity = __builtin_huge_val();
  static constexpr double kMinExp2 = kGradual ? -1200. : -1023., kMaxExp2 = 1024.;
  static constexpr double kLog2e = 1.44269504088896341, kLn2 = 0.693147180559945309;
  static constexpr double kLn2High = 0x1.62e42fefap-1, kLn2Low = 0x1.cf79abc9e3b39p-40;
  static constexpr int64_t kSqrtHalfBits = 0x3fe6a09e667f3bcdLL;
};
template <class T>
using Const = MathConstants<T>;

// Polynomials by interpolation at Chebyshev nodes; coefficients from the constant term up.
template <class T>
FASTMETA_INLINE Vec<T> polynomial(Vec<T> x, const T* c, int n) {
  Vec<T> y = splat<T>(c[n - 1]);
  FASTMETA_UNROLL
  for (int i = n - 2; i >= 0; --i) y = y * x + c[i];
  return y;
}
#define FASTMETA_POLYNOMIAL(T, x, ...)                                    \
  [](Vec<T> at) __attribute__((always_inline)) {                          \
    constexpr T c[] = {__VA_ARGS__};                                      \
    return polynomial<T>(at, c, static_cast<int>(sizeof(c) / sizeof(T))); \
  }(x)

// 2^f for |f| <= 0.5 times 2^n, n integral.
template <class T>
FASTMETA_INLINE Vec<T> exp2_split(Vec<T> f, Vec<T> n) {
  Vec<T> p;
  if constexpr (sizeof(T) == 4) {
    p = FASTMETA_POLYNOMIAL(float, f, 1.f, 0.693147188f, 0.2402265081f, 0.0555035689f,
                            0.00961807087f, 0.001339098266f, 0.0001545785425f);
  } else {
    p = FASTMETA_POLYNOMIAL(double, f, 1., 0.693147180559945309, 0.240226506959100712,
                            0.0555041086648216275, 0.00961812910762848395, 0.00133335581464062913,
                            0.000154035303933593233, 0.000015252733841786008,
                            1.32154868204405711e-6, 1.01780569700748236e-7, 7.0548920910841338e-9,
                            4.45583878404966832e-10, 2.57376588122059186e-11);
  }
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)n);
  } else {
    return (Vec<T>)_mm512_maskz_scalef_pd(0xff, (__m512d)p, (__m512d)n);
  }
#else
  const IntVec<T> exponent =
      bits_of<T>(n + Const<T>::kMagic) - bits_of<T>(splat<T>(Const<T>::kMagic));
  return p * from_bits<T>((exponent + Const<T>::kBias) << Const<T>::kMantissa);
#endif
}

template <class T>
FASTMETA_INLINE Vec<T> round_even(Vec<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm512_maskz_roundscale_ps(0xffff, (__m512)x,
                                              _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  } else {
    return (Vec<T>)_mm512_maskz_roundscale_pd(0xff, (__m512d)x,
                                              _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  } else {
    return (Vec<T>)_mm256_round_pd((__m256d)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
#else
  return (x + Const<T>::kMagic) - Const<T>::kMagic;
#endif
}

template <class T>
FASTMETA_INLINE Vec<T> vexp2(Vec<T> x) {
  x = vmax<T>(splat<T>(Const<T>::kMinExp2), x);
#if !defined(__AVX512F__)
  x = vmin<T>(splat<T>(Const<T>::kMaxExp2), x);
#endif
  const Vec<T> n = round_even<T>(x);
  return exp2_split<T>(x - n, n);
}

template <class T>
FASTMETA_INLINE Vec<T> vexp(Vec<T> x) {
  x = vmax<T>(splat<T>(Const<T>::kMinExp2 * Const<T>::kLn2), x);
  x = vmin<T>(splat<T>(Const<T>::kMaxExp2 * Const<T>::kLn2), x);
  const Vec<T> n = round_even<T>(x * Const<T>::kLog2e);
  const Vec<T> r = (x - n * Const<T>::kLn2High) - n * Const<T>::kLn2Low;
  return exp2_split<T>(r * Const<T>::kLog2e, n);
}

// x = 2^e * m with m in [sqrt(1/2), sqrt(2)): returns log(m), natural, and e.
template <class T>
FASTMETA_INLINE Vec<T> log_split(Vec<T> x, Vec<T>* e) {
  const IntVec<T> offset = bits_of<T>(x) - Const<T>::kSqrtHalfBits;
  const IntVec<T> exponent = offset >> Const<T>::kMantissa;
  *e = from_bits<T>(exponent + bits_of<T>(splat<T>(Const<T>::kMagic))) - Const<T>::kMagic;
  const Vec<T> m = from_bits<T>(bits_of<T>(x) - (exponent << Const<T>::kMantissa));
  const Vec<T> f = (m - T(1)) / (m + T(1));
  const Vec<T> y = f * f;
  Vec<T> p;
  if constexpr (sizeof(T) == 4) {
    p = FASTMETA_POLYNOMIAL(float, y, 0.6666666655f, 0.4000012239f, 0.2855075827f, 0.23332168f);
  } else {
    p = FASTMETA_POLYNOMIAL(double, y, 0.666666666666666667, 0.399999999999999924,
                            0.285714285714354311, 0.222222222198372061, 0.181818185967913534,
                            0.153845748862466306, 0.133356493077557741, 0.116878854266531277,
                            0.118841545365545905);
  }
  return T(2) * f + f * y * p;
}
template <class T>
FASTMETA_INLINE Vec<T> log_special(Vec<T> x, Vec<T> r) {
  const Vec<T> inf = splat<T>(Const<T>::kInfinity);
  r = x < inf ? r : inf;
  const Vec<T> at_most_zero = x == T(0) ? -inf : splat<T>(__builtin_nanf(""));
  return x > T(0) ? r : at_most_zero;
}
template <class T>
FASTMETA_INLINE Vec<T> vlog2(Vec<T> x) {
  Vec<T> e;
  const Vec<T> r = log_split<T>(x, &e);
  return log_special<T>(x, e + r * Const<T>::kLog2e);
}
template <class T>
FASTMETA_INLINE Vec<T> vlog(Vec<T> x) {
  Vec<T> e;
  const Vec<T> r = log_split<T>(x, &e);
  return log_special<T>(x, e * Const<T>::kLn2High + (r + e * Const<T>::kLn2Low));
}

template <class T>
FASTMETA_INLINE Vec<T> vabs(Vec<T> x) {
  return from_bits<T>(bits_of<T>(x) & ~bits_of<T>(splat<T>(T(-0.0))));
}

template <class T>
FASTMETA_INLINE Vec<T> vtanh(Vec<T> x) {
  const Vec<T> y = x * x;
  Vec<T> p;
  if constexpr (sizeof(T) == 4) {
    p = FASTMETA_POLYNOMIAL(float, y, -0.3333332894f, 0.1333276974f, -0.05385090958f,
                            0.02099717899f, -0.00609671416f);
  } else {
    p = FASTMETA_POLYNOMIAL(double, y, -0.333333333333333329, 0.133333333333330416,
                            -0.0539682539678969916, 0.0218694885190083045, -0.00886323510324085643,
                            0.00359212175115473885, -0.00145577541204631369, 0.00058966065776917327,
                            -0.000237590649586910125, 0.0000925711612621353234,
                            -0.0000312011013916227932, 6.48516346760223967e-6);
  }
  const Vec<T> a = vabs<T>(x);
  // 20 (40) is where tanh has long been 1; a NaN passes the minimum as its second operand.
  const Vec<T> twice = vmin<T>(splat<T>(sizeof(T) == 4 ? T(20) : T(40)), a + a);
  const Vec<T> large = T(1) - T(2) / (vexp<T>(twice) + T(1));
  const Vec<T> sign = from_bits<T>(bits_of<T>(x) & bits_of<T>(splat<T>(T(-0.0))));
  const Vec<T> result = a < T(0.625) ? a + a * y * p : large;
  return from_bits<T>(bits_of<T>(result) | bits_of<T>(sign));
}

// exp(x) - 1 for x <= 0, by tanh: nothing cancels there.
template <class T>
FASTMETA_INLINE Vec<T> vexpm1(Vec<T> x) {
  const Vec<T> t = vtanh<T>(T(0.5) * x);
  return (t + t) / (T(1) - t);
}

template <class T>
FASTMETA_INLINE Vec<T> verf(Vec<T> x) {
  const Vec<T> y = x * x;
  // Where erf has become 1; a NaN passes the minimum as its second operand.
  const Vec<T> a = vmin<T>(splat<T>(sizeof(T) == 4 ? T(4) : T(6)), vabs<T>(x));
  // Below 1 a series in x^2; above it 1 - exp(-x^2) * erfcx(x), with erfcx a polynomial in t.
  const Vec<T> t = (a - T(2)) / (a + T(2));
  Vec<T> p, q;
  if constexpr (sizeof(T) == 4) {
    p = FASTMETA_POLYNOMIAL(float, y, 0.1283791658f, -0.3761262667f, 0.1128359472f, -0.02685421201f,
                            0.005189087423f, -0.0008016864287f, 0.00007875875063f);
    q = FASTMETA_POLYNOMIAL(float, t, 0.2553956763f, -0.4271859898f, 0.2416582015f, -0.07896830613f,
                            0.003732371759f, 0.006811140131f, -0.0008379754387f);
  } else {
    p = FASTMETA_POLYNOMIAL(
        double, y, 0.128379167095512567, -0.376126389031835404, 0.112837916709450063,
        -0.0268661706432377704, 0.00522397760711642273, -0.000854832597538969208,
        0.000120552949048397079, -0.0000149247369074196603, 1.64474247033173624e-6,
        -1.62084838018717059e-7, 1.37200645467776856e-8, -7.79589882700214224e-10);
    q = FASTMETA_POLYNOMIAL(
        double, t, 0.255395676310505745, -0.427185847413957885, 0.241658194242469857,
        -0.0789785810158525347, 0.00373289240349223978, 0.00699746174775357363,
        -0.000847143198076042359, -0.000981977320813102272, 0.0000435542024527058955,
        0.000174366972329468635, 0.0000275431281856667173, -0.0000276473054436100538,
        -0.0000140675326945820577, 1.82014319597500905e-6, 3.91705929992538851e-6);
  }
  const Vec<T> large = T(1) - vexp<T>(-a * a) * q;
  const Vec<T> sign = from_bits<T>(bits_of<T>(x) & bits_of<T>(splat<T>(T(-0.0))));
  const Vec<T> result = a < T(1) ? a + a * p : large;
  return from_bits<T>(bits_of<T>(result) | bits_of<T>(sign));
}

template <class T>
FASTMETA_INLINE Vec<T> vsigmoid(Vec<T> x) {
  return T(1) / (T(1) + vexp<T>(-x));
}

template <class T>
FASTMETA_INLINE Vec<T> vsoftplus(Vec<T> x) {
  const Vec<T> e = vexp<T>(-vabs<T>(x)), u = T(1) + e;
  // The second term is what rounding took from 1 + e. A NaN passes the maximum as its second
  // operand.
  return vmax<T>(Vec<T>{}, x) + (vlog<T>(u) + (e - (u - T(1))) / u);
}

}  // namespace fastmeta::FASTMETA_ISA
