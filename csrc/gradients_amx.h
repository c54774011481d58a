// Gradients on the matrix unit.
//
// Halves: 32 rows of G in one tile become the operand blocks of both products as soon as they are complete, in
// the memory of the logits, G in its first half and G^T in its second.
//
// Floats: a line of either operand needs its largest element first, which `commit` collects. The strips
// are made when all of a super-block's G is there, in the memory of matrices that nobody reads any
// more: those of G in matrix 1, those of G^T in matrix 2.
#pragma once

#include "gradients_common.h"

#if defined(MULKI_AMX)

namespace mulki {

template <typename Engine>
class GradientsAmx {
  using T = typename Engine::Element;
  static constexpr bool kFloats = std::is_same_v<Engine, AmxFloats>;
  static constexpr int64_t kEdge = amx::kEdge;
  static constexpr int64_t kDepth = kFloats ? digits::kDepth : kEdge; // of a block

 public:
  static int64_t matrices(int64_t models) {
    return std::max<int64_t>(models, kFloats ? 3 : 1);
  }

  GradientsAmx(
      const Tiling& tiling,
      const Rows<T>& x,
      const Rows<T>& w,
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
    values_ = take<float>(matrices(models) * matrix_);
    if constexpr (kFloats) {
      level(x, wanted_w, of_x_);
      level(w, wanted_x, of_w_);
      of_row_ = take<digits::Extent>(t_.tiles * t_.rows);
      of_column_ = take<digits::Extent>(t_.rows / kEdge * columns());
    }
    if (wanted_x_) {
      pack_w();
    }
    if (wanted_w_) {
      right_x_ = take<char>(amx::blocks(x.width) * strip_bytes(t_.rows));
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
      if constexpr (kFloats) {
        collect_largest(start, t, i, rows);
      } else {
        make_operands(t, i, rows);
      }
    }
  }

  void accumulate(int64_t first, int64_t count, float factor, Tensor& dx, Tensor& dw) {
    if constexpr (kFloats) {
      make_strips(first, count);
    }
    if (wanted_x_) {
      rows_of_x(first, count, factor, dx);
    }
    if (wanted_w_) {
      rows_of_w(first, count, factor, dw);
      if (first + count == t_.n) {
        store_sums(factor, dw);
      }
    }
  }

 private:
  // The rows of dW that could not be summed in place.
  void store_sums(float factor, Tensor& dw) {
    const int64_t groups = amx::blocks(t_.p) - in_place_;
    parallel_each(groups, [&](int64_t g) {
      const int64_t first = (in_place_ + g) * kEdge, rows = std::min(kEdge, t_.p - first);
      for (int64_t j = 0; j < rows; ++j) {
        store_scaled(
            sums_ + (g * kEdge + j) * padded(), x_.width, factor, dw, (first + j) * x_.width);
      }
    });
  }

  template <typename V>
  V* take(int64_t count) {
    scratch_.emplace_back(count * int64_t(sizeof(V)));
    return scratch_.back().template data<V>();
  }

  static constexpr int64_t kMostChunk = 256; // columns of D that one task takes
  static constexpr int64_t kMostRowsOfX = 256; // and rows of dX
  static constexpr int64_t kColumns = 512; // of G between two visits to a block of dX

  int64_t padded() const {
    return amx::blocks(x_.width) * kEdge;
  }
  int64_t columns() const { // of G
    return t_.tiles * t_.width;
  }
  static int64_t strip_bytes(int64_t depth) {
    return kFloats ? digits::strip_bytes(depth) : amx::blocks(depth) * amx::kBlock * 2;
  }

  // At most 32 columns of X or W as right operand of a depth of at least `rows`.
  void pack_right(
      const T* in,
      int64_t ld,
      int64_t rows,
      int64_t columns,
      int64_t depth,
      const float* by,
      char* out) {
    if constexpr (kFloats) {
      digits::strip_of_columns(in, ld, rows, columns, by, out);
    } else {
      for (int64_t i = 0; i < depth; i += kEdge, out += amx::kBlock * 2) {
        amx::pack_right(
            amx::Form::kRight, in + i * ld, ld, rows - i, columns,
            reinterpret_cast<uint16_t*>(out));
      }
    }
  }

  // W as right operand: a strip for every 32 columns of D.
  void pack_w() {
    const int64_t strips = amx::blocks(x_.width);
    right_w_ = take<char>(strips * strip_bytes(columns()));
    parallel_each(strips, [&](int64_t d) {
      pack_right(
          w_.data + d * kEdge, w_.padded, w_.count, w_.width - d * kEdge, columns(), of_w_.down(0),
          right_w_ + d * strip_bytes(columns()));
    });
  }

  // Halves.

