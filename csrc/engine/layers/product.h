// linear and conv2d: one matrix product per group of channels, C[positions, outputs] = A W.
//
// A's rows are the patches that a kernel sees at each output position, [taps * channels of the
// group]; where that is the input itself (linear, 1x1) it is read in place, else a block of patches
// that stays in the second-level cache is gathered at a time. Weights are Matrix [taps *
// channels][outputs] in panels (plan.h).
//
// Multiply-adds, in units of positions * taps * channels * outputs: forward 1, backward 2,
// dual_forward 3 (2 where the input has no tangent), dual_backward 5 (2 where the input has none
// and wants none), and one more each for the primal weight gradient where it is wanted. Both duals
// are spared one where the primal values are known from the first pass.
#pragma once
#include "common/gemm.h"
#include "engine/layer.h"

namespace fastmeta::engine::FASTMETA_ISA::product {

// Rows from which a transposed copy of the weights pays.
constexpr int64_t kManyRows = 8;
constexpr int64_t kBlockBytes = 128 << 10;

template <class T>
struct Dims {
  explicit Dims(const Node& n)
      : node(n),
        inputs(n.in.channels / n.groups),
        outputs(n.out.channels / n.groups),
        patch(n.k[0] * n.k[1] * inputs),
        patch_ld(padded<T>(patch)),
        cols(padded<T>(outputs)),
        in_place(n.groups == 1 && n.k[0] == 1 && n.k[1] == 1 && n.s[0] == 1 && n.s[1] == 1 &&
                 n.p[0] == 0 && n.p[1] == 0) {}
  const Node& node;
  int64_t inputs, outputs, patch, patch_ld, cols;
  bool in_place;  // patches are the input's rows

  int64_t weights() const { return patch * cols; }  // numbers of a group
  int64_t positions(int64_t rows) const { return rows * node.out.pixels(); }
  int64_t block(int64_t rows) const {
    if (in_place) return positions(rows);
    const int64_t fit = kBlockBytes / (patch_ld * static_cast<int64_t>(sizeof(T)));
    return min_of(positions(rows), max_of<int64_t>(kTileRows, fit / kTileRows * kTileRows));
  }
  bool writes_in_place() const { return in_place && node.in.ld == patch_ld; }
  bool copies_output() const { return node.groups > 1; }
};

template <class T>
int64_t scratch_bytes(const Node& node, int64_t rows) {
  const Dims<T> d(node);
  const int64_t block = d.block(rows);
  int64_t numbers = 2 * d.outputs * d.patch_ld;                 // transposed W and dW
  if (!d.writes_in_place()) numbers += 4 * block * d.patch_ld;  // patches, their gradients
  if (d.copies_output()) numbers += 2 * block * d.cols;         // a group's outputs
  return (numbers + 8 * 16) * static_cast<int64_t>(sizeof(T));
}

// Hands out pieces of the call's scratch.
template <class T>
class Pieces {
 public:
  explicit Pieces(void* scratch) : next_(static_cast<T*>(scratch)) {}
  T* take(int64_t numbers) {
    T* piece = next_;
    next_ += ceil_div(numbers, int64_t{64 / sizeof(T)}) * int64_t{64 / sizeof(T)};
    return piece;
  }

