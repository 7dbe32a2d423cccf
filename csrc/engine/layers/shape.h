// Layers that move numbers without changing them: flatten, from channels last to torch's order of
// channels, height, width; and the addition of two values.
#pragma once
#include "engine/layers/lanes.h"

namespace fastmeta::engine::FASTMETA_ISA {

namespace flatten {

template <class T = double>
int64_t saved_bytes(const Node&, int64_t) {
  return 0;
}
template <class T = double>
int64_t scratch_bytes(const Node&, int64_t) {
  return 0;
}

// to[j, i] = from[i, j] for i < rows, j < columns, by squares of vectors; add: to[j, i] +=.
template <class T>
void transpose_matrix(const T* from, int64_t rows, int64_t columns, int64_t from_ld, T* to,
                      int64_t to_ld, bool add) {
  constexpr int64_t kW = kWidth<T>;
  for (int64_t i = 0; i < rows; i += kW) {
    const int64_t height = min_of(kW, rows - i);
    for (int64_t j = 0; j < columns; j += kW) {
      const int64_t width = min_of(kW, columns - j);
      if (height == kW && width == kW) {
        Vec<T> square[kW];
        FASTMETA_UNROLL
        for (int k = 0; k < kW; ++k) square[k] = load(from + (i + k) * from_ld + j);
        transpose<T>(square);
        FASTMETA_UNROLL
        for (int k = 0; k < kW; ++k) give(to + (j + k) * to_ld + i, square[k], add);
        continue;
      }
      for (int64_t b = j; b < j + width; ++b) {
        for (int64_t a = i; a < i + height; ++a) {
          const T v = from[a * from_ld + b];
          to[b * to_ld + a] = add ? to[b * to_ld + a] + v : v;
        }
      }
    }
  }
}

// The input may be the raw one, whose pixels have any stride.
template <class T>
void flatten_rows(const Node& node, int64_t rows, const T* x, T* y) {
  const int64_t pixels = node.in.pixels(), channels = node.in.channels, ld = node.in.ld;
  const int64_t features = pixels * channels;
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = x + r * node.in.row();
    T* to = y + r * node.out.row();
    if (pixels == 1 || (channels == 1 && ld == 1)) {
      std::memcpy(to, from, static_cast<size_t>(features) * sizeof(T));
    } else {
      transpose_matrix(from, pixels, channels, ld, to, pixels, false);
    }
    clear(to + features, node.out.row() - features);
  }
}

template <class T>
void restore_rows(const Node& node, int64_t rows, const T* gy, T* gx, bool add) {
  const int64_t pixels = node.in.pixels(), channels = node.in.channels, ld = node.in.ld;
  for (int64_t r = 0; r < rows; ++r) {
    T* to = gx + r * node.in.row();
    if (!add && ld != channels) clear(to, node.in.row());
    transpose_matrix(gy + r * node.out.row(), channels, pixels, pixels, to, ld, add);
  }
}

template <class T>
void forward(const LayerCall<T>& call) {
  flatten_rows(*call.node, call.rows, call.x, call.y);
}

template <class T>
void backward(const LayerCall<T>& call) {
  if (call.gx == nullptr) return;
  restore_rows(*call.node, call.rows, call.gy, call.gx, call.add_gx);
}

template <class T>
void dual_forward(const LayerCall<T>& call) {
  flatten_rows(*call.node, call.rows, call.x, call.y);
  if (call.dx != nullptr) {
    flatten_rows(*call.node, call.rows, call.dx, call.dy);
  } else {
    clear(call.dy, output_size(*call.node, call.rows));
  }
}

template <class T>
void dual_backward(const LayerCall<T>& call) {
  backward(call);
  if (call.dgx == nullptr) return;
  restore_rows(*call.node, call.rows, call.dgy, call.dgx, call.add_gx);
}

}  // namespace flatten

namespace add {

template <class T = double>
int64_t saved_bytes(const Node&, int64_t) {
  return 0;
}
template <class T = double>
int64_t scratch_bytes(const Node&, int64_t) {
  return 0;
}

template <class T>
void give_all(const T* from, int64_t n, T* to, bool add) {
  if (to == nullptr) return;
  for (int64_t i = 0; i < n; i += kWidth<T>) give(to + i, load(from + i), add);
}

template <class T>
void forward(const LayerCall<T>& call) {
  const int64_t n = output_size(*call.node, call.rows);
  for (int64_t i = 0; i < n; i += kWidth<T>)
    store(call.y + i, load(call.x + i) + load(call.x2 + i));
}

template <class T>
void backward(const LayerCall<T>& call) {
  const int64_t n = output_size(*call.node, call.rows);
  give_all(call.gy, n, call.gx, call.add_gx);
  give_all(call.gy, n, call.gx2, call.add_gx2);
}

template <class T>
void dual_forward(const LayerCall<T>& call) {
  const int64_t n = output_size(*call.node, call.rows);
  forward(call);
  for (int64_t i = 0; i < n; i += kWidth<T>) {
    store(call.dy + i, load_or(call.dx, i, T(0)) + load_or(call.dx2, i, T(0)));
  }
}

template <class T>
void dual_backward(const LayerCall<T>& call) {
  const int64_t n = output_size(*call.node, call.rows);
  backward(call);
  give_all(call.dgy, n, call.dgx, call.add_gx);
  give_all(call.dgy, n, call.dgx2, call.add_gx2);
}

}  // namespace add

}  // namespace fastmeta::engine::FASTMETA_ISA
