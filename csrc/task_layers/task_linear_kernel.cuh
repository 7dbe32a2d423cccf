// The matrix product that task_linear and the three ops of task_conv2d are: of each task and group
//
//   out [rows, columns] = left [rows, depth] right [columns, depth]^T (+ bias)
//
// with operands that are read through strides (Matrix) or gathered from images (Patches, in
// task_conv2d_kernel.cuh): an implicit product, whose patches nowhere exist as a whole.
//
// A block of 256 threads computes a tile of 64 x 64. The depth passes through shared memory in
// chunks, fetched into registers while the chunk before is multiplied. On FP32 (FP64) units a chunk
// is 16 deep and laid out [depth][row], and a thread sums 4 x 4 products from two 16-byte loads a
// step; on tensor cores (16-bit types, and float32 where TF32 is allowed) a chunk is 16 words a row
// and a warp sums 16 x 32 as four mma. Where tiles are few and sums long, the depth is split into
// parts by the shapes alone; their sums are added in order by sum_parts_kernel. No output has two
// writers, no sum depends on the schedule.
//
// - bytes: b * 64 * 2 * depth a tile from L2, of which each operand comes once from memory while it
//   fits L2; outputs are written once. Parts write and read 4 bytes more an output each, 8 MB at
//   most: there are fewer than 512 tiles then
// - FLOPs: 2 * rows * columns * depth; 2 * 64 * 64 for 2 * 64 * b bytes a step: 16 FLOPs a byte of
//   float32. The FP32 units' ridge over L2 is 4 on A100 (19.5 TFLOP/s, about 5 TB/s) and 12 on
//   H100 (67, 5.5): bound by FP32 units. On tensor cores 32 FLOPs a byte of 16-bit types are below
//   the ridge (62 and 180): bound by L2, at 160 and 176 TFLOP/s. A product of few rows, as in the
//   weights' gradient from 5 to 25 supports, has 2 * depth / b FLOPs a byte written: bound by
//   memory (2.0 TB/s, 3.35)
// - tile: few-shot layers have 25 to 100 rows and 64 outputs; larger tiles would idle
// - access: `across`, neighbouring lanes read neighbouring rows of one step of the depth, 16 rows
//   at a time, one element a load; else a thread reads 4 neighbours along the depth of one row,
//   by 16 bytes of float32 (8 of 16-bit types) where `vector` says so. The launcher picks by which
//   stride is one
// - banks: the pitch of 68 elements makes reads of a step 16 bytes from neighbouring lanes or one
//   address; stores conflict two ways, once in 64 products. Rows of 16 words and 4 of padding put
//   the words of an mma into 32 banks; stores conflict two ways
#pragma once
#include "common/mma.cuh"

namespace fastmeta::task_layers::cuda {

using namespace ::fastmeta::device;  // NOLINT(build/namespaces): device code

inline constexpr int kThreads = 256;
inline constexpr int kTile = 64;
inline constexpr int kAcross = kTile / 4;  // threads along a side of the tile
inline constexpr int kSteps = 16;          // rows of a stage on FP32 units, words on tensor cores
inline constexpr int kPitch = kTile + 4;   // elements from one step to the next
inline constexpr int kWordPitch = kSteps + 4;               // words from one row to the next
inline constexpr int kWarpTiles = kTile / 2 / kMmaColumns;  // products of a warp: 16 x 32
static_assert(kThreads == kAcross * kAcross && kTile * kSteps == kThreads * kPack);
static_assert(kThreads / kWarpSize == 2 * (kTile / kMmaRows) && kWarpTiles == 4);

// Blocks a multiprocessor that registers must leave room for.
template <class scalar_t>
inline constexpr int kProductBlocks = std::is_same_v<scalar_t, double> ? 1 : 2;

// Packs that a thread fetches of either side for a chunk; a chunk is kSteps * kFetches deep.
template <class scalar_t, bool kTensor>
inline constexpr int kFetches = kTensor ? static_cast<int>(sizeof(uint32_t) / sizeof(scalar_t)) : 1;

inline constexpr int kDeepestChunk = 2 * kSteps;  // parts begin at its multiples

// ---- operands -----------------------------------------------------------------------------------

// Element (row, k) of a task and group lies at row * this->row + k / inner * outer + k % inner *
// column.
template <class scalar_t>
struct Matrix {
  const scalar_t* data;
  int64_t task, group, row, outer, column, inner;
  bool across, vector;

