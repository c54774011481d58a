// The ways in which products are computed. An engine has
//
//   Element                        of the operands of its products, float or bfloat16
//   Operand                        how the operands lie in memory, see product.h
//   kMostRows, kMatrices, kWidth   sizes of a super-block and of a tile that suit it, see Tiling
//   kScratch, kPacksAlone          bytes, and whether a thread may pack panels for itself, see Logits
//   kUnit                          of which rows of a super-block and columns of a tile are multiples
//   Scope                          what a thread holds while it multiplies
//   left_bytes, pack_left          rows of X, the left operand of Y = X W^T, where they are packed
//   right_bytes, pack_right        W^T of one tile of columns, the right operand
//   multiply                       a block of Y in one tile
//
// and a class Gradients<Engine> for the products with G.
#pragma once

#include "digits.h"
#include "product.h"

#include <ATen/Context.h>

#include <atomic>
#include <cstdlib>
#include <exception>
#include <string>
#include <vector>

namespace mulki {

// at::native::cpublas::brgemm: on any CPU, in bfloat16 where brgemm takes it.
template <typename T>
struct Brgemm {
  using Element = T;
  using Operand = std::conditional_t<kHalf<T>, Rows<T>, FloatRows>;

  static constexpr int64_t kUnit = 32;
#if defined(CPU_CAPABILITY_AVX2)
  // CPUs without AVX-512 mostly have 256 or 512 KiB of cache to a core, where a wider tile of W^T leaves
  // too little for X.
  static constexpr int64_t kWidth = 64;
#else
  static constexpr int64_t kWidth = 128;
#endif
  static constexpr int64_t kMostRows = 512;
  static constexpr bool kPacksAlone = true;
  static constexpr int64_t kMatrices = int64_t(16) << 20;
  // The prototypes of two teachers at 4096 x 4096 x 512 fit, beside halves that become floats.
  static constexpr int64_t kScratch = int64_t(38656) << 10;

  // Gives the matrix unit's state back when a thread leaves a parallel region.
  struct Scope {
    ~Scope() {
      if (kHalf<T>) {
        at::native::cpublas::brgemm_release(true);
      }
    }
  };

  // Floats are read where they are.
  static int64_t left_bytes(const Operand& x, int64_t rows) {
    return in_place(x) ? 0 : right_bytes(rows, x.padded);
  }
  static void pack_left(const Operand& x, int64_t first, int64_t rows, void* out) {
    x.read(first, rows, 0, x.padded, static_cast<T*>(out));
  }

  static int64_t right_bytes(int64_t width, int64_t depth) {
    return width * depth * int64_t(sizeof(T));
  }
  // [depth, width] (halves: VNNI), with zeros beyond the last row of W.
  static void pack_right(const Operand& w, int64_t first, int64_t width, void* out) {
    const int64_t rows = std::min(width, w.count - first);
    if (rows < width) {
      std::memset(out, 0, size_t(right_bytes(width, w.padded)));
    }
    // A pair of neighbours in a row of W is a VNNI pair of W^T: transpose pairs as four bytes.
    using Unit = std::conditional_t<kHalf<T>, uint32_t, float>;
    constexpr int64_t kColumns = 64, kToUnit = int64_t(sizeof(Unit) / sizeof(T));
    alignas(64) T buffer[kColumns * kWidth];
    for (int64_t c = 0; c < w.padded; c += kColumns) {
      const int64_t columns = std::min(kColumns, w.padded - c);
      const Part<T> part = w.read(first, rows, c, columns, buffer);
      transpose(
          reinterpret_cast<const Unit*>(part.data), part.stride / kToUnit,
          static_cast<Unit*>(out) + c / kToUnit * width, width, rows, columns / kToUnit);
    }
  }

