// Scalar types as the torch-free kernels see them.
#pragma once
#include <cstdint>

namespace fastmeta {

enum class DType : int { kFloat32, kFloat64, kBFloat16, kFloat16 };

// 16-bit storage types; arithmetic on them happens in float32 only.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

}  // namespace fastmeta
