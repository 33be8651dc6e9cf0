// The backward sweep: the gradient of a sample's features from its coefficient map.
#pragma once

#include "elements.h"

namespace at_fused {
namespace {

template <class T>
T* line_of(const Feature& feature, int64_t b, int64_t line) {
  return static_cast<T*>(const_cast<void*>(sample_of(feature, b))) + line * feature.line_stride;
}

// Returns true if non-temporal stores pay off: one partially written cache line costs a lot.
template <class T>
bool should_stream(const T* out, int64_t line_stride, int64_t n) {
  const uint64_t alignment =
      reinterpret_cast<uintptr_t>(out) | line_stride * sizeof(T) | n * sizeof(T);
  return n * sizeof(T) >= 2048 || alignment % kCacheLine == 0;
}

// out = k(i, count) * |x|^(p-1) * sign(x) over one line, plus `addend` if `has_addend`; this
// may be `out`. With `stream`, the aligned middle is written by non-temporal stores.
template <bool has_addend, class A, class T, class K, class P>
AT_FUSED_INLINE void sweep_line(const T* x, const T* addend, T* out, int64_t n, bool stream, K k,
                                P p) {
  constexpr int width = lanes<A>;
  int64_t i = 0;
  const auto gradient = [&](Vec<A> features, int64_t at, int count) AT_FUSED_LAMBDA {
    const Vec<A> value = k(at, count) * p.slope(features);
    // Prevents a fused multiply-add, which the compiler might use in full vectors only. Then the
    // bits of an element would depend on its position in a task.
    if constexpr (has_addend) return load_up_to(addend + at, count) + without_fma(value);
    return value;
  };
  const auto next_pair = [&]() AT_FUSED_LAMBDA {
    // For 16-bit elements, the conversion hides the memory latency. Short rows mostly belong to
    // samples that are in a cache.
    if constexpr (sizeof(T) > 2) {
      if (n >= 256) prefetch_ahead<2 * width>(x + i);
    }
    const VectorPair<Vec<A>> features = load_pair(x + i);
    return VectorPair<Vec<A>>{gradient(features.low, i, width),
                              gradient(features.high, i + width, width)};
  };
  const auto write_until = [&](int64_t end) AT_FUSED_LAMBDA {
    for (int count; i < end; i += count) {
      count = end - i < width ? int(end - i) : width;
      store_up_to(out + i, gradient(load_up_to(x + i, count), i, count), count);
    }
  };
  if (stream) {
    write_until(int64_t(-reinterpret_cast<uintptr_t>(out) % kCacheLine / sizeof(T)));
    for (; i + 2 * width <= n; i += 2 * width) store_pair<true>(out + i, next_pair());
  }
  for (; i + 2 * width <= n; i += 2 * width) store_pair<false>(out + i, next_pair());
  write_until(n);
}

template <bool has_addend, class T, class A, class P>
void sweep_lines(const Sweep& sweep, P p) {
  const int64_t n = line_length(sweep.feature), begin = sweep.begin, end = sweep.end;
  const Feature& addend = has_addend ? *sweep.addend : sweep.feature;
  const A* k = static_cast<const A*>(sweep.k);
  const A gradient = A(sweep.gradient);
  const bool stream = sweep.stream && should_stream(line_of<T>(sweep.out, sweep.b, begin),
                                                    sweep.out.line_stride, n);
  const auto sweep_at = [&](int64_t line, int64_t count, auto factor) AT_FUSED_LAMBDA {
    sweep_line<has_addend, A>(line_of<T>(sweep.feature, sweep.b, line),
                              line_of<T>(addend, sweep.b, line),
                              line_of<T>(sweep.out, sweep.b, line), count, stream, factor, p);
  };
  if (sweep.feature.layout == Layout::planar) {
    for (int64_t c = begin; c < end; ++c) {
      sweep_at(c, n, [=](int64_t i, int part) AT_FUSED_LAMBDA {
        return gradient * load_up_to(k + i, part);
      });
    }
  } else if (n == lanes<A> && sweep.feature.line_stride == n && sweep.out.line_stride == n &&
             addend.line_stride == n && !stream) {
    // Contiguous lines of one vector each are swept as one line.
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

// Only argmax channels have a gradient; other elements are `addend`, or 0. Channels out of range,
// which only a direct call of the operator can pass, are skipped.
template <class T, class A, class P>
void sweep_maxima(const Sweep& sweep, P p) {
  const Feature &feature = sweep.feature, &out = sweep.out;
  const size_t bytes = line_length(feature) * sizeof(T);
  const bool in_place = sweep.addend && sweep.addend->data == out.data;
  for (int64_t i = sweep.begin; !in_place && i < sweep.end; ++i) {
    T* line = line_of<T>(out, sweep.b, i);
    sweep.addend ? std::memcpy(line, line_of<T>(*sweep.addend, sweep.b, i), bytes)
                 : std::memset(line, 0, bytes);
  }
  const bool planar = feature.layout == Layout::planar;
  for (int64_t n = planar ? 0 : sweep.begin; n < (planar ? feature.N : sweep.end); ++n) {
    const int64_t c = sweep.channels[n], line = planar ? c : n, i = planar ? n : c;
    if (c < 0 || c >= feature.C || line < sweep.begin || line >= sweep.end) continue;
    T* target = line_of<T>(out, sweep.b, line) + i;
    const A factor = A(sweep.gradient) * static_cast<const A*>(sweep.k)[n];
    const Vec<A> x = load_partial(line_of<T>(feature, sweep.b, line) + i, 1);
    const Vec<A> value = without_fma(factor * p.slope(x));
    store_partial(target, sweep.addend ? load_partial(target, 1) + value : value, 1);
  }
}

}  // namespace
}  // namespace at_fused
