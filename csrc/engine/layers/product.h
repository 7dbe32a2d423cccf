// linear, and conv2d of single pixels: one matrix product, Y[positions, outputs] = X W, X read in
// place. Other convolutions are in convolution.h. Weights are Matrix [inputs][outputs] in panels,
// or [outputs][inputs] where there are few outputs (plan.h).
//
// Multiply-adds, in units of positions * inputs * outputs: forward 1, backward 2, dual_forward 3 (2
// where the input has no tangent), dual_backward 5 (2 where the input has none and wants none), and
// one more each for the primal weight gradient where it is wanted. Both duals are spared one where
// the primal values are known from the first pass.
#pragma once
#include "common/gemm_transposed.h"
#include "engine/layers/convolution.h"
#include "engine/layers/lanes.h"
#include "engine/layout.h"

namespace fastmeta::engine::FASTMETA_ISA::product {

// Rows from which a transposed copy of the weights pays.
constexpr int64_t kManyRows = 8;

template <class T>
struct Dims {
  Dims(const Node& n, int64_t rows)
      : positions(rows * n.out.pixels()),
        inputs(n.in.channels),
        outputs(n.out.channels),
        ldx(n.in.ld),
        input_cols(padded<T>(inputs)),
        ldy(n.out.lanes > 0 ? n.out.padded_rows(rows) : n.out.ld),
        narrow(is_narrow(n, kGrain<T>)),
        turned(n.out.lanes > 0) {}
  int64_t positions, inputs, outputs;
  int64_t ldx, input_cols;
  int64_t ldy;  // from row to row of Y, or, where it is turned, from output to output
  bool narrow;
  bool turned;  // Y is [outputs, positions]

  // From position to position of Y, and from output to output.
  int64_t y_row() const { return turned ? 1 : ldy; }
  int64_t y_col() const { return turned ? ldy : 1; }

  // A matrix of weights, or of their gradient, where there are few outputs.
  template <class W>
  Matrix<W> rows_of(W* w) const {
    return {w, outputs, input_cols, input_cols};
  }

