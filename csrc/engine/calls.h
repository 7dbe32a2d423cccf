// The calls of a program's layers in one thread's memory, prepared once for all tasks and steps.
#pragma once
#include <vector>

#include "engine/buffers.h"

namespace fastmeta::engine::FASTMETA_ISA {

// What all tasks of a call share, in the engine's layout.
template <class T>
struct Common {
  const Adapt& args;
  const Plan& plan;
  const Wants& wants;
  const Buffers<T>& buffers;
  const T* theta;    // theta_0
  const T* weights;  // W_0 of the factored layers
  const T* shared;   // shared parameters
  const T* rates;    // [rate_rows, 1 or num_fast or fast.size]
};

// What calls of the same layer differ by: the adapted parameters, how far the step's record
// (buffers.h) is from the first one, and the identity of the pass.
template <class T>
struct Moment {
  const T* theta;
  int64_t record = 0;
  int64_t pass = 0, task = 0;
};

template <class T>
class Calls {
 public:
  Calls(const Common<T>& common, const Memory<T>& memory)
      : c_(common), b_(common.buffers), memory_(memory) {
    const size_t nodes = c_.plan.nodes.size();
    support_.resize(nodes);
    query_.resize(nodes);
    if (c_.wants.second_order) dual_.resize(nodes);
    for (int v = 1; v <= static_cast<int>(nodes); ++v) prepare_all(v);
  }

  // The input lies elsewhere.
  void set_inputs() {
    for (int v = 1; v <= static_cast<int>(c_.plan.nodes.size()); ++v) {
      const Node& n = c_.plan.nodes[v - 1];
      if (n.input == 0 || n.input2 == 0) prepare_all(v);
    }
  }

  // Each call is one object that is brought up to date: what it refers to holds until the next.

  // Of the pass over the supports, forward and backward; the values' cotangents are set.
  LayerCall<T>& support(int v, const Moment<T>& at) { return update(support_[v - 1], at); }
  LayerCall<T>& query(int v, const Moment<T>& at) { return update(query_[v - 1], at); }

  // Of the dual pass; known: the record has the primal values.
  LayerCall<T>& dual(int v, const Moment<T>& at, bool known) {
    Prepared& p = dual_[v - 1];
    LayerCall<T>& x = update(p, at);
    x.known = known;
    x.gx = known ? nullptr : p.gx;
    x.gx2 = known ? nullptr : p.gx2;
    return x;
  }

  // Parameter gradients, or their tangents, in vectors of the adapted and the shared parameters.
  void set_parameters(LayerCall<T>* x, T* fast, T* shared, bool dual) const {
    const auto place = [&](const ParamRef& ref) -> T* {
      if (!ref) return nullptr;
      if (ref.adapted) return fast == nullptr ? nullptr : fast + c_.plan.param(ref).offset;
      return shared == nullptr || !c_.wants.shared ? nullptr : shared + c_.plan.param(ref).offset;
    };
    (dual ? x->dgw : x->gw) = place(x->node->w);
    (dual ? x->dgb : x->gb) = place(x->node->b);
    x->w_update = x->b_update = {};
  }

 private:
  using Pass = typename Buffers<T>::Pass;

  struct Prepared {
    LayerCall<T> call;
    bool moves = false, input_moves = false, input2_moves = false;  // with the record
    int64_t w = -1, b = -1, mean = -1, var = -1;  // of the adapted parameters, in theta
    int64_t record = 0;                           // that it is at
    T* gx = nullptr;                              // the call's, wanted or not
    T* gx2 = nullptr;
  };

  T* at(int64_t place) const { return place >= 0 ? memory_.at(place) : nullptr; }

  void prepare_all(int v) {
    if (!c_.plan.live[v]) return;
    prepare(b_.support, v, c_.args.supports, false, &support_[v - 1]);
    prepare(b_.query, v, c_.args.queries, false, &query_[v - 1]);
    if (c_.wants.second_order && !c_.plan.is_static[v]) {
      prepare(b_.support, v, c_.args.supports, true, &dual_[v - 1]);
    }
  }

