// dX = f G W and dW = f G^T X on the matrix unit (gradients.h, amx.h, digits.h).
//
// bfloat16: as soon as 32 rows of G are complete in a tile, they are packed as blocks of G and of
// G^T. The blocks replace the floats: G in the first half of their memory, G^T in the second.
//
// float: the scale of each line of G and G^T depends on its largest element. `commit` collects the
// extents of the lines. When G of a super-block is complete, its digits are packed in the memory of
// matrices that are no longer used: G in matrix 1, G^T in matrix 2.
//
// W is packed once, and X for each super-block. dX is written for each super-block. dW is summed in
// the result if that is possible, and else in `sums_`, which is stored after the last super-block.
#pragma once

#include "core/gradients_common.h"

#if defined(MULKI_AMX)

namespace mulki {

template <typename Engine>
class GradientsAmx {
  using T = typename Engine::Element;
  static constexpr bool kFloat = std::is_same_v<Engine, AmxFloat>;
  static constexpr int64_t kEdge = amx::kEdge;
  static constexpr int64_t kDepth = kFloat ? digits::kDepth : kEdge; // depth of a block

 public:
  static int64_t matrices(int64_t models) {
    return std::max<int64_t>(models, kFloat ? 3 : 1);
  }

  GradientsAmx(
      const Tiling& tiling,
      const Matrix<T>& x,
      const Matrix<T>& w,
      bool wanted_x,
      bool wanted_w,
      int64_t models = 1)
      : t_(tiling),
        x_(x),
        w_(w),
        wanted_x_(wanted_x),
        wanted_w_(wanted_w),
        matrix_(tiling.tiles * tiling.rows * tiling.width) {
    if (!any()) {
      return;
    }
    values_ = allocate<float>(matrices(models) * matrix_);
    if constexpr (kFloat) {
      set_levels(x, wanted_w, levels_of_x_);
      set_levels(w, wanted_x, levels_of_w_);
      row_extents_ = allocate<digits::Extent>(t_.tiles * t_.rows);
      column_extents_ = allocate<digits::Extent>(t_.rows / kEdge * columns());
    }
    if (wanted_x_) {
      pack_w();
    }
    if (wanted_w_) {
      right_x_ = allocate<char>(amx::blocks(x.width) * strip_bytes(t_.rows));
    }
  }

  bool any() const {
    return wanted_x_ || wanted_w_;
  }

  float* values(int64_t model, int64_t t, int64_t i) {
    return values_ + ((model * t_.tiles + t) * t_.rows + i) * t_.width;
  }

  void commit([[maybe_unused]] int64_t start, int64_t t, int64_t first, int64_t count) {
    for (int64_t i = first; i < first + count && any(); i += kEdge) {
      const int64_t rows = std::min(kEdge, first + count - i);
      if constexpr (kFloat) {
        collect_extents(start, t, i, rows);
      } else {
        pack_bfloat16(t, i, rows);
      }
    }
  }

  void accumulate(int64_t first, int64_t count, float factor, Tensor& dx, Tensor& dw) {
    if constexpr (kFloat) {
      pack_strips(first, count);
    }
    if (wanted_x_) {
      write_dx(first, count, factor, dx);
    }
    if (wanted_w_) {
      add_to_dw(first, count, factor, dw);
      if (first + count == t_.n) {
        store_dw(factor, dw);
      }
    }
  }

 private:
  // Stores the rows of dW that are not summed in place.
  void store_dw(float factor, Tensor& dw) {
    const int64_t groups = amx::blocks(t_.p) - groups_in_place_;
    parallel_each(groups, [&](int64_t g) {
      const int64_t first = (groups_in_place_ + g) * kEdge, rows = std::min(kEdge, t_.p - first);
      for (int64_t j = 0; j < rows; ++j) {
        store_scaled(
            sums_ + (g * kEdge + j) * padded(), x_.width, factor, dw, (first + j) * x_.width);
      }
    });
  }

  template <typename V>
  V* allocate(int64_t count) {
    scratch_.emplace_back(count * int64_t(sizeof(V)));
    return scratch_.back().template data<V>();
  }

  static constexpr int64_t kMaxChunk = 256; // columns of dX or dW that one task computes, at most
  static constexpr int64_t kMaxRowsOfX = 256; // rows of dX that one task computes, at most
  // Columns of G that are added to a block of dX at a time: a run.
  static constexpr int64_t kRunColumns = 512;

  int64_t padded() const {
    return amx::blocks(x_.width) * kEdge;
  }
  int64_t columns() const { // of G
    return t_.tiles * t_.width;
  }
  static int64_t strip_bytes(int64_t depth) {
    return kFloat ? digits::strip_bytes(depth) : amx::blocks(depth) * amx::kBlock * 2;
  }

