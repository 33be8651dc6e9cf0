// All kernels of one instruction-set level: kernels_*.cpp set AT_FUSED_VECTOR_BYTES and include
// this file, and with it all other kernels_*.h.
//
// A position's value never depends on where a tile begins or ends, so that results are the same
// bits for any number of threads: a partial vector does the arithmetic of a full one.
#pragma once

// Headers first: only code of this file alone may be compiled for the level (see kernels.h).
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "kernels.h"

#if defined(__clang__)
#if AT_FUSED_VECTOR_BYTES == 64
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#elif AT_FUSED_VECTOR_BYTES == 32
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#endif
#elif AT_FUSED_VECTOR_BYTES == 64
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#elif AT_FUSED_VECTOR_BYTES == 32
#pragma GCC target("avx2,fma,f16c")
#endif

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
    const int64_t C = feature.C, line = feature.line, n = end - begin;
    const T* x = static_cast<const T*>(sample_of(feature, b)) + begin * (planar ? 1 : line);
    A* out = static_cast<A*>(map) + begin;
    if (channels) return max_map(feature, x, n, p, out, channels + begin);
    with_exponent<A>(p, [&](auto exponent) {
      if (planar) {
        attention_map_planar<T, A>(x, C, line, n, exponent, A(scale), out);
      } else {
        attention_map_interleaved<T, A>(x, C, line, n, exponent, A(scale), out);
      }
    });
  });
}

void sweep(const Feature& feature, const Feature* add, int64_t b, int64_t begin, int64_t end,
           double p, double gradient, const void* k, const int32_t* channels, const Feature& out,
           bool stream) {
  with_dtype(feature.dtype, [&](auto element, auto accumulator) {
    using T = decltype(element);
    using A = decltype(accumulator);
    const A* map = static_cast<const A*>(k);
    if (channels) {
      return with_few_exponents<A>(p, [&](auto exponent) {
        sweep_maxima<T, A>(feature, add, out, b, begin, end, exponent, A(gradient), map, channels);
      });
    }
    const auto first = [&](const Feature& x) {
      return static_cast<T*>(const_cast<void*>(sample_of(x, b))) + begin * x.line;
    };
    const A* factors = feature.layout == Layout::planar ? map : map + begin;
    const auto sweep_with = [&](auto exponent, auto addend) {
      sweep_lines<T, A>(feature, first(feature), first(out), out.line, end - begin, exponent,
                        A(gradient), factors, stream, addend);
    };
    if (add) {
      with_few_exponents<A>(
          p, [&](auto exponent) { sweep_with(exponent, Addend<T>{first(*add), add->line}); });
    } else {
      with_exponent<A>(p, [&](auto exponent) { sweep_with(exponent, Nothing{}); });
    }
  });
  if (stream) streaming_fence();
}

constexpr Kernels table(const char* name) { return {name, attention_map, sample_loss, sweep}; }

}  // namespace
}  // namespace at_fused

#if defined(__clang__) && AT_FUSED_VECTOR_BYTES > 16
#pragma clang attribute pop
#endif