  void prepare(const Pass& p, int v, int64_t rows, bool dual, Prepared* made) const {
    const Node& n = c_.plan.nodes[v - 1];
    const bool support = &p == &b_.support;
    *made = Prepared{};
    LayerCall<T>& x = made->call;
    x.node = &n;
    x.rows = rows;
    x.x = at(p.y[n.input]);
    if (n.input2 >= 0) x.x2 = at(p.y[n.input2]);
    x.y = at(p.y[v]);
    const auto value = [&](const ParamRef& ref, const T** fixed, int64_t* moving) {
      if (!ref) return;
      const int64_t offset = c_.plan.param(ref).offset;
      ref.adapted ? void(*moving = offset) : void(*fixed = c_.shared + offset);
    };
    value(n.w, &x.w, &made->w);
    value(n.b, &x.b, &made->b);
    value(n.mean, &x.mean, &made->mean);
    value(n.var, &x.var, &made->var);
    x.saved = at(p.saved[v]);
    x.places = p.places[v].get();
    if (v == static_cast<int>(c_.plan.nodes.size())) x.turned_x = at(p.turned_input);
    x.scratch = at(b_.scratch);
    x.seed = c_.args.seed;
    made->moves = support && !c_.plan.is_static[v];
    made->input_moves = support && !c_.plan.is_static[n.input];
    made->input2_moves = support && n.input2 >= 0 && !c_.plan.is_static[n.input2];
    if (dual) set_tangents(&x);
    if (!support || !c_.plan.is_static[v]) set_cotangents(&x, v, p, dual);
    made->gx = x.gx;
    made->gx2 = x.gx2;
  }

  void set_tangents(LayerCall<T>* x) const {
    const Node& n = *x->node;
    const Pass& p = b_.support;
    x->dx = at(p.dy[n.input]);
    if (n.input2 >= 0) x->dx2 = at(p.dy[n.input2]);
    const T* direction = at(b_.direction);
    if (n.w && n.w.adapted) x->dw = direction + c_.plan.param(n.w).offset;
    if (n.b && n.b.adapted) x->db = direction + c_.plan.param(n.b).offset;
  }

  // Cotangents of the value and of the node's inputs. Where the last reader in order comes first,
  // it writes and the others add.
  void set_cotangents(LayerCall<T>* x, int v, const Pass& p, bool dual) const {
    const Node& n = *x->node;
    x->gy = at(p.gy[v]);
    if (dual) {
      x->dy = at(p.dy[v]);
      x->dgy = at(p.dgy[v]);
    }
    const auto input = [&](int u, T** gx, T** dgx, bool* add) {
      const bool gathers = &p == &b_.support && c_.plan.is_static[u];
      if (gathers) {  // over the steps, and the part that is a tangent alone
        if (dual) *dgx = at(p.gy[u]);
        *add = true;
        return;
      }
      *gx = at(p.gy[u]);
      if (dual) *dgx = at(p.dgy[u]);
      *add = c_.plan.last_use[u] != v;
    };
    input(n.input, &x->gx, &x->dgx, &x->add_gx);
    if (n.input2 >= 0) {
      input(n.input2, &x->gx2, &x->dgx2, &x->add_gx2);
      if (n.input2 == n.input) x->add_gx2 = true;
    }
  }

  static LayerCall<T>& update(Prepared& p, const Moment<T>& at) {
    LayerCall<T>& x = p.call;
    if (p.w >= 0) x.w = at.theta + p.w;
    if (p.b >= 0) x.b = at.theta + p.b;
    if (p.mean >= 0) x.mean = at.theta + p.mean;
    if (p.var >= 0) x.var = at.theta + p.var;
    if (p.moves && at.record != p.record) move(p, at.record - p.record);
    x.pass = at.pass;
    x.task = at.task;
    return x;
  }

  static void move(Prepared& p, int64_t by) {
    LayerCall<T>& x = p.call;
    p.record += by;
    x.y += by;
    x.gy += by;
    if (x.saved != nullptr) x.saved = static_cast<T*>(x.saved) + by;
    if (p.input_moves) {
      x.x += by;
      x.gx = p.gx += by;
    }
    if (p.input2_moves) {
      x.x2 += by;
      x.gx2 = p.gx2 += by;
    }
  }

  const Common<T>& c_;
  const Buffers<T>& b_;
  const Memory<T>& memory_;
  std::vector<Prepared> support_, dual_, query_;  // of value v at v - 1
};

}  // namespace fastmeta::engine::FASTMETA_ISA
