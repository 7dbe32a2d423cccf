// linear layers of so few outputs that many lanes along them would be empty, as the last of a
// regression or of a 5-way classifier: the weights lie as torch has them, [outputs][inputs], lanes
// along the inputs.
//
// Rows of weights end in whole vectors, with zeros, which sums over parameters read.
#pragma once
#include "common/gemm_transposed.h"
#include "engine/layer.h"

namespace fastmeta::engine::FASTMETA_ISA::narrow {

template <class T>
constexpr int kMostOutputs = kWidth<T> * 5 / 8;

template <class T>
static bool applies(const Node& node) {
  return node.kind == Kind::kLinear && node.out.channels <= kMostOutputs<T> &&
         node.in.ld % kWidth<T> == 0;
}

}  // namespace fastmeta::engine::FASTMETA_ISA::narrow
