// G, W and X as digits for the matrix unit, for dX = G W and dW = G^T X (gradients.h, digits.h).
//
// The scale of each line of G and G^T depends on its largest element. `commit` collects the extents
// of the lines. When G of a super-block is complete, its digits are packed into two matrices whose
// values are no longer read: those of G into matrix 1, those of G^T into matrix 2 (super_block.h).
// W is packed once, X for each super-block.
//
// If the rows of X or W differ much in size, each row is divided by its level, and the elements of
// G are multiplied by it: those of G^T by the levels of X, those of G by the levels of W.
#pragma once

#include "core/gradient_operands_amx.h"

#include <limits>

#if defined(MULKI_AMX)

namespace mulki {

// The level of each row of a matrix (digits.h), and its inverse. Both are empty if no levels are
// needed.
struct Levels {
  Levels() = default;
  explicit Levels(const Matrix<float>& rows) {
    constexpr float kMaxRatio = 4.0f; // up to this ratio no levels are needed
    std::vector<float> levels(rows.count);
    at::parallel_for(0, rows.count, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const uint32_t max_bits = digits::extent_of(rows.row(i), rows.width).max_bits;
        levels[i] = max_bits == 0 || max_bits >= 0x7f800000 ? 0.0f : digits::level_of(max_bits);
      }
    });
    float smallest = std::numeric_limits<float>::infinity(), largest = 0.0f;
    for (const float v : levels) {
      smallest = v > 0 ? std::min(smallest, v) : smallest;
      largest = std::max(largest, v);
    }
    if (largest <= kMaxRatio * smallest) {
      return;
    }
    for (float& v : levels) {
      v = v > 0 ? v : 1.0f; // a row of zeros, or one with an infinity or a NaN
      inverses.push_back(1.0f / v);
    }
    values = std::move(levels);
  }

  const float* at(int64_t i) const {
    return values.empty() ? nullptr : values.data() + i;
  }
  const float* inverse_at(int64_t i) const {
    return inverses.empty() ? nullptr : inverses.data() + i;
  }

  std::vector<float> values, inverses;
};

// Each run has its own scales: with one scale for a whole row of G, one very large element would
// cost all others of the row their digits.
template <>
class GradientOperands<AmxFloat> : public GradientOperandsAmx<AmxFloat> {
 public:
  static int64_t matrices(int64_t models) {
    return std::max<int64_t>(models, 3);
  }

  GradientOperands(const SuperBlock& block, const GradientProblem<AmxFloat>& problem)
      : GradientOperandsAmx(block, problem),
        levels_of_x_(p_.wanted_w ? Levels(p_.x) : Levels()),
        levels_of_w_(p_.wanted_x ? Levels(p_.w) : Levels()),
        row_extents_(t_.tiles * t_.rows * int64_t(sizeof(digits::Extent))),
        column_extents_(t_.rows / kEdge * columns() * int64_t(sizeof(digits::Extent))) {
    pack_w(levels_of_w_.inverse_at(0));
  }

  void commit(int64_t start, int64_t t, int64_t first, int64_t count) {
    for (int64_t i = first; i < first + count; i += kEdge) {
      collect_extents(start, t, i, std::min(kEdge, first + count - i));
    }
  }

  void complete(int64_t first, int64_t count) {
    pack_g(first, count);
    pack_x(first, count, levels_of_x_.inverse_at(first));
  }

  void add_to_x(Span rows, Span columns, Span run, const Sums& out) const {
    const int64_t of_tile = t_.width / digits::kDepth; // blocks along a row of G
    each_block(rows.count, columns.count, out, [&](int64_t i, int64_t j, const Sums& c) {
      const char* left = strip_of_g(rows.begin + i, run.begin / tiles_per_run());
      const char* right = right_w_.at(columns.begin + j);
      digits::multiply(
          left, right, run.begin * of_tile, run.count * of_tile, c,
          digits::gradients_need_eight_products(left, right));
    });
  }

  void add_to_w(int64_t t, Span columns, int64_t count, const Sums& out) const {
    each_block(t_.valid(t), columns.count, out, [&](int64_t i, int64_t j, const Sums& c) {
      const char* left = strip_of_transposed_g(t * t_.width + i);
      const char* right = right_x_.at(columns.begin + j);
      digits::multiply(
          left, right, 0, digits::blocks(count), c,
          digits::gradients_need_eight_products(left, right));
    });
  }

 private:
  digits::Extent* row_extents() const { // [tiles][rows]
    return row_extents_.data<digits::Extent>();
  }
  digits::Extent* column_extents() const { // [strips of 32 rows][columns]
    return column_extents_.data<digits::Extent>();
  }

  // The strip of 32 rows of G from row i on, in a run of columns.
  char* strip_of_g(int64_t i, int64_t run) const {
    const int64_t runs = (columns() + kRunColumns - 1) / kRunColumns;
    const int64_t bytes =
        runs * int64_t(sizeof(digits::Head)) + digits::blocks(columns()) * digits::kBlock;
    return block_.operands<char>(1) + i / kEdge * bytes + run * digits::strip_bytes(kRunColumns);
  }
  // The strip of 32 columns of G from column j on.
  char* strip_of_transposed_g(int64_t j) const {
    return block_.operands<char>(2) + j / kEdge * digits::strip_bytes(t_.rows);
  }

