// Losses: value, gradient at the prediction, and the tangent of that gradient along a tangent of
// the prediction. As torch.nn.functional with reduction='mean', but 0 (value and gradients) where
// nothing counts, such as no rows, or labels that are all ignored.
//
// Predictions are a value of the engine, [rows, pixels, ld]. Labels are int64 [rows], in [0,
// classes) or the ignored index: callers check that (first_bad_label). Targets are in torch's
// layout, [rows, channels, height, width] without gaps.
#pragma once
#include <limits>

#include "common/vec_math.h"
#include "engine/layers/lanes.h"

namespace fastmeta::engine::FASTMETA_ISA {

// Index of the first label that is neither a class nor ignored; -1 if there is none.
inline int64_t first_bad_label(const int64_t* labels, int64_t n, int64_t classes, int64_t ignore) {
  for (int64_t i = 0; i < n; ++i) {
    if (labels[i] != ignore && (labels[i] < 0 || labels[i] >= classes)) return i;
  }
  return -1;
}

template <class T>
struct LossCall {
  const Loss* loss;
  Shape shape;  // of one row of the prediction
  int64_t rows;
  const T* prediction;
  const T* dprediction;   // its tangent, of loss_dual
  const int64_t* labels;  // cross_entropy
  const T* targets;       // the others
  const T* weight;        // of the classes, [classes] at least; null: ones
  T* g;                   // gradient at the prediction, written, zeros in padding lanes
  T* dg;                  // its tangent, of loss_dual
};

namespace losses {

enum class Want { kValue, kBoth, kGradient, kDual };  // kDual: the gradient as well
constexpr bool has_value(Want want) { return want == Want::kValue || want == Want::kBoth; }

template <class T>
FASTMETA_INLINE T weight_of(const LossCall<T>& call, int64_t label) {
  return call.weight != nullptr ? call.weight[label] : T(1);
}

// kWidth rows at a time, one in a lane: block[c] has the rows' numbers of the class c0 + c.
template <class T>
struct RowBlock {
  int64_t first, count, ld;  // rows [first, first + count); lanes past them hold the last row again

