// The kernels of what a plain sum of powers is not: maxima over channels, and features pooled
// before the power. As kernels_impl.h, once for every instruction-set level.
#pragma once

#include "kernels_impl.h"

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

template <class A, class T>
AT_FUSED_INLINE Vec<A> load_up_to(const T* from, int count) {
  return count == lanes<A> ? load(from) : load_partial(from, count);
}
template <class T, class V>
AT_FUSED_INLINE void store_up_to(T* to, V v, int count) {
  count == int(sizeof(V) / sizeof(v[0])) ? store(to, v) : store_partial(to, v, count);
}

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
AT_FUSED_INLINE void with_few_exponents(const GeneralMap& general, F f) {
  if (general.odd) {
    f(Odd<A>(general.p));
  } else if (general.p == 2) {
    f(Two<A>(general.p));
  } else {
    f(Branching<A>(general.p));
  }
}

// ---- maxima over channels ---------------------------------------------------------------------

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
      best.value = load_up_to<A>(value + i, count);
      std::memcpy(padded, channel + i, count * sizeof(int32_t));
      best.channel = __builtin_convertvector(read<Channels>(padded), Index<A>);
    }
    for (int r = 0; r < rows; ++r) {
      best.offer(load_up_to<A>(x + r * line + i, count), index<A>(c + r, 0));
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

// As sum_each (simd.h): of each of `lanes<A>` positions the best of its lanes.
template <int segment, class A, int... i>
AT_FUSED_INLINE Best<A> fold_best(const Best<A>& a, const Best<A>& b,
                                  std::integer_sequence<int, i...>) {
  constexpr int half = segment / 2, width = lanes<A>;
  Best<A> low, high;
  low.value = __builtin_shufflevector(
      a.value, b.value, (i / segment * segment + i % half + (i % segment < half ? 0 : width))...);
  low.channel = __builtin_shufflevector(
      a.channel, b.channel,
      (i / segment * segment + i % half + (i % segment < half ? 0 : width))...);
  high.value = __builtin_shufflevector(
      a.value, b.value,
      (i / segment * segment + i % half + half + (i % segment < half ? 0 : width))...);
  high.channel = __builtin_shufflevector(
      a.channel, b.channel,
      (i / segment * segment + i % half + half + (i % segment < half ? 0 : width))...);
  return better(low, high);
}

template <class A, int count = lanes<A>>
AT_FUSED_INLINE Best<A> best_each(Best<A> (&v)[lanes<A>]) {
  if constexpr (count > 1) {
    for (int i = 0; i < count / 2; ++i) {
      v[i] =
          fold_best<count, A>(v[i], v[i + count / 2], std::make_integer_sequence<int, lanes<A>>{});
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

template <class T, class A>
void max_map(const Feature& feature, const T* x, int64_t n, A* value, int32_t* channel) {
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
        best.offer(load_up_to<A>(position + c, rest), index<A>(c, 1));
      });
      return best;
    });
  });
}

// The gradient is 0 but for the channels that won.
template <class T, class A, class P>
void max_backward(const Feature& feature, const Feature& out, const T* x, T* to, int64_t begin,
                  int64_t end, P p, A gradient, const A* k, const int32_t* channels) {
  const bool planar = feature.layout == Layout::planar;
  for (int64_t i = begin; i < end; ++i) {
    std::memset(to + i * out.line, 0, (planar ? feature.N : feature.C) * sizeof(T));
  }
  const auto write = [&](int64_t n, int64_t c) {
    const T* from = planar ? x + c * feature.line + n : x + n * feature.line + c;
    const Vec<A> value = gradient * k[n] * p.slope(load_partial(from, 1));
    store_partial(planar ? to + c * out.line + n : to + n * out.line + c, value, 1);
  };
  for (int64_t n = planar ? 0 : begin; n < (planar ? feature.N : end); ++n) {
    if (!planar || (channels[n] >= begin && channels[n] < end)) write(n, channels[n]);
  }
}

