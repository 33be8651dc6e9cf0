// The tap's backward: a sweep that is added to another gradient.
#pragma once

#include "kernels_max.h"

namespace at_fused {
namespace {

void attention_tap_backward(const Feature& feature, const Feature& add, int64_t b, int64_t begin,
                            int64_t end, double p, double gradient, const void* k,
                            const int32_t* channels, const Feature& out, bool stream) {
  with_dtype(feature.dtype, [&](auto element, auto accumulator) {
    using T = decltype(element);
    using A = decltype(accumulator);
    const T* addend = static_cast<const T*>(add.data) + b * add.batch;
    const A* map = static_cast<const A*>(k);
    with_few_exponents<A>(p, [&](auto exponent) {
      if (channels) {
        max_tap_backward(feature, out, static_cast<const T*>(feature.data) + b * feature.batch,
                         static_cast<T*>(const_cast<void*>(out.data)) + b * out.batch, begin, end,
                         exponent, A(gradient), map, channels, Addend<T>{addend, add.line});
      } else {
        backward_lines<T, A>(feature, out, b, begin, end, exponent, A(gradient), map, stream,
                             Addend<T>{addend + begin * add.line, add.line});
      }
    });
  });
  if (stream) streaming_fence();
}

}  // namespace
}  // namespace at_fused
