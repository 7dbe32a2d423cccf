// A job of the double backward: some panels of a task against some of its sorted supports.
#pragma once
#include <cstdint>

#include "matching/matching_cpu_second_tables.h"

namespace fastmeta::matching::FASTMETA_ISA {

constexpr int64_t kTileBytes = int64_t{192} << 10;  // tiles kept from the first pass to the second

struct SecondPlan {
  const DoubleBackward* args;
  int64_t chunks;
  bool split_queries;         // else supports
  int64_t* order = nullptr;   // [T, S]
  int64_t* start = nullptr;   // [T, C + 1]
  void* move = nullptr;       // [T, lanes] M
  void* reference = nullptr;  // [T, lanes]
  void* partial = nullptr;    // [T, chunks, Q or S, D]
  void* weight = nullptr;     // [T, chunks, D], additive
  double* scale = nullptr;    // [T, chunks]
};

enum class Pass { kMoves, kGradients, kBoth };

// Panels [first, last) of a task against its sorted supports [begin, end).
template <class S>
struct SecondJob {
  using A = Acc<S>;
  static constexpr int kW = kWidth<A>, kMaxLanes = kMaxVectors * kW;

  const SecondPlan& plan;
  const DoubleBackward& args;
  const Problem& p;
  const Problem plain;  // p as inner products, for the directions: no norms
  const Task<S> task;
  const int64_t t;
  const bool nll, additive;
  const Panels<A> panels;
  const int64_t *order, *start;
  const int64_t first, last, begin, end;
  const S *query_dot, *support_dot;  // of the task; nullptr: zero
  // Whether directions have rows: those given and, as euclidean takes differences of two, those
  // that are zero there.
  const bool has_query_dot, has_support_dot;
  A scale_dot;
  const A* weight_dot;
  int64_t c0, c1;  // classes that the supports span
  SecondTables<A> tables;
  A* partial;  // private gradients of the side that is not split, or nullptr
  bool query_partial;

  bool resident, keep;
  int64_t group, group_lanes, rows, tile_rows;
  Block<S> block, block_dot;
  A *row_stretch, *tiles[4];
  SecondPanel<A>* panel;
  A *packed, *packed_dot, *arrays, *copies, *copies_dot, *grad_query_copies, *grad_support_copies,
      *grad_weight, *zeros;
  IntVec<A>* targets;
  Vec<A>*row_own, *row_own_dot;
  const A **query_rows, **query_rows_dot;
  A **grad_query_rows, **grad_support_rows;
  double scale_total = 0;

  SecondJob(Scratch& scratch, const SecondPlan& plan_, int64_t task_index, int64_t first_,
            int64_t last_, int64_t begin_, int64_t end_, A* partial_, bool query_partial_,
            Pass pass)
      : plan(plan_),
        args(*plan_.args),
        p(args.problem),
        plain(as_products(p)),
        task(p, task_index),
        t(task_index),
        nll(p.targets != nullptr),
        additive(p.similarity == Similarity::kAdditive),
        panels(p.num_queries),
        order(plan.order + t * p.num_supports),
        start(plan.start + t * (p.num_classes + 1)),
        first(first_),
        last(last_),
        begin(begin_),
        end(end_),
        query_dot(of_task(args.query_dot, p.num_queries)),
        support_dot(of_task(args.support_dot, p.num_supports)),
        has_query_dot(query_dot != nullptr || p.similarity == Similarity::kEuclidean),
        has_support_dot(support_dot != nullptr || p.similarity == Similarity::kEuclidean),
        scale_dot(args.scale_dot == nullptr ? A(0) : static_cast<const A*>(args.scale_dot)[t]),
        weight_dot(args.weight_dot == nullptr ? nullptr
                                              : static_cast<const A*>(args.weight_dot) + t * p.dim),
        c0(0),
        c1(p.num_classes),
        tables{args,
               p,
               t,
               nll,
               start,
               c0,
               c1,
               static_cast<A*>(plan.move) + t * panels.lanes(),
               static_cast<A*>(plan.reference) + t * panels.lanes()},
        partial(partial_),
        query_partial(query_partial_) {
    while (c0 < c1 && start[c0 + 1] <= begin && pass == Pass::kGradients) ++c0;
    while (c1 > c0 && start[c1 - 1] >= end && pass == Pass::kGradients) --c1;
    tables.c0 = c0, tables.c1 = c1;
    rows = block_rows<A>(p.num_supports, p.dim);
    const int64_t bytes = static_cast<int64_t>(sizeof(A));
    resident = (end - begin) * p.dim * bytes * 2 <= kResidentBytes;
    group = resident ? 1 : last - first;
    group_lanes = resident ? kMaxLanes : panels.begin(last) - panels.begin(first);
    keep = pass == Pass::kBoth && resident && (end - begin) * kMaxLanes * bytes * 4 <= kTileBytes;
    tile_rows = keep ? end - begin : min_of(kWholeRows, p.num_supports);
    allocate(scratch);
    if (additive) zero_row(grad_weight, p.dim);
  }