  [[gnu::always_inline]] void load_classes(const T* from, int64_t c0, Vec<T>* block) const {
    for (int64_t k = 0; k < kWidth<T>; ++k) {
      block[k] = load(from + (first + min_of<int64_t>(k, count - 1)) * ld + c0);
    }
    transpose<T>(block);
  }
  // Destroys block.
  [[gnu::always_inline]] void store_classes(Vec<T>* block, T* to, int64_t c0) const {
    transpose<T>(block);
    for (int64_t k = 0; k < count; ++k) store(to + (first + k) * ld + c0, block[k]);
  }
};

// The labels of a block of rows, one in a lane; -1 in lanes of rows that do not count.
template <class T>
FASTMETA_INLINE IntVec<T> block_labels(const LossCall<T>& call, const RowBlock<T>& rows) {
  constexpr int kW = kWidth<T>;
  typedef int64_t Wide __attribute__((vector_size(8 * kW), aligned(8), may_alias));
  const int64_t* labels = call.labels + rows.first;
  const int64_t ignore = call.loss->ignore;
  int64_t last[kW];
  if (rows.count < kW) {
    for (int64_t k = 0; k < kW; ++k) last[k] = k < rows.count ? labels[k] : ignore;
    labels = last;
  }
  const Wide wide = *reinterpret_cast<const Wide*>(labels);
  return __builtin_convertvector(wide | (wide == ignore), IntVec<T>);
}

// With D the sum of the weights of the labels that count, e the smoothing, C classes: a row's loss
// is (1 - e) w[label] nll[label] + e / C sum_c w[c] nll[c], the whole their sum over D.
template <Want kWant, class T>
double cross_entropy(const LossCall<T>& call) {
  constexpr int kW = kWidth<T>;
  const int64_t classes = call.shape.channels, ld = call.shape.ld;
  const double smoothing = call.loss->smoothing, even = smoothing / static_cast<double>(classes);
  const bool one_block = ld == kW;  // then what is loaded once stays in registers
  double counted = 0, all_weights = 0;
  for (int64_t r = 0; r < call.rows; ++r) {
    if (call.labels[r] != call.loss->ignore) counted += weight_of(call, call.labels[r]);
  }
  for (int64_t c = 0; c < classes; ++c) all_weights += weight_of(call, c);
  const double over = counted == 0 ? 0 : 1 / counted;
  double total = 0;
  for (int64_t first = 0; first < call.rows; first += kW) {
    const RowBlock<T> rows{first, min_of<int64_t>(kW, call.rows - first), ld};
    const IntVec<T> label = block_labels(call, rows);
    const IntVec<T> counts = counted == 0 ? IntVec<T>{} : label >= 0;
    Vec<T> own = splat<T>(static_cast<T>((1 - smoothing) * over));  // weight of -z[label], over D
    if (call.weight != nullptr) {
      for (int k = 0; k < kW; ++k) own[k] *= label[k] >= 0 ? call.weight[label[k]] : T(0);
    }
    own = where<T>(counts, own);
    Vec<T> block[kW] = {}, dblock[kW] = {};
    Vec<T> top = splat<T>(-std::numeric_limits<T>::infinity());
    for (int64_t c0 = 0; c0 < classes; c0 += kW) {
      rows.load_classes(call.prediction, c0, block);
      const int64_t here = min_of<int64_t>(kW, classes - c0);
      for (int64_t c = 0; c < here; ++c) top = vmax<T>(top, block[c]);
    }
    Vec<T> sum{}, smooth{}, along{}, picked{};
    for (int64_t c0 = 0; c0 < ld; c0 += kW) {
      if (!one_block) rows.load_classes(call.prediction, c0, block);
      if constexpr (kWant == Want::kDual) rows.load_classes(call.dprediction, c0, dblock);
      const int64_t here = min_of<int64_t>(kW, classes - c0);
      for (int64_t c = 0; c < kW; ++c) {
        if (c >= here) {
          block[c] = Vec<T>{};
          continue;
        }
        const Vec<T> shifted = block[c] - top;
        if constexpr (has_value(kWant)) {
          if (smoothing != 0) smooth += weight_of(call, c0 + c) * shifted;
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
    for (int64_t c0 = 0; c0 < ld; c0 += kW) {
      if (!one_block) {
        rows.load_classes(call.g, c0, block);
        if constexpr (kWant == Want::kDual) rows.load_classes(call.dprediction, c0, dblock);
      }
      const int64_t here = min_of<int64_t>(kW, classes - c0);
      for (int64_t c = 0; c < here; ++c) {
        const Vec<T> share = block[c] * scale;
        if constexpr (kWant == Want::kDual) {
          dblock[c] = where<T>(counts, share * (dblock[c] - mean));
        }
        Vec<T> v = share - where<T>(label == static_cast<int>(c0 + c), own);
        if (smoothing != 0) v -= even_scale * weight_of(call, c0 + c);
        block[c] = where<T>(counts, v);
      }
      for (int64_t c = max_of<int64_t>(here, 0); c < kW; ++c) dblock[c] = Vec<T>{};
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

template <Want kWant, class T, class Function>
double elementwise(const LossCall<T>& call, const Function& function) {
  const Shape& shape = call.shape;
  const int64_t pixels = shape.pixels(), channels = shape.channels;
  const int64_t n = call.rows * pixels * channels;
  const T share = n == 0 ? T(0) : T(1) / static_cast<T>(n);
  constexpr int64_t kTogether = 16;  // vectors summed in T before their sum goes to total
  double total = 0;
  Vec<T> sum{};
  int64_t summed = 0;
  for (int64_t i = 0, pixel = 0; i < call.rows * pixels; ++i) {
    const int64_t at = i * shape.ld;
    const T* targets = call.targets + (i - pixel) * channels + pixel;
    pixel = pixel + 1 < pixels ? pixel + 1 : 0;
    for (int64_t c = 0; c < shape.ld; c += kWidth<T>) {
      const int64_t left = channels - c;
      Vec<T> target{};
      if (left == 1) {
        target = splat<T>(targets[c * pixels]);  // other lanes count for nothing
      } else if (pixels == 1 && left > 0) {
        target = load_n(targets + c, static_cast<int>(min_of<int64_t>(kWidth<T>, left)));
      } else {
        for (int64_t k = 0; k < min_of<int64_t>(kWidth<T>, left); ++k) {
          target[k] = targets[(c + k) * pixels];
        }
      }
      const Point<T> point = function(load(call.prediction + at + c), target);
      if constexpr (has_value(kWant)) {
        sum += keep_first<T>(point.value, left);
        if (++summed == kTogether) {
          total += static_cast<double>(hsum<T>(sum));
          sum = Vec<T>{};
          summed = 0;
        }
      }
      if constexpr (kWant != Want::kValue) {
        store(call.g + at + c, keep_first<T>(point.gradient * share, left));
      }
      if constexpr (kWant == Want::kDual) {
        const Vec<T> tangent = point.slope * load(call.dprediction + at + c);
        store(call.dg + at + c, keep_first<T>(tangent * share, left));
      }
    }
  }
  total += static_cast<double>(hsum<T>(sum));
  return n == 0 ? 0 : total / static_cast<double>(n);
}

template <Want kWant, class T>
double evaluate(const LossCall<T>& call) {
  switch (call.loss->kind) {
    case LossKind::kCrossEntropy:
      return cross_entropy<kWant>(call);
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
