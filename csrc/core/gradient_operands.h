// G, W and X as operands for dX = G W and dW = G^T X (gradients.h). How an engine packs and
// multiplies them is in GradientOperands<Engine>, which has
//
//   kTransposed          whether it computes the transpose of dW, X^T G, of which G is the right
//                        operand
//   kTaskRows            rows of dX that a task computes, at most
//   matrices(models)     float matrices of a super-block that it needs (super_block.h)
//   tiles_per_run()      tiles of G that are added to a block of dX at a time: a run
//   commit(start, t, first, count)
//                        rows [first, first + count) of G in tile t are complete; the super-block
//                        starts at row `start` of X, and `first` is a multiple of 32
//   complete(first, count)
//                        G of the super-block is complete, which has `count` rows from row `first`
//                        of X on; what is not packed yet is packed
//   add_to_x(rows, columns, run, out)
//                        G W for rows of the super-block, columns of W and the tiles of a run
//   add_to_w(t, columns, count, out)
//                        G^T X, or its transpose, for the columns of G in tile t, columns of X and
//                        the `count` rows of the super-block
//
// The last two may write whole blocks of 32 rows and columns, and begin with whole blocks.
#pragma once

#include "core/super_block.h"
#include "matmul/engine.h"

namespace mulki {

// Columns of dX or dW that a task computes, at most.
constexpr int64_t kMaxChunk = 256;

struct Span { // of rows, columns or tiles
  int64_t begin, count;
};

// What the gradients of X and W are computed from, and which of them are wanted.
template <typename Engine>
struct GradientProblem {
  Tiling tiling;
  const typename Engine::Operand &x, &w;
  bool wanted_x, wanted_w;
  int64_t models; // the student and its teachers
};

template <typename Engine>
class GradientOperands;

} // namespace mulki