// ---- pooled features --------------------------------------------------------------------------

struct Range {
  int32_t begin, end;
  int32_t size() const { return end - begin; }
  bool operator==(const Range& other) const { return begin == other.begin && end == other.end; }
};

// What output o is the mean of, and which outputs input i is part of.
inline Range inputs_of(int64_t o, int64_t in, int64_t out) {
  return {int32_t(o * in / out), int32_t(((o + 1) * in + out - 1) / out)};
}
inline Range outputs_of(int64_t i, int64_t in, int64_t out) {
  return {int32_t(i * out / in), int32_t(((i + 1) * out + in - 1) / in)};
}

// The two outer dimensions' part in a row of outputs or inputs.
struct RowWindow {
  Range d, h;
  int32_t size() const { return d.size() * h.size(); }
  bool operator==(const RowWindow& other) const { return d == other.d && h == other.h; }
};

// Windows of a feature's rows and of a row's elements, in the caller's scratch, where they are
// found again if the last feature was pooled alike. Arrays of the last dimension have room for
// whole vectors behind their ends.
template <class A>
struct Windows {
  RowWindow *of_outputs, *of_inputs;  // rows
  Range *columns, *columns_back;
  A* inverse;          // 1 / columns
  A *wide, *expanded;  // of in[2] elements
  A *pooled, *sum;     // of out[2]
  A* rest;             // out[2] rows of channels
  bool pairs;          // two elements to each of the last dimension

  Windows(const Pool& pool, void* scratch) {
    const int64_t in = pool.in[2], out = pool.out[2];
    const int64_t in_rows = int64_t(pool.in[0]) * pool.in[1];
    const int64_t out_rows = int64_t(pool.out[0]) * pool.out[1];
    double* at = static_cast<double*>(scratch);
    const auto take = [&](int64_t n) {
      double* taken = at;
      at += n;
      return taken;
    };
    double* header = take(kScratchHeader);
    of_outputs = reinterpret_cast<RowWindow*>(take(2 * out_rows));
    of_inputs = reinterpret_cast<RowWindow*>(take(2 * in_rows));
    columns = reinterpret_cast<Range*>(take(out));
    columns_back = reinterpret_cast<Range*>(take(in));
    inverse = reinterpret_cast<A*>(take(out + kScratchPadding));
    wide = reinterpret_cast<A*>(take(in + kScratchPadding));
    expanded = reinterpret_cast<A*>(take(in + kScratchPadding));
    pooled = reinterpret_cast<A*>(take(out + kScratchPadding));
    sum = reinterpret_cast<A*>(take(out + kScratchPadding));
    rest = reinterpret_cast<A*>(at);
    pairs = in == 2 * out;
    struct {
      Pool pool;
      int64_t size;
    } key{pool, sizeof(A)};
    static_assert(sizeof(key) == kScratchHeader * sizeof(double));
    if (std::memcmp(header, &key, sizeof(key)) == 0) return;
    std::memcpy(header, &key, sizeof(key));
    for (int64_t r = 0; r < out_rows; ++r) {
      of_outputs[r] = {inputs_of(r / pool.out[1], pool.in[0], pool.out[0]),
                       inputs_of(r % pool.out[1], pool.in[1], pool.out[1])};
    }
    for (int64_t r = 0; r < in_rows; ++r) {
      of_inputs[r] = {outputs_of(r / pool.in[1], pool.in[0], pool.out[0]),
                      outputs_of(r % pool.in[1], pool.in[1], pool.out[1])};
    }
    for (int64_t o = 0; o < out; ++o) {
      columns[o] = inputs_of(o, in, out);
      inverse[o] = A(1) / A(columns[o].size());
    }
    for (int64_t i = 0; i < in; ++i) columns_back[i] = outputs_of(i, in, out);
  }
};