  class Reader;
};

// Where element k of the depth (or of an output's columns) lies in its row.
__device__ __forceinline__ int64_t offset_of(int64_t k, int64_t inner, int64_t outer,
                                             int64_t column) {
  if (k < inner) return k * column;
  const int64_t whole = divide(k, inner);
  return whole * outer + (k - whole * inner) * column;
}

// What a thread reads of an operand for one tile: of rows first + kAcross * e (across), or of row
// `first`. Zeros beyond the last row and the end of the depth.
template <class scalar_t>
class Matrix<scalar_t>::Reader {
 public:
  __device__ __forceinline__ Reader(const Matrix& from, int64_t task, int64_t group, int64_t first,
                                    int64_t rows)
      : from_(from),
        own_(from.data + task * from.task + group * from.group + first * from.row),
        left_(rows - first) {}

  __device__ __forceinline__ void read(int64_t k, int64_t end, scalar_t (&value)[kPack]) const {
    if (from_.across) {
      const int64_t offset = offset_of(k, from_.inner, from_.outer, from_.column);
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        const bool there = k < end && kAcross * e < left_;
        value[e] = there ? own_[kAcross * e * from_.row + offset] : scalar_t{};
      }
    } else if (from_.vector && k < end && left_ > 0) {
      const int64_t offset = offset_of(k, from_.inner, from_.outer, 1);
      const Pack<scalar_t> pack = *reinterpret_cast<const Pack<scalar_t>*>(own_ + offset);
#pragma unroll
      for (int e = 0; e < kPack; ++e) value[e] = pack.v[e];
    } else {
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        const bool there = k + e < end && left_ > 0;
        value[e] =
            there ? own_[offset_of(k + e, from_.inner, from_.outer, from_.column)] : scalar_t{};
      }
    }
  }

 private:
  const Matrix& from_;
  const scalar_t* own_;
  int64_t left_;
};

template <class scalar_t>
struct Result {
  scalar_t* data;
  int64_t task, group, row, outer, inner;  // as of a Matrix, columns side by side
  bool vector;                             // packs of neighbouring columns
  const scalar_t* bias;                    // or nullptr
  int64_t bias_task, bias_group, bias_row, bias_column;
  acc_t<scalar_t>* partial;  // [parts, size], or nullptr: there is one part
  int64_t size;              // elements of all tasks
};

template <class scalar_t, class Right>
struct ProductParams {
  int64_t tasks, groups, parts, row_tiles, column_tiles;
  int64_t rows, columns, depth, part_depth;
  Matrix<scalar_t> left;
  Right right;
  Result<scalar_t> out;
};

// ---- stages -------------------------------------------------------------------------------------

template <class acc>
struct alignas(16) PlainStage {
  acc left[kSteps][kPitch];
  acc right[kSteps][kPitch];
};

struct alignas(16) TensorStage {
  uint32_t left[kTile][kWordPitch];
  uint32_t right[kTile][kWordPitch];
};

// Row and depth of the first element that this thread fetches of a chunk. Fetch f holds, across,
// depth + f of rows row + kAcross * e, else depth + kPack * f + e of that row.
template <int kCount>
struct Share {
  int row, depth;

  __device__ __forceinline__ explicit Share(bool across)
      : row(across ? threadIdx.x % kAcross : threadIdx.x / (kSteps / kPack)),
        depth((across ? threadIdx.x / kAcross : threadIdx.x % (kSteps / kPack) * kPack) * kCount) {}

  template <class Reader, class scalar_t>
  __device__ __forceinline__ void fetch(const Reader& reader, bool across, int64_t k0, int64_t end,
                                        scalar_t (&value)[kCount][kPack]) const {
#pragma unroll
    for (int f = 0; f < kCount; ++f) {
      reader.read(k0 + depth + (across ? f : kPack * f), end, value[f]);
    }
  }

