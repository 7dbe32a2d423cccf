// One task through a program: passes over its supports and queries, in one thread's memory.
#pragma once
#include "common/scratch.h"
#include "engine/buffers.h"
#include "engine/layers/losses.h"

namespace fastmeta::engine::FASTMETA_ISA {

// What all tasks of a call share, in the engine's layout.
template <class T>
struct Common {
  const Adapt& args;
  const Plan<T>& plan;
  const Wants& wants;
  const Buffers<T>& buffers;
  const T* theta;    // theta_0
  const T* weights;  // W_0 of the factored layers
  const T* shared;   // shared parameters
  const T* rates;    // [rate_rows, 1 or num_fast or fast.size]
};

template <class T>
class Task {
 public:
  Task(const Common<T>& common, T* memory) : c_(common), b_(common.buffers), memory_(memory) {
    for (size_t i = 0; i < c_.plan.factored.size(); ++i) {
      const Node& n = c_.plan.nodes[c_.plan.factored[i].value - 1];
      factored_.emplace_back(n, c_.args, b_.factored[i], memory);
    }
  }

  // Reads the task's inputs and runs what no step changes.
  void begin(int64_t task) {
    task_ = task;
    const Shape& in = c_.plan.shapes[0];
    const int64_t row = in.channels * in.pixels();
    const Adapt& a = c_.args;
    if (c_.plan.live[0]) {
      import_rows(in, a.supports, static_cast<const T*>(a.support_x) + task * a.supports * row,
                  at(b_.support.y[0]));
      if (a.queries > 0) {
        import_rows(in, a.queries, static_cast<const T*>(a.query_x) + task * a.queries * row,
                    at(b_.query.y[0]));
      }
    }
    pass_ = 0;
    for (int v = 1; v < values(); ++v) {
      if (c_.plan.live[v] && c_.plan.is_static[v]) run_forward(call(v, false, c_.theta));
    }
    // Whatever a factored layer reads in the queries is static as well.
    pass_ = -1;
    for (int v = 1; !factored_.empty() && a.queries > 0 && v < values(); ++v) {
      if (c_.plan.live[v] && c_.plan.is_static[v]) run_forward(call(v, true, c_.theta));
    }
    for (size_t i = 0; i < factored_.size(); ++i) {
      const int u = c_.plan.nodes[c_.plan.factored[i].value - 1].input;
      factored_[i].begin(at(b_.support.y[u]), at(b_.query.y[u]), weight(i));
    }
    if (c_.wants.second_order) {
      for (int v = 0; v < values(); ++v) {
        if (c_.plan.is_static[v] && b_.support.gy[v] >= 0) clear(b_.support.gy[v], v);
      }
    }
  }

  // Leaves the gradient of the support loss at theta in gradient().
  void support_gradient(int64_t step, const T* theta) {
    pass_ = step;
    record_ = b_.records > 0 ? step % b_.records * b_.record : 0;
    support_forward(theta);
    support_loss(false);
    zero(gradient(), c_.plan.fast.size);
    for (int v = values() - 1; v > 0; --v) {
      if (!c_.plan.live[v] || c_.plan.is_static[v]) continue;
      LayerCall<T> x = call(v, false, theta);
      set_inputs(x, v, b_.support, false);
      set_parameters(x, v, gradient(), nullptr, false);
      if (const int f = factored_index(v); f >= 0) {
        factored_[f].gradient(x.gy, x.gw);
        add_bias_gradient(x.node, x.rows, x.gy, x.gb);
      } else {
        run_backward(x);
      }
    }
  }

  // next = theta - rate * gradient()
  void update(int64_t step, const T* theta, T* next) const {
    const T* g = gradient();
    each_rate(step, [&](int64_t, int64_t begin, int64_t end, const T* rates, T rate) {
      if (rates == nullptr) {
        for (int64_t i = begin; i < end; ++i) next[i] = theta[i] - rate * g[i];
      } else {
        for (int64_t i = begin; i < end; ++i) next[i] = theta[i] - rates[i] * g[i];
      }
    });
  }

  void query_forward(const T* theta) {
    pass_ = -1;
    for (int v = 1; v < values(); ++v) {
      if (!c_.plan.live[v] || (!factored_.empty() && c_.plan.is_static[v])) continue;
      const LayerCall<T> x = call(v, true, theta);
      if (const int f = factored_index(v); f >= 0) {
        factored_[f].query_forward(weight(f), x.w, x.b, x.y);
      } else {
        run_forward(x);
      }
    }
  }

