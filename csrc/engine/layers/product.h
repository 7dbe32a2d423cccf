// linear, and conv2d of single pixels: one matrix product, Y[positions, outputs] = X W, X read in
// place. Other convolutions are in convolution.h. Weights are Matrix [inputs][outputs] in panels
// (plan.h).
//
// Multiply-adds, in units of positions * inputs * outputs: forward 1, backward 2, dual_forward 3 (2
// where the input has no tangent), dual_backward 5 (2 where the input has none and wants none), and
// one more each for the primal weight gradient where it is wanted. Both duals are spared one where
// the primal values are known from the first pass.
#pragma once
#include "common/gemm.h"
#include "engine/layers/convolution.h"

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
        ldy(n.out.ld) {}
  int64_t positions, inputs, outputs;
  int64_t ldx, input_cols, ldy;

  // The raw input's rows may end within a vector: its gradient is formed beside it.
  bool writes_in_place() const { return ldx == input_cols; }
};

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
static Weights<T> weights_of(const Dims<T>& d, const T* w, T* scratch) {
  Weights<T> both{{w, d.inputs, d.ldy, 0}, {nullptr, d.outputs, d.input_cols, 0}};
  if (d.positions >= kManyRows) {
    transpose_to_panels<T>(both.plain, d.outputs, {scratch, d.outputs, d.input_cols, 0});
    both.transposed.data = scratch;
  }
  return both;
}

// out[positions, inputs] = (out +) gy W^T, rows of input_cols numbers.
template <class T>
static void times_transpose(const Dims<T>& d, const T* gy, const Weights<T>& w, T* out, bool add) {
  if (w.transposed.data == nullptr) {
    gemm_transposed_few<T>(d.positions, gy, d.ldy, w.plain, out, d.input_cols, T(1), add);
    return;
  }
  GemmStart<T> start;
  if (add) start.from = out;
  gemm<T>(d.positions, d.outputs, gy, d.ldy, 1, w.transposed,
          {out, d.positions, d.input_cols, d.input_cols}, start);
}

// gw[inputs, outputs] += x^T gy
template <class T>
static void add_weight_gradient(const Dims<T>& d, const T* x, const T* gy, T* gw) {
  GemmStart<T> start;
  start.from = gw;
  gemm<T>(d.inputs, d.positions, x, 1, d.ldx, {gy, d.positions, d.ldy, d.ldy},
          {gw, d.inputs, d.ldy, 0}, start);
}

// y = x w + b; and where dy is wanted, dy = dx w + x dw + db.
template <class T>
static void forward_both(const LayerCall<T>& call, bool dual) {
  const Dims<T> d(*call.node, call.rows);
  const auto product = [&](const T* x, const T* w, const GemmStart<T>& start, T* y) {
    gemm<T>(d.positions, w == nullptr ? 0 : d.inputs, x, d.ldx, 1, {w, d.inputs, d.ldy, 0},
            {y, d.positions, d.ldy, d.ldy}, start);
  };
  GemmStart<T> start;
  start.bias = call.b;
  if (!call.known) product(call.x, call.w, start, call.y);
  if (!dual) return;
  start.bias = call.db;
  if (call.dx != nullptr) {
    product(call.dx, call.w, start, call.dy);
    if (call.dw == nullptr) return;
    start = {T(1), nullptr, call.dy};
  }
  product(call.x, call.dw, start, call.dy);
}

template <class T>
static void backward_both(const LayerCall<T>& call, bool dual) {
  const Dims<T> d(*call.node, call.rows);
  const bool wants_dgx = dual && call.dgx != nullptr, turns = wants_dgx && call.dw != nullptr;
  if (call.gb != nullptr) add_column_sums(d.positions, call.gy, d.ldy, d.ldy, call.gb);
  if (dual && call.dgb != nullptr) add_column_sums(d.positions, call.dgy, d.ldy, d.ldy, call.dgb);
  if (call.gw != nullptr) add_weight_gradient(d, call.x, call.gy, call.gw);
  if (dual && call.dgw != nullptr) {
    if (call.dx != nullptr) add_weight_gradient(d, call.dx, call.gy, call.dgw);
    add_weight_gradient(d, call.x, call.dgy, call.dgw);
  }
  if (call.gx == nullptr && !wants_dgx) return;

  Pieces<T> pieces(call.scratch);
  const Weights<T> w = weights_of(d, call.w, pieces.take(d.outputs * d.input_cols));
  Weights<T> dw;
  if (turns) dw = weights_of(d, call.dw, pieces.take(d.outputs * d.input_cols));
  T* beside = pieces.take(d.positions * d.input_cols, !d.writes_in_place());
  const auto to_input = [&](T* gx, auto fill) {
    if (d.writes_in_place()) {
      fill(gx, call.add_gx);
      return;
    }
    fill(beside, false);
    give_columns<T>(d.positions, d.inputs, beside, d.input_cols, nullptr, call.add_gx, nullptr,
                    d.ldx, gx);
  };
  if (call.gx != nullptr) {
    to_input(call.gx, [&](T* out, bool add) { times_transpose(d, call.gy, w, out, add); });
  }
  if (wants_dgx) {
    to_input(call.dgx, [&](T* out, bool add) {
      times_transpose(d, call.dgy, w, out, add);
      if (turns) times_transpose(d, call.gy, dw, out, true);
    });
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
