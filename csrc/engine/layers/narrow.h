// linear layers of so few outputs that lanes along them would be empty, as the last of a regression
// is: the weights lie as torch has them, [outputs][inputs], lanes along the inputs.
//
// Their other products are those of product.h, which calls these.
#pragma once
#include "common/gemm.h"
#include "engine/layers/lanes.h"

namespace fastmeta::engine::FASTMETA_ISA::narrow {

template <class T>
constexpr int64_t kMostOutputs = kWidth<T> >= 8 ? kWidth<T> / 4 : 1;

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

// y = bias + the sum of the terms, zeros in its padding: kWidth rows at a time, first as sums over
// the inputs' lanes, one vector a row, then their totals with rows along the lanes.
template <class T, int kTerms>
static void forward(const Node& node, int64_t rows, const Term<T> (&terms)[kTerms], const T* bias,
                    T* y) {
  constexpr int kW = kWidth<T>;
  const int64_t inputs = node.in.channels, ldx = node.in.ld, ldy = node.out.ld;
  for (int64_t first = 0; first < rows; first += kW) {
    const int64_t count = min_of<int64_t>(kW, rows - first);
    Vec<T> totals[kW] = {};  // of an output each
    for (int64_t o = 0; o < node.out.channels; ++o) {
      Vec<T> sum[kW] = {};
      for (const Term<T>& term : terms) {
        const T* w = term.w + o * inputs;
        const T* x[kW];  // past the last row the last once more, so that loops over rows unroll
        FASTMETA_UNROLL
        for (int r = 0; r < kW; ++r) x[r] = term.x + (first + min_of<int64_t>(r, count - 1)) * ldx;
        for (int64_t i = 0; i < inputs; i += kW) {
          const Vec<T> weight = load(w + i);
          FASTMETA_UNROLL
          for (int r = 0; r < kW; ++r) sum[r] += weight * load(x[r] + i);
        }
      }
      totals[o] = sum_lanes_of_each<T>(sum) + (bias != nullptr ? bias[o] : T(0));
    }
    transpose<T>(totals);
    for (int64_t r = 0; r < count; ++r) store(y + (first + r) * ldy, totals[r]);
  }
}

}  // namespace fastmeta::engine::FASTMETA_ISA::narrow
