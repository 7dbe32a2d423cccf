// Losses: value, gradient at the prediction, and the tangent of that gradient along a tangent of
// the prediction. As torch.nn.functional with reduction='mean', but 0 (value and gradients) where
// nothing counts, such as no rows, or labels that are all ignored.
//
// Predictions are a value of the engine, [rows, pixels, ld] or [channels, rows]. Labels are
// int64 [rows], in [0, classes) or the ignored index: callers check that. Targets are in torch's
// layout, [rows, channels, height, width] without gaps.
#pragma once
#include <limits>

#include "common/vec_math.h"
#include "engine/layers/lanes.h"

namespace fastmeta::engine::FASTMETA_ISA {

template <class T>
struct LossCall {
  const Loss* loss;
  Shape shape;  // of one row of the prediction
  int64_t rows;
  const T* prediction;
  const T* dprediction;  // its tangent, of loss_dual
  const T* labels;       // cross_entropy: of prepare_labels, as is
  double counted;        //
  const T* targets;      // the others
  const T* weight;       // of the classes, [classes] at least; null: ones
  T* g;                  // gradient at the prediction, written, zeros in padding
  T* dg;                 // its tangent, of loss_dual
};

namespace losses {

enum class Want { kValue, kBoth, kGradient, kDual };  // kDual: the gradient as well
constexpr bool has_value(Want want) { return want == Want::kValue || want == Want::kBoth; }

template <class T>
FASTMETA_INLINE T weight_of(const T* weight, int64_t label) {
  return weight != nullptr ? weight[label] : T(1);
}

// kWidth rows at a time, one in a lane: block[c] has the rows' numbers of the class c0 + c.
template <class T, bool kTurned>
struct RowBlock {
  // Rows [first, first + count); lanes past them hold the last row again, or padding.
  int64_t first, count;
  int64_t ld;       // from row to row, or from class to class
  int64_t classes;  // of all

  int64_t here(int64_t c0) const { return min_of<int64_t>(kWidth<T>, classes - c0); }

