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
// Of few outputs W_K costs less than X_Q X^T (Factored::whole): the queries' layer is then the
// plain one, and its weight's gradient G = gy_Q^T X_Q gives a_K = -X G^T and X's share -A_K G.
//
// The engine's vectors of adapted parameters hold A where W would stand (Layout::kFactored), and
// their gradient -D, so that steps and rates treat it as any parameter. A and D lie as y does:
// where y is turned, [outputs, supports], the products above are those of the transposed matrices.
#pragma once
#include "engine/layers/product.h"

namespace fastmeta::engine::FASTMETA_ISA {

// Memory of one factored layer for one task, in numbers from its beginning.
template <class T>
struct FactoredBuffers {
  int64_t gram = -1;        // X X^T, [S, ld of S]
  int64_t query_gram = -1;  // X_Q X^T, [Q, ld of S]; X X_Q^T, [S, ld of Q], for turned y
  int64_t weight = -1, weight_gradient = -1;  // W_K and G, in the place of query_gram
  int64_t base = -1;                          // X W_0^T, as y
  int64_t tangents = -1;                      // sum over the steps of D', as y
  int64_t gram_gradient = -1, query_gram_gradient = -1;
  int64_t gram_ld = 0, query_gram_ld = 0;
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

  // X X^T and X W_0^T of a task. x, query_x: [rows, ld], the latter yet to be computed; w as
  // product.h has it.
  void begin(const T* x, const T* query_x, const T* w) {
    x_ = x;
    query_x_ = query_x;
    const int64_t ld = node_.in.ld, n = node_.in.channels;
    const ConstMatrix<T> rows{x, supports_, ld, ld};
    gemm_transposed<T, 1>(supports_, {{x, ld, rows, n}}, at(b_.gram), b_.gram_ld);
    product::to_output<T>(dims(supports_), {x, w}, {}, {}, at(b_.base));
    for (int64_t place : {b_.tangents, b_.gram_gradient}) {
      if (place >= 0) std::fill_n(at(place), size_of(place), T(0));
    }
  }

  // y = X W_0^T + b - (X X^T) A
  void forward(const T* a, const T* bias, T* y) const {
    const T* base = at(b_.base);
    if (bias != nullptr) each_bias(bias, [=](int64_t i, T b) { y[i] = base[i] + b; });
    subtract_product(a, bias != nullptr ? y : base, y);
  }

  // dy = -direction + db, the direction in A's place being -rate * a.
  void tangent(const T* direction, const T* db, T* dy) const {
    if (db != nullptr) return each_bias(db, [=](int64_t i, T b) { dy[i] = b - direction[i]; });
    for (int64_t i = 0; i < size(); ++i) dy[i] = -direction[i];
  }

  // What stands for A's gradient: -D.
  void gradient(const T* gy, T* g) const {
    for (int64_t i = 0; i < size(); ++i) g[i] = -gy[i];
  }

  // a's cotangent -= (X X^T) D'. A is that of this step.
  void product(const T* dgy, const T* a, T* out) const {
    subtract_product(dgy, out, out);
    T* sum = at(b_.tangents);
    for (int64_t i = 0; i < size(); ++i) sum[i] += dgy[i];
    if (b_.gram_gradient >= 0) {
      take_products(supports_, dgy, a, at(b_.gram_gradient), true);
    }
  }

  void query_forward(const T* w, const T* a, const T* bias, T* y) const {
    const product::Dims<T> d = dims(queries_);
    if (b_.weight >= 0) {
      weights(w, a, at(b_.weight));
      w = at(b_.weight);
    }
    product::to_output<T>(d, {query_x_, w}, {}, {T(1), bias}, y);
    if (b_.weight >= 0) return;
    query_products();
    const GemmStart<T> start{T(-1), nullptr, y};
    if (turned()) {
      gemm<T>(d.outputs, supports_, a, dims(supports_).ldy, 1,
              {at(b_.query_gram), supports_, d.ldy, d.ldy}, {y, d.outputs, d.ldy, d.ldy}, start);
    } else {
      gemm<T>(queries_, supports_, at(b_.query_gram), b_.query_gram_ld, 1, state(a),
              {y, queries_, d.ldy, d.ldy}, start);
    }
  }

