// Pooling over the pixels of images, channels in vectors: max_pool, avg_pool, mean_pool. Shapes
// come from the node, so that rounding up (ceil) needs no code here.
#pragma once
#include "engine/layers/lanes.h"

namespace fastmeta::engine::FASTMETA_ISA {

// The input pixels of a window in one dimension: begin, begin + step, ... below end, and their
// number with the padding that counts for avg_pool.
struct Span {
  int64_t begin, end, padded;
};

// As torch cuts windows at the border: with padding, a ceil window ends at most at size + padding.
inline Span window(int64_t out, int64_t size, int64_t k, int64_t s, int64_t p, int64_t d) {
  const int64_t start = out * s - p;
  Span span;
  span.begin = start < 0 ? start + ceil_div(-start, d) * d : start;
  span.end = min_of(start + (k - 1) * d + 1, size);
  span.padded = min_of(start + k, size + p) - start;
  return span;
}

namespace max_pool {

// saved: for each output the number of the input pixel it came from, in integers of T's size.
template <class T = double>
int64_t saved_bytes(const Node& node, int64_t rows) {
  return output_size(node, rows) * static_cast<int64_t>(sizeof(T));
}
template <class T = double>
int64_t scratch_bytes(const Node&, int64_t) {
  return 0;
}

template <class T>
FASTMETA_INLINE IntVec<T> load_places(const LayerCall<T>& call, int64_t at) {
  return bits_of<T>(load(static_cast<const T*>(call.saved) + at));
}

// body(row's first input element, output element, rows and columns of the window) for each output
// pixel.
template <class T, class Body>
FASTMETA_INLINE void over_windows(const LayerCall<T>& call, Body&& body) {
  const Node& node = *call.node;
  int64_t out = 0;
  for (int64_t r = 0; r < call.rows; ++r) {
    for (int64_t oh = 0; oh < node.out.height; ++oh) {
      const Span h = window(oh, node.in.height, node.k[0], node.s[0], node.p[0], node.d[0]);
      for (int64_t ow = 0; ow < node.out.width; ++ow, out += node.out.ld) {
        const Span w = window(ow, node.in.width, node.k[1], node.s[1], node.p[1], node.d[1]);
        body(r * node.in.row(), out, h, w);
      }
    }
  }
}

// The first maximum of a window; a NaN beats all that came before it, as in torch.
template <bool kDual, class T>
FASTMETA_INLINE void pool(const LayerCall<T>& call) {
  using Int = typename std::remove_reference<decltype(IntVec<T>{}[0])>::type;
  const Node& node = *call.node;
  const int64_t ld = node.in.ld;
  T* places = static_cast<T*>(call.saved);
  over_windows(call, [&](int64_t row, int64_t out, const Span& h, const Span& w) {
    for (int64_t c = 0; c < node.out.ld; c += kWidth<T>) {
      Vec<T> best = splat<T>(-__builtin_huge_val()), tangent{};
      IntVec<T> place = IntVec<T>{} + static_cast<Int>(h.begin * node.in.width + w.begin);
      for (int64_t ih = h.begin; ih < h.end; ih += node.d[0]) {
        for (int64_t iw = w.begin; iw < w.end; iw += node.d[1]) {
          const int64_t pixel = ih * node.in.width + iw, at = row + pixel * ld + c;
          const Vec<T> v = load(call.x + at);
          const IntVec<T> better = (v > best) | (v != v);
          best = better ? v : best;
          place = better ? IntVec<T>{} + static_cast<Int>(pixel) : place;
          if constexpr (kDual) tangent = better ? load(call.dx + at) : tangent;
        }
      }
      store(call.y + out + c, best);
      store(places + out + c, from_bits<T>(place));
      if constexpr (kDual) store(call.dy + out + c, tangent);
    }
  });
}

template <class T>
void forward(const LayerCall<T>& call) {
  pool<false>(call);
}

template <class T>
void dual_forward(const LayerCall<T>& call) {
  if (call.dx != nullptr) {
    pool<true>(call);
  } else {
    pool<false>(call);
    clear(call.dy, output_size(*call.node, call.rows));
  }
}

// Windows that tile the input (but for a rest at its end) each write their own pixels; other
// windows add to what is there.
template <class T>
void scatter(const LayerCall<T>& call, const T* gy, T* gx) {
  using Int = typename std::remove_reference<decltype(IntVec<T>{}[0])>::type;
  if (gx == nullptr) return;
  const Node& node = *call.node;
  const int64_t ld = node.in.ld, height = node.in.height, width = node.in.width;
  bool tiles = !call.add_gx;
  for (int i = 0; i < 2; ++i)
    tiles = tiles && node.k[i] == node.s[i] && !node.p[i] && node.d[i] == 1;
  if (!tiles && !call.add_gx) clear(gx, input_size(node, call.rows));
  const bool add = !tiles;
  over_windows(call, [&](int64_t row, int64_t out, const Span& h, const Span& w) {
    for (int64_t c = 0; c < node.out.ld; c += kWidth<T>) {
      const Vec<T> g = load(gy + out + c);
      const IntVec<T> place = load_places(call, out + c);
      for (int64_t ih = h.begin; ih < h.end; ih += node.d[0]) {
        for (int64_t iw = w.begin; iw < w.end; iw += node.d[1]) {
          const int64_t pixel = ih * width + iw;
          const IntVec<T> here = place == static_cast<Int>(pixel);
          give(gx + row + pixel * ld + c, here ? g : Vec<T>{}, add);
        }
      }
    }
  });
  if (!tiles) return;
  const int64_t covered_height = min_of(node.out.height * node.s[0], height);
  const int64_t covered_width = min_of(node.out.width * node.s[1], width);
  for (int64_t r = 0; r < call.rows; ++r) {
    T* image = gx + r * node.in.row();
    for (int64_t ih = 0; ih < covered_height; ++ih) {
      clear(image + (ih * width + covered_width) * ld, (width - covered_width) * ld);
    }
    clear(image + covered_height * width * ld, (height - covered_height) * width * ld);
  }
}

template <class T>
void backward(const LayerCall<T>& call) {
  scatter(call, call.gy, call.gx);
}

template <class T>
void dual_backward(const LayerCall<T>& call) {
  scatter(call, call.gy, call.gx);
  scatter(call, call.dgy, call.dgx);
}

}  // namespace max_pool

// The linear pools: forward is a map of values, backward its transpose; tangents go the same way.
namespace avg_pool {

template <class T = double>
int64_t saved_bytes(const Node&, int64_t) {
  return 0;
}
template <class T = double>
int64_t scratch_bytes(const Node&, int64_t) {
  return 0;
}

template <class T>
FASTMETA_INLINE T share_of(const Node& node, const Span& h, const Span& w) {
  const int64_t counted =
      node.include_pad ? h.padded * w.padded : (h.end - h.begin) * (w.end - w.begin);
  return T(1) / static_cast<T>(counted);
}

template <class T>
void average(const LayerCall<T>& call, const T* x, T* y) {
  const Node& node = *call.node;
  const int64_t ld = node.in.ld;
  max_pool::over_windows(call, [&](int64_t row, int64_t out, const Span& h, const Span& w) {
    const bool empty = h.begin >= h.end || w.begin >= w.end;
    const T share = empty ? T(0) : share_of<T>(node, h, w);
    for (int64_t c = 0; c < node.out.ld; c += kWidth<T>) {
      Vec<T> sum{};
      for (int64_t ih = h.begin; ih < h.end; ++ih) {
        for (int64_t iw = w.begin; iw < w.end; ++iw) {
          sum += load(x + row + (ih * node.in.width + iw) * ld + c);
        }
      }
      store(y + out + c, sum * share);
    }
  });
}

template <class T>
void distribute(const LayerCall<T>& call, const T* gy, T* gx) {
  const Node& node = *call.node;
  const int64_t ld = node.in.ld;
  if (gx == nullptr) return;
  if (!call.add_gx) clear(gx, input_size(node, call.rows));
  max_pool::over_windows(call, [&](int64_t row, int64_t out, const Span& h, const Span& w) {
    if (h.begin >= h.end || w.begin >= w.end) return;
    const T share = share_of<T>(node, h, w);
    for (int64_t c = 0; c < node.out.ld; c += kWidth<T>) {
      const Vec<T> g = load(gy + out + c) * share;
      for (int64_t ih = h.begin; ih < h.end; ++ih) {
        for (int64_t iw = w.begin; iw < w.end; ++iw) {
          accumulate(gx + row + (ih * node.in.width + iw) * ld + c, g);
        }
      }
    }
  });
}

template <class T>
void forward(const LayerCall<T>& call) {
  average(call, call.x, call.y);
}

template <class T>
void backward(const LayerCall<T>& call) {
  distribute(call, call.gy, call.gx);
}

template <class T>
void dual_forward(const LayerCall<T>& call) {
  average(call, call.x, call.y);
  if (call.dx != nullptr) {
    average(call, call.dx, call.dy);
  } else {
    clear(call.dy, output_size(*call.node, call.rows));
  }
}

template <class T>
void dual_backward(const LayerCall<T>& call) {
  distribute(call, call.gy, call.gx);
  distribute(call, call.dgy, call.dgx);
}

}  // namespace avg_pool

namespace mean_pool {

constexpr int64_t kChunk = 64;  // pixels added up before their sum joins the total

template <class T = double>
int64_t saved_bytes(const Node&, int64_t) {
  return 0;
}
template <class T = double>
int64_t scratch_bytes(const Node&, int64_t) {
  return 0;
}

template <class T>
void average(const LayerCall<T>& call, const T* x, T* y) {
  const Node& node = *call.node;
  const int64_t pixels = node.in.pixels(), ld = node.in.ld;
  const T share = T(1) / static_cast<T>(pixels);
  for (int64_t r = 0; r < call.rows; ++r) {
    const T* from = x + r * node.in.row();
    T* to = y + r * node.out.row();
    over_channels<T, 4>(ld, [&](auto vectors, int64_t c) {
      constexpr int kN = vectors, kW = kWidth<T>;
      Vec<T> total[kN] = {};
      for (int64_t begin = 0; begin < pixels; begin += kChunk) {
        Vec<T> sum[kN] = {};
        const int64_t end = min_of(begin + kChunk, pixels) * ld;
        for (int64_t at = begin * ld + c; at < end; at += ld) {
          FASTMETA_UNROLL
          for (int k = 0; k < kN; ++k) sum[k] += load(from + at + k * kW);
        }
        FASTMETA_UNROLL
        for (int k = 0; k < kN; ++k) total[k] += sum[k];
      }
      FASTMETA_UNROLL
      for (int k = 0; k < kN; ++k) store(to + c + k * kW, total[k] * share);
    });
  }
}

template <class T>
void distribute(const LayerCall<T>& call, const T* gy, T* gx) {
  const Node& node = *call.node;
  const int64_t pixels = node.in.pixels(), ld = node.in.ld;
  const T share = T(1) / static_cast<T>(pixels);
  if (gx == nullptr) return;
  for (int64_t r = 0; r < call.rows; ++r) {
    const T* from = gy + r * node.out.row();
    T* to = gx + r * node.in.row();
    for (int64_t pixel = 0; pixel < pixels; ++pixel, to += ld) {
      for (int64_t c = 0; c < ld; c += kWidth<T>) give(to + c, load(from + c) * share, call.add_gx);
    }
  }
}

template <class T>
void forward(const LayerCall<T>& call) {
  average(call, call.x, call.y);
}

template <class T>
void backward(const LayerCall<T>& call) {
  distribute(call, call.gy, call.gx);
}

template <class T>
void dual_forward(const LayerCall<T>& call) {
  average(call, call.x, call.y);
  if (call.dx != nullptr) {
    average(call, call.dx, call.dy);
  } else {
    clear(call.dy, output_size(*call.node, call.rows));
  }
}

template <class T>
void dual_backward(const LayerCall<T>& call) {
  distribute(call, call.gy, call.gx);
  distribute(call, call.dgy, call.dgx);
}

}  // namespace mean_pool

}  // namespace fastmeta::engine::FASTMETA_ISA
