// How the tensors of an update are cut into pieces for the threads of the CPU.
//
// All tensors together are cut into pieces of about kPieceElements, so that threads share the
// elements evenly however unequal the tensors are; a piece is a range of whole task rows or a range
// within one row. Pieces depend on shapes only and partial sums of the backward are added in the
// order of the pieces.
#pragma once
#include "common/vec.h"

namespace fastmeta::update::FASTMETA_ISA {

using namespace fastmeta::FASTMETA_ISA;

constexpr int64_t kPieceElements = 16384;

enum class Cut { kRows, kWithinRows, kColumns };

// How a tensor seen as [T, N] is cut: pieces of `size` whole rows, of `size` elements of one row,
// or of `size` columns through all rows.
struct Cutting {
  Cut cut;
  int64_t tasks, elements;  // T and N, T folded into N where that changes nothing
  int64_t size, pieces_per_row, pieces;
  int64_t first_piece;
};

FASTMETA_INLINE Cutting cut_tensor(int64_t tasks, int64_t elements, bool fold, bool columns,
                                   int64_t first_piece) {
  Cutting c;
  c.tasks = fold ? 1 : tasks;
  c.elements = fold ? tasks * elements : elements;
  c.first_piece = first_piece;
  c.pieces_per_row = 1;
  if (c.tasks == 0 || c.elements == 0) {
    c.cut = Cut::kRows;
    c.size = 1;
    c.pieces = 0;
  } else if (columns) {
    c.cut = Cut::kColumns;
    c.size = max_of<int64_t>(64, ceil_div(kPieceElements, c.tasks * 64) * 64);
    c.pieces = ceil_div(c.elements, c.size);
  } else if (c.elements > kPieceElements) {
    c.cut = Cut::kWithinRows;
    c.pieces_per_row = ceil_div(c.elements, kPieceElements);
    c.size = ceil_div(ceil_div(c.elements, c.pieces_per_row), 64) * 64;
    c.pieces_per_row = ceil_div(c.elements, c.size);
    c.pieces = c.tasks * c.pieces_per_row;
  } else {
    c.cut = Cut::kRows;
    c.size = max_of<int64_t>(1, kPieceElements / c.elements);
    c.pieces = ceil_div(c.tasks, c.size);
  }
  return c;
}

// The rectangle [task_begin, task_end) x [begin, end) of a piece.
struct Piece {
  int64_t tensor, task_begin, task_end, begin, end;
};
FASTMETA_INLINE Piece find_piece(const Cutting* cuts, int64_t num_tensors, int64_t index) {
  int64_t low = 0, high = num_tensors;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (cuts[middle].first_piece <= index ? low : high) = middle;
  }
  const Cutting& c = cuts[low];
  const int64_t k = index - c.first_piece;
  switch (c.cut) {
    case Cut::kRows:
      return {low, k * c.size, min_of(c.tasks, (k + 1) * c.size), 0, c.elements};
    case Cut::kColumns:
      return {low, 0, c.tasks, k * c.size, min_of(c.elements, (k + 1) * c.size)};
    case Cut::kWithinRows:
      break;
  }
  const int64_t task = k / c.pieces_per_row, part = k % c.pieces_per_row;
  return {low, task, task + 1, part * c.size, min_of(c.elements, (part + 1) * c.size)};
}

}  // namespace fastmeta::update::FASTMETA_ISA