  static Problem as_products(Problem problem) {
    problem.bf16_dots = scores_by_pairs<S>(problem);
    problem.similarity = Similarity::kDot;
    return problem;
  }
  const S* of_task(const void* all, int64_t count) const {
    return all == nullptr ? nullptr : static_cast<const S*>(all) + t * count * p.dim;
  }

  void allocate(Scratch& scratch) {
    const int64_t slots = resident ? end - begin : tile_rows, dim = p.dim;
    const int64_t classes = nll ? 2 : c1 - c0, stride = copy_stride<S>(dim);
    const int64_t copied = copies_rows<S>(dim) ? group_lanes * stride : 0;
    const int64_t half_queries = kIsHalf<S> ? group_lanes * dim : 0;
    const int64_t half_supports = kIsHalf<S> ? slots * dim : 0;
    const int64_t array = group_lanes * (5 + 4 * classes);
    scratch.reset(2 * Block<S>::bytes(slots, dim, copies_rows<S>(dim)) +
                  Scratch::size_of<A>(slots) + 4 * Scratch::size_of<A>(tile_rows * kMaxLanes) +
                  Scratch::size_of<SecondPanel<A>>(group) +
                  2 * Scratch::size_of<A>(group_lanes * dim) + Scratch::size_of<A>(array) +
                  2 * Scratch::size_of<A>(copied) + Scratch::size_of<A>(half_queries) +
                  Scratch::size_of<A>(half_supports) + Scratch::size_of<A>(additive ? dim : 0) +
                  Scratch::size_of<A>(dim) + Scratch::size_of<IntVec<A>>(group_lanes / kW) +
                  2 * Scratch::size_of<Vec<A>>(slots) + 3 * Scratch::size_of<A*>(group_lanes) +
                  Scratch::size_of<A*>(slots));
    block.allocate(scratch, slots, dim, copies_rows<S>(dim));
    block_dot.allocate(scratch, slots, dim, copies_rows<S>(dim));
    row_stretch = scratch.take<A>(slots);
    for (A*& tile : tiles) tile = scratch.take<A>(tile_rows * kMaxLanes);
    panel = scratch.take<SecondPanel<A>>(group);
    packed = scratch.take<A>(group_lanes * dim);
    packed_dot = scratch.take<A>(group_lanes * dim);
    arrays = scratch.take<A>(array);
    copies = scratch.take<A>(copied);
    copies_dot = scratch.take<A>(copied);
    grad_query_copies = scratch.take<A>(half_queries);
    grad_support_copies = scratch.take<A>(half_supports);
    grad_weight = scratch.take<A>(additive ? dim : 0);
    zeros = scratch.take<A>(dim);
    zero_row(zeros, dim);
    targets = scratch.take<IntVec<A>>(group_lanes / kW);
    row_own = scratch.take<Vec<A>>(slots);
    row_own_dot = scratch.take<Vec<A>>(slots);
    query_rows = scratch.take<const A*>(group_lanes);
    query_rows_dot = scratch.take<const A*>(group_lanes);
    grad_query_rows = scratch.take<A*>(group_lanes);
    grad_support_rows = scratch.take<A*>(slots);
  }

