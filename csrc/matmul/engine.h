// Engines compute the products Y = X W^T: Brgemm on any CPU, AmxBFloat16 and AmxFloat on Intel's
// matrix unit (AMX). with_engine chooses one. An engine has
//
//   Element                        type of the elements that it multiplies: float or bfloat16
//   Operand                        type of the matrices X and W (operands.h)
//   kMaxRows, kMatrices, kWidth    limits for a super-block and a tile (Tiling)
//   kUnit                          rows of a super-block and columns of a tile are multiples of it
//   kScratch, kOneTaskPerTile      bytes of packed operands; whether tasks may pack panels (Logits)
//   Scope                          object that a thread holds while it multiplies
//   left_bytes, pack_left          size and packing of rows of X, the left operand
//   right_bytes, pack_right        size and packing of W^T in one tile, the right operand
//   multiply                       writes a block of Y in one tile
//
// and a class Gradients<Engine> for the products with G (gradients.h).
#pragma once

#include "matmul/digits.h"
#include "matmul/operands.h"

#include <ATen/Context.h>

#include <atomic>
#include <cstdlib>
#include <exception>
#include <string>
#include <vector>

namespace mulki {

// at::native::cpublas::brgemm, for any CPU; in bfloat16 only if brgemm_has_bfloat16.
template <typename T>
struct Brgemm {
  using Element = T;
  using Operand = std::conditional_t<kIsBFloat16<T>, Matrix<T>, FloatMatrix>;

  static constexpr int64_t kUnit = 32;
#if defined(CPU_CAPABILITY_AVX2)
  // Most CPUs without AVX-512 have 256 or 512 KiB of L2 cache per core. A wider tile of W^T would
  // leave too little of it for X.
  static constexpr int64_t kWidth = 64;
#else
  static constexpr int64_t kWidth = 128;
#endif
  static constexpr int64_t kMaxRows = 512;
  static constexpr bool kOneTaskPerTile = true;
  static constexpr int64_t kMatrices = int64_t(16) << 20;
  // Enough for the prototypes of two teachers at 4096 x 4096 x 512, with half precision read as
  // float.
  static constexpr int64_t kScratch = int64_t(38656) << 10;

  // Releases the state of the matrix unit when a thread leaves a parallel region.
  struct Scope {
    ~Scope() {
      if (kIsBFloat16<T>) {
        at::native::cpublas::brgemm_release(true);
      }
    }
  };

  // Floats need no packing.
  static int64_t left_bytes(const Operand& x, int64_t rows) {
    return in_place(x) ? 0 : right_bytes(rows, x.padded);
  }
  static void pack_left(const Operand& x, int64_t first, int64_t rows, void* out) {
    x.read(first, rows, 0, x.padded, static_cast<T*>(out));
  }

  static int64_t right_bytes(int64_t width, int64_t depth) {
    return width * depth * int64_t(sizeof(T));
  }
  // Packs [depth, width], for bfloat16 in VNNI layout, with zeros beyond the last row of W.
  static void pack_right(const Operand& w, int64_t first, int64_t width, void* out) {
    const int64_t rows = std::min(width, w.count - first);
    if (rows < width) {
      std::memset(out, 0, size_t(right_bytes(width, w.padded)));
    }
    // Two neighbours in a row of W are a VNNI pair of W^T, so pairs are transposed as four bytes.
    using Unit = std::conditional_t<kIsBFloat16<T>, uint32_t, float>;
    constexpr int64_t kColumns = 64, kToUnit = int64_t(sizeof(Unit) / sizeof(T));
    alignas(64) T buffer[kColumns * kWidth];
    for (int64_t c = 0; c < w.padded; c += kColumns) {
      const int64_t columns = std::min(kColumns, w.padded - c);
      const MatrixView<T> part = w.read(first, rows, c, columns, buffer);
      transpose(
          reinterpret_cast<const Unit*>(part.data), part.stride / kToUnit,
          static_cast<Unit*>(out) + c / kToUnit * width, width, rows, columns / kToUnit);
    }
  }

  // Writes out [rows, width] for the rows of X from `first` on, which are the packed rows from
  // `begin` on. The columns of W^T from `valid` on are padding. The result there is 0, or NaN if X
  // is not finite. `next` is the right operand that is likely to be used next, or null.
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
    // One sum over a depth of 512 has twice the rounding error of two sums over 256.
    constexpr int64_t kDepth = 256;
    const int64_t columns = (valid + 15) / 16 * 16;
    int64_t d = 0;
    do {
      const int64_t depth = kIsBFloat16<T> ? x.padded : std::min(kDepth, x.padded - d);
      product(rows, columns, depth, a + d, x.padded, b + d * width, width, out, width, d > 0);
      d += depth;
    } while (d < x.padded);
    for (int64_t i = 0; i < rows && columns < width; ++i) {
      std::fill(out + i * width + columns, out + (i + 1) * width, 0.0f);
    }
  }

