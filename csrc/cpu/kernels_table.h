// The kernels of one instruction set. kernels_*.cpp define AT_FUSED_VECTOR_BYTES and include this.
//
// Results have the same bits for any number of threads, because the value of a position does not
// depend on the bounds of its task: a partial vector does the arithmetic of a full one.
#pragma once

#include "kernels_loss.h"
#include "kernels_map.h"
#include "kernels_max.h"
#include "kernels_sweep.h"

namespace at_fused {
namespace {

void attention_map(const Feature& feature, int64_t b, int64_t begin, int64_t end, double p,
                   double scale, void* map, int32_t* channels) {
  with_dtype(feature.dtype, [&](auto element, auto accumulator) {
    using T = decltype(element);
    using A = decltype(accumulator);
    const bool planar = feature.layout == Layout::planar;
    const int64_t C = feature.C, stride = feature.line_stride, n = end - begin;
    const T* x = static_cast<const T*>(sample_of(feature, b)) + begin * (planar ? 1 : stride);
    A* out = static_cast<A*>(map) + begin;
    with_exponent(p, [&](auto exponent) {
      if (channels) {
        max_map(feature, x, n, exponent, out, channels + begin);
      } else if (planar) {
        attention_map_planar<T, A>(x, C, stride, n, exponent, A(scale), out);
      } else {
        attention_map_interleaved<T, A>(x, C, stride, n, exponent, A(scale), out);
      }
    });
  });
}

void sweep(const Sweep& sweep) {
  with_dtype(sweep.feature.dtype, [&](auto element, auto accumulator) {
    using T = decltype(element);
    using A = decltype(accumulator);
    with_exponent(sweep.p, [&](auto exponent) {
      if (sweep.channels) {
        sweep_maxima<T, A>(sweep, exponent);
      } else if (sweep.addend) {
        sweep_lines<true, T, A>(sweep, exponent);
      } else {
        sweep_lines<false, T, A>(sweep, exponent);
      }
    });
  });
  if (sweep.stream) streaming_fence();
}

constexpr Kernels kernel_table(const char* name) {
  return {name, attention_map, sample_loss, sweep};
}

}  // namespace
}  // namespace at_fused

#if defined(__clang__) && AT_FUSED_VECTOR_BYTES > 16
#pragma clang attribute pop
#endif