  // ---- panels
  void open_panel(int64_t i, int64_t g) {
    const int64_t classes = nll ? 2 : c1 - c0, dim = p.dim;
    const int64_t at = panels.begin(i) - panels.begin(g);
    SecondPanel<A>& x = panel[i - g];
    x.vectors = panels.vectors_in(i);
    x.query = panels.begin(i);
    const int width = x.vectors * kW;
    x.count = static_cast<int>(min_of<int64_t>(width, p.num_queries - x.query));
    x.packed = packed + at * dim;
    x.packed_dot = query_dot == nullptr ? nullptr : packed_dot + at * dim;
    A* from = arrays + at * (5 + 4 * classes);
    const auto take = [&](int64_t n) {
      A* array = from;
      from += n * width;
      return array;
    };
    x.terms = take(1), x.stretch = take(1), x.own = take(1), x.own_dot = take(1);
    x.reference = take(1);
    x.off = take(classes), x.amplitude = take(classes), x.one = take(classes),
    x.two = take(classes);
    x.targets = targets + at / kW;
    x.rows = query_rows + at;
    x.rows_dot = has_query_dot ? query_rows_dot + at : nullptr;
    x.grad = grad_query_rows + at;
    const S* query = task.query + x.query * dim;
    pack_panel(p, query, x.count, width, x.packed, x.terms);
    take_rows(query, dim, x.count, copies + at * copy_stride<S>(dim), x.rows);
    if (query_dot != nullptr) {
      const S* dot = query_dot + x.query * dim;
      pack_panel(plain, dot, x.count, width, x.packed_dot, x.terms);
      take_rows(dot, dim, x.count, copies_dot + at * copy_stride<S>(dim), x.rows_dot);
    } else if (has_query_dot) {
      for (int l = 0; l < x.count; ++l) x.rows_dot[l] = zeros;
    }
    panel_stretch(x, width);
    for (int l = 0; l < width; ++l) x.own[l] = x.own_dot[l] = 0;
    for (int l = 0; l < x.count; ++l) {
      if (query_partial) {
        x.grad[l] = partial + (x.query + l) * dim;
      } else if constexpr (kIsHalf<S>) {
        x.grad[l] = grad_query_copies + (at + l) * dim;
      } else {
        x.grad[l] = static_cast<A*>(args.grad_query) + (t * p.num_queries + x.query + l) * dim;
      }
    }
    if (nll) {
      load_targets<A>(task.targets + x.query, p.num_classes, x.count, width, x.targets);
      tables.open_targets(x);
    } else {
      tables.open_classes(x);
    }
  }

  // <q, q'> per lane, under cosine times the inverse squared norm.
  void panel_stretch(const SecondPanel<A>& x, int width) const {
    if (scores_by_pairs<S>(p)) {  // the panel holds words
      for (int l = 0; l < width; ++l) {
        const A term = p.similarity == Similarity::kCosine ? x.terms[l] * x.terms[l] : A(1);
        const bool none = query_dot == nullptr || l >= x.count || !needs_norms(p.similarity);
        x.stretch[l] = none ? A(0) : term * dot_row(x.rows[l], x.rows_dot[l]);
      }
      return;
    }
    for (int l = 0; l < width; l += kW) {
      Vec<A> sum{};
      for (int64_t d = 0; query_dot != nullptr && d < p.dim; ++d) {
        sum += load(x.packed + d * width + l) * load(x.packed_dot + d * width + l);
      }
      if (p.similarity == Similarity::kCosine) sum *= load(x.terms + l) * load(x.terms + l);
      store(x.stretch + l, sum);
    }
  }

  void close_panel(const SecondPanel<A>& x) {
    for (int l = 0; l < x.count; ++l) {
      if (needs_norms(p.similarity) && begin < end) {
        const A factor = own_factor(p.similarity, x.terms[l]);
        add_scaled(x.grad[l], x.own[l] * factor, x.rows[l], p.dim);
        if (query_dot != nullptr) {
          add_scaled(x.grad[l], x.own_dot[l] * factor, x.rows_dot[l], p.dim);
        }
      }
      if constexpr (kIsHalf<S>) {
        S* out = static_cast<S*>(args.grad_query) + (tables.first_row(x) + l) * p.dim;
        if (!query_partial) store_row(x.grad[l], p.dim, out);
      }
    }
  }

  // ---- blocks of supports
  void open_block(int64_t at, int64_t n, int64_t slot, bool gradients) {
    block.gather(p, task.support, order + at, n, slot);
    if (support_dot != nullptr) block_dot.gather(plain, support_dot, order + at, n, slot);
    for (int64_t r = slot; r < slot + n; ++r) {
      if (support_dot == nullptr) block_dot.rows[r] = zeros;
      row_own[r] = row_own_dot[r] = Vec<A>{};
      if (needs_norms(p.similarity)) {
        A stretch = support_dot == nullptr ? A(0) : dot_row(block.rows[r], block_dot.rows[r]);
        if (p.similarity == Similarity::kCosine) stretch *= block.terms[r] * block.terms[r];
        row_stretch[r] = stretch;
      }
      if (!gradients) continue;
      const int64_t row = order[at + r - slot];
      if (partial != nullptr && !query_partial) {
        grad_support_rows[r] = partial + row * p.dim;
      } else if constexpr (kIsHalf<S>) {
        grad_support_rows[r] = grad_support_copies + r * p.dim;
      } else {
        grad_support_rows[r] =
            static_cast<A*>(args.grad_support) + (t * p.num_supports + row) * p.dim;
      }
    }
  }
  A dot_row(const A* x, const A* y) const {
    Vec<A> sum{};
    int64_t d = 0;
    for (; d + kW <= p.dim; d += kW) sum += load(x + d) * load(y + d);
    const int left = static_cast<int>(p.dim - d);
    if (left > 0) sum += load_n(x + d, left) * load_n(y + d, left);
    return hsum<A>(sum);
  }

