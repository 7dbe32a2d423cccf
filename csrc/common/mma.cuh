// Matrix products of a warp on tensor cores: wrappers around mma.sync, each with a twin in plain
// C++ for the host emulator. sm_80 and later; a launcher asks has_tensor_cores() first.
//
// Both take the same 32-bit words from lane 4 * g + t: of A (16 rows) a[0] is word t of row g, a[1]
// of row g + 8, a[2] and a[3] the same at word t + 4; of B (8 columns) b[0] is word t of column g,
// b[1] word t + 4. A word holds one TF32 number or two neighbouring 16-bit ones, so a step is 8 or
// 16 deep. Of D, d[0] and d[1] are columns 2 * t and 2 * t + 1 of row g, d[2] and d[3] of row g
// + 8. (PTX ISA, "Matrix Fragments for mma.m16n8k8 / m16n8k16".)
#pragma once
#include "common/device.cuh"

namespace fastmeta::device {

inline constexpr int kMmaRows = 16, kMmaColumns = 8, kMmaWords = 8;

// Rounds to the 11 significant bits that TF32 products see, ties away from zero.
__device__ __forceinline__ uint32_t to_tf32(float x) {
#if defined(__CUDA_ARCH__)
#if __CUDA_ARCH__ >= 800
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
#else
  return __float_as_uint(x);
#endif
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits;
  return (bits + 0x1000u) & 0xffffe000u;
#endif
}

#if defined(CUEMU)
// D += A * B, where dot(a word, b word) is what one pair of words adds.
template <class Dot>
inline void emulate_mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                        const char* what, int line, Dot dot) {
  struct Words {
    uint32_t a[4], b[2];
  };
  const Words mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  ::cuemu::warp_collective(
      kFullMask, mine, what, line, false, [&](auto get, unsigned lane, uint32_t) {
        for (int i = 0; i < 4; ++i) {
          const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
          for (unsigned word = 0; word < kMmaWords; ++word) {
            const Words of_row = get(row % 8 * 4 + word % 4);
            const Words of_column = get(column * 4 + word % 4);
            d[i] += dot(of_row.a[row / 8 + word / 4 * 2], of_column.b[word / 4]);
          }
        }
        return 0;
      });
}
#endif

// D += A * B with words of TF32 numbers (scalar_t float) or pairs of scalar_t.
template <class scalar_t>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(CUEMU)
  emulate_mma(d, a, b, "mma.sync", __LINE__, [](uint32_t x, uint32_t y) {
    if constexpr (std::is_same_v<scalar_t, float>) {
      return bit_cast<float>(x & 0xffffe000u) * bit_cast<float>(y & 0xffffe000u);
    } else {
      const auto low = [](uint32_t word) { return scalar_t{static_cast<uint16_t>(word)}; };
      return to_acc(low(x)) * to_acc(low(y)) + to_acc(low(x >> 16)) * to_acc(low(y >> 16));
    }
  });
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<scalar_t, float>) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else if constexpr (std::is_same_v<scalar_t, bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#elif defined(__CUDA_ARCH__)
  __trap();  // never launched here
#endif
}

}  // namespace fastmeta::device
