// conv2d: per group of channels one matrix product, Y[positions, outputs] = A W, whose A is read
// from a window over the input (convolution_places.h); and for the gradients likewise
//
//   gW[patch, outputs]  += A^T gY
//   gX[pixels, inputs]   = G W^T       for each class of pixels; G read from a window over gY.
//
// Weights are Matrix [taps * inputs of a group][outputs] in panels (plan.h). Tangents are sums of
// two products, formed at once: dY = dA W + A dW, dgW += dA^T gY + A^T dgY, dgX = dG W^T + G dW^T.
#pragma once
#include <cstring>

#include "common/gemm_indexed.h"
#include "engine/layers/convolution_places.h"

namespace fastmeta::engine::FASTMETA_ISA::convolution {

// Positions summed before a weight gradient is written: those of a tile stay in the first cache.
constexpr int64_t kPositionBlock = 128;

template <class T>
FASTMETA_INLINE void copy_numbers(const T* from, int64_t n, T* to) {
  int64_t i = 0;
  for (; i + kWidth<T> <= n; i += kWidth<T>) store(to + i, load(from + i));
  for (; i < n; ++i) to[i] = from[i];
}

// Rows [first, first + rows) and columns [left, ...) of `images` images, zeros outside of them.
template <class T>
static void fill_window(const Shape& shape, const T* from, int64_t images, int64_t first,
                        int64_t rows, int64_t left, const Window& w, T* window) {
  const int64_t ld = shape.ld;
  const int64_t begin = min_of(max_of<int64_t>(0, -left), w.size[1]);
  const int64_t end = max_of(begin, min_of(w.size[1], shape.width - left));
  for (int64_t i = 0; i < images; ++i) {
    for (int64_t r = 0; r < rows; ++r) {
      T* to = window + i * w.image() + r * w.row();
      const int64_t h = first + r;
      if (h < 0 || h >= shape.height) {
        clear(to, w.row());
        continue;
      }
      const T* pixel = from + ((i * shape.height + h) * shape.width + left + begin) * ld;
      clear(to, begin * w.pixel);
      if (w.pixel == ld) {
        copy_numbers(pixel, (end - begin) * ld, to + begin * w.pixel);
      } else {
        for (int64_t c = begin; c < end; ++c, pixel += ld)
          copy_numbers(pixel, ld, to + c * w.pixel);
      }
      clear(to + end * w.pixel, (w.size[1] - end) * w.pixel);
    }
  }
}

// A group's columns of gy's rows, in panels.
template <class T>
static ConstMatrix<T> pack(const Places<T>& p, int64_t m, const T* gy, T* panels) {
  const Matrix<T> to{panels, m, p.cols, 0};
  const int64_t ld = p.node.out.ld;
  for (int64_t q = 0; q < to.panels(); ++q) {
    const int64_t first = q * kPanel<T>, width = to.width(q);
    const int64_t count = min_of(width, p.outputs - first);
    for (int64_t i = 0; i < m; ++i) {
      T* row = to.panel(q) + i * width;
      copy_numbers(gy + i * ld + first, count, row);
      for (int64_t c = count; c < width; ++c) row[c] = 0;
    }
  }
  return {panels, m, p.cols, 0};
}

// y = A w + b; and where dy is wanted, dy = dA w + A dw + db.
template <class T>
static void forward_both(const LayerCall<T>& call, bool dual) {
  const Places<T>& p = *call.places;
  const Node& n = *call.node;
  const bool moves = dual && call.dx != nullptr, copies = n.groups > 1;
  Pieces<T> pieces(call.scratch);
  T* window = pieces.take(p.blocks.images * p.window.image());
  T* dwindow = pieces.take(p.blocks.images * p.window.image(), moves);
  T* copy = pieces.take(p.positions(p.blocks.images, p.blocks.band) * p.cols, copies);
  if (copies && n.out.ld != n.out.channels) {  // groups leave the padding as it was
    if (!call.known) clear(call.y, output_size(n, call.rows));
    if (dual) clear(call.dy, output_size(n, call.rows));
  }
  p.blocks.each([&](int64_t image, int64_t images, int64_t h, int64_t height) {
    const auto fill = [&](const T* x, T* to) {
      fill_window(n.in, x + image * n.in.row(), images, p.window_first(h), p.window_rows(height),
                  -n.p[1], p.window, to);
    };
    fill(call.x, window);
    if (moves) fill(call.dx, dwindow);
    const int64_t m = p.positions(images, height);
    const int64_t begin = (image * n.out.height + h) * n.out.width * n.out.ld;
    for (int64_t g = 0; g < n.groups; ++g) {
      const ConstMatrix<T> w{call.w + g * p.weights(), p.patch, p.cols, 0};
      const auto product = [&](IndexedGemm<T>& gemm, const T* bias, T* y) {
        T* to = y + begin + g * p.outputs;
        if (bias != nullptr) bias += g * p.outputs;
        gemm.c = {to, m, p.cols, n.out.ld};
        gemm.bias = bias;
        if (copies) {
          gemm.c = {copy, m, p.cols, p.cols};
          gemm.bias = nullptr;
        }
        gemm_indexed(gemm);
        if (copies) {
          give_columns<T>(m, p.outputs, copy, p.cols, bias, false, nullptr, n.out.ld, to);
        }
      };
      if (!call.known) {
        IndexedGemm<T> primal{m, p.patch, p.begins.data(), p.within.data()};
        primal.terms[primal.num_terms++] = {window + g * p.inputs, w};
        product(primal, call.b, call.y);
      }
      if (!dual) continue;
      IndexedGemm<T> tangent{m, p.patch, p.begins.data(), p.within.data()};
      if (moves) tangent.terms[tangent.num_terms++] = {dwindow + g * p.inputs, w};
      if (call.dw != nullptr) {
        const ConstMatrix<T> dw{call.dw + g * p.weights(), p.patch, p.cols, 0};
        tangent.terms[tangent.num_terms++] = {window + g * p.inputs, dw};
      }
      product(tangent, call.db, call.dy);
    }
  });
}

template <class T>
static void weight_gradients(const LayerCall<T>& call, bool dual) {
  const Places<T>& p = *call.places;
  const Node& n = *call.node;
  const bool wants_gw = call.gw != nullptr, wants_dgw = dual && call.dgw != nullptr;
  const bool moves = wants_dgw && call.dx != nullptr, wants = wants_gw || wants_dgw;
  const int64_t most = p.positions(p.blocks.images, p.blocks.band);
  Pieces<T> pieces(call.scratch);
  T* window = pieces.take(p.blocks.images * p.window.image());
  T* dwindow = pieces.take(p.blocks.images * p.window.image(), moves);
  T* packed = pieces.take(most * p.cols, wants);
  T* dpacked = pieces.take(most * p.cols, wants_dgw);
  p.blocks.each([&](int64_t image, int64_t images, int64_t h, int64_t height) {
    const int64_t m = p.positions(images, height);
    const int64_t begin = (image * n.out.height + h) * n.out.width * n.out.ld;
    if (call.gb != nullptr) add_column_sums(m, call.gy + begin, n.out.ld, n.out.ld, call.gb);
    if (dual && call.dgb != nullptr) {
      add_column_sums(m, call.dgy + begin, n.out.ld, n.out.ld, call.dgb);
    }
    if (!wants) return;
    const auto fill = [&](const T* x, T* to) {
      fill_window(n.in, x + image * n.in.row(), images, p.window_first(h), p.window_rows(height),
                  -n.p[1], p.window, to);
    };
    fill(call.x, window);
    if (moves) fill(call.dx, dwindow);
    for (int64_t g = 0; g < n.groups; ++g) {
      const auto add = [&](IndexedGemm<T>& gemm, T* gw) {
        gemm.c = {gw + g * p.weights(), p.patch, p.cols, 0};
        gemm.add = true;
        gemm.depth_block = kPositionBlock;
        gemm_indexed(gemm);
      };
      ConstMatrix<T> gy{};
      if (wants_gw || moves) gy = pack(p, m, call.gy + begin + g * p.outputs, packed);
      if (wants_gw) {
        IndexedGemm<T> primal{p.patch, m, p.within.data(), p.begins.data()};
        primal.terms[primal.num_terms++] = {window + g * p.inputs, gy};
        add(primal, call.gw);
      }
      if (wants_dgw) {
        IndexedGemm<T> tangent{p.patch, m, p.within.data(), p.begins.data()};
        if (moves) tangent.terms[tangent.num_terms++] = {dwindow + g * p.inputs, gy};
        tangent.terms[tangent.num_terms++] = {
            window + g * p.inputs, pack(p, m, call.dgy + begin + g * p.outputs, dpacked)};
        add(tangent, call.dgw);
      }
    }
  });
}

// W^T of each group, by classes of pixels: [taps of the class * outputs][inputs] in panels.
template <class T>
static void transpose_weights(const Places<T>& p, const T* w, T* transposed) {
  for (int64_t g = 0; g < p.node.groups; ++g) {
    const ConstMatrix<T> from{w + g * p.weights(), p.patch, p.cols, 0};
    for (const PixelClass& c : p.classes) {
      const Matrix<T> to{transposed + g * p.transposed() + c.weights,
                         static_cast<int64_t>(c.depth.size()), p.input_cols, 0};
      for (size_t t = 0; t < c.taps.size(); ++t) {
        transpose_rows(from, c.taps[t] * p.inputs, p.inputs, p.outputs, to,
                       static_cast<int64_t>(t) * p.outputs);
      }
    }
  }
}

template <class T>
static void input_gradients(const LayerCall<T>& call, bool dual) {
  const Places<T>& p = *call.places;
  const Node& n = *call.node;
  const bool wants_dgx = dual && call.dgx != nullptr, turns = wants_dgx && call.dw != nullptr;
  const bool needs_gy = call.gx != nullptr || turns;
  const int64_t window_size = p.input_blocks.images * p.gradient_window.image();
  Pieces<T> pieces(call.scratch);
  T* wt = pieces.take(n.groups * p.transposed());
  T* dwt = pieces.take(n.groups * p.transposed(), turns);
  T* window = pieces.take(window_size, needs_gy);
  T* dwindow = pieces.take(window_size, wants_dgx);
  T* copy = pieces.take(p.input_blocks.images * p.input_blocks.band * n.in.width * p.input_cols,
                        !p.writes_in_place);
  transpose_weights(p, call.w, wt);
  if (turns) transpose_weights(p, call.dw, dwt);
  if (!p.writes_in_place && !call.add_gx) {  // padding lanes
    if (call.gx != nullptr) clear(call.gx, call.rows * n.in.row());
    if (wants_dgx) clear(call.dgx, call.rows * n.in.row());
  }
  p.input_blocks.each([&](int64_t image, int64_t images, int64_t h, int64_t height) {
    const int64_t first = p.first_output(0, h);
    const auto fill = [&](const T* gy, T* to) {
      fill_window(n.out, gy + image * n.out.row(), images, first,
                  p.last_output(0, h + height - 1) - first + 1, p.first_output(1, 0),
                  p.gradient_window, to);
    };
    if (needs_gy) fill(call.gy, window);
    if (wants_dgx) fill(call.dgy, dwindow);
    const int64_t begin = (image * n.in.height + h) * n.in.width * n.in.ld;
    for (int64_t g = 0; g < n.groups; ++g) {
      for (const PixelClass& c : p.classes) {
        const int64_t m = p.pixels(c, images, height), k = static_cast<int64_t>(c.depth.size());
        const auto weights = [&](const T* transposed) {
          return ConstMatrix<T>{transposed + g * p.transposed() + c.weights, k, p.input_cols, 0};
        };
        const auto product = [&](IndexedGemm<T>& gemm, T* gx) {
          T* to = gx + begin + g * p.inputs;
          if (p.writes_in_place) {
            gemm.c = {to, m, p.input_cols, n.in.ld};
            gemm.c_rows = c.targets.data();
            gemm.add = call.add_gx;
            gemm_indexed(gemm);
          } else {
            gemm.c = {copy, m, p.input_cols, p.input_cols};
            gemm_indexed(gemm);
            give_columns<T>(m, p.inputs, copy, p.input_cols, nullptr, call.add_gx, c.targets.data(),
                            0, to);
          }
        };
        if (call.gx != nullptr) {
          IndexedGemm<T> primal{m, k, c.places.data(), c.depth.data()};
          primal.terms[primal.num_terms++] = {window + g * p.outputs, weights(wt)};
          product(primal, call.gx);
        }
        if (wants_dgx) {
          IndexedGemm<T> tangent{m, k, c.places.data(), c.depth.data()};
          tangent.terms[tangent.num_terms++] = {dwindow + g * p.outputs, weights(wt)};
          if (turns) tangent.terms[tangent.num_terms++] = {window + g * p.outputs, weights(dwt)};
          product(tangent, call.dgx);
        }
      }
    }
  });
}

template <class T>
static void forward(const LayerCall<T>& call) {
  forward_both(call, false);
}
template <class T>
static void dual_forward(const LayerCall<T>& call) {
  forward_both(call, true);
}
template <class T>
static void backward(const LayerCall<T>& call) {
  weight_gradients(call, false);
  if (call.gx != nullptr) input_gradients(call, false);
}
template <class T>
static void dual_backward(const LayerCall<T>& call) {
  weight_gradients(call, true);
  if (call.gx != nullptr || call.dgx != nullptr) input_gradients(call, true);
}

}  // namespace fastmeta::engine::FASTMETA_ISA::convolution