  template <class scalar_t, class acc>
  __device__ __forceinline__ void put(bool across, const scalar_t (&value)[1][kPack],
                                      acc (&side)[kSteps][kPitch]) const {
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      side[across ? depth : depth + e][across ? row + kAcross * e : row] = to_acc(value[0][e]);
    }
  }

  // A word is one TF32 number, or two neighbours along the depth.
  template <class scalar_t>
  __device__ __forceinline__ void put(bool across, const scalar_t (&value)[kCount][kPack],
                                      uint32_t (&side)[kTile][kWordPitch]) const {
    const int word = depth / kCount;
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      uint32_t bits;
      if constexpr (kCount == 1) {
        bits = to_tf32(value[0][e]);
      } else {
        const int f = e / 2, i = e % 2 * 2;
        const scalar_t low = across ? value[0][e] : value[f][i];
        const scalar_t high = across ? value[1][e] : value[f][i + 1];
        bits = low.bits | static_cast<uint32_t>(high.bits) << 16;
      }
      side[across ? row + kAcross * e : row][across ? word : word + e] = bits;
    }
  }
};

template <class acc>
__device__ __forceinline__ void multiply(const PlainStage<acc>& stage, acc (&sum)[4][4]) {
  const int ty = threadIdx.x / kAcross, tx = threadIdx.x % kAcross;
#pragma unroll 8
  for (int k = 0; k < kSteps; ++k) {
    const Pack<acc> left = *reinterpret_cast<const Pack<acc>*>(&stage.left[k][ty * 4]);
    const Pack<acc> right = *reinterpret_cast<const Pack<acc>*>(&stage.right[k][tx * 4]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[i][j] += left.v[i] * right.v[j];
    }
  }
}

template <class scalar_t>
__device__ __forceinline__ void multiply(const TensorStage& stage, float (&sum)[4][4]) {
  const int warp = threadIdx.x / kWarpSize, g = threadIdx.x % kWarpSize / 4, t = threadIdx.x % 4;
  const uint32_t (*rows)[kWordPitch] = &stage.left[warp % 4 * kMmaRows + g];
#pragma unroll
  for (int w = 0; w < kSteps; w += kMmaWords) {
    const uint32_t a[4] = {rows[0][w + t], rows[8][w + t], rows[0][w + t + 4], rows[8][w + t + 4]};
#pragma unroll
    for (int j = 0; j < kWarpTiles; ++j) {
      const uint32_t* column = stage.right[(warp / 4 * kWarpTiles + j) * kMmaColumns + g];
      const uint32_t b[2] = {column[w + t], column[w + t + 4]};
      mma<scalar_t>(sum[j], a, b);
    }
  }
}

// ---- results ------------------------------------------------------------------------------------

template <class T, int width>
struct alignas(sizeof(T) * width < 16 ? sizeof(T) * width : 16) Neighbours {
  T v[width];
};

