// What forward and backward share on the CPU: panels of queries, blocks of supports, jobs.
#pragma once
#include <cstdint>

#include "common/class_order.h"
#include "common/scratch.h"
#include "matching/matching_cpu_bf16.h"
#include "matching/matching_cpu_rows.h"

namespace fastmeta::matching::FASTMETA_ISA {

// The queries of a task as panels of up to kMaxVectors vectors, as even as they can be.
template <class A>
struct Panels {
  explicit Panels(int64_t num_queries)
      : queries(num_queries),
        vectors(ceil_div(num_queries, kWidth<A>)),
        count(ceil_div(vectors, kMaxVectors)) {}
  int vectors_in(int64_t panel) const {
    return static_cast<int>(vectors / count + (panel < vectors % count ? 1 : 0));
  }
  // Where a panel begins, in lanes and so in queries.
  int64_t begin(int64_t panel) const {
    return (panel * (vectors / count) + min_of(panel, vectors % count)) * kWidth<A>;
  }
  int64_t lanes() const { return vectors * kWidth<A>; }
  int64_t queries, vectors, count;
};

// Rows of support per block: the score tile fits the L1 cache and the rows the L2 cache; blocks
// even.
template <class A>
static int64_t block_rows(int64_t num_rows, int64_t dim) {
  constexpr int64_t kRows = 48, kBytes = 256 << 10;
  const int64_t fit = kBytes / (max_of<int64_t>(1, dim) * static_cast<int64_t>(sizeof(A)));
  const int64_t most = min_of(kRows, max_of<int64_t>(32, fit / 8 * 8));
  const int64_t blocks = max_of<int64_t>(1, ceil_div(num_rows, most));
  return max_of<int64_t>(1, ceil_div(num_rows, blocks));
}

// Multiply-adds of a task, with exponentials and packing at a rough price: what grains are made of.
static inline int64_t task_work(const Problem& p) {
  const int64_t price = p.similarity == Similarity::kAdditive ? 16 : 1;
  return p.num_queries * (p.num_supports * (p.dim * price + 24) + 8 * p.dim + 4 * p.num_classes) +
         1024;
}
constexpr int64_t kSerialWork = int64_t{1} << 19;  // work that another thread is worth waking for
constexpr int64_t kJobWork = int64_t{1} << 21;     // least work of a job when tasks are split
constexpr int64_t kJobs = 32;                      // jobs to aim for when tasks are few

// Supports that stay in the cache while panel after panel passes by them; more are taken block by
// block past all panels.
constexpr int64_t kResidentBytes = int64_t{512} << 10;

static inline int64_t jobs_per_task(const Problem& p) {
  if (p.num_tasks >= kJobs / 4) return 1;
  return max_of<int64_t>(1, min_of(kJobs / p.num_tasks, task_work(p) / kJobWork));
}

// Class holding sorted position i, which is valid.
static inline int64_t class_at(const int64_t* start, int64_t num_classes, int64_t i) {
  int64_t low = 0, high = num_classes;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (start[middle] <= i ? low : high) = middle;
  }
  return low;
}

// Where chunk `index` of the sorted supports begins: not within a class of at most `whole` rows.
static inline int64_t chunk_begin(const int64_t* start, int64_t num_classes, int64_t index,
                                  int64_t chunks, int64_t whole) {
  const int64_t valid = start[num_classes], at = valid * index / chunks;
  if (at == valid) return valid;
  const int64_t c = class_at(start, num_classes, at);
  return start[c + 1] - start[c] <= whole ? start[c] : at;
}

// Supports in the block that begins at `at`, about `rows` and none past `end`: whole classes, but
// for those above `whole` rows. together: a task of at most `whole` rows is one block.
static inline int64_t block_size(const int64_t* start, int64_t num_classes, int64_t at, int64_t end,
                                 int64_t rows, int64_t whole, bool together) {
  if (together && at == 0 && end == start[num_classes] && end <= whole) return end;
  const int64_t n = min_of(rows, end - at);
  if (n == end - at) return n;
  const int64_t c = class_at(start, num_classes, at + n - 1);
  const int64_t size = start[c + 1] - start[c];
  if (start[c + 1] == at + n || size > whole) return n;
  return start[c] > at ? start[c] - at : size;
}

