// One task through a program: passes over its supports and queries, in one thread's memory.
#pragma once
#include "common/scratch.h"
#include "engine/calls.h"
#include "engine/layers/losses.h"
#include "engine/layout.h"

namespace fastmeta::engine::FASTMETA_ISA {

template <class T>
class Task {
 public:
  Task(const Common<T>& common, T* memory)
      : c_(common), b_(common.buffers), memory_{memory}, calls_(common, memory_) {
    factored_at_.assign(values(), -1);
    for (size_t i = 0; i < c_.plan.factored.size(); ++i) {
      const Node& n = c_.plan.nodes[c_.plan.factored[i].value - 1];
      factored_.emplace_back(n, c_.args, b_.factored[i], memory);
      factored_at_[c_.plan.factored[i].value] = static_cast<int>(i);
    }
    updates_itself_.assign(c_.plan.fast.params.size(), false);
    for (int v = 1; v < values() && !c_.args.rate_each_number(); ++v) {
      const Node& n = c_.plan.nodes[v - 1];
      if (n.kind != Kind::kLinear || factored_at_[v] >= 0 || !c_.plan.live[v]) continue;
      for (const ParamRef* ref : {&n.w, &n.b}) {
        if (*ref && ref->adapted && c_.plan.param(*ref).uses == 1) {
          updates_itself_[ref->index] = true;
        }
      }
    }
  }