template <class A, int... i>
AT_FUSED_INLINE Vec<A> add_neighbours(Vec<A> a, Vec<A> b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, (2 * i)...) + __builtin_shufflevector(a, b, (2 * i + 1)...);
}
template <class A, int... i>
AT_FUSED_INLINE void store_twice(A* to, Vec<A> v, std::integer_sequence<int, i...>) {
  store(to, Vec<A>(__builtin_shufflevector(v, v, (i / 2)...)));
  store(to + lanes<A>, Vec<A>(__builtin_shufflevector(v, v, ((i + lanes<A>) / 2)...)));
}

// One channel's row of outputs, into `pooled`.
template <class T, class A>
AT_FUSED_INLINE void pool_row(const T* x, const Pool& pool, const RowWindow& window,
                              const Windows<A>& w) {
  constexpr int width = lanes<A>;
  constexpr auto all = std::make_integer_sequence<int, width>{};
  const int64_t in = pool.in[2], out = pool.out[2];
  bool first = true;
  for (int32_t d = window.d.begin; d < window.d.end; ++d) {
    for (int32_t h = window.h.begin; h < window.h.end; ++h, first = false) {
      const T* line = x + (d * pool.in[1] + h) * in;
      for_each_vector<A>(in, [&](int64_t i, int count) AT_FUSED_LAMBDA {
        const Vec<A> value = load_up_to<A>(line + i, count);
        store(w.wide + i, first ? value : load(w.wide + i) + value);
      });
    }
  }
  if (w.pairs) {
    const A mean = A(0.5) / A(window.size());
    for (int64_t o = 0; o < out; o += width) {
      const Vec<A> sums =
          add_neighbours<A>(load(w.wide + 2 * o), load(w.wide + 2 * o + width), all);
      store(w.pooled + o, sums * mean);
    }
    return;
  }
  const A mean = A(1) / A(window.size());
  for (int64_t o = 0; o < out; ++o) {
    A total = w.wide[w.columns[o].begin];
    for (int32_t i = w.columns[o].begin + 1; i < w.columns[o].end; ++i) total += w.wide[i];
    w.pooled[o] = total * (mean * w.inverse[o]);
  }
}

// A row of `sum`, spread over the inputs, into `expanded`.
template <class A>
AT_FUSED_INLINE void expand_row(const Pool& pool, const Windows<A>& w) {
  constexpr int width = lanes<A>;
  if (w.pairs) {
    for (int64_t o = 0; o < pool.out[2]; o += width) {
      store_twice<A>(w.expanded + 2 * o, load(w.sum + o), std::make_integer_sequence<int, width>{});
    }
    return;
  }
  for (int64_t i = 0; i < pool.in[2]; ++i) {
    const Range back = w.columns_back[i];
    A total = w.sum[back.begin];
    for (int32_t o = back.begin + 1; o < back.end; ++o) total += w.sum[o];
    w.expanded[i] = total;
  }
}

template <class T, class A, class P>
void pooled_map_planar(const Feature& feature, const GeneralMap& general, const T* x, int64_t begin,
                       int64_t end, P p, A* map, int32_t* channels, void* scratch) {
  const Windows<A> w(general.pool, scratch);
  const int64_t out = general.pool.out[2];
  for (int64_t c = 0; c < feature.C; ++c, x += feature.line) {
    const A scale = c + 1 == feature.C ? A(general.scale) : A(1);
    for (int64_t r = begin / out; r < end / out; ++r) {
      pool_row(x, general.pool, w.of_outputs[r], w);
      A* row = map + (r * out - begin);
      if (general.max) {
        offer_channels<1>(w.pooled, 0, out, c, row, channels + (r * out - begin));
        continue;
      }
      for_each_vector<A>(out, [&](int64_t i, int count) AT_FUSED_LAMBDA {
        Vec<A> total = p.power(load(w.pooled + i));
        if (c > 0) total += load_up_to<A>(row + i, count);
        store_up_to(row + i, total * scale, count);
      });
    }
  }
}

