// How an N x P problem is cut into super-blocks of rows, tiles of columns, and blocks of rows.
#pragma once

#include <algorithm>
#include <cstdint>

namespace mulki {

// A function of the problem and the engine alone, never of the number of threads.
//
// With a gradient, memory beyond inputs and outputs is that of the engine's matrices, of 64 rows each or
// of so many that they fit into its kMatrices bytes, what it needs of the prototypes, and P D floats for their
// gradient.
struct Tiling {
  // `matrices` is the number of float matrices of one super-block that are alive at a time; it has at
  // most `most_rows` rows and, beyond 64, `most_bytes` in those matrices. Without a gradient there are
  // none: a block's logits go as soon as their sums are taken. Rows of a super-block and columns of a
  // tile, `most_width` at most, are multiples of `unit`.
  Tiling(
      int64_t n,
      int64_t p,
      int64_t matrices,
      bool gradient,
      int64_t most_rows,
      int64_t most_bytes,
      int64_t unit,
      int64_t most_width)
      : n(n), p(p), bytes(0) {
    width = p <= unit ? unit : p <= 256 ? 64 : most_width;
    tiles = (p + width - 1) / width;
    const int64_t needed = std::max<int64_t>((n + unit - 1) / unit * unit, unit);
    rows = std::min<int64_t>(needed, gradient ? most_rows : 1024);
    if (gradient) {
      const int64_t row = matrices * tiles * width * int64_t(sizeof(float));
      const int64_t fitting = most_bytes / row, step = fitting >= 128 ? 128 : 64;
      rows = std::min(rows, std::max<int64_t>(fitting / step * step, 64));
      bytes = rows * row;
    }
    block = rows <= 128 ? 32 : 64;
    blocks = (rows + block - 1) / block;
  }
  int64_t valid(int64_t tile) const {
    return std::min(width, p - tile * width);
  }
  // Rows of block b in a super-block of `count` rows.
  int64_t block_rows(int64_t b, int64_t count) const {
    return std::min(block, count - b * block);
  }

  int64_t n, p;
  int64_t width, tiles; // of columns
  int64_t rows; // of a super-block, a multiple of the unit
  int64_t block, blocks; // rows that one task takes, and how many such blocks there are
  int64_t bytes; // of the float matrices of a super-block
};

} // namespace mulki
