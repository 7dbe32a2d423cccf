// What the bridges between torch and the torch-free kernels share. LibTorch stable ABI only.
//
// A bridge file is compiled twice: for the CPU into fastmeta._C, and with FASTMETA_CUDA into
// fastmeta._C_cuda, so that a build with CUDA still serves where no CUDA torch is installed.
// Arguments are checked in Python, where errors can name them; the checks here are the safety net
// of those who call torch.ops.fastmeta.* themselves.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/isa.h"
#include "common/parallel.h"
#include "common/types.h"

#if defined(FASTMETA_CUDA)
#define FASTMETA_DEVICE_KEY CUDA
#else
#define FASTMETA_DEVICE_KEY CPU
#endif

namespace fastmeta::bridge {

// A string argument of an op. Not std::string: torch 2.13 makes a copy of it in each call that it
// never frees.
struct Text {
  std::string value;
};

}  // namespace fastmeta::bridge

template <>
struct torch::stable::detail::ToImpl<fastmeta::bridge::Text> {
  static fastmeta::bridge::Text call(StableIValue value, uint64_t /*build*/, bool /*internal*/) {
    const StringHandle handle = to<StringHandle>(value);
    size_t size = 0;
    const char* data = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &size));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    fastmeta::bridge::Text text{{data, size}};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};

namespace fastmeta::bridge {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, "fastmeta: expected a floating dtype");
  }
}

// The dtype that kernels accumulate in and that log-probabilities, losses and rates have.
inline ScalarType acc_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline DType acc_dtype_of(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? DType::kFloat64 : DType::kFloat32;
}

inline Tensor contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline int32_t dtype_code(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return aoti_torch_dtype_float32();
    case ScalarType::Double:
      return aoti_torch_dtype_float64();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    case ScalarType::Long:
      return aoti_torch_dtype_int64();
    default:
      STD_TORCH_CHECK(false, "fastmeta: no outputs of this dtype");
  }
}

// Past the dispatcher and the heap: for small problems a few microseconds a tensor count.
inline Tensor empty(const Tensor& like, const int64_t* size, int64_t dim, ScalarType dtype) {
  constexpr int64_t kMostDims = 64;  // torch's limit
  STD_TORCH_CHECK(dim <= kMostDims, "fastmeta: a tensor of too many dimensions");
  std::array<int64_t, kMostDims> strides;
  int64_t stride = 1;
  for (int64_t i = dim; i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(size[i], 1);
  }
  int32_t device = 0, index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, size, strides.data(), dtype_code(dtype),
                                                  device, index, &handle));
  return Tensor(handle);
}
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& size, ScalarType dtype) {
  return empty(like, size.data(), static_cast<int64_t>(size.size()), dtype);
}

inline void check_shape(const Tensor& tensor, const char* name, const std::vector<int64_t>& size) {
  bool same = tensor.dim() == static_cast<int64_t>(size.size());
  for (size_t i = 0; same && i < size.size(); ++i) same = tensor.size(i) == size[i];
  STD_TORCH_CHECK(same, "fastmeta: ", name, " has an unexpected shape");
}

inline void check_dtype(const Tensor& tensor, const char* name, ScalarType dtype) {
#if defined(FASTMETA_CUDA)
  // One CUDA tensor among the operands brings a call here; the CPU bridge sees none but the CPU's.
  STD_TORCH_CHECK(tensor.is_cuda(), "fastmeta: ", name, " is not on a CUDA device");
#endif
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, "fastmeta: ", name, " has an unexpected dtype");
}

// torch's own thread pool, so that torch.set_num_threads holds.
inline void parallel_for(int64_t total, int64_t grain, RangeBody body, void* context) {
  if (total <= 0) return;
  if (total <= grain) {
    body(context, 0, total);
    return;
  }
  torch::stable::parallel_for(0, total, grain,
                              [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

#if defined(FASTMETA_CUDA)
// Makes the tensor's device current while it lives, and holds that device's current stream.
class CudaScope {
 public:
  explicit CudaScope(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

// Scratch of a launch; torch hands it out again only to later work of the stream.
inline Tensor workspace(const Tensor& like, int64_t bytes) {
  return empty(like, {(bytes + 7) / 8}, ScalarType::Long);
}

// Whether products of the dtype may be rounded to TF32, by the op that asks torch's switch.
inline bool allow_tf32(DType dtype, const char* op) {
  if (dtype != DType::kFloat32) return false;
  std::array<StableIValue, 1> stack{};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<bool>(stack[0]);
}
#endif

}  // namespace fastmeta::bridge
