// dX = f G W and dW = f G^T X by brgemm (gradients.h).
//
// G of a super-block is stored in tiles of columns, [tiles][rows of the super-block][width], in
// float, and for bfloat16 also rounded, as left and as right operand. dW is computed as its
// transpose X^T G, so that G need not be transposed. dX is written for each super-block. dW^T is
// summed in float over the super-blocks, and transposed and stored with the last one.
#pragma once

#include "core/gradients_common.h"

namespace mulki {

template <typename E>
class Gradients<Brgemm<E>> {
 public:
  using Operand = typename Brgemm<E>::Operand;

  static int64_t matrices(int64_t models) {
    return models + (kIsBFloat16<E> ? 1 : 0);
  }

  Gradients(
      const Tiling& tiling,
      const Operand& x,
      const Operand& w,
      bool wanted_x,
      bool wanted_w,
      int64_t models = 1)
      : t_(tiling), x_(x), w_(w), wanted_x_(wanted_x), wanted_w_(wanted_w) {
    if (!any()) {
      return;
    }
    const auto cells = t_.tiles * t_.width;
    values_ = allocate<float>(models * t_.rows * cells);
    if constexpr (kIsBFloat16<E>) {
      if (wanted_x_) {
        const int64_t pairs = (w.count + 1) / 2;
        g_rows_ = allocate<E>(t_.rows * cells);
        w_pairs_ = allocate<E>(pairs * w.width * 2);
        at::parallel_for(0, pairs, 64, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            interleave(
                w.row(2 * i), 2 * i + 1 < w.count ? w.row(2 * i + 1) : nullptr, w.width,
                w_pairs_ + i * w.width * 2);
          }
        });
      }
    }
    if (wanted_w_) {
      if (t_.n > t_.rows) {
        sum_w_ = allocate<float>(cells * x.width);
      }
      transposed_x_ = allocate<E>(x.padded * t_.rows);
    }
    if (wanted_w_ && kIsBFloat16<E>) {
      g_pairs_ = allocate<E>(t_.rows * cells);
    }
  }

  bool any() const {
    return wanted_x_ || wanted_w_;
  }

  float* values(int64_t model, int64_t t, int64_t i) {
    return values_ + ((model * t_.tiles + t) * t_.rows + i) * t_.width;
  }

  void commit(int64_t /*start*/, int64_t t, int64_t first, int64_t count) {
    if constexpr (kIsBFloat16<E>) {
      if (!any()) {
        return;
      }
      E row[2][256];
      TORCH_INTERNAL_ASSERT_DEBUG_ONLY(t_.width <= 256);
      for (int64_t i = first; i < first + count; i += 2) {
        const bool second = i + 1 < first + count;
        for (int64_t r = 0; r < (second ? 2 : 1); ++r) {
          at::vec::convert<float, E>(values(0, t, i + r), row[r], t_.width);
          if (wanted_x_) {
            std::memcpy(g_rows_ + (t * t_.rows + i + r) * t_.width, row[r], sizeof(E) * t_.width);
          }
        }
        if (wanted_w_) {
          interleave(
              row[0], second ? row[1] : nullptr, t_.width, g_pairs_ + (t * t_.rows + i) * t_.width);
        }
      }
    }
  }

  void accumulate(int64_t first, int64_t count, float factor, Tensor& dx, Tensor& dw) {
    if (wanted_x_) {
      write_dx(first, count, factor, dx);
    }
    if (wanted_w_) {
      add_to_dw(first, count, factor, dw);
    }
  }

 private:
  template <typename T>
  T* allocate(int64_t count) {
    scratch_.emplace_back(count * int64_t(sizeof(T)));
    return scratch_.back().template data<T>();
  }

  static constexpr int64_t kChunk = 256; // columns of dX, or rows of dW^T, that one task computes
  static constexpr int64_t kMaxBlock = 64; // rows of a block, see Tiling

  void write_dx(int64_t first, int64_t count, float factor, Tensor& dx) {
    const int64_t width = x_.width;
    const int64_t chunks = (width + kChunk - 1) / kChunk;
    const int64_t blocks = (count + t_.block - 1) / t_.block;
    parallel_tasks<Brgemm<E>>(blocks * chunks, [&](int64_t task) {
      const int64_t b = task / chunks, c = task % chunks * kChunk;
      const int64_t rows = t_.block_rows(b, count), columns = std::min(kChunk, width - c);
      TORCH_INTERNAL_ASSERT_DEBUG_ONLY(rows <= kMaxBlock);
      alignas(64) float sums[kMaxBlock * kChunk];
      alignas(64) E buffer[kIsBFloat16<E> ? 1 : Brgemm<E>::kWidth * kChunk];
      for (int64_t t = 0; t < t_.tiles; ++t) {
        const int64_t valid = t_.valid(t);
        if constexpr (kIsBFloat16<E>) {
          const E* g = g_rows_ + (t * t_.rows + b * t_.block) * t_.width;
          const E* right = w_pairs_ + t * t_.width / 2 * width * 2 + c * 2;
          product(
              rows, columns, (valid + 1) / 2 * 2, g, t_.width, right, width, sums, columns, t > 0);
        } else {
          const MatrixView<E> right = w_.read(t * t_.width, valid, c, columns, buffer);
          product(
              rows, columns, valid, values(0, t, b * t_.block), t_.width, right.data, right.stride,
              sums, columns, t > 0);
        }
      }
      for (int64_t i = 0; i < rows; ++i) {
        store_scaled(
            sums + i * columns, columns, factor, dx, (first + b * t_.block + i) * width + c);
      }
    });
  }

  void add_to_dw(int64_t first, int64_t count, float factor, Tensor& dw) {
    const int64_t width = x_.width;
    const bool is_first = first == 0, is_last = first + count == t_.n;
    // torch caches a compiled product for each depth. To keep them few, the last super-block is
    // padded with zeros to a multiple of 16 rows.
    const int64_t depth = (count + 15) / 16 * 16;
    static_assert(Brgemm<E>::kMaxRows <= kMaxTransposeRows);
    const int64_t strips = (x_.padded + 31) / 32;
    at::parallel_for(0, strips, 4, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        const int64_t from = s * 32, columns = std::min<int64_t>(32, x_.padded - from);
        E* to = transposed_x_ + from * t_.rows;
        // All rows at once, or for FloatMatrix as many as its conversion buffer holds.
        constexpr int64_t kPart = kIsBFloat16<E> ? Brgemm<E>::kMaxRows : 64;
        alignas(64) E buffer[kIsBFloat16<E> ? 1 : kPart * 32];
        for (int64_t r = 0; r < count; r += kPart) {
          const int64_t rows = std::min(kPart, count - r);
          const MatrixView<E> part = x_.read(first + r, rows, from, columns, buffer);
          transpose(part.data, part.stride, to + r, t_.rows, rows, columns);
        }
        for (int64_t i = 0; i < columns; ++i) {
          std::fill(to + i * t_.rows + count, to + i * t_.rows + depth, E(0));
        }
      }
    });
    for (int64_t t = 0; t < t_.tiles && depth > count; ++t) {
      if constexpr (kIsBFloat16<E>) {
        E* pairs = g_pairs_ + t * t_.rows * t_.width;
        std::fill(pairs + (count + 1) / 2 * 2 * t_.width, pairs + depth * t_.width, E(0));
      } else {
        std::fill(values(0, t, count), values(0, t, 0) + depth * t_.width, 0.0f);
      }
    }
    const int64_t chunks = (width + kChunk - 1) / kChunk;
    parallel_tasks<Brgemm<E>>(t_.tiles * chunks, [&](int64_t task) {
      const int64_t t = task / chunks, c = task % chunks * kChunk;
      const int64_t columns = std::min(kChunk, width - c);
      const E* left = transposed_x_ + c * t_.rows;
      alignas(64) float local[Brgemm<E>::kWidth * kChunk];
      float* sum = is_first && is_last ? local : sum_w_ + (t * width + c) * t_.width;
      if constexpr (kIsBFloat16<E>) {
        const E* g = g_pairs_ + t * t_.rows * t_.width;
        product(columns, t_.width, depth, left, t_.rows, g, t_.width, sum, t_.width, !is_first);
      } else {
        product(
            columns, t_.width, depth, left, t_.rows, values(0, t, 0), t_.width, sum, t_.width,
            !is_first);
      }
      if (is_last) {
        store_transposed(sum, columns, t, c, factor, dw);
      }
    });
  }

  // Writes factor times the transpose of sums [columns, width] to columns [c, c + columns) of the
  // rows of dW that belong to tile t.
  void store_transposed(
      const float* sums, int64_t columns, int64_t t, int64_t c, float factor, Tensor& dw) const {
    constexpr int64_t kStrip = 16;
    alignas(64) float transposed[kStrip * kChunk];
    const int64_t valid = t_.valid(t);
    for (int64_t j = 0; j < valid; j += kStrip) {
      const int64_t rows = std::min(kStrip, valid - j);
      transpose(sums + j, t_.width, transposed, columns, columns, rows);
      for (int64_t r = 0; r < rows; ++r) {
        store_scaled(
            transposed + r * columns, columns, factor, dw, (t * t_.width + j + r) * x_.width + c);
      }
    }
  }

  const Tiling t_;
  const Operand& x_;
  const Operand& w_;
  const bool wanted_x_, wanted_w_;
  std::vector<Scratch> scratch_;
  float* values_ = nullptr; // [models][tiles][rows][width], the student first
  E *g_rows_ = nullptr, *g_pairs_ = nullptr; // bfloat16: G as left operand and as right operand
  E* w_pairs_ = nullptr; // bfloat16: W as right operand
  E* transposed_x_ = nullptr; // [D, rows]
  float* sum_w_ = nullptr; // dW^T [tiles][D][width]; not used for a single super-block
};

} // namespace mulki
