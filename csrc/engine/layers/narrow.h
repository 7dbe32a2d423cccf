// linear layers of so few outputs that many lanes along them would be empty, as the last of a
// regression or of a 5-way classifier: the weights lie as torch has them, [outputs][inputs], lanes
// along the inputs.
//
// Their other products are those of product.h, which calls these.
#pragma once
#include "common/gemm.h"
#include "engine/layers/lanes.h"

namespace fastmeta::engine::FASTMETA_ISA::narrow {

template <class T>
constexpr int kMostOutputs = kWidth<T> * 5 / 8;

// Inputs are whole vectors: what lies behind them is anything, and would enter the sums.
template <class T>
static bool applies(const Node& node) {
  return node.kind == Kind::kLinear && node.out.channels <= kMostOutputs<T> &&
         node.in.channels % kWidth<T> == 0;
}

// A term of y = x w^T.
template <class T>
struct Term {
  const T* x;
  const T* w;
};

// Rows [row, row + kRows) of y = bias + the sum of the terms; zeros in the padding.
template <class T, int kOutputs, int kRows, int kTerms>
FASTMETA_INLINE void forward_rows(const Node& node, int64_t row, const Term<T> (&terms)[kTerms],
                                  const T* bias, T* y) {
  constexpr int kW = kWidth<T>;
  const int64_t inputs = node.in.channels, ldx = node.in.ld, ldy = node.out.ld;
  Vec<T> sum[kRows][kOutputs] = {};
  FASTMETA_UNROLL
  for (int t = 0; t < kTerms; ++t) {
    const T* x = terms[t].x + row * ldx;
    const T* w = terms[t].w;
    for (int64_t i = 0; i < inputs; i += kW) {
      Vec<T> weight[kOutputs];
      FASTMETA_UNROLL
      for (int o = 0; o < kOutputs; ++o) weight[o] = load(w + o * inputs + i);
      FASTMETA_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const Vec<T> in = load(x + r * ldx + i);
        FASTMETA_UNROLL
        for (int o = 0; o < kOutputs; ++o) sum[r][o] += in * weight[o];
      }
    }
  }
  FASTMETA_UNROLL
  for (int r = 0; r < kRows; ++r) {
    Vec<T> total{};
    if constexpr (kOutputs <= 2) {
      for (int o = 0; o < kOutputs; ++o) total[o] = hsum<T>(sum[r][o]);
    } else {
      Vec<T> lanes[kW] = {};
      FASTMETA_UNROLL
      for (int o = 0; o < kOutputs; ++o) lanes[o] = sum[r][o];
      total = sum_lanes_of_each<T>(lanes);
    }
    store(y + (row + r) * ldy, bias != nullptr ? total + load(bias) : total);
  }
}

template <class T, int kOutputs, int kTerms>
static void forward_outputs(const Node& node, int64_t rows, const Term<T> (&terms)[kTerms],
                            const T* bias, T* y) {
  if constexpr (kOutputs <= kMostOutputs<T>) {
    constexpr int kRows = kOutputs == 1 ? 8 : kOutputs <= 3 ? 4 : kOutputs == 4 ? 3 : 2;
    int64_t row = 0;
    for (; row + kRows <= rows; row += kRows) {
      forward_rows<T, kOutputs, kRows>(node, row, terms, bias, y);
    }
    for (; row < rows; ++row) forward_rows<T, kOutputs, 1>(node, row, terms, bias, y);
  }
}

// y = bias + the sum of the terms.
template <class T, int kTerms>
static void forward(const Node& node, int64_t rows, const Term<T> (&terms)[kTerms], const T* bias,
                    T* y) {
#define FASTMETA_OUTPUTS(O) \
  case O:                   \
    return forward_outputs<T, O>(node, rows, terms, bias, y);
  switch (node.out.channels) {
    FASTMETA_OUTPUTS(1)
    FASTMETA_OUTPUTS(2)
    FASTMETA_OUTPUTS(3)
    FASTMETA_OUTPUTS(4)
    FASTMETA_OUTPUTS(5)
    FASTMETA_OUTPUTS(6)
    FASTMETA_OUTPUTS(7)
    FASTMETA_OUTPUTS(8)
    FASTMETA_OUTPUTS(9)
    FASTMETA_OUTPUTS(10)
  }
#undef FASTMETA_OUTPUTS
}

}  // namespace fastmeta::engine::FASTMETA_ISA::narrow
