// From the gradient G of a loss with respect to Y = X W^T to those of X and W, without storing G:
// rows are worked through in super-blocks, and G exists for one super-block at a time.
//
//   dX = f G W      dW = f G^T X
//
// Every element of dX and dW is summed by one task, over tiles or super-blocks in order, so results do
// not depend on the number of threads. Gradients<Engine> is used as follows:
//
//   matrices(models)               float matrices of a super-block that are alive at a time
//   values(model, t, i)            where row i of the super-block lies in tile t: of a model's
//                                  products, and of G in the place of the student's, model 0
//   commit(start, t, first, count) says that G of rows [first, first + count) of tile t is complete;
//                                  the super-block starts at row `start` of X, `first` is a multiple of 32
//   accumulate(start, count, ...)  adds the super-block, of `count` rows: its dX, and dW with the last one. They
//                                  come in order, and all of them
#pragma once

#include "gradients_amx.h"
#include "gradients_brgemm.h"
