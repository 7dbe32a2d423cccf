// linear, and conv2d of single pixels: one matrix product, Y[positions, outputs] = X W, X read in
// place. Other convolutions are in convolution.h. Weights are Matrix [inputs][outputs] in panels,
// or [outputs][inputs] where there are few outputs (narrow.h, plan.h).
//
// Multiply-adds, in units of positions * inputs * outputs: forward 1, backward 2, dual_forward 3 (2
// where the input has no tangent), dual_backward 5 (2 where the input has none and wants none), and
// one more each for the primal weight gradient where it is wanted. Both duals are spared one where
// the primal values are known from the first pass.
#pragma once
#include "common/gemm.h"
#include "engine/layers/convolution.h"
#include "engine/layers/lanes.h"
#include "engine/layers/narrow.h"

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
        ldy(n.out.ld),
        narrow(narrow::applies<T>(n)) {}
  int64_t positions, inputs, outputs;
  int64_t ldx, input_cols, ldy;
  bool narrow;

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
    terms[t] = {from[t].gy, d.ldy, 1, d.outputs, from[t].w.transposed};
  }
  gemm<T>(d.positions, terms, {out, d.positions, d.input_cols, d.input_cols}, start);
}

// What goes into an output: x w.
template <class T>
struct OutputTerm {
  const T* x;
  const T* w;
};

// y = start + alpha * the sum of the terms, of which null pointers mark those that are zero. Start
// is a bias, y itself or 0.
template <class T>
static void to_output(const Dims<T>& d, const OutputTerm<T>& first, const OutputTerm<T>& second,
                      const GemmStart<T>& start, T* y) {
  const auto sum = [&](const auto&... terms) {
    constexpr int kTerms = sizeof...(terms);
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
  for (int64_t i = 0; i < d.positions; ++i) {
    for (int64_t c = 0; c < d.ldy; ++c) {
      y[i * d.ldy + c] = start.bias != nullptr ? start.bias[c] : T(0);
    }
  }
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
    terms[t] = d.narrow
                   ? GemmTerm<T>{gy, 1, d.ldy, d.positions, {x, d.positions, d.input_cols, d.ldx}}
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

// y = x w + b; and where dy is wanted, dy = dx w + x dw + db.
template <class T>
static void forward_both(const LayerCall<T>& call, bool dual) {
  const Dims<T> d(*call.node, call.rows);
  if (!call.known) to_output<T>(d, {call.x, call.w}, {}, {T(1), call.b}, call.y);
  if (dual) to_output<T>(d, {call.dx, call.w}, {call.x, call.dw}, {T(1), call.db}, call.dy);
}

template <class T>
static void backward_both(const LayerCall<T>& call, bool dual) {
  const Dims<T> d(*call.node, call.rows);
  const bool wants_dgx = dual && call.dgx != nullptr, turns = wants_dgx && call.dw != nullptr;
  const auto from = [](const auto& update, const T* own) {
    return update.from != nullptr ? update.from : own;
  };
  if (call.gb != nullptr) {
    add_column_sums(d.positions, call.gy, d.ldy, d.ldy, from(call.b_update, call.gb),
                    call.b_update.factor, call.gb);
  }
  if (dual && call.dgb != nullptr) add_column_sums(d.positions, call.dgy, d.ldy, d.ldy, call.dgb);
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
