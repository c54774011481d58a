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

// Calls multiply(a, b, c) for each 32 x 32 block c of a tile of `width` columns. a and b are the
// packed strips of `strip_bytes` bytes: of the left operand from row `begin` on, and of the right
// operand.
template <typename F>
inline void each_block_of_tile(
    const void* left,
    int64_t begin,
    int64_t rows,
    const void* right,
    int64_t width,
    int64_t strip_bytes,
    const void* next,
    float* out,
    const F& multiply) {
  const char* a = static_cast<const char*>(left) + begin / amx::kEdge * strip_bytes;
  Prefetcher prefetcher(next, amx::blocks(width) * strip_bytes, begin, rows, width);
  for (int64_t i = 0; i < rows; i += amx::kEdge, a += strip_bytes) {
    const char* b = static_cast<const char*>(right);
    for (int64_t j = 0; j < width; j += amx::kEdge, b += strip_bytes) {
      prefetcher.fetch_piece();
      multiply(a, b, out + i * width + j);
    }
  }
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

  // Packs `count` rows from row `first` on, with zeros up to row `depth`, at most. `factors`, if
  // not null, multiplies the rows.
  void pack(
      const typename Engine::Operand& rows,
      int64_t first,
      int64_t count,
      int64_t depth,
      const float* factors = nullptr) {
    parallel_each(amx::blocks(rows.width), [&](int64_t strip) {
      const int64_t column = strip * amx::kEdge;
      Engine::pack_columns(
          rows.row(first) + column, rows.padded, count, rows.width - column, depth, factors,
          at(column));
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
