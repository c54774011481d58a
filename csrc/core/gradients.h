// The gradients of X and W from the gradient G [N, P] of a loss with respect to Y = X W^T:
//
//   dX = f G W      dW = f G^T X      f is a number
//
// G is never stored as a whole: it exists for one super-block of rows at a time, in tiles of
// columns (tiling.h, super_block.h). dX is written for each super-block. dW is summed over the
// super-blocks and written with the last one: on the stack if there is only one super-block, in dW
// itself if it is float and whole blocks fit there, and else in `sums_`. One task sums each element
// of dX and dW, over tiles or super-blocks in order, so results do not depend on the number of
// threads or on the size of a task.
//
// How an engine packs and multiplies G, W and X is in gradient_operands.h.
#pragma once

#include "common/results.h"
#include "core/gradient_operands_amx.h"
#include "core/gradient_operands_brgemm.h"
#include "core/gradient_operands_digits.h"

namespace mulki {

// The tiling of a problem for an engine. `models` counts the student and its teachers.
template <typename Engine>
Tiling tiling_for(int64_t n, int64_t p, int64_t models, bool gradient) {
  return {Engine(), n, p, GradientOperands<Engine>::matrices(models), gradient};
}

template <typename Engine>
class Gradients {
  using Operand = typename Engine::Operand;
  using Operands = GradientOperands<Engine>;

 public:
  Gradients(
      const Tiling& tiling,
      const Operand& x,
      const Operand& w,
      bool wanted_x,
      bool wanted_w,
      int64_t models = 1)
      : t_(tiling), width_(x.width), wanted_x_(wanted_x), wanted_w_(wanted_w) {
    if (any()) {
      block_.emplace(tiling, models, Operands::matrices(models));
      operands_.emplace(*block_, GradientProblem<Engine>{tiling, x, w, wanted_x, wanted_w, models});
    }
  }

  bool any() const {
    return wanted_x_ || wanted_w_;
  }

  // Row i of the super-block in tile t: the products of a model. G replaces those of model 0, the
  // student. Only if `any`.
  float* values(int64_t model, int64_t t, int64_t i) {
    return block_->values(model, t, i);
  }

  // To be called when rows [first, first + count) of G in tile t are complete; the super-block
  // starts at row `start` of X, and `first` is a multiple of 32.
  void commit(int64_t start, int64_t t, int64_t first, int64_t count) {
    if (any()) {
      operands_->commit(start, t, first, count);
    }
  }

  // To be called once for each super-block, in order, when all of G is committed. Writes its rows
  // of dX and adds to dW, which the last super-block completes.
  void accumulate(int64_t first, int64_t count, float factor, Tensor& dx, Tensor& dw) {
    if (!any()) {
      return;
    }
    block_->enter(SuperBlock::Phase::kComplete);
    operands_->complete(first, count);
    if (wanted_x_) {
      write_dx(first, count, factor, dx);
    }
    if (wanted_w_) {
      add_to_dw(first, count, factor, dw);
    }
    block_->enter(SuperBlock::Phase::kValues);
  }

 private:
  static constexpr int64_t kUnit = 32; // of the rows and columns of a task

  static int64_t pieces(int64_t of, int64_t size) {
    return (of + size - 1) / size;
  }
  static Span piece(int64_t i, int64_t size, int64_t of) {
    return {i * size, std::min(size, of - i * size)};
  }

  void write_dx(int64_t first, int64_t count, float factor, Tensor& dx) {
    // Large tasks read W and G less often, but each thread has to get one.
    int64_t rows_of_task = Operands::kTaskRows, chunk = kMaxChunk;
    while (pieces(count, rows_of_task) * pieces(width_, chunk) < threads_here() &&
           rows_of_task * chunk > kUnit * kUnit) {
      (rows_of_task > kUnit ? rows_of_task : chunk) /= 2;
    }
    const int64_t blocks = pieces(count, rows_of_task), run = operands_->tiles_per_run();
    parallel_tasks<Engine>(blocks * pieces(width_, chunk), [&](int64_t task) {
      alignas(64) float sums[Operands::kTaskRows * kMaxChunk];
      // Successive tasks have the same chunk of W, so that it stays in the L2 cache of a core.
      const Span rows = piece(task % blocks, rows_of_task, count);
      const Span columns = piece(task / blocks, chunk, width_);
      for (int64_t t = 0; t < t_.tiles; t += run) {
        operands_->add_to_x(rows, columns, {t, std::min(run, t_.tiles - t)}, {sums, chunk, t > 0});
      }
      for (int64_t i = 0; i < rows.count; ++i) {
        const int64_t at = (first + rows.begin + i) * width_ + columns.begin;
        store_scaled(sums + i * chunk, columns.count, factor, dx, at);
      }
    });
  }

