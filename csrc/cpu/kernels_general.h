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

// The winner among lanes that hold every lanes<A>-th channel each.
template <class A>
AT_FUSED_INLINE void store_best(const Best<A>& best, A* value, int32_t* channel) {
  A largest = best.value[0];
  auto winner = best.channel[0];
  for (int i = 1; i < lanes<A>; ++i) {
    const A v = best.value[i];
    const bool nan = v != v, nan_before = largest != largest, earlier = best.channel[i] < winner;
    if (nan ? !nan_before || earlier : v > largest || (v == largest && earlier)) {
      largest = v;
      winner = best.channel[i];
    }
  }
  *value = largest;
  *channel = int32_t(winner);
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
  for (int64_t i = 0; i < n; ++i, x += line) {
    // What a partial vector has behind the last channel is 0, and later than a channel's own 0.
    Best<A> best;
    for_each_vector<A>(C, [&](int64_t c, int count) AT_FUSED_LAMBDA {
      best.offer(load_up_to<A>(x + c, count), index<A>(c, 1));
    });
    store_best(best, value + i, channel + i);
  }
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
  int64_t begin, end;
  int64_t size() const { return end - begin; }
  bool operator==(const Range& other) const { return begin == other.begin && end == other.end; }
};

// What output o is the mean of, and which outputs input i is part of.
inline Range inputs_of(int64_t o, int64_t in, int64_t out) {
  return {o * in / out, ((o + 1) * in + out - 1) / out};
}
inline Range outputs_of(int64_t i, int64_t in, int64_t out) {
  return {i * out / in, ((i + 1) * out + in - 1) / in};
}

// The two outer dimensions' part in a row of outputs or inputs.
struct RowWindow {
  Range d, h;
  bool operator==(const RowWindow& other) const { return d == other.d && h == other.h; }
};
inline RowWindow inputs_of_row(int64_t row, const Pool& pool) {
  return {inputs_of(row / pool.out[1], pool.in[0], pool.out[0]),
          inputs_of(row % pool.out[1], pool.in[1], pool.out[1])};
}
inline RowWindow outputs_of_row(int64_t row, const Pool& pool) {
  return {outputs_of(row / pool.in[1], pool.in[0], pool.out[0]),
          outputs_of(row % pool.in[1], pool.in[1], pool.out[1])};
}

// What the planar kernels keep of the last dimension, in the caller's scratch.
template <class A>
struct Row {
  int64_t in, out;
  A *wide, *expanded;         // in elements: sums over the outer dimensions
  A *pooled, *sum, *inverse;  // out elements; `inverse` is 1 / window
  int32_t *begin, *end;       // windows

  Row(const Pool& pool, void* scratch) : in(pool.in[2]), out(pool.out[2]) {
    double* at = static_cast<double*>(scratch);
    const auto take = [&](int64_t n) {
      double* taken = at;
      at += n;
      return taken;
    };
    wide = reinterpret_cast<A*>(take(in));
    expanded = reinterpret_cast<A*>(take(in));
    pooled = reinterpret_cast<A*>(take(out));
    sum = reinterpret_cast<A*>(take(out));
    inverse = reinterpret_cast<A*>(take(out));
    begin = reinterpret_cast<int32_t*>(take(out));
    end = begin + out;
    for (int64_t o = 0; o < out; ++o) {
      const Range window = inputs_of(o, in, out);
      begin[o] = int32_t(window.begin);
      end[o] = int32_t(window.end);
      inverse[o] = A(1) / A(window.size());
    }
  }
};