  void close_block(int64_t at, int64_t n) {
    for (int64_t r = 0; r < n; ++r) {
      if (needs_norms(p.similarity)) {
        const A factor = own_factor(p.similarity, block.terms[r]);
        add_scaled(grad_support_rows[r], hsum<A>(row_own[r]) * factor, block.rows[r], p.dim);
        if (support_dot != nullptr) {
          add_scaled(grad_support_rows[r], hsum<A>(row_own_dot[r]) * factor, block_dot.rows[r],
                     p.dim);
        }
      }
      if constexpr (kIsHalf<S>) {
        S* out = static_cast<S*>(args.grad_support) + (t * p.num_supports + order[at + r]) * p.dim;
        if (partial == nullptr || query_partial) store_row(grad_support_rows[r], p.dim, out);
      }
    }
  }

  // ---- tiles
  template <int NV>
  void make_tiles(const SecondPanel<A>& x, int64_t at, int64_t n, int64_t slot, int64_t first_class,
                  A* sims, A* tangent, A* weights, A* spare) {
    constexpr int kL = NV * kW;
    const A* const* rows_at = block.rows + slot;
    const A* const* dots_at = has_support_dot ? block_dot.rows + slot : nullptr;
    const Finish<A> finish{p.similarity, block.terms + slot,
                           needs_norms(p.similarity) ? x.terms : nullptr, A(1)};
    block.template score<NV>(p, slot, n, x.packed, task.weight, finish, sims);
    if (p.similarity == Similarity::kEuclidean) {
      tangent_euclidean<A, NV>(rows_at, dots_at, n, x.packed, x.packed_dot, p.dim, sims, tangent);
    } else if (additive) {
      tangent_additive<A, NV>(rows_at, dots_at, n, x.packed, x.packed_dot, p.dim, task.weight,
                              weight_dot, tangent);
    } else {
      const Finish<A> product{Similarity::kDot, nullptr, nullptr, A(1)};
      if (x.packed_dot != nullptr) {
        block.template score<NV>(plain, slot, n, x.packed_dot, nullptr, product, tangent);
      } else {
        for (int64_t i = 0; i < n * kL; ++i) tangent[i] = 0;
      }
      if (dots_at != nullptr) {
        block_dot.template score<NV>(plain, slot, n, x.packed, nullptr, product, spare);
        for (int64_t i = 0; i < n * kL; i += kW)
          store(tangent + i, load(tangent + i) + load(spare + i));
      }
      finish_tangent<A, NV>(directions(x, slot), n, sims, tangent);
    }
    const A factor = task.scale * Const<A>::kLog2e;
    if (nll) {
      const bool all = at == 0 && n == start[p.num_classes];
      target_weights<A, NV>(x, start, first_class, at, n, all, factor, sims, weights);
    } else {
      class_weights<A, NV>(x, start, first_class, c0, at, n, factor, sims, weights);
    }
  }
  Directions<A> directions(const SecondPanel<A>& x, int64_t slot) const {
    return {p.similarity, block.terms + slot, row_stretch + slot, x.terms, x.stretch};
  }

  A* tile_at(int i, const SecondPanel<A>& x, int64_t at) const {
    return tiles[i] + (keep ? (at - begin) * x.vectors * kW : 0);
  }

  void moves_step(const SecondPanel<A>& x, int64_t at, int64_t n, int64_t slot,
                  int64_t first_class) {
    A *sims = tile_at(0, x, at), *tangent = tile_at(1, x, at), *weights = tile_at(2, x, at);
    with_vectors(x.vectors, [&](auto nv) {
      constexpr int kNV = decltype(nv)::value;
      make_tiles<kNV>(x, at, n, slot, first_class, sims, tangent, weights, tile_at(3, x, at));
      if (at == 0) convert_row(sims, kNV * kW, x.reference);
      add_moves<A, kNV>(x, nll, start, first_class, c0, at, n, task.scale, scale_dot, sims, tangent,
                        weights);
    });
  }

