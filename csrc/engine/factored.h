// A linear layer whose input X no step changes, with its fast weight kept as the terms it gained:
//
//   W_k = W_0 - A_k^T X,     A_{k+1} = A_k + rate * D_k,     D_k = dL_S / dy at the layer's output
//
// so that with few supports the state is A [supports, outputs], and the products with W_0 and the
// Gram matrices X X^T, X_Q X^T are formed once, not once a step:
//
//   y_k = X W_0^T + b_k - (X X^T) A_k,      y_Q = X_Q W_0^T + b_K - (X_Q X^T) A_K
//
// It is the exact linear layer in other coordinates. With a the cotangent of A, and D' = dL/dy's
// tangent in a pass along the direction rate * a of y,
//
//   a_K = -(X_Q X^T)^T gy_Q,     a_k = a_{k+1} - (X X^T) D'_k,     rate's gradient: D_k . a_{k+1}
//   W_0's gradient: gy_Q^T X_Q + (sum_k D'_k)^T X
//
// The engine's vectors of adapted parameters hold A where W would stand (Layout::kFactored), and
// their gradient -D, so that steps and rates treat it as any parameter.
#pragma once
#include "engine/layers/product.h"
#include "engine/plan.h"

namespace fastmeta::engine::FASTMETA_ISA {

// Memory of one factored layer for one task, in numbers from its beginning.
template <class T>
struct FactoredBuffers {
  int64_t gram = -1, query_gram = -1;  // [S, ld of S], [Q, ld of S]
  int64_t base = -1;                   // X W_0^T, as y
  int64_t tangents = -1;               // sum over the steps of D', as y
  int64_t gram_gradient = -1, query_gram_gradient = -1;
  int64_t gram_ld = 0;
};

template <class T>
class FactoredLayer {
 public:
  FactoredLayer(const Node& node, const Adapt& args, const FactoredBuffers<T>& buffers, T* memory)
      : node_(node),
        b_(buffers),
        memory_(memory),
        supports_(args.supports),
        queries_(args.queries) {}

  // Gram matrices and X W_0^T of a task. x, query_x: [rows, ld]; w: Matrix [inputs, outputs].
  void begin(const T* x, const T* query_x, const T* w) {
    x_ = x;
    query_x_ = query_x;
    const int64_t ld = node_.in.ld;
    const ConstMatrix<T> rows{x, supports_, ld, ld};
    gemm_transposed_few<T>(supports_, x, ld, rows, at(b_.gram), b_.gram_ld, T(1), false);
    gemm_transposed_few<T>(queries_, query_x, ld, rows, at(b_.query_gram), b_.gram_ld, T(1), false);
    gemm<T>(supports_, node_.in.channels, x, ld, 1, weight(w), output(at(b_.base), supports_));
    for (int64_t place : {b_.tangents, b_.gram_gradient}) {
      if (place >= 0) std::fill_n(at(place), size_of(place), T(0));
    }
  }

  // y = X W_0^T + b - (X X^T) A
  void forward(const T* a, const T* bias, T* y) const {
    const int64_t ld = node_.out.ld;
    const T* base = at(b_.base);
    for (int64_t i = 0; bias != nullptr && i < supports_; ++i) {
      for (int64_t c = 0; c < ld; ++c) y[i * ld + c] = base[i * ld + c] + bias[c];
    }
    GemmStart<T> start{T(-1), nullptr, bias != nullptr ? y : base};
    gemm<T>(supports_, supports_, at(b_.gram), b_.gram_ld, 1, state(a), output(y, supports_),
            start);
  }

  // dy = -direction + db, the direction in A's place being -rate * a.
  void tangent(const T* direction, const T* db, T* dy) const {
    const int64_t ld = node_.out.ld;
    for (int64_t i = 0; i < supports_; ++i) {
      for (int64_t c = 0; c < ld; ++c) {
        dy[i * ld + c] = (db == nullptr ? T(0) : db[c]) - direction[i * ld + c];
      }
    }
  }

  // What stands for A's gradient: -D.
  void gradient(const T* gy, T* g) const {
    for (int64_t i = 0; i < supports_ * node_.out.ld; ++i) g[i] = -gy[i];
  }

  // a's cotangent -= (X X^T) D'. A is that of this step.
  void product(const T* dgy, const T* a, T* out) const {
    const GemmStart<T> start{T(-1), nullptr, out};
    gemm<T>(supports_, supports_, at(b_.gram), b_.gram_ld, 1, state(dgy), output(out, supports_),
            start);
    T* sum = at(b_.tangents);
    for (int64_t i = 0; i < supports_ * node_.out.ld; ++i) sum[i] += dgy[i];
    if (b_.gram_gradient >= 0) {
      gemm_transposed_few<T>(supports_, dgy, node_.out.ld, state(a), at(b_.gram_gradient),
                             b_.gram_ld, T(-1), true);
    }
  }

  void query_forward(const T* w, const T* a, const T* bias, T* y) const {
    GemmStart<T> start;
    start.bias = bias;
    gemm<T>(queries_, node_.in.channels, query_x_, node_.in.ld, 1, weight(w), output(y, queries_),
            start);
    start = {T(-1), nullptr, y};
    gemm<T>(queries_, supports_, at(b_.query_gram), b_.gram_ld, 1, state(a), output(y, queries_),
            start);
  }

