// Maxima over channels: the attention map of `collapse="max"`.
#pragma once

#include "elements.h"

namespace at_fused {
namespace {

// The largest |x| so far, as its bits, which have the order of the values, and the channel that has
// it. A NaN beats everything; the first of equals stays.
template <class A>
struct Best {
  using Index = MaskOf<Vec<A>>;
  Index bits, channel;

  static AT_FUSED_INLINE Best none() { return {~Index{}, Index{}}; }

  AT_FUSED_INLINE void offer(Vec<A> x, Index from) {
    // All NaNs are one: none beats another.
    x = x != x ? Vec<A>{} + A(__builtin_nan("")) : absolute(x);
    const Index offered = bit_cast<Index>(x), wins = offered > bits;
    bits = wins ? offered : bits;
    channel = wins ? from : channel;
  }
};

// As of vectors (numbers.h), so that fold_each() takes both.
template <int segment, int begin, class A, int... i>
AT_FUSED_INLINE Best<A> halves(Best<A> a, Best<A> b, std::integer_sequence<int, i...> all) {
  return {halves<segment, begin>(a.bits, b.bits, all),
          halves<segment, begin>(a.channel, b.channel, all)};
}

// The map of n positions, and the channels that won.
template <class T, class A, class P>
void max_map(const Feature& feature, const T* x, int64_t n, P p, A* map, int32_t* channels) {
  using Index = typename Best<A>::Index;
  constexpr int width = lanes<A>;
  const int64_t C = feature.C, line = feature.line;
  Index lane;
  for (int i = 0; i < width; ++i) lane[i] = i;
  for (int64_t i = 0; i < n; i += width) {
    const int count = n - i < width ? int(n - i) : width;
    auto best = Best<A>::none();
    if (feature.layout == Layout::planar) {
      for (int64_t c = 0; c < C; ++c) {
        best.offer(load_up_to(x + c * line + i, count), Index{} + int(c));
      }
    } else {
      Best<A> each[width] = {};
      for (int j = 0; j < count; ++j) {
        each[j] = Best<A>::none();
        // A partial vector has 0 after the last channel, which comes later than a channel's own 0.
        for (int64_t c = 0; c < C; c += width) {
          const int rest = C - c < width ? int(C - c) : width;
          each[j].offer(load_up_to(x + (i + j) * line + c, rest), lane + int(c));
        }
      }
      best = fold_each<width>(each, [](Best<A> a, Best<A> b) AT_FUSED_LAMBDA -> Best<A> {
        const auto second = (b.bits > a.bits) | ((b.bits == a.bits) & (b.channel < a.channel));
        return {second ? b.bits : a.bits, second ? b.channel : a.channel};
      });
    }
    const auto won = __builtin_convertvector(best.channel, typename VectorOf<int32_t, width>::type);
    store_up_to(map + i, p.power(bit_cast<Vec<A>>(best.bits)), count);
    std::memcpy(channels + i, &won, count * sizeof(int32_t));
  }
}

}  // namespace
}  // namespace at_fused
