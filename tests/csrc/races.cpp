// Calls every operator of csrc/ on four threads for ThreadSanitizer, which makes the exit status 66
// if two threads access the same memory without order. `races deliberate` has such a race.
//
// The build (sanitize) has at::parallel_for on std::thread (threads.h) and writes the operators'
// schemas to schemas.h. An argument gets its value by its name.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <vector>

extern "C" {
void __tsan_read_range(void* address, unsigned long size);
void __tsan_write_range(void* address, unsigned long size);
}

namespace {

template <typename T>
__attribute__((no_sanitize("thread"))) void multiply_row(
    int64_t n, int64_t k, int64_t ld_b, const T* a, const T* b, float* c, bool add, bool vnni) {
  for (int64_t j = 0; j < n; ++j) {
    float sum = add ? c[j] : 0;
    for (int64_t d = 0; d < k; ++d) {
      sum += float(a[d]) * float(vnni ? b[(d / 2 * ld_b + j) * 2 + d % 2] : b[d * ld_b + j]);
    }
    c[j] = sum;
  }
}

// The products of libtorch are compiled without ThreadSanitizer; these tell it what they access.
template <typename T>
void visible_product(
    int64_t m,
    int64_t n,
    int64_t k,
    int64_t ld_a,
    int64_t ld_b,
    int64_t ld_c,
    bool add,
    const T* a,
    const T* b,
    float* c,
    bool vnni) {
  const int64_t pair = vnni ? 2 : 1;
  for (int64_t d = 0; d < k / pair; ++d) {
    __tsan_read_range(const_cast<T*>(b + d * ld_b * pair), n * pair * sizeof(T));
  }
  for (int64_t i = 0; i < m; ++i) {
    __tsan_read_range(const_cast<T*>(a + i * ld_a), k * sizeof(T));
    __tsan_write_range(c + i * ld_c, n * sizeof(float));
    multiply_row(n, k, ld_b, a + i * ld_a, b, c + i * ld_c, add, vnni);
  }
}

} // namespace

// The dynamic linker takes these before those of libtorch.
namespace at::native::cpublas {

void brgemm(
    int64_t m,
    int64_t n,
    int64_t k,
    int64_t ld_a,
    int64_t ld_b,
    int64_t ld_c,
    const bool add,
    const float* a,
    const float* b,
    float* c,
    bool vnni) {
  ::visible_product(m, n, k, ld_a, ld_b, ld_c, add, a, b, c, vnni);
}

void brgemm(
    int64_t m,
    int64_t n,
    int64_t k,
    int64_t ld_a,
    int64_t ld_b,
    int64_t ld_c,
    const bool add,
    const at::BFloat16* a,
    const at::BFloat16* b,
    float* c,
    bool vnni) {
  ::visible_product(m, n, k, ld_a, ld_b, ld_c, add, a, b, c, vnni);
}

} // namespace at::native::cpublas

