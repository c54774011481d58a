// Gradients as in mulki/ops/autograd.py, which serves all devices; here a small call does not pay
// for Python.
//
// The reduced forms have computed them already: their last results are the gradients of their first
// arguments. The backward pass multiplies them by the upstream gradient of the loss. If that is 1
// and the graph goes with this backward pass, they are handed over as they are. similarity calls
// its backward operator.
//
// A gradient has no gradient of its own: with a graph of the backward pass it goes through
// mulki::scaled and mulki::similarity_backward, which refuse one.
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/mul.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include <array>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace mulki {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Whether this backward pass has no graph of its own, and neither a mode nor a transform sees it. A
// batch of upstream gradients is a transform.
bool is_plain_backward(const Tensor& grad) {
  return !at::GradMode::is_enabled() && !at::isTensorSubclassLike(grad);
}

// Whether the stored gradients are the result, and nothing will use the graph after this pass.
bool may_give_away(const Tensor& grad) {
  return is_plain_backward(grad) && !torch::autograd::get_current_graph_task_keep_graph() &&
      grad.device().is_cpu() && grad.item<double>() == 1;
}

Tensor scaled(const Tensor& grad, const Tensor& stored, const Tensor& leaf) {
  if (!at::GradMode::is_enabled()) {
    return at::mul(stored, grad);
  }
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mulki::scaled", "")
                             .typed<Tensor(const Tensor&, const Tensor&, const Tensor&)>();
  return op.call(grad, stored, leaf);
}

struct Reduced : torch::autograd::Function<Reduced> {
  // Compiled autograd may trace `backward`: under its modes nothing is read on the host.
  static constexpr bool is_traceable = true;

  // Calls the kernel with the arguments on the stack, and leaves its results there.
  static Tensor forward(
      AutogradContext* context,
      at::TensorList leaves,
      const c10::OperatorHandle& op,
      c10::DispatchKeySet keys,
      torch::jit::Stack* stack) {
    op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
    variable_list saved;
    for (const Tensor& leaf : leaves) {
      // Inference tensors cannot be saved. One that requires grad is an error of torch.
      saved.push_back(leaf.requires_grad() ? leaf : Tensor());
    }
    for (const c10::IValue& gradient : torch::jit::last(*stack, leaves.size())) {
      saved.push_back(gradient.toTensor());
    }
    context->save_for_backward(std::move(saved));
    context->set_materialize_grads(false);
    return torch::jit::peek(*stack, 0, op.schema().returns().size()).toTensor();
  }

  static variable_list backward(AutogradContext* context, const variable_list& upstream) {
    const variable_list saved = context->get_saved_variables();
    const size_t count = saved.size() / 2;
    variable_list result(count + 3); // the other arguments of forward have none
    if (upstream[0].defined()) {
      const bool as_they_are = may_give_away(upstream[0]);
      for (size_t i = 0; i < count; ++i) {
        const Tensor &leaf = saved[i], &stored = saved[count + i];
        if (context->needs_input_grad(i)) {
          // Autograd would take an empty one for the zero gradient of a number.
          TORCH_CHECK(
              stored.sym_sizes() == leaf.sym_sizes(), "wanted[", i,
              "]: got False, wanted True as the argument requires grad");
          // Autograd converts it to the dtype of the leaf.
          result[i] = as_they_are ? stored : scaled(upstream[0], stored, leaf);
        }
      }
    }
    return result;
  }
};

// The last argument of a reduced form says of each leaf whether its gradient is wanted.
void reduced(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const size_t arguments = op.schema().arguments().size();
  const size_t count = stack->back().toBoolList().size();
  std::vector<Tensor> leaves;
  bool any = false;
  for (size_t i = 0; i < count; ++i) {
    leaves.push_back(torch::jit::peek(*stack, i, arguments).toTensor());
    any = any || leaves.back().requires_grad();
  }
  if (!any || !at::GradMode::is_enabled()) {
    at::AutoDispatchBelowADInplaceOrView below;
    op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
    return;
  }
  // A list of another kind would not be searched for leaves.
  Tensor loss = Reduced::apply(at::TensorList(leaves), op, keys, stack);
  torch::jit::peek(*stack, 0, op.schema().returns().size()) = std::move(loss);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

Gradients similarity_gradients(
    const Tensor& grad,
    const Tensor& features,
    const Tensor& prototypes,
    const Tensor& scale,
    bool normalize,
    std::array<bool, 3> wanted) {
  static const auto find = [](const char* name) {
    return c10::Dispatcher::singleton()
        .findSchemaOrThrow(name, "")
        .typed<decltype(similarity_gradients)>();
  };
  static const auto kernel = find("mulki_cpp::similarity_backward");
  static const auto watched = find("mulki::similarity_backward");
  return (is_plain_backward(grad) ? kernel : watched)
      .call(grad, features, prototypes, scale, normalize, wanted);
}

struct Similarity : torch::autograd::Function<Similarity> {
  static constexpr bool is_traceable = true;

  static Tensor forward(
      AutogradContext* context,
      const Tensor& features,
      const Tensor& prototypes,
      const Tensor& scale,
      bool normalize) {
    context->saved_data["normalize"] = normalize;
    // Inference tensors, as frozen prototypes may be, cannot be saved, only kept.
    variable_list saved{features, prototypes, scale};
    for (size_t i = 0; i < saved.size(); ++i) {
      if (saved[i].is_inference()) {
        context->saved_data[std::to_string(i)] = std::exchange(saved[i], Tensor());
      }
    }
    context->save_for_backward(std::move(saved));
    context->set_materialize_grads(false);
    return below(features, prototypes, scale, normalize);
  }

  static variable_list backward(AutogradContext* context, const variable_list& upstream) {
    if (!upstream[0].defined()) {
      return variable_list(4);
    }
    variable_list saved = context->get_saved_variables();
    std::array<bool, 3> wanted;
    for (size_t i = 0; i < saved.size(); ++i) {
      wanted[i] = context->needs_input_grad(i);
      if (!saved[i].defined()) {
        saved[i] = context->saved_data[std::to_string(i)].toTensor();
      }
    }
    auto [dx, dw, dscale] = similarity_gradients(
        upstream[0], saved[0], saved[1], saved[2], context->saved_data["normalize"].toBool(),
        wanted);
    const auto if_wanted = [&](size_t i, Tensor gradient) {
      return wanted[i] ? gradient : Tensor();
    };
    return {if_wanted(0, dx), if_wanted(1, dw), if_wanted(2, dscale), Tensor()};
  }

  static Tensor below(
      const Tensor& features, const Tensor& prototypes, const Tensor& scale, bool normalize) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("mulki_cpp::similarity", "")
                               .typed<decltype(below)>();
    at::AutoDispatchBelowADInplaceOrView guard;
    return op.call(features, prototypes, scale, normalize);
  }
};

Tensor similarity(
    const Tensor& features, const Tensor& prototypes, const Tensor& scale, bool normalize) {
  const bool differentiable = at::GradMode::is_enabled() &&
      (features.requires_grad() || prototypes.requires_grad() || scale.requires_grad());
  return differentiable ? Similarity::apply(features, prototypes, scale, normalize)
                        : Similarity::below(features, prototypes, scale, normalize);
}

} // namespace

TORCH_LIBRARY_IMPL(mulki_cpp, AutogradCPU, m) {
  m.impl("similarity", &similarity);
  for (const char* op :
       {"prototype_cross_entropy_reduced", "teacher_kl_reduced", "contrastive_reduced",
        "siglip_reduced", "pair_kl_reduced"}) {
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&reduced>());
  }
}

} // namespace mulki