// Calls f(class, first row, one past its last row) for the classes among sorted supports [begin,
// begin + n), rows counted from begin.
template <class F>
static void for_classes(const int64_t* start, int64_t first_class, int64_t begin, int64_t n,
                        const F& f) {
  int64_t c = first_class;
  for (int64_t i = begin; i < begin + n; ++c) {
    const int64_t end = min_of(start[c + 1], begin + n);
    if (end <= i) continue;
    f(c, i - begin, end - begin);
    i = end;
  }
}

template <class A>
static void zero_row(A* row, int64_t n) {
  for (int64_t i = 0; i < n; ++i) row[i] = A{};
}

// A task of the problem with typed pointers.
template <class S>
struct Task {
  using A = Acc<S>;
  Task(const Problem& p, int64_t t)
      : query(static_cast<const S*>(p.query) + t * p.num_queries * p.dim),
        support(static_cast<const S*>(p.support) + t * p.num_supports * p.dim),
        labels(p.labels + t * p.num_supports),
        targets(p.targets == nullptr ? nullptr : p.targets + t * p.num_queries),
        scale(static_cast<const A*>(p.scale)[t * p.scale_stride]),
        weight(p.weight == nullptr ? nullptr
                                   : static_cast<const A*>(p.weight) + t * p.weight_stride) {}
  const S* query;
  const S* support;
  const int64_t* labels;
  const int64_t* targets;
  A scale;
  const A* weight;
};

static inline bool needs_norms(Similarity s) {
  return s == Similarity::kCosine || s == Similarity::kSqEuclidean;
}
// What a squared norm contributes to the finish: itself, or under cosine its inverse root, 0 for
// the zero vector.
template <class A>
static A norm_term(Similarity s, A squared) {
  if (s == Similarity::kSqEuclidean) return squared;
  return squared == A(0) ? A(0) : A(1) / sqrt_of(squared);
}

// Factor of a row's own vector in its gradient, times what the row receives along it; term is its
// norm_term.
template <class A>
static A own_factor(Similarity s, A term) {
  return s == Similarity::kCosine ? -term * term : A(-1);
}

// Packs a panel and, where the similarity wants them, the norm terms of its lanes.
template <class S>
static void pack_panel(const Problem& p, const S* query, int count, int lanes, Acc<S>* packed,
                       Acc<S>* terms) {
  using A = Acc<S>;
  if (scores_by_pairs<S>(p)) {
    if constexpr (kPairs<S>) {
      pack_pairs(query, p.dim, count, lanes, packed);
      if (needs_norms(p.similarity)) pair_norms(packed, p.dim, lanes, terms);
    }
  } else {
    pack_transposed(query, p.dim, p.dim, count, lanes, packed);
    if (needs_norms(p.similarity)) panel_norms<A>(packed, p.dim, lanes, terms);
  }
  if (!needs_norms(p.similarity)) return;
  if (p.similarity == Similarity::kSqEuclidean) return;
  for (int l = 0; l < lanes; l += kWidth<A>) {
    const Vec<A> x = load(terms + l);
    store(terms + l, x == A(0) ? Vec<A>{} : A(1) / vsqrt<A>(x));
  }
}

// Norm terms of queries read as rows, 0 in the lanes past count.
template <class A>
static void row_terms(const Problem& p, const A* const* rows, int count, int lanes, A* terms) {
  if (!needs_norms(p.similarity)) return;
  for (int l = 0; l < lanes; ++l) {
    terms[l] = l < count ? norm_term(p.similarity, squared_norm(rows[l], p.dim)) : A(0);
  }
}

// Rows are read in place, or copied to rows of this many elements: 16-bit types to convert them,
// and rows a large power of two apart because they would compete for the same few sets of the L1
// cache.
template <class S>
static bool copies_rows(int64_t dim) {
  const int64_t bytes = dim * static_cast<int64_t>(sizeof(S));
  return kIsHalf<S> || (bytes >= 1024 && bytes % 1024 == 0);
}
template <class S>
static int64_t copy_stride(int64_t dim) {
  return (dim + 15) / 16 * 16 + 16;
}

