// Matching attention and its fused negative log-likelihood: what the CPU and CUDA kernels take.
//
//   z(q, i)     = scale * similarity(query_q, support_i)
//   lse(q)      = logsumexp_i z(q, i)                       over the valid supports of the task
//   logp(q, c)  = logsumexp_{i: y_i = c} z(q, i) - lse(q)   exactly -inf where class c has no
//   support nll(q)      = -logp(q, target_q)                        0 where the target is outside
//   [0, C)
//
// A support is valid when its label lies in [0, C); any other label marks padding, so that kernels
// are memory safe whatever the labels hold. A task without a valid support has lse = -inf, logp =
// -inf.
//
// Backward, with G = grad, P = exp(logp), w(q, i) = exp(z(q, i) - lse(q) - logp(q, y_i)):
//   dL/dz(q, i) = w(q, i) * (G(q, y_i) - P(q, y_i) * sum_c G(q, c))
// where G is taken as 0 at classes without support (their logp is a constant). For nll G(q, c) is
// -grad(q) at c = target_q and 0 elsewhere, and 0 altogether where nll(q) is +inf or ignored.
//
// Double backward, along directions q', s', scale', weight' (the gradients of the backward's
// outputs). With d(q, i) the derivative of the similarity along them, z' = scale * d + scale' *
// similarity, m(q, c) = sum_{i: y_i = c} w z', M(q) = sum_c P m, and H = sum_c G(q, c), the
// backward contracted with the directions is sum_q (sum_c G m - H M). Its gradients:
//   dL/dG(q, c) = m(q, c) - M(q)
//   g = dL/dz'  = w * (G - P H)                           at c = y_i, as in the backward
//   h = dL/dz   = w * (G * (z' - m) - P H * (z' - M))
//   dL/dscale   = sum h * similarity + g * d
//   dL/dq, dL/ds, dL/dweight: those of the similarity with A = scale * h + scale' * g and those of
//   d with B = scale * g, per pair:
//     dot           dq += A s + B s',  ds += A q + B q'
//     sqeuclidean   the same, doubled, minus the row sums: 2 (sum A) q + 2 (sum B) q'
//     euclidean     with r = |q - s|, E = A / r + B d / r^2, F = B / r:
//                   dq += E (s - q) + F (s' - q'),  ds likewise with q and s exchanged
//     cosine        with a = 1 / |q|, b = 1 / |s|, e = a^2 <q, q'>, f = b^2 <s, s'>, cos =
//     similarity:
//                   dq += ab (A - B (e + f)) s + ab B s'
//                         - a^2 (A cos + B (d - 2 e cos)) q - a^2 B cos q';  ds likewise, e with f
//     additive      with u = tanh(q + s), t = q' + s', per feature:
//                   dq += (1 - u^2) (A weight + B (weight' - 2 u weight t)),  ds the same
//                   dweight += A u + B (1 - u^2) t
#pragma once
#include <cstdint>

#include "common/parallel.h"
#include "common/types.h"

