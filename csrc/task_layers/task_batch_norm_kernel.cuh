// Device code of task_batch_norm and its first and second derivatives. The formulas are in
// fastmeta/ops/_task_norm.py.
//
// A block of 256 threads owns a channel of a task; without positions (L = 1), where channels lie
// side by side, 32 of them, a lane each, and its 8 warps share the rows. It sums what it needs over
// the values (the forward twice: the variance about the mean), then walks them once more to write.
// Sums run in the order of a thread's values, of the lanes and of the warps: fixed by the shape.
//
// - bytes: of memory 2 b T N C L forward, 3 b and 5 b in the derivatives: every tensor once. What
//   is walked again (x twice in the forward, all inputs once in the derivatives) comes from L2, of
//   40 MB on A100 and 50 on H100: a channel of a few-shot task is some tens of KB
// - FLOPs: 7, 10 and 30 a value, at most 3 a byte of 16-bit types: bound by memory (2.0 TB/s, 3.35)
// - width: packs of 4 (16 bytes of float32) where L is a multiple of 4 and all tensors are aligned,
//   else single elements, coalesced either way
// - shared memory: a value a thread for each sum; a warp stores and reads a row of 32: no conflicts
#pragma once
#include "common/device.cuh"

namespace fastmeta::task_layers::cuda {

using namespace ::fastmeta::device;  // NOLINT(build/namespaces): device code

inline constexpr int kNormThreads = 256;
inline constexpr int kNormWarps = kNormThreads / kWarpSize;

// Blocks a multiprocessor that registers must leave room for.
template <class scalar_t>
inline constexpr int kNormBlocks = std::is_same_v<scalar_t, double> ? 2 : 4;

template <class scalar_t>
struct BatchNormParams {
  using acc = acc_t<scalar_t>;
  int64_t tasks, rows, channels, length;
  int64_t slices;  // of a task's channels, a block each
  bool vector;
  acc eps;
  const scalar_t* __restrict__ x;
  const scalar_t* weight;  // or nullptr for 1
  const scalar_t* bias;    // or nullptr for 0
  int64_t weight_stride, bias_stride;
  acc* mean;
  acc* rstd;
  const scalar_t* __restrict__ grad;
  const scalar_t* __restrict__ u;
  const scalar_t* v;
  const scalar_t* z;
  scalar_t* __restrict__ out;
  scalar_t* __restrict__ to_grad;
  scalar_t* to_weight;
  scalar_t* to_bias;
};

// The channel of a block, or of this lane.
template <class scalar_t>
class Channel {
 public:
  using acc = acc_t<scalar_t>;

  __device__ __forceinline__ Channel(const BatchNormParams<scalar_t>& p, int64_t work) : p_(p) {
    task_ = divide(work, p.slices);
    channel_ = work - task_ * p.slices;
    if (p.length == 1) channel_ = channel_ * kWarpSize + threadIdx.x % kWarpSize;
    there_ = channel_ < p.channels;
    count = static_cast<acc>(p.rows * p.length > 1 ? p.rows * p.length : 1);
  }

  acc count;  // of values, at least 1

  // body(offset, width) for this thread's values, width neighbours at a time.
  template <class Body>
  __device__ __forceinline__ void each(const Body& body) const {
    if (p_.length == 1) {
      const int64_t first = task_ * p_.rows * p_.channels + channel_;
      for (int64_t n = threadIdx.x / kWarpSize; there_ && n < p_.rows; n += kNormWarps) {
        body(first + n * p_.channels, std::integral_constant<int, 1>{});
      }
    } else if (p_.vector) {
      walk(body, std::integral_constant<int, kPack>{});
    } else {
      walk(body, std::integral_constant<int, 1>{});
    }
  }