  // Adds to a's cotangent, to W_0's gradient (or writes it) and, where given, to the query's
  // cotangent. support_gx: X's cotangent, where wanted; finish() adds what is not added here.
  void query_backward(const T* w, const T* a, const T* gy, T* cotangent, T* gw, bool writes, T* gx,
                      bool add_gx, T* support_gx, T* scratch) {
    const product::Dims<T> d = dims(queries_);
    if (b_.weight >= 0) {
      T* gradient = at(b_.weight_gradient);
      add_to_weight(query_x_, gy, queries_, gradient, false);
      weights_backward(a, gradient, cotangent, gw, writes, support_gx, scratch);
      if (gx != nullptr) add_through_weight(at(b_.weight), gy, queries_, gx, add_gx, scratch);
      return;
    }
    GemmStart<T> start{T(-1), nullptr, cotangent};
    if (turned()) {
      const ConstMatrix<T> gram{at(b_.query_gram), supports_, b_.query_gram_ld, b_.query_gram_ld};
      gemm_transposed<T, 1>(d.outputs, {{gy, d.ldy, gram, queries_}}, cotangent,
                            dims(supports_).ldy, start);
    } else {
      gemm<T>(supports_, queries_, at(b_.query_gram), 1, b_.query_gram_ld,
              {gy, queries_, d.ldy, d.ldy}, output(cotangent), start);
    }
    add_to_weight(query_x_, gy, queries_, gw, !writes);
    if (b_.query_gram_gradient >= 0) {
      take_products(queries_, gy, a, at(b_.query_gram_gradient), false);
    }
    if (gx == nullptr) return;
    add_through_weight(w, gy, queries_, gx, add_gx, scratch);
    start = {T(1), nullptr, gx};
    gemm<T>(queries_, supports_, at(b_.query_gram_gradient), b_.gram_ld, 1, inputs(x_),
            {gx, queries_, node_.in.ld, node_.in.ld}, start);
  }

  // After the sweep: the supports' share of W_0's gradient and, where given, X's cotangent, added.
  void finish(const T* w, bool with_queries, T* gw, T* gx, T* scratch) const {
    const T* sum = at(b_.tangents);
    if (gw != nullptr) add_to_weight(x_, sum, supports_, gw, true);
    if (gx == nullptr) return;
    add_through_weight(w, sum, supports_, gx, true, scratch);
    T* gram = at(b_.gram_gradient);
    const int64_t ld = b_.gram_ld;
    for (int64_t i = 0; i < supports_; ++i) {  // X stands on both sides of X X^T
      for (int64_t j = 0; j <= i; ++j) {
        gram[i * ld + j] = gram[j * ld + i] = gram[i * ld + j] + gram[j * ld + i];
      }
    }
    GemmStart<T> start{T(1), nullptr, gx};
    const Matrix<T> to{gx, supports_, node_.in.ld, node_.in.ld};
    gemm<T>(supports_, supports_, gram, ld, 1, inputs(x_), to, start);
    if (!with_queries || b_.weight >= 0) return;
    gemm<T>(supports_, queries_, at(b_.query_gram_gradient), 1, b_.gram_ld,
            {query_x_, queries_, node_.in.ld, node_.in.ld}, to, start);
  }

  // out = W_0 - A^T X
  void weights(const T* w, const T* a, T* out) const {
    product::to_weights<T, 1>(dims(supports_), {{x_, a}}, {T(-1), nullptr, w}, out);
  }

  // From the cotangent of W_K: adds to a's, to W_0's gradient (or writes it) and, where given, to
  // X's. scratch holds outputs * padded(inputs) numbers.
  void weights_backward(const T* a, const T* from, T* cotangent, T* gw, bool writes, T* gx,
                        T* scratch) const {
    const product::Dims<T> d = dims(supports_);
    product::to_output<T>(d, {x_, from}, {}, {T(-1), nullptr, cotangent}, cotangent);
    if (gw != nullptr) {
      const int64_t size = d.narrow ? d.outputs * d.input_cols : d.inputs * d.ldy;
      for (int64_t i = 0; i < size; ++i) gw[i] = writes ? from[i] : gw[i] + from[i];
    }
    if (gx == nullptr) return;
    product::to_input<T, 1>(d, {{a, product::weights_of(d, from, scratch)}}, gx, true, T(-1));
  }

