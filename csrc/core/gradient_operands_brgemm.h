// G, W and X as operands of brgemm, for dX = G W and dW^T = X^T G (gradients.h). The transpose of
// dW is computed, so that G need not be transposed.
//
// float: G is multiplied where it is, in tiles [rows][width], and W too, or block by block where it
// is converted from half precision. bfloat16: G is rounded as soon as rows of it are complete, to a
// matrix beyond those of the models: as left operand in its first half, as right operand in the
// second. X^T is packed for each super-block.
#pragma once

#include "core/gradient_operands.h"

namespace mulki {

template <typename E>
class GradientOperands<Brgemm<E>> {
 public:
  static constexpr bool kTransposed = true;
  static constexpr int64_t kTaskRows = 64;

  static int64_t matrices(int64_t models) {
    return models + (kIsBFloat16<E> ? 1 : 0);
  }

  GradientOperands(const SuperBlock& block, const GradientProblem<Brgemm<E>>& problem)
      : block_(block), p_(problem), t_(p_.tiling) {
    if constexpr (kIsBFloat16<E>) {
      g_rows_ = block.operands<E>(p_.models);
      g_pairs_ = g_rows_ + t_.tiles * t_.rows * t_.width;
      if (p_.wanted_x) {
        pack_w();
      }
    }
    if (p_.wanted_w) {
      transposed_x_ = Scratch(p_.x.padded * t_.rows * int64_t(sizeof(E)));
    }
  }

  int64_t tiles_per_run() const {
    return 1;
  }

  void commit(int64_t /*start*/, int64_t t, int64_t first, int64_t count) {
    if constexpr (kIsBFloat16<E>) {
      E row[2][Brgemm<E>::kWidth];
      for (int64_t i = first; i < first + count; i += 2) {
        const bool second = i + 1 < first + count;
        for (int64_t r = 0; r < (second ? 2 : 1); ++r) {
          at::vec::convert<float, E>(block_.values(0, t, i + r), row[r], t_.width);
          if (p_.wanted_x) {
            std::memcpy(g_rows_ + cell(t, i + r), row[r], sizeof(E) * t_.width);
          }
        }
        if (p_.wanted_w) {
          interleave(row[0], second ? row[1] : nullptr, t_.width, g_pairs_ + cell(t, i));
        }
      }
    }
  }

  void complete(int64_t first, int64_t count) {
    if (p_.wanted_w) {
      pad_g(count);
      pack_x(first, count);
    }
  }

  void add_to_x(Span rows, Span columns, Span run, const Sums& out) const {
    const int64_t t = run.begin, valid = t_.valid(t);
    if constexpr (kIsBFloat16<E>) {
      const int64_t width = p_.w.width;
      const E* right = w_pairs_.data<E>() + (t * t_.width / 2 * width + columns.begin) * 2;
      product(
          rows.count, columns.count, (valid + 1) / 2 * 2, g_rows_ + cell(t, rows.begin), t_.width,
          right, width, out);
    } else {
      alignas(64) E buffer[Brgemm<E>::kWidth * kMaxChunk];
      const Part<E> right = p_.w.read(t * t_.width, valid, columns.begin, columns.count, buffer);
      product(
          rows.count, columns.count, valid, block_.values(0, t, rows.begin), t_.width, right.data,
          right.stride, out);
    }
  }

  void add_to_w(int64_t t, Span columns, int64_t count, const Sums& out) const {
    const E* left = transposed_x_.data<E>() + columns.begin * t_.rows;
    product(columns.count, t_.width, padded(count), left, t_.rows, right_g(t), t_.width, out);
  }

 private:
  // The rows of G and of X that are multiplied for dW. torch caches a compiled product for each
  // depth. To keep them few, the last super-block is padded with zeros.
  static int64_t padded(int64_t count) {
    return (count + 15) / 16 * 16;
  }
  int64_t cell(int64_t t, int64_t i) const {
    return (t * t_.rows + i) * t_.width;
  }
  // Of one tile, as right operand.
  E* right_g(int64_t t) const {
    if constexpr (kIsBFloat16<E>) {
      return g_pairs_ + cell(t, 0);
    } else {
      return block_.values(0, t, 0);
    }
  }

  void pack_w() {
    const auto& w = p_.w;
    const int64_t pairs = (w.count + 1) / 2, row = w.width * 2;
    w_pairs_ = Scratch(pairs * row * int64_t(sizeof(E)));
    at::parallel_for(0, pairs, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const auto w_row = [&](int64_t j) { return j < w.count ? w.row(j) : nullptr; };
        interleave(w_row(2 * i), w_row(2 * i + 1), w.width, w_pairs_.data<E>() + i * row);
      }
    });
  }

  // `commit` has written the pairs of an odd last row.
  void pad_g(int64_t count) {
    const int64_t written = kIsBFloat16<E> ? (count + 1) / 2 * 2 : count;
    for (int64_t t = 0; t < t_.tiles; ++t) {
      std::fill(right_g(t) + written * t_.width, right_g(t) + padded(count) * t_.width, E(0));
    }
  }

  void pack_x(int64_t first, int64_t count) {
    const auto& x = p_.x;
    static_assert(Brgemm<E>::kMaxRows <= kMaxTransposeRows);
    const int64_t strips = (x.padded + 31) / 32;
    at::parallel_for(0, strips, 4, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        const int64_t from = s * 32, columns = std::min<int64_t>(32, x.padded - from);
        E* to = transposed_x_.data<E>() + from * t_.rows;
        // All rows at once, or for FloatMatrix as many as its conversion buffer holds.
        constexpr int64_t kPart = kIsBFloat16<E> ? Brgemm<E>::kMaxRows : 64;
        alignas(64) E buffer[kIsBFloat16<E> ? 1 : kPart * 32];
        for (int64_t r = 0; r < count; r += kPart) {
          const int64_t rows = std::min(kPart, count - r);
          const Part<E> part = x.read(first + r, rows, from, columns, buffer);
          transpose(part.data, part.stride, to + r, t_.rows, rows, columns);
        }
        for (int64_t i = 0; i < columns; ++i) {
          std::fill(to + i * t_.rows + count, to + i * t_.rows + padded(count), E(0));
        }
      }
    });
  }

  const SuperBlock& block_;
  const GradientProblem<Brgemm<E>> p_;
  const Tiling& t_;
  E *g_rows_ = nullptr, *g_pairs_ = nullptr; // bfloat16: G as left operand and as right operand
  Scratch w_pairs_; // bfloat16: W as right operand
  Scratch transposed_x_; // [D, rows]
};

} // namespace mulki