  // Packs at most 32 columns of X or W as right operand, whose depth is at least `rows`.
  void pack_right(
      const T* in,
      int64_t ld,
      int64_t rows,
      int64_t columns,
      int64_t depth,
      const float* factors,
      char* out) {
    if constexpr (kFloat) {
      digits::pack_strip_of_columns(in, ld, rows, columns, factors, out);
    } else {
      for (int64_t i = 0; i < depth; i += kEdge, out += amx::kBlock * 2) {
        amx::pack_right(
            amx::Layout::kRight, in + i * ld, ld, rows - i, columns,
            reinterpret_cast<uint16_t*>(out));
      }
    }
  }

  // Packs W as right operand, in strips of 32 columns.
  void pack_w() {
    const int64_t strips = amx::blocks(x_.width);
    right_w_ = allocate<char>(strips * strip_bytes(columns()));
    parallel_each(strips, [&](int64_t d) {
      pack_right(
          w_.data + d * kEdge, w_.padded, w_.count, w_.width - d * kEdge, columns(),
          levels_of_w_.inverse_at(0), right_w_ + d * strip_bytes(columns()));
    });
  }

  // bfloat16: packing of G and G^T.

  MULKI_AMX_TARGET void pack_bfloat16(int64_t t, int64_t i, int64_t rows) {
    alignas(64) float g[kEdge * 128];
    TORCH_INTERNAL_ASSERT_DEBUG_ONLY(t_.width <= 128);
    std::memcpy(g, values(0, t, i), sizeof(float) * rows * t_.width);
    uint16_t* left = operands(t, i / kEdge);
    for (int64_t j = 0; j < t_.width; j += kEdge, left += amx::kBlock) {
      amx::pack_left(g + j, t_.width, rows, t_.valid(t) - j, left);
      if (wanted_w_) {
        amx::rearrange(amx::Layout::kLeftTransposed, left, left + kEdge * t_.width);
      }
    }
  }
  // The address of the blocks of 32 rows of G in one tile, which those of G^T follow.
  uint16_t* operands(int64_t tile, int64_t strip) {
    return reinterpret_cast<uint16_t*>(values(0, tile, strip * kEdge));
  }

  // float: levels, extents, and packing of G and G^T.

  // The level of each row of X or W (digits.h), and its inverse. Both are empty if no levels are
  // needed.
  struct Levels {
    std::vector<float> values, inverses;

    const float* at(int64_t i) const {
      return values.empty() ? nullptr : values.data() + i;
    }
    const float* inverse_at(int64_t i) const {
      return inverses.empty() ? nullptr : inverses.data() + i;
    }
  };

