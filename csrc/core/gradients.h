// The gradients of X and W from the gradient G [N, P] of a loss with respect to Y = X W^T:
//
//   dX = f G W      dW = f G^T X      f is a number
//
// G is never stored as a whole: it exists for one super-block of rows at a time, in tiles of
// columns (tiling.h). dX is written for each super-block. dW is summed over the super-blocks and
// written with the last one: on the stack if there is only one super-block, and else in `sums_`.
// One task sums each element of dX and dW, over tiles or super-blocks in order, so results do not
// depend on the number of threads or on the size of a task; but where oneDNN has no brgemm, torch
// multiplies, which may round by the size.
//
// How G, W and X are packed and multiplied is in gradient_products.h.
#pragma once

#include "common/results.h"
#include "core/gradient_products.h"

namespace mulki {

template <typename Engine>
class Gradients {
  using Operand = typename Engine::Operand;

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
      values_ = Scratch(models * t_.tiles * t_.rows * t_.width * int64_t(sizeof(float)));
      products_.emplace(t_, x, w, wanted_x, wanted_w, values_.data<float>());
    }
  }

  bool any() const {
    return wanted_x_ || wanted_w_;
  }

  // Row i of the super-block in tile t: the products of a model. G replaces those of model 0, the
  // student. Only if `any`.
  float* values(int64_t model, int64_t t, int64_t i) {
    return values_.data<float>() + ((model * t_.tiles + t) * t_.rows + i) * t_.width;
  }

  // To be called once for each super-block, in order, when all of G is complete. Writes its rows
  // of dX and adds to dW, which the last super-block completes.
  void accumulate(int64_t first, int64_t count, float factor, Tensor& dx, Tensor& dw) {
    if (!any()) {
      return;
    }
    products_->complete(first, count);
    if (wanted_x_) {
      write_dx(first, count, factor, dx);
    }
    if (wanted_w_) {
      add_to_dw(first, count, factor, dw);
    }
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
    int64_t rows_of_task = kTaskRows, chunk = kMaxChunk;
    while (pieces(count, rows_of_task) * pieces(width_, chunk) < threads_here() &&
           rows_of_task * chunk > kUnit * kUnit) {
      (rows_of_task > kUnit ? rows_of_task : chunk) /= 2;
    }
    const int64_t blocks = pieces(count, rows_of_task);
    parallel_tasks<Engine>(blocks * pieces(width_, chunk), [&](int64_t task) {
      // Not on the stack, which may be small in a thread of the caller's.
      const Scratch block(rows_of_task * chunk * int64_t(sizeof(float)));
      float* sums = block.data<float>();
      // Successive tasks have the same chunk of W, so that it stays in the L2 cache of a core.
      const Span rows = piece(task % blocks, rows_of_task, count);
      const Span columns = piece(task / blocks, chunk, width_);
      for (int64_t t = 0; t < t_.tiles; ++t) {
        products_->add_to_x(rows, columns, t, {sums, chunk, t > 0});
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
      sums_ = Scratch(t_.tiles * t_.width * width_ * int64_t(sizeof(float)));
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
      const Scratch local = is_first && is_last
          ? Scratch(t_.width * columns.count * int64_t(sizeof(float)))
          : Scratch();
      float* sums_of_task = is_first && is_last
          ? local.data<float>()
          : sums_.data<float>() + (t * width_ + columns.begin) * t_.width;
      const Sums sums{sums_of_task, t_.width, !is_first};
      products_->add_to_w(t, columns, count, sums);
      if (is_last) {
        store(sums, t, columns, factor, dw);
      }
    });
  }

  // Writes `factor` times the sums to some columns of the rows of dW that belong to tile t.
  void store(const Sums& sums, int64_t t, const Span& columns, float factor, Tensor& dw) const {
    constexpr int64_t kStrip = 16;
    alignas(64) float transposed[kStrip * kMaxChunk];
    const int64_t valid = t_.valid(t);
    for (int64_t j = 0; j < valid; j += kStrip) {
      const int64_t rows = std::min(kStrip, valid - j);
      transpose(sums.data + j, sums.ld, transposed, kMaxChunk, columns.count, rows);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = (t * t_.width + j + r) * width_ + columns.begin;
        store_scaled(transposed + r * kMaxChunk, columns.count, factor, dw, at);
      }
    }
  }

  const Tiling t_;
  const int64_t width_; // D
  const bool wanted_x_, wanted_w_;
  Scratch values_; // of the super-block: [models][tiles][rows][width]
  std::optional<GradientProducts<Engine>> products_;
  Scratch sums_; // the transpose of dW while it is summed: [tiles][D][width]
};

} // namespace mulki
