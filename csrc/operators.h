// Registers torch.ops.at_fused.* for all devices. The schemas are in at_fused/_ops/.
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>
#include <type_traits>
#include <utility>

#include "losses.h"
#include "maps.h"

namespace at_fused {

// torch passes a string as a handle that the callee owns. Before torch 2.14 its own conversion
// leaks a copy of the string in every call.
inline std::string unboxed(StringHandle handle) {
  size_t length = 0;
  const char* data = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
  std::string text(data, length);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return text;
}
template <class T>
T unboxed(T& value) {
  return std::move(value);
}

template <auto function>
struct Operator;

template <class Result, class... Arguments, Result (*function)(Arguments...)>
struct Operator<function> {
  template <class T>
  using Boxed = std::conditional_t<std::is_same_v<T, std::string>, StringHandle, T>;

  static Result call(Boxed<Arguments>... arguments) { return function(unboxed(arguments)...); }
};

inline void register_operators(torch::stable::detail::StableLibrary& library) {
#define AT_FUSED_REGISTER(name) library.impl(#name, TORCH_BOX(&Operator<&name>::call))
  AT_FUSED_REGISTER(at_loss);
  AT_FUSED_REGISTER(at_value_and_grad);
  AT_FUSED_REGISTER(map_loss);
  AT_FUSED_REGISTER(attention_map);
  AT_FUSED_REGISTER(attention_map_backward);
  AT_FUSED_REGISTER(attention_tap_backward);
  AT_FUSED_REGISTER(attention_tap_backward_);
#undef AT_FUSED_REGISTER
}

}  // namespace at_fused