  // sum = the sums of all threads' values of the channel, the same bits in each.
  template <int kSums>
  __device__ __forceinline__ void total(acc (&sum)[kSums]) const {
    using Partial = acc[kSums][kNormWarps][kWarpSize];
    FASTMETA_SHARED(Partial, partial);
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    __syncthreads();  // the last sums have been read
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      partial[s][warp][lane] = p_.length == 1 ? sum[s] : lane_sum(sum[s]);
    }
    __syncthreads();
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      sum[s] = partial[s][0][lane];
#pragma unroll
      for (int w = 1; w < kNormWarps; ++w) sum[s] += partial[s][w][lane];
    }
  }

  // A value a channel, [T, C].
  template <class T>
  __device__ __forceinline__ acc column(const T* data, int64_t stride, acc absent) const {
    return data != nullptr && there_ ? to_acc(data[task_ * stride + channel_]) : absent;
  }
  template <class T>
  __device__ __forceinline__ void store_column(T* data, acc value) const {
    const unsigned owners = p_.length == 1 ? kWarpSize : 1;
    if (threadIdx.x < owners && there_) {
      data[task_ * p_.channels + channel_] = from_acc<T>(value);
    }
  }
  __device__ __forceinline__ acc weight() const {
    return column(p_.weight, p_.weight_stride, acc(1));
  }

 private:
  // Threads stride over the packs (or elements) of all rows; their place is carried along, since a
  // division an element would cost more than the rest.
  template <class Body, int width>
  __device__ __forceinline__ void walk(const Body& body, std::integral_constant<int, width>) const {
    const int64_t units = p_.length / width;
    if (units == 0) return;
    const int64_t step = p_.channels * p_.length;
    int64_t row = divide(threadIdx.x, units), unit = threadIdx.x - row * units;
    const int64_t rows = divide(kNormThreads, units), left = kNormThreads - rows * units;
    int64_t offset = ((task_ * p_.rows + row) * p_.channels + channel_) * p_.length + unit * width;
    while (row < p_.rows) {
      body(offset, std::integral_constant<int, width>{});
      row += rows;
      unit += left;
      offset += rows * step + left * width;
      if (unit >= units) {
        unit -= units;
        ++row;
        offset += step - units * width;
      }
    }
  }

  const BatchNormParams<scalar_t>& p_;
  int64_t task_, channel_;
  bool there_;
};

template <class scalar_t>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks<scalar_t>)
    batch_norm_kernel(const __grid_constant__ BatchNormParams<scalar_t> p) {
  using acc = acc_t<scalar_t>;
  for (int64_t work = blockIdx.x; work < p.tasks * p.slices; work += gridDim.x) {
    const Channel<scalar_t> c(p, work);
    acc sum[1] = {}, squares[1] = {};
    c.each([&](int64_t at, auto width) {
      acc x[width.value];
      load<width.value>(p.x + at, x);
#pragma unroll
      for (int i = 0; i < width.value; ++i) sum[0] += x[i];
    });
    c.total(sum);
    const acc mean = sum[0] / c.count;
    c.each([&](int64_t at, auto width) {
      acc x[width.value];
      load<width.value>(p.x + at, x);
#pragma unroll
      for (int i = 0; i < width.value; ++i) squares[0] += (x[i] - mean) * (x[i] - mean);
    });
    c.total(squares);
    const acc rstd = acc(1) / sqrt_(squares[0] / c.count + p.eps);
    c.store_column(p.mean, mean);
    c.store_column(p.rstd, rstd);
    const acc scale = rstd * c.weight(), shift = c.column(p.bias, p.bias_stride, acc(0));
    c.each([&](int64_t at, auto width) {
      acc x[width.value];
      load<width.value>(p.x + at, x);
#pragma unroll
      for (int i = 0; i < width.value; ++i) x[i] = (x[i] - mean) * scale + shift;
      store<width.value>(p.out + at, x);
    });
  }
}