  // Reads the task's inputs and runs what no step changes. The inputs' gradients, where wanted, are
  // those of all tasks.
  void begin(int64_t task, T* support_gradient, T* query_gradient) {
    task_ = task;
    const Shape& in = c_.plan.shapes[0];
    const int64_t row = in.channels * in.pixels();
    const Adapt& a = c_.args;
    const auto of_task = [&](const void* all, int64_t rows) -> T* {
      if (all == nullptr) return nullptr;
      return const_cast<T*>(static_cast<const T*>(all)) + task * rows * row;  // x is read alone
    };
    T* const support_x = of_task(a.support_x, a.supports);
    T* const query_x = of_task(a.query_x, a.queries);
    if (Buffers<T>::lies_alike(in)) {
      memory_.outside[Buffers<T>::kSupportX] = support_x;
      memory_.outside[Buffers<T>::kQueryX] = query_x;
      memory_.outside[Buffers<T>::kSupportGradient] = of_task(support_gradient, a.supports);
      memory_.outside[Buffers<T>::kQueryGradient] = of_task(query_gradient, a.queries);
      calls_.set_inputs();
    } else if (c_.plan.live[0]) {
      import_rows(in, a.supports, support_x, at(b_.support.y[0]));
      if (a.queries > 0) import_rows(in, a.queries, query_x, at(b_.query.y[0]));
    }
    if (c_.plan.program.loss.kind == LossKind::kCrossEntropy) {
      support_counted_ = prepare(a.support_y, a.supports, b_.support.labels);
      query_counted_ = prepare(a.query_y, a.queries, b_.query.labels);
    }
    const Moment<T> beginning{c_.theta, 0, 0, task};
    for (int v = 1; v < values(); ++v) {
      if (c_.plan.live[v] && c_.plan.is_static[v]) run_forward(calls_.support(v, beginning));
    }
    if (b_.support.turned_input >= 0) product::turn_input(calls_.support(values() - 1, beginning));
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

  // One step: next = theta - rate * the gradient of the support loss at theta.
  void descend(int64_t step, const T* theta, T* next) {
    support_pass(step, theta, next);
    const T* g = gradient();
    each_rate(step, [&](int64_t p, int64_t begin, int64_t end, const T* rates, T rate) {
      if (updates_itself_[p]) return;
      if (rates == nullptr) {
        for (int64_t i = begin; i < end; ++i) next[i] = theta[i] - rate * g[i];
      } else {
        for (int64_t i = begin; i < end; ++i) next[i] = theta[i] - rates[i] * g[i];
      }
    });
  }

  // Leaves the gradient of the support loss at theta in gradient().
  void support_gradient(int64_t step, const T* theta) { support_pass(step, theta, nullptr); }

  void query_forward(const T* theta) {
    for (int v = 1; v < values(); ++v) {
      if (!c_.plan.live[v]) continue;
      const LayerCall<T>& x = calls_.query(v, of_queries(theta));
      if (x.turned_x != nullptr) product::turn_input(x);
      if (const int f = factored_at_[v]; f >= 0) {
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
    LossCall<T> x = loss_call(b_.query, 0, c_.args.queries, c_.args.query_y);
    if (x.g == nullptr) return loss_value(x);
    const double loss = loss_and_gradient(x);
    for (int64_t i = 0; i < c_.plan.out().size(c_.args.queries); ++i) x.g[i] *= scale;
    return loss;
  }

  // From the prediction's cotangent: adds to the gradients of the factored layers' W_0 (or writes
  // them), to cotangent() and, where given, to the shared parameters' gradients.
  void query_backward(const T* theta, T* weight_gradient, T* shared_gradient, bool writes) {
    for (int v = values() - 1; v > 0; --v) {
      if (b_.query.gy[v] < 0) continue;
      LayerCall<T>& x = calls_.query(v, of_queries(theta));
      calls_.set_parameters(&x, cotangent(), shared_gradient, false);
      if (const int f = factored_at_[v]; f >= 0) {
        factored_[f].query_backward(weight(f), x.w, x.gy, x.gw,
                                    weight_gradient + c_.plan.factored[f].weight.offset, writes,
                                    x.gx, x.add_gx, support_cotangent(f), at(b_.scratch));
        add_bias_gradient(x.node, x.rows, x.gy, x.gb);
      } else {
        run_backward(x);
      }
    }
  }

  // One step of the sweep: cotangent() of theta_{k+1} becomes that of theta_k. Adds to the shared
  // parameters' gradients and to the rates' (one number each, or one for each parameter's number).
  //
  // The dual pass goes along -rate * cotangent, so that what it finds is what there is to add:
  // theta_{k+1}'s dependence on theta_k, and on the shared parameters, beyond the identity.
  void step_back(int64_t step, const T* theta, T* shared_gradient, T* rate_gradient) {
    T* lambda = cotangent();
    T* direction = at(b_.direction);
    each_rate(step, [&](int64_t, int64_t begin, int64_t end, const T* rates, T rate) {
      if (rates == nullptr) {
        for (int64_t i = begin; i < end; ++i) direction[i] = -rate * lambda[i];
      } else {
        for (int64_t i = begin; i < end; ++i) direction[i] = -rates[i] * lambda[i];
      }
    });
    T* later = nullptr;  // theta_{k+1}'s cotangent
    if (rate_gradient != nullptr) {
      later = at(b_.later);
      std::copy_n(lambda, c_.plan.fast.size, later);
      zero(gradient(), c_.plan.fast.size);
    }
    const Moment<T> moment = of_step(step, theta);
    const bool known = step >= c_.args.steps - b_.records;
    for (int v = 1; v < values(); ++v) {
      if (!c_.plan.live[v] || c_.plan.is_static[v]) continue;
      const LayerCall<T>& x = calls_.dual(v, moment, known);
      if (const int f = factored_at_[v]; f >= 0) {
        if (!known) factored_[f].forward(x.w, x.b, x.y);
        factored_[f].tangent(x.dw, x.db, x.dy);
      } else {
        run_dual_forward(x);
      }
    }
    support_loss(moment, true);
    for (int v = values() - 1; v > 0; --v) {
      if (!c_.plan.live[v] || c_.plan.is_static[v]) continue;
      LayerCall<T>& x = calls_.dual(v, moment, known);
      calls_.set_parameters(&x, rate_gradient != nullptr ? gradient() : nullptr, nullptr, false);
      calls_.set_parameters(&x, lambda, shared_gradient, true);
      if (const int f = factored_at_[v]; f >= 0) {
        if (x.gw != nullptr) factored_[f].gradient(x.gy, x.gw);
        factored_[f].product(x.dgy, x.w, x.dgw);
        add_bias_gradient(x.node, x.rows, x.gy, x.gb);
        add_bias_gradient(x.node, x.rows, x.dgy, x.dgb);
      } else {
        run_dual_backward(x);
      }
    }
    if (rate_gradient != nullptr) add_rate_gradient(step, later, rate_gradient);
  }

  // Without second order: the rates' gradients of this step.
  void rates_back(int64_t step, const T* theta, T* rate_gradient) {
    support_gradient(step, theta);
    add_rate_gradient(step, cotangent(), rate_gradient);
  }

  // After the sweep: from the cotangents that static values have gathered, back to the inputs.
  void finish(bool with_queries, T* weight_gradient, T* shared_gradient) {
    if (!c_.wants.second_order) return;
    for (size_t f = 0; f < factored_.size(); ++f) {
      factored_[f].finish(weight(f), with_queries,
                          weight_gradient + c_.plan.factored[f].weight.offset, support_cotangent(f),
                          at(b_.scratch));
    }
    const Moment<T> beginning{c_.theta, 0, 0, task_};
    for (int v = values() - 1; v > 0; --v) {
      if (!c_.plan.is_static[v] || b_.support.gy[v] < 0) continue;
      LayerCall<T>& x = calls_.support(v, beginning);
      x.gy = at(b_.support.gy[v]);
      const Node& n = c_.plan.nodes[v - 1];
      if (b_.support.gy[n.input] >= 0) x.gx = at(b_.support.gy[n.input]);
      if (n.input2 >= 0 && b_.support.gy[n.input2] >= 0) x.gx2 = at(b_.support.gy[n.input2]);
      x.add_gx = x.add_gx2 = true;
      calls_.set_parameters(&x, nullptr, shared_gradient, false);
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
      if (place < 0 || !c_.plan.live[0]) {
        zero(out, rows * row);
      } else if (place < Buffers<T>::kOutside) {
        export_rows(s, rows, at(place), out);
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
    const Param& w = c_.plan.factored[f].weight;
    factored_[f].weights_backward(theta + state_offset(f), at(b_.scratch),
                                  cotangent() + state_offset(f), weight_gradient + w.offset, false,
                                  support_cotangent(f), at(b_.scratch) + w.size);
  }

  T* gradient() const { return at(b_.gradient); }
  T* cotangent() const { return cotangent_; }
  // Where the cotangent of the adapted parameters is kept: there, or in the task's own memory.
  T* gather_in(T* place) { return cotangent_ = place != nullptr ? place : at(b_.cotangent); }
  T* trajectory() const { return at(b_.trajectory); }

  static void zero(T* p, int64_t n) { std::fill(p, p + n, T(0)); }

 private:
  using Pass = typename Buffers<T>::Pass;

  Moment<T> of_queries(const T* theta) const { return {theta, 0, -1, task_}; }
  Moment<T> of_step(int64_t step, const T* theta) const {
    return {theta, b_.records > 0 ? step % b_.records * b_.record : 0, step, task_};
  }

  // The gradient of the support loss at theta, in gradient(). Where `next` is given, layers whose
  // parameters nobody else reads turn theta into it there themselves.
  void support_pass(int64_t step, const T* theta, T* next) {
    const Moment<T> moment = of_step(step, theta);
    for (int v = 1; v < values(); ++v) {
      if (!c_.plan.live[v] || c_.plan.is_static[v]) continue;
      const LayerCall<T>& x = calls_.support(v, moment);
      if (const int f = factored_at_[v]; f >= 0) {
        factored_[f].forward(x.w, x.b, x.y);
      } else {
        run_forward(x);
      }
    }
    support_loss(moment, false);
    each_parameter([&](int64_t i, int64_t begin, int64_t end) {
      if (next == nullptr || !updates_itself_[i]) zero(gradient() + begin, end - begin);
    });
    for (int v = values() - 1; v > 0; --v) {
      if (!c_.plan.live[v] || c_.plan.is_static[v]) continue;
      LayerCall<T>& x = calls_.support(v, moment);
      calls_.set_parameters(&x, gradient(), nullptr, false);
      if (const int f = factored_at_[v]; f >= 0) {
        factored_[f].gradient(x.gy, x.gw);
        add_bias_gradient(x.node, x.rows, x.gy, x.gb);
        continue;
      }
      if (next != nullptr) {
        update_itself(x.node->w, step, theta, next, &x.gw, &x.w_update);
        update_itself(x.node->b, step, theta, next, &x.gb, &x.b_update);
      }
      run_backward(x);
    }
  }

  void update_itself(const ParamRef& ref, int64_t step, const T* theta, T* next, T** g,
                     typename LayerCall<T>::Update* update) const {
    if (!ref || !ref.adapted || !updates_itself_[ref.index]) return;
    const int64_t offset = c_.plan.param(ref).offset;
    *g = next + offset;
    update->from = theta + offset;
    update->factor = -rate_of(step, ref.index);
  }

  // That of a factored layer's input, where it is wanted.
  T* support_cotangent(size_t f) const {
    const int64_t place = b_.support.gy[c_.plan.nodes[c_.plan.factored[f].value - 1].input];
    return c_.wants.second_order && place >= 0 ? at(place) : nullptr;
  }
  const T* weight(size_t f) const { return c_.weights + c_.plan.factored[f].weight.offset; }
  int64_t state_offset(size_t f) const {
    return c_.plan.fast.params[c_.plan.factored[f].param].offset;
  }
  static void add_bias_gradient(const Node* n, int64_t rows, const T* gy, T* gb) {
    if (gb != nullptr) product::to_bias<T>(product::Dims<T>(*n, rows), gy, gb, T(1), gb);
  }

  int values() const { return static_cast<int>(c_.plan.shapes.size()); }
  T* at(int64_t place) const { return memory_.at(place); }
  void clear(int64_t place, int v) { zero(at(place), c_.args.supports * c_.plan.shapes[v].row()); }

  int64_t rate_row(int64_t step) const { return c_.args.rate_rows == 1 ? 0 : step; }

  T rate_of(int64_t step, int64_t parameter) const {
    const T* row = c_.rates + rate_row(step) * c_.plan.rate_width(c_.args);
    return row[c_.args.rate_cols == 1 ? 0 : parameter];
  }

  // f(parameter, begin, end) for the adapted parameters and the padding after each.
  template <class F>
  void each_parameter(F f) const {
    const auto& params = c_.plan.fast.params;
    for (size_t i = 0; i < params.size(); ++i) {
      const int64_t end = i + 1 < params.size() ? params[i + 1].offset : c_.plan.fast.size;
      f(static_cast<int64_t>(i), params[i].offset, end);
    }
  }

  // f(parameter, begin, end, rates or nullptr, rate); all at once where each number has its rate.
  template <class F>
  void each_rate(int64_t step, F f) const {
    if (c_.args.rate_each_number()) {
      const T* rates = c_.rates + rate_row(step) * c_.plan.rate_width(c_.args);
      f(int64_t{0}, int64_t{0}, c_.plan.fast.size, rates, T(0));
      return;
    }
    each_parameter([&](int64_t i, int64_t begin, int64_t end) {
      f(i, begin, end, nullptr, rate_of(step, i));
    });
  }

  // -gradient . cotangent of theta_{k+1}, at the rates' granularity.
  void add_rate_gradient(int64_t step, const T* lambda, T* out) const {
    const T* g = gradient();
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

  const T* class_weights() const {
    const ParamRef& weight = c_.plan.program.loss.weight;
    return weight ? c_.shared + c_.plan.param(weight).offset : nullptr;
  }

  double prepare(const void* labels, int64_t rows, int64_t place) const {
    if (labels == nullptr) return 0;
    const int64_t* own = static_cast<const int64_t*>(labels) + task_ * rows;
    return prepare_labels(c_.plan.program.loss, own, rows, class_weights(), at(place));
  }

  LossCall<T> loss_call(const Pass& p, int64_t record, int64_t rows, const void* target) const {
    const Loss& loss = c_.plan.program.loss;
    LossCall<T> x{};
    x.loss = &loss;
    x.shape = c_.plan.out();
    x.rows = rows;
    x.prediction = at(p.y.back() + record);
    if (loss.kind == LossKind::kCrossEntropy) {
      x.labels = at(p.labels);
      x.counted = &p == &b_.support ? support_counted_ : query_counted_;
    } else {
      x.targets =
          static_cast<const T*>(target) + task_ * rows * x.shape.channels * x.shape.pixels();
    }
    x.weight = class_weights();
    if (p.gy.back() >= 0) x.g = at(p.gy.back() + record);
    return x;
  }

  void support_loss(const Moment<T>& moment, bool dual) {
    LossCall<T> x = loss_call(b_.support, moment.record, c_.args.supports, c_.args.support_y);
    if (!dual) {
      loss_gradient(x);
      return;
    }
    x.dprediction = at(b_.support.dy.back());
    x.dg = at(b_.support.dgy.back());
    loss_dual(x);
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
  Memory<T> memory_;
  Calls<T> calls_;
  T* cotangent_ = nullptr;
  std::vector<FactoredLayer<T>> factored_;
  std::vector<int> factored_at_;      // of each value: which of factored_ makes it, -1 if none
  std::vector<bool> updates_itself_;  // of each adapted parameter (support_pass)
  int64_t task_ = 0;
  double support_counted_ = 0, query_counted_ = 0;  // of prepare_labels
};

}  // namespace fastmeta::engine::FASTMETA_ISA