  MULKI_AMX_TARGET void make_operands(int64_t t, int64_t i, int64_t rows) {
    alignas(64) float g[kEdge * 128];
    TORCH_INTERNAL_ASSERT_DEBUG_ONLY(t_.width <= 128);
    std::memcpy(g, values(0, t, i), sizeof(float) * rows * t_.width);
    uint16_t* left = operands(t, i / kEdge);
    for (int64_t j = 0; j < t_.width; j += kEdge, left += amx::kBlock) {
      amx::pack_left(g + j, t_.width, rows, t_.valid(t) - j, left);
      if (wanted_w_) {
        amx::arrange(amx::Form::kLeftTurned, left, left + kEdge * t_.width);
      }
    }
  }
  // Where the blocks of 32 rows of G in one tile lie, with those of G^T behind them.
  uint16_t* operands(int64_t tile, int64_t strip) {
    return reinterpret_cast<uint16_t*>(values(0, tile, strip * kEdge));
  }

  // Floats.

  // Levels of the rows of X or W and their inverses; none if all are near to one another.
  struct Levels {
    std::vector<float> values, inverses;

    const float* up(int64_t i) const {
      return values.empty() ? nullptr : values.data() + i;
    }
    const float* down(int64_t i) const {
      return inverses.empty() ? nullptr : inverses.data() + i;
    }
  };