  static void set_levels(const Matrix<T>& rows, bool wanted, Levels& out) {
    if (!wanted) {
      return;
    }
    constexpr float kMaxRatio = 4.0f; // up to this ratio no levels are needed
    std::vector<float> values(rows.count);
    at::parallel_for(0, rows.count, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const uint32_t max_bits = digits::extent_of(rows.row(i), rows.width).max_bits;
        values[i] = max_bits == 0 || max_bits >= 0x7f800000 ? 0.0f : digits::level_of(max_bits);
      }
    });
    float smallest = std::numeric_limits<float>::infinity(), largest = 0.0f;
    for (const float v : values) {
      smallest = v > 0 ? std::min(smallest, v) : smallest;
      largest = std::max(largest, v);
    }
    if (largest <= kMaxRatio * smallest) {
      return;
    }
    for (float& v : values) {
      v = v > 0 ? v : 1.0f; // a row of zeros, or one with an infinity or a NaN
      out.inverses.push_back(1.0f / v);
    }
    out.values = std::move(values);
  }

  int64_t tiles_per_run() const {
    return kRunColumns / t_.width;
  }
  // The strip of 32 rows of G in a run, which is kRunColumns columns. Each run has its own scales:
  // with one scale for a whole row, one very large element would cost all others of the row their
  // digits.
  char* strip_of_g(int64_t strip, int64_t run) {
    const int64_t runs = (columns() + kRunColumns - 1) / kRunColumns;
    const int64_t bytes =
        runs * int64_t(sizeof(digits::Head)) + digits::blocks(columns()) * digits::kBlock;
    return reinterpret_cast<char*>(values_ + matrix_) + strip * bytes +
        run * digits::strip_bytes(kRunColumns);
  }
  char* strip_of_transposed_g(int64_t strip) {
    return reinterpret_cast<char*>(values_ + 2 * matrix_) + strip * strip_bytes(t_.rows);
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
      const float* g = values(0, t, i);
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
      row_extents_[t * t_.rows + i] = {
          _mm512_reduce_max_epu32(max_bits), _mm512_reduce_add_ps(sum_squares)};
    }
    alignas(64) uint32_t bits[16];
    alignas(64) float sums[16];
    digits::Extent* out = column_extents_ + first / kEdge * columns() + t * t_.width;
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

  // Packs G and G^T of a super-block.
  void pack_strips(int64_t first, int64_t count) {
    const int64_t groups = digits::blocks(count), pieces = amx::blocks(count);
    parallel_each(t_.tiles * groups, [&](int64_t task) {
      const int64_t t = task / groups, group = task % groups, begin = group * kDepth;
      const int64_t rows = std::min(kDepth, count - begin), valid = t_.valid(t);
      const int64_t run = t / tiles_per_run(), start = run * tiles_per_run();
      const int64_t tiles = std::min(tiles_per_run(), t_.tiles - start);
      digits::Head head;
      digits::InverseScale inverse;
      for (int64_t i = begin; i < begin + rows && wanted_x_; i += kEdge) {
        const int64_t lines = std::min(kEdge, count - i);
        char* strip = strip_of_g(i / kEdge, run);
        set_lines(
            row_extents_ + start * t_.rows + i, tiles, t_.rows, lines,
            std::min(kRunColumns, t_.p - start * t_.width), head, inverse);
        if (t == start) {
          std::memcpy(strip, &head, sizeof(head));
        }
        for (int64_t j = 0; j < t_.width; j += kDepth) {
          digits::pack_block_of_rows(
              values(0, t, i) + j, t_.width, lines, valid - j, levels_of_w_.at(t * t_.width + j),
              inverse, digits::block(strip, ((t - start) * t_.width + j) / kDepth));
        }
      }
      for (int64_t j = 0; j < t_.width && wanted_w_; j += kEdge) {
        const int64_t column = t * t_.width + j;
        char* strip = strip_of_transposed_g(column / kEdge);
        set_lines(column_extents_ + column, pieces, columns(), kEdge, count, head, inverse);
        if (group == 0) {
          std::memcpy(strip, &head, sizeof(head));
        }
        digits::pack_block_of_columns(
            true, values(0, t, begin) + j, t_.width, rows, valid - j,
            levels_of_x_.at(first + begin), inverse, digits::block(strip, group));
      }
    });
  }

  // Products.

  // c [32, 32] (+)= G W for a strip of rows of dX, over the `tiles` tiles of a run, from tile t on.
  void add_to_x(
      int64_t strip, int64_t d, int64_t t, int64_t tiles, float* c, int64_t ldc, bool add) {
    const int64_t per_tile = t_.width / kDepth;
    const char* right = right_w_ + d * strip_bytes(columns());
    if constexpr (kFloat) {
      const char* left = strip_of_g(strip, t / tiles_per_run());
      digits::multiply(
          left, right, t * per_tile, tiles * per_tile, c, ldc, add,
          digits::gradients_need_eight_products(left, right));
    } else {
      amx::multiply(
          {operands(t, strip), 2 * t_.rows * t_.width},
          {reinterpret_cast<const uint16_t*>(right) + t * per_tile * amx::kBlock,
           per_tile * amx::kBlock},
          tiles, per_tile, c, ldc, add);
    }
  }
  // c [32, 32] (+)= G^T X for a strip of rows of dW, over the `count` rows of a super-block.
  void add_to_w(int64_t strip, int64_t d, int64_t count, float* c, int64_t ldc, bool add) {
    const char* right = right_x_ + d * strip_bytes(t_.rows);
    if constexpr (kFloat) {
      const char* left = strip_of_transposed_g(strip);
      digits::multiply(
          left, right, 0, digits::blocks(count), c, ldc, add,
          digits::gradients_need_eight_products(left, right));
    } else {
      const int64_t per_tile = t_.width / kEdge;
      const uint16_t* left =
          operands(strip / per_tile, 0) + kEdge * t_.width + strip % per_tile * amx::kBlock;
      amx::multiply(
          {left, 0, 2 * kEdge * t_.width}, {reinterpret_cast<const uint16_t*>(right)}, 1,
          amx::blocks(count), c, ldc, add);
    }
  }

  void write_dx(int64_t first, int64_t count, float factor, Tensor& dx) {
    const int64_t width = x_.width;
    // Large tasks read W and G less often, but each thread has to get one. The size of a task does
    // not change a sum.
    int64_t rows_of_task = kMaxRowsOfX, chunk = kMaxChunk;
    const auto pieces = [](int64_t of, int64_t size) { return (of + size - 1) / size; };
    while (pieces(count, rows_of_task) * pieces(width, chunk) < at::get_num_threads() &&
           rows_of_task * chunk > kEdge * kEdge) {
      (rows_of_task > kEdge ? rows_of_task : chunk) /= 2;
    }
    const int64_t blocks = pieces(count, rows_of_task);
    const int64_t run = tiles_per_run();
    parallel_tasks<Engine>(blocks * pieces(width, chunk), [&](int64_t task) {
      alignas(64) float sums[kMaxRowsOfX * kMaxChunk];
      // Successive tasks have the same chunk of W, so that it stays in the L2 cache of a core.
      const int64_t begin = task % blocks * rows_of_task, c = task / blocks * chunk;
      const int64_t rows = std::min(rows_of_task, count - begin);
      const int64_t columns = std::min(chunk, width - c);
      for (int64_t t = 0; t < t_.tiles; t += run) {
        const int64_t tiles = std::min(run, t_.tiles - t);
        for (int64_t i = 0; i < rows; i += kEdge) {
          for (int64_t j = 0; j < columns; j += kEdge) {
            add_to_x(
                (begin + i) / kEdge, (c + j) / kEdge, t, tiles, sums + i * chunk + j, chunk, t > 0);
          }
        }
      }
      for (int64_t i = 0; i < rows; ++i) {
        store_scaled(sums + i * chunk, columns, factor, dx, (first + begin + i) * width + c);
      }
    });
  }

  // Adds to dw itself if whole blocks of 32 x 32 floats fit there, else to `sums_`.
  void add_to_dw(int64_t first, int64_t count, float factor, Tensor& dw) {
    const int64_t width = x_.width;
    if (first == 0) {
      const bool fits = dw.scalar_type() == at::kFloat && width % kEdge == 0;
      groups_in_place_ = fits ? t_.p / kEdge : 0;
      sums_ = allocate<float>((amx::blocks(t_.p) - groups_in_place_) * kEdge * padded());
    }
    parallel_each(amx::blocks(width), [&](int64_t d) {
      pack_right(
          x_.row(first) + d * kEdge, x_.padded, count, width - d * kEdge, count,
          levels_of_x_.inverse_at(first), right_x_ + d * strip_bytes(t_.rows));
    });
    float* out = groups_in_place_ > 0 ? dw.mutable_data_ptr<float>() : nullptr;
    int64_t chunk = kMaxChunk;
    while (t_.tiles * ((width + chunk - 1) / chunk) < at::get_num_threads() && chunk > kEdge) {
      chunk /= 2;
    }
    const int64_t chunks = (width + chunk - 1) / chunk, per_tile = t_.width / kEdge;
    const bool last = first + count == t_.n;
    parallel_tasks<Engine>(t_.tiles * chunks, [&](int64_t task) {
      // A thread begins with tiles whose G it has written.
      const int64_t t = task / chunks, c = task % chunks * chunk;
      const int64_t columns = std::min(chunk, width - c);
      for (int64_t j = 0; j < per_tile; ++j) {
        const int64_t group = t * per_tile + j;
        if (group * kEdge >= t_.p) {
          break;
        }
        const bool in_place = group < groups_in_place_;
        float* sums = in_place ? out + group * kEdge * width
                               : sums_ + (group - groups_in_place_) * kEdge * padded();
        for (int64_t d = c; d < c + columns; d += kEdge) {
          add_to_w(group, d / kEdge, count, sums + d, padded(), first > 0);
        }
        for (int64_t i = 0; i < kEdge && in_place && last; ++i) {
          float* row = sums + i * width + c;
          at::vec::map([factor](Vec v) { return v * Vec(factor); }, row, row, columns);
        }
      }
    });
  }

  const Tiling t_;
  const Matrix<T>& x_;
  const Matrix<T>& w_;
  const bool wanted_x_, wanted_w_;
  const int64_t matrix_; // elements of one matrix
  std::vector<Scratch> scratch_;
  Levels levels_of_x_, levels_of_w_;
  float* values_ = nullptr; // [matrices][tiles][rows][width]
  // Of rows of G, [tiles][rows], and of columns of G, [strips of 32 rows][columns].
  digits::Extent *row_extents_ = nullptr, *column_extents_ = nullptr;
  char *right_w_ = nullptr, *right_x_ = nullptr; // W and X as right operands
  int64_t groups_in_place_ = 0; // groups of 32 rows of dW that are summed in dw itself
  float* sums_ = nullptr; // the other rows of dW, [rows][D padded]
};

template <>
class Gradients<AmxBFloat16> : public GradientsAmx<AmxBFloat16> {
  using GradientsAmx::GradientsAmx;
};
template <>
class Gradients<AmxFloat> : public GradientsAmx<AmxFloat> {
  using GradientsAmx::GradientsAmx;
};

} // namespace mulki

#endif