  void gradient_step(const SecondPanel<A>& x, int64_t at, int64_t n, int64_t slot,
                     int64_t first_class, bool add_query, bool add_support) {
    const int width = x.vectors * kW;
    A *sims = tile_at(0, x, at), *tangent = tile_at(1, x, at), *weights = tile_at(2, x, at);
    A* bends = tile_at(3, x, at);
    with_vectors(x.vectors, [&](auto nv) {
      constexpr int kNV = decltype(nv)::value;
      if (!keep) make_tiles<kNV>(x, at, n, slot, first_class, sims, tangent, weights, bends);
      bend<A, kNV>(x, nll, start, first_class, c0, at, n, task.scale, scale_dot, sims, tangent,
                   weights, bends);
      scale_total += second_coefficients_of<A, kNV>(x, directions(x, slot), n, task.scale,
                                                    scale_dot, weights, bends, sims, tangent,
                                                    RowOwn<A>{row_own + slot, row_own_dot + slot});
    });
    const A* const* supports = block.rows + slot;
    const A* const* dots = has_support_dot ? block_dot.rows + slot : nullptr;
    A* const* to = grad_support_rows + slot;
    if (additive) {
      return additive_second<A>(sims, tangent, width,
                                AdditiveRows<A>{supports, dots, to, add_support}, n,
                                AdditiveRows<A>{x.rows, x.rows_dot, x.grad, add_query}, x.count,
                                p.dim, task.weight, weight_dot, grad_weight);
    }
    const OuterRun<A> along_supports[] = {{sims, 1, width, supports, n, x.rows},
                                          {tangent, 1, width, dots, n, x.rows_dot}};
    const OuterRun<A> along_queries[] = {{sims, width, 1, x.rows, x.count, supports},
                                         {tangent, width, 1, x.rows_dot, x.count, dots}};
    outer(Outer<A>{along_supports, has_support_dot ? 2 : 1, x.grad, add_query}, p.similarity,
          x.count, 0, p.dim);
    outer(Outer<A>{along_queries, has_query_dot ? 2 : 1, to, add_support}, p.similarity, n, 0,
          p.dim);
  }

  // Calls f(position, count, slot, first class) block by block.
  template <class F>
  void for_blocks(const F& f) const {
    int64_t first_class = c0, n = 0;
    for (int64_t at = begin; at < end; at += n) {
      n = block_size(start, p.num_classes, at, end, rows, kWholeRows, nll);
      while (start[first_class + 1] <= at) ++first_class;
      f(at, n, resident ? at - begin : 0, first_class);
    }
  }

  void run(Pass pass) {
    if (resident) open_block(begin, end - begin, 0, pass != Pass::kMoves);
    for (int64_t g = first; g < last; g += group) {
      const int64_t count = min_of(last - g, group);
      for (int64_t i = 0; i < count; ++i) open_panel(g + i, g);
      if (pass != Pass::kGradients) {
        for_blocks([&](int64_t at, int64_t n, int64_t slot, int64_t first_class) {
          if (!resident) open_block(at, n, slot, false);
          for (int64_t i = 0; i < count; ++i) moves_step(panel[i], at, n, slot, first_class);
        });
        for (int64_t i = 0; i < count; ++i) tables.close_moves(panel[i]);
      }
      if (pass == Pass::kMoves) continue;
      for (int64_t i = 0; i < count; ++i) {
        tables.open_gradients(panel[i]);
        for (int l = 0; begin == end && l < panel[i].count; ++l) zero_row(panel[i].grad[l], p.dim);
      }
      for_blocks([&](int64_t at, int64_t n, int64_t slot, int64_t first_class) {
        if (!resident) open_block(at, n, slot, true);
        for (int64_t i = 0; i < count; ++i) {
          gradient_step(panel[i], at, n, slot, first_class, at > begin, g + i > first);
        }
        if (!resident) close_block(at, n);
      });
      for (int64_t i = 0; i < count; ++i) close_panel(panel[i]);
    }
    if (resident && pass != Pass::kMoves) close_block(begin, end - begin);
  }
};

}  // namespace fastmeta::matching::FASTMETA_ISA