  void export_prediction(T* out) const {
    const Shape& s = c_.plan.out();
    const int64_t row = s.channels * s.pixels();
    export_rows(s, c_.args.queries, at(b_.query.y.back()), out + task_ * c_.args.queries * row);
  }

  void import_prediction_gradient(const T* from) {
    const Shape& s = c_.plan.out();
    const int64_t row = s.channels * s.pixels();
    import_rows(s, c_.args.queries, from + task_ * c_.args.queries * row, at(b_.query.gy.back()));
  }

  // The query loss; its gradient, times scale, goes to the prediction's cotangent if that is there.
  double query_loss(T scale) {
    LossCall<T> x = loss_call(b_.query, c_.args.queries, c_.args.query_y);
    if (x.g == nullptr) return loss_value(x);
    const double loss = loss_gradient(x);
    for (int64_t i = 0; i < c_.args.queries * c_.plan.out().row(); ++i) x.g[i] *= scale;
    return loss;
  }

  // From the prediction's cotangent: adds to the gradients of the factored layers' W_0, to
  // cotangent() and, where given, to the shared parameters' gradients.
  void query_backward(const T* theta, T* weight_gradient, T* shared_gradient) {
    for (int v = values() - 1; v > 0; --v) {
      if (b_.query.gy[v] < 0) continue;
      LayerCall<T> x = call(v, true, theta);
      set_inputs(x, v, b_.query, false);
      set_parameters(x, v, cotangent(), shared_gradient, false);
      if (const int f = factored_index(v); f >= 0) {
        factored_[f].query_backward(weight(f), x.w, x.gy, x.gw,
                                    weight_gradient + c_.plan.factored[f].weight.offset, x.gx,
                                    x.add_gx, at(b_.scratch));
        add_bias_gradient(x.node, x.rows, x.gy, x.gb);
      } else {
        run_backward(x);
      }
    }
  }

  // One step of the sweep: cotangent() of theta_{k+1} becomes that of theta_k. Adds to the shared
  // parameters' gradients and to the rates' (one number each, or one for each parameter's number).
  void step_back(int64_t step, const T* theta, T* shared_gradient, T* rate_gradient) {
    T* v_direction = at(b_.direction);
    T* lambda = cotangent();
    each_rate(step, [&](int64_t, int64_t begin, int64_t end, const T* rates, T rate) {
      for (int64_t i = begin; i < end; ++i) {
        v_direction[i] = (rates == nullptr ? rate : rates[i]) * lambda[i];
      }
    });
    pass_ = step;
    record_ = b_.records > 0 ? step % b_.records * b_.record : 0;
    const bool known = step >= c_.args.steps - b_.records;
    for (int v = 1; v < values(); ++v) {
      if (!c_.plan.live[v] || c_.plan.is_static[v]) continue;
      LayerCall<T> x = call(v, false, theta);
      x.known = known;
      set_tangents(&x, v);
      if (const int f = factored_index(v); f >= 0) {
        if (!known) factored_[f].forward(x.w, x.b, x.y);
        factored_[f].tangent(x.dw, x.db, x.dy);
      } else {
        run_dual_forward(x);
      }
    }
    support_loss(true);
    T* hv = at(b_.product);
    T* mixed = at(b_.shared_product);
    zero(hv, c_.plan.fast.size);
    zero(mixed, c_.plan.shared.size);
    if (rate_gradient != nullptr) zero(gradient(), c_.plan.fast.size);
    for (int v = values() - 1; v > 0; --v) {
      if (!c_.plan.live[v] || c_.plan.is_static[v]) continue;
      LayerCall<T> x = call(v, false, theta);
      x.known = known;
      set_tangents(&x, v);
      set_inputs(x, v, b_.support, true);
      set_parameters(x, v, rate_gradient != nullptr ? gradient() : nullptr, nullptr, false);
      set_parameters(x, v, hv, mixed, true);
      if (const int f = factored_index(v); f >= 0) {
        if (x.gw != nullptr) factored_[f].gradient(x.gy, x.gw);
        factored_[f].product(x.dgy, x.w, x.dgw);
        add_bias_gradient(x.node, x.rows, x.gy, x.gb);
        add_bias_gradient(x.node, x.rows, x.dgy, x.dgb);
      } else {
        run_dual_backward(x);
      }
    }
    if (rate_gradient != nullptr) add_rate_gradient(step, rate_gradient);
    for (int64_t i = 0; i < c_.plan.fast.size; ++i) lambda[i] -= hv[i];
    if (shared_gradient != nullptr) {
      for (int64_t i = 0; i < c_.plan.shared.size; ++i) shared_gradient[i] -= mixed[i];
    }
  }

