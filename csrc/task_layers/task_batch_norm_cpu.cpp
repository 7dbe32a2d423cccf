// CPU kernels of task_batch_norm. The formulas are in fastmeta/ops/_task_norm.py.
//
// A job is a channel of a task, whose sums it forms by itself; without positions (L = 1) it is a
// vector of channels, which then lie side by side, and every lane is a channel of its own.
#include "common/vec.h"
#include "task_layers/task_batch_norm.h"

namespace fastmeta::task_layers::FASTMETA_ISA {

using namespace fastmeta::FASTMETA_ISA;

namespace {

template <class T>
FASTMETA_INLINE Vec<T> first_lanes(Vec<T> x, int n) {
  if (n == kWidth<T>) return x;
  for (int i = n; i < kWidth<T>; ++i) x[i] = T(0);
  return x;
}

// The channel (or channels) of a job.
template <class S>
struct Channel {
  using A = Acc<S>;
  static constexpr int kW = kWidth<A>;
  const BatchNorm* args;
  int64_t task, first, base;
  int lanes;  // channels: 1, or those of a vector when L = 1
  A count;

  Channel(const BatchNorm& a, int64_t job) : args(&a) {
    const int64_t jobs = jobs_of(a);
    task = job / jobs;
    first = job % jobs * (a.length == 1 ? kW : 1);
    lanes = a.length == 1 ? static_cast<int>(min_of<int64_t>(kW, a.channels - first)) : 1;
    base = (task * a.rows * a.channels + first) * a.length;
    count = static_cast<A>(max_of<int64_t>(1, a.rows * a.length));
  }
  static int64_t jobs_of(const BatchNorm& a) {
    return a.length == 1 ? ceil_div(a.channels, kW) : a.channels;
  }

  // body(offset of a vector of elements, how many of its lanes are there).
  template <class Body>
  void each(const Body& body) const {
    const int64_t length = args->length, step = args->channels * length;
    for (int64_t n = 0; n < args->rows; ++n) {
      const int64_t row = base + n * step;
      if (length == 1) {
        body(row, lanes);
        continue;
      }
      int64_t l = 0;
      for (; l + kW <= length; l += kW) body(row + l, kW);
      if (l < length) body(row + l, static_cast<int>(length - l));
    }
  }

  // The mean of what lanes have summed, for each lane.
  Vec<A> mean_of(Vec<A> sum) const { return total(sum) / splat<A>(count); }
  Vec<A> total(Vec<A> sum) const { return args->length == 1 ? sum : splat<A>(hsum<A>(sum)); }

