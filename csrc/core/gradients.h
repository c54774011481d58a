// The gradients of X and W from the gradient G [N, P] of a loss with respect to Y = X W^T:
//
//   dX = f G W      dW = f G^T X      f is a number
//
// G is never stored as a whole: it exists for one super-block of rows at a time, in tiles of
// columns (tiling.h). One task sums each element of dX and dW, over tiles or super-blocks in order,
// so results do not depend on the number of threads. Gradients<Engine> has
//
//   matrices(models)               the number of float matrices that a super-block needs
//   values(model, t, i)            the address of row i of the super-block in tile t. It holds the
//                                  products of a model; G replaces those of model 0, the student
//   commit(start, t, first, count) called when rows [first, first + count) of G in tile t are
//                                  complete; the super-block starts at row `start` of X, and
//                                  `first` is a multiple of 32
//   accumulate(start, count, ...)  called once for each super-block, in order; writes its rows of
//                                  dX, and adds to dW, which the last super-block completes
#pragma once

#include "core/gradients_amx.h"
#include "core/gradients_brgemm.h"