  // out [rows, width]: rows of X from `first` on, of which `begin` rows of the packed ones precede.
  // The columns of W^T from `valid` on are padding; the result has zeros there, or NaN where X is not finite.
  // `next` is the right operand that is likely to come next, or null.
  static void multiply(
      const Operand& x,
      int64_t first,
      int64_t rows,
      const void* left,
      int64_t begin,
      const void* right,
      int64_t valid,
      int64_t width,
      const void* /*next*/,
      float* out) {
    const T* a = in_place(x) ? x.read(first, rows, 0, x.padded, nullptr).data
                             : static_cast<const T*>(left) + begin * x.padded;
    const T* b = static_cast<const T*>(right);
    // In one sum over all of a depth of 512 the roundings of floats weigh twice as much as in two.
    constexpr int64_t kDepth = 256;
    const int64_t columns = (valid + 15) / 16 * 16;
    int64_t d = 0;
    do {
      const int64_t depth = kHalf<T> ? x.padded : std::min(kDepth, x.padded - d);
      product(rows, columns, depth, a + d, x.padded, b + d * width, width, out, width, d > 0);
      d += depth;
    } while (d < x.padded);
    for (int64_t i = 0; i < rows && columns < width; ++i) {
      std::fill(out + i * width + columns, out + (i + 1) * width, 0.0f);
    }
  }

 private:
  static bool in_place(const Operand& x) {
    if constexpr (kHalf<T>) {
      return true;
    } else {
      return x.in_place();
    }
  }
};

#if defined(MULKI_AMX)
// Fetches the right operand of the next tile into a core's own cache while this one is multiplied, a piece
// before every 32 x 32 of the products, so that the first 256 rows of a tile fetch all of it.
class Ahead {
 public:
  Ahead(const void* next, int64_t bytes, int64_t begin, int64_t rows, int64_t width) {
    const int64_t strips = amx::blocks(width), done = begin / amx::kEdge * strips;
    const int64_t pieces = kRows / amx::kEdge * strips;
    piece_ = (bytes / pieces + kLine - 1) / kLine * kLine;
    left_ =
        next == nullptr ? 0 : std::clamp<int64_t>(bytes - done * piece_, 0, rows * width * piece_);
    at_ = static_cast<const char*>(next) + done * piece_;
  }
  void some() {
    for (const int64_t end = std::max<int64_t>(left_ - piece_, 0); left_ > end; left_ -= kLine) {
      _mm_prefetch(at_, _MM_HINT_T1);
      at_ += kLine;
    }
  }

 private:
  static constexpr int64_t kRows = 256, kLine = 64;
  int64_t piece_, left_;
  const char* at_;
};

// Calls multiply(a, b, c) for every 32 x 32 block c of a tile of `width` columns, with strips a and b of
// `strip` bytes: those of the left operand from row `begin` on, and all of the right one.
template <typename F>
inline void blocks_of_tile(
    const void* left,
    int64_t begin,
    int64_t rows,
    const void* right,
    int64_t width,
    int64_t strip,
    const void* next,
    float* out,
    const F& multiply) {
  const char* a = static_cast<const char*>(left) + begin / amx::kEdge * strip;
  Ahead ahead(next, amx::blocks(width) * strip, begin, rows, width);
  for (int64_t i = 0; i < rows; i += amx::kEdge, a += strip) {
    const char* b = static_cast<const char*>(right);
    for (int64_t j = 0; j < width; j += amx::kEdge, b += strip) {
      ahead.some();
      multiply(a, b, out + i * width + j);
    }
  }
}

// The matrix unit, for bfloat16.
struct AmxHalves {
  using Element = at::BFloat16;
  using Operand = Rows<Element>;
  using Scope = amx::Scope;

  static constexpr int64_t kMostRows = 256;
  static constexpr bool kPacksAlone = false; // not measured
  static constexpr int64_t kMatrices = int64_t(16) << 20;
  static constexpr int64_t kScratch = int64_t(30) << 20;
  static constexpr int64_t kUnit = amx::kEdge, kWidth = 128;

  static int64_t strip(int64_t depth) { // elements of 32 rows or columns
    return amx::blocks(depth) * amx::kBlock;
  }
  static int64_t left_bytes(const Operand& x, int64_t rows) {
    return right_bytes(rows, x.padded);
  }
  static int64_t right_bytes(int64_t width, int64_t depth) {
    return amx::blocks(width) * strip(depth) * 2;
  }

