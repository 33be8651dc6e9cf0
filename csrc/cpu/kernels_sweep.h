// One sweep over the features: the gradient of one sample from its coefficient map.
#pragma once

#include "kernels.h"
#include "stores.h"

namespace at_fused {
namespace {

// What a sweep's gradient is added to: nothing, or the lines of another one.
struct Nothing {
  Nothing line(int64_t) const { return {}; }
  bool follows(int64_t) const { return true; }
  template <class V>
  AT_FUSED_INLINE V plus(int64_t, int, V v) const {
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
  AT_FUSED_INLINE V plus(int64_t i, int count, V v) const {
    return load_up_to(first + i, count) + rounded(v);
  }
};

// Whether lines are written past the caches: a cache line that is not written as a whole costs more
// than many save.
template <class T>
bool streams(const T* out, int64_t line, int64_t n) {
  const uint64_t ends = reinterpret_cast<uintptr_t>(out) | line * sizeof(T) | n * sizeof(T);
  return n * sizeof(T) >= 2048 || ends % kCacheLine == 0;
}

// out = k(i, count) * |x|^(p-1) * sign(x) over one line, and what `add` has. With `stream` the
// aligned middle is written past the caches. `out` may be what is added to.
template <class T, class A, class K, class Add, class P>
AT_FUSED_INLINE void sweep_line(const T* x, T* out, int64_t n, bool stream, K k, Add add, P p) {
  constexpr int width = lanes<A>;
  int64_t i = 0;
  const auto gradient = [&](Vec<A> features, int64_t at, int count) AT_FUSED_LAMBDA {
    return add.plus(at, count, k(at, count) * p.slope(features));
  };
  const auto full = [&]() AT_FUSED_LAMBDA { return gradient(load(x + i), i, width); };
  const auto both = [&]() AT_FUSED_LAMBDA {
    // Elements of 16 bits take as long to convert as memory takes to answer, and short rows are
    // mostly those of samples that a cache has.
    if constexpr (sizeof(T) > 2) {
      if (n >= 256) prefetch_ahead<2 * width>(x + i);
    }
    const Both<Vec<A>> features = load_both(x + i);
    return Both<Vec<A>>{gradient(features.low, i, width),
                        gradient(features.high, i + width, width)};
  };
  const auto partial = [&](int count) {
    store_partial(out + i, gradient(load_partial(x + i, count), i, count), count);
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

// The lines [begin, end) of a sample: x, out, add and, in interleaved, k begin with the first.
template <class T, class A, class P, class Add>
void sweep_lines(const Feature& feature, const T* x, T* out, int64_t out_line, int64_t count, P p,
                 A gradient, const A* k, bool stream, Add add) {
  const int64_t line = feature.line, n = line_length(feature);
  stream = stream && streams(out, out_line, n);
  if (feature.layout == Layout::planar) {
    const auto row = [=](int64_t i, int part)
                         AT_FUSED_LAMBDA { return gradient * load_up_to(k + i, part); };
    for (int64_t c = 0; c < count; ++c) {
      sweep_line<T, A>(x + c * line, out + c * out_line, n, stream, row, add.line(c), p);
    }
  } else if (n == lanes<A> && line == n && out_line == n && add.follows(n) && !stream) {
    // Lines of one vector each, one behind the other.
    const auto of_vector = [=](int64_t i, int)
                               AT_FUSED_LAMBDA { return splat(gradient * k[i / lanes<A>]); };
    sweep_line<T, A>(x, out, count * n, false, of_vector, add.line(0), p);
  } else {
    for (int64_t i = 0; i < count; ++i) {
      const Vec<A> factor = splat(gradient * k[i]);
      const auto same = [=](int64_t, int) AT_FUSED_LAMBDA { return factor; };
      sweep_line<T, A>(x + i * line, out + i * out_line, n, stream, same, add.line(i), p);
    }
  }
}

}  // namespace
}  // namespace at_fused
