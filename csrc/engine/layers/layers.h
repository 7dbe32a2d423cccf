// The layers that are no matrix products, by kind: forward, backward, dual_forward, dual_backward,
// and the memory that they ask for. linear and conv2d do not come here.
#pragma once
#include <stdexcept>

#include "engine/layers/activations.h"
#include "engine/layers/batch_norm.h"
#include "engine/layers/dropout.h"
#include "engine/layers/group_norm.h"
#include "engine/layers/layer_norm.h"
#include "engine/layers/pool.h"
#include "engine/layers/shape.h"

namespace fastmeta::engine::FASTMETA_ISA::layers {

// Whether backward reads the cotangent of a number for that number alone.
inline bool is_activation(Kind kind) { return kind >= Kind::kRelu && kind <= Kind::kSoftplus; }

// FASTMETA_LAYER(call, kind): call of the function of that name in the namespace of the kind.
#define FASTMETA_LAYERS(kind, function, ...)     \
  switch (kind) {                                \
    case Kind::kBatchNorm:                       \
      return batch_norm::function(__VA_ARGS__);  \
    case Kind::kLayerNorm:                       \
      return layer_norm::function(__VA_ARGS__);  \
    case Kind::kGroupNorm:                       \
      return group_norm::function(__VA_ARGS__);  \
    case Kind::kRelu:                            \
    case Kind::kLeakyRelu:                       \
    case Kind::kElu:                             \
    case Kind::kGelu:                            \
    case Kind::kSilu:                            \
    case Kind::kTanh:                            \
    case Kind::kSigmoid:                         \
    case Kind::kSoftplus:                        \
      return activations::function(__VA_ARGS__); \
    case Kind::kMaxPool:                         \
      return max_pool::function(__VA_ARGS__);    \
    case Kind::kAvgPool:                         \
      return avg_pool::function(__VA_ARGS__);    \
    case Kind::kMeanPool:                        \
      return mean_pool::function(__VA_ARGS__);   \
    case Kind::kFlatten:                         \
      return flatten::function(__VA_ARGS__);     \
    case Kind::kDropout:                         \
      return dropout::function(__VA_ARGS__);     \
    case Kind::kAdd:                             \
      return add::function(__VA_ARGS__);         \
    case Kind::kLinear:                          \
    case Kind::kConv2d:                          \
      break;                                     \
  }                                              \
  throw std::logic_error("fastmeta: a matrix product among the other layers")

template <class T>
void forward(const LayerCall<T>& call) {
  FASTMETA_LAYERS(call.node->kind, forward, call);
}
template <class T>
void backward(const LayerCall<T>& call) {
  FASTMETA_LAYERS(call.node->kind, backward, call);
}
template <class T>
void dual_forward(const LayerCall<T>& call) {
  FASTMETA_LAYERS(call.node->kind, dual_forward, call);
}
template <class T>
void dual_backward(const LayerCall<T>& call) {
  FASTMETA_LAYERS(call.node->kind, dual_backward, call);
}
// Without T: enough for either type.
template <class T = double>
int64_t saved_bytes(const Node& node, int64_t rows) {
  FASTMETA_LAYERS(node.kind, template saved_bytes<T>, node, rows);
}
template <class T = double>
int64_t scratch_bytes(const Node& node, int64_t rows) {
  FASTMETA_LAYERS(node.kind, template scratch_bytes<T>, node, rows);
}
#undef FASTMETA_LAYERS

}  // namespace fastmeta::engine::FASTMETA_ISA::layers