 private:
  static bool in_place(const Operand& x) {
    if constexpr (kIsBFloat16<T>) {
      return true;
    } else {
      return x.in_place();
    }
  }
};

#if defined(MULKI_AMX)
// Prefetches the right operand of the next tile into the L2 cache while this tile is multiplied:
// one piece before each 32 x 32 block of products, and all of it during the first 256 rows of the
// tile.
class Prefetcher {
 public:
  Prefetcher(const void* next, int64_t bytes, int64_t begin, int64_t rows, int64_t width) {
    const int64_t strips = amx::blocks(width), done = begin / amx::kEdge * strips;
    const int64_t pieces = kRows / amx::kEdge * strips;
    piece_ = (bytes / pieces + kLine - 1) / kLine * kLine;
    bytes_left_ =
        next == nullptr ? 0 : std::clamp<int64_t>(bytes - done * piece_, 0, rows * width * piece_);
    address_ = static_cast<const char*>(next) + done * piece_;
  }
  void fetch_piece() {
    for (const int64_t end = std::max<int64_t>(bytes_left_ - piece_, 0); bytes_left_ > end;
         bytes_left_ -= kLine) {
      _mm_prefetch(address_, _MM_HINT_T1);
      address_ += kLine;
    }
  }

 private:
  static constexpr int64_t kRows = 256, kLine = 64;
  int64_t piece_, bytes_left_;
  const char* address_;
};

// Calls multiply(a, b, c) for each 32 x 32 block c of a tile of `width` columns. a and b are the
// packed strips of `strip_bytes` bytes: of the left operand from row `begin` on, and of the right
// operand.
template <typename F>
inline void each_block_of_tile(
    const void* left,
    int64_t begin,
    int64_t rows,
    const void* right,
    int64_t width,
    int64_t strip_bytes,
    const void* next,
    float* out,
    const F& multiply) {
  const char* a = static_cast<const char*>(left) + begin / amx::kEdge * strip_bytes;
  Prefetcher prefetcher(next, amx::blocks(width) * strip_bytes, begin, rows, width);
  for (int64_t i = 0; i < rows; i += amx::kEdge, a += strip_bytes) {
    const char* b = static_cast<const char*>(right);
    for (int64_t j = 0; j < width; j += amx::kEdge, b += strip_bytes) {
      prefetcher.fetch_piece();
      multiply(a, b, out + i * width + j);
    }
  }
}

// bfloat16 on the matrix unit (amx.h).
struct AmxBFloat16 {
  using Element = at::BFloat16;
  using Operand = Matrix<Element>;
  using Scope = amx::Scope;

  static constexpr int64_t kMaxRows = 256;
  static constexpr bool kOneTaskPerTile = false; // not measured
  static constexpr int64_t kMatrices = int64_t(16) << 20;
  static constexpr int64_t kScratch = int64_t(30) << 20;
  static constexpr int64_t kUnit = amx::kEdge, kWidth = 128;

  static int64_t strip_elements(int64_t depth) { // of 32 rows or columns
    return amx::blocks(depth) * amx::kBlock;
  }
  static int64_t left_bytes(const Operand& x, int64_t rows) {
    return right_bytes(rows, x.padded);
  }
  static int64_t right_bytes(int64_t width, int64_t depth) {
    return amx::blocks(width) * strip_elements(depth) * 2;
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
            amx::Layout::kRightTransposed, w.data + (first + j) * w.padded + d, w.padded, rows,
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
    each_block_of_tile(
        left, begin, rows, right, width, right_bytes(amx::kEdge, x.width), next, out,
        [&](const char* a, const char* b, float* c) {
          amx::multiply(
              {reinterpret_cast<const uint16_t*>(a)}, {reinterpret_cast<const uint16_t*>(b)}, 1,
              steps, c, width, false);
        });
  }
};

// float on the matrix unit, as digits (digits.h).
struct AmxFloat {
  using Element = float;
  using Operand = Matrix<Element>;
  using Scope = amx::Scope;

