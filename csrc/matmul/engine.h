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
// and a class GradientOperands<Engine> for the products with G (core/gradients.h).
#pragma once

#include "common/parallel.h"
#include "matmul/amx_engines.h"
#include "matmul/brgemm.h"

#include <cstdlib>
#include <string>

namespace mulki {

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
