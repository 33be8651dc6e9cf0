// Operators as torch calls them.
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>
#include <type_traits>
#include <utility>

namespace at_fused {

// A string argument, whose handle is ours. torch's own conversion, before 2.14, leaks a copy of it
// in every call.
inline std::string taken(StringHandle handle) {
  size_t length = 0;
  const char* data = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
  std::string text(data, length);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return text;
}

template <class T>
T taken(T& value) {
  return std::move(value);
}

template <class T>
using Given = std::conditional_t<std::is_same_v<T, std::string>, StringHandle, T>;

template <auto function>
struct Operator;

template <class Result, class... Arguments, Result (*function)(Arguments...)>
struct Operator<function> {
  static Result call(Given<Arguments>... given) { return function(taken(given)...); }
};

}  // namespace at_fused

#define AT_FUSED_BOX(function) TORCH_BOX(&at_fused::Operator<&at_fused::function>::call)
