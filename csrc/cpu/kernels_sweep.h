// One sweep over the features: the gradient of one sample from its coefficient map.
#pragma once

#include "kernels.h"
#include "kernels_power.h"

namespace at_fused {
namespace {

// What a sweep's gradient is added to: nothing, or the line of another one.
struct Nothing {
  Nothing line(int64_t) const { return {}; }
  bool follows(int64_t) const { return true; }
  template <class V>
  AT_FUSED_INLINE V full(int64_t, V v) const {
    return v;
  }
  template <class V>
  AT_FUSED_INLINE V partial(int64_t, int, V v) const {
    return v;
  }
};

// The sum is rounded twice everywhere: fused into the multiplication in some places only, it would
// have other bits in a partial vector.
template <class T>
struct Addend {
  const T* first;
  int64_t step;
  Addend line(int64_t i) const { return {first + i * step, step}; }
  bool follows(int64_t n) const { return step == n; }  // each line upon the one before
  template <class V>
  AT_FUSED_INLINE V full(int64_t i, V v) const {
    return load(first + i) + rounded(v);
  }
  template <class V>
  AT_FUSED_INLINE V partial(int64_t i, int count, V v) const {
    return load_partial(first + i, count) + rounded(v);
  }
};

// Whether lines are written past the caches: a cache line that is not written as a whole costs more
// than many save.
template <class T>
bool streams(const T* out, int64_t line, int64_t n) {
  const uint64_t ends = reinterpret_cast<uintptr_t>(out) | line * sizeof(T) | n * sizeof(T);
  return n * sizeof(T) >= 2048 || ends % kCacheLine == 0;
}

// out = f(x, k) over one line, and what `add` has. With `stream` the aligned middle is written past
// the caches. `out` may be what is added to.
template <class T, class A, class K, class Add, class F>
AT_FUSED_INLINE void sweep_line(const T* x, T* out, int64_t n, bool stream, K k, Add add, F f) {
  constexpr int width = lanes<A>;
  int64_t i = 0;
  const auto full = [&]() AT_FUSED_LAMBDA { return add.full(i, f(load(x + i), k.full(i))); };
  const auto both = [&]() AT_FUSED_LAMBDA {
    // Elements of 16 bits take as long to convert as memory takes to answer, and short rows are
    // mostly those of samples that a cache has.
    if constexpr (sizeof(T) > 2) {
      if (n >= 256) prefetch_ahead<2 * width>(x + i);
    }
    const Both<Vec<A>> features = load_both(x + i);
    return Both<Vec<A>>{add.full(i, f(features.low, k.full(i))),
                        add.full(i + width, f(features.high, k.full(i + width)))};
  };
  const auto partial = [&](int count) {
    const Vec<A> value = f(load_partial(x + i, count), k.partial(i, count));
    store_partial(out + i, add.partial(i, count, value), count);
    i += count;
  };
  if (stream) {
    int64_t head = int64_t(-reinterpret_cast<uintptr_t>(out) % kCacheLine / sizeof(T));
    for (; head >= width; head -= width, i += width) store(out + i, full());
    if (head > 0) partial(int(head));
    for (; i + 2 * width <= n; i += 2 * width) store_both_streaming(out + i, both());
  }
  for (; i + 2 * width <= n; i += 2 * width) store_both(out + i, both());
  for (; i + width <= n; i += width) store(out + i, full());
  if (i < n) partial(int(n - i));
}

template <class A>
struct CoefficientRow {
  const A* k;
  AT_FUSED_INLINE Vec<A> full(int64_t i) const { return load(k + i); }
  AT_FUSED_INLINE Vec<A> partial(int64_t i, int count) const { return load_partial(k + i, count); }
};

template <class A>
struct CoefficientSplat {
  Vec<A> k;
  AT_FUSED_INLINE Vec<A> full(int64_t) const { return k; }
  AT_FUSED_INLINE Vec<A> partial(int64_t, int) const { return k; }
};

// Lines of one vector each, one behind the other.
template <class A>
struct CoefficientVectors {
  const A* k;
  A gradient;
  AT_FUSED_INLINE Vec<A> full(int64_t i) const { return splat(gradient * k[i / lanes<A>]); }
  AT_FUSED_INLINE Vec<A> partial(int64_t i, int) const { return full(i); }  // of a multiple: never
};

template <class T, class A, class P, class Add>
void backward_planar(const T* x, int64_t line, T* out, int64_t out_line, int64_t channels,
                     int64_t n, P p, A gradient, const A* k, bool stream, Add add) {
  stream = stream && streams(out, out_line, n);
  for (int64_t c = 0; c < channels; ++c) {
    sweep_line<T, A>(x + c * line, out + c * out_line, n, stream, CoefficientRow<A>{k}, add.line(c),
                     [&](Vec<A> a, Vec<A> kn)
                         AT_FUSED_LAMBDA { return (gradient * kn) * p.slope(a); });
  }
}

template <class T, class A, class P, class Add>
void backward_interleaved(const T* x, int64_t line, T* out, int64_t out_line, int64_t positions,
                          int64_t C, P p, A gradient, const A* k, bool stream, Add add) {
  const auto slope = [&](Vec<A> a, Vec<A> kn) AT_FUSED_LAMBDA { return kn * p.slope(a); };
  stream = stream && streams(out, out_line, C);
  if (C == lanes<A> && line == C && out_line == C && add.follows(C) && !stream) {
    const CoefficientVectors<A> all{k, gradient};
    return sweep_line<T, A>(x, out, positions * C, false, all, add.line(0), slope);
  }
  for (int64_t i = 0; i < positions; ++i) {
    sweep_line<T, A>(x + i * line, out + i * out_line, C, stream,
                     CoefficientSplat<A>{splat(gradient * k[i])}, add.line(i), slope);
  }
}

// The lines [begin, end) of a sample, added to what `add` has of them.
template <class T, class A, class P, class Add>
void backward_lines(const Feature& feature, const Feature& out, int64_t b, int64_t begin,
                    int64_t end, P p, A gradient, const A* k, bool stream, Add add) {
  const T* x = static_cast<const T*>(feature.data) + b * feature.batch + begin * feature.line;
  T* to = static_cast<T*>(const_cast<void*>(out.data)) + b * out.batch + begin * out.line;
  if (feature.layout == Layout::planar) {
    backward_planar<T, A>(x, feature.line, to, out.line, end - begin, feature.N, p, gradient, k,
                          stream, add);
  } else {
    backward_interleaved<T, A>(x, feature.line, to, out.line, end - begin, feature.C, p, gradient,
                               k + begin, stream, add);
  }
}

void attention_map_backward(const Feature& feature, int64_t b, int64_t begin, int64_t end, double p,
                            double gradient, const void* k, const Feature& out, bool stream) {
  with_dtype(feature.dtype, [&](auto element, auto accumulator) {
    using T = decltype(element);
    using A = decltype(accumulator);
    with_exponent<A>(p, [&](auto exponent) {
      backward_lines<T, A>(feature, out, b, begin, end, exponent, A(gradient),
                           static_cast<const A*>(k), stream, Nothing{});
    });
  });
  if (stream) streaming_fence();
}

}  // namespace
}  // namespace at_fused