  // -gradient . cotangent of this step, at the rates' granularity.
  void add_rate_gradient(int64_t step, T* out) const {
    const T* g = gradient();
    const T* lambda = at(b_.cotangent);
    const int64_t width = c_.plan.rate_width(c_.args);
    T* row = out + rate_row(step) * width;
    each_rate(step, [&](int64_t index, int64_t begin, int64_t end, const T* rates, T) {
      if (rates != nullptr) {
        for (int64_t i = begin; i < end; ++i) row[i] -= g[i] * lambda[i];
        return;
      }
      Vec<T> sum[2] = {};  // parameters are padded to whole cache lines
      constexpr int kW = kWidth<T>;
      for (int64_t i = begin; i < end; i += 2 * kW) {
        sum[0] += load(g + i) * load(lambda + i);
        if (i + kW < end) sum[1] += load(g + i + kW) * load(lambda + i + kW);
      }
      row[width == 1 ? 0 : index] -= hsum<T>(sum[0] + sum[1]);
    });
  }

  // After the sweep: from the cotangents that static values have gathered, back to the inputs.
  void finish(bool with_queries, T* weight_gradient, T* shared_gradient) {
    if (!c_.wants.second_order) return;
    for (int v = 0; v < values(); ++v) {
      if (!c_.plan.is_static[v] || b_.support.gy[v] < 0) continue;
      T* g = at(b_.support.gy[v]);
      const int64_t size = c_.args.supports * c_.plan.shapes[v].row();
      for (int64_t i = 0; i < size; ++i) g[i] = -g[i];
    }
    for (size_t f = 0; f < factored_.size(); ++f) {
      const int u = c_.plan.nodes[c_.plan.factored[f].value - 1].input;
      factored_[f].finish(weight(f), with_queries,
                          weight_gradient + c_.plan.factored[f].weight.offset,
                          b_.support.gy[u] >= 0 ? at(b_.support.gy[u]) : nullptr, at(b_.scratch));
    }
    pass_ = 0;
    for (int v = values() - 1; v > 0; --v) {
      if (!c_.plan.is_static[v] || b_.support.gy[v] < 0) continue;
      LayerCall<T> x = call(v, false, c_.theta);
      x.gy = at(b_.support.gy[v]);
      const Node& n = c_.plan.nodes[v - 1];
      if (b_.support.gy[n.input] >= 0) x.gx = at(b_.support.gy[n.input]);
      if (n.input2 >= 0 && b_.support.gy[n.input2] >= 0) x.gx2 = at(b_.support.gy[n.input2]);
      x.add_gx = x.add_gx2 = true;
      set_parameters(x, v, nullptr, shared_gradient, false);
      run_backward(x);
    }
  }

  // Zeros where nothing came back (from_queries: whether the queries' cotangents were formed).
  void export_input_gradients(T* support_x, T* query_x, bool from_queries) const {
    const Shape& s = c_.plan.shapes[0];
    const int64_t row = s.channels * s.pixels();
    const Adapt& a = c_.args;
    const auto write = [&](int64_t place, int64_t rows, T* out) {
      if (out == nullptr) return;
      out += task_ * rows * row;
      if (place >= 0 && c_.plan.live[0]) {
        export_rows(s, rows, at(place), out);
      } else {
        zero(out, rows * row);
      }
    };
    const bool static_input = c_.wants.second_order && c_.plan.is_static[0];
    write(static_input ? b_.support.gy[0] : -1, a.supports, support_x);
    write(from_queries ? b_.query.gy[0] : -1, a.queries, query_x);
  }

  // The whole weight of a factored layer from its state, as a Matrix in scratch memory.
  const T* whole_weight(int f, const T* theta) {
    factored_[f].weights(weight(f), theta + state_offset(f), at(b_.scratch));
    return at(b_.scratch);
  }

