// G, W and X as operands of the matrix unit, for dX = G W and dW = G^T X (gradients.h, amx.h): what
// both engines have in common, and bfloat16. Digits are in gradient_operands_digits.h.
//
// W is packed once, X for each super-block. bfloat16: G is packed as soon as 32 rows of it are
// complete in a tile.
#pragma once

#include "core/gradient_operands.h"

#if defined(MULKI_AMX)

namespace mulki {

template <typename Engine>
class GradientOperandsAmx {
 public:
  static constexpr bool kTransposed = false;
  static constexpr int64_t kTaskRows = 256;

  int64_t tiles_per_run() const {
    return kRunColumns / t_.width;
  }

 protected:
  static constexpr int64_t kEdge = amx::kEdge;
  static constexpr int64_t kRunColumns = 512;

  GradientOperandsAmx(const SuperBlock& block, const GradientProblem<Engine>& problem)
      : block_(block),
        p_(problem),
        t_(p_.tiling),
        right_w_(p_.wanted_x ? p_.w.width : 0, columns()),
        right_x_(p_.wanted_w ? p_.x.width : 0, t_.rows) {}

  int64_t columns() const { // of G
    return t_.tiles * t_.width;
  }

  // If they are wanted. `factors`, if not null, multiplies the rows.
  void pack_w(const float* factors = nullptr) {
    if (p_.wanted_x) {
      right_w_.pack(p_.w.read(0, p_.w.count, 0, p_.w.width), columns(), factors);
    }
  }
  void pack_x(int64_t first, int64_t count, const float* factors = nullptr) {
    if (p_.wanted_w) {
      right_x_.pack(p_.x.read(first, count, 0, p_.x.width), count, factors);
    }
  }

  const SuperBlock& block_;
  const GradientProblem<Engine> p_;
  const Tiling& t_;
  ColumnStrips<Engine> right_w_, right_x_;
};

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
      amx::pack_left(Part<float>{g, width_, rows, valid}.from(0, j * amx::kEdge), left(j));
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
class GradientOperands<AmxBFloat16> : public GradientOperandsAmx<AmxBFloat16> {
 public:
  static int64_t matrices(int64_t models) {
    return models;
  }

  GradientOperands(const SuperBlock& block, const GradientProblem<AmxBFloat16>& problem)
      : GradientOperandsAmx(block, problem) {
    pack_w();
  }

  void commit(int64_t /*start*/, int64_t t, int64_t first, int64_t count) {
    for (int64_t i = first; i < first + count; i += kEdge) {
      strip(t, i).pack(std::min(kEdge, first + count - i), t_.valid(t), p_.wanted_w);
    }
  }

  void complete(int64_t first, int64_t count) {
    pack_x(first, count);
  }

  void add_to_x(Span rows, Span columns, Span run, const Sums& out) const {
    const int64_t of_tile = t_.width / kEdge; // blocks along a row of G
    each_block(rows.count, columns.count, out, [&](int64_t i, int64_t j, const Sums& c) {
      const uint16_t* right = blocks(right_w_, columns.begin + j);
      amx::multiply(
          {strip(run.begin, rows.begin + i).left(0), 2 * t_.rows * t_.width},
          {right + run.begin * of_tile * amx::kBlock, of_tile * amx::kBlock}, run.count, of_tile,
          c);
    });
  }

  void add_to_w(int64_t t, Span columns, int64_t count, const Sums& out) const {
    each_block(t_.valid(t), columns.count, out, [&](int64_t i, int64_t j, const Sums& c) {
      amx::multiply(
          {strip(t, 0).transposed(i / kEdge), 0, 2 * kEdge * t_.width},
          {blocks(right_x_, columns.begin + j)}, 1, amx::blocks(count), c);
    });
  }

 private:
  static const uint16_t* blocks(const ColumnStrips<AmxBFloat16>& strips, int64_t column) {
    return reinterpret_cast<const uint16_t*>(strips.at(column));
  }
  // The strip that begins at row i.
  StripOfG strip(int64_t t, int64_t i) const {
    return {block_.values(0, t, i), t_.width};
  }
};

} // namespace mulki

#endif
