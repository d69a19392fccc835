// Values on the simulated card: every CUDA operator runs twice. Its own kernel comes first (checks, allocations and
// launches are real, though nothing is computed), then the one for processors on the same memory.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/CPUGeneratorImpl.h>
#include <torch/library.h>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <dlfcn.h>
#include <map>
#include <set>
using c10::DispatchKey;
using c10::IValue;
using torch::jit::Stack;
namespace {
thread_local int inside = 0;
int64_t limit = INT64_MAX;  // operators that touch a tensor of more numbers than this have no values
bool too_large(const IValue& v) {
  if (v.isTensor()) return v.toTensor().defined() && v.toTensor().numel() > limit;
  if (v.isTensorList()) {
    for (const at::Tensor& t : v.toTensorVector())
      if (t.defined() && t.numel() > limit) return true;
  }
  return false;
}
std::map<std::string, c10::SafeKernelFunction>* originals = new std::map<std::string, c10::SafeKernelFunction>;
std::set<std::string>* failed = new std::set<std::string>;
std::string key_of(const c10::OperatorName& n) { return n.name + "." + n.overload_name; }
at::Tensor host_alias(const at::Tensor& t) {
  if (!t.defined() || !t.is_cuda()) return t;
  c10::InferenceMode off(false);
  auto o = at::TensorOptions().dtype(t.dtype()).device(at::kCPU);
  if (t.numel() == 0) return at::empty_strided(t.sizes(), t.strides(), o);
  return at::from_blob(t.mutable_data_ptr(), t.sizes(), t.strides(), o);
}
IValue to_cpu(const IValue& v) {
  if (v.isTensor()) return host_alias(v.toTensor());
  if (v.isTensorList()) {
    c10::List<at::Tensor> l;
    for (const at::Tensor& t : v.toTensorVector()) l.push_back(host_alias(t));
    return l;
  }
  if (v.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> l;
    auto in = v.toOptionalTensorList();
    for (size_t i = 0; i < in.size(); i++) {
      std::optional<at::Tensor> x = in.get(i);
      if (x.has_value())
        l.push_back(std::optional<at::Tensor>(host_alias(*x)));
      else
        l.push_back(std::nullopt);
    }
    return l;
  }
  if (v.isDevice() && v.toDevice().is_cuda()) return c10::Device(at::kCPU);
  if (v.isGenerator()) return IValue();
  return v;
}
at::Device device_of(const std::vector<IValue>& args) {
  for (auto& a : args) {
    if (a.isTensor() && a.toTensor().defined() && a.toTensor().is_cuda()) return a.toTensor().device();
    if (a.isDevice() && a.toDevice().is_cuda()) return a.toDevice();
  }
  return at::Device(at::kCUDA, -1);
}
void put(const at::Tensor& out, const at::Tensor& from) {
  if (!out.defined() || !from.defined() || !out.is_cuda()) return;
  auto a = host_alias(out);
  if (from.numel() && a.data_ptr() == from.data_ptr() && a.strides() == from.strides()) return;
  if (a.sizes() != from.sizes()) {
    failed->insert("sizes differ");
    return;
  }
  c10::impl::ExcludeDispatchKeyGuard g(c10::autograd_dispatch_keyset);
  a.copy_(from);
}
void blank(const at::Tensor& t) {  // what has no value is 0, so that what follows stays finite
  if (!t.defined() || !t.is_cuda() || !t.is_floating_point() || !t.numel()) return;
  if (t.is_non_overlapping_and_dense())
    memset(t.mutable_data_ptr(), 0, t.nbytes());
  else {
    auto a = host_alias(t);
    c10::impl::ExcludeDispatchKeyGuard g(c10::autograd_dispatch_keyset | c10::autocast_dispatch_keyset);
    a.zero_();
  }
}
const std::set<std::string> by_value = {"aten::nonzero",           "aten::masked_select",      "aten::_unique2",
                                        "aten::unique_dim",        "aten::unique_consecutive", "aten::bincount",
                                        "aten::repeat_interleave", "aten::nonzero_static",     "aten::_unique"};
void both(const c10::OperatorHandle& op, c10::DispatchKeySet ks, Stack* stack) {
  auto name = key_of(op.operator_name());
  auto& original = originals->at(name);
  auto n_args = op.schema().arguments().size();
  bool valued = by_value.count(op.operator_name().name) > 0;
  if (inside && !valued) {
    original.callBoxed(op, ks, stack);
    return;
  }
  if (valued) {
    static auto f = (void (*)(const char*))dlsym(RTLD_DEFAULT, "simulated_card_stall");
    if (f) f(name.c_str());
  }
  Stack cpu;
  std::vector<IValue> args(stack->end() - n_args, stack->end());
  if (!valued && limit != INT64_MAX)
    for (auto& a : args)
      if (too_large(a)) {
        inside++;
        try {
          original.callBoxed(op, ks, stack);
        } catch (...) {
          inside--;
          throw;
        }
        inside--;
        auto r = op.schema().returns().size();
        for (size_t i = 0; i < r; i++) {
          auto& v = (*stack)[stack->size() - r + i];
          if (v.isTensor())
            blank(v.toTensor());
          else if (v.isTensorList())
            for (const at::Tensor& t : v.toTensorVector()) blank(t);
        }
        return;
      }
  bool draws = false;
  for (auto t : op.getTags())
    if (t == at::Tag::nondeterministic_seeded) draws = true;
  at::Generator gen;
  for (auto& a : args) {
    if (a.isGenerator()) gen = a.toGenerator();
  }
  for (auto& a : args) cpu.push_back(to_cpu(a));
  // CUDA's softmax takes half precision in and gives float32, and the other way round in its backward pass; that of
  // processors doesn't. What comes out has the dtype that CUDA's kernel made.
  auto& called = op.operator_name().name;
  if ((called == "aten::_softmax" || called == "aten::_log_softmax") && op.operator_name().overload_name.empty() &&
      cpu[2].toBool()) {
    cpu[0] = cpu[0].toTensor().to(at::kFloat);
    cpu[2] = false;
  }
  if (called == "aten::_softmax_backward_data" || called == "aten::_log_softmax_backward_data") {
    cpu[3] = (int64_t)cpu[0].toTensor().scalar_type();
  }
  if (!valued) {
    inside++;
    try {
      original.callBoxed(op, ks, stack);
    } catch (...) {
      inside--;
      throw;
    }
    inside--;
  }
  auto run = [&] {
    c10::impl::ExcludeDispatchKeyGuard g(c10::autograd_dispatch_keyset | c10::autocast_dispatch_keyset);
    op.redispatchBoxed(c10::DispatchKeySet(DispatchKey::CPU), &cpu);
  };
  try {
    if (draws) {
      auto device_gen =
          gen.defined() && gen.device().is_cuda() ? gen : at::globalContext().defaultGenerator(device_of(args));
      at::Generator host = at::detail::getDefaultCPUGenerator();

      auto state = host.get_state();
      host.set_current_seed(device_gen.current_seed() * 1000003 + device_gen.get_offset());
      device_gen.set_offset(device_gen.get_offset() + 4);
      // the kernel's own draw would have advanced it, too: both do here

      try {
        run();
      } catch (...) {
        host.set_state(state);
        throw;
      }

      host.set_state(state);
    } else
      run();
  } catch (const std::exception& e) {
    if (valued) throw;
    if (failed->insert(name).second) fprintf(stderr, "simulated card: %s on the CPU: %.200s\n", name.c_str(), e.what());
    return;
  }
  // values into what CUDA's made
  size_t n = op.schema().returns().size();
  if (valued) {
    stack->erase(stack->end() - n_args, stack->end());
    for (auto& v : cpu) {
      if (v.isTensor() && v.toTensor().defined()) {
        auto f = v.toTensor();
        auto o = at::empty_strided(f.sizes(), f.strides(), f.options().device(device_of(args)));
        put(o, f);
        stack->push_back(o);
      } else
        stack->push_back(v);
    }
    return;
  }
  for (size_t i = 0; i < n && i < cpu.size(); i++) {
    auto& out = (*stack)[stack->size() - n + i];
    auto& v = cpu[cpu.size() - n + i];
    if (out.isTensor()) {
      if (v.isTensor()) put(out.toTensor(), v.toTensor());
    } else if (out.isTensorList()) {
      auto a = out.toTensorVector(), b = v.toTensorVector();
      for (size_t j = 0; j < a.size(); j++) put(a[j], b[j]);
    } else
      out = v;
  }
}
// Fused attention has no CPU kernel: its own kernel's allocations, then the plain formula's values (dropout left out).
IValue named(const c10::OperatorHandle& op, const std::vector<IValue>& args, const char* name) {
  for (size_t i = 0; i < args.size(); i++)
    if (op.schema().arguments()[i].name() == name) return args[i];
  return IValue();
}
void attention(const c10::OperatorHandle& op, c10::DispatchKeySet ks, Stack* stack) {
  auto& original = originals->at(key_of(op.operator_name()));
  auto n = op.schema().arguments().size();
  std::vector<IValue> args(stack->end() - n, stack->end());
  bool skip_values = inside > 0;
  for (auto& a : args)
    if (too_large(a)) skip_values = true;
  inside++;
  try {
    original.callBoxed(op, ks, stack);
  } catch (...) {
    inside--;
    throw;
  }
  inside--;
  auto r = op.schema().returns().size();
  auto result = [&](size_t i) {
    auto& v = (*stack)[stack->size() - r + i];
    return v.isTensor() ? v.toTensor() : at::Tensor();
  };
  if (skip_values) {
    for (size_t i = 0; i < r; i++) blank(result(i));
    return;
  }
  c10::impl::ExcludeDispatchKeyGuard g(c10::autograd_dispatch_keyset | c10::autocast_dispatch_keyset);
  auto f = [](const IValue& v) {
    return v.isTensor() && v.toTensor().defined() ? host_alias(v.toTensor()).to(at::kFloat) : at::Tensor();
  };
  auto q = f(named(op, args, "query")), k = f(named(op, args, "key")), v = f(named(op, args, "value")),
       bias = f(named(op, args, "attn_bias"));
  auto scale_arg = named(op, args, "scale");
  double scale = scale_arg.isNone() ? 1.0 / std::sqrt((double)q.size(-1)) : scale_arg.toDouble();
  auto s = at::matmul(q, k.transpose(-2, -1)) * scale;
  if (bias.defined()) s = s + bias;
  if (named(op, args, "is_causal").toBool())
    s = s.masked_fill(at::ones({s.size(-2), s.size(-1)}, at::kBool).tril().logical_not(), -INFINITY);
  auto p = at::softmax(s, -1);
  auto back = named(op, args, "grad_out");
  if (back.isNone()) back = named(op, args, "grad_out_");
  auto set = [&](size_t i, const at::Tensor& t) {
    auto out = result(i);
    if (out.defined() && out.is_cuda() && out.numel() == t.numel()) put(out, t.to(out.scalar_type()));
  };
  if (back.isNone()) {
    set(0, at::matmul(p, v));
    return;
  }
  auto d = f(back);
  auto dp = at::matmul(d, v.transpose(-2, -1));
  auto ds = p * (dp - (dp * p).sum(-1, true));
  set(0, at::matmul(ds, k) * scale);
  set(1, at::matmul(ds.transpose(-2, -1), q) * scale);
  set(2, at::matmul(p.transpose(-2, -1), d));
  if (r > 3 && bias.defined()) {
    auto out = result(3);
    if (out.defined() && out.numel()) {
      auto db = ds;
      for (int64_t i = 0; i < db.dim(); i++)
        if (i < out.dim() && out.size(i) == 1 && db.size(i) != 1) db = db.sum(i, true);
      set(3, db);
    }
  }
}
const std::set<std::string> fused = {
    "aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_flash_attention_backward",
    "aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_efficient_attention_backward"};
const std::set<std::string> skip = {"aten::as_strided",
                                    "aten::view",
                                    "aten::_reshape_alias",
                                    "aten::unfold",
                                    "aten::record_stream",
                                    "aten::is_pinned",
                                    "aten::_pin_memory",
                                    "aten::is_set_to",
                                    "aten::_local_scalar_dense",
                                    "aten::resize_",
                                    "aten::empty",
                                    "aten::empty_strided",
                                    "aten::set_",
                                    "aten::_efficientzerotensor",
                                    "aten::view_as_real",
                                    "aten::view_as_complex",
                                    "aten::_fused_sdp_choice",
                                    "aten::_scaled_dot_product_fused_attention_overrideable",
                                    "aten::_copy_from",
                                    "aten::_to_copy",
                                    "aten::linear",
                                    "aten::_nested_tensor_from_mask"};
std::vector<std::unique_ptr<torch::Library>>* libs = new std::vector<std::unique_ptr<torch::Library>>;
}  // namespace
struct Silence : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};
static void take_over() {
  Silence silence;
  c10::WarningUtils::WarningHandlerGuard guard(&silence);  // each operator warns that it is registered a second time
  auto& d = c10::Dispatcher::singleton();
  auto lib = std::make_unique<torch::Library>(torch::Library::IMPL, "aten", DispatchKey::CUDA, __FILE__, __LINE__);
  for (auto& name : d.getAllOpNames()) {
    if (name.name.rfind("aten::", 0) != 0 || skip.count(name.name)) continue;
    auto op = d.findSchema(name);
    if (!op) continue;
    if (fused.count(name.name) && name.overload_name.empty() && op->hasKernelForDispatchKey(DispatchKey::CUDA)) {
      originals->emplace(key_of(name), op->getComputedKernelForDispatchKey(DispatchKey::CUDA));
      lib->impl(name.name.c_str(), torch::CppFunction::makeFromBoxedFunction<&attention>());
      continue;
    }
    bool copy = name.name == "aten::copy_";
    if (!copy && !op->hasKernelForDispatchKey(DispatchKey::CUDA)) continue;
    if (!op->hasComputedKernelForDispatchKey(DispatchKey::CPU)) continue;
    originals->emplace(key_of(name), op->getComputedKernelForDispatchKey(DispatchKey::CUDA));
    auto full = name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
    lib->impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&both>());
  }
  libs->push_back(std::move(lib));
}
// `values`: "all", the largest number of elements that a tensor with values has, or null for none. There is no cuDNN in
// any case, as it would need a card.
extern "C" __attribute__((visibility("default"))) void simulated_values_start(const char* values) {
  at::globalContext().setUserEnabledCuDNN(false);
  at::globalContext().setSDPUseCuDNN(false);
  if (!values || !*values) return;
  if (strcmp(values, "all")) limit = strtoll(values, nullptr, 10);
  take_over();
}