  // From the cotangent of a factored layer's whole weight, import(scratch) writes it there.
  template <class F>
  void whole_weight_backward(int f, const T* theta, T* weight_gradient, F import) {
    import(at(b_.scratch));
    const int u = c_.plan.nodes[c_.plan.factored[f].value - 1].input;
    const bool x = c_.wants.second_order && b_.support.gy[u] >= 0;
    // What static values gather is subtracted in the end.
    T* gx = x ? at(b_.support.gy[u]) : nullptr;
    const int64_t size = c_.args.supports * c_.plan.shapes[u].row();
    for (int64_t i = 0; x && i < size; ++i) gx[i] = -gx[i];
    factored_[f].weights_backward(theta + state_offset(f), at(b_.scratch),
                                  cotangent() + state_offset(f),
                                  weight_gradient + c_.plan.factored[f].weight.offset, gx);
    for (int64_t i = 0; x && i < size; ++i) gx[i] = -gx[i];
  }

  T* gradient() const { return at(b_.gradient); }
  T* cotangent() const { return at(b_.cotangent); }
  T* trajectory() const { return at(b_.trajectory); }

  static void zero(T* p, int64_t n) { std::fill(p, p + n, T(0)); }

 private:
  using Pass = typename Buffers<T>::Pass;

  int factored_index(int v) const {
    for (size_t i = 0; i < c_.plan.factored.size(); ++i) {
      if (c_.plan.factored[i].value == v) return static_cast<int>(i);
    }
    return -1;
  }
  const T* weight(size_t f) const { return c_.weights + c_.plan.factored[f].weight.offset; }
  int64_t state_offset(size_t f) const {
    return c_.plan.fast.params[c_.plan.factored[f].param].offset;
  }
  static void add_bias_gradient(const Node* n, int64_t rows, const T* gy, T* gb) {
    if (gb != nullptr) add_column_sums(rows, gy, n->out.ld, n->out.ld, gb);
  }

  int values() const { return static_cast<int>(c_.plan.shapes.size()); }
  T* at(int64_t place) const { return memory_ + place; }
  // Of a value; in the pass over the supports, in the record of the step at hand.
  T* at(const Pass& p, const std::vector<int64_t>& places, int v) const {
    return at(places[v] + (&p == &b_.support && !c_.plan.is_static[v] ? record_ : 0));
  }
  void clear(int64_t place, int v) { zero(at(place), c_.args.supports * c_.plan.shapes[v].row()); }

  int64_t rate_row(int64_t step) const { return c_.args.rate_rows == 1 ? 0 : step; }

  // f(parameter, begin, end, rates or nullptr, rate) for ranges of the adapted parameters.
  template <class F>
  void each_rate(int64_t step, F f) const {
    const T* row = c_.rates + rate_row(step) * c_.plan.rate_width(c_.args);
    const int64_t size = c_.plan.fast.size;
    if (c_.args.rate_each_number()) {
      f(int64_t{0}, int64_t{0}, size, row, T(0));
    } else if (c_.args.rate_cols == 1) {
      f(int64_t{0}, int64_t{0}, size, nullptr, row[0]);
    } else {
      for (int64_t i = 0; i < c_.args.num_fast; ++i) {
        const int64_t end = i + 1 < c_.args.num_fast ? c_.plan.fast.params[i + 1].offset : size;
        f(i, c_.plan.fast.params[i].offset, end, nullptr, row[i]);
      }
    }
  }

  LossCall<T> loss_call(const Pass& p, int64_t rows, const void* target) const {
    const Loss& loss = c_.plan.program.loss;
    LossCall<T> x{};
    x.loss = &loss;
    x.shape = c_.plan.out();
    x.rows = rows;
    x.prediction = at(p, p.y, values() - 1);
    if (loss.kind == LossKind::kCrossEntropy) {
      x.labels = static_cast<const int64_t*>(target) + task_ * rows;
    } else {
      x.targets =
          static_cast<const T*>(target) + task_ * rows * x.shape.channels * x.shape.pixels();
    }
    if (loss.weight) x.weight = c_.shared + c_.plan.param(loss.weight).offset;
    if (p.gy.back() >= 0) x.g = at(p, p.gy, values() - 1);
    return x;
  }

  void support_forward(const T* theta) {
    for (int v = 1; v < values(); ++v) {
      if (!c_.plan.live[v] || c_.plan.is_static[v]) continue;
      const LayerCall<T> x = call(v, false, theta);
      if (const int f = factored_index(v); f >= 0) {
        factored_[f].forward(x.w, x.b, x.y);
      } else {
        run_forward(x);
      }
    }
  }

  void support_loss(bool dual) {
    LossCall<T> x = loss_call(b_.support, c_.args.supports, c_.args.support_y);
    if (!dual) {
      loss_gradient(x);
      return;
    }
    x.dprediction = at(b_.support.dy.back());
    x.dg = at(b_.support.dgy.back());
    loss_dual(x);
  }

