// What the bridges of this family share.
#pragma once
#include "common/torch_bridge.h"
#include "task_layers/per_task.h"

namespace fastmeta::task_layers {

// A tensor as kernels read it, kept alive: each task's part contiguous, copied only if it is not.
class Operand {
 public:
  Operand() = default;
  explicit Operand(const bridge::Tensor& tensor) : tensor_(tensor) {
    int64_t expected = 1;
    bool dense = true;
    for (int64_t d = tensor.dim() - 1; d > 0; --d) {
      dense = dense && (tensor.size(d) == 1 || tensor.stride(d) == expected);
      expected *= tensor.size(d);
    }
    const bool own = tensor.dim() == 0 || tensor.size(0) < 2;
    const int64_t stride = own ? expected : tensor.stride(0);
    if (!dense || stride < 0) tensor_ = torch::stable::contiguous(tensor);
    view_ = PerTask{tensor_->const_data_ptr(), dense ? stride : expected};
  }
  const PerTask& view() const { return view_; }

 private:
  std::optional<bridge::Tensor> tensor_;
  PerTask view_;
};

inline Operand operand(const std::optional<bridge::Tensor>& tensor) {
  return tensor.has_value() ? Operand(*tensor) : Operand();
}

// The tensor in the dtype that kernels compute products from: on the CPU, those of half types are
// formed from float32 copies.
inline bool is_widened(const bridge::Tensor& tensor) {
#if defined(FASTMETA_CUDA)
  static_cast<void>(tensor);
  return false;
#else
  return tensor.scalar_type() == bridge::ScalarType::BFloat16 ||
         tensor.scalar_type() == bridge::ScalarType::Half;
#endif
}
inline bridge::Tensor computed(const bridge::Tensor& tensor) {
  return is_widened(tensor) ? torch::stable::to(tensor, bridge::ScalarType::Float) : tensor;
}
inline std::optional<bridge::Tensor> computed(const std::optional<bridge::Tensor>& tensor) {
  return tensor.has_value() ? std::optional<bridge::Tensor>(computed(*tensor)) : std::nullopt;
}
inline bridge::Tensor narrowed(const bridge::Tensor& result, const bridge::Tensor& like) {
  return is_widened(like) ? torch::stable::to(result, like.scalar_type()) : result;
}

inline void check_same_dtype(const bridge::Tensor& a, const char* name, const bridge::Tensor& b) {
  bridge::check_dtype(a, name, b.scalar_type());
}

}  // namespace fastmeta::task_layers
