// CPU kernels of task_conv2d: patches of a few images are laid out as the panels of a matrix
// product and multiplied at once, by the weights of the images' task.
//
// With K = C / groups * kh * kw and P positions, a group is
//   forward   out [O, P]  = weight [O, K] patches [K, P]
//   input     patches [K, P] = weight^T [K, O] grad [O, P], added up into the image
//   weight    out^T [K, O] = patches [K, P] grad^T [P, O].
// Patches are read from a copy of the image with its border of zeros, so that an element is
// somewhere at an offset that its row and its column add up to. A job owns its outputs (whole
// images, or the weights of some channels), and jobs come of shapes alone: threads change no bit.
#include <cstring>

#include "common/gemm.h"
#include "common/scratch.h"
#include "common/vec.h"
#include "task_layers/task_conv2d.h"

namespace fastmeta::task_layers::FASTMETA_ISA {

using namespace fastmeta::FASTMETA_ISA;

namespace {

constexpr int64_t kColumns = 128;   // positions multiplied at once; a multiple of every panel
constexpr int64_t kWantedJobs = 8;  // of few tasks, weights are split by channels into about that

thread_local Scratch scratch;

template <class T>
struct Plan {
  const Conv2d* args;
  int64_t group_channels, group_outputs, taps, inner, positions;
  int64_t padded_h, padded_w, plane;  // of an image with its border
  bool bordered;
  int64_t images, image_blocks;  // forward and input: images a job
  int64_t block, blocks;         // weight: channels a job, within a group

  explicit Plan(const Conv2d& a) : args(&a) {
    group_channels = a.channels / a.groups;
    group_outputs = a.outputs / a.groups;
    taps = a.kernel_h * a.kernel_w;
    inner = group_channels * taps;
    positions = a.out_h * a.out_w;
    padded_h = a.height + 2 * a.padding_h;
    padded_w = a.width + 2 * a.padding_w;
    plane = padded_h * padded_w;
    bordered = a.padding_h > 0 || a.padding_w > 0;
    images = max_of<int64_t>(1, min_of(a.rows, kColumns / positions));
    image_blocks = ceil_div(a.rows, images);
    const int64_t jobs = a.tasks * a.groups;
    block = ceil_div(group_channels, max_of<int64_t>(1, kWantedJobs / max_of<int64_t>(1, jobs)));
    blocks = ceil_div(group_channels, block);
  }
};

// Planes of `count` images, with their borders: where they begin, and how far images are apart.
template <class T>
struct Images {
  const T* data;
  int64_t stride;
};

// `channels` channels of `count` images that begin at `x`; copied to `room` if there is a border.
template <class T>
Images<T> with_borders(const Plan<T>& plan, const T* x, int64_t count, int64_t channels, T* room) {
  const Conv2d& a = *plan.args;
  const int64_t source = a.height * a.width;
  if (!plan.bordered) return {x, a.channels * source};
  std::memset(room, 0, static_cast<size_t>(count * channels * plan.plane) * sizeof(T));
  for (int64_t n = 0; n < count; ++n) {
    for (int64_t c = 0; c < channels; ++c) {
      const T* from = x + (n * a.channels + c) * source;
      T* to = room + (n * channels + c) * plan.plane + a.padding_h * plan.padded_w + a.padding_w;
      for (int64_t h = 0; h < a.height; ++h) {
        std::memcpy(to + h * plan.padded_w, from + h * a.width,
                    static_cast<size_t>(a.width) * sizeof(T));
      }
    }
  }
  return {room, channels * plan.plane};
}

// Some columns of a patch matrix: where their first element is, and which vectors of them lie side
// by side in the image.
template <class T>
struct Columns {
  int64_t count, padded;
  int64_t offset[kColumns];
  bool run[kColumns / kWidth<T>];
  // Where a column's output is, from that of the first image of the job, without its channel.
  int64_t position[kColumns];

