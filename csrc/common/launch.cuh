// What launchers share: geometry, the checked launch, and dispatch over storage types.
#pragma once
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/device.cuh"

namespace fastmeta::device {

// One-dimensional grids only: gridDim.x reaches 2^31 - 1 where y and z stop at 65535. Every kernel
// strides its work by gridDim.x, so a clipped grid still covers all of it.
inline constexpr int64_t kMaxGrid = 2147483647;
inline constexpr size_t kStaticSharedLimit = 48 * 1024;  // above it a kernel must opt in

struct Geometry {
  unsigned grid, block;
  size_t shared_bytes;
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline Geometry geometry(int64_t blocks, unsigned block, size_t shared_bytes = 0) {
#if defined(CUEMU)
  const int64_t limit = ::cuemu::options().max_grid;  // a test lowers it to reach the striding
#else
  const int64_t limit = kMaxGrid;
#endif
  return {static_cast<unsigned>(std::min(blocks, limit)), block, shared_bytes};
}

#if !defined(CUEMU)
inline void check(const char* what, cudaError_t status) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("fastmeta: ") + what + ": " + cudaGetErrorName(status) +
                             ": " + cudaGetErrorString(status));
  }
}
#endif

// The major compute capability of the current device.
inline int capability() {
#if defined(CUEMU)
  return ::cuemu::options().tensor_cores ? 8 : 7;
#else
  int device = 0, major = 0;
  check("device", cudaGetDevice(&device));
  check("device", cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  return major;
#endif
}

// Whether the current device multiplies bfloat16 and TF32 on tensor cores.
inline bool has_tensor_cores() { return capability() >= 8; }

// Of the current device.
inline int multiprocessors() {
#if defined(CUEMU)
  return ::cuemu::options().multiprocessors;
#else
  int device = 0, count = 0;
  check("device", cudaGetDevice(&device));
  check("device", cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
#endif
}

// Launches on `stream` and checks the launch; neither waits for the device. No blocks, no launch.
template <class... Params>
void launch(const char* what, void (*kernel)(Params...), const Geometry& geometry, void* stream,
            std::type_identity_t<Params>... args) {
  if (geometry.grid == 0) return;
#if defined(CUEMU)
  static_cast<void>(stream);
  ::cuemu::launch(what, geometry.grid, geometry.block, geometry.shared_bytes,
                  [&] { kernel(args...); });
#else
  const void* function = reinterpret_cast<const void*>(kernel);
  if (geometry.shared_bytes > kStaticSharedLimit) {
    check(what, cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(geometry.shared_bytes)));
  }
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&args))...};
  check(what, cudaLaunchKernel(function, dim3(geometry.grid), dim3(geometry.block), pointers,
                               geometry.shared_bytes, static_cast<cudaStream_t>(stream)));
#endif
}

template <class T>
struct Type {
  using type = T;
};

// Calls body(Type<scalar>{}) for the storage type of dtype.
template <class Body>
void dispatch(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(Type<float>{});
    case DType::kFloat64:
      return body(Type<double>{});
    case DType::kBFloat16:
      return body(Type<bfloat16>{});
    case DType::kFloat16:
      return body(Type<float16>{});
  }
  throw std::runtime_error("fastmeta: unknown dtype " + std::to_string(static_cast<int>(dtype)));
}

}  // namespace fastmeta::device
