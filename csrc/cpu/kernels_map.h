// Attention maps: sums of powers over channels.
#pragma once

#include "elements.h"

namespace at_fused {
namespace {

// Software prefetch of the next rows into the L2 cache, in the order of their addresses. Hardware
// prefetchers follow a row, but do not cross into the next one.
struct Prefetch {
  int64_t distance = 0;  // bytes from the current rows to those prefetched
  int64_t step = 0;      // bytes to prefetch in each step through the current rows

  Prefetch(int64_t rows_bytes, int64_t steps) {
    constexpr int64_t latency = 8192;  // bytes read in the time of one memory access
    if (rows_bytes == 0 || steps == 0) return;
    distance = (latency + rows_bytes - 1) / rows_bytes * rows_bytes;
    step = rows_bytes / steps;
  }
};

// Adds `rows` channels to the map in one pass. The sequential reads of each channel suit hardware
// prefetchers, and the map stays in the L1 cache.
template <int rows, class T, class A, class P>
AT_FUSED_INLINE void add_channels(const T* x, int64_t stride, int64_t n, P p, bool first, A scale,
                                  Prefetch prefetch, A* map) {
  constexpr int width = lanes<A>;
  const char* next = reinterpret_cast<const char*>(x) + prefetch.distance;
  const auto previous = [&](int64_t at, int count) AT_FUSED_LAMBDA {
    return first ? Vec<A>{} : load_up_to(map + at, count);
  };
  int64_t i = 0;
  for (; i + 2 * width <= n; i += 2 * width) {
    for (const char* end = next + (rows == 8 ? prefetch.step : 0); next < end; next += kCacheLine) {
      __builtin_prefetch(next, 0, 2);
    }
    VectorPair<Vec<A>> totals = load_pair(x + i);
    totals.low = p.power(totals.low), totals.high = p.power(totals.high);
    for (int r = 1; r < rows; ++r) {
      const VectorPair<Vec<A>> channel = load_pair(x + r * stride + i);
      totals.low += p.power(channel.low), totals.high += p.power(channel.high);
    }
    store(map + i, (previous(i, width) + totals.low) * scale);
    store(map + i + width, (previous(i + width, width) + totals.high) * scale);
  }
  // Loads the previous sums first: a branch between multiplications and additions would keep the
  // compiler from fusing them.
  const auto add_vector = [&](int count, auto&& load_vector) AT_FUSED_LAMBDA {
    const Vec<A> sums = previous(i, count);
    Vec<A> total = p.power(load_vector(x + i));
    for (int r = 1; r < rows; ++r) total += p.power(load_vector(x + r * stride + i));
    store_up_to(map + i, (sums + total) * scale, count);
    i += count;
  };
  while (i + width <= n) add_vector(width, [](const T* c) AT_FUSED_LAMBDA { return load(c); });
  if (const int rest = int(n - i)) {
    add_vector(rest, [=](const T* c) AT_FUSED_LAMBDA { return load_partial(c, rest); });
  }
}

template <class T, class A, class P>
void attention_map_planar(const T* x, int64_t C, int64_t stride, int64_t n, P p, A scale, A* map) {
  constexpr int64_t tile = 16384 / sizeof(A);  // half of a 32 KB L1 cache
  for (int64_t i = 0; i < n; i += tile) {
    const int64_t count = n - i < tile ? n - i : tile;
    const Prefetch prefetch(8 * stride * int64_t(sizeof(T)), count / (2 * lanes<A>));
    int64_t c = 0;
    const auto add = [&](auto rows) {
      for (; c + rows <= C; c += rows) {
        add_channels<rows>(x + c * stride + i, stride, count, p, c == 0,
                           c + rows == C ? scale : A(1), prefetch, map + i);
      }
    };
    add(std::integral_constant<int, 8>{});
    add(std::integral_constant<int, 4>{});
    add(std::integral_constant<int, 1>{});
  }
}

// Sums the channels of one position lane by lane. `vectors` is C / width if that is a compile-time
// constant, else -1.
template <int vectors, class T, class A, class P>
AT_FUSED_INLINE Vec<A> add_position(const T* x, int64_t C, P p) {
  constexpr int width = lanes<A>;
  if (vectors == 1 && C == width) return p.power(load(x));
  Vec<A> total[4] = {};
  int64_t c = 0;
  const auto add_pair = [&](int u, const T* from) AT_FUSED_LAMBDA {
    const VectorPair<Vec<A>> channels = load_pair_unordered(from);
    total[u] += p.power(channels.low);
    total[u + 1] += p.power(channels.high);
  };
  if constexpr (vectors >= 0) {
    for (int u = 0; u + 2 <= vectors; u += 2) add_pair(u, x + u * width);
    if (vectors % 2) total[vectors - 1] += p.power(load(x + (vectors - 1) * width));
    c = vectors * width;
  } else {
    for (; c + 4 * width <= C; c += 4 * width) {
      prefetch_ahead<4 * width>(x + c);
      add_pair(0, x + c);
      add_pair(2, x + c + 2 * width);
    }
    for (; c + width <= C; c += width) total[0] += p.power(load(x + c));
  }
  if (const int rest = int(C - c)) total[1] += p.power(load_partial(x + c, rest));
  const Vec<A> first = total[0] + total[1];
  return vectors >= 0 && vectors <= 2 ? first : first + (total[2] + total[3]);
}

// Interleaves the lanes of the lower and the upper half.
template <class V, int... i>
AT_FUSED_INLINE V interleave_halves(V v, std::integer_sequence<int, i...>) {
  return shuffle<(i / 2 + i % 2 * int(sizeof...(i) / 2))...>(v, v);
}

// For contiguous bf16 positions with one vector of channels each. Loading two positions at once
// adds neighbouring channels for free, which saves one step of the horizontal sums.
template <class P>
void attention_map_position_pairs(const BFloat16* x, int64_t n, P p, float scale, float* map) {
  constexpr int width = lanes<float>, half = width / 2;
  const auto add_pair = [p](const BFloat16* from) AT_FUSED_LAMBDA {
    const VectorPair<Vec<float>> channels = load_pair_unordered(from);
    return p.power(channels.low) + p.power(channels.high);
  };
  for (; n > 0; n -= width, map += width, x += width * width) {
    const int count = n < width ? int(n) : width;
    Vec<float> totals[width] = {};
    for (int i = 0; i < count / 2; ++i) totals[i] = add_pair(x + 2 * i * width);
    if (count % 2) {
      BFloat16 padded[2 * width] = {};
      std::memcpy(padded, x + (count - 1) * width, width * sizeof(BFloat16));
      totals[count / 2] = add_pair(padded);
    }
    const Vec<float> sums =
        interleave_halves(sum_each<float, half>(totals), std::make_integer_sequence<int, width>{}) *
        scale;
    store_up_to(map, sums, count);
  }
}

template <int vectors, class T, class A, class P>
void interleaved_map(const T* x, int64_t C, int64_t stride, int64_t n, P p, A scale, A* map) {
  constexpr int width = lanes<A>;
  if constexpr (vectors == 1 && std::is_same_v<T, BFloat16>) {
    if (C == width && stride == C) return attention_map_position_pairs(x, n, p, scale, map);
  }
  const auto add = [&](int count) AT_FUSED_LAMBDA {
    Vec<A> totals[width];
    for (int j = count; j < width; ++j) totals[j] = Vec<A>{};
    for (int j = 0; j < count; ++j, x += stride) totals[j] = add_position<vectors, T, A>(x, C, p);
    store_up_to(map, sum_each<A>(totals) * scale, count);
  };
  for (; n >= width; n -= width, map += width) add(width);
  if (n > 0) add(int(n));
}

// Makes the number of vectors of channels a compile-time constant if it is at most four.
template <class T, class A, int vectors = 0, class P>
void attention_map_interleaved(const T* x, int64_t C, int64_t stride, int64_t n, P p, A scale,
                               A* map) {
  if (C / lanes<A> == vectors) {
    interleaved_map<vectors, T, A>(x, C, stride, n, p, scale, map);
  } else if constexpr (vectors < 4) {
    attention_map_interleaved<T, A, vectors + 1>(x, C, stride, n, p, scale, map);
  } else {
    interleaved_map<-1, T, A>(x, C, stride, n, p, scale, map);
  }
}

}  // namespace
}  // namespace at_fused