// One channel's row of outputs.
template <class T, class A>
AT_FUSED_INLINE void pool_row(const T* x, const Pool& pool, const RowWindow& window, Row<A>& row) {
  const int64_t in = row.in, out = row.out;
  bool first = true;
  for (int64_t d = window.d.begin; d < window.d.end; ++d) {
    for (int64_t h = window.h.begin; h < window.h.end; ++h, first = false) {
      const T* line = x + (d * pool.in[1] + h) * in;
      for_each_vector<A>(in, [&](int64_t i, int count) AT_FUSED_LAMBDA {
        const Vec<A> value = load_up_to<A>(line + i, count);
        store_up_to(row.wide + i, first ? value : load_up_to<A>(row.wide + i, count) + value,
                    count);
      });
    }
  }
  const A mean = A(1) / A(window.d.size() * window.h.size());
  for (int64_t o = 0; o < out; ++o) {
    A total = row.wide[row.begin[o]];
    for (int32_t i = row.begin[o] + 1; i < row.end[o]; ++i) total += row.wide[i];
    row.pooled[o] = total * (mean * row.inverse[o]);
  }
}

template <class T, class A, class P>
void pooled_map_planar(const Feature& feature, const GeneralMap& general, const T* x, int64_t begin,
                       int64_t end, P p, A* map, int32_t* channels, void* scratch) {
  Row<A> row(general.pool, scratch);
  for (int64_t c = 0; c < feature.C; ++c, x += feature.line) {
    const A scale = c + 1 == feature.C ? A(general.scale) : A(1);
    for (int64_t at = begin; at < end; at += row.out) {
      pool_row(x, general.pool, inputs_of_row(at / row.out, general.pool), row);
      A* out = map + (at - begin);
      if (general.max) {
        offer_channels<1>(row.pooled, 0, row.out, c, out, channels + (at - begin));
        continue;
      }
      for_each_vector<A>(row.out, [&](int64_t i, int count) AT_FUSED_LAMBDA {
        Vec<A> total = p.power(load_up_to<A>(row.pooled + i, count));
        if (c > 0) total += load_up_to<A>(out + i, count);
        store_up_to(out + i, total * scale, count);
      });
    }
  }
}

template <class T, class A, class P>
void pooled_backward_planar(const Feature& feature, const Feature& out, const GeneralMap& general,
                            const T* x, T* to, int64_t begin, int64_t end, P p, A gradient,
                            const A* k, const int32_t* channels, void* scratch) {
  const Pool& pool = general.pool;
  Row<A> row(pool, scratch);
  const auto add_outputs = [&](const T* channel, int64_t c, int64_t r) {
    const RowWindow window = inputs_of_row(r, pool);
    pool_row(channel, pool, window, row);
    const A factor = gradient / A(window.d.size() * window.h.size());
    const A* coefficients = k + r * row.out;
    for_each_vector<A>(row.out, [&](int64_t i, int count) AT_FUSED_LAMBDA {
      const Vec<A> each = factor * load_up_to<A>(coefficients + i, count) *
                          load_up_to<A>(row.inverse + i, count) *
                          p.slope(load_up_to<A>(row.pooled + i, count));
      store_up_to(row.pooled + i, each, count);
    });
    for (int64_t o = 0; o < row.out; ++o) {
      if (!channels || channels[r * row.out + o] == c) row.sum[o] += row.pooled[o];
    }
  };
  for (int64_t c = begin; c < end; ++c) {
    const T* channel = x + c * feature.line;
    RowWindow before{{-1, -1}, {-1, -1}};
    for (int64_t r = 0; r < int64_t(pool.in[0]) * pool.in[1]; ++r) {
      const RowWindow outputs = outputs_of_row(r, pool);
      if (!(outputs == before)) {  // rows of one window are alike
        before = outputs;
        for (int64_t o = 0; o < row.out; ++o) row.sum[o] = 0;
        for (int64_t d = outputs.d.begin; d < outputs.d.end; ++d) {
          for (int64_t h = outputs.h.begin; h < outputs.h.end; ++h) {
            add_outputs(channel, c, d * pool.out[1] + h);
          }
        }
        for (int64_t i = 0; i < row.in; ++i) row.expanded[i] = 0;
        for (int64_t o = 0; o < row.out; ++o) {
          for (int32_t i = row.begin[o]; i < row.end[o]; ++i) row.expanded[i] += row.sum[o];
        }
      }
      T* line = to + c * out.line + r * row.in;
      for_each_vector<A>(row.in, [&](int64_t i, int count) AT_FUSED_LAMBDA {
        store_up_to(line + i, load_up_to<A>(row.expanded + i, count), count);
      });
    }
  }
}

