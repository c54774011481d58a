// Common to the engines on the matrix unit (amx.h): a tile of Y = X W^T, and the columns of a matrix
// as right operand.
#pragma once

#include "common/parallel.h"
#include "common/scratch.h"
#include "matmul/amx.h"

#if defined(MULKI_AMX)

namespace mulki {

// Prefetches the right operand of the next tile into the L2 cache while this tile is multiplied:
// one piece before each 32 x 32 block of products, and all of it during the first 256 rows of the
// tile.
class Prefetcher {
 public:
  Prefetcher(const void* next, int64_t bytes, int64_t begin, int64_t rows, int64_t width) {
    const int64_t strips = amx::blocks(width), done = begin / amx::kEdge * strips;
    const int64_t pieces = kRows / amx::kEdge * strips;
    piece_ = (bytes / pieces + kLine - 1) / kLine * kLine;
    bytes_left_ =
        next == nullptr ? 0 : std::clamp<int64_t>(bytes - done * piece_, 0, rows * width * piece_);
    address_ = static_cast<const char*>(next) + done * piece_;
  }
  void fetch_piece() {
    for (const int64_t end = std::max<int64_t>(bytes_left_ - piece_, 0); bytes_left_ > end;
         bytes_left_ -= kLine) {
      _mm_prefetch(address_, _MM_HINT_T1);
      address_ += kLine;
    }
  }

 private:
  static constexpr int64_t kRows = 256, kLine = 64;
  int64_t piece_, bytes_left_;
  const char* address_;
};

// Calls f(i, j, c) for each block of 32 x 32 sums, with its row, its column and its address.
template <typename F>
inline void each_block(int64_t rows, int64_t columns, float* out, int64_t ld, const F& f) {
  for (int64_t i = 0; i < rows; i += amx::kEdge) {
    for (int64_t j = 0; j < columns; j += amx::kEdge) {
      f(i, j, out + i * ld + j);
    }
  }
}

// Calls multiply(a, b, c) for each block c of a tile, with the packed strips a of the left operand
// and b of the right one, which have `strip_bytes` bytes.
template <typename F>
inline void each_block_of_tile(const TileProduct& y, int64_t strip_bytes, const F& multiply) {
  const char* a = static_cast<const char*>(y.left) + y.begin / amx::kEdge * strip_bytes;
  const char* b = static_cast<const char*>(y.right);
  Prefetcher prefetcher(y.next, amx::blocks(y.width) * strip_bytes, y.begin, y.rows, y.width);
  each_block(y.rows, y.width, y.out, y.width, [&](int64_t i, int64_t j, float* c) {
    prefetcher.fetch_piece();
    multiply(a + i / amx::kEdge * strip_bytes, b + j / amx::kEdge * strip_bytes, c);
  });
}

// The columns of a matrix as right operand, in strips of 32 columns, whose elements are those of
// the rows.
template <typename Engine>
class ColumnStrips {
 public:
  ColumnStrips() = default;
  // Room for `width` columns of at most `depth` rows.
  ColumnStrips(int64_t width, int64_t depth)
      : strip_bytes_(Engine::right_bytes(amx::kEdge, depth)),
        memory_(amx::blocks(width) * strip_bytes_) {}

  // Packs the columns of a part. Sums go over `depth` rows; those beyond the part are zeros, or the
  // left operand is zero there. `factors`, if not null, multiplies the rows.
  void pack(
      const Part<typename Engine::Element>& in, int64_t depth, const float* factors = nullptr) {
    parallel_each(amx::blocks(in.columns), [&](int64_t strip) {
      const int64_t column = strip * amx::kEdge;
      Engine::pack_columns(in.from(0, column), depth, factors, at(column));
    });
  }

  // The strip that begins at a column.
  char* at(int64_t column) const {
    return memory_.template data<char>() + column / amx::kEdge * strip_bytes_;
  }

 private:
  int64_t strip_bytes_ = 0;
  Scratch memory_;
};

} // namespace mulki

#endif
