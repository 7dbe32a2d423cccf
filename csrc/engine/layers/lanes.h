// Loops that the layers share: over elements, over blocks of channels, over lanes that count.
#pragma once
#include <cstring>
#include <type_traits>

#include "engine/layer.h"

namespace fastmeta::engine::FASTMETA_ISA {

// v where the mask is set, zeros elsewhere, whatever v is there.
template <class T>
FASTMETA_INLINE Vec<T> where(IntVec<T> mask, Vec<T> v) {
  return from_bits<T>(bits_of<T>(v) & mask);
}

// The first n lanes of v, zeros behind them; n may be more than there are, or negative.
template <class T>
FASTMETA_INLINE Vec<T> keep_first(Vec<T> v, int64_t n) {
  if (n >= kWidth<T>) return v;
  return where<T>(lane_numbers<T>() < static_cast<int>(max_of<int64_t>(n, 0)), v);
}

// What a cotangent's place receives: written, or added.
template <class T>
FASTMETA_INLINE void give(T* to, Vec<T> v, bool add) {
  store(to, add ? load(to) + v : v);
}
template <class T>
FASTMETA_INLINE void accumulate(T* to, Vec<T> v) {
  store(to, load(to) + v);
}

// A parameter that may be absent.
template <class T>
FASTMETA_INLINE Vec<T> load_or(const T* p, int64_t at, T otherwise) {
  return p != nullptr ? load(p + at) : splat<T>(otherwise);
}

// body(std::integral_constant<int, N>, channel) for blocks of N <= kMost vectors of channels, so
// that what belongs to the channels stays in registers while a loop walks the pixels.
template <class T, int kMost, class Body>
FASTMETA_INLINE void over_channels(int64_t ld, Body&& body) {
  constexpr int64_t kW = kWidth<T>;
  int64_t c = 0;
  for (; c + kMost * kW <= ld; c += kMost * kW) body(std::integral_constant<int, kMost>{}, c);
  if constexpr (kMost > 2) {
    for (; c + 2 * kW <= ld; c += 2 * kW) body(std::integral_constant<int, 2>{}, c);
  }
  if constexpr (kMost > 1) {
    for (; c < ld; c += kW) body(std::integral_constant<int, 1>{}, c);
  }
}

// body(std::integral_constant<int, N>, channel, begin, end) for tiles of kPixels of n pixels and N
// <= kMost vectors of channels. Tiles of the same pixels follow each other: memory is read in
// order, and once, though a block of channels takes but parts of its lines.
template <class T, int kMost, int64_t kPixels, class Body>
FASTMETA_INLINE void over_tiles(int64_t n, int64_t ld, Body&& body) {
  for (int64_t begin = 0; begin < n; begin += kPixels) {
    const int64_t end = min_of(begin + kPixels, n);
    over_channels<T, kMost>(ld, [&](auto vectors, int64_t c) { body(vectors, c, begin, end); });
  }
}

// sums = from + factor * the sums of the columns of gy [m, cols], rows ld apart.
template <class T>
static void add_column_sums(int64_t m, const T* gy, int64_t ld, int64_t cols, const T* from,
                            T factor, T* sums) {
  constexpr int kW = kWidth<T>;
  for (int64_t c = 0; c < cols; c += kW) {
    Vec<T> sum[4] = {};
    int64_t i = 0;
    for (; i + 4 <= m; i += 4) {
      FASTMETA_UNROLL
      for (int r = 0; r < 4; ++r) sum[r] += load(gy + (i + r) * ld + c);
    }
    for (; i < m; ++i) sum[0] += load(gy + i * ld + c);
    store(sums + c, load(from + c) + factor * ((sum[0] + sum[1]) + (sum[2] + sum[3])));
  }
}

// sums += the sums of the columns of gy.
template <class T>
static void add_column_sums(int64_t m, const T* gy, int64_t ld, int64_t cols, T* sums) {
  add_column_sums(m, gy, ld, cols, static_cast<const T*>(sums), T(1), sums);
}

// to[i, 0..n) = (to +) from[i, 0..n) (+ bias) where columns begin at no whole vector; row i of `to`
// begins at targets[i], or at i * ld.
template <class T>
static void give_columns(int64_t m, int64_t n, const T* from, int64_t from_ld, const T* bias,
                         bool add, const int64_t* targets, int64_t ld, T* to) {
  for (int64_t i = 0; i < m; ++i) {
    T* row = to + (targets != nullptr ? targets[i] : i * ld);
    for (int64_t c = 0; c < n; ++c) {
      const T v = from[i * from_ld + c] + (bias != nullptr ? bias[c] : T(0));
      row[c] = add ? row[c] + v : v;
    }
  }
}

// Hands out pieces of the call's scratch.
template <class T>
class Pieces {
 public:
  explicit Pieces(void* scratch) : next_(static_cast<T*>(scratch)) {}
  T* take(int64_t numbers, bool wanted = true) {
    if (!wanted) return nullptr;
    T* piece = next_;
    next_ += ceil_div(numbers, int64_t{64 / sizeof(T)}) * int64_t{64 / sizeof(T)};
    return piece;
  }

 private:
  T* next_;
};

inline int64_t input_size(const Node& node, int64_t rows) { return rows * node.in.row(); }
inline int64_t output_size(const Node& node, int64_t rows) { return rows * node.out.row(); }

template <class T>
FASTMETA_INLINE void clear(T* p, int64_t n) {
  if (n > 0) std::memset(p, 0, static_cast<size_t>(n) * sizeof(T));
}

}  // namespace fastmeta::engine::FASTMETA_ISA
