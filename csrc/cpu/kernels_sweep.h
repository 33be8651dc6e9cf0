// One sweep over the features: the gradient of one sample from its coefficient map.
#pragma once

#include "elements.h"

namespace at_fused {
namespace {

template <class T>
T* line_of(const Feature& feature, int64_t b, int64_t line) {
  return static_cast<T*>(const_cast<void*>(sample_of(feature, b))) + line * feature.line;
}

// Whether lines are written past the caches: a cache line that is not written as a whole costs more
// than many save.
template <class T>
bool streams(const T* out, int64_t line, int64_t n) {
  const uint64_t ends = reinterpret_cast<uintptr_t>(out) | line * sizeof(T) | n * sizeof(T);
  return n * sizeof(T) >= 2048 || ends % kCacheLine == 0;
}

// out = k(i, count) * |x|^(p-1) * sign(x) over one line, with `adds` on top of `add`, which may be
// `out`. With `stream` the aligned middle is written past the caches.
template <bool adds, class A, class T, class K, class P>
AT_FUSED_INLINE void sweep_line(const T* x, const T* add, T* out, int64_t n, bool stream, K k,
                                P p) {
  constexpr int width = lanes<A>;
  int64_t i = 0;
  const auto gradient = [&](Vec<A> features, int64_t at, int count) AT_FUSED_LAMBDA {
    const Vec<A> value = k(at, count) * p.slope(features);
    // The sum is rounded twice everywhere: fused into the multiplication in some places only, it
    // would have other bits in a partial vector.
    if constexpr (adds) return load_up_to(add + at, count) + rounded(value);
    return value;
  };
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
  const auto one_by_one = [&](int64_t end) AT_FUSED_LAMBDA {
    for (int count; i < end; i += count) {
      count = end - i < width ? int(end - i) : width;
      store_up_to(out + i, gradient(load_up_to(x + i, count), i, count), count);
    }
  };
  if (stream) {
    one_by_one(int64_t(-reinterpret_cast<uintptr_t>(out) % kCacheLine / sizeof(T)));
    for (; i + 2 * width <= n; i += 2 * width) store_both<true>(out + i, both());
  }
  for (; i + 2 * width <= n; i += 2 * width) store_both<false>(out + i, both());
  one_by_one(n);
}

template <bool adds, class T, class A, class P>
void sweep_lines(const Sweep& sweep, P p) {
  const int64_t n = line_length(sweep.feature), begin = sweep.begin, end = sweep.end;
  const Feature& add = adds ? *sweep.add : sweep.feature;
  const A* k = static_cast<const A*>(sweep.k);
  const A gradient = A(sweep.gradient);
  const bool stream =
      sweep.stream && streams(line_of<T>(sweep.out, sweep.b, begin), sweep.out.line, n);
  const auto sweep_at = [&](int64_t line, int64_t count, auto factor) AT_FUSED_LAMBDA {
    sweep_line<adds, A>(line_of<T>(sweep.feature, sweep.b, line), line_of<T>(add, sweep.b, line),
                        line_of<T>(sweep.out, sweep.b, line), count, stream, factor, p);
  };
  if (sweep.feature.layout == Layout::planar) {
    for (int64_t c = begin; c < end; ++c) {
      sweep_at(c, n, [=](int64_t i, int part) AT_FUSED_LAMBDA {
        return gradient * load_up_to(k + i, part);
      });
    }
  } else if (n == lanes<A> && sweep.feature.line == n && sweep.out.line == n && add.line == n &&
             !stream) {
    // Lines of one vector each, one after the other.
    sweep_at(begin, (end - begin) * n, [=](int64_t i, int) AT_FUSED_LAMBDA {
      return splat(gradient * k[begin + i / lanes<A>]);
    });
  } else {
    for (int64_t i = begin; i < end; ++i) {
      const Vec<A> factor = splat(gradient * k[i]);
      sweep_at(i, n, [=](int64_t, int) AT_FUSED_LAMBDA { return factor; });
    }
  }
}

// Gives a gradient to the channels alone that won; the rest is what `add` has, or 0. A channel that
// is none, which only a direct call can name, has no gradient.
template <class T, class A, class P>
void sweep_maxima(const Sweep& sweep, P p) {
  const Feature &feature = sweep.feature, &out = sweep.out;
  const size_t bytes = line_length(feature) * sizeof(T);
  const bool in_place = sweep.add && sweep.add->data == out.data;
  for (int64_t i = sweep.begin; !in_place && i < sweep.end; ++i) {
    T* line = line_of<T>(out, sweep.b, i);
    sweep.add ? std::memcpy(line, line_of<T>(*sweep.add, sweep.b, i), bytes)
              : std::memset(line, 0, bytes);
  }
  const bool planar = feature.layout == Layout::planar;
  for (int64_t n = planar ? 0 : sweep.begin; n < (planar ? feature.N : sweep.end); ++n) {
    const int64_t c = sweep.channels[n], line = planar ? c : n, i = planar ? n : c;
    if (c < 0 || c >= feature.C || line < sweep.begin || line >= sweep.end) continue;
    T* at = line_of<T>(out, sweep.b, line) + i;
    const A factor = A(sweep.gradient) * static_cast<const A*>(sweep.k)[n];
    const Vec<A> x = load_partial(line_of<T>(feature, sweep.b, line) + i, 1);
    const Vec<A> value = rounded(factor * p.slope(x));
    store_partial(at, sweep.add ? load_partial(at, 1) + value : value, 1);
  }
}

}  // namespace
}  // namespace at_fused
