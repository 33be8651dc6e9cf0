// Maxima over channels, and their gradients.
#pragma once

#include "kernels.h"
#include "stores.h"

namespace at_fused {
namespace {

// f(i, count) for every vector of n elements; the last one may be partial.
template <class A, class F>
AT_FUSED_INLINE void for_each_vector(int64_t n, F f) {
  constexpr int width = lanes<A>;
  int64_t i = 0;
  for (; i + width <= n; i += width) f(i, width);
  if (i < n) f(i, int(n - i));
}

// Whole numbers in as many lanes as a Vec<A> has.
template <class A>
using Index = MaskOf<Vec<A>>;

// `from`, with `step` to the next lane.
template <class A>
AT_FUSED_INLINE Index<A> index(int64_t from, int step) {
  Index<A> numbers;
  for (int i = 0; i < lanes<A>; ++i) numbers[i] = decltype(numbers[0] + 0)(from) + i * step;
  return numbers;
}

// The largest |x| so far, and the channel that has it: a NaN beats everything, the first of equals
// stays.
template <class A>
struct Best {
  Vec<A> value;
  Index<A> channel;

  // Written out: a constructor of the compiler's own is not compiled for the level.
  AT_FUSED_INLINE Best() : value(splat(A(-1))), channel{} {}

  AT_FUSED_INLINE void offer(Vec<A> x, Index<A> from) {
    const Vec<A> size = absolute(x);
    const Index<A> wins = (size > value) | ((size != size) & (value == value));
    value = select(wins, size, value);
    channel = (wins & from) | (~wins & channel);
  }
};

// Offers `rows` channels from c on to n positions.
template <int rows, class T, class A>
AT_FUSED_INLINE void offer_channels(const T* x, int64_t line, int64_t n, int64_t c, A* value,
                                    int32_t* channel) {
  typedef typename VectorOf<int32_t, lanes<A>>::type Channels;
  for_each_vector<A>(n, [&](int64_t i, int count) AT_FUSED_LAMBDA {
    Best<A> best;
    int32_t padded[lanes<A>] = {};
    if (c > 0) {
      best.value = load_up_to(value + i, count);
      std::memcpy(padded, channel + i, count * sizeof(int32_t));
      best.channel = __builtin_convertvector(read<Channels>(padded), Index<A>);
    }
    for (int r = 0; r < rows; ++r) {
      best.offer(load_up_to(x + r * line + i, count), index<A>(c + r, 0));
    }
    store_up_to(value + i, best.value, count);
    const Channels channels = __builtin_convertvector(best.channel, Channels);
    std::memcpy(padded, &channels, sizeof(padded));
    std::memcpy(channel + i, padded, count * sizeof(int32_t));
  });
}

// Of two, lane by lane: the better one, and of equals the earlier channel.
template <class A>
AT_FUSED_INLINE Best<A> better(const Best<A>& a, const Best<A>& b) {
  const Index<A> nan_a = a.value != a.value, nan_b = b.value != b.value;
  const Index<A> alike = (a.value == b.value) | (nan_a & nan_b);
  const Index<A> second =
      (b.value > a.value) | (nan_b & ~nan_a) | (alike & (b.channel < a.channel));
  Best<A> best;
  best.value = select(second & ~(nan_a & ~nan_b), b.value, a.value);
  best.channel = (second & b.channel) | (~second & a.channel);
  return best;
}

// As sum_each (numbers.h): of each of `lanes<A>` positions the best of its lanes.
template <class A, int count = lanes<A>>
AT_FUSED_INLINE Best<A> best_each(Best<A> (&v)[lanes<A>]) {
  if constexpr (count > 1) {
    constexpr std::make_integer_sequence<int, lanes<A>> all;
    for (int i = 0; i < count / 2; ++i) {
      const Best<A>&a = v[i], &b = v[i + count / 2];
      Best<A> low, high;
      low.value = halves<count, 0>(a.value, b.value, all);
      low.channel = halves<count, 0>(a.channel, b.channel, all);
      high.value = halves<count, count / 2>(a.value, b.value, all);
      high.channel = halves<count, count / 2>(a.channel, b.channel, all);
      v[i] = better(low, high);
    }
    return best_each<A, count / 2>(v);
  } else {
    return v[0];
  }
}

// The best of each of `count` positions, from what best_of(position) finds lane by lane.
template <class A, class F>
AT_FUSED_INLINE void store_best(int count, A* value, int32_t* channel, F best_of) {
  typedef typename VectorOf<int32_t, lanes<A>>::type Channels;
  Best<A> each[lanes<A>];
  for (int j = 0; j < count; ++j) each[j] = best_of(j);
  const Best<A> best = best_each<A>(each);
  const Channels channels = __builtin_convertvector(best.channel, Channels);
  store_up_to(value, best.value, count);
  std::memcpy(channel, &channels, count * sizeof(int32_t));
}

// The largest |x| of n positions, and its channel.
template <class T, class A>
void largest(const Feature& feature, const T* x, int64_t n, A* value, int32_t* channel) {
  const int64_t C = feature.C, line = feature.line;
  if (feature.layout == Layout::planar) {
    constexpr int64_t tile = 8192 / sizeof(A);  // values and channels in a first-level cache
    for (int64_t i = 0; i < n; i += tile) {
      const int64_t count = n - i < tile ? n - i : tile;
      int64_t c = 0;
      for (; c + 8 <= C; c += 8) {
        offer_channels<8>(x + c * line + i, line, count, c, value + i, channel + i);
      }
      for (; c < C; ++c) {
        offer_channels<1>(x + c * line + i, line, count, c, value + i, channel + i);
      }
    }
    return;
  }
  for_each_vector<A>(n, [&](int64_t i, int count) AT_FUSED_LAMBDA {
    store_best(count, value + i, channel + i, [&](int j) AT_FUSED_LAMBDA {
      // What a partial vector has behind the last channel is 0, and later than a channel's own 0.
      Best<A> best;
      const T* position = x + (i + j) * line;
      for_each_vector<A>(C, [&](int64_t c, int rest) AT_FUSED_LAMBDA {
        best.offer(load_up_to(position + c, rest), index<A>(c, 1));
      });
      return best;
    });
  });
}

// The map of n positions, and the channels that won.
template <class T, class A>
void max_map(const Feature& feature, const T* x, int64_t n, double p, A* map, int32_t* channels) {
  largest(feature, x, n, map, channels);
  with_few_exponents<A>(p, [&](auto exponent) {
    for_each_vector<A>(n, [&](int64_t i, int count) AT_FUSED_LAMBDA {
      store_up_to(map + i, exponent.power(load_up_to(map + i, count)), count);
    });
  });
}

// The lines [begin, end) of a sample: what `add` has, or 0, but for the channels that won. One that
// is none, which only a direct call can name, has no gradient.
template <class T, class A, class P>
void sweep_maxima(const Feature& feature, const Feature* add, const Feature& out, int64_t b,
                  int64_t begin, int64_t end, P p, A gradient, const A* k,
                  const int32_t* channels) {
  const bool planar = feature.layout == Layout::planar;
  const T* x = static_cast<const T*>(sample_of(feature, b));
  const T* base = add ? static_cast<const T*>(sample_of(*add, b)) : nullptr;
  T* to = static_cast<T*>(const_cast<void*>(sample_of(out, b)));
  const size_t bytes = line_length(feature) * sizeof(T);
  for (int64_t i = begin; base != to && i < end; ++i) {
    T* line = to + i * out.line;
    base ? std::memcpy(line, base + i * add->line, bytes) : std::memset(line, 0, bytes);
  }
  const int64_t first = planar ? begin : 0, last = planar ? end : feature.C;
  for (int64_t n = planar ? 0 : begin; n < (planar ? feature.N : end); ++n) {
    const int64_t c = channels[n];
    if (c < first || c >= last) continue;
    T* at = to + (planar ? c * out.line + n : n * out.line + c);
    const T* from = x + (planar ? c * feature.line + n : n * feature.line + c);
    const Vec<A> value = gradient * k[n] * p.slope(load_partial(from, 1));
    store_partial(at, base ? load_partial(at, 1) + rounded(value) : value, 1);
  }
}

}  // namespace
}  // namespace at_fused
