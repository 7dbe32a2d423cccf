// Where the numbers of a convolution lie: computed once for a node and a number of rows.
//
// A block of images (or a band of one large image) is copied into a window with the border that
// the kernel reaches into, so that a number of a patch is where its position and its place within
// the patch add up to: products read the patches there (gemm_indexed.h), and none is ever formed.
//
// The gradient of the input is such a product as well. Input pixels whose coordinates leave the
// same remainders by the strides are reached by the same taps: a class of pixels. Their patches are
// of the output's cotangent, at the output positions that those taps reached them from.
#pragma once
#include <vector>

#include "common/gemm.h"
#include "engine/layers/lanes.h"

namespace fastmeta::engine::FASTMETA_ISA::convolution {

constexpr int64_t kWindowBytes = 160 << 10;  // beside the weights in the second-level cache
constexpr int64_t kBlockPixels = 512;

// Towards minus infinity; b > 0.
inline int64_t floor_div(int64_t a, int64_t b) { return (a >= 0 ? a : a - b + 1) / b; }

// A rectangle of pixels, part of it perhaps outside of the image, of each image of a block.
struct Window {
  int64_t size[2];
  int64_t pixel;  // numbers from one pixel to the next
  int64_t row() const { return size[1] * pixel; }
  int64_t image() const { return size[0] * row(); }
};

// How the pixels of all images are cut up: by `images` whole ones, or bands of one image.
struct Blocks {
  int64_t rows, height, images, band;

  // row_bytes: of a window's row for one row of pixels.
  Blocks(int64_t rows, const Shape& shape, int64_t row_bytes, int64_t align)
      : rows(rows), height(shape.height) {
    const int64_t parts = max_of(ceil_div(height * row_bytes, kWindowBytes),
                                 ceil_div(shape.pixels(), 2 * kBlockPixels));
    images = parts > 1 ? 1
                       : min_of(kWindowBytes / (height * row_bytes),
                                max_of<int64_t>(1, kBlockPixels / shape.pixels()));
    images = max_of<int64_t>(1, min_of(images, rows));
    band = min_of(height, ceil_div(ceil_div(height, parts), align) * align);
  }

  // f(first image, images, first row of pixels, rows of pixels)
  template <class F>
  void each(F f) const {
    for (int64_t n = 0; n < rows; n += images) {
      for (int64_t h = 0; h < height; h += band) {
        f(n, min_of(images, rows - n), h, min_of(band, height - h));
      }
    }
  }
};

// Input pixels [first + i * stride] of a block that the same taps reach.
struct PixelClass {
  int64_t first[2], columns;
  std::vector<int64_t> taps;
  std::vector<int64_t> places;   // of each pixel, in the window of the cotangent
  std::vector<int64_t> depth;    // of (tap, output) from there
  std::vector<int64_t> targets;  // of each pixel, in the input's gradient
  int64_t weights;               // where its weights begin, [taps * outputs, inputs] a group
};

template <class T>
struct Places {
  Places(const Node& n, int64_t rows)
      : node(n),
        inputs(n.in.channels / n.groups),
        outputs(n.out.channels / n.groups),
        patch(n.k[0] * n.k[1] * inputs),
        cols(padded<T>(outputs)),
        input_cols(padded<T>(inputs)),
        writes_in_place(n.groups == 1 && n.in.ld == input_cols),
        blocks(rows, n.out, window_row(n.in, n.s[0]), 1),
        input_blocks(rows, n.in, ceil_div(window_row(n.out, 1), n.s[0]), n.s[0]) {
    place_patches();
    place_pixels();
  }

  static bool apply(const Node& n) {
    const bool pointwise = n.groups == 1 && n.k[0] == 1 && n.k[1] == 1 && n.s[0] == 1 &&
                           n.s[1] == 1 && n.p[0] == 0 && n.p[1] == 0;
    return n.kind == Kind::kConv2d && !pointwise;
  }

  int64_t weights() const { return patch * cols; }  // numbers of a group
  int64_t transposed() const { return node.k[0] * node.k[1] * outputs * input_cols; }

  // Rows of the window over x for h rows of the output, and the first of them.
  int64_t window_rows(int64_t h) const {
    return (h - 1) * node.s[0] + (node.k[0] - 1) * node.d[0] + 1;
  }
  int64_t window_first(int64_t h0) const { return h0 * node.s[0] - node.p[0]; }

  // The first output row, or column, that reaches input pixel i, and the last.
  int64_t first_output(int axis, int64_t i) const {
    return -floor_div((node.k[axis] - 1) * node.d[axis] - node.p[axis] - i, node.s[axis]);
  }
  int64_t last_output(int axis, int64_t i) const {
    return floor_div(i + node.p[axis], node.s[axis]);
  }

  int64_t positions(int64_t images, int64_t h) const { return images * h * node.out.width; }
  int64_t pixels(const PixelClass& c, int64_t images, int64_t h) const {
    return images * max_of<int64_t>(0, ceil_div(h - c.first[0], node.s[0])) * c.columns;
  }

