// The products dX = G W and dW^T = X^T G (gradients.h). The transpose of dW is computed, so that G
// need not be transposed.
//
// float: G is multiplied where it is, in tiles [rows][width], and W too, or block by block where it
// is converted from half precision. bfloat16: each task rounds the part of G that it multiplies; W
// is packed once. X^T is packed for each super-block.
#pragma once

#include "common/parallel.h"
#include "common/scratch.h"
#include "core/tiling.h"
#include "matmul/brgemm.h"

namespace mulki {

constexpr int64_t kTaskRows = 64; // of dX that a task computes, at most
constexpr int64_t kMaxChunk = 512; // columns of dX or dW that a task computes, at most

struct Span { // of rows or columns
  int64_t begin, count;
};

template <typename Engine>
class GradientProducts {
  using E = typename Engine::Element;
  using Operand = typename Engine::Operand;

 public:
  // `g` are the tiles of G of a super-block, [tiles][rows][width].
  GradientProducts(
      const Tiling& tiling,
      const Operand& x,
      const Operand& w,
      bool wanted_x,
      bool wanted_w,
      float* g)
      : t_(tiling), x_(x), w_(w), wanted_w_(wanted_w), g_(g) {
    if (kIsBFloat16<E> && wanted_x) {
      pack_w();
    }
    if (wanted_w) {
      transposed_x_ = Scratch(x.padded * t_.rows * int64_t(sizeof(E)));
    }
  }

  // G of the super-block is complete, which has `count` rows from row `first` of X on.
  void complete(int64_t first, int64_t count) {
    if (!wanted_w_) {
      return;
    }
    pack_x(first, count);
    for (int64_t t = 0; t < t_.tiles; ++t) {
      std::fill(g(t, count), g(t, padded(count)), 0.0f);
    }
  }

  // Writes or adds G W of tile t, for rows of the super-block and columns of W.
  void add_to_x(Span rows, Span columns, int64_t t, const Sums& out) const {
    const int64_t valid = t_.valid(t);
    if constexpr (kIsBFloat16<E>) {
      alignas(64) E left[kTaskRows * kTileWidth];
      at::vec::convert<float, E>(g(t, rows.begin), left, rows.count * t_.width);
      const E* right = w_pairs_.data<E>() + (t * t_.width / 2 * w_.width + columns.begin) * 2;
      product(rows.count, columns.count, (valid + 1) / 2 * 2, left, t_.width, right, w_.width, out);
    } else {
      const Scratch buffer(w_.in_place() ? 0 : valid * columns.count * int64_t(sizeof(E)));
      const Part<E> right =
          w_.read(t * t_.width, valid, columns.begin, columns.count, buffer.data<E>());
      product(
          rows.count, columns.count, valid, g(t, rows.begin), t_.width, right.data, right.stride,
          out);
    }
  }

  // Writes or adds the transpose of G^T X, for the columns of G in tile t, columns of X and the
  // `count` rows of the super-block.
  void add_to_w(int64_t t, Span columns, int64_t count, const Sums& out) const {
    const int64_t depth = padded(count);
    const E* left = transposed_x_.data<E>() + columns.begin * t_.rows;
    if constexpr (kIsBFloat16<E>) {
      const Scratch pairs(depth * t_.width * int64_t(sizeof(E)));
      E rows[2 * kTileWidth];
      for (int64_t i = 0; i < depth; i += 2) {
        at::vec::convert<float, E>(g(t, i), rows, 2 * t_.width);
        interleave(rows, rows + t_.width, t_.width, pairs.data<E>() + i * t_.width);
      }
      product(columns.count, t_.width, depth, left, t_.rows, pairs.data<E>(), t_.width, out);
    } else {
      product(columns.count, t_.width, depth, left, t_.rows, g(t, 0), t_.width, out);
    }
  }

 private:
  // The rows of G and of X that are multiplied for dW. torch caches a compiled product for each
  // depth. To keep them few, the last super-block is padded with zeros.
  static int64_t padded(int64_t count) {
    return (count + 15) / 16 * 16;
  }
  float* g(int64_t t, int64_t i) const {
    return g_ + (t * t_.rows + i) * t_.width;
  }

  void pack_w() {
    const int64_t pairs = (w_.count + 1) / 2, row = w_.width * 2;
    w_pairs_ = Scratch(pairs * row * int64_t(sizeof(E)));
    at::parallel_for(0, pairs, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const auto w_row = [&](int64_t j) -> const E* {
          return j < w_.count ? w_.read(j, 1, 0, w_.width, nullptr).data : nullptr;
        };
        interleave(w_row(2 * i), w_row(2 * i + 1), w_.width, w_pairs_.data<E>() + i * row);
      }
    });
  }

  void pack_x(int64_t first, int64_t count) {
    constexpr int64_t kStrip = 32; // columns of X
    static_assert(kMaxRows <= kMaxTransposeRows);
    at::parallel_for(0, (x_.padded + kStrip - 1) / kStrip, 4, [&](int64_t begin, int64_t end) {
      for (int64_t from = begin * kStrip; from < std::min(end * kStrip, x_.padded);
           from += kStrip) {
        const int64_t columns = std::min(kStrip, x_.padded - from);
        E* to = transposed_x_.data<E>() + from * t_.rows;
        // All rows at once, or for FloatMatrix as many as its conversion buffer holds.
        constexpr int64_t kPart = kIsBFloat16<E> ? kMaxRows : 64;
        alignas(64) E buffer[kIsBFloat16<E> ? 1 : kPart * kStrip];
        for (int64_t r = 0; r < count; r += kPart) {
          const int64_t rows = std::min(kPart, count - r);
          const Part<E> part = x_.read(first + r, rows, from, columns, buffer);
          transpose(part.data, part.stride, to + r, t_.rows, rows, columns);
        }
        for (int64_t i = 0; i < columns; ++i) {
          std::fill(to + i * t_.rows + count, to + i * t_.rows + padded(count), E(0));
        }
      }
    });
  }

  const Tiling& t_;
  const Operand &x_, &w_;
  const bool wanted_w_;
  float* const g_;
  Scratch w_pairs_; // bfloat16: W in pairs of rows
  Scratch transposed_x_; // [D, rows]
};

} // namespace mulki