  // The raw input's rows may end within a vector: its gradient is formed beside it.
  bool writes_in_place() const { return ldx == input_cols; }
};

// The transposed weights of a step, for its dual pass: small ones, that leave room for other steps'
// values (buffers.h).
template <class T>
int64_t saved_bytes(const Node& node, int64_t rows) {
  constexpr int64_t kMost = 4096;
  const Dims<T> d(node, rows);
  const int64_t numbers = d.outputs * d.input_cols;
  const bool turns = !d.narrow && d.positions >= kManyRows && numbers <= kMost;
  return turns ? numbers * static_cast<int64_t>(sizeof(T)) : 0;
}

template <class T>
int64_t scratch_bytes(const Node& node, int64_t rows) {
  const Dims<T> d(node, rows);
  int64_t numbers = 2 * d.outputs * d.input_cols;  // transposed W and dW
  if (!d.writes_in_place()) numbers += d.positions * d.input_cols;
  return (numbers + 3 * 16) * static_cast<int64_t>(sizeof(T));
}

template <class T>
struct Weights {
  ConstMatrix<T> plain;
  ConstMatrix<T> transposed;  // data nullptr where few rows make it not worth while
};

template <class T>
static Weights<T> weights_of(const Dims<T>& d, const T* w, T* scratch, bool known = false) {
  if (d.narrow) return {{}, d.rows_of(w)};
  Weights<T> both{{w, d.inputs, d.ldy, 0}, {nullptr, d.outputs, d.input_cols, 0}};
  if (d.positions >= kManyRows) {
    const Matrix<T> to{scratch, d.outputs, d.input_cols, 0};
    if (!known) transpose_to_panels<T>(both.plain, d.outputs, to);
    both.transposed.data = scratch;
  }
  return both;
}

// What goes into an input's gradient: gy W^T.
template <class T>
struct InputTerm {
  const T* gy;
  const Weights<T>& w;
};

// out[positions, inputs] = (out +) alpha * the sum of the terms, rows of input_cols numbers.
template <class T, int kTerms>
static void to_input(const Dims<T>& d, const InputTerm<T> (&from)[kTerms], T* out, bool add,
                     T alpha = T(1)) {
  const GemmStart<T> start{alpha, nullptr, add ? out : nullptr};
  if (from[0].w.transposed.data == nullptr) {
    TransposedTerm<T> terms[kTerms];
    for (int t = 0; t < kTerms; ++t) terms[t] = {from[t].gy, d.ldy, from[t].w.plain, d.outputs};
    gemm_transposed<T>(d.positions, terms, out, d.input_cols, start);
    return;
  }
  GemmTerm<T> terms[kTerms];
  for (int t = 0; t < kTerms; ++t) {
    terms[t] = {from[t].gy, d.y_row(), d.y_col(), d.outputs, from[t].w.transposed};
  }
  gemm<T>(d.positions, terms, {out, d.positions, d.input_cols, d.input_cols}, start);
}

// What goes into an output: x w. turned_x: x as [inputs][rows], if it is at hand.
template <class T>
struct OutputTerm {
  const T* x;
  const T* w;
  const T* turned_x = nullptr;
};

template <class T>
static void turn_input(const LayerCall<T>& call) {
  const Dims<T> d(*call.node, call.rows);
  transpose_rows<T>({call.x, d.positions, d.input_cols, d.ldx}, 0, d.positions, d.inputs,
                    {call.turned_x, d.inputs, d.ldy, d.ldy}, 0);
}

// The bias, or zeros, in every position.
template <class T>
static void fill_output(const Dims<T>& d, const T* bias, T* y) {
  if (d.turned) {
    for (int64_t o = 0; o < d.outputs; ++o) {
      std::fill_n(y + o * d.ldy, d.ldy, bias != nullptr ? bias[o] : T(0));
    }
    return;
  }
  for (int64_t i = 0; i < d.positions; ++i) {
    for (int64_t c = 0; c < d.ldy; ++c) y[i * d.ldy + c] = bias != nullptr ? bias[c] : T(0);
  }
}

// to_output where Y is turned: W [outputs, inputs] X^T.
template <class T, int kTerms>
static void to_turned_output(const Dims<T>& d, const OutputTerm<T> (&from)[kTerms],
                             GemmStart<T> start, T* y) {
  if (start.bias != nullptr) {
    fill_output(d, start.bias, y);
    start = {start.alpha, nullptr, y};
  }
  if constexpr (kTerms == 1) {
    if (from[0].turned_x != nullptr) {
      const ConstMatrix<T> x{from[0].turned_x, d.inputs, d.ldy, d.ldy};
      gemm<T, 1>(d.outputs, {{from[0].w, d.input_cols, 1, d.inputs, x}},
                 {y, d.outputs, d.ldy, d.ldy}, start);
      return;
    }
  }
  TransposedTerm<T> terms[kTerms];
  for (int t = 0; t < kTerms; ++t) {
    terms[t] = {from[t].w, d.input_cols, {from[t].x, d.positions, d.ldx, d.ldx}, d.inputs};
  }
  gemm_transposed<T>(d.outputs, terms, y, d.ldy, start);
}

// y = start + alpha * the sum of the terms, of which null pointers mark those that are zero. Start
// is a bias, y itself or 0.
template <class T>
static void to_output(const Dims<T>& d, const OutputTerm<T>& first, const OutputTerm<T>& second,
                      const GemmStart<T>& start, T* y) {
  const auto sum = [&](const auto&... terms) {
    constexpr int kTerms = sizeof...(terms);
    if (d.turned) return to_turned_output<T, kTerms>(d, {terms...}, start, y);
    if (d.narrow) {
      return gemm_transposed<T, kTerms>(
          d.positions, {{terms.x, d.ldx, d.rows_of(terms.w), d.inputs}...}, y, d.ldy, start);
    }
    gemm<T, kTerms>(d.positions, {{terms.x, d.ldx, 1, d.inputs, {terms.w, d.inputs, d.ldy, 0}}...},
                    {y, d.positions, d.ldy, d.ldy}, start);
  };
  const bool one = first.x != nullptr && first.w != nullptr;
  const bool two = second.x != nullptr && second.w != nullptr;
  if (one && two) return sum(first, second);
  if (one || two) return sum(one ? first : second);
  fill_output(d, start.bias, y);
}

// What goes into a weight's gradient: x^T gy.
template <class T>
struct WeightTerm {
  const T* x;
  const T* gy;
};

// gw = start + alpha * the sum of the terms.
template <class T, int kTerms>
static void to_weights(const Dims<T>& d, const WeightTerm<T> (&from)[kTerms],
                       const GemmStart<T>& start, T* gw) {
  const Matrix<T> to = d.narrow ? d.rows_of(gw) : Matrix<T>{gw, d.inputs, d.ldy, 0};
  GemmTerm<T> terms[kTerms];
  for (int t = 0; t < kTerms; ++t) {
    const auto [x, gy] = from[t];
    terms[t] = d.narrow ? GemmTerm<T>{gy,
                                      d.y_col(),
                                      d.y_row(),
                                      d.positions,
                                      {x, d.positions, d.input_cols, d.ldx}}
                        : GemmTerm<T>{x, 1, d.ldx, d.positions, {gy, d.positions, d.ldy, d.ldy}};
  }
  gemm<T, kTerms>(to.rows, terms, to, start);
  const int64_t last = d.inputs / kWidth<T> * kWidth<T>;
  if (!d.narrow || last == d.inputs) return;
  for (int64_t o = 0; o < d.outputs; ++o) {  // x's padding may hold anything
    T* end = gw + o * d.input_cols + last;
    store(end, keep_first<T>(load(end), d.inputs - last));
  }
}

// gb = from + factor * the sums of gy over the positions.
template <class T>
static void to_bias(const Dims<T>& d, const T* gy, const T* from, T factor, T* gb) {
  if (!d.turned) return add_column_sums(d.positions, gy, d.ldy, d.ldy, from, factor, gb);
  for (int64_t o = 0; o < d.outputs; ++o) {
    Vec<T> sum{};
    for (int64_t i = 0; i < d.ldy; i += kWidth<T>) sum += load(gy + o * d.ldy + i);
    gb[o] = from[o] + factor * hsum<T>(sum);
  }
  for (int64_t o = d.outputs; o < padded<T>(d.outputs); ++o) gb[o] = from[o];
}

// y = x w + b; and where dy is wanted, dy = dx w + x dw + db.
template <class T>
static void forward_both(const LayerCall<T>& call, bool dual) {
  const Dims<T> d(*call.node, call.rows);
  const T* turned_x = call.turned_x;
  if (!call.known) to_output<T>(d, {call.x, call.w, turned_x}, {}, {T(1), call.b}, call.y);
  if (dual) {
    to_output<T>(d, {call.dx, call.w}, {call.x, call.dw, turned_x}, {T(1), call.db}, call.dy);
  }
}

template <class T>
static void backward_both(const LayerCall<T>& call, bool dual) {
  const Dims<T> d(*call.node, call.rows);
  const bool wants_dgx = dual && call.dgx != nullptr, turns = wants_dgx && call.dw != nullptr;
  const auto from = [](const auto& update, const T* own) {
    return update.from != nullptr ? update.from : own;
  };
  if (call.gb != nullptr) {
    to_bias(d, call.gy, from(call.b_update, call.gb), call.b_update.factor, call.gb);
  }
  if (dual && call.dgb != nullptr) to_bias<T>(d, call.dgy, call.dgb, T(1), call.dgb);
  if (call.gw != nullptr) {
    const GemmStart<T> start{call.w_update.factor, nullptr, from(call.w_update, call.gw)};
    to_weights<T, 1>(d, {{call.x, call.gy}}, start, call.gw);
  }
  if (dual && call.dgw != nullptr) {
    const GemmStart<T> start{T(1), nullptr, call.dgw};
    if (call.dx == nullptr) {
      to_weights<T, 1>(d, {{call.x, call.dgy}}, start, call.dgw);
    } else {
      to_weights<T, 2>(d, {{call.x, call.dgy}, {call.dx, call.gy}}, start, call.dgw);
    }
  }
  if (call.gx == nullptr && !wants_dgx) return;

  Pieces<T> pieces(call.scratch);
  // The pass over the supports has left them, if it had an input's gradient to form.
  const bool kept = saved_bytes<T>(*call.node, call.rows) > 0;
  const bool known = kept && dual && call.known && call.dx != nullptr;
  T* turned = pieces.take(d.outputs * d.input_cols, !kept);
  const Weights<T> w = weights_of(d, call.w, kept ? static_cast<T*>(call.saved) : turned, known);
  Weights<T> dw;
  if (turns) dw = weights_of(d, call.dw, pieces.take(d.outputs * d.input_cols));
  T* beside = pieces.take(d.positions * d.input_cols, !d.writes_in_place());
  const auto give = [&](T* gx, const auto&... terms) {
    const bool in_place = d.writes_in_place();
    to_input<T, sizeof...(terms)>(d, {terms...}, in_place ? gx : beside, in_place && call.add_gx);
    if (in_place) return;
    give_columns<T>(d.positions, d.inputs, beside, d.input_cols, nullptr, call.add_gx, nullptr,
                    d.ldx, gx);
  };
  using Term = InputTerm<T>;
  if (call.gx != nullptr) give(call.gx, Term{call.gy, w});
  if (turns) {
    give(call.dgx, Term{call.dgy, w}, Term{call.gy, dw});
  } else if (wants_dgx) {
    give(call.dgx, Term{call.dgy, w});
  }
}

template <class T>
static void forward(const LayerCall<T>& call) {
  call.places != nullptr ? convolution::forward(call) : forward_both(call, false);
}
template <class T>
static void dual_forward(const LayerCall<T>& call) {
  call.places != nullptr ? convolution::dual_forward(call) : forward_both(call, true);
}
template <class T>
static void backward(const LayerCall<T>& call) {
  call.places != nullptr ? convolution::backward(call) : backward_both(call, false);
}
template <class T>
static void dual_backward(const LayerCall<T>& call) {
  call.places != nullptr ? convolution::dual_backward(call) : backward_both(call, true);
}

}  // namespace fastmeta::engine::FASTMETA_ISA::product
