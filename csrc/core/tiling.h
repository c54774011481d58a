// How an N x P matrix of products is divided: into super-blocks of rows, which are processed one
// after the other, tiles of columns, and blocks of rows within a super-block. A task computes one
// block of rows in one tile.
#pragma once

#include <algorithm>
#include <cstdint>

namespace mulki {

// Columns of a tile, at most.
#if defined(CPU_CAPABILITY_AVX2)
// Most CPUs without AVX-512 have 256 or 512 KiB of L2 cache per core. A wider tile of W^T would
// leave too little of it for X.
constexpr int64_t kTileWidth = 64;
#else
constexpr int64_t kTileWidth = 128;
#endif
constexpr int64_t kMaxRows = 512; // of a super-block whose matrices exist

// It depends on the problem, but not on the number of threads.
//
// With a gradient, the memory beyond inputs and outputs is that of the matrices of a super-block,
// which has 64 rows or as many as fit into kMatrices bytes, of the packed prototypes, and P D
// floats for the gradient of the prototypes.
struct Tiling {
  // `matrices` is the number of float matrices of a super-block that exist at the same time.
  // Without a gradient there are none: only the sums of each block are kept. The rows of a
  // super-block and the columns of a tile are multiples of 32.
  Tiling(int64_t n, int64_t p, int64_t matrices, bool gradient) : n(n), p(p), bytes(0) {
    constexpr int64_t kUnit = 32, kMatrices = int64_t(16) << 20;
    width = p <= kUnit ? kUnit : p <= 256 ? 64 : kTileWidth;
    tiles = (p + width - 1) / width;
    rows = std::clamp<int64_t>((n + kUnit - 1) / kUnit * kUnit, kUnit, gradient ? kMaxRows : 1024);
    if (gradient) {
      const int64_t row = matrices * tiles * width * int64_t(sizeof(float));
      const int64_t fitting = kMatrices / row, step = fitting >= 128 ? 128 : 64;
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
  int64_t rows; // of a super-block, a multiple of 32
  int64_t block, blocks; // rows of a block, and the number of blocks of a super-block
  int64_t bytes; // of the float matrices of a super-block
};

} // namespace mulki