  // Adds to a's cotangent, to W_0's gradient (Matrix) and, where given, to the query's cotangent.
  void query_backward(const T* w, const T* a, const T* gy, T* cotangent, T* gw, T* gx, bool add_gx,
                      T* scratch) {
    const int64_t ld = node_.out.ld;
    GemmStart<T> start{T(-1), nullptr, cotangent};
    gemm<T>(supports_, queries_, at(b_.query_gram), 1, b_.gram_ld, {gy, queries_, ld, ld},
            output(cotangent, supports_), start);
    add_to_weight(query_x_, gy, queries_, T(1), gw);
    if (b_.query_gram_gradient >= 0) {
      gemm_transposed_few<T>(queries_, gy, ld, state(a), at(b_.query_gram_gradient), b_.gram_ld,
                             T(-1), false);
    }
    if (gx == nullptr) return;
    add_through_weight(w, gy, queries_, T(1), gx, add_gx, scratch);
    start = {T(1), nullptr, gx};
    gemm<T>(queries_, supports_, at(b_.query_gram_gradient), b_.gram_ld, 1, inputs(x_),
            {gx, queries_, node_.in.ld, node_.in.ld}, start);
  }

  // After the sweep: the supports' share of W_0's gradient and, where given, X's cotangent, added.
  void finish(const T* w, bool with_queries, T* gw, T* gx, T* scratch) const {
    const T* sum = at(b_.tangents);
    if (gw != nullptr) add_to_weight(x_, sum, supports_, T(1), gw);
    if (gx == nullptr) return;
    add_through_weight(w, sum, supports_, T(1), gx, true, scratch);
    T* gram = at(b_.gram_gradient);
    GemmStart<T> start{T(1), nullptr, gx};
    const Matrix<T> to{gx, supports_, node_.in.ld, node_.in.ld};
    gemm<T>(supports_, supports_, gram, b_.gram_ld, 1, inputs(x_), to, start);
    gemm<T>(supports_, supports_, gram, 1, b_.gram_ld, inputs(x_), to, start);
    if (!with_queries) return;
    gemm<T>(supports_, queries_, at(b_.query_gram_gradient), 1, b_.gram_ld, inputs(query_x_), to,
            start);
  }

  // out (Matrix) = W_0 - A^T X
  void weights(const T* w, const T* a, T* out) const {
    GemmStart<T> start{T(-1), nullptr, w};
    gemm<T>(node_.in.channels, supports_, x_, 1, node_.in.ld, state(a),
            {out, node_.in.channels, padded<T>(node_.out.channels), 0}, start);
  }

  // From the cotangent (Matrix) of W_K: adds to a's, to W_0's gradient and, where given, to X's.
  void weights_backward(const T* a, const T* from, T* cotangent, T* gw, T* gx) const {
    const int64_t cols = padded<T>(node_.out.channels);
    const ConstMatrix<T> g{from, node_.in.channels, cols, 0};
    GemmStart<T> start{T(-1), nullptr, cotangent};
    gemm<T>(supports_, node_.in.channels, x_, node_.in.ld, 1, g, output(cotangent, supports_),
            start);
    for (int64_t i = 0; gw != nullptr && i < node_.in.channels * cols; ++i) gw[i] += from[i];
    if (gx != nullptr) {
      gemm_transposed_few<T>(supports_, a, node_.out.ld, g, gx, node_.in.ld, T(-1), true);
    }
  }

 private:
  T* at(int64_t place) const { return memory_ + place; }
  int64_t size_of(int64_t place) const {
    return supports_ * (place == b_.tangents ? node_.out.ld : b_.gram_ld);
  }
  ConstMatrix<T> weight(const T* w) const {
    return {w, node_.in.channels, padded<T>(node_.out.channels), 0};
  }
  ConstMatrix<T> state(const T* a) const { return {a, supports_, node_.out.ld, node_.out.ld}; }
  ConstMatrix<T> inputs(const T* x) const { return {x, supports_, node_.in.ld, node_.in.ld}; }
  Matrix<T> output(T* y, int64_t rows) const { return {y, rows, node_.out.ld, node_.out.ld}; }

  // gw += alpha * X^T gy
  void add_to_weight(const T* x, const T* gy, int64_t rows, T alpha, T* gw) const {
    const int64_t ld = node_.out.ld;
    GemmStart<T> start{alpha, nullptr, gw};
    gemm<T>(node_.in.channels, rows, x, 1, node_.in.ld, {gy, rows, ld, ld},
            {gw, node_.in.channels, padded<T>(node_.out.channels), 0}, start);
  }

  // gx (+)= alpha * gy W_0. scratch holds outputs * padded(inputs) numbers.
  void add_through_weight(const T* w, const T* gy, int64_t rows, T alpha, T* gx, bool add,
                          T* scratch) const {
    const int64_t outputs = node_.out.channels, ld = node_.in.ld;
    const Matrix<T> transposed{scratch, outputs, padded<T>(node_.in.channels), 0};
    transpose_to_panels<T>(weight(w), outputs, transposed);
    GemmStart<T> start;
    start.alpha = alpha;
    if (add) start.from = gx;
    gemm<T>(rows, outputs, gy, node_.out.ld, 1, {scratch, outputs, transposed.cols, 0},
            {gx, rows, ld, ld}, start);
  }

  const Node& node_;
  const FactoredBuffers<T>& b_;
  T* memory_;
  int64_t supports_, queries_;
  const T* x_ = nullptr;
  const T* query_x_ = nullptr;
};

}  // namespace fastmeta::engine::FASTMETA_ISA