namespace fastmeta::matching {

enum class Similarity : int {
  kDot,          // <q, s>
  kCosine,       // <q, s> / (|q| |s|), 0 with zero gradient when either is the zero vector
  kSqEuclidean,  // -|q - s|^2
  kEuclidean,    // -|q - s|, zero gradient at coincident points
  kAdditive,     // <weight, tanh(q + s)>, q and s already projected
};

// All arrays contiguous, row major. "scalar" is the dtype of query and support, "acc" its
// accumulation type: float for float32, bfloat16 and float16, double for float64.
struct Problem {
  DType dtype;
  Similarity similarity;
  int64_t num_tasks, num_queries, num_supports, num_classes, dim;  // T, Q, S, C, D
  const void* query;                                               // [T, Q, D] scalar
  const void* support;                                             // [T, S, D] scalar
  const int64_t* labels;                                           // [T, S]
  const int64_t* targets;  // [T, Q] for nll; nullptr for attention
  const void* scale;       // acc, [T] or, with scale_stride 0, [1]
  int64_t scale_stride;    // 1 or 0
  const void* weight;  // acc, [T, D] or, with weight_stride 0, [1, D]; additive only, else nullptr
  int64_t weight_stride;    // D or 0
  bool allow_tf32 = false;  // CUDA: float32 products may be rounded to TF32
  bool bf16_dots = false;   // CPU: the machine has AVX512-BF16, for products of bfloat16
};

// CPU: tasks whose slopes dL/dz, or similarities, fit the second-level cache: float and double, at
// most kSlopeBytes of them. kept_lanes: queries, up to the widest vector.
constexpr int64_t kSlopeBytes = int64_t{256} << 10;
constexpr int64_t kSlopeRows = 1024;  // supports or queries at most
inline int64_t kept_lanes(const Problem& p) { return (p.num_queries + 15) / 16 * 16; }
inline bool is_few_shot(const Problem& p) {
  const int64_t lanes = kept_lanes(p), size = p.dtype == DType::kFloat64 ? 8 : 4;
  return (p.dtype == DType::kFloat32 || p.dtype == DType::kFloat64) && p.num_supports > 0 &&
         p.num_supports <= kSlopeRows && lanes <= kSlopeRows &&
         lanes * p.num_supports * size <= kSlopeBytes;
}
// Of these the backward holds the slopes of a whole task, where gradients are products with them;
inline bool keeps_slopes(const Problem& p) {
  return p.similarity != Similarity::kAdditive && is_few_shot(p);
}
// and the forward hands the similarities to the backward, where one follows, if they take at most
// half of the memory that query and support take.
inline bool keeps_scores(const Problem& p) {
  return is_few_shot(p) &&
         2 * kept_lanes(p) * p.num_supports <= (p.num_queries + p.num_supports) * p.dim;
}

struct Forward {
  Problem problem;
  void* out;  // acc: logp [T, Q, C], or with targets nll [T, Q]
  void* lse;  // acc: [T, Q]
  // acc, for the backward: CPU: similarities [T, S, kept_lanes()], supports in class order; CUDA:
  // what they are made of, [T, Q, S], nothing at padding.
  void* scores = nullptr;
};

struct Backward {
  Problem problem;
  const void* grad;              // acc, shaped like out
  const void* out;               // acc, of the forward
  const void* lse;               // acc, [T, Q]
  void* grad_query;              // scalar, [T, Q, D]
  void* grad_support;            // scalar, [T, S, D]; zero at padding
  void* grad_scale;              // acc, [T]
  void* grad_weight;             // acc, [T, D]; nullptr unless additive
  const void* scores = nullptr;  // of the forward, or nullptr: to be computed again
};

// The directions may be nullptr, which stands for zero. They are contiguous, as everything else.
struct DoubleBackward {
  Problem problem;
  const void* query_dot;    // scalar, [T, Q, D]
  const void* support_dot;  // scalar, [T, S, D]; not read at padding
  const void* scale_dot;    // acc, [T]
  const void* weight_dot;   // acc, [T, D]; nullptr unless additive
  const void* grad;         // acc, of the backward, shaped like out
  const void* out;          // acc, of the forward
  const void* lse;          // acc, [T, Q]
  void* grad_grad;          // acc, shaped like out; 0 at classes without support
  void* grad_query;         // scalar, [T, Q, D]
  void* grad_support;       // scalar, [T, S, D]; zero at padding
  void* grad_scale;         // acc, [T]
  void* grad_weight;        // acc, [T, D]; nullptr unless additive
};

#define FASTMETA_MATCHING_CPU(ISA)                                   \
  namespace ISA {                                                    \
  void forward(const Forward& args, ParallelFor par);                \
  void backward(const Backward& args, ParallelFor par);              \
  void double_backward(const DoubleBackward& args, ParallelFor par); \
  }
FASTMETA_MATCHING_CPU(baseline)
FASTMETA_MATCHING_CPU(avx2)
FASTMETA_MATCHING_CPU(avx512)
#undef FASTMETA_MATCHING_CPU

// Launchers of matching_attention_cuda.cu and matching_double_backward_cuda.cu. stream is a
// cudaStream_t of the current device; workspace is device memory of *_workspace() bytes, 16-byte
// aligned, free to go once the stream has passed the call. order [T, S] lists each task's supports
// sorted by class (stable), padding last; class_start [T, C + 1] where each class begins in it.
// sort_by_class fills both for the problems that sorts_by_class takes, of few supports a task.
namespace cuda {
struct Sorted {
  const int64_t* order;
  const int64_t* class_start;
};
// Elements a task of Forward::scores, 0 where the backward computes them again.
int64_t scores_size(const Problem& problem);
bool sorts_by_class(const Problem& problem);
void sort_by_class(const Problem& problem, int64_t* order, int64_t* class_start, void* stream);
int64_t forward_workspace(const Problem& problem);
void forward(const Forward& args, const Sorted& sorted, void* workspace, void* stream);
int64_t backward_workspace(const Problem& problem);
void backward(const Backward& args, const Sorted& sorted, void* workspace, void* stream);
int64_t double_backward_workspace(const Problem& problem);
void double_backward(const DoubleBackward& args, const Sorted& sorted, void* workspace,
                     void* stream);
}  // namespace cuda

}  // namespace fastmeta::matching