  Columns(const Plan<T>& plan, int64_t first, int64_t n, int64_t image_stride) : count(n) {
    constexpr int kW = kWidth<T>;
    const Conv2d& a = *plan.args;
    padded = ceil_div(n, kW) * kW;
    int64_t image = first / plan.positions, at = first % plan.positions;
    int64_t h = at / a.out_w, w = at % a.out_w;
    for (int64_t j = 0; j < n; ++j) {
      offset[j] = image * image_stride + h * a.stride_h * plan.padded_w + w * a.stride_w;
      position[j] = image * a.outputs * plan.positions + h * a.out_w + w;
      if (++w == a.out_w) {
        w = 0;
        if (++h == a.out_h) {
          h = 0;
          ++image;
        }
      }
    }
    for (int64_t v = 0; v < padded / kW; ++v) {
      bool side_by_side = (v + 1) * kW <= n;
      for (int64_t i = 1; side_by_side && i < kW; ++i) {
        side_by_side = offset[v * kW + i] == offset[v * kW] + i;
      }
      run[v] = side_by_side;
    }
  }
};

// Row `r` of the patches of `channels` channels begins in the image at this offset.
template <class T>
FASTMETA_INLINE int64_t row_offset(const Plan<T>& plan, int64_t channel, int64_t tap) {
  const Conv2d& a = *plan.args;
  return channel * plan.plane + tap / a.kernel_w * a.dilation_h * plan.padded_w +
         tap % a.kernel_w * a.dilation_w;
}

// out [channels * taps, columns.padded] = patches; zero past the last column.
template <class T>
void gather_patches(const Plan<T>& plan, const T* image, int64_t channels,
                    const Columns<T>& columns, const Matrix<T>& out) {
  constexpr int kW = kWidth<T>;
  for (int64_t c = 0, r = 0; c < channels; ++c) {
    for (int64_t tap = 0; tap < plan.taps; ++tap, ++r) {
      const T* from = image + row_offset(plan, c, tap);
      for (int64_t j = 0; j < columns.padded; j += kW) {
        T* to = out.at(r, j);
        const int64_t* offset = columns.offset + j;
        if (columns.run[j / kW]) {
          store(to, load(from + offset[0]));
        } else if (j + kW <= columns.count) {
          FASTMETA_UNROLL
          for (int i = 0; i < kW; ++i) to[i] = from[offset[i]];
        } else {
          for (int i = 0; i < kW; ++i) to[i] = j + i < columns.count ? from[offset[i]] : T(0);
        }
      }
    }
  }
}

// Adds patches to the image that they are of: the adjoint of gather_patches.
template <class T>
void scatter_patches(const Plan<T>& plan, const Matrix<T>& patches, int64_t channels,
                     const Columns<T>& columns, T* image) {
  constexpr int kW = kWidth<T>;
  for (int64_t c = 0, r = 0; c < channels; ++c) {
    for (int64_t tap = 0; tap < plan.taps; ++tap, ++r) {
      T* to = image + row_offset(plan, c, tap);
      for (int64_t j = 0; j < columns.padded; j += kW) {
        const T* from = patches.at(r, j);
        const int64_t* offset = columns.offset + j;
        if (columns.run[j / kW]) {
          store(to + offset[0], load(to + offset[0]) + load(from));
        } else {
          const int64_t n = min_of<int64_t>(kW, columns.count - j);
          for (int64_t i = 0; i < n; ++i) to[offset[i]] += from[i];
        }
      }
    }
  }
}

template <class T>
T* bias_of(const Conv2d& a, int64_t task) {
  return a.bias.data == nullptr
             ? nullptr
             : static_cast<T*>(const_cast<void*>(a.bias.data)) + task * a.bias.stride;
}

template <class T>
const T* part(const PerTask& tensor, int64_t task) {
  return static_cast<const T*>(tensor.data) + task * tensor.stride;
}

// ---- forward: a job is some images of a task.
template <class T>
void forward_job(const Plan<T>& plan, int64_t job) {
  const Conv2d& a = *plan.args;
  const int64_t task = job / plan.image_blocks, first = job % plan.image_blocks * plan.images;
  const int64_t count = min_of(plan.images, a.rows - first);
  const int64_t border = plan.bordered ? count * a.channels * plan.plane : 0;
  scratch.reset(Scratch::size_of<T>(border) + Scratch::size_of<T>(plan.inner * kColumns) +
                Scratch::size_of<T>(plan.group_outputs * kColumns));
  T* room = scratch.take<T>(border);
  T* patches = scratch.take<T>(plan.inner * kColumns);
  T* result = scratch.take<T>(plan.group_outputs * kColumns);
  const int64_t size = a.channels * a.height * a.width;
  const auto images =
      with_borders(plan, part<T>(a.x, task) + first * size, count, a.channels, room);
  const T* weight = part<T>(a.weight, task);
  const T* bias = bias_of<T>(a, task);
  T* out = static_cast<T*>(a.out) + (task * a.rows + first) * a.outputs * plan.positions;
  for (int64_t j = 0; j < count * plan.positions; j += kColumns) {
    const Columns<T> columns(plan, j, min_of(kColumns, count * plan.positions - j), images.stride);
    const Matrix<T> b{patches, plan.inner, columns.padded, 0};
    const Matrix<T> c{result, plan.group_outputs, columns.padded, kColumns};
    for (int64_t g = 0; g < a.groups; ++g) {
      gather_patches(plan, images.data + g * plan.group_channels * plan.plane, plan.group_channels,
                     columns, b);
      const int64_t o0 = g * plan.group_outputs;
      gemm<T>(plan.group_outputs, plan.inner, weight + o0 * plan.inner, plan.inner, 1,
              {b.data, b.rows, b.cols, 0}, c);
      for (int64_t o = 0; o < plan.group_outputs; ++o) {
        const T* from = result + o * kColumns;
        T* to = out + (o0 + o) * plan.positions;
        const T shift = bias == nullptr ? T(0) : bias[o0 + o];
        for (int64_t i = 0; i < columns.count; ++i) to[columns.position[i]] = from[i] + shift;
      }
    }
  }
}

// ---- gradient to the input: a job is some images of a task.
template <class T>
void input_job(const Plan<T>& plan, int64_t job) {
  const Conv2d& a = *plan.args;
  const int64_t task = job / plan.image_blocks, first = job % plan.image_blocks * plan.images;
  const int64_t count = min_of(plan.images, a.rows - first);
  const int64_t border = count * a.channels * plan.plane;
  scratch.reset(Scratch::size_of<T>(border) + Scratch::size_of<T>(plan.inner * kColumns) +
                Scratch::size_of<T>(plan.group_outputs * kColumns));
  T* image = scratch.take<T>(border);
  T* patches = scratch.take<T>(plan.inner * kColumns);
  T* gathered = scratch.take<T>(plan.group_outputs * kColumns);
  std::memset(image, 0, static_cast<size_t>(border) * sizeof(T));
  const T* weight = part<T>(a.weight, task);
  const T* grad = part<T>(a.grad, task) + first * a.outputs * plan.positions;
  for (int64_t j = 0; j < count * plan.positions; j += kColumns) {
    const Columns<T> columns(plan, j, min_of(kColumns, count * plan.positions - j),
                             a.channels * plan.plane);
    const Matrix<T> c{patches, plan.inner, columns.padded, 0};
    for (int64_t g = 0; g < a.groups; ++g) {
      const int64_t o0 = g * plan.group_outputs;
      for (int64_t o = 0; o < plan.group_outputs; ++o) {
        const T* from = grad + (o0 + o) * plan.positions;
        T* to = gathered + o * kColumns;
        for (int64_t i = 0; i < columns.count; ++i) to[i] = from[columns.position[i]];
        for (int64_t i = columns.count; i < columns.padded; ++i) to[i] = T(0);
      }
      gemm<T>(plan.inner, plan.group_outputs, weight + o0 * plan.inner, 1, plan.inner,
              {gathered, plan.group_outputs, columns.padded, kColumns}, c);
      scatter_patches(plan, c, plan.group_channels, columns,
                      image + g * plan.group_channels * plan.plane);
    }
  }
  T* out = static_cast<T*>(a.out) + (task * a.rows + first) * a.channels * a.height * a.width;
  for (int64_t c = 0; c < count * a.channels; ++c) {
    const T* from = image + c * plan.plane + a.padding_h * plan.padded_w + a.padding_w;
    for (int64_t h = 0; h < a.height; ++h) {
      std::memcpy(out + (c * a.height + h) * a.width, from + h * plan.padded_w,
                  static_cast<size_t>(a.width) * sizeof(T));
    }
  }
}

// ---- gradient to the weights: a job is some input channels of a group of a task.
template <class T>
void weight_job(const Plan<T>& plan, int64_t job) {
  const Conv2d& a = *plan.args;
  const int64_t block = job % plan.blocks, group = job / plan.blocks % a.groups;
  const int64_t task = job / plan.blocks / a.groups;
  const int64_t c0 = block * plan.block;
  const int64_t channels = min_of(plan.block, plan.group_channels - c0);
  const int64_t inner = channels * plan.taps, outputs = padded<T>(plan.group_outputs);
  const int64_t border = plan.bordered ? plan.images * channels * plan.plane : 0;
  scratch.reset(Scratch::size_of<T>(border) + Scratch::size_of<T>(inner * kColumns) +
                Scratch::size_of<T>(outputs * kColumns) + Scratch::size_of<T>(inner * outputs));
  T* room = scratch.take<T>(border);
  T* patches = scratch.take<T>(inner * kColumns);
  T* transposed = scratch.take<T>(outputs * kColumns);
  T* sum = scratch.take<T>(inner * outputs);
  std::memset(sum, 0, static_cast<size_t>(inner * outputs) * sizeof(T));
  const Matrix<T> c{sum, inner, outputs, 0};
  const int64_t first_channel = group * plan.group_channels + c0, size = a.height * a.width;
  const T* x = part<T>(a.x, task) + first_channel * size;
  const T* grad = part<T>(a.grad, task) + group * plan.group_outputs * plan.positions;
  for (int64_t first = 0; first < a.rows; first += plan.images) {
    const int64_t count = min_of(plan.images, a.rows - first);
    const auto images = with_borders(plan, x + first * a.channels * size, count, channels, room);
    const T* g = grad + first * a.outputs * plan.positions;
    for (int64_t j = 0; j < count * plan.positions; j += kColumns) {
      const Columns<T> columns(plan, j, min_of(kColumns, count * plan.positions - j),
                               images.stride);
      gather_patches(plan, images.data, channels, columns,
                     Matrix<T>{patches, inner, columns.padded, kColumns});
      const Matrix<T> b{transposed, columns.count, outputs, 0};
      for (int64_t o = 0; o < outputs; ++o) {
        const int64_t stride = b.stride(b.panel_of(o));
        T* to = b.at(0, o);
        const T* from = g + o * plan.positions;
        if (o < plan.group_outputs) {
          for (int64_t i = 0; i < columns.count; ++i) to[i * stride] = from[columns.position[i]];
        } else {
          for (int64_t i = 0; i < columns.count; ++i) to[i * stride] = T(0);
        }
      }
      GemmStart<T> start;
      start.from = sum;
      gemm<T>(inner, columns.count, patches, kColumns, 1, {b.data, b.rows, b.cols, 0}, c, start);
    }
  }
  T* out = static_cast<T*>(a.out) +
           ((task * a.groups + group) * plan.group_outputs * plan.group_channels + c0) * plan.taps;
  for (int64_t o = 0; o < plan.group_outputs; ++o) {
    const int64_t stride = c.stride(c.panel_of(o));
    const T* from = c.at(0, o);
    T* to = out + o * plan.inner;
    for (int64_t r = 0; r < inner; ++r) to[r] = from[r * stride];
  }
}

template <class T, void (*kJob)(const Plan<T>&, int64_t)>
void run(const Conv2d& args, int64_t jobs, ParallelFor par, const Plan<T>& plan) {
  const double work = 2.0 * static_cast<double>(args.rows) * static_cast<double>(plan.positions) *
                      static_cast<double>(plan.inner) * static_cast<double>(args.outputs) *
                      static_cast<double>(args.tasks) / static_cast<double>(jobs);
  const int64_t grain = max_of<int64_t>(1, static_cast<int64_t>(2e5 / (work + 1.0)));
  par(
      jobs, grain,
      [](void* context, int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j) kJob(*static_cast<const Plan<T>*>(context), j);
      },
      const_cast<Plan<T>*>(&plan));
}

template <class T>
void run_images(const Conv2d& args, ParallelFor par, bool forward) {
  const Plan<T> plan(args);
  const int64_t jobs = args.tasks * plan.image_blocks;
  if (jobs == 0) return;
  if (forward) {
    run<T, forward_job<T>>(args, jobs, par, plan);
  } else {
    run<T, input_job<T>>(args, jobs, par, plan);
  }
}

template <class T>
void run_weight(const Conv2d& args, ParallelFor par) {
  const Plan<T> plan(args);
  const int64_t jobs = args.tasks * args.groups * plan.blocks;
  if (jobs > 0) run<T, weight_job<T>>(args, jobs, par, plan);
}

}  // namespace

void conv2d(const Conv2d& args, ParallelFor par) {
  args.dtype == DType::kFloat64 ? run_images<double>(args, par, true)
                                : run_images<float>(args, par, true);
}

void conv2d_input(const Conv2d& args, ParallelFor par) {
  args.dtype == DType::kFloat64 ? run_images<double>(args, par, false)
                                : run_images<float>(args, par, false);
}

void conv2d_weight(const Conv2d& args, ParallelFor par) {
  args.dtype == DType::kFloat64 ? run_weight<double>(args, par) : run_weight<float>(args, par);
}

}  // namespace fastmeta::task_layers::FASTMETA_ISA
