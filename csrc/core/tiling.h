// How an N x P matrix of products is divided: into super-blocks of rows, which are processed one
// after the other, tiles of columns, and blocks of rows within a super-block. A task computes one
// block of rows in one tile.
#pragma once

#include <algorithm>
#include <cstdint>

namespace mulki {

// It depends on the problem and the engine, but not on the number of threads.
//
// With a gradient, the memory beyond inputs and outputs is that of the engine's matrices, which
// have 64 rows or as many as fit into its kMatrices bytes, of the packed prototypes, and P D floats
// for the gradient of the prototypes.
struct Tiling {
  // `matrices` is the number of float matrices of a super-block that exist at the same time. A
  // super-block has at most kMaxRows rows and, if it has more than 64, at most kMatrices bytes in
  // these matrices. Without a gradient there are none: only the sums of each block are kept. The
  // rows of a super-block and the columns of a tile, at most kWidth, are multiples of kUnit.
  template <typename Engine>
  Tiling(Engine, int64_t n, int64_t p, int64_t matrices, bool gradient) : n(n), p(p), bytes(0) {
    constexpr int64_t unit = Engine::kUnit;
    width = p <= unit ? unit : p <= 256 ? 64 : Engine::kWidth;
    tiles = (p + width - 1) / width;
    const int64_t needed = std::max<int64_t>((n + unit - 1) / unit * unit, unit);
    rows = std::min<int64_t>(needed, gradient ? Engine::kMaxRows : 1024);
    if (gradient) {
      const int64_t row = matrices * tiles * width * int64_t(sizeof(float));
      const int64_t fitting = Engine::kMatrices / row, step = fitting >= 128 ? 128 : 64;
      rows = std::min(rows, std::max<int64_t>(fitting / step * step, 64));
      bytes = rows * row;
    }
    block = rows <= 128 ? 32 : 64;
    blocks = (rows + block - 1) / block;
  }
  // Columns of a tile that are not padding.
  int64_t valid(int64_t tile) const {
    return std::min(width, p - tile * width);
  }
  // Rows of block b in a super-block of `count` rows.
  int64_t block_rows(int64_t b, int64_t count) const {
    return std::min(block, count - b * block);
  }

  int64_t n, p;
  int64_t width, tiles; // columns of a tile, and the number of tiles
  int64_t rows; // of a super-block, a multiple of `unit`
  int64_t block, blocks; // rows of a block, and the number of blocks of a super-block
  int64_t bytes; // of the float matrices of a super-block
};

} // namespace mulki
