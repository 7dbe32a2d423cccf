// The tile of pairs on tensor cores: dot and cosine, for 16-bit types and for float32 where TF32 is
// allowed. Same tile and threads as matching_tile_kernel.cuh; what differs is who holds which sums.
//
// Warp w computes rows 16 * (w % 4) and on, columns 32 * (w / 4) and on, as 4 products of 16 x 8.
// Both sides lie in shared memory by rows, 16 words of a row a chunk: 32 features of 16-bit types,
// 16 of float32.
//
// - 16-bit products are exact and summed in float32. Cosine multiplies the sums by both inverse
//   lengths; where products could leave the range of float32, which float16 has not, rows are first
//   scaled by powers of two, which is exact
// - roofline: 2 * 64 * 64 * D FLOPs a tile for 2 * 64 * D * b bytes from L2: 32 FLOPs a byte in
//   16-bit types, below the ridge of A100's tensor cores (312 TFLOP/s at about 5 TB/s: 62) and
//   H100's (989 at 5.5: 180). Hence bound by L2, at 160 and 176 TFLOP/s; FP32 units have 19.5, 67
// - banks: a row is 16 words and 4 of padding: the words of an mma, 8 rows by 4 neighbours, lie in
//   32 different banks. Sums go to shared memory in pairs, two ways in conflict
// - vector width: 8 bytes of a 16-bit type and 16 of float32 a load
#pragma once
#include "common/mma.cuh"
#include "matching/matching_tile_kernel.cuh"

namespace fastmeta::matching::cuda {

inline constexpr int kWords = 16;  // of a row in a chunk
inline constexpr int kWordPitch = kWords + 4;
inline constexpr int kTensorTiles = kTile / 2 / kMmaColumns;  // products of a warp

template <class scalar_t>
inline constexpr int kWordScalars = sizeof(uint32_t) / sizeof(scalar_t);

struct alignas(16) TensorStage {
  uint32_t own[kTile][kWordPitch];
  uint32_t other[kTile][kWordPitch];
};

template <class Product, class acc>
using StageOf = std::conditional_t<Product::kTensor, TensorStage, Stage<acc>>;

// Dot products, and cosine by lengths applied to the sums.
struct TensorDot : DotProduct {
  static constexpr bool kTensor = true;
};

// Power of two that brings a row near length one before the product, and what then is left to do.
template <class scalar_t>
__device__ __forceinline__ float exact_scale(float factor) {
  if constexpr (std::is_same_v<scalar_t, float16>) return 1;
  return bit_cast<float>(bit_cast<uint32_t>(factor) & 0x7f800000u);
}
template <class scalar_t>
__device__ __forceinline__ float scale_left(float factor) {
  const float exact = exact_scale<scalar_t>(factor);
  return exact == 1 ? factor : (exact == 0 ? 0 : factor / exact);
}

// Four words of a row from feature k on, zeros beyond dim and for row -1.
template <class scalar_t>
__device__ __forceinline__ void fetch_words(const scalar_t* rows, int64_t row, float factor,
                                            int64_t k, int64_t dim, bool vector,
                                            uint32_t (&words)[4]) {
  constexpr int kScalars = kWordScalars<scalar_t>;
#pragma unroll
  for (int part = 0; part < kScalars; ++part) {
    float value[kPack];
    fetch_pack<false>(rows, row, 1.0f, k + part * kPack, dim, vector, value);
    const float scale = exact_scale<scalar_t>(factor);
    if constexpr (kScalars == 1) {
#pragma unroll
      for (int i = 0; i < kPack; ++i) words[i] = to_tf32(value[i] * scale);
    } else {
#pragma unroll
      for (int i = 0; i < kPack; i += 2) {
        const uint32_t low = from_acc<scalar_t>(value[i] * scale).bits;
        const uint32_t high = from_acc<scalar_t>(value[i + 1] * scale).bits;
        words[part * 2 + i / 2] = low | high << 16;
      }
    }
  }
}

// Where sum[j][e] of this thread lies in the tile.
__device__ __forceinline__ int tensor_row(int e) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  return warp % 4 * kMmaRows + lane / 4 + e / 2 * 8;
}
__device__ __forceinline__ int tensor_column(int tiles, int j, int e) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  return (warp / 4 * tiles + j) * kMmaColumns + lane % 4 * 2 + e % 2;
}

// As tile_product, in the layout of tensor_row and tensor_column.
template <class scalar_t>
__device__ __forceinline__ void tensor_product(TensorStage& stage, const scalar_t* own_rows,
                                               const Side<float>& own, const scalar_t* other_rows,
                                               const Side<float>& other, int64_t dim, bool vector,
                                               float (&sum)[kTensorTiles][4]) {
  constexpr int kFeatures = kWords * kWordScalars<scalar_t>;
  const int i = threadIdx.x / 4, word = threadIdx.x % 4 * 4;
  const int warp = threadIdx.x / kWarpSize, g = threadIdx.x % kWarpSize / 4, t = threadIdx.x % 4;
  uint32_t own_next[4], other_next[4];
  const auto fetch = [&](int64_t k0) {
    const int64_t k = k0 + word * kWordScalars<scalar_t>;
    fetch_words(own_rows, own.row[i], own.factor[i], k, dim, vector, own_next);
    fetch_words(other_rows, other.row[i], other.factor[i], k, dim, vector, other_next);
  };
#pragma unroll
  for (int j = 0; j < kTensorTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[j][e] = 0;
  }
  if (dim > 0) fetch(0);
  for (int64_t k0 = 0; k0 < dim; k0 += kFeatures) {
    __syncthreads();  // the last chunk has been read
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      stage.own[i][word + w] = own_next[w];
      stage.other[i][word + w] = other_next[w];
    }
    __syncthreads();
    if (k0 + kFeatures < dim) fetch(k0 + kFeatures);
#pragma unroll
    for (int w0 = 0; w0 < kWords; w0 += kMmaWords) {
      const uint32_t (*rows)[kWordPitch] = &stage.own[warp % 4 * kMmaRows + g];
      const uint32_t a[4] = {rows[0][w0 + t], rows[8][w0 + t], rows[0][w0 + t + 4],
                             rows[8][w0 + t + 4]};
#pragma unroll
      for (int j = 0; j < kTensorTiles; ++j) {
        const uint32_t* column = stage.other[(warp / 4 * kTensorTiles + j) * kMmaColumns + g];
        const uint32_t b[2] = {column[w0 + t], column[w0 + t + 4]};
        mma<scalar_t>(sum[j], a, b);
      }
    }
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const float row_scale = scale_left<scalar_t>(own.factor[tensor_row(e)]);
#pragma unroll
    for (int j = 0; j < kTensorTiles; ++j) {
      const int column = tensor_column(kTensorTiles, j, e);
      sum[j][e] *= row_scale * scale_left<scalar_t>(other.factor[column]);
    }
  }
}

}  // namespace fastmeta::matching::cuda