template <class scalar_t>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks<scalar_t>)
    batch_norm_backward_kernel(const __grid_constant__ BatchNormParams<scalar_t> p) {
  using acc = acc_t<scalar_t>;
  for (int64_t work = blockIdx.x; work < p.tasks * p.slices; work += gridDim.x) {
    const Channel<scalar_t> c(p, work);
    const acc mean = c.column(p.mean, p.channels, acc(0));
    const acc rstd = c.column(p.rstd, p.channels, acc(0));
    acc sum[2] = {};  // of grad, and of grad times the normal value
    c.each([&](int64_t at, auto width) {
      acc x[width.value], g[width.value];
      load<width.value>(p.x + at, x);
      load<width.value>(p.grad + at, g);
#pragma unroll
      for (int i = 0; i < width.value; ++i) {
        sum[0] += g[i];
        sum[1] += g[i] * ((x[i] - mean) * rstd);
      }
    });
    c.total(sum);
    c.store_column(p.to_bias, sum[0]);
    c.store_column(p.to_weight, sum[1]);
    const acc mean_g = sum[0] / c.count, along = sum[1] / c.count * rstd;
    const acc scale = rstd * c.weight();
    c.each([&](int64_t at, auto width) {
      acc x[width.value], g[width.value];
      load<width.value>(p.x + at, x);
      load<width.value>(p.grad + at, g);
#pragma unroll
      for (int i = 0; i < width.value; ++i) {
        g[i] = scale * (g[i] - mean_g - (x[i] - mean) * along);
      }
      store<width.value>(p.out + at, g);
    });
  }
}

template <class scalar_t>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks<scalar_t>)
    batch_norm_second_kernel(const __grid_constant__ BatchNormParams<scalar_t> p) {
  using acc = acc_t<scalar_t>;
  for (int64_t work = blockIdx.x; work < p.tasks * p.slices; work += gridDim.x) {
    const Channel<scalar_t> c(p, work);
    const acc mean = c.column(p.mean, p.channels, acc(0));
    const acc rstd = c.column(p.rstd, p.channels, acc(0));
    acc sum[5] = {};  // of u, of grad, of both times the normal value, of their product
    c.each([&](int64_t at, auto width) {
      acc x[width.value], g[width.value], u[width.value];
      load<width.value>(p.x + at, x);
      load<width.value>(p.grad + at, g);
      load<width.value>(p.u + at, u);
#pragma unroll
      for (int i = 0; i < width.value; ++i) {
        const acc normal = (x[i] - mean) * rstd;
        sum[0] += u[i];
        sum[1] += g[i];
        sum[2] += u[i] * normal;
        sum[3] += g[i] * normal;
        sum[4] += u[i] * g[i];
      }
    });
    c.total(sum);
    const acc mean_u = sum[0] / c.count, mean_g = sum[1] / c.count;
    const acc along_u = sum[2] / c.count, along_g = sum[3] / c.count;
    const acc both = sum[4] / c.count - mean_u * mean_g - along_u * along_g;
    c.store_column(p.to_weight, rstd * both * c.count);
    const acc v = c.column(p.v, p.channels, acc(0)), z = c.column(p.z, p.channels, acc(0));
    const acc scale = rstd * c.weight(), curve = scale * rstd, slope = v * rstd;
    c.each([&](int64_t at, auto width) {
      acc x[width.value], g[width.value], u[width.value];
      load<width.value>(p.x + at, x);
      load<width.value>(p.grad + at, g);
      load<width.value>(p.u + at, u);
#pragma unroll
      for (int i = 0; i < width.value; ++i) {
        const acc normal = (x[i] - mean) * rstd;
        const acc of_u = u[i] - mean_u - normal * along_u;
        const acc of_g = g[i] - mean_g - normal * along_g;
        x[i] = slope * of_g - curve * (both * normal + along_g * of_u + along_u * of_g);
        g[i] = scale * of_u + v * normal + z;
      }
      store<width.value>(p.out + at, x);
      store<width.value>(p.to_grad + at, g);
    });
  }
}

}  // namespace fastmeta::task_layers::cuda
