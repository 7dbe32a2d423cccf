// Device code of task_conv2d and its adjoints: the operand of task_linear_kernel.cuh that is
// gathered from images, so that each of them is one matrix product a task and group.
//
//   forward  out [O, positions] = weight [O, C kh kw] patches [positions, C kh kw]^T
//   input    out [C, positions of x] = weight [C, O kh kw] patches of grad [.., O kh kw]^T
//   weight   out [O, C kh kw] = grad [O, positions] patches [C kh kw, positions]^T
//
// where a patch of grad is what reached a position of x, one output a tap or none: every element of
// x has one owner, which sums over the taps in their order. With a stride s, only one tap in s_h
// s_w reaches; the others are multiplied as zeros, which an infinite or NaN weight makes NaN there
// too.
//
// - tiles, banks: as of the product, with patches in place of its right operand
// - FLOPs, bytes: 3 x 3 windows from 64 to 64 channels have 2 * 9 * 64 FLOPs for 2 b bytes of
//   memory, 144 a byte of float32, beyond the ridge of FP32 units (10 on A100, 20 on H100): bound
//   by those. What is read again for every tap comes from L1 or L2. On tensor cores (ridges of 156
//   and 295, of 288 a byte of 16-bit types) the gather is what bounds: about 12 instructions an
//   element for 8 elements a thread and chunk, 190 cycles a block at 4 a cycle, where its mma take
//   128 on A100 and 64 on H100
// - access: where positions are rows, neighbouring lanes read neighbouring positions; else a thread
//   reads 4 neighbouring positions of one tap. Single elements, for patches know no alignment
// - a thread's rows are placed once a tile, and the depth once a fetch: two divisions for four
//   elements
#pragma once
#include "task_layers/task_linear_kernel.cuh"

namespace fastmeta::task_layers::cuda {

// One of the two dimensions of an image. Position p and tap i meet at element (p * scale + i * step
// + shift) / ratio, where that is whole and inside.
struct Axis {
  int size, taps, positions;
  int scale, step, shift, ratio;
};

template <class scalar_t>
struct Patches {
  const scalar_t* data;
  int64_t task, group, image, plane;  // strides; a row of an image is contiguous
  Axis h, w;
  bool across;  // rows are positions and the depth runs over taps, or the other way round

  class Reader;
};

template <class scalar_t>
class Patches<scalar_t>::Reader {
 public:
  __device__ __forceinline__ Reader(const Patches& from, int64_t task, int64_t group, int64_t first,
                                    int64_t rows)
      : from_(from), data_(from.data + task * from.task + group * from.group) {
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      own_[e] = nowhere();
      if (from.across) {
        const int64_t row = first + kAcross * e;
        if (row < rows) own_[e] = Position(from, row).site(from);
      } else if (e == 0 && first < rows) {
        own_[e] = tap(from, first);
      }
    }
  }

  __device__ __forceinline__ void read(int64_t k, int64_t end, scalar_t (&value)[kPack]) const {
    if (from_.across) {
      const Site of_depth = k < end ? tap(from_, k) : nowhere();
#pragma unroll
      for (int e = 0; e < kPack; ++e) value[e] = at(own_[e], of_depth);
    } else {
      Position position(from_, k);
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        value[e] = at(own_[0], k + e < end ? position.site(from_) : nowhere());
        position.advance(from_);
      }
    }
  }

 private:
  // What a row and a step of the depth add up to.
  struct Site {
    int y, x;  // times the ratio
    int64_t offset;
  };

  struct Position {
    int64_t image;
    int h, w;

    __device__ __forceinline__ Position(const Patches& from, int64_t index) {
      const int64_t line = divide(index, from.w.positions);
      image = divide(line, from.h.positions);
      h = static_cast<int>(line - image * from.h.positions);
      w = static_cast<int>(index - line * from.w.positions);
    }
    __device__ __forceinline__ Site site(const Patches& from) const {
      return {h * from.h.scale + from.h.shift, w * from.w.scale + from.w.shift, image * from.image};
    }
    __device__ __forceinline__ void advance(const Patches& from) {
      if (++w < from.w.positions) return;
      w = 0;
      if (++h < from.h.positions) return;
      h = 0;
      ++image;
    }
  };

  static __device__ __forceinline__ Site tap(const Patches& from, int64_t index) {
    const int64_t line = divide(index, from.w.taps), channel = divide(line, from.h.taps);
    const int i = static_cast<int>(line - channel * from.h.taps);
    const int j = static_cast<int>(index - line * from.w.taps);
    return {i * from.h.step, j * from.w.step, channel * from.plane};
  }

  // Two of them add up to the least integer, one and any other to a negative one.
  static __device__ __forceinline__ Site nowhere() { return {-(1 << 30), 0, 0}; }

  // The element of an axis, or -1.
  static __device__ __forceinline__ int element(int scaled, const Axis& axis) {
    if (axis.ratio == 1) return scaled < axis.size ? scaled : -1;
    const int whole = scaled / axis.ratio;
    return scaled >= 0 && whole < axis.size && whole * axis.ratio == scaled ? whole : -1;
  }

  __device__ __forceinline__ scalar_t at(const Site& row, const Site& depth) const {
    const int y = element(row.y + depth.y, from_.h), x = element(row.x + depth.x, from_.w);
    if (y < 0 || x < 0) return scalar_t{};
    return data_[row.offset + depth.offset + static_cast<int64_t>(y) * from_.w.size + x];
  }

  const Patches& from_;
  const scalar_t* data_;
  Site own_[kPack];
};

}  // namespace fastmeta::task_layers::cuda
