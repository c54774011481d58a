// G, W and X as bfloat16 operands of the matrix unit, for dX = G W and dW = G^T X (gradients.h,
// amx.h). W is packed once, X for each super-block, and G as soon as 32 rows of it are complete in
// a tile.
#pragma once

#include "core/super_block.h"
#include "matmul/engine.h"

#if defined(MULKI_AMX)

namespace mulki {

template <typename Engine>
class GradientOperands;

// 32 rows of G in one tile. The floats own the memory until `pack`, which replaces them by blocks:
// those of G in the first half, those of G^T in the second.
class StripOfG {
 public:
  StripOfG(float* floats, int64_t width) : floats_(floats), width_(width) {}

  // The strip has `rows` rows, and its columns from `valid` on are padding.
  MULKI_AMX_TARGET void pack(int64_t rows, int64_t valid, bool with_transpose) const {
    constexpr int64_t kMaxWidth = AmxBFloat16::kWidth;
    alignas(64) float g[amx::kEdge * kMaxWidth];
    std::memcpy(g, floats_, sizeof(float) * rows * width_);
    for (int64_t j = 0; j < width_ / amx::kEdge; ++j) {
      amx::pack_left(g + j * amx::kEdge, width_, rows, valid - j * amx::kEdge, left(j));
      if (with_transpose) {
        amx::rearrange(amx::Layout::kLeftTransposed, left(j), transposed(j));
      }
    }
  }

  uint16_t* left(int64_t block) const {
    return reinterpret_cast<uint16_t*>(floats_) + block * amx::kBlock;
  }
  uint16_t* transposed(int64_t block) const {
    return left(block) + amx::kEdge * width_;
  }

 private:
  float* floats_;
  int64_t width_; // of a tile
};

template <>
class GradientOperands<AmxBFloat16> {
  static constexpr int64_t kEdge = amx::kEdge;
  using Operand = AmxBFloat16::Operand;

 public:
  static constexpr bool kTransposed = false;
  static constexpr int64_t kTaskRows = 256;

  static int64_t matrices(int64_t models) {
    return models;
  }

  GradientOperands(
      const SuperBlock& block,
      int64_t /*models*/,
      const Tiling& tiling,
      const Operand& x,
      const Operand& w,
      bool wanted_x,
      bool wanted_w)
      : block_(block), t_(tiling), x_(x), wanted_w_(wanted_w) {
    if (wanted_x) {
      const int64_t depth = t_.tiles * t_.width;
      right_w_ = {w.width, depth};
      right_w_.pack(w, 0, w.count, depth);
    }
    if (wanted_w) {
      right_x_ = {x.width, t_.rows};
    }
  }

  int64_t tiles_per_run() const {
    return 512 / t_.width;
  }

  void commit(int64_t /*start*/, int64_t t, int64_t first, int64_t count) {
    for (int64_t i = first; i < first + count; i += kEdge) {
      strip(t, i / kEdge).pack(std::min(kEdge, first + count - i), t_.valid(t), wanted_w_);
    }
  }

  void complete(int64_t first, int64_t count) {
    if (wanted_w_) {
      right_x_.pack(x_, first, count, count);
    }
  }

  void add_to_x(
      int64_t begin,
      int64_t rows,
      int64_t c,
      int64_t columns,
      int64_t t,
      int64_t tiles,
      float* out,
      int64_t ld,
      bool add) const {
    const int64_t of_tile = blocks_of_tile();
    for (int64_t i = 0; i < rows; i += kEdge) {
      for (int64_t j = 0; j < columns; j += kEdge) {
        amx::multiply(
            {strip(t, (begin + i) / kEdge).left(0), 2 * t_.rows * t_.width},
            {blocks(right_w_, c + j) + t * of_tile * amx::kBlock, of_tile * amx::kBlock}, tiles,
            of_tile, out + i * ld + j, ld, add);
      }
    }
  }

  void add_to_w(
      int64_t t, int64_t c, int64_t columns, int64_t count, float* out, int64_t ld, bool add)
      const {
    for (int64_t i = 0; i < t_.valid(t); i += kEdge) {
      for (int64_t j = 0; j < columns; j += kEdge) {
        amx::multiply(
            {strip(t, 0).transposed(i / kEdge), 0, 2 * kEdge * t_.width}, {blocks(right_x_, c + j)},
            1, amx::blocks(count), out + i * ld + j, ld, add);
      }
    }
  }

 private:
  int64_t blocks_of_tile() const { // along a row of G
    return t_.width / kEdge;
  }
  static const uint16_t* blocks(const ColumnStrips<AmxBFloat16>& strips, int64_t column) {
    return reinterpret_cast<const uint16_t*>(strips.at(column));
  }
  StripOfG strip(int64_t t, int64_t i) const {
    return {block_.values(0, t, i * kEdge), t_.width};
  }

  const SuperBlock& block_;
  const Tiling t_;
  const Operand& x_;
  const bool wanted_w_;
  ColumnStrips<AmxBFloat16> right_w_, right_x_;
};

} // namespace mulki

#endif