  // At most 32 rows.
  static void pack_left(const Operand& x, int64_t first, int64_t rows, void* out) {
    auto* to = static_cast<uint16_t*>(out);
    for (int64_t d = 0; d < x.width; d += amx::kEdge, to += amx::kBlock) {
      amx::pack_left(x.row(first) + d, x.padded, rows, x.width - d, to);
    }
  }
  static void pack_right(const Operand& w, int64_t first, int64_t width, void* out) {
    auto* to = static_cast<uint16_t*>(out);
    for (int64_t j = 0; j < width; j += amx::kEdge) {
      const int64_t rows = w.count - first - j;
      for (int64_t d = 0; d < w.width; d += amx::kEdge, to += amx::kBlock) {
        amx::pack_right(
            amx::Form::kRightTurned, w.data + (first + j) * w.padded + d, w.padded, rows,
            w.width - d, to);
      }
    }
  }

  // Writes whole blocks of 32 rows.
  static void multiply(
      const Operand& x,
      int64_t /*first*/,
      int64_t rows,
      const void* left,
      int64_t begin,
      const void* right,
      int64_t /*valid*/,
      int64_t width,
      const void* next,
      float* out) {
    const int64_t steps = amx::blocks(x.width);
    blocks_of_tile(
        left, begin, rows, right, width, right_bytes(amx::kEdge, x.width), next, out,
        [&](const char* a, const char* b, float* c) {
          amx::multiply(
              {reinterpret_cast<const uint16_t*>(a)}, {reinterpret_cast<const uint16_t*>(b)}, 1,
              steps, c, width, false);
        });
  }
};

// The matrix unit, for floats as digits.
struct AmxFloats {
  using Element = float;
  using Operand = Rows<Element>;
  using Scope = amx::Scope;

  static constexpr int64_t kMostRows = 256;
  static constexpr bool kPacksAlone = false; // not measured
  static constexpr int64_t kMatrices = int64_t(16) << 20;
  static constexpr int64_t kScratch = int64_t(46) << 20;
  static constexpr int64_t kUnit = digits::kDepth, kWidth = 128;

  static int64_t left_bytes(const Operand& x, int64_t rows) {
    return right_bytes(rows, x.padded);
  }
  static int64_t right_bytes(int64_t width, int64_t depth) {
    return amx::blocks(width) * digits::strip_bytes(depth);
  }

  // At most 32 rows.
  static void pack_left(const Operand& x, int64_t first, int64_t rows, void* out) {
    digits::strip_of_rows(false, x.row(first), x.padded, rows, x.width, out);
  }
  static void pack_right(const Operand& w, int64_t first, int64_t width, void* out) {
    auto* to = static_cast<uint8_t*>(out);
    for (int64_t j = first; j < first + width; j += digits::kLines) {
      digits::strip_of_rows(true, w.row(j), w.padded, w.count - j, w.width, to);
      to += digits::strip_bytes(w.width);
    }
  }

  // Writes whole blocks of 32 rows.
  static void multiply(
      const Operand& x,
      int64_t /*first*/,
      int64_t rows,
      const void* left,
      int64_t begin,
      const void* right,
      int64_t /*valid*/,
      int64_t width,
      const void* next,
      float* out) {
    const int64_t steps = digits::blocks(x.width);
    blocks_of_tile(
        left, begin, rows, right, width, right_bytes(amx::kEdge, x.width), next, out,
        [&](const char* a, const char* b, float* c) {
          digits::multiply(a, b, 0, steps, c, width, false, digits::fine_logits(a, b, x.width));
        });
  }
};
#endif

// How many threads a loop that starts here may have.
inline int64_t threads_here() {
  return at::in_parallel_region() ? 1 : at::get_num_threads();
}

// Calls run(i) for all tasks. A thread takes the tasks of its own range, the same one in every loop of as
// many tasks, so that it finds what it wrote in its cache, and then what other threads have left.
template <typename Scope, typename F>
inline void parallel_in(int64_t tasks, const F& run) {
  const int64_t threads = std::min(threads_here(), tasks);
  if (threads <= 1) {
    [[maybe_unused]] const Scope scope;
    for (int64_t i = 0; i < tasks; ++i) {
      run(i);
    }
    return;
  }
  struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Range> ranges(threads);
  for (int64_t t = 0; t < threads; ++t) {
    ranges[t].next = t * tasks / threads;
    ranges[t].end = (t + 1) * tasks / threads;
  }
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    [[maybe_unused]] const Scope scope;
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t other = 0; other < threads; ++other) {
        Range& range = ranges[(t + other) % threads];
        for (int64_t i; (i = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end;) {
          run(i);
        }
      }
    }
  });
}

