// Where everything of a task lies in a thread's memory.
#pragma once
#include <algorithm>
#include <memory>
#include <vector>

#include "engine/factored.h"
#include "engine/layers/convolution.h"
#include "engine/layers/layers.h"
#include "engine/layers/product.h"
#include "engine/plan.h"

namespace fastmeta::engine::FASTMETA_ISA {

// What a call wants; the same for all of its tasks.
struct Wants {
  bool backward = false;      // anything at all
  bool second_order = false;  // sweep back over the steps with Hessian-vector products
  bool shared = false, rates = false, support_x = false, query_x = false;
};

// Where everything of a task lies in a thread's memory, in numbers from its beginning.
template <class T>
class Buffers {
 public:
  struct Pass {
    std::vector<int64_t> y, dy, gy, dgy;                          // of each value; -1: none
    std::vector<int64_t> saved;                                   // of each node
    std::vector<std::unique_ptr<convolution::Places<T>>> places;  // likewise; convolutions alone
    int64_t turned_input = -1;                                    // the last layer's turned_x
    int64_t labels = -1;                                          // of cross_entropy
  };

  // Places from kOutside on are no part of the task's memory, but with the caller: the input's rows
  // and their gradients, where these lie in tensors as they would here.
  enum Outside { kSupportX, kQueryX, kSupportGradient, kQueryGradient, kNumOutside };
  static constexpr int64_t kOutside = int64_t{1} << 62;
  static bool lies_alike(const Shape& input) {
    return input.ld == input.channels && (input.channels == 1 || input.pixels() == 1);
  }

  // one_pass: the steps' sweep back follows the steps at once, in the same memory.
  Buffers(const Plan& plan, const Adapt& args, const Wants& wants, bool one_pass) {
    const int values = static_cast<int>(plan.shapes.size());
    const int64_t parameters = plan.fast.size;
    // Whether a value that depends on no adapted parameter has a cotangent that somebody wants.
    const auto upstream = [&](bool input) {
      std::vector<bool> wanted(values, false);
      wanted[0] = input;
      for (int v = 1; v < values; ++v) {
        const Node& n = plan.nodes[v - 1];
        const auto learns = [&](const ParamRef& p) { return p && !p.adapted && wants.shared; };
        wanted[v] =
            wanted[n.input] || (n.input2 >= 0 && wanted[n.input2]) || learns(n.w) || learns(n.b);
      }
      return wanted;
    };
    support_wanted = upstream(wants.support_x);
    query_wanted = upstream(wants.query_x);
    int64_t scratch = 0;
    for (int pass = 0; pass < 2; ++pass) {
      const bool query = pass == 1;
      const int64_t rows = query ? args.queries : args.supports;
      Pass& p = query ? this->query : support;
      for (auto* list : {&p.y, &p.dy, &p.gy, &p.dgy}) list->assign(values, -1);
      p.saved.assign(values, -1);
      p.places.resize(values);
      // The input's values and cotangents may lie with the caller.
      const auto take_value = [&](int v, Outside of_input) {
        const int64_t size = plan.shapes[v].size(rows);
        return v == 0 && lies_alike(plan.shapes[0]) ? kOutside + of_input : take(size);
      };
      const auto place_value = [&](int v) {
        p.y[v] = take_value(v, query ? kQueryX : kSupportX);
        if (v == 0) return;
        const Node& n = plan.nodes[v - 1];
        const bool is_product = n.kind == Kind::kLinear || n.kind == Kind::kConv2d;
        if (convolution::Places<T>::apply(n)) {
          p.places[v] = std::make_unique<convolution::Places<T>>(n, rows);
          scratch = std::max(scratch, numbers(p.places[v]->scratch_bytes()));
          return;
        }
        p.saved[v] = take(numbers(is_product ? product::saved_bytes<T>(n, rows)
                                             : layers::saved_bytes<T>(n, rows)));
        scratch = std::max(scratch, numbers(is_product ? product::scratch_bytes<T>(n, rows)
                                                       : layers::scratch_bytes<T>(n, rows)));
      };
      if (plan.program.loss.kind == LossKind::kCrossEntropy) p.labels = take(padded<T>(rows));
      if (plan.turns_input()) {
        p.turned_input = take(plan.nodes.back().in.channels * plan.out().padded_rows(rows));
      }
      for (int v = 0; v < values; ++v) {
        if (!plan.live[v]) continue;
        const int64_t size = plan.shapes[v].size(rows);
        const bool dynamic = !plan.is_static[v];
        if (query || !dynamic) place_value(v);
        if (query) {
          const bool wanted = wants.backward && (dynamic || query_wanted[v]);
          if (wanted) {
            const bool beside = !replaces(plan, p, v);
            p.gy[v] = beside ? take_value(v, kQueryGradient) : p.gy[plan.nodes[v - 1].input];
          }
        } else if (wants.second_order) {
          if (dynamic) {
            p.dy[v] = take(size);
            p.dgy[v] = take(size);
          } else if (support_wanted[v]) {
            p.gy[v] = take_value(v, kSupportGradient);  // its cotangent, gathered over the steps
          }
        }
      }
      if (query) continue;
      const int64_t begin = total;
      for (int v = 0; v < values; ++v) {
        if (!plan.live[v] || plan.is_static[v]) continue;
        place_value(v);
        p.gy[v] = take(plan.shapes[v].size(rows));
      }
      record = total - begin;
      const int64_t bytes = record * static_cast<int64_t>(sizeof(T));
      if (one_pass && wants.second_order) {
        const int64_t room = operations(plan, rows) > kWorth * bytes ? kFarBytes : kNearBytes;
        records = std::clamp<int64_t>(room / std::max<int64_t>(bytes, 1), 1,
                                      std::max<int64_t>(args.steps, 1));
        total += (records - 1) * record;
      }
    }
    for (const Factored& f : plan.factored) {
      const Node& n = plan.nodes[f.value - 1];
      const int64_t s = args.supports, q = args.queries;
      FactoredBuffers<T> b;
      b.gram_ld = padded<T>(s);
      b.gram = take(s * b.gram_ld);
      if (f.whole) {
        b.weight = take(f.weight.size);
        if (wants.backward) b.weight_gradient = take(f.weight.size);
      } else {
        b.query_gram_ld = n.out.lanes > 0 ? n.out.padded_rows(q) : b.gram_ld;
        b.query_gram = take((n.out.lanes > 0 ? s : q) * b.query_gram_ld);
      }
      b.base = take(n.out.size(s));
      if (wants.second_order) b.tangents = take(n.out.size(s));
      const bool x = wants.second_order && support_wanted[n.input];
      if (x) b.gram_gradient = take(s * b.gram_ld);
      if (!f.whole && (x || (wants.backward && query_wanted[n.input])))
        b.query_gram_gradient = take(q * b.gram_ld);
      factored.push_back(b);
      // A whole weight on its way in or out, and its transpose.
      scratch = std::max(scratch, f.weight.size + n.out.channels * padded<T>(n.in.channels));
    }
    this->scratch = take(scratch);
    // All of a task's thetas, or where they are kept between calls, two.
    trajectory = take((one_pass ? args.steps : 2) * parameters);
    gradient = take(parameters);
    if (wants.backward) cotangent = take(parameters);
    if (wants.second_order) {
      direction = take(parameters);
      if (wants.rates) later = take(parameters);
    }
  }