// `count` rows in accumulation type: in place, or as copies.
template <class S>
static void take_rows(const S* from, int64_t dim, int count, Acc<S>* copies, const Acc<S>** to) {
  for (int l = 0; l < count; ++l) {
    if (copies_rows<S>(dim)) {
      to[l] = copies + l * copy_stride<S>(dim);
      convert_row(from + l * dim, dim, copies + l * copy_stride<S>(dim));
    } else if constexpr (!kIsHalf<S>) {
      to[l] = from + l * dim;
    }
  }
}

// Rows order[0..count) of `rows` into the L2 cache: in class order they lie where no prefetcher of
// the hardware looks.
template <class S>
static void prefetch_rows(const S* rows, const int64_t* order, int64_t count, int64_t dim) {
  const int64_t bytes = dim * static_cast<int64_t>(sizeof(S));
  for (int64_t r = 0; r < count; ++r) {
    const char* row = reinterpret_cast<const char*>(rows + order[r] * dim);
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(row + b, 0, 2);
  }
}

// A block of supports in class order: rows in accumulation type and norm terms; where scores may be
// made by pairs, the rows as they are as well, and those converted only if `copy` says so.
template <class S>
struct Block {
  using A = Acc<S>;
  static int64_t bytes(int64_t rows, int64_t dim, bool copy) {
    return Scratch::size_of<const A*>(rows) + Scratch::size_of<A>(rows) +
           Scratch::size_of<const S*>(kPairs<S> ? rows : 0) +
           (copy ? Scratch::size_of<A>(rows * copy_stride<S>(dim)) : 0);
  }
  void allocate(Scratch& scratch, int64_t capacity, int64_t dim, bool copy) {
    rows = scratch.take<const A*>(capacity);
    terms = scratch.take<A>(capacity);
    given = scratch.take<const S*>(kPairs<S> ? capacity : 0);
    copies = copy ? scratch.take<A>(capacity * copy_stride<S>(dim)) : nullptr;
  }
  // Rows order[0..count) of `support` to slots from `slot` on.
  void gather(const Problem& p, const S* support, const int64_t* order, int64_t count,
              int64_t slot) {
    for (int64_t r = slot; r < slot + count; ++r) {
      const S* from = support + order[r - slot] * p.dim;
      if (copies != nullptr) {
        A* to = copies + r * copy_stride<S>(p.dim);
        convert_row(from, p.dim, to);
        rows[r] = to;
      } else if constexpr (!kIsHalf<S>) {
        rows[r] = from;
      }
      if constexpr (kPairs<S>) given[r] = from;
      if (needs_norms(p.similarity)) {
        terms[r] = norm_term(p.similarity,
                             kPairs<S> ? squared_norm(from, p.dim) : squared_norm(rows[r], p.dim));
      }
    }
  }
  // score_block() of rows [slot, slot + n) with a panel that pack_panel() made.
  template <int NV>
  void score(const Problem& p, int64_t slot, int64_t n, const A* panel, const A* weight,
             const Finish<A>& finish, A* tile) const {
    if constexpr (kPairs<S>) {
      if (scores_by_pairs<S>(p)) {
        return score_pairs(Int<NV>{}, given + slot, n, panel, p.dim, finish, tile);
      }
    }
    score_block<A, NV>(rows + slot, n, panel, p.dim, weight, finish, tile);
  }
  const A** rows;
  A* terms;
  const S** given;
  A* copies;
};

// Labels as lane values: a target outside [0, C) matches no class.
template <class A>
static void load_targets(const int64_t* targets, int64_t num_classes, int count, int lanes,
                         IntVec<A>* out) {
  constexpr int kW = kWidth<A>;
  for (int l = 0; l < lanes; ++l) {
    const bool inside =
        l < count && static_cast<uint64_t>(targets[l]) < static_cast<uint64_t>(num_classes);
    out[l / kW][l % kW] = inside ? targets[l] : -1;
  }
}

}  // namespace fastmeta::matching::FASTMETA_ISA