  void add_to_dw(int64_t first, int64_t count, float factor, Tensor& dw) {
    const bool is_first = first == 0, is_last = first + count == t_.n;
    if (is_first && !is_last) {
      place_sums(dw);
    }
    int64_t chunk = kMaxChunk;
    while (t_.tiles * pieces(width_, chunk) < threads_here() && chunk > kUnit) {
      chunk /= 2;
    }
    const int64_t chunks = pieces(width_, chunk);
    parallel_tasks<Engine>(t_.tiles * chunks, [&](int64_t task) {
      // A thread begins with tiles whose G it has written.
      const int64_t t = task / chunks;
      const Span columns = piece(task % chunks, chunk, width_);
      alignas(64) float local[Engine::kWidth * kMaxChunk];
      const Sums sums = is_first && is_last
          ? Sums{local, Operands::kTransposed ? t_.width : chunk, false}
          : sums_of(t, columns.begin, !is_first);
      operands_->add_to_w(t, columns, count, sums);
      if (is_last) {
        store(sums, t, columns, factor, dw);
      }
    });
  }

  void place_sums(Tensor& dw) {
    const bool fits =
        !Operands::kTransposed && dw.scalar_type() == at::kFloat && width_ % kUnit == 0;
    tiles_in_place_ = fits ? t_.p / t_.width : 0; // not the last tile, if it has padding
    in_place_ = fits ? dw.mutable_data_ptr<float>() : nullptr;
    sums_ =
        Scratch((t_.tiles - tiles_in_place_) * t_.width * padded_width() * int64_t(sizeof(float)));
  }
  // Where dW is summed in tile t from column c on: [width, columns], or its transpose.
  Sums sums_of(int64_t t, int64_t c, bool add) const {
    if (t < tiles_in_place_) {
      return {in_place_ + t * t_.width * width_ + c, width_, add};
    }
    const int64_t padded = padded_width();
    float* tile = sums_.data<float>() + (t - tiles_in_place_) * t_.width * padded;
    return Operands::kTransposed ? Sums{tile + c * t_.width, t_.width, add}
                                 : Sums{tile + c, padded, add};
  }
  int64_t padded_width() const {
    return pieces(width_, kUnit) * kUnit;
  }

  // Writes `factor` times the sums to some columns of the rows of dW that belong to tile t.
  void store(const Sums& sums, int64_t t, const Span& columns, float factor, Tensor& dw) const {
    const auto store_row = [&](const float* row, int64_t j) {
      const int64_t at = (t * t_.width + j) * width_ + columns.begin;
      store_scaled(row, columns.count, factor, dw, at);
    };
    const int64_t valid = t_.valid(t);
    if constexpr (Operands::kTransposed) {
      constexpr int64_t kStrip = 16;
      alignas(64) float transposed[kStrip * kMaxChunk];
      for (int64_t j = 0; j < valid; j += kStrip) {
        const int64_t rows = std::min(kStrip, valid - j);
        transpose(sums.data + j, sums.ld, transposed, kMaxChunk, columns.count, rows);
        for (int64_t r = 0; r < rows; ++r) {
          store_row(transposed + r * kMaxChunk, j + r);
        }
      }
    } else {
      for (int64_t j = 0; j < valid; ++j) {
        store_row(sums.data + j * sums.ld, j);
      }
    }
  }

  const Tiling t_;
  const int64_t width_; // D
  const bool wanted_x_, wanted_w_;
  std::optional<SuperBlock> block_;
  std::optional<Operands> operands_;
  // dW while it is summed: the first tiles in the result, the others [tiles][width][D padded], or
  // the transpose of each tile.
  int64_t tiles_in_place_ = 0;
  float* in_place_ = nullptr;
  Scratch sums_;
};

} // namespace mulki
