// The engines on the matrix unit (engine.h): AmxBFloat16 multiplies bfloat16 (amx.h), AmxFloat
// multiplies floats as digits of integers (digits.h). X is packed in strips of 32 rows, W^T in
// strips of 32 columns; a tile of Y is written in blocks of 32 x 32.
#pragma once

#include "common/parallel.h"
#include "common/scratch.h"
#include "matmul/digits.h"

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

// Calls f(i, j, c) for each block of 32 x 32 sums, with its row and column.
template <typename F>
inline void each_block(int64_t rows, int64_t columns, const Sums& out, const F& f) {
  for (int64_t i = 0; i < rows; i += amx::kEdge) {
    for (int64_t j = 0; j < columns; j += amx::kEdge) {
      f(i, j, out.at(i, j));
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
  const Sums out{y.out, y.width, false};
  each_block(y.rows, y.width, out, [&](int64_t i, int64_t j, const Sums& c) {
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

// What both engines have in common.
struct AmxEngine {
  using Scope = amx::Scope;

  static constexpr int64_t kMaxRows = 256, kWidth = 128;
  static constexpr bool kOneTaskPerTile = false; // not measured
  static constexpr int64_t kMatrices = int64_t(16) << 20;
};

struct AmxBFloat16 : AmxEngine {
  using Element = at::BFloat16;
  using Operand = Matrix<Element>;

  static constexpr int64_t kScratch = int64_t(30) << 20;
  static constexpr int64_t kUnit = amx::kEdge;

  static int64_t left_bytes(const Operand& x, int64_t rows) {
    return right_bytes(rows, x.padded);
  }
  static int64_t right_bytes(int64_t width, int64_t depth) {
    return amx::blocks(width) * amx::blocks(depth) * amx::kBlock * int64_t(sizeof(Element));
  }

  // At most 32 rows.
  static void pack_left(const Operand& x, int64_t first, int64_t rows, void* out) {
    const Part<Element> in = x.read(first, rows, 0, x.width);
    for (int64_t d = 0; d < x.width; d += amx::kEdge) {
      amx::pack_left(in.from(0, d), block(out, d / amx::kEdge));
    }
  }
  static void pack_right(const Operand& w, int64_t first, int64_t width, void* out) {
    for (int64_t j = 0; j < width; j += amx::kEdge) {
      const Part<Element> in = w.read(first + j, w.count - first - j, 0, w.width);
      for (int64_t d = 0; d < w.width; d += amx::kEdge) {
        amx::pack_right(
            amx::Layout::kRightTransposed, in.from(0, d),
            block(out, (j / amx::kEdge) * amx::blocks(w.width) + d / amx::kEdge));
      }
    }
  }

  // Packs the first 32 columns of a part as right operand, with zeros beyond its rows.
  static void pack_columns(
      const Part<Element>& in, int64_t depth, const float* /*factors*/, void* out) {
    for (int64_t i = 0; i < depth; i += amx::kEdge) {
      amx::pack_right(amx::Layout::kRight, in.from(i, 0), block(out, i / amx::kEdge));
    }
  }

  // Writes whole blocks of 32 rows.
  static void multiply(const Operand& x, const TileProduct& y) {
    const int64_t steps = amx::blocks(x.width);
    each_block_of_tile(
        y, right_bytes(amx::kEdge, x.width), [&](const char* a, const char* b, const Sums& c) {
          amx::multiply(
              {reinterpret_cast<const uint16_t*>(a)}, {reinterpret_cast<const uint16_t*>(b)}, 1,
              steps, c);
        });
  }

 private:
  static uint16_t* block(void* out, int64_t i) {
    return static_cast<uint16_t*>(out) + i * amx::kBlock;
  }
};

struct AmxFloat : AmxEngine {
  using Element = float;
  using Operand = Matrix<Element>;

  static constexpr int64_t kScratch = int64_t(46) << 20;
  static constexpr int64_t kUnit = digits::kDepth;

  static int64_t left_bytes(const Operand& x, int64_t rows) {
    return right_bytes(rows, x.padded);
  }
  static int64_t right_bytes(int64_t width, int64_t depth) {
    return amx::blocks(width) * digits::strip_bytes(depth);
  }

  // At most 32 rows.
  static void pack_left(const Operand& x, int64_t first, int64_t rows, void* out) {
    digits::pack_strip_of_rows(false, x.read(first, rows, 0, x.width), out);
  }
  static void pack_right(const Operand& w, int64_t first, int64_t width, void* out) {
    auto* to = static_cast<uint8_t*>(out);
    for (int64_t j = first; j < first + width; j += digits::kLines) {
      digits::pack_strip_of_rows(true, w.read(j, w.count - j, 0, w.width), to);
      to += digits::strip_bytes(w.width);
    }
  }

  // Packs the first 32 columns of a part as right operand.
  static void pack_columns(
      const Part<Element>& in, int64_t /*depth*/, const float* factors, void* out) {
    digits::pack_strip_of_columns(in, factors, out);
  }

  // Writes whole blocks of 32 rows.
  static void multiply(const Operand& x, const TileProduct& y) {
    const int64_t steps = digits::blocks(x.width);
    each_block_of_tile(
        y, right_bytes(amx::kEdge, x.width), [&](const char* a, const char* b, const Sums& c) {
          digits::multiply(a, b, 0, steps, c, digits::logits_need_eight_products(a, b, x.width));
        });
  }
};

} // namespace mulki

#endif