template <class T, class A, class P>
void pooled_backward_planar(const Feature& feature, const Feature& out, const GeneralMap& general,
                            const T* x, T* to, int64_t begin, int64_t end, P p, A gradient,
                            const A* k, const int32_t* channels, void* scratch) {
  const Pool& pool = general.pool;
  const Windows<A> w(pool, scratch);
  const int64_t width = pool.out[2];
  const auto add_outputs = [&](const T* channel, int64_t c, int64_t r, bool first) {
    const RowWindow window = w.of_outputs[r];
    pool_row(channel, pool, window, w);
    const A factor = gradient / A(window.size());
    if (channels) {  // the other channels' slope of 0 may not be that of x = 0
      for (int64_t o = 0; o < width; ++o) {
        if (channels[r * width + o] != c) w.pooled[o] = 0;
      }
    }
    for_each_vector<A>(width, [&](int64_t i, int count) AT_FUSED_LAMBDA {
      const Vec<A> each = factor * load_up_to<A>(k + r * width + i, count) * load(w.inverse + i) *
                          p.slope(load(w.pooled + i));
      store(w.sum + i, first ? each : load(w.sum + i) + each);
    });
  };
  for (int64_t c = begin; c < end; ++c) {
    const T* channel = x + c * feature.line;
    RowWindow before{{-1, -1}, {-1, -1}};
    for (int64_t r = 0; r < int64_t(pool.in[0]) * pool.in[1]; ++r) {
      const RowWindow outputs = w.of_inputs[r];
      if (!(outputs == before)) {  // rows of one window are alike
        before = outputs;
        bool first = true;
        for (int64_t d = outputs.d.begin; d < outputs.d.end; ++d) {
          for (int64_t h = outputs.h.begin; h < outputs.h.end; ++h, first = false) {
            add_outputs(channel, c, d * pool.out[1] + h, first);
          }
        }
        expand_row(pool, w);
      }
      T* line = to + c * out.line + r * pool.in[2];
      for_each_vector<A>(pool.in[2], [&](int64_t i, int count) AT_FUSED_LAMBDA {
        store_up_to(line + i, load(w.expanded + i), count);
      });
    }
  }
}

// The mean of one window of positions, for up to `count` channels from x on.
template <class T, class A>
AT_FUSED_INLINE Vec<A> pool_channels(const T* x, int64_t line, const Pool& pool,
                                     const RowWindow& window, Range columns, A mean, int count) {
  Vec<A> total = {};
  for (int32_t d = window.d.begin; d < window.d.end; ++d) {
    for (int32_t h = window.h.begin; h < window.h.end; ++h) {
      const T* from = x + ((d * pool.in[1] + h) * int64_t(pool.in[2]) + columns.begin) * line;
      for (int32_t i = 0; i < columns.size(); ++i, from += line) {
        total += load_up_to<A>(from, count);
      }
    }
  }
  return total * mean;
}

template <class T, class A, class P>
void pooled_map_interleaved(const Feature& feature, const GeneralMap& general, const T* x,
                            int64_t begin, int64_t end, P p, A* map, int32_t* channels,
                            void* scratch) {
  const Pool& pool = general.pool;
  const Windows<A> w(pool, scratch);
  const int64_t out = pool.out[2];
  for (int64_t r = begin / out; r < end / out; ++r) {
    const RowWindow window = w.of_outputs[r];
    // f(c, x') for the pooled channels of a position.
    const auto for_each_channel = [&](int64_t o, auto f) AT_FUSED_LAMBDA {
      const A mean = w.inverse[o] / A(window.size());
      for_each_vector<A>(feature.C, [&](int64_t c, int count) AT_FUSED_LAMBDA {
        f(c, pool_channels<T, A>(x + c, feature.line, pool, window, w.columns[o], mean, count));
      });
    };
    for_each_vector<A>(out, [&](int64_t i, int count) AT_FUSED_LAMBDA {
      A* to = map + (r * out - begin) + i;
      if (general.max) {
        store_best(count, to, channels + (r * out - begin) + i, [&](int j) AT_FUSED_LAMBDA {
          Best<A> best;
          for_each_channel(i + j, [&](int64_t c, Vec<A> pooled)
                                      AT_FUSED_LAMBDA { best.offer(pooled, index<A>(c, 1)); });
          return best;
        });
        return;
      }
      Vec<A> totals[lanes<A>] = {};
      for (int j = 0; j < count; ++j) {
        for_each_channel(
            i + j, [&](int64_t, Vec<A> pooled) AT_FUSED_LAMBDA { totals[j] += p.power(pooled); });
      }
      store_up_to(to, sum_each<A>(totals) * A(general.scale), count);
    });
  }
}