  LayerCall<T> call(int v, bool query, const T* theta) const {
    const Node& n = c_.plan.nodes[v - 1];
    const Pass& p = query ? b_.query : b_.support;
    LayerCall<T> x;
    x.node = &n;
    x.rows = query ? c_.args.queries : c_.args.supports;
    x.x = at(p, p.y, n.input);
    if (n.input2 >= 0) x.x2 = at(p, p.y, n.input2);
    x.y = at(p, p.y, v);
    const auto value = [&](const ParamRef& ref) -> const T* {
      if (!ref) return nullptr;
      return (ref.adapted ? theta : c_.shared) + c_.plan.param(ref).offset;
    };
    x.w = value(n.w);
    x.b = value(n.b);
    x.mean = value(n.mean);
    x.var = value(n.var);
    if (p.saved[v] >= 0) x.saved = at(p, p.saved, v);
    x.places = p.places[v].get();
    x.scratch = at(b_.scratch);
    x.seed = c_.args.seed;
    x.pass = query ? -1 : pass_;
    x.task = task_;
    return x;
  }

  void set_tangents(LayerCall<T>* x, int v) const {
    const Node& n = *x->node;
    const Pass& p = b_.support;
    if (p.dy[n.input] >= 0) x->dx = at(p.dy[n.input]);
    if (n.input2 >= 0 && p.dy[n.input2] >= 0) x->dx2 = at(p.dy[n.input2]);
    x->dy = at(p.dy[v]);
    const T* direction = at(b_.direction);
    if (n.w && n.w.adapted) x->dw = direction + c_.plan.param(n.w).offset;
    if (n.b && n.b.adapted) x->db = direction + c_.plan.param(n.b).offset;
  }

  // Cotangents of the value and of the node's inputs. Where the last reader in order comes first,
  // it writes and the others add.
  void set_inputs(LayerCall<T>& x, int v, const Pass& p, bool dual) const {
    const Node& n = *x.node;
    x.gy = at(p, p.gy, v);
    if (dual) x.dgy = at(p.dgy[v]);
    const auto input = [&](int u, T** gx, T** dgx, bool* add) {
      const bool gathers = &p == &b_.support && c_.plan.is_static[u];
      if (gathers) {  // over the steps, and the part that is a tangent alone
        if (dual && p.gy[u] >= 0) *dgx = at(p.gy[u]);
        *add = true;
        return;
      }
      if (p.gy[u] >= 0 && !x.known) *gx = at(p, p.gy, u);
      if (dual && p.dgy[u] >= 0) *dgx = at(p.dgy[u]);
      *add = c_.plan.last_use[u] != v;
    };
    input(n.input, &x.gx, &x.dgx, &x.add_gx);
    if (n.input2 >= 0) {
      input(n.input2, &x.gx2, &x.dgx2, &x.add_gx2);
      if (n.input2 == n.input) x.add_gx2 = true;
    }
  }

  void set_parameters(LayerCall<T>& x, int, T* fast, T* shared, bool dual) const {
    const auto place = [&](const ParamRef& ref) -> T* {
      if (!ref) return nullptr;
      if (ref.adapted) return fast == nullptr ? nullptr : fast + c_.plan.param(ref).offset;
      return shared == nullptr || !c_.wants.shared ? nullptr : shared + c_.plan.param(ref).offset;
    };
    (dual ? x.dgw : x.gw) = place(x.node->w);
    (dual ? x.dgb : x.gb) = place(x.node->b);
  }

  static bool is_product(const LayerCall<T>& x) {
    return x.node->kind == Kind::kLinear || x.node->kind == Kind::kConv2d;
  }
  static void run_forward(const LayerCall<T>& x) {
    is_product(x) ? product::forward(x) : layers::forward(x);
  }
  static void run_backward(const LayerCall<T>& x) {
    is_product(x) ? product::backward(x) : layers::backward(x);
  }
  static void run_dual_forward(const LayerCall<T>& x) {
    is_product(x) ? product::dual_forward(x) : layers::dual_forward(x);
  }
  static void run_dual_backward(const LayerCall<T>& x) {
    is_product(x) ? product::dual_backward(x) : layers::dual_backward(x);
  }

  const Common<T>& c_;
  const Buffers<T>& b_;
  T* memory_;
  std::vector<FactoredLayer<T>> factored_;
  int64_t task_ = 0, pass_ = 0, record_ = 0;
};

}  // namespace fastmeta::engine::FASTMETA_ISA
