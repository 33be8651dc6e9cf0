// Sums over channels: the attention map of some positions.
#pragma once

#include "elements.h"

namespace at_fused {
namespace {

// The hardware runs ahead in a row, but not into the next ones: these are asked for in time, in the
// order in which they lie, for the second-level cache.
struct Ahead {
  int64_t distance = 0, step = 0;  // bytes, from the rows at work and for each step through them

  Ahead(int64_t rows_bytes, int64_t steps) {
    constexpr int64_t latency = 8192;  // bytes that are read while memory answers
    if (rows_bytes == 0 || steps == 0) return;
    distance = (latency + rows_bytes - 1) / rows_bytes * rows_bytes;
    step = rows_bytes / steps;
  }
};

// Adds `rows` channels to the map in one pass over it. Each channel is read front to back, which
// is what the hardware prefetchers want; the map itself stays in the first-level cache.
template <int rows, class T, class A, class P>
AT_FUSED_INLINE void add_channels(const T* x, int64_t line, int64_t n, P p, bool first, A scale,
                                  Ahead ahead, A* map) {
  constexpr int width = lanes<A>;
  const char* next = reinterpret_cast<const char*>(x) + ahead.distance;
  const auto before = [&](int64_t at, int count) AT_FUSED_LAMBDA {
    return first ? Vec<A>{} : load_up_to(map + at, count);
  };
  int64_t i = 0;
  for (; i + 2 * width <= n; i += 2 * width) {
    for (const char* end = next + (rows == 8 ? ahead.step : 0); next < end; next += kCacheLine) {
      __builtin_prefetch(next, 0, 2);
    }
    Both<Vec<A>> totals = load_both(x + i);
    totals.low = p.power(totals.low), totals.high = p.power(totals.high);
    for (int r = 1; r < rows; ++r) {
      const Both<Vec<A>> channel = load_both(x + r * line + i);
      totals.low += p.power(channel.low), totals.high += p.power(channel.high);
    }
    store(map + i, (before(i, width) + totals.low) * scale);
    store(map + i + width, (before(i + width, width) + totals.high) * scale);
  }
  // Without a branch in between: multiplications and additions are fused within a block of code.
  const auto add_few = [&](int count, auto&& read_few) AT_FUSED_LAMBDA {
    const Vec<A> sums = before(i, count);
    Vec<A> total = p.power(read_few(x + i));
    for (int r = 1; r < rows; ++r) total += p.power(read_few(x + r * line + i));
    store_up_to(map + i, (sums + total) * scale, count);
    i += count;
  };
  while (i + width <= n) add_few(width, [](const T* c) AT_FUSED_LAMBDA { return load(c); });
  if (const int rest = int(n - i)) {
    add_few(rest, [=](const T* c) AT_FUSED_LAMBDA { return load_partial(c, rest); });
  }
}

template <class T, class A, class P>
void attention_map_planar(const T* x, int64_t C, int64_t line, int64_t n, P p, A scale, A* map) {
  constexpr int64_t tile = 16384 / sizeof(A);  // half of a small first-level cache
  for (int64_t i = 0; i < n; i += tile) {
    const int64_t count = n - i < tile ? n - i : tile;
    const Ahead ahead(8 * line * int64_t(sizeof(T)), count / (2 * lanes<A>));
    int64_t c = 0;
    const auto add = [&](auto rows) {
      for (; c + rows <= C; c += rows) {
        add_channels<rows>(x + c * line + i, line, count, p, c == 0, c + rows == C ? scale : A(1),
                           ahead, map + i);
      }
    };
    add(std::integral_constant<int, 8>{});
    add(std::integral_constant<int, 4>{});
    add(std::integral_constant<int, 1>{});
  }
}

// The channels of one position, added up lane by lane. `vectors` is C / width where that is small
// enough to be known when compiling, else -1.
template <int vectors, class T, class A, class P>
AT_FUSED_INLINE Vec<A> add_position(const T* x, int64_t C, P p) {
  constexpr int width = lanes<A>;
  if (vectors == 1 && C == width) return p.power(load(x));
  Vec<A> total[4] = {};
  int64_t c = 0;
  const auto add_both = [&](int u, const T* from) AT_FUSED_LAMBDA {
    const Both<Vec<A>> channels = load_alternate(from);
    total[u] += p.power(channels.low);
    total[u + 1] += p.power(channels.high);
  };
  if constexpr (vectors >= 0) {
    for (int u = 0; u + 2 <= vectors; u += 2) add_both(u, x + u * width);
    if (vectors % 2) total[vectors - 1] += p.power(load(x + (vectors - 1) * width));
    c = vectors * width;
  } else {
    for (; c + 4 * width <= C; c += 4 * width) {
      prefetch_ahead<4 * width>(x + c);
      add_both(0, x + c);
      add_both(2, x + c + 2 * width);
    }
    for (; c + width <= C; c += width) total[0] += p.power(load(x + c));
  }
  if (const int rest = int(C - c)) total[1] += p.power(load_partial(x + c, rest));
  const Vec<A> first = total[0] + total[1];
  return vectors >= 0 && vectors <= 2 ? first : first + (total[2] + total[3]);
}

// The lanes of the lower and the upper half in turns.
template <class V, int... i>
AT_FUSED_INLINE V alternate(V v, std::integer_sequence<int, i...>) {
  return shuffle<(i / 2 + i % 2 * int(sizeof...(i) / 2))...>(v, v);
}

// Positions of one vector of bf16 channels each, one behind the other: two are loaded at once and
// their channels added up in pairs, which spares a level of the sums.
template <class P>
void attention_map_pairs(const BFloat16* x, int64_t n, P p, float scale, float* map) {
  constexpr int width = lanes<float>, half = width / 2;
  const auto add_two = [p](const BFloat16* from) AT_FUSED_LAMBDA {
    const Both<Vec<float>> channels = load_alternate(from);
    return p.power(channels.low) + p.power(channels.high);
  };
  for (; n > 0; n -= width, map += width, x += width * width) {
    const int count = n < width ? int(n) : width;
    Vec<float> totals[width] = {};
    for (int i = 0; i < count / 2; ++i) totals[i] = add_two(x + 2 * i * width);
    if (count % 2) {
      BFloat16 padded[2 * width] = {};
      std::memcpy(padded, x + (count - 1) * width, width * sizeof(BFloat16));
      totals[count / 2] = add_two(padded);
    }
    const Vec<float> sums =
        alternate(sum_each<float, half>(totals), std::make_integer_sequence<int, width>{}) * scale;
    store_up_to(map, sums, count);
  }
}

template <int vectors, class T, class A, class P>
void interleaved_map(const T* x, int64_t C, int64_t line, int64_t n, P p, A scale, A* map) {
  constexpr int width = lanes<A>;
  if constexpr (vectors == 1 && std::is_same_v<T, BFloat16>) {
    if (C == width && line == C) return attention_map_pairs(x, n, p, scale, map);
  }
  const auto add = [&](int count) AT_FUSED_LAMBDA {
    Vec<A> totals[width];
    for (int j = count; j < width; ++j) totals[j] = Vec<A>{};
    for (int j = 0; j < count; ++j, x += line) totals[j] = add_position<vectors, T, A>(x, C, p);
    store_up_to(map, sum_each<A>(totals) * scale, count);
  };
  for (; n >= width; n -= width, map += width) add(width);
  if (n > 0) add(int(n));
}

// With the number of vectors of channels known to the compiler, if it is at most four.
template <class T, class A, int vectors = 0, class P>
void attention_map_interleaved(const T* x, int64_t C, int64_t line, int64_t n, P p, A scale,
                               A* map) {
  if (C / lanes<A> == vectors) {
    interleaved_map<vectors, T, A>(x, C, line, n, p, scale, map);
  } else if constexpr (vectors < 4) {
    attention_map_interleaved<T, A, vectors + 1>(x, C, line, n, p, scale, map);
  } else {
    interleaved_map<-1, T, A>(x, C, line, n, p, scale, map);
  }
}

}  // namespace
}  // namespace at_fused
