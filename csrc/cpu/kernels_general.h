// The entries for what a plain sum of powers is not.
#pragma once

#include "kernels_max.h"
#include "kernels_pool.h"

namespace at_fused {
namespace {

// Any exponent in one, by branches that all lanes go alike: a smaller library than an instance
// each.
template <class A>
struct Branching {
  double p;
  One<A> one;
  Four<A> four;
  AnyExponent<A> any;

  explicit Branching(double p) : p(p), one(p), four(p), any(p) {}
  AT_FUSED_INLINE Vec<A> power(Vec<A> x) const {
    return p == 1 ? one.power(x) : p == 4 ? four.power(x) : any.power(x);
  }
  AT_FUSED_INLINE Vec<A> slope(Vec<A> x) const {
    return p == 1 ? one.slope(x) : p == 4 ? four.slope(x) : any.slope(x);
  }
};

template <class A, class F>
AT_FUSED_INLINE void with_few_exponents(double p, bool absolute, F f) {
  if (!absolute) {
    f(Odd<A>(p));
  } else if (p == 2) {
    f(Two<A>(p));
  } else {
    f(Branching<A>(p));
  }
}

void general_map(const Feature& feature, const GeneralMap& general, int64_t b, int64_t begin,
                 int64_t end, void* map, int32_t* channels, void* scratch) {
  with_dtype(feature.dtype, [&](auto element, auto accumulator) {
    using T = decltype(element);
    using A = decltype(accumulator);
    const bool planar = feature.layout == Layout::planar, pools = general.pool.pools();
    const T* x = static_cast<const T*>(feature.data) + b * feature.batch;
    A* out = static_cast<A*>(map) + begin;
    channels = general.max ? channels + begin : nullptr;
    with_few_exponents<A>(general.p, general.absolute, [&](auto exponent) {
      if (!pools) {
        max_map(feature, x + begin * (planar ? 1 : feature.line), end - begin, out, channels);
      } else if (planar) {
        pooled_map_planar(feature, general, x, begin, end, exponent, out, channels, scratch);
      } else {
        pooled_map_interleaved(feature, general, x, begin, end, exponent, out, channels, scratch);
      }
      if (!general.max) return;
      for_each_vector<A>(end - begin, [&](int64_t i, int count) AT_FUSED_LAMBDA {
        store_up_to(out + i, exponent.power(load_up_to<A>(out + i, count)), count);
      });
    });
  });
}

void general_backward(const Feature& feature, const GeneralMap& general, int64_t b, int64_t begin,
                      int64_t end, double gradient, const void* k, const int32_t* channels,
                      const Feature& out, void* scratch) {
  with_dtype(feature.dtype, [&](auto element, auto accumulator) {
    using T = decltype(element);
    using A = decltype(accumulator);
    const T* x = static_cast<const T*>(feature.data) + b * feature.batch;
    T* to = static_cast<T*>(const_cast<void*>(out.data)) + b * out.batch;
    const A* map = static_cast<const A*>(k);
    with_few_exponents<A>(general.p, general.absolute, [&](auto exponent) {
      if (!general.pool.pools()) {
        max_backward(feature, out, x, to, begin, end, exponent, A(gradient), map, channels);
      } else if (feature.layout == Layout::planar) {
        pooled_backward_planar(feature, out, general, x, to, begin, end, exponent, A(gradient), map,
                               channels, scratch);
      } else {
        pooled_backward_interleaved(feature, out, general, x, to, begin, end, exponent, A(gradient),
                                    map, channels, scratch);
      }
    });
  });
}

void attention_tap_backward(const Feature& feature, const Feature& add, int64_t b, int64_t begin,
                            int64_t end, double p, bool absolute, double gradient, const void* k,
                            const int32_t* channels, const Feature& out, bool stream) {
  with_dtype(feature.dtype, [&](auto element, auto accumulator) {
    using T = decltype(element);
    using A = decltype(accumulator);
    const T* addend = static_cast<const T*>(add.data) + b * add.batch;
    const A* map = static_cast<const A*>(k);
    with_few_exponents<A>(p, absolute, [&](auto exponent) {
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
