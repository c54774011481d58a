// Gradients as in mulki/ops/autograd.py, which serves all devices; here a small call does not pay
// for Python.
//
// Beside a sum or a mean an operator returns the gradients of its first arguments. The backward pass
// multiplies them by the upstream gradient of the loss. If that is 1 and nothing needs the graph
// after this backward pass, they are handed over as they are. For a loss per row the operator is
// called again.
//
// A gradient has no gradient of its own: with a graph of the backward pass it goes through
// mulki::scaled and the operators of mulki, which refuse one.
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/add.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include <string>
#include <utility>
#include <vector>

namespace mulki {
namespace {

using at::Tensor;
using c10::IValue;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using torch::jit::Stack;

constexpr size_t kAsked = 3; // the last arguments: grad, reduction, wanted

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

// Zero, which depends on all leaves, for a backward pass with a graph: so a second derivative by any
// of them is refused, and is not zero.
Tensor tie_of(at::ArrayRef<Tensor> leaves) {
  if (!at::GradMode::is_enabled()) {
    return Tensor();
  }
  Tensor tie = at::zeros({});
  for (const Tensor& leaf : leaves) {
    if (leaf.defined()) {
      tie = at::add(tie, leaf.unsqueeze(0).narrow(0, 0, 0).sum().to(at::kFloat));
    }
  }
  return tie;
}

Tensor scaled(const Tensor& grad, const Tensor& stored, const Tensor& leaf, const Tensor& tie) {
  if (!tie.defined()) {
    return at::mul(stored, grad);
  }
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("mulki::scaled", "")
          .typed<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&)>();
  return op.call(grad, stored, leaf, tie);
}

// The arguments of a call, kept until its backward pass: tensors as autograd saves them, so that
// one that is overwritten meanwhile is noticed.
class Arguments {
 public:
  explicit Arguments(AutogradContext* context) : context_(context) {}

  void keep(at::ArrayRef<IValue> values, variable_list& saved) {
    c10::impl::GenericList rest(c10::AnyType::get());
    const auto keep_tensor = [&](const Tensor& t) {
      // Inference tensors, as frozen prototypes may be, cannot be saved, but a copy can.
      saved.push_back(t.is_inference() ? t.clone() : t);
    };
    for (const IValue& value : values) {
      if (value.isTensor()) {
        keep_tensor(value.toTensor());
        rest.push_back(true);
      } else if (value.isTensorList()) {
        for (const Tensor& t : value.toTensorVector()) {
          keep_tensor(t);
        }
        rest.push_back(int64_t(value.toListRef().size()));
      } else {
        rest.push_back(value);
      }
    }
    context_->saved_data["arguments"] = rest;
  }

  // Pushes the arguments; their tensors begin at place `at` of what was saved.
  void push(const c10::FunctionSchema& schema, const variable_list& saved, size_t at, Stack& to) {
    const c10::List<IValue> rest = context_->saved_data["arguments"].toList();
    for (size_t i = 0; i < rest.size(); ++i) {
      const IValue value = rest.get(i);
      const c10::TypePtr& type = schema.arguments()[i].type();
      if (type->isSubtypeOf(*c10::ListType::ofTensors())) {
        std::vector<Tensor> tensors;
        for (int64_t k = 0; k < value.toInt(); ++k) {
          tensors.push_back(saved[at++]);
        }
        to.emplace_back(std::move(tensors));
      } else if (c10::TensorType::get()->isSubtypeOf(*type) && !value.isNone()) {
        to.emplace_back(saved[at++]);
      } else {
        to.push_back(value);
      }
    }
  }

 private:
  AutogradContext* context_;
};

// The rule of the gradients of all operators, see the head of this file.
struct Rule : torch::autograd::Function<Rule> {
  // Compiled autograd may trace `backward`: under its modes nothing is read on the host.
  static constexpr bool is_traceable = true;