// Writes `width` neighbouring columns of a row.
template <int width, class scalar_t, class Params>
__device__ __forceinline__ void write(const Params& p, int64_t task, int64_t group, int64_t part,
                                      int64_t row, int64_t column,
                                      const acc_t<scalar_t> (&sum)[width]) {
  using acc = acc_t<scalar_t>;
  const Result<scalar_t>& out = p.out;
  if (row >= p.rows || column >= p.columns) return;
  acc value[width];
#pragma unroll
  for (int i = 0; i < width; ++i) {
    value[i] = sum[i];
    if (out.bias != nullptr && part == 0 && column + i < p.columns) {
      value[i] += to_acc(out.bias[task * out.bias_task + group * out.bias_group +
                                  row * out.bias_row + (column + i) * out.bias_column]);
    }
  }
  const int64_t base = task * out.task + group * out.group + row * out.row;
  if (out.vector) {
    const int64_t offset = base + offset_of(column, out.inner, out.outer, 1);
    if (out.partial != nullptr) {
      Neighbours<acc, width> pack;
#pragma unroll
      for (int i = 0; i < width; ++i) pack.v[i] = value[i];
      *reinterpret_cast<Neighbours<acc, width>*>(out.partial + part * out.size + offset) = pack;
    } else {
      Neighbours<scalar_t, width> pack;
#pragma unroll
      for (int i = 0; i < width; ++i) pack.v[i] = from_acc<scalar_t>(value[i]);
      *reinterpret_cast<Neighbours<scalar_t, width>*>(out.data + offset) = pack;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < width; ++i) {
    if (column + i >= p.columns) break;
    const int64_t offset = base + offset_of(column + i, out.inner, out.outer, 1);
    if (out.partial != nullptr) {
      out.partial[part * out.size + offset] = value[i];
    } else {
      out.data[offset] = from_acc<scalar_t>(value[i]);
    }
  }
}

// ---- kernels ------------------------------------------------------------------------------------

template <class scalar_t, class Right, bool kTensor>
__global__ void __launch_bounds__(kThreads, kProductBlocks<scalar_t>)
    product_kernel(const __grid_constant__ ProductParams<scalar_t, Right> p) {
  using acc = acc_t<scalar_t>;
  constexpr int kCount = kFetches<scalar_t, kTensor>;
  using Stage = std::conditional_t<kTensor, TensorStage, PlainStage<acc>>;
  FASTMETA_SHARED(Stage, stage);
  const Share<kCount> left_share(p.left.across), right_share(p.right.across);

  const int64_t tiles = p.row_tiles * p.column_tiles;
  const int64_t work_items = p.tasks * p.groups * p.parts * tiles;
  for (int64_t work = blockIdx.x; work < work_items; work += gridDim.x) {
    int64_t rest = divide(work, tiles);
    const int64_t tile = work - rest * tiles, tile_row = divide(tile, p.column_tiles);
    const int64_t row0 = tile_row * kTile, column0 = (tile - tile_row * p.column_tiles) * kTile;
    const int64_t batch = divide(rest, p.parts), part = rest - batch * p.parts;
    const int64_t task = divide(batch, p.groups), group = batch - task * p.groups;
    const int64_t begin = part * p.part_depth;
    const int64_t end = p.depth - begin < p.part_depth ? p.depth : begin + p.part_depth;

    const typename Matrix<scalar_t>::Reader left(p.left, task, group, row0 + left_share.row,
                                                 p.rows);
    const typename Right::Reader right(p.right, task, group, column0 + right_share.row, p.columns);
    scalar_t left_next[kCount][kPack], right_next[kCount][kPack];
    const auto fetch = [&](int64_t k0) {
      left_share.fetch(left, p.left.across, k0, end, left_next);
      right_share.fetch(right, p.right.across, k0, end, right_next);
    };
    acc sum[4][4] = {};
    if (begin < end) fetch(begin);
    for (int64_t k0 = begin; k0 < end; k0 += kSteps * kCount) {
      __syncthreads();  // the last chunk has been read
      left_share.put(p.left.across, left_next, stage.left);
      right_share.put(p.right.across, right_next, stage.right);
      __syncthreads();
      if (k0 + kSteps * kCount < end) fetch(k0 + kSteps * kCount);
      if constexpr (kTensor) {
        multiply<scalar_t>(stage, sum);
      } else {
        multiply(stage, sum);
      }
    }

    if constexpr (kTensor) {
      const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
      const int64_t row = row0 + warp % 4 * kMmaRows + lane / 4;
      const int64_t column = column0 + warp / 4 * kWarpTiles * kMmaColumns + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < kWarpTiles; ++j) {
        const acc upper[2] = {sum[j][0], sum[j][1]}, lower[2] = {sum[j][2], sum[j][3]};
        write<2, scalar_t>(p, task, group, part, row, column + j * kMmaColumns, upper);
        write<2, scalar_t>(p, task, group, part, row + 8, column + j * kMmaColumns, lower);
      }
    } else {
      const int64_t row = row0 + threadIdx.x / kAcross * 4;
      const int64_t column = column0 + threadIdx.x % kAcross * 4;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        write<4, scalar_t>(p, task, group, part, row + i, column, sum[i]);
      }
    }
  }
}

// out = the sum of the parts, in their order. A thread an element: bound by memory.
template <class scalar_t>
__global__ void __launch_bounds__(kThreads)
    sum_parts_kernel(const acc_t<scalar_t>* __restrict__ partial, int64_t parts, int64_t size,
                     scalar_t* __restrict__ out) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (; i < size; i += stride) {
    acc_t<scalar_t> sum = partial[i];
    for (int64_t part = 1; part < parts; ++part) sum += partial[part * size + i];
    out[i] = from_acc<scalar_t>(sum);
  }
}

}  // namespace fastmeta::task_layers::cuda