  [[gnu::always_inline]] void load_classes(const T* from, int64_t c0, Vec<T>* block) const {
    if constexpr (kTurned) {
      for (int64_t c = 0; c < here(c0); ++c) block[c] = load(from + (c0 + c) * ld + first);
    } else {
      for (int64_t k = 0; k < kWidth<T>; ++k) {
        block[k] = load(from + (first + min_of<int64_t>(k, count - 1)) * ld + c0);
      }
      transpose<T>(block);
    }
  }
  // Destroys block.
  [[gnu::always_inline]] void store_classes(Vec<T>* block, T* to, int64_t c0) const {
    if constexpr (kTurned) {
      for (int64_t c = 0; c < here(c0); ++c) store(to + (c0 + c) * ld + first, block[c]);
    } else {
      for (int64_t c = max_of<int64_t>(here(c0), 0); c < kWidth<T>; ++c) block[c] = Vec<T>{};
      transpose<T>(block);
      for (int64_t k = 0; k < count; ++k) store(to + (first + k) * ld + c0, block[k]);
    }
  }
};

// With D the sum of the weights of the labels that count, e the smoothing, C classes: a row's loss
// is (1 - e) w[label] nll[label] + e / C sum_c w[c] nll[c], the whole their sum over D.
template <Want kWant, bool kTurned, class T>
double cross_entropy(const LossCall<T>& call) {
  constexpr int kW = kWidth<T>;
  const int64_t classes = call.shape.channels;
  const int64_t ld = kTurned ? call.shape.padded_rows(call.rows) : call.shape.ld;
  const int64_t width = kTurned ? classes : ld;  // classes with their padding
  const double smoothing = call.loss->smoothing, even = smoothing / static_cast<double>(classes);
  const bool one_block = width <= kW;  // then what is loaded once stays in registers
  double all_weights = 0;
  for (int64_t c = 0; smoothing != 0 && c < classes; ++c) all_weights += weight_of(call.weight, c);
  const double over = call.counted == 0 ? 0 : 1 / call.counted;
  double total = 0;
  for (int64_t first = 0; first < call.rows; first += kW) {
    const RowBlock<T, kTurned> rows{first, min_of<int64_t>(kW, call.rows - first), ld, classes};
    const IntVec<T> label = bits_of<T>(load(call.labels + first));
    const IntVec<T> counts = label >= 0;
    Vec<T> own = splat<T>(static_cast<T>((1 - smoothing) * over));  // weight of -z[label], over D
    if (call.weight != nullptr) {
      for (int k = 0; k < kW; ++k) own[k] *= label[k] >= 0 ? call.weight[label[k]] : T(0);
    }
    own = where<T>(counts, own);
    Vec<T> block[kW], dblock[kW];
    Vec<T> top = splat<T>(-std::numeric_limits<T>::infinity());
    for (int64_t c0 = 0; c0 < classes; c0 += kW) {
      rows.load_classes(call.prediction, c0, block);
      for (int64_t c = 0; c < rows.here(c0); ++c) top = vmax<T>(top, block[c]);
    }
    Vec<T> sum{}, smooth{}, along{}, picked{};
    for (int64_t c0 = 0; c0 < width; c0 += kW) {
      if (!one_block) rows.load_classes(call.prediction, c0, block);
      if constexpr (kWant == Want::kDual) rows.load_classes(call.dprediction, c0, dblock);
      for (int64_t c = 0; c < rows.here(c0); ++c) {
        const Vec<T> shifted = block[c] - top;
        if constexpr (has_value(kWant)) {
          if (smoothing != 0) smooth += weight_of(call.weight, c0 + c) * shifted;
          picked += where<T>(label == static_cast<int>(c0 + c), shifted);
        }
        block[c] = vexp<T>(shifted);
        sum += block[c];
        if constexpr (kWant == Want::kDual) along += block[c] * dblock[c];
      }
      if (kWant != Want::kValue && !one_block) rows.store_classes(block, call.g, c0);
    }
    const Vec<T> spread =
        own + where<T>(counts, splat<T>(static_cast<T>(even * all_weights * over)));
    const T even_scale = static_cast<T>(even * over);
    if constexpr (has_value(kWant)) {
      const Vec<T> value = spread * vlog<T>(sum) - own * picked - even_scale * smooth;
      total += static_cast<double>(hsum<T>(where<T>(counts, value)));
    }
    if constexpr (kWant == Want::kValue) continue;
    const Vec<T> scale = spread / sum, mean = along / sum;
    for (int64_t c0 = 0; c0 < width; c0 += kW) {
      if (!one_block) {
        rows.load_classes(call.g, c0, block);
        if constexpr (kWant == Want::kDual) rows.load_classes(call.dprediction, c0, dblock);
      }
      for (int64_t c = 0; c < rows.here(c0); ++c) {
        const Vec<T> share = block[c] * scale;
        if constexpr (kWant == Want::kDual) {
          dblock[c] = where<T>(counts, share * (dblock[c] - mean));
        }
        Vec<T> v = share - where<T>(label == static_cast<int>(c0 + c), own);
        if (smoothing != 0) v -= even_scale * weight_of(call.weight, c0 + c);
        block[c] = where<T>(counts, v);
      }
      rows.store_classes(block, call.g, c0);
      if constexpr (kWant == Want::kDual) rows.store_classes(dblock, call.dg, c0);
    }
  }
  return total;
}

// Elementwise losses: a functor gives value, gradient and its slope from prediction and target.
template <class T>
struct Point {
  Vec<T> value, gradient, slope;
};

template <class T>
struct Mse {
  explicit Mse(const Loss&) {}
  [[gnu::always_inline]] Point<T> operator()(Vec<T> x, Vec<T> t) const {
    const Vec<T> d = x - t;
    return {d * d, d + d, splat<T>(2)};
  }
};

template <class T>
struct Huber {
  T delta;
  explicit Huber(const Loss& loss) : delta(static_cast<T>(loss.delta)) {}
  [[gnu::always_inline]] Point<T> operator()(Vec<T> x, Vec<T> t) const {
    const Vec<T> d = x - t, size = vabs<T>(d);
    const Vec<T> cut = vmax<T>(splat<T>(-delta), vmin<T>(splat<T>(delta), d));
    return {size < delta ? T(0.5) * d * d : delta * (size - T(0.5) * delta), cut,
            size < delta ? splat<T>(1) : Vec<T>{}};
  }
};

template <class T>
struct Bce {
  explicit Bce(const Loss&) {}
  [[gnu::always_inline]] Point<T> operator()(Vec<T> x, Vec<T> t) const {
    const Vec<T> s = vsigmoid<T>(x);
    return {vsoftplus<T>(x) - x * t, s - t, s * (T(1) - s)};
  }
};

// f(where a vector of the prediction is, its targets, how many of its lanes count) for all of it.
template <class T, class F>
FASTMETA_INLINE void each_vector(const LossCall<T>& call, F f) {
  constexpr int kW = kWidth<T>;
  const Shape& shape = call.shape;
  const int64_t pixels = shape.pixels(), channels = shape.channels;
  // Of targets `stride` apart, the first `left`; lanes past them hold anything.
  const auto targets_of = [](const T* targets, int64_t stride,
                             int64_t left) __attribute__((always_inline)) {
    Vec<T> target{};
    if (left == 1) {
      target = splat<T>(targets[0]);
    } else if (stride == 1 && left > 0) {
      target = load_n(targets, static_cast<int>(min_of<int64_t>(kW, left)));
    } else {
      for (int64_t k = 0; k < min_of<int64_t>(kW, left); ++k) target[k] = targets[k * stride];
    }
    return target;
  };
  if (shape.lanes > 0) {
    const int64_t ld = shape.padded_rows(call.rows);
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t r = 0; r < call.rows; r += kW) {
        const T* targets = call.targets + r * channels + c;
        f(c * ld + r, targets_of(targets, channels, call.rows - r), call.rows - r);
      }
    }
    return;
  }
  for (int64_t i = 0, pixel = 0; i < call.rows * pixels; ++i) {
    const T* targets = call.targets + (i - pixel) * channels + pixel;
    pixel = pixel + 1 < pixels ? pixel + 1 : 0;
    for (int64_t c = 0; c < shape.ld; c += kW) {
      f(i * shape.ld + c, targets_of(targets + c * pixels, pixels, channels - c), channels - c);
    }
  }
}