  // A value a channel, [T, C].
  template <class U>
  Vec<A> column(const U* data, int64_t stride) const {
    const U* p = data + task * stride + first;
    return args->length == 1 ? load_n(p, lanes) : splat<A>(load_one(p));
  }
  template <class U>
  void store_column(void* data, Vec<A> value) const {
    U* p = static_cast<U*>(data) + task * args->channels + first;
    store_n(p, value, lanes);
  }
  Vec<A> weight() const {
    return args->weight.data == nullptr
               ? splat<A>(A(1))
               : column(static_cast<const S*>(args->weight.data), args->weight.stride);
  }
};

template <class S>
FASTMETA_INLINE Vec<Acc<S>> load_part(const S* p, int n) {
  return n == kWidth<Acc<S>> ? load(p) : load_n(p, n);
}
template <class S>
FASTMETA_INLINE void store_part(S* p, Vec<Acc<S>> x, int n) {
  n == kWidth<Acc<S>> ? store(p, x) : store_n(p, x, n);
}

template <class S>
void forward_job(const BatchNorm& args, int64_t job) {
  using A = Acc<S>;
  const Channel<S> c(args, job);
  const S* x = static_cast<const S*>(args.x);
  Vec<A> sum{};
  c.each([&](int64_t at, int n) { sum += load_part(x + at, n); });
  const Vec<A> mean = c.mean_of(sum);
  Vec<A> squares{};
  c.each([&](int64_t at, int n) {
    const Vec<A> d = first_lanes<A>(load_part(x + at, n) - mean, n);
    squares += d * d;
  });
  const Vec<A> variance = c.mean_of(squares) + splat<A>(static_cast<A>(args.eps));
  const Vec<A> rstd = splat<A>(A(1)) / vsqrt<A>(variance);
  c.template store_column<A>(args.mean, mean);
  c.template store_column<A>(args.rstd, rstd);
  const Vec<A> scale = rstd * c.weight();
  Vec<A> shift{};
  if (args.bias.data != nullptr) {
    shift = c.column(static_cast<const S*>(args.bias.data), args.bias.stride);
  }
  S* out = static_cast<S*>(args.out);
  c.each([&](int64_t at, int n) {
    store_part(out + at, (load_part(x + at, n) - mean) * scale + shift, n);
  });
}

template <class S>
void backward_job(const BatchNorm& args, int64_t job) {
  using A = Acc<S>;
  const Channel<S> c(args, job);
  const S *x = static_cast<const S*>(args.x), *g = static_cast<const S*>(args.grad);
  const Vec<A> mean = c.column(static_cast<const A*>(args.mean), args.channels);
  const Vec<A> rstd = c.column(static_cast<const A*>(args.rstd), args.channels);
  Vec<A> sum_g{}, sum_gx{};
  c.each([&](int64_t at, int n) {
    const Vec<A> grad = load_part(g + at, n);
    sum_g += grad;
    sum_gx += grad * first_lanes<A>((load_part(x + at, n) - mean) * rstd, n);
  });
  c.template store_column<S>(args.to_weight, c.total(sum_gx));
  c.template store_column<S>(args.to_bias, c.total(sum_g));
  const Vec<A> mean_g = c.mean_of(sum_g), along = c.mean_of(sum_gx) * rstd;
  const Vec<A> scale = rstd * c.weight();
  S* out = static_cast<S*>(args.out);
  c.each([&](int64_t at, int n) {
    const Vec<A> d = load_part(x + at, n) - mean;
    store_part(out + at, scale * (load_part(g + at, n) - mean_g - d * along), n);
  });
}

template <class S>
void second_job(const BatchNorm& args, int64_t job) {
  using A = Acc<S>;
  const Channel<S> c(args, job);
  const S *x = static_cast<const S*>(args.x), *g = static_cast<const S*>(args.grad);
  const S* u = static_cast<const S*>(args.u);
  const Vec<A> mean = c.column(static_cast<const A*>(args.mean), args.channels);
  const Vec<A> rstd = c.column(static_cast<const A*>(args.rstd), args.channels);
  const Vec<A> v = c.column(static_cast<const S*>(args.v), args.channels);
  const Vec<A> z = c.column(static_cast<const S*>(args.z), args.channels);
  Vec<A> sum_u{}, sum_g{}, sum_ux{}, sum_gx{}, sum_ug{};
  c.each([&](int64_t at, int n) {
    const Vec<A> normal = first_lanes<A>((load_part(x + at, n) - mean) * rstd, n);
    const Vec<A> a = load_part(u + at, n), b = load_part(g + at, n);
    sum_u += a;
    sum_g += b;
    sum_ux += a * normal;
    sum_gx += b * normal;
    sum_ug += a * b;
  });
  const Vec<A> mean_u = c.mean_of(sum_u), mean_g = c.mean_of(sum_g);
  const Vec<A> along_u = c.mean_of(sum_ux), along_g = c.mean_of(sum_gx);
  const Vec<A> both = c.mean_of(sum_ug) - mean_u * mean_g - along_u * along_g;
  c.template store_column<S>(args.to_weight, rstd * both * splat<A>(c.count));
  const Vec<A> scale = rstd * c.weight(), curve = scale * rstd, slope = v * rstd;
  S *to_x = static_cast<S*>(args.out), *to_grad = static_cast<S*>(args.to_grad);
  c.each([&](int64_t at, int n) {
    const Vec<A> normal = (load_part(x + at, n) - mean) * rstd;
    const Vec<A> of_u = load_part(u + at, n) - mean_u - normal * along_u;
    const Vec<A> of_g = load_part(g + at, n) - mean_g - normal * along_g;
    store_part(to_grad + at, scale * of_u + v * normal + z, n);
    store_part(to_x + at, slope * of_g - curve * (both * normal + along_g * of_u + along_u * of_g),
               n);
  });
}

template <class S, void (*kJob)(const BatchNorm&, int64_t)>
void run(const BatchNorm& args, ParallelFor par) {
  const int64_t jobs = args.tasks * Channel<S>::jobs_of(args);
  if (jobs == 0) return;
  const int64_t elements = args.tasks * args.rows * args.channels * args.length / jobs;
  const int64_t grain = max_of<int64_t>(1, 32768 / (elements + 64));
  par(
      jobs, grain,
      [](void* context, int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j) kJob(*static_cast<const BatchNorm*>(context), j);
      },
      const_cast<BatchNorm*>(&args));
}

}  // namespace

#define FASTMETA_TASK_BATCH_NORM(function, job)           \
  void function(const BatchNorm& args, ParallelFor par) { \
    switch (args.dtype) {                                 \
      case DType::kFloat32:                               \
        return run<float, job<float>>(args, par);         \
      case DType::kFloat64:                               \
        return run<double, job<double>>(args, par);       \
      case DType::kBFloat16:                              \
        return run<bfloat16, job<bfloat16>>(args, par);   \
      case DType::kFloat16:                               \
        return run<float16, job<float16>>(args, par);     \
    }                                                     \
  }
FASTMETA_TASK_BATCH_NORM(batch_norm, forward_job)
FASTMETA_TASK_BATCH_NORM(batch_norm_backward, backward_job)
FASTMETA_TASK_BATCH_NORM(batch_norm_second, second_job)
#undef FASTMETA_TASK_BATCH_NORM

}  // namespace fastmeta::task_layers::FASTMETA_ISA
