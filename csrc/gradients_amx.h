// Gradients on the matrix unit. 32 rows of G in one tile become the operand blocks of both products as
// soon as they are complete, in the memory of the logits: part p in that of model p, G in its first half
// and G^T in its second.
#pragma once

#include "gradients_common.h"

#if defined(MULKI_AMX)

namespace mulki {

template <typename T>
class Gradients<Amx<T>> {
  using Engine = Amx<T>;
  static constexpr int kParts = Engine::kParts;
  static constexpr int64_t kBlock = kParts * amx::kBlock; // elements of a packed block
  static constexpr int64_t kEdge = amx::kEdge;

 public:
  static int64_t matrices(int64_t models) {
    return std::max<int64_t>(models, kParts);
  }

  Gradients(
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
        half_(kEdge * tiling.width),
        matrix_(2 * tiling.tiles * tiling.rows * tiling.width) {
    if (!any()) {
      return;
    }
    values_ = take<float>(matrices(models) * matrix_ / 2);
    if (wanted_x_) {
      pack_w();
    }
    if (wanted_w_) {
      right_x_ = take<uint16_t>(amx::blocks(x.width) * t_.rows / kEdge * kBlock);
    }
  }

  bool any() const {
    return wanted_x_ || wanted_w_;
  }

  float* values(int64_t model, int64_t t, int64_t i) {
    return values_ + ((model * t_.tiles + t) * t_.rows + i) * t_.width;
  }

  MULKI_AMX_TARGET void commit(int64_t t, int64_t first, int64_t count) {
    if (!any()) {
      return;
    }
    alignas(64) float g[kEdge * 128];
    TORCH_INTERNAL_ASSERT_DEBUG_ONLY(t_.width <= 128);
    const int64_t valid = t_.valid(t);
    for (int64_t i = first; i < first + count; i += kEdge) {
      const int64_t rows = std::min(kEdge, first + count - i);
      std::memcpy(g, values(0, t, i), sizeof(float) * rows * t_.width);
      uint16_t* left = operands(t, i / kEdge);
      for (int64_t j = 0; j < t_.width; j += kEdge, left += amx::kBlock) {
        amx::split<kParts>(g + j, t_.width, rows, valid - j, left, matrix_);
        if (wanted_w_) {
          amx::arrange<kParts>(amx::Form::kLeftTurned, left, matrix_, left + half_, matrix_);
        }
      }
    }
  }

  void accumulate(int64_t first, int64_t count, float factor, Tensor& dx, Tensor& dw) {
    if (wanted_x_) {
      rows_of_x(first, count, factor, dx);
    }
    if (wanted_w_) {
      rows_of_w(first, count, factor, dw);
    }
  }

  void finish(float factor, Tensor& dw) {
    if (!wanted_w_ || t_.n == 0) {
      return;
    }
    const int64_t groups = amx::blocks(t_.p) - in_place_;
    parallel_each(groups, [&](int64_t g) {
      const int64_t first = (in_place_ + g) * kEdge, rows = std::min(kEdge, t_.p - first);
      for (int64_t j = 0; j < rows; ++j) {
        store_scaled(
            sums_ + (g * kEdge + j) * padded(), x_.width, factor, dw, (first + j) * x_.width);
      }
    });
  }

 private:
  template <typename V>
  V* take(int64_t count) {
    scratch_.emplace_back(count * int64_t(sizeof(V)));
    return scratch_.back().template data<V>();
  }

  static constexpr int64_t kChunk = 256; // columns of D that one task takes
  static constexpr int64_t kRowsOfX = kParts == 1 ? 64 : 128; // and rows of dX
  static constexpr int64_t kDepth = 512; // columns of G between two visits to a block of dX

  int64_t padded() const {
    return amx::blocks(x_.width) * kEdge;
  }
  // Where the blocks of 32 rows of G in one tile lie; those of G^T are half_ behind them.
  uint16_t* operands(int64_t tile, int64_t strip) {
    return reinterpret_cast<uint16_t*>(values(0, tile, strip * kEdge));
  }

  // W as right operand: [strips of D][all columns of G / 32] blocks.
  void pack_w() {
    const int64_t strips = amx::blocks(x_.width), steps = t_.tiles * t_.width / kEdge;
    right_w_ = take<uint16_t>(strips * steps * kBlock);
    parallel_each(steps, [&](int64_t s) {
      for (int64_t d = 0; d < strips; ++d) {
        amx::pack<kParts>(
            amx::Form::kRight, w_.data + s * kEdge * w_.padded + d * kEdge, w_.padded,
            w_.count - s * kEdge, w_.width - d * kEdge, right_w_ + (d * steps + s) * kBlock);
      }
    });
  }

  void rows_of_x(int64_t first, int64_t count, float factor, Tensor& dx) {
    const int64_t width = x_.width, chunks = (width + kChunk - 1) / kChunk;
    const int64_t blocks = (count + kRowsOfX - 1) / kRowsOfX;
    const int64_t per_tile = t_.width / kEdge, steps = t_.tiles * per_tile;
    const int64_t run = kDepth / t_.width; // tiles
    parallel_tasks<Engine>(blocks * chunks, [&](int64_t task) {
      alignas(64) float sums[kRowsOfX * kChunk];
      const int64_t begin = task / chunks * kRowsOfX, c = task % chunks * kChunk;
      const int64_t rows = std::min(kRowsOfX, count - begin), columns = std::min(kChunk, width - c);
      for (int64_t t = 0; t < t_.tiles; t += run) {
        const int64_t tiles = std::min(run, t_.tiles - t);
        for (int64_t i = 0; i < rows; i += kEdge) {
          const amx::Stream left{
              operands(t, (begin + i) / kEdge), matrix_, amx::kBlock, 2 * t_.rows * t_.width};
          for (int64_t j = 0; j < columns; j += kEdge) {
            const amx::Stream right = amx::packed<kParts>(
                right_w_ + ((c + j) / kEdge * steps + t * per_tile) * kBlock, per_tile * kBlock);
            amx::multiply<kParts>(
                left, right, tiles, per_tile, sums + i * kChunk + j, kChunk, t > 0);
          }
        }
      }
      for (int64_t i = 0; i < rows; ++i) {
        store_scaled(sums + i * kChunk, columns, factor, dx, (first + begin + i) * width + c);
      }
    });
  }

  // Adds to dw itself where whole blocks of 32 x 32 floats fit into it, else to `sums_`.
  void rows_of_w(int64_t first, int64_t count, float factor, Tensor& dw) {
    const int64_t width = x_.width, strips = amx::blocks(count), all = t_.rows / kEdge;
    if (first == 0) {
      const bool fits = dw.scalar_type() == at::kFloat && width % kEdge == 0;
      in_place_ = fits ? t_.p / kEdge : 0;
      sums_ = take<float>((amx::blocks(t_.p) - in_place_) * kEdge * padded());
    }
    parallel_each(amx::blocks(width), [&](int64_t d) {
      for (int64_t s = 0; s < strips; ++s) {
        amx::pack<kParts>(
            amx::Form::kRight, x_.row(first + s * kEdge) + d * kEdge, x_.padded,
            count - s * kEdge, width - d * kEdge, right_x_ + (d * all + s) * kBlock);
      }
    });
    float* out = in_place_ > 0 ? dw.mutable_data_ptr<float>() : nullptr;
    const int64_t chunks = (width + kChunk - 1) / kChunk, per_tile = t_.width / kEdge;
    const bool last = first + count == t_.n;
    parallel_tasks<Engine>(t_.tiles * chunks, [&](int64_t task) {
      // Tiles run faster than chunks, so that a chunk of X stays in a core's own cache.
      const int64_t t = task % t_.tiles, c = task / t_.tiles * kChunk;
      const int64_t columns = std::min(kChunk, width - c);
      for (int64_t j = 0; j < per_tile; ++j) {
        const int64_t group = t * per_tile + j;
        if (group * kEdge >= t_.p) {
          break;
        }
        const bool direct = group < in_place_;
        float* sums = direct ? out + group * kEdge * width
                             : sums_ + (group - in_place_) * kEdge * padded();
        for (int64_t d = c; d < c + columns; d += kEdge) {
          amx::multiply<kParts>(
              {operands(t, 0) + half_ + j * amx::kBlock, matrix_, 0, 2 * half_},
              amx::packed<kParts>(right_x_ + d / kEdge * all * kBlock, kBlock), strips, 1,
              sums + d, padded(), first > 0);
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
  const int64_t half_; // elements from blocks of G to those of G^T
  const int64_t matrix_; // and from a part to the next, which is in another matrix
  std::vector<Scratch> scratch_;
  float* values_ = nullptr; // [matrices][tiles][rows][width]
  uint16_t *right_w_ = nullptr, *right_x_ = nullptr; // W and X as right operands
  int64_t in_place_ = 0; // groups of 32 rows of dW that are summed in dw itself
  float* sums_ = nullptr; // the others, [rows of dW][D padded]
};

} // namespace mulki

#endif