  static void level(const Rows<T>& rows, bool wanted, Levels& out) {
    if (!wanted) {
      return;
    }
    constexpr float kNear = 4.0f; // such sizes share a scale without loss
    std::vector<float> values(rows.count);
    at::parallel_for(0, rows.count, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const uint32_t most = digits::extent_of(rows.row(i), rows.width).most;
        values[i] = most == 0 || most >= 0x7f800000 ? 0.0f : digits::level_of(most);
      }
    });
    float least = std::numeric_limits<float>::infinity(), largest = 0.0f;
    for (const float v : values) {
      least = v > 0 ? std::min(least, v) : least;
      largest = std::max(largest, v);
    }
    if (largest <= kNear * least) {
      return;
    }
    for (float& v : values) {
      v = v > 0 ? v : 1.0f; // of zeros, or of what spreads whatever it is multiplied by
      out.inverses.push_back(1.0f / v);
    }
    out.values = std::move(values);
  }

  int64_t tiles_of_run() const {
    return kColumns / t_.width;
  }
  // A strip of rows of G for every run of kColumns columns, with scales of its own: with one scale for a
  // whole row, an element far above the others would take their digits, the more of them the wider G is.
  char* strip_of_g(int64_t strip, int64_t run) {
    const int64_t runs = (columns() + kColumns - 1) / kColumns;
    const int64_t bytes =
        runs * int64_t(sizeof(digits::Head)) + digits::blocks(columns()) * digits::kBlock;
    return reinterpret_cast<char*>(values_ + matrix_) + strip * bytes +
        run * digits::strip_bytes(kColumns);
  }
  char* strip_of_turned_g(int64_t strip) {
    return reinterpret_cast<char*>(values_ + 2 * matrix_) + strip * strip_bytes(t_.rows);
  }

  // `start` is the row of X where the super-block begins.
  MULKI_AMX_TARGET void collect_largest(int64_t start, int64_t t, int64_t first, int64_t rows) {
    const float *of_x = of_x_.up(start), *of_w = of_w_.up(t * t_.width);
    __m512i most_of_column[8];
    __m512 squares_of_column[8];
    const int64_t vectors = t_.width / 16;
    TORCH_INTERNAL_ASSERT_DEBUG_ONLY(vectors <= 8);
    for (int64_t v = 0; v < vectors; ++v) {
      most_of_column[v] = _mm512_setzero_si512();
      squares_of_column[v] = _mm512_setzero_ps();
    }
    for (int64_t i = first; i < first + rows; ++i) {
      const float* g = values(0, t, i);
      __m512i most = _mm512_setzero_si512();
      __m512 squares = _mm512_setzero_ps();
      for (int64_t v = 0; v < vectors; ++v) {
        const __mmask16 valid = __mmask16(amx::lanes(t_.valid(t) - 16 * v, 16));
        const __m512 x = _mm512_maskz_loadu_ps(valid, g + 16 * v);
        const __m512 for_x =
            of_w == nullptr ? x : _mm512_mul_ps(x, _mm512_maskz_loadu_ps(valid, of_w + 16 * v));
        const __m512 for_w = of_x == nullptr ? x : _mm512_mul_ps(x, _mm512_set1_ps(of_x[i]));
        most = _mm512_max_epu32(most, digits::magnitude(for_x));
        squares = _mm512_fmadd_ps(for_x, for_x, squares);
        most_of_column[v] = _mm512_max_epu32(most_of_column[v], digits::magnitude(for_w));
        squares_of_column[v] = _mm512_fmadd_ps(for_w, for_w, squares_of_column[v]);
      }
      of_row_[t * t_.rows + i] = {_mm512_reduce_max_epu32(most), _mm512_reduce_add_ps(squares)};
    }
    alignas(64) uint32_t bits[16];
    alignas(64) float sums[16];
    digits::Extent* out = of_column_ + first / kEdge * columns() + t * t_.width;
    for (int64_t v = 0; v < vectors; ++v) {
      _mm512_store_si512(bits, most_of_column[v]);
      _mm512_store_ps(sums, squares_of_column[v]);
      for (int64_t j = 0; j < 16; ++j) {
        *out++ = {bits[j], sums[j]};
      }
    }
  }

  // The 32 lines of a strip of G of this depth, from `pieces` pieces of each.
  static void set_lines(
      const digits::Extent* extents,
      int64_t pieces,
      int64_t distance,
      int64_t lines,
      int64_t depth,
      digits::Head& head,
      digits::Inverse& inverse) {
    head.peak = 0;
    for (int64_t line = 0; line < kEdge; ++line) {
      digits::Extent whole{0, 0};
      for (int64_t p = 0; p < pieces && line < lines; ++p) {
        const digits::Extent& piece = extents[p * distance + line];
        whole.most = std::max(whole.most, piece.most);
        whole.squares += piece.squares;
      }
      digits::set_line(whole, depth, line, head, inverse);
    }
  }

  void make_strips(int64_t first, int64_t count) {
    const int64_t groups = digits::blocks(count), pieces = amx::blocks(count);
    parallel_each(t_.tiles * groups, [&](int64_t task) {
      const int64_t t = task / groups, group = task % groups, begin = group * kDepth;
      const int64_t rows = std::min(kDepth, count - begin), valid = t_.valid(t);
      const int64_t run = t / tiles_of_run(), start = run * tiles_of_run();
      const int64_t tiles = std::min(tiles_of_run(), t_.tiles - start);
      digits::Head head;
      digits::Inverse inverse;
      for (int64_t i = begin; i < begin + rows && wanted_x_; i += kEdge) {
        const int64_t lines = std::min(kEdge, count - i);
        char* strip = strip_of_g(i / kEdge, run);
        set_lines(
            of_row_ + start * t_.rows + i, tiles, t_.rows, lines,
            std::min(kColumns, t_.p - start * t_.width), head, inverse);
        if (t == start) {
          std::memcpy(strip, &head, sizeof(head));
        }
        for (int64_t j = 0; j < t_.width; j += kDepth) {
          digits::block_of_rows(
              values(0, t, i) + j, t_.width, lines, valid - j, of_w_.up(t * t_.width + j), inverse,
              digits::block(strip, ((t - start) * t_.width + j) / kDepth));
        }
      }
      for (int64_t j = 0; j < t_.width && wanted_w_; j += kEdge) {
        const int64_t column = t * t_.width + j;
        char* strip = strip_of_turned_g(column / kEdge);
        set_lines(of_column_ + column, pieces, columns(), kEdge, count, head, inverse);
        if (group == 0) {
          std::memcpy(strip, &head, sizeof(head));
        }
        digits::block_of_columns(
            true, values(0, t, begin) + j, t_.width, rows, valid - j, of_x_.up(first + begin),
            inverse, digits::block(strip, group));
      }
    });
  }

  // Products.

  // c [32, 32] (+)= rows of dX, over the `tiles` tiles of a run, from t on.
  void add_to_x(
      int64_t strip, int64_t d, int64_t t, int64_t tiles, float* c, int64_t ldc, bool add) {
    const int64_t per_tile = t_.width / kDepth;
    const char* right = right_w_ + d * strip_bytes(columns());
    if constexpr (kFloats) {
      const char* left = strip_of_g(strip, t / tiles_of_run());
      digits::multiply(
          left, right, t * per_tile, tiles * per_tile, c, ldc, add,
          digits::fine_gradients(left, right));
    } else {
      amx::multiply(
          {operands(t, strip), 2 * t_.rows * t_.width},
          {reinterpret_cast<const uint16_t*>(right) + t * per_tile * amx::kBlock,
           per_tile * amx::kBlock},
          tiles, per_tile, c, ldc, add);
    }
  }
  // c [32, 32] (+)= rows of dW, of 32 columns of G, over `count` rows of a super-block.
  void add_to_w(int64_t strip, int64_t d, int64_t count, float* c, int64_t ldc, bool add) {
    const char* right = right_x_ + d * strip_bytes(t_.rows);
    if constexpr (kFloats) {
      const char* left = strip_of_turned_g(strip);
      digits::multiply(
          left, right, 0, digits::blocks(count), c, ldc, add, digits::fine_gradients(left, right));
    } else {
      const int64_t per_tile = t_.width / kEdge;
      const uint16_t* left =
          operands(strip / per_tile, 0) + kEdge * t_.width + strip % per_tile * amx::kBlock;
      amx::multiply(
          {left, 0, 2 * kEdge * t_.width}, {reinterpret_cast<const uint16_t*>(right)}, 1,
          amx::blocks(count), c, ldc, add);
    }
  }

  void rows_of_x(int64_t first, int64_t count, float factor, Tensor& dx) {
    const int64_t width = x_.width;
    // Large tasks read W and G less often; every thread gets one. Sums do not depend on it.
    int64_t rows_of_task = kMostRowsOfX, chunk = kMostChunk;
    const auto pieces = [](int64_t of, int64_t size) { return (of + size - 1) / size; };
    while (pieces(count, rows_of_task) * pieces(width, chunk) < at::get_num_threads() &&
           rows_of_task * chunk > kEdge * kEdge) {
      (rows_of_task > kEdge ? rows_of_task : chunk) /= 2;
    }
    const int64_t blocks = pieces(count, rows_of_task);
    const int64_t run = tiles_of_run();
    parallel_tasks<Engine>(blocks * pieces(width, chunk), [&](int64_t task) {
      alignas(64) float sums[kMostRowsOfX * kMostChunk];
      // Blocks of rows run faster than chunks, so that a chunk of W stays in a core's own cache.
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

  // Adds to dw itself where whole blocks of 32 x 32 floats fit into it, else to `sums_`.
  void rows_of_w(int64_t first, int64_t count, float factor, Tensor& dw) {
    const int64_t width = x_.width;
    if (first == 0) {
      const bool fits = dw.scalar_type() == at::kFloat && width % kEdge == 0;
      in_place_ = fits ? t_.p / kEdge : 0;
      sums_ = take<float>((amx::blocks(t_.p) - in_place_) * kEdge * padded());
    }
    parallel_each(amx::blocks(width), [&](int64_t d) {
      pack_right(
          x_.row(first) + d * kEdge, x_.padded, count, width - d * kEdge, count, of_x_.down(first),
          right_x_ + d * strip_bytes(t_.rows));
    });
    float* out = in_place_ > 0 ? dw.mutable_data_ptr<float>() : nullptr;
    int64_t chunk = kMostChunk;
    while (t_.tiles * ((width + chunk - 1) / chunk) < at::get_num_threads() && chunk > kEdge) {
      chunk /= 2;
    }
    const int64_t chunks = (width + chunk - 1) / chunk, per_tile = t_.width / kEdge;
    const bool last = first + count == t_.n;
    parallel_tasks<Engine>(t_.tiles * chunks, [&](int64_t task) {
      // A thread begins with tiles whose G it has made.
      const int64_t t = task / chunks, c = task % chunks * chunk;
      const int64_t columns = std::min(chunk, width - c);
      for (int64_t j = 0; j < per_tile; ++j) {
        const int64_t group = t * per_tile + j;
        if (group * kEdge >= t_.p) {
          break;
        }
        const bool direct = group < in_place_;
        float* sums =
            direct ? out + group * kEdge * width : sums_ + (group - in_place_) * kEdge * padded();
        for (int64_t d = c; d < c + columns; d += kEdge) {
          add_to_w(group, d / kEdge, count, sums + d, padded(), first > 0);
        }
        for (int64_t i = 0; i < kEdge && direct && last; ++i) {
          float* row = sums + i * width + c;
          at::vec::map([factor](Vec v) { return v * Vec(factor); }, row, row, columns);
        }
      }
    });
  }

  const Tiling t_;
  const Rows<T>& x_;
  const Rows<T>& w_;
  const bool wanted_x_, wanted_w_;
  const int64_t matrix_; // floats of a matrix
  std::vector<Scratch> scratch_;
  Levels of_x_, of_w_;
  float* values_ = nullptr; // [matrices][tiles][rows][width]
  // Of G: [tiles][rows], and [strips of 32 rows][columns].
  digits::Extent *of_row_ = nullptr, *of_column_ = nullptr;
  char *right_w_ = nullptr, *right_x_ = nullptr; // W and X as right operands
  int64_t in_place_ = 0; // groups of 32 rows of dW that are summed in dw itself
  float* sums_ = nullptr; // the others, [rows of dW][D padded]
};

template <>
class Gradients<AmxHalves> : public GradientsAmx<AmxHalves> {
  using GradientsAmx::GradientsAmx;
};
template <>
class Gradients<AmxFloats> : public GradientsAmx<AmxFloats> {
  using GradientsAmx::GradientsAmx;
};

} // namespace mulki

#endif