  int64_t scratch_bytes() const {
    const int64_t most = max_of(positions(blocks.images, blocks.band),
                                input_blocks.images * input_blocks.band * node.in.width);
    const int64_t numbers = 2 * blocks.images * window.image() + 2 * most * cols +
                            2 * input_blocks.images * gradient_window.image() +
                            2 * node.groups * transposed() + most * max_of(cols, input_cols);
    return (numbers + 16 * 16) * static_cast<int64_t>(sizeof(T));
  }

  const Node& node;
  int64_t inputs, outputs, patch, cols, input_cols;  // of a group
  bool writes_in_place;                              // the input's gradient, by whole vectors
  Blocks blocks, input_blocks;
  Window window;                // over x, for a block
  std::vector<int64_t> begins;  // of each position's patch, there
  std::vector<int64_t> within;  // of each number of a patch
  Window gradient_window;       // over gy, for a block of the input
  std::vector<PixelClass> classes;

 private:
  // Pixels an odd number of cache lines apart, or else they share few sets of the first cache.
  static int64_t spaced(int64_t ld) {
    constexpr int64_t kLine = 64 / sizeof(T);
    return ld % (2 * kLine) == 0 ? ld + kLine : ld;
  }
  static int64_t window_row(const Shape& s, int64_t times) {
    return times * s.width * spaced(s.ld) * static_cast<int64_t>(sizeof(T));
  }

  void place_patches() {
    const Node& n = node;
    window.pixel = spaced(n.in.ld);
    window.size[0] = window_rows(blocks.band);
    window.size[1] = (n.out.width - 1) * n.s[1] + (n.k[1] - 1) * n.d[1] + 1;
    for (int64_t i = 0; i < blocks.images; ++i) {
      for (int64_t h = 0; h < blocks.band; ++h) {
        for (int64_t w = 0; w < n.out.width; ++w) {
          begins.push_back(i * window.image() + h * n.s[0] * window.row() +
                           w * n.s[1] * window.pixel);
        }
      }
    }
    for (int64_t kh = 0; kh < n.k[0]; ++kh) {
      for (int64_t kw = 0; kw < n.k[1]; ++kw) {
        for (int64_t c = 0; c < inputs; ++c) {
          within.push_back(kh * n.d[0] * window.row() + kw * n.d[1] * window.pixel + c);
        }
      }
    }
  }

  void place_pixels() {
    const Node& n = node;
    const int64_t first[2] = {first_output(0, 0), first_output(1, 0)};
    gradient_window.pixel = spaced(n.out.ld);
    gradient_window.size[0] = last_output(0, input_blocks.band - 1) - first[0] + 1;
    gradient_window.size[1] = last_output(1, n.in.width - 1) - first[1] + 1;
    const int64_t step[2] = {gradient_window.row(), gradient_window.pixel};
    // The tap at k reaches pixel i from output (i + p - k d) / s, where s divides that.
    const auto reaches = [&](int axis, int64_t i, int64_t k) {
      return (i + n.p[axis] - k * n.d[axis]) % n.s[axis] == 0;
    };
    const auto offset = [&](int axis, int64_t i, int64_t k) {
      return ((i + n.p[axis] - k * n.d[axis]) / n.s[axis] - first[axis]) * step[axis];
    };
    int64_t weights = 0;
    for (int64_t h = 0; h < min_of(n.s[0], input_blocks.band); ++h) {
      for (int64_t w = 0; w < min_of(n.s[1], n.in.width); ++w) {
        PixelClass c{{h, w}, ceil_div(n.in.width - w, n.s[1]), {}, {}, {}, {}, weights};
        for (int64_t kh = 0; kh < n.k[0]; ++kh) {
          for (int64_t kw = 0; kw < n.k[1]; ++kw) {
            if (!reaches(0, h, kh) || !reaches(1, w, kw)) continue;
            c.taps.push_back(kh * n.k[1] + kw);
            for (int64_t o = 0; o < outputs; ++o) {
              c.depth.push_back(offset(0, h, kh) + offset(1, w, kw) + o);
            }
          }
        }
        for (int64_t i = 0; i < input_blocks.images; ++i) {
          for (int64_t y = h; y < input_blocks.band; y += n.s[0]) {
            for (int64_t x = w; x < n.in.width; x += n.s[1]) {
              c.places.push_back(i * gradient_window.image() + y / n.s[0] * step[0] +
                                 x / n.s[1] * step[1]);
              c.targets.push_back(((i * n.in.height + y) * n.in.width + x) * n.in.ld);
            }
          }
        }
        weights += static_cast<int64_t>(c.depth.size()) * input_cols;
        classes.push_back(std::move(c));
      }
    }
  }
};

}  // namespace fastmeta::engine::FASTMETA_ISA::convolution