template <Want kWant, class T, class Function>
double elementwise(const LossCall<T>& call, const Function& function) {
  const Shape& shape = call.shape;
  const int64_t n = call.rows * shape.pixels() * shape.channels;
  const T share = n == 0 ? T(0) : T(1) / static_cast<T>(n);
  constexpr int64_t kTogether = 16;  // vectors summed in T before their sum goes to total
  double total = 0;
  Vec<T> sum{};
  int64_t summed = 0;
  each_vector(call, [&](int64_t at, Vec<T> target, int64_t left) __attribute__((always_inline)) {
    const Point<T> point = function(load(call.prediction + at), target);
    if constexpr (has_value(kWant)) {
      sum += keep_first<T>(point.value, left);
      if (++summed == kTogether) {
        total += static_cast<double>(hsum<T>(sum));
        sum = Vec<T>{};
        summed = 0;
      }
    }
    if constexpr (kWant != Want::kValue) {
      store(call.g + at, keep_first<T>(point.gradient * share, left));
    }
    if constexpr (kWant == Want::kDual) {
      const Vec<T> tangent = point.slope * load(call.dprediction + at);
      store(call.dg + at, keep_first<T>(tangent * share, left));
    }
  });
  total += static_cast<double>(hsum<T>(sum));
  return n == 0 ? 0 : total / static_cast<double>(n);
}

template <Want kWant, class T>
double evaluate(const LossCall<T>& call) {
  switch (call.loss->kind) {
    case LossKind::kCrossEntropy:
      return call.shape.lanes > 0 ? cross_entropy<kWant, true>(call)
                                  : cross_entropy<kWant, false>(call);
    case LossKind::kMse:
      return elementwise<kWant>(call, Mse<T>(*call.loss));
    case LossKind::kHuber:
      return elementwise<kWant>(call, Huber<T>(*call.loss));
    case LossKind::kBce:
      return elementwise<kWant>(call, Bce<T>(*call.loss));
  }
  __builtin_unreachable();
}

}  // namespace losses

// The labels of cross_entropy as its kernel takes them, once for all steps: integers in the lanes'
// bits, -1 in rows that do not count and behind the last one. `to` has room for whole vectors.
// Returns the sum of the weights of those that count; where it is 0, none does.
template <class T>
double prepare_labels(const Loss& loss, const int64_t* labels, int64_t rows, const T* weight,
                      T* to) {
  constexpr int64_t kW = kWidth<T>;
  double counted = 0;
  for (int64_t r = 0; r < rows; ++r) {
    if (labels[r] != loss.ignore) counted += losses::weight_of(weight, labels[r]);
  }
  for (int64_t first = 0; first < rows; first += kW) {
    IntVec<T> lanes;
    for (int64_t k = 0; k < kW; ++k) {
      const bool counts = first + k < rows && labels[first + k] != loss.ignore && counted != 0;
      lanes[k] = counts ? static_cast<int>(labels[first + k]) : -1;
    }
    store(to + first, from_bits<T>(lanes));
  }
  return counted;
}

// The loss.
template <class T>
double loss_value(const LossCall<T>& call) {
  return losses::evaluate<losses::Want::kValue>(call);
}

// The loss; writes g.
template <class T>
double loss_and_gradient(const LossCall<T>& call) {
  return losses::evaluate<losses::Want::kBoth>(call);
}

// Writes g.
template <class T>
void loss_gradient(const LossCall<T>& call) {
  losses::evaluate<losses::Want::kGradient>(call);
}

// Writes g and dg, the tangent of g along dprediction.
template <class T>
void loss_dual(const LossCall<T>& call) {
  losses::evaluate<losses::Want::kDual>(call);
}

}  // namespace fastmeta::engine::FASTMETA_ISA
