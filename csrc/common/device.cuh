// What device code shares: the spellings that differ between nvcc and the host emulator of
// tests/cuda_emulation (which defines CUEMU), 16-bit storage conversion, 16-byte packs, reductions.
#pragma once
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "common/types.h"

#if defined(CUEMU)
#define FASTMETA_DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(::cuemu::dynamic_shared())
#define FASTMETA_SHARED(T, name)     \
  static const char name##_site = 0; \
  using name##_type = T;             \
  name##_type& name =                \
      *static_cast<name##_type*>(::cuemu::shared_at(&name##_site, sizeof(name##_type)))
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define FASTMETA_DYNAMIC_SHARED(T, name)                           \
  extern __shared__ __align__(16) unsigned char fastmeta_shared[]; \
  T* name = reinterpret_cast<T*>(fastmeta_shared)
#define FASTMETA_SHARED(T, name) \
  using name##_type = T;         \
  __shared__ name##_type name
#endif

namespace fastmeta::device {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kFullMask = 0xffffffffu;

// Bit patterns read and written as another type of the same size.
template <class To, class From>
__host__ __device__ __forceinline__ To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// Accumulation type of a storage type.
template <class scalar_t>
using acc_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

// ---- 16-bit storage ----------------------------------------------------------------------------
// Encoding rounds to nearest, ties to even; NaN stays NaN.

__device__ __forceinline__ float to_acc(float x) { return x; }
__device__ __forceinline__ double to_acc(double x) { return x; }

__device__ __forceinline__ float to_acc(bfloat16 x) {
  return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}

__device__ __forceinline__ float to_acc(float16 x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t exponent = (x.bits >> 10) & 0x1fu, fraction = x.bits & 0x3ffu;
  if (exponent == 0) {  // zero and subnormals: fraction * 2^-24, exact in float
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  if (exponent == 31) return bit_cast<float>(sign | 0x7f800000u | (fraction << 13));
  return bit_cast<float>(sign | ((exponent + 112) << 23) | (fraction << 13));
#endif
}

template <class scalar_t>
__device__ __forceinline__ scalar_t from_acc(acc_t<scalar_t> x);

template <>
__device__ __forceinline__ float from_acc<float>(float x) {
  return x;
}

template <>
__device__ __forceinline__ double from_acc<double>(double x) {
  return x;
}

template <>
__device__ __forceinline__ bfloat16 from_acc<bfloat16>(float x) {
#if defined(__CUDA_ARCH__)
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
#endif
}

template <>
__device__ __forceinline__ float16 from_acc<float16>(float x) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(x))};
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {  // normal: 2^-14 and above
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  } else {  // subnormal: adding 0.5 leaves round(|x| * 2^24) in the low bits
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  }
  return {static_cast<uint16_t>(sign | half)};
#endif
}

// ---- packs -------------------------------------------------------------------------------------

inline constexpr int kPack = 4;

// Four neighbours moved at once: 16 bytes of float32, 8 of 16-bit types, twice 16 of float64.
template <class T>
struct alignas(sizeof(T) * kPack < 16 ? sizeof(T) * kPack : 16) Pack {
  T v[kPack];
};

// Whether rows of `length` elements from `data` on can be read as packs.
template <class T>
__host__ __device__ __forceinline__ bool packable(const T* data, int64_t length) {
  return length % kPack == 0 && reinterpret_cast<uintptr_t>(data) % alignof(Pack<T>) == 0;
}

// Reads `width` elements (1, or kPack from an aligned place) in the accumulation type, and back.
template <int width, class scalar_t>
__device__ __forceinline__ void load(const scalar_t* from, acc_t<scalar_t> (&to)[width]) {
  if constexpr (width == kPack) {
    const Pack<scalar_t> pack = *reinterpret_cast<const Pack<scalar_t>*>(from);
#pragma unroll
    for (int i = 0; i < width; ++i) to[i] = to_acc(pack.v[i]);
  } else {
#pragma unroll
    for (int i = 0; i < width; ++i) to[i] = to_acc(from[i]);
  }
}

template <int width, class scalar_t>
__device__ __forceinline__ void store(scalar_t* to, const acc_t<scalar_t> (&from)[width]) {
  if constexpr (width == kPack) {
    Pack<scalar_t> pack;
#pragma unroll
    for (int i = 0; i < width; ++i) pack.v[i] = from_acc<scalar_t>(from[i]);
    *reinterpret_cast<Pack<scalar_t>*>(to) = pack;
  } else {
#pragma unroll
    for (int i = 0; i < width; ++i) to[i] = from_acc<scalar_t>(from[i]);
  }
}

// ---- arithmetic under one name for both accumulation types --------------------------------------

__device__ __forceinline__ float exp_(float x) { return expf(x); }
__device__ __forceinline__ double exp_(double x) { return exp(x); }
__device__ __forceinline__ float expm1_(float x) { return expm1f(x); }
__device__ __forceinline__ double expm1_(double x) { return expm1(x); }
__device__ __forceinline__ float log_(float x) { return logf(x); }
__device__ __forceinline__ double log_(double x) { return log(x); }
__device__ __forceinline__ float sqrt_(float x) { return sqrtf(x); }
__device__ __forceinline__ double sqrt_(double x) { return sqrt(x); }
__device__ __forceinline__ float tanh_(float x) { return tanhf(x); }
__device__ __forceinline__ double tanh_(double x) { return tanh(x); }
__device__ __forceinline__ float abs_(float x) { return fabsf(x); }
__device__ __forceinline__ double abs_(double x) { return fabs(x); }
__device__ __forceinline__ float max_(float a, float b) {
  return fmaxf(a, b);
}  // not NaN if one is
__device__ __forceinline__ double max_(double a, double b) { return fmax(a, b); }

// a / b of non-negative numbers; 64-bit division is several times dearer than 32-bit on a GPU.
__device__ __forceinline__ int64_t divide(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

template <class T>
__device__ __forceinline__ T infinity() {
  if constexpr (std::is_same_v<T, double>) {
    return bit_cast<double>(uint64_t{0x7ff0000000000000});
  } else {
    return bit_cast<float>(0x7f800000u);
  }
}

// Sum over groups of `width` neighbouring lanes, the same bits in every lane of the group.
template <int width = kWarpSize, class T>
__device__ __forceinline__ T lane_sum(T value) {
#pragma unroll
  for (int offset = width / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kFullMask, value, offset);
  }
  return value;
}

}  // namespace fastmeta::device