 private:
  T* next_;
};

// Calls f(position - begin, tap, pointer offset in the input or -1 outside of it) for the patches
// of positions [begin, end).
template <class F>
FASTMETA_INLINE void for_each_tap(const Node& n, int64_t begin, int64_t end, F f) {
  int64_t ow = begin % n.out.width, oh = begin / n.out.width % n.out.height;
  int64_t row = begin / n.out.pixels();
  for (int64_t m = 0; m < end - begin; ++m) {
    for (int64_t kh = 0, tap = 0; kh < n.k[0]; ++kh) {
      const int64_t ih = oh * n.s[0] - n.p[0] + kh * n.d[0];
      const bool inside = ih >= 0 && ih < n.in.height;
      for (int64_t kw = 0; kw < n.k[1]; ++kw, ++tap) {
        const int64_t iw = ow * n.s[1] - n.p[1] + kw * n.d[1];
        f(m, tap,
          inside && iw >= 0 && iw < n.in.width
              ? ((row * n.in.height + ih) * n.in.width + iw) * n.in.ld
              : int64_t{-1});
      }
    }
    if (++ow == n.out.width) {
      ow = 0;
      if (++oh == n.out.height) {
        oh = 0;
        ++row;
      }
    }
  }
}

template <class T>
static void gather(const Dims<T>& d, int64_t group, const T* x, int64_t begin, int64_t end,
                   T* patches) {
  constexpr int kW = kWidth<T>;
  const int64_t inputs = d.inputs;
  const T* from = x + group * inputs;
  const bool vectors = inputs % kW == 0;
  for_each_tap(d.node, begin, end, [&](int64_t m, int64_t tap, int64_t offset) {
    T* to = patches + m * d.patch_ld + tap * inputs;
    if (offset < 0) {
      for (int64_t c = 0; c < inputs; ++c) to[c] = 0;
    } else if (vectors) {
      for (int64_t c = 0; c < inputs; c += kW) store(to + c, load(from + offset + c));
    } else {
      for (int64_t c = 0; c < inputs; ++c) to[c] = from[offset + c];
    }
  });
}

// gx += the patches' gradients, each where its number came from.
template <class T>
static void scatter(const Dims<T>& d, int64_t group, const T* patches, int64_t begin, int64_t end,
                    T* gx) {
  constexpr int kW = kWidth<T>;
  const int64_t inputs = d.inputs;
  T* to = gx + group * inputs;
  const bool vectors = inputs % kW == 0;
  for_each_tap(d.node, begin, end, [&](int64_t m, int64_t tap, int64_t offset) {
    if (offset < 0) return;
    const T* from = patches + m * d.patch_ld + tap * inputs;
    if (vectors) {
      for (int64_t c = 0; c < inputs; c += kW) {
        store(to + offset + c, load(to + offset + c) + load(from + c));
      }
    } else {
      for (int64_t c = 0; c < inputs; ++c) to[offset + c] += from[c];
    }
  });
}

template <class T>
struct Weights {
  ConstMatrix<T> plain;
  ConstMatrix<T> transposed;  // data nullptr where few rows make it not worth while
};

template <class T>
static Weights<T> weights_of(const Dims<T>& d, const T* w, int64_t group, int64_t rows,
                             T* scratch) {
  Weights<T> both{{w + group * d.weights(), d.patch, d.cols, 0},
                  {nullptr, d.outputs, d.patch_ld, 0}};
  if (rows >= kManyRows) {
    transpose_to_panels<T>(both.plain, d.outputs, {scratch, d.outputs, d.patch_ld, 0});
    both.transposed.data = scratch;
  }
  return both;
}

// out[m, patch] = (out +) gy[m, outputs] W^T
template <class T>
static void times_transpose(const Dims<T>& d, int64_t m, const T* gy, int64_t ldg,
                            const Weights<T>& w, T* out, bool add) {
  if (w.transposed.data == nullptr) {
    gemm_transposed_few<T>(m, gy, ldg, w.plain, out, d.patch_ld, T(1), add);
    return;
  }
  GemmStart<T> start;
  if (add) start.from = out;
  gemm<T>(m, d.outputs, gy, ldg, 1, w.transposed, {out, m, d.patch_ld, d.patch_ld}, start);
}

// gw[patch, outputs] += patches^T gy
template <class T>
static void add_weight_gradient(const Dims<T>& d, int64_t m, const T* patches, int64_t ldp,
                                const T* gy, int64_t ldg, T* gw) {
  GemmStart<T> start;
  start.from = gw;
  gemm<T>(d.patch, m, patches, 1, ldp, {gy, m, d.cols, ldg}, {gw, d.patch, d.cols, 0}, start);
}

template <class T>
static void add_column_sums(int64_t m, const T* gy, int64_t ld, int64_t cols, T* sums) {
  constexpr int kW = kWidth<T>;
  for (int64_t c = 0; c < cols; c += kW) {
    Vec<T> sum[4] = {};
    int64_t i = 0;
    for (; i + 4 <= m; i += 4) {
      FASTMETA_UNROLL
      for (int r = 0; r < 4; ++r) sum[r] += load(gy + (i + r) * ld + c);
    }
    for (; i < m; ++i) sum[0] += load(gy + i * ld + c);
    store(sums + c, load(sums + c) + ((sum[0] + sum[1]) + (sum[2] + sum[3])));
  }
}

// A group's share of y's rows [begin, begin + m) between y and a copy with whole vectors.
template <class T>
static void copy_group(const Dims<T>& d, int64_t group, int64_t m, T* y, T* copy, bool out) {
  const int64_t ld = d.node.out.ld;
  for (int64_t i = 0; i < m; ++i) {
    T* row = y + i * ld + group * d.outputs;
    for (int64_t c = 0; c < d.outputs; ++c) {
      if (out) {
        row[c] = copy[i * d.cols + c];
      } else {
        copy[i * d.cols + c] = row[c];
      }
    }
    if (!out) {
      for (int64_t c = d.outputs; c < d.cols; ++c) copy[i * d.cols + c] = 0;
    }
  }
}

// y = A w + b; and where dy is wanted, dy = dA w + A dw + db.
template <class T>
static void forward_both(const LayerCall<T>& call, bool dual) {
  const Dims<T> d(*call.node);
  const int64_t total = d.positions(call.rows), block = d.block(call.rows), ld = call.node->out.ld;
  Pieces<T> pieces(call.scratch);
  T* patches = nullptr;
  T* dpatches = nullptr;
  if (!d.in_place) {
    patches = pieces.take(block * d.patch_ld);
    if (dual && call.dx != nullptr) dpatches = pieces.take(block * d.patch_ld);
  }
  T* copy = d.copies_output() ? pieces.take(block * d.cols) : nullptr;
  for (int64_t g = 0; g < call.node->groups; ++g) {
    const ConstMatrix<T> w{call.w + g * d.weights(), d.patch, d.cols, 0};
    for (int64_t begin = 0; begin < total; begin += block) {
      const int64_t m = min_of(block, total - begin);
      const T* a = call.x + begin * call.node->in.ld;
      const T* da = call.dx == nullptr ? nullptr : call.dx + begin * call.node->in.ld;
      int64_t lda = call.node->in.ld;
      if (!d.in_place) {
        lda = d.patch_ld;
        gather(d, g, call.x, begin, begin + m, patches);
        a = patches;
        if (dpatches != nullptr) {
          gather(d, g, call.dx, begin, begin + m, dpatches);
          da = dpatches;
        }
      }
      const auto product = [&](T* y, auto fill) {
        T* to = y + begin * ld;
        if (copy == nullptr) {
          fill(Matrix<T>{to, m, d.cols, ld});
          return;
        }
        fill(Matrix<T>{copy, m, d.cols, d.cols});
        copy_group(d, g, m, to, copy, true);
      };
      GemmStart<T> start;
      if (call.node->groups == 1) start.bias = call.b;
      if (!call.known) {
        product(call.y, [&](Matrix<T> y) { gemm<T>(m, d.patch, a, lda, 1, w, y, start); });
      }
      if (!dual) continue;
      const ConstMatrix<T> dw{call.dw == nullptr ? nullptr : call.dw + g * d.weights(), d.patch,
                              d.cols, 0};
      product(call.dy, [&](Matrix<T> y) {
        GemmStart<T> first;
        if (call.node->groups == 1) first.bias = call.db;
        bool begun = false;
        if (da != nullptr) {
          gemm<T>(m, d.patch, da, lda, 1, w, y, first);
          begun = true;
        }
        if (dw.data != nullptr) {
          if (begun) first = {T(1), nullptr, y.data};
          gemm<T>(m, d.patch, a, lda, 1, dw, y, first);
          begun = true;
        }
        if (!begun) gemm<T>(m, 0, a, lda, 1, w, y, first);
      });
    }
  }
  // With groups a bias starts at no whole vector.
  if (call.node->groups > 1) {
    for (int64_t i = 0; i < total; ++i) {
      for (int64_t c = 0; c < call.node->out.channels; ++c) {
        if (call.b != nullptr && !call.known) call.y[i * ld + c] += call.b[c];
        if (dual && call.db != nullptr) call.dy[i * ld + c] += call.db[c];
      }
    }
  }
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
static void clear_rows(const Node& n, int64_t rows, T* gx) {
  for (int64_t i = 0; i < rows * n.in.row(); ++i) gx[i] = 0;
}

template <class T>
static void backward_both(const LayerCall<T>& call, bool dual) {
  const Node& n = *call.node;
  const Dims<T> d(n);
  const int64_t total = d.positions(call.rows), block = d.block(call.rows), ld = n.out.ld;
  if (call.gb != nullptr) add_column_sums(total, call.gy, ld, ld, call.gb);
  if (dual && call.dgb != nullptr) add_column_sums(total, call.dgy, ld, ld, call.dgb);
  const bool wants_gx = call.gx != nullptr, wants_dgx = dual && call.dgx != nullptr;
  const bool wants_gw = call.gw != nullptr, wants_dgw = dual && call.dgw != nullptr;
  if (!(wants_gx || wants_dgx || wants_gw || wants_dgw)) return;

  Pieces<T> pieces(call.scratch);
  T* wt = wants_gx || wants_dgx ? pieces.take(d.outputs * d.patch_ld) : nullptr;
  T* dwt = wants_dgx && call.dw != nullptr ? pieces.take(d.outputs * d.patch_ld) : nullptr;
  T *patches = nullptr, *dpatches = nullptr, *gpatches = nullptr, *dgpatches = nullptr;
  const bool reads_x = wants_gw || wants_dgw, reads_dx = wants_dgw && call.dx != nullptr;
  if (!d.in_place && reads_x) patches = pieces.take(block * d.patch_ld);
  if (!d.in_place && reads_dx) dpatches = pieces.take(block * d.patch_ld);
  if (!d.writes_in_place() && wants_gx) gpatches = pieces.take(block * d.patch_ld);
  if (!d.writes_in_place() && wants_dgx) dgpatches = pieces.take(block * d.patch_ld);
  T* copy = d.copies_output() ? pieces.take(block * d.cols) : nullptr;
  T* dcopy = d.copies_output() && dual ? pieces.take(block * d.cols) : nullptr;
  if (!d.writes_in_place() && !call.add_gx) {
    if (wants_gx) clear_rows(n, call.rows, call.gx);
    if (wants_dgx) clear_rows(n, call.rows, call.dgx);
  }

  for (int64_t g = 0; g < n.groups; ++g) {
    Weights<T> w, dw;
    if (wt != nullptr) w = weights_of(d, call.w, g, total, wt);
    if (dwt != nullptr) dw = weights_of(d, call.dw, g, total, dwt);
    for (int64_t begin = 0; begin < total; begin += block) {
      const int64_t m = min_of(block, total - begin);
      const T* gy = call.gy + begin * ld;
      const T* dgy = dual ? call.dgy + begin * ld : nullptr;
      int64_t ldg = ld;
      if (copy != nullptr) {
        ldg = d.cols;
        copy_group(d, g, m, const_cast<T*>(gy), copy, false);
        gy = copy;
        if (dual) {
          copy_group(d, g, m, const_cast<T*>(dgy), dcopy, false);
          dgy = dcopy;
        }
      }
      // ---- gradients of the weights
      const T* a = call.x + begin * n.in.ld;
      const T* da = reads_dx ? call.dx + begin * n.in.ld : nullptr;
      int64_t lda = n.in.ld;
      if (!d.in_place && reads_x) {
        lda = d.patch_ld;
        gather(d, g, call.x, begin, begin + m, patches);
        a = patches;
        if (reads_dx) {
          gather(d, g, call.dx, begin, begin + m, dpatches);
          da = dpatches;
        }
      }
      if (wants_gw) add_weight_gradient(d, m, a, lda, gy, ldg, call.gw + g * d.weights());
      if (wants_dgw) {
        T* dgw = call.dgw + g * d.weights();
        if (da != nullptr) add_weight_gradient(d, m, da, lda, gy, ldg, dgw);
        add_weight_gradient(d, m, a, lda, dgy, ldg, dgw);
      }
      // ---- gradients of the input
      const auto to_input = [&](T* gx, T* patch_gradients, auto fill) {
        if (d.writes_in_place()) {
          fill(gx + begin * n.in.ld, call.add_gx);
          return;
        }
        fill(patch_gradients, false);
        scatter(d, g, patch_gradients, begin, begin + m, gx);
      };
      if (wants_gx) {
        to_input(call.gx, gpatches,
                 [&](T* out, bool add) { times_transpose(d, m, gy, ldg, w, out, add); });
      }
      if (wants_dgx) {
        to_input(call.dgx, dgpatches, [&](T* out, bool add) {
          times_transpose(d, m, dgy, ldg, w, out, add);
          if (dwt != nullptr) times_transpose(d, m, gy, ldg, dw, out, true);
        });
      }
    }
  }
}

template <class T>
static void backward(const LayerCall<T>& call) {
  backward_both(call, false);
}
template <class T>
static void dual_backward(const LayerCall<T>& call) {
  backward_both(call, true);
}

}  // namespace fastmeta::engine::FASTMETA_ISA::product