  Pass support, query;
  // What a step's pass over the supports makes (y, gy, saved of what is not static) is a record.
  // The last `records` steps have one each, `record` numbers apart, so that their sweep back finds
  // the primal values as they were: as many as the second-level cache has room for, or the last
  // one, where the products take longer than to read what they made from there.
  int64_t record = 0, records = 0;
  std::vector<bool> support_wanted, query_wanted;
  std::vector<FactoredBuffers<T>> factored;
  int64_t scratch = -1, trajectory = -1;
  // In the engine's layout of the adapted parameters: gradient of the support loss, dL_Q / dtheta,
  // -rate * cotangent, and the cotangent as it was before the step at hand.
  int64_t gradient = -1, cotangent = -1, direction = -1, later = -1;
  int64_t total = 0;

 private:
  // Whether a value's cotangent may lie where its input's will: the layer works number by number
  // then, and nobody else adds to that. In the queries alone, whose cotangents are used once, and
  // not with the caller, whose places only the readers of the input follow.
  static bool replaces(const Plan& plan, const Pass& p, int v) {
    if (v == 0) return false;
    const Node& n = plan.nodes[v - 1];
    const bool each = n.kind == Kind::kBatchNorm || layers::is_activation(n.kind);
    const bool here = p.gy[n.input] >= 0 && p.gy[n.input] < kOutside;
    return each && plan.readers[n.input] == 1 && here;
  }

  static constexpr int64_t kAlign = 64 / sizeof(T);
  static constexpr int64_t kNearBytes = 160 << 10, kFarBytes = 8 << 20;
  static constexpr int64_t kWorth = 16;  // operations for a byte

  // Of a pass over the supports, those that a record spares: values, and cotangents of values.
  static int64_t operations(const Plan& plan, int64_t rows) {
    int64_t sum = 0;
    for (int v = 1; v < static_cast<int>(plan.shapes.size()); ++v) {
      const Node& n = plan.nodes[v - 1];
      const bool is_product = n.kind == Kind::kLinear || n.kind == Kind::kConv2d;
      const bool factored = std::any_of(plan.factored.begin(), plan.factored.end(),
                                        [=](const Factored& f) { return f.value == v; });
      if (!is_product || factored || !plan.live[v] || plan.is_static[v]) continue;
      const int64_t patch = n.in.channels / n.groups * n.k[0] * n.k[1];
      const int64_t product = 2 * rows * n.out.pixels() * patch * n.out.channels;
      sum += plan.is_static[n.input] ? product : 2 * product;
    }
    return sum;
  }

  static int64_t numbers(int64_t bytes) { return ceil_div(bytes, int64_t{sizeof(T)}); }
  int64_t take(int64_t size) {
    const int64_t place = total;
    total += ceil_div(size, kAlign) * kAlign;
    return place;
  }
};

// A thread's memory, and what lies with the caller of the task at hand.
template <class T>
struct Memory {
  T* own;
  T* outside[Buffers<T>::kNumOutside] = {};

  T* at(int64_t place) const {
    constexpr int64_t kOutside = Buffers<T>::kOutside;
    return place < kOutside ? own + place : outside[place - kOutside];
  }
};

}  // namespace fastmeta::engine::FASTMETA_ISA