  static constexpr int64_t kMaxRows = 256;
  static constexpr bool kOneTaskPerTile = false; // not measured
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
    digits::pack_strip_of_rows(false, x.row(first), x.padded, rows, x.width, out);
  }
  static void pack_right(const Operand& w, int64_t first, int64_t width, void* out) {
    auto* to = static_cast<uint8_t*>(out);
    for (int64_t j = first; j < first + width; j += digits::kLines) {
      digits::pack_strip_of_rows(true, w.row(j), w.padded, w.count - j, w.width, to);
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
    each_block_of_tile(
        left, begin, rows, right, width, right_bytes(amx::kEdge, x.width), next, out,
        [&](const char* a, const char* b, float* c) {
          digits::multiply(
              a, b, 0, steps, c, width, false, digits::logits_need_eight_products(a, b, x.width));
        });
  }
};
#endif

// The number of threads that a parallel loop may use here.
inline int64_t threads_here() {
  return at::in_parallel_region() ? 1 : at::get_num_threads();
}

// Calls run(i) for each task. Each thread has a range of tasks, which is the same in all loops with
// the same number of tasks, so that the thread finds in its cache what it wrote before. A thread
// that has completed its range takes remaining tasks from the ranges of the other threads.
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
      for (int64_t step = 0; step < threads; ++step) {
        Range& range = ranges[(t + step) % threads];
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

// For tasks that multiply nothing.
struct NoScope {};
template <typename F>
inline void parallel_each(int64_t tasks, const F& run) {
  parallel_in<NoScope>(tasks, run);
}

// The value of MULKI_CPU_PRODUCTS: amx, brgemm or empty.
inline const std::string& requested_engine() {
  static const std::string requested = [] {
    const char* value = std::getenv("MULKI_CPU_PRODUCTS");
    return std::string(value == nullptr ? "" : value);
  }();
  TORCH_CHECK_VALUE(
      requested.empty() || requested == "amx" || requested == "brgemm", "MULKI_CPU_PRODUCTS: got ",
      requested, ", wanted amx or brgemm; unset it to leave the choice to mulki");
  return requested;
}

// Whether to use the matrix unit: if there is one and brgemm is not requested. It is an error to
// request amx if there is none.
inline bool may_use_amx() {
  const std::string& requested = requested_engine();
#if defined(MULKI_AMX)
  const bool usable = requested != "brgemm" && amx::available();
#else
  const bool usable = false;
#endif
  TORCH_CHECK_VALUE(
      usable || requested != "amx",
      "MULKI_CPU_PRODUCTS: got amx, but this CPU, system or build has no AMX; set it to brgemm, or "
      "unset it");
  return usable;
}

// Whether brgemm multiplies bfloat16. A small product is tried, because brgemm throws if the CPU,
// or ONEDNN_MAX_CPU_ISA, allows neither AMX nor AVX512-BF16, which is twice as fast as float.
// torch's `could_pack` would not do: it knows AMX only. brgemm also throws while oneDNN is switched
// off.
inline bool brgemm_has_bfloat16() {
  if (!at::globalContext().userEnabledMkldnn()) {
    return false;
  }
  static const bool answer = [] {
    constexpr int64_t kSize = 32;
    std::vector<at::BFloat16> left(kSize * kSize, 1.0f), right(kSize * kSize);
    std::vector<float> sums(kSize * kSize);
    // In VNNI layout: row i has i + 1 in column i % 4, and zeros elsewhere.
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
      // The sum over eight rows: (column + 1) + (column + 5) + ...
      if (sums[i] != (column < 4 ? float(8 * (column + 1) + 4 * 28) : 0.0f)) {
        return false;
      }
    }
    return true;
  }();
  return answer;
}

// Calls run(engine) with the engine for matrices of `dtype`, whose smallest width is `depth`.
// bfloat16 is multiplied as such if the CPU can, else as float, to which it converts without loss.
// float16 is always multiplied as float: only CPUs with AMX-FP16 multiply it, and none was
// available for tests.
template <typename F>
auto with_engine(at::ScalarType dtype, [[maybe_unused]] int64_t depth, const F& run) {
  [[maybe_unused]] const bool use_amx = may_use_amx();
#if defined(MULKI_AMX)
  // With few columns most of the digits are padding, and their errors do not average out.
  if (use_amx && dtype == at::kBFloat16) {
    return run(AmxBFloat16{});
  }
  if (use_amx && (depth >= digits::kDepth || requested_engine() == "amx")) {
    return run(AmxFloat{});
  }
#endif
  if (dtype == at::kBFloat16 && brgemm_has_bfloat16()) {
    return run(Brgemm<at::BFloat16>{});
  }
  return run(Brgemm<float>{});
}

} // namespace mulki
