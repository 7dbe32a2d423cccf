// What the kernels of this family take of tensors.
#pragma once
#include <cstdint>

namespace fastmeta::task_layers {

// A tensor whose part of one task is contiguous; stride 0 is that of what all tasks share.
struct PerTask {
  const void* data = nullptr;
  int64_t stride = 0;  // elements from task to task
};

}  // namespace fastmeta::task_layers
