// Mean of the rows of each class (class prototypes): what the CPU and CUDA kernels take.
//
//   count(t, c) = #{i : y_ti = c}
//   mean(t, c)  = sum_{i: y_ti = c} values(t, i) / count(t, c)     0 where the count is 0
//
// Labels outside [0, C) mark padding and are left out. Sums run in the accumulation type and in the
// order of the rows, so results depend on neither threads nor schedule.
#pragma once
#include <cstdint>

#include "common/parallel.h"
#include "common/types.h"

namespace fastmeta::segment {

struct Mean {
  DType dtype;
  int64_t num_tasks, num_rows, num_classes, dim;  // T, S, C, D
  const void* values;                             // scalar, [T, S, D]
  const int64_t* labels;                          // [T, S]
  void* mean;                                     // scalar, [T, C, D]
  void* count;                                    // acc, [T, C]
};

// grad_values(t, i) = grad(t, y_ti) / count(t, y_ti), 0 at padding.
struct MeanBackward {
  DType dtype;
  int64_t num_tasks, num_rows, num_classes, dim;
  const void* grad;       // scalar, [T, C, D]
  const int64_t* labels;  // [T, S]
  const void* count;      // acc, [T, C]
  void* grad_values;      // scalar, [T, S, D]
};

#define FASTMETA_SEGMENT_CPU(ISA)                                \
  namespace ISA {                                                \
  void mean(const Mean& args, ParallelFor par);                  \
  void mean_backward(const MeanBackward& args, ParallelFor par); \
  }
FASTMETA_SEGMENT_CPU(baseline)
FASTMETA_SEGMENT_CPU(avx2)
FASTMETA_SEGMENT_CPU(avx512)
#undef FASTMETA_SEGMENT_CPU

namespace cuda {
void mean(const Mean& args, void* stream);
void mean_backward(const MeanBackward& args, void* stream);
}  // namespace cuda

}  // namespace fastmeta::segment
