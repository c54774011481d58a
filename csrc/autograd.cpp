// Gradients of the reduced forms of the operators, which have computed them already: their last
// results are the gradients of their first arguments. The backward pass multiplies them by the
// upstream gradient of the loss. If that is 1 and the graph goes with this backward pass, they are
// handed over as they are. mulki/ops/autograd.py does the same for all devices; here a small call
// does not pay for Python.
//
// A gradient has no gradient of its own: with a graph of the backward pass it goes through
// mulki::scaled, which refuses one.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/mul.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include <vector>

namespace mulki {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Whether nothing will use the graph after this backward pass, and nothing watches it.
bool may_give_away(const Tensor& grad) {
  return !at::GradMode::is_enabled() && !torch::autograd::get_current_graph_task_keep_graph() &&
      c10::impl::TorchDispatchModeTLS::stack_len() == 0 && grad.device().is_cpu() &&
      grad.item<double>() == 1;
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
      // Inference tensors, which cannot be saved, require no gradient.
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

} // namespace

TORCH_LIBRARY_IMPL(mulki_cpp, AutogradCPU, m) {
  for (const char* op :
       {"prototype_cross_entropy_reduced", "teacher_kl_reduced", "contrastive_reduced",
        "siglip_reduced", "pair_kl_reduced"}) {
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&reduced>());
  }
}

} // namespace mulki