// The mean of one window of positions, for up to `count` channels from x on.
template <class T, class A>
AT_FUSED_INLINE Vec<A> pool_channels(const T* x, int64_t line, const Pool& pool,
                                     const RowWindow& window, const Range& w, A mean, int count) {
  Vec<A> total = {};
  for (int64_t d = window.d.begin; d < window.d.end; ++d) {
    for (int64_t h = window.h.begin; h < window.h.end; ++h) {
      const T* from = x + ((d * pool.in[1] + h) * pool.in[2] + w.begin) * line;
      for (int64_t i = 0; i < w.size(); ++i, from += line) total += load_up_to<A>(from, count);
    }
  }
  return total * mean;
}

template <class T, class A, class P>
void pooled_map_interleaved(const Feature& feature, const GeneralMap& general, const T* x,
                            int64_t begin, int64_t end, P p, A* map, int32_t* channels) {
  const Pool& pool = general.pool;
  for (int64_t m = begin; m < end; ++m) {
    const RowWindow window = inputs_of_row(m / pool.out[2], pool);
    const Range w = inputs_of(m % pool.out[2], pool.in[2], pool.out[2]);
    const A mean = A(1) / A(window.d.size() * window.h.size() * w.size());
    Vec<A> total = {};
    Best<A> best;
    for_each_vector<A>(feature.C, [&](int64_t c, int count) AT_FUSED_LAMBDA {
      const Vec<A> pooled = pool_channels<T, A>(x + c, feature.line, pool, window, w, mean, count);
      if (general.max) {
        best.offer(pooled, index<A>(c, 1));
      } else {
        total += p.power(pooled);
      }
    });
    if (general.max) {
      store_best(best, map + (m - begin), channels + (m - begin));
    } else {
      map[m - begin] = sum<A>(total) * A(general.scale);
    }
  }
}

template <class T, class A, class P>
void pooled_backward_interleaved(const Feature& feature, const Feature& out,
                                 const GeneralMap& general, const T* x, T* to, int64_t begin,
                                 int64_t end, P p, A gradient, const A* k, const int32_t* channels,
                                 A* sums) {
  const Pool& pool = general.pool;
  const int64_t C = feature.C;
  const auto add_outputs = [&](int64_t r, bool first) {
    const RowWindow window = inputs_of_row(r, pool);
    for (int64_t o = 0; o < pool.out[2]; ++o) {
      const int64_t m = r * pool.out[2] + o;
      const Range w = inputs_of(o, pool.in[2], pool.out[2]);
      const A mean = A(1) / A(window.d.size() * window.h.size() * w.size());
      const A factor = gradient * k[m] * mean;
      for_each_vector<A>(C, [&](int64_t c, int count) AT_FUSED_LAMBDA {
        Vec<A> each = factor * p.slope(pool_channels<T, A>(x + c, feature.line, pool, window, w,
                                                           mean, count));
        if (channels) each = select(index<A>(c, 1) == index<A>(channels[m], 0), each, Vec<A>{});
        A* sum = sums + o * C + c;
        store_up_to(sum, first ? each : load_up_to<A>(sum, count) + each, count);
      });
    }
  };
  RowWindow before{{-1, -1}, {-1, -1}};
  for (int64_t n = begin; n < end; n += pool.in[2]) {
    const RowWindow outputs = outputs_of_row(n / pool.in[2], pool);
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
      const Range o = outputs_of(i, pool.in[2], pool.out[2]);
      for_each_vector<A>(C, [&](int64_t c, int count) AT_FUSED_LAMBDA {
        Vec<A> total = load_up_to<A>(sums + o.begin * C + c, count);
        for (int64_t j = o.begin + 1; j < o.end; ++j) {
          total += load_up_to<A>(sums + j * C + c, count);
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
        pooled_map_interleaved(feature, general, x, begin, end, exponent, out, channels);
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
                                    map, channels, static_cast<A*>(scratch));
      }
    });
  });
}

}  // namespace
}  // namespace at_fused