namespace {

constexpr int kThreads = 4;

struct Shape {
  int64_t n, p, d;
};

std::map<std::string, c10::IValue> values(Shape shape, at::ScalarType dtype) {
  const auto [n, p, d] = shape;
  const auto rows = [&](int64_t count, int64_t width) {
    const at::Tensor x = at::randn({count, width});
    return (x / x.norm(2, {1}, true)).to(dtype);
  };
  const at::Tensor x = rows(n, d), w = rows(p, d), scale = at::scalar_tensor(20.0f);
  const at::Tensor target = at::arange(n, at::kLong).remainder(p);
  c10::List<at::Tensor> teacher_x({rows(n, d), rows(n, d + 3)});
  c10::List<at::Tensor> teacher_w({rows(p, d), rows(p, d + 3)});
  return {
      {"features", x},
      {"image_features", x},
      {"prototypes", w},
      {"text_features", w},
      {"scale", scale},
      {"logit_scale", scale},
      {"logit_bias", at::scalar_tensor(-3.0f)},
      {"teacher_features", teacher_x},
      {"teacher_image_features", teacher_x},
      {"teacher_prototypes", teacher_w},
      {"teacher_text_features", teacher_w},
      {"teacher_scales", c10::List<at::Tensor>({scale, scale})},
      {"target", target},
      {"class_mask", at::ones({p}, at::kBool)},
      {"label_smoothing", 0.2},
      {"ignore_index", int64_t(-100)},
      {"offset", int64_t(0)},
      {"temperature", 2.0},
      {"gate_temperature", 1.5},
      {"gate_entropy", 0.5},
      {"gate_label", 0.5},
      {"scale_by_t2", true},
      {"weight", 0.5},
      {"label_weight", 2.0},
  };
}

// Calls for the loss, its mean and the gradients of that, or for gradients from those of rows.
std::vector<at::Tensor> call(
    const c10::OperatorHandle& op,
    std::map<std::string, c10::IValue> given,
    Shape shape,
    bool gradients_alone) {
  const std::string name = op.schema().name();
  given["weights"] = c10::IValue(); // so that the gate computes them
  given["reduction"] = gradients_alone ? "none" : "mean";
  given["grad"] = c10::IValue();
  if (gradients_alone) {
    given["grad"] = at::ones({shape.n});
  }
  torch::jit::Stack stack;
  for (const c10::Argument& argument : op.schema().arguments()) {
    if (argument.name() == "wanted") {
      c10::List<bool> wanted;
      for (int32_t i = 0; i < argument.N().value(); ++i) {
        wanted.push_back(true);
      }
      stack.emplace_back(wanted);
    } else {
      TORCH_CHECK(given.count(argument.name()), name, ": no value for ", argument.name());
      stack.push_back(given[argument.name()]);
    }
  }
  op.callBoxed(stack);
  std::vector<at::Tensor> results;
  for (const c10::IValue& result : stack) {
    results.push_back(result.toTensor());
  }
  return results;
}

void check_operator(const char* name, Shape shape, at::ScalarType dtype) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
  const auto given = values(shape, dtype);
  for (const bool gradients_alone : {false, true}) {
    at::set_num_threads(1);
    const std::vector<at::Tensor> alone = call(op, given, shape, gradients_alone);
    at::set_num_threads(kThreads);
    const std::vector<at::Tensor> together = call(op, given, shape, gradients_alone);
    for (size_t i = 0; i < alone.size(); ++i) {
      TORCH_CHECK(
          at::equal(alone[i], together[i]), name, " ", dtype, ": result ", i, " of ", kThreads,
          " threads differs from that of one");
    }
  }
}

const char* const kNames[] = {
#define OPERATOR(name, schema) "mulki_cpp::" name,
#include "schemas.h"
#undef OPERATOR
};

} // namespace

TORCH_LIBRARY(mulki_cpp, m) {
#define OPERATOR(name, schema) m.def(name schema);
#include "schemas.h"
#undef OPERATOR
}

int main(int count, char** arguments) {
  at::set_num_threads(kThreads);
  TORCH_CHECK(at::get_num_threads() == kThreads);
  if (count > 1 && std::strcmp(arguments[1], "deliberate") == 0) {
    int64_t sum = 0;
    at::parallel_for(0, 100, 1, [&](int64_t begin, int64_t end) { sum += end - begin; });
    std::printf("%lld of 100\n", static_cast<long long>(sum));
    return 0;
  }
  // One super-block or several, one tile or several, one chunk of columns or two, all with padding.
  const Shape shapes[] = {{37, 37, 24}, {150, 150, 70}, {530, 530, 33}, {70, 70, 300}};
  for (const Shape shape : shapes) {
    for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
      for (const char* name : kNames) {
        check_operator(name, shape, dtype);
      }
    }
  }
  std::printf("%zu operators on %d threads\n", std::size(kNames), kThreads);
  return 0;
}