 private:
  T* at(int64_t place) const { return memory_ + place; }
  bool turned() const { return node_.out.lanes > 0; }
  int64_t size() const { return node_.out.size(supports_); }  // of A, and of y of the supports
  int64_t size_of(int64_t place) const {
    return place == b_.tangents ? size() : supports_ * b_.gram_ld;
  }
  product::Dims<T> dims(int64_t rows) const { return product::Dims<T>(node_, rows); }
  // A, or y of the supports, as it lies.
  template <class P>
  Matrix<P> output(P* y) const {
    const product::Dims<T> d = dims(supports_);
    return {y, turned() ? d.outputs : supports_, d.ldy, d.ldy};
  }
  ConstMatrix<T> state(const T* a) const { return output(a); }
  ConstMatrix<T> inputs(const T* x) const { return {x, supports_, node_.in.ld, node_.in.ld}; }

  // X_Q X^T, after another product has brought X_Q near.
  void query_products() const {
    const int64_t ld = node_.in.ld, n = node_.in.channels;
    if (turned()) {
      gemm_transposed<T, 1>(supports_, {{x_, ld, {query_x_, queries_, ld, ld}, n}},
                            at(b_.query_gram), b_.query_gram_ld);
    } else {
      gemm_transposed<T, 1>(queries_, {{query_x_, ld, {x_, supports_, ld, ld}, n}},
                            at(b_.query_gram), b_.query_gram_ld);
    }
  }

  // f(i, the bias of number i) for the numbers of y of the supports.
  template <class F>
  void each_bias(const T* bias, F f) const {
    const Matrix<const T> y = state(nullptr);
    for (int64_t r = 0; r < y.rows; ++r) {
      for (int64_t c = 0; c < y.cols; ++c) f(r * y.ld + c, bias[turned() ? r : c]);
    }
  }

  // out = from - (X X^T) a
  void subtract_product(const T* a, const T* from, T* out) const {
    const GemmStart<T> start{T(-1), nullptr, from};
    const ConstMatrix<T> gram{at(b_.gram), supports_, b_.gram_ld, b_.gram_ld}, of = state(a);
    if (turned()) {
      gemm<T>(of.rows, supports_, a, of.ld, 1, gram, output(out), start);
    } else {
      gemm<T>(supports_, supports_, gram.data, gram.ld, 1, of, output(out), start);
    }
  }

  // out = (out) - gy A^T: what is gained for a Gram matrix from its products with A.
  void take_products(int64_t rows, const T* gy, const T* a, T* out, bool add) const {
    const GemmStart<T> start{T(-1), nullptr, add ? out : nullptr};
    const product::Dims<T> d = dims(rows);
    if (turned()) {
      gemm<T>(rows, d.outputs, gy, d.y_row(), d.y_col(), state(a),
              {out, rows, b_.gram_ld, b_.gram_ld}, start);
    } else {
      gemm_transposed<T, 1>(rows, {{gy, d.ldy, state(a), d.outputs}}, out, b_.gram_ld, start);
    }
  }

  // gw (+)= X^T gy
  void add_to_weight(const T* x, const T* gy, int64_t rows, T* gw, bool add) const {
    product::to_weights<T, 1>(dims(rows), {{x, gy}}, {T(1), nullptr, add ? gw : nullptr}, gw);
  }

  // gx (+)= gy W_0. scratch holds outputs * padded(inputs) numbers.
  void add_through_weight(const T* w, const T* gy, int64_t rows, T* gx, bool add,
                          T* scratch) const {
    const product::Dims<T> d = dims(rows);
    product::to_input<T, 1>(d, {{gy, product::weights_of(d, w, scratch)}}, gx, add);
  }

  const Node& node_;
  const FactoredBuffers<T>& b_;
  T* memory_;
  int64_t supports_, queries_;
  const T* x_ = nullptr;
  const T* query_x_ = nullptr;
};

}  // namespace fastmeta::engine::FASTMETA_ISA