  // Calls the kernel with the arguments on the stack, and leaves its results there.
  static Tensor forward(
      AutogradContext* context,
      at::TensorList leaves,
      const c10::OperatorHandle& op,
      c10::DispatchKeySet keys,
      Stack* stack) {
    const auto& schema = op.schema();
    const std::string reduction = torch::jit::peek(*stack, 1, kAsked).toStringRef();
    const size_t count = schema.arguments().size() - kAsked;
    const auto all = torch::jit::last(*stack, count + kAsked);
    const std::vector<IValue> arguments(all.begin(), all.begin() + count);
    op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
    Tensor loss = torch::jit::peek(*stack, 0, schema.returns().size()).toTensor();

    variable_list saved;
    for (const Tensor& leaf : leaves) {
      // An inference tensor that requires grad is an error of torch.
      saved.push_back(leaf.requires_grad() ? leaf : Tensor());
    }
    for (const IValue& gradient : torch::jit::last(*stack, leaves.size())) {
      saved.push_back(gradient.toTensor());
    }
    if (reduction == "none") {
      Arguments(context).keep(arguments, saved);
    }
    context->saved_data["op"] = schema.name().substr(schema.name().find("::"));
    context->saved_data["reduction"] = reduction;
    context->saved_data["leaves"] = int64_t(leaves.size());
    context->save_for_backward(std::move(saved));
    context->set_materialize_grads(false);
    return loss;
  }

  static variable_list backward(AutogradContext* context, const variable_list& upstream) {
    const variable_list saved = context->get_saved_variables();
    const size_t count = context->saved_data["leaves"].toInt();
    variable_list result(count + 3); // the other arguments of forward have none
    const Tensor& grad = upstream[0];
    if (!grad.defined()) {
      return result;
    }
    if (context->saved_data["reduction"].toStringRef() == "none") {
      call_again(context, saved, grad, result);
      return result;
    }
    const bool as_they_are = may_give_away(grad);
    const Tensor tie = tie_of(at::ArrayRef<Tensor>(saved).slice(0, count));
    for (size_t i = 0; i < count; ++i) {
      if (context->needs_input_grad(i)) {
        const Tensor &leaf = saved[i], &stored = saved[count + i];
        // Autograd would take an empty one for the zero gradient of a number.
        TORCH_CHECK(
            stored.sym_sizes() == leaf.sym_sizes(), "wanted[", i,
            "]: got False, wanted True as the argument requires grad; where torch.export or "
            "make_fx recorded the call, record it again with inputs that require grad");
        // Autograd converts it to the dtype of the leaf.
        result[i] = as_they_are ? stored : scaled(grad, stored, leaf, tie);
      }
    }
    return result;
  }

 private:
  static void call_again(
      AutogradContext* context,
      const variable_list& saved,
      const Tensor& grad,
      variable_list& result) {
    const size_t count = result.size() - 3;
    const char* space = is_plain_backward(grad) ? "mulki_cpp" : "mulki";
    const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(
        (space + context->saved_data["op"].toStringRef()).c_str(), "");
    Stack stack;
    Arguments(context).push(op.schema(), saved, 2 * count, stack);
    c10::List<bool> wanted;
    for (size_t i = 0; i < count; ++i) {
      wanted.push_back(context->needs_input_grad(i));
    }
    stack.insert(stack.end(), {grad, context->saved_data["reduction"], wanted});
    op.callBoxed(stack);
    for (size_t i = 0; i < count; ++i) {
      if (wanted[i]) {
        result[i] = stack[stack.size() - count + i].toTensor();
      }
    }
  }
};

// The last argument of an operator says of each leaf whether its gradient is wanted.
void differentiable(
    const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const size_t arguments = op.schema().arguments().size();
  const size_t count = stack->back().toBoolList().size();
  std::vector<Tensor> leaves;
  bool any = false;
  for (size_t i = 0; i < count; ++i) {
    leaves.push_back(torch::jit::peek(*stack, i, arguments).toTensor());
    any = any || leaves.back().requires_grad();
  }
  // A call with an upstream gradient computes gradients, which have none of their own.
  const bool is_gradient = !torch::jit::peek(*stack, arguments - kAsked, arguments).isNone();
  if (!any || is_gradient || !at::GradMode::is_enabled()) {
    at::AutoDispatchBelowADInplaceOrView below;
    op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
    return;
  }
  // A list of another kind would not be searched for leaves.
  Tensor loss = Rule::apply(at::TensorList(leaves), op, keys, stack);
  torch::jit::peek(*stack, 0, op.schema().returns().size()) = std::move(loss);
}

} // namespace

TORCH_LIBRARY_IMPL(mulki_cpp, AutogradCPU, m) {
  for (const char* op :
       {"prototype_cross_entropy", "teacher_kl", "contrastive", "siglip", "pair_kl"}) {
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&differentiable>());
  }
}

} // namespace mulki