template <typename Engine, typename F>
inline void parallel_tasks(int64_t tasks, const F& run) {
  parallel_in<typename Engine::Scope>(tasks, run);
}

// Without products.
struct NoScope {};
template <typename F>
inline void parallel_each(int64_t tasks, const F& run) {
  parallel_in<NoScope>(tasks, run);
}

// MULKI_CPU_PRODUCTS: amx, brgemm or nothing.
inline const std::string& products_asked_for() {
  static const std::string asked = [] {
    const char* value = std::getenv("MULKI_CPU_PRODUCTS");
    return std::string(value == nullptr ? "" : value);
  }();
  TORCH_CHECK_VALUE(
      asked.empty() || asked == "amx" || asked == "brgemm", "MULKI_CPU_PRODUCTS: got ", asked,
      ", wanted amx or brgemm; unset it to leave the choice to mulki");
  return asked;
}

// Whether products may run on the matrix unit: where there is one, unless brgemm is asked for. Where
// amx is, it has to be there.
inline bool on_matrix_unit() {
  const std::string& asked = products_asked_for();
#if defined(MULKI_AMX)
  const bool there = asked != "brgemm" && amx::available();
#else
  const bool there = false;
#endif
  TORCH_CHECK_VALUE(
      there || asked != "amx",
      "MULKI_CPU_PRODUCTS: got amx, wanted brgemm, for this CPU, system or "
      "build is without AMX; unset it to leave the choice to mulki");
  return there;
}

// Whether brgemm multiplies bfloat16. `could_pack` would name CPUs with AMX alone, but those with AVX512-BF16
// do as well, at twice the rate of floats. On others, and where ONEDNN_MAX_CPU_ISA leaves neither, brgemm
// throws, so it is asked for a small product. Without oneDNN, which can be switched off and on, it throws too.
inline bool brgemm_takes_halves() {
  if (!at::globalContext().userEnabledMkldnn()) {
    return false;
  }
  static const bool answer = [] {
    constexpr int64_t kSize = 32;
    std::vector<at::BFloat16> left(kSize * kSize, 1.0f), right(kSize * kSize);
    std::vector<float> sums(kSize * kSize);
    // In pairs of rows: row i is i + 1 in column i % 4 and zero elsewhere.
    for (int64_t i = 0; i < kSize; ++i) {
      right[(i / 2 * kSize + i % 4) * 2 + i % 2] = float(i + 1);
    }
    try {
      product(
          kSize, kSize, kSize, left.data(), kSize, right.data(), kSize, sums.data(), kSize, false);
      at::native::cpublas::brgemm_release(true);
    } catch (const std::exception&) {
      return false;
    }
    for (int64_t i = 0; i < kSize * kSize; ++i) {
      const int64_t column = i % kSize;
      // Eight rows, column + 1, column + 5, ...
      if (sums[i] != (column < 4 ? float(8 * (column + 1) + 4 * 28) : 0.0f)) {
        return false;
      }
    }
    return true;
  }();
  return answer;
}

// Calls run(engine) with the engine for operands of `dtype`, the least deep of which have `depth` columns.
// Halves are multiplied as bfloat16 where the CPU does that, else as floats, into which they convert
// without loss. float16 always is: only CPUs with AMX-FP16 multiply it, and none was at hand to test on.
template <typename F>
auto with_engine(at::ScalarType dtype, [[maybe_unused]] int64_t depth, const F& run) {
  [[maybe_unused]] const bool unit = on_matrix_unit();
#if defined(MULKI_AMX)
  // With few columns digits are mostly padding, and their errors do not average out.
  if (unit && dtype == at::kBFloat16) {
    return run(AmxHalves{});
  }
  if (unit && (depth >= digits::kDepth || products_asked_for() == "amx")) {
    return run(AmxFloats{});
  }
#endif
  if (dtype == at::kBFloat16 && brgemm_takes_halves()) {
    return run(Brgemm<at::BFloat16>{});
  }
  return run(Brgemm<float>{});
}

} // namespace mulki