  // Takes the extents of the rows and columns of G in tile t, with the levels applied. `start` is
  // the row of X where the super-block begins.
  MULKI_AMX_TARGET void collect_extents(int64_t start, int64_t t, int64_t first, int64_t rows) {
    const float *x_levels = levels_of_x_.at(start), *w_levels = levels_of_w_.at(t * t_.width);
    __m512i column_max_bits[8];
    __m512 column_sum_squares[8];
    const int64_t vectors = t_.width / 16;
    TORCH_INTERNAL_ASSERT_DEBUG_ONLY(vectors <= 8);
    for (int64_t v = 0; v < vectors; ++v) {
      column_max_bits[v] = _mm512_setzero_si512();
      column_sum_squares[v] = _mm512_setzero_ps();
    }
    for (int64_t i = first; i < first + rows; ++i) {
      const float* g = block_.values(0, t, i);
      __m512i max_bits = _mm512_setzero_si512();
      __m512 sum_squares = _mm512_setzero_ps();
      for (int64_t v = 0; v < vectors; ++v) {
        const __mmask16 valid = __mmask16(amx::lane_mask(t_.valid(t) - 16 * v, 16));
        const __m512 x = _mm512_maskz_loadu_ps(valid, g + 16 * v);
        const __m512 for_x = w_levels == nullptr
            ? x
            : _mm512_mul_ps(x, _mm512_maskz_loadu_ps(valid, w_levels + 16 * v));
        const __m512 for_w =
            x_levels == nullptr ? x : _mm512_mul_ps(x, _mm512_set1_ps(x_levels[i]));
        max_bits = _mm512_max_epu32(max_bits, digits::magnitude(for_x));
        sum_squares = _mm512_fmadd_ps(for_x, for_x, sum_squares);
        column_max_bits[v] = _mm512_max_epu32(column_max_bits[v], digits::magnitude(for_w));
        column_sum_squares[v] = _mm512_fmadd_ps(for_w, for_w, column_sum_squares[v]);
      }
      row_extents()[t * t_.rows + i] = {
          _mm512_reduce_max_epu32(max_bits), _mm512_reduce_add_ps(sum_squares)};
    }
    alignas(64) uint32_t bits[16];
    alignas(64) float sums[16];
    digits::Extent* out = column_extents() + first / kEdge * columns() + t * t_.width;
    for (int64_t v = 0; v < vectors; ++v) {
      _mm512_store_si512(bits, column_max_bits[v]);
      _mm512_store_ps(sums, column_sum_squares[v]);
      for (int64_t j = 0; j < 16; ++j) {
        *out++ = {bits[j], sums[j]};
      }
    }
  }

  // Sets the scales of a strip of G with this depth. The extent of each line is the union of
  // `pieces` extents, `distance` apart.
  static void set_lines(
      const digits::Extent* extents,
      int64_t pieces,
      int64_t distance,
      int64_t lines,
      int64_t depth,
      digits::Head& head,
      digits::InverseScale& inverse) {
    head.peak_to_rms = 0;
    for (int64_t line = 0; line < kEdge; ++line) {
      digits::Extent total{0, 0};
      for (int64_t p = 0; p < pieces && line < lines; ++p) {
        const digits::Extent& part = extents[p * distance + line];
        total.max_bits = std::max(total.max_bits, part.max_bits);
        total.sum_squares += part.sum_squares;
      }
      digits::set_line(total, depth, line, head, inverse);
    }
  }

  Part<float> part_of_g(int64_t t, int64_t i, int64_t rows) const {
    return {block_.values(0, t, i), t_.width, rows, t_.valid(t)};
  }

  // Packs G and G^T of a super-block.
  void pack_g(int64_t first, int64_t count) {
    const int64_t groups = digits::blocks(count), pieces = amx::blocks(count);
    parallel_each(t_.tiles * groups, [&](int64_t task) {
      const int64_t t = task / groups, group = task % groups, begin = group * digits::kDepth;
      const int64_t rows = std::min(digits::kDepth, count - begin);
      const int64_t run = t / tiles_per_run(), start = run * tiles_per_run();
      const int64_t tiles = std::min(tiles_per_run(), t_.tiles - start);
      digits::Head head;
      digits::InverseScale inverse;
      for (int64_t i = begin; i < begin + rows && p_.wanted_x; i += kEdge) {
        const int64_t lines = std::min(kEdge, count - i);
        char* strip = strip_of_g(i, run);
        set_lines(
            row_extents() + start * t_.rows + i, tiles, t_.rows, lines,
            std::min(kRunColumns, t_.p - start * t_.width), head, inverse);
        if (t == start) {
          std::memcpy(strip, &head, sizeof(head));
        }
        for (int64_t j = 0; j < t_.width; j += digits::kDepth) {
          digits::pack_block_of_rows(
              part_of_g(t, i, lines).from(0, j), levels_of_w_.at(t * t_.width + j), inverse,
              digits::block(strip, ((t - start) * t_.width + j) / digits::kDepth));
        }
      }
      for (int64_t j = 0; j < t_.width && p_.wanted_w; j += kEdge) {
        const int64_t column = t * t_.width + j;
        char* strip = strip_of_transposed_g(column);
        set_lines(column_extents() + column, pieces, columns(), kEdge, count, head, inverse);
        if (group == 0) {
          std::memcpy(strip, &head, sizeof(head));
        }
        digits::pack_block_of_columns(
            true, part_of_g(t, begin, rows).from(0, j), levels_of_x_.at(first + begin), inverse,
            digits::block(strip, group));
      }
    });
  }

  const Levels levels_of_x_, levels_of_w_;
  Scratch row_extents_, column_extents_;
};

} // namespace mulki

#endif