template <class T, class A, class P>
void pooled_backward_interleaved(const Feature& feature, const Feature& out,
                                 const GeneralMap& general, const T* x, T* to, int64_t begin,
                                 int64_t end, P p, A gradient, const A* k, const int32_t* channels,
                                 void* scratch) {
  const Pool& pool = general.pool;
  const Windows<A> w(pool, scratch);
  const int64_t C = feature.C;
  const auto add_outputs = [&](int64_t r, bool first) {
    const RowWindow window = w.of_outputs[r];
    for (int64_t o = 0; o < pool.out[2]; ++o) {
      const int64_t m = r * pool.out[2] + o;
      const A mean = w.inverse[o] / A(window.size());
      const A factor = gradient * k[m] * mean;
      for_each_vector<A>(C, [&](int64_t c, int count) AT_FUSED_LAMBDA {
        Vec<A> each = factor * p.slope(pool_channels<T, A>(x + c, feature.line, pool, window,
                                                           w.columns[o], mean, count));
        if (channels) {
          each = select(index<A>(c, 1) == index<A>(channels[m], 0), each, Vec<A>{});
        }
        A* sum = w.rest + o * C + c;
        store_up_to(sum, first ? each : load_up_to<A>(sum, count) + each, count);
      });
    }
  };
  RowWindow before{{-1, -1}, {-1, -1}};
  for (int64_t n = begin; n < end; n += pool.in[2]) {
    const RowWindow outputs = w.of_inputs[n / pool.in[2]];
    if (!(outputs == before)) {  // rows of one window are alike
      before = outputs;
      bool first = true;
      for (int64_t d = outputs.d.begin; d < outputs.d.end; ++d) {
        for (int64_t h = outputs.h.begin; h < outputs.h.end; ++h, first = false) {
          add_outputs(d * pool.out[1] + h, first);
        }
      }
    }
    for (int64_t i = 0; i < pool.in[2]; ++i) {
      const Range back = w.columns_back[i];
      for_each_vector<A>(C, [&](int64_t c, int count) AT_FUSED_LAMBDA {
        Vec<A> total = load_up_to<A>(w.rest + back.begin * C + c, count);
        for (int32_t o = back.begin + 1; o < back.end; ++o) {
          total += load_up_to<A>(w.rest + o * C + c, count);
        }
        store_up_to(to + (n + i) * out.line + c, total, count);
      });
    }
  }
}

// ---- the table --------------------------------------------------------------------------------

void general_map(const Feature& feature, const GeneralMap& general, int64_t b, int64_t begin,
                 int64_t end, void* map, int32_t* channels, void* scratch) {
  with_dtype(feature.dtype, [&](auto element, auto accumulator) {
    using T = decltype(element);
    using A = decltype(accumulator);
    const bool planar = feature.layout == Layout::planar, pools = general.pool.pools();
    const T* x = static_cast<const T*>(feature.data) + b * feature.batch;
    A* out = static_cast<A*>(map) + begin;
    channels = general.max ? channels + begin : nullptr;
    with_few_exponents<A>(general, [&](auto exponent) {
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
    with_few_exponents<A>(general, [&](auto exponent) {
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

}  // namespace
}  // namespace at_fused
