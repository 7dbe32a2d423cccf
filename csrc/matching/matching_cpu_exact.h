// Maxima and sums of the classes that the backward cuts into blocks.
//
// A share exp(z - lse - logp) has the rounding of lse, a number as large as the scores, in common
// with its whole class: shares add up to 1 + eps * |lse|, an error that does not cancel. Classes
// that lie in one block are normalised by their own sums; for larger ones a pass over their scores,
// before the gradients, finds maximum and sum per query. The pass costs one more product where
// classes are large (for nll, where tasks are), and nothing elsewhere.
#pragma once
#include <algorithm>
#include <cstdint>

#include "matching/matching_cpu_gradient.h"

namespace fastmeta::matching::FASTMETA_ISA {

// Per task, part of its sorted supports and entry a maximum and a sum, lanes apart. Entries are the
// classes above kWholeRowsBackward in order; for nll all supports (0) and those of the target (1).
struct Exact {
  int64_t entries = 0, parts = 1;
  int64_t panel_jobs = 1;  // ranges of panels, each with a job for every part
  void* values = nullptr;  // acc, [T, parts, entries, 2, lanes]
};

static inline bool is_large(const int64_t* start, int64_t c) {
  return start[c + 1] - start[c] > kWholeRowsBackward;
}
static inline int64_t count_large(const int64_t* start, int64_t c0, int64_t c1) {
  int64_t count = 0;
  for (int64_t c = c0; c < c1; ++c) count += is_large(start, c) ? 1 : 0;
  return count;
}

// Takes `n` rows of scores times factor into maximum and sum, in the lanes that `hit` selects.
template <class A, int NV, class Hit>
static void take_scores(const A* tile, int64_t n, A factor, A* maximum, A* sum, const Hit& hit) {
  constexpr int kW = kWidth<A>, kL = NV * kW;
  FASTMETA_UNROLL
  for (int v = 0; v < NV; ++v) {
    const Vec<A> before = load(maximum + v * kW), old = load(sum + v * kW);
    Vec<A> most = before;
    for (int64_t r = 0; r < n; ++r) most = vmax<A>(most, load(tile + r * kL + v * kW) * factor);
    most = vmax<A>(splat<A>(Const<A>::kLowest), most);
    Vec<A> total = old * vexp2<A>(before - most);
    for (int64_t r = 0; r < n; ++r) {
      total += vexp2<A>(load(tile + r * kL + v * kW) * factor - most);
    }
    const auto here = hit(v);
    store(maximum + v * kW, here ? most : before);
    store(sum + v * kW, here ? total : old);
  }
}

// Job `index` of [T, panel_jobs, parts]: a range of panels of queries against one part of the
// supports, block by block past all panels: many supports are read from memory once.
template <class S>
static void measure_classes(const Problem& p, const Exact& exact, const int64_t* orders,
                            const int64_t* starts, int64_t index, Scratch& scratch) {
  using A = Acc<S>;
  constexpr int kW = kWidth<A>, kMaxLanes = kMaxVectors * kW;
  const Panels<A> panels(p.num_queries);
  const int64_t part = index % exact.parts, group = index / exact.parts % exact.panel_jobs;
  const int64_t t = index / (exact.parts * exact.panel_jobs), classes = p.num_classes;
  const int64_t first = panels.count * group / exact.panel_jobs;
  const int64_t last = panels.count * (group + 1) / exact.panel_jobs;
  const int64_t lane0 = panels.begin(first), own_lanes = panels.begin(last) - lane0;
  const int64_t *order = orders + t * p.num_supports, *start = starts + t * (classes + 1);
  const int64_t begin = start[classes] * part / exact.parts;
  const int64_t end = start[classes] * (part + 1) / exact.parts;
  const int64_t rows = block_rows<A>(p.num_supports, p.dim), lanes = panels.lanes();
  const bool nll = p.targets != nullptr, copy = copies_rows<S>(p.dim) && !scores_by_pairs<S>(p);
  scratch.reset(Block<S>::bytes(rows, p.dim, copy) + Scratch::size_of<A>(rows * kMaxLanes) +
                Scratch::size_of<A>(own_lanes * p.dim) + Scratch::size_of<A>(own_lanes) +
                Scratch::size_of<IntVec<A>>(own_lanes / kW));
  const Task<S> task(p, t);
  Block<S> block;
  block.allocate(scratch, rows, p.dim, copy);
  A* tile = scratch.take<A>(rows * kMaxLanes);
  A* packed = scratch.take<A>(own_lanes * p.dim);
  A* terms = scratch.take<A>(own_lanes);
  IntVec<A>* targets = scratch.take<IntVec<A>>(own_lanes / kW);
  A* values =
      static_cast<A*>(exact.values) + (t * exact.parts + part) * exact.entries * 2 * lanes + lane0;
  for (int64_t e = 0; e < exact.entries; ++e) {
    std::fill_n(values + 2 * e * lanes, own_lanes, Const<A>::kLowest);
    std::fill_n(values + (2 * e + 1) * lanes, own_lanes, A(0));
  }
  if (begin == end) return;
  for (int64_t i = first; i < last; ++i) {
    const int64_t query = panels.begin(i), at = query - lane0;
    const int width = panels.vectors_in(i) * kW;
    const int count = static_cast<int>(min_of<int64_t>(width, p.num_queries - query));
    if (nll) load_targets<A>(task.targets + query, classes, count, width, targets + at / kW);
    pack_panel(p, task.query + query * p.dim, count, width, packed + at * p.dim, terms + at);
  }
  const A factor = task.scale * Const<A>::kLog2e;
  int64_t first_class = class_at(start, classes, begin);
  int64_t entry = nll ? 0 : count_large(start, 0, first_class);
  for (int64_t at = begin, n = 0; at < end; at += n) {
    n = min_of(rows, end - at);
    while (start[first_class + 1] <= at) {
      entry += !nll && is_large(start, first_class) ? 1 : 0;
      ++first_class;
    }
    bool needed = nll;
    for_classes(start, first_class, at, n,
                [&](int64_t c, int64_t, int64_t) { needed |= is_large(start, c); });
    if (!needed) continue;
    block.gather(p, task.support, order + at, n, 0);
    const int64_t rest = min_of(rows, end - at - n);
    for (int64_t i = first; i < last; ++i) {
      const int64_t from = rest * (i - first) / (last - first);
      prefetch_rows(task.support, order + at + n + from,
                    rest * (i - first + 1) / (last - first) - from, p.dim);
      const int64_t own = panels.begin(i) - lane0;
      const Finish<A> finish{p.similarity, block.terms,
                             needs_norms(p.similarity) ? terms + own : nullptr, A(1)};
      with_vectors(panels.vectors_in(i), [&](auto nv) {
        constexpr int kNV = decltype(nv)::value, kL = kNV * kW;
        block.template score<kNV>(p, 0, n, packed + own * p.dim, task.weight, finish, tile);
        int64_t e = entry;
        for_classes(start, first_class, at, n, [&](int64_t c, int64_t row, int64_t to) {
          const auto take = [&](int64_t into, const auto& hit) {
            A* maximum = values + 2 * into * lanes + own;
            take_scores<A, kNV>(tile + row * kL, to - row, factor, maximum, maximum + lanes, hit);
          };
          const IntVec<A> id = IntVec<A>{} + static_cast<decltype(IntVec<A>{}[0] + 0)>(c);
          const auto always = [&](int) { return id == id; };
          if (nll) {
            take(0, always);
            take(1, [&](int v) { return targets[own / kW + v] == id; });
          } else if (is_large(start, c)) {
            take(e++, always);
          }
        });
      });
    }
  }
}

// Merges the parts of an entry: off becomes its maximum, amplitude is divided by its sum.
template <class A>
static void normalise(const Exact& exact, int64_t t, int64_t entry, int64_t lanes, int64_t query,
                      int width, A* off, A* amplitude) {
  constexpr int kW = kWidth<A>;
  const A* values = static_cast<const A*>(exact.values) + query +
                    (t * exact.parts * exact.entries + entry) * 2 * lanes;
  const int64_t stride = exact.entries * 2 * lanes;
  for (int l = 0; l < width; l += kW) {
    Vec<A> most = splat<A>(Const<A>::kLowest), sum{};
    for (int64_t k = 0; k < exact.parts; ++k) {
      most = vmax<A>(most, load(values + k * stride + l));
    }
    for (int64_t k = 0; k < exact.parts; ++k) {
      sum += load(values + k * stride + lanes + l) * vexp2<A>(load(values + k * stride + l) - most);
    }
    const Vec<A> zero{}, a = load(amplitude + l);
    store(off + l, most);
    store(amplitude + l, (a == A(0)) | (sum == A(0)) ? zero : a / sum);
  }
}

}  // namespace fastmeta::matching::FASTMETA_ISA
