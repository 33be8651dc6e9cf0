// Features that are pooled before the power, and the way back.
#pragma once

#include "kernels_max.h"

namespace at_fused {
namespace {

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
  return shuffle<(2 * i)...>(a, b) + shuffle<(2 * i + 1)...>(a, b);
}
template <class A, int... i>
AT_FUSED_INLINE void store_twice(A* to, Vec<A> v, std::integer_sequence<int, i...>) {
  store(to, shuffle<(i / 2)...>(v, v));
  store(to + lanes<A>, shuffle<((i + lanes<A>) / 2)...>(v, v));
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
    for_each_vector<A>(width, [&](int64_t i, int count) AT_FUSED_LAMBDA {
      const Vec<A> each = factor * load_up_to<A>(k + r * width + i, count) * load(w.inverse + i) *
                          p.slope(load(w.pooled + i));
      store(w.pooled + i, each);
    });
    if (channels) {  // a coefficient that is NaN reaches the channel that won, no other
      for (int64_t o = 0; o < width; ++o) {
        if (channels[r * width + o] != c) w.pooled[o] = 0;
      }
    }
    for_each_vector<A>(width, [&](int64_t i, int) AT_FUSED_LAMBDA {
      store(w.sum + i, first ? load(w.pooled + i) : load(w.sum + i) + load(w.pooled + i));
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

// f(c, x', count) for the pooled channels of the position o of a row: several vectors at a time, as
// each takes few additions for the steps around them.
template <class T, class A, class F>
AT_FUSED_INLINE void for_each_pooled(const Feature& feature, const T* x, const Pool& pool,
                                     const RowWindow& window, const Windows<A>& w, int64_t o, F f) {
  constexpr int width = lanes<A>, vectors = 4;
  const Range columns = w.columns[o];
  const A mean = w.inverse[o] / A(window.size());
  const int64_t line = feature.line;
  const auto add_window = [&](int64_t c, auto add) AT_FUSED_LAMBDA {
    for (int32_t d = window.d.begin; d < window.d.end; ++d) {
      for (int32_t h = window.h.begin; h < window.h.end; ++h) {
        const int64_t first = (d * pool.in[1] + h) * int64_t(pool.in[2]) + columns.begin;
        const T* from = x + first * line + c;
        for (int32_t i = 0; i < columns.size(); ++i, from += line) add(from);
      }
    }
  };
  int64_t c = 0;
  for (; c + vectors * width <= feature.C; c += vectors * width) {
    Vec<A> total[vectors] = {};
    add_window(c, [&](const T* from) AT_FUSED_LAMBDA {
      for (int u = 0; u < vectors; ++u) total[u] += load(from + u * width);
    });
    for (int u = 0; u < vectors; ++u) f(c + u * width, total[u] * mean, width);
  }
  for (; c < feature.C; c += width) {
    const int count = int(feature.C - c < width ? feature.C - c : width);
    Vec<A> total = {};
    add_window(c, [&](const T* from) AT_FUSED_LAMBDA { total += load_up_to<A>(from, count); });
    f(c, total * mean, count);
  }
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
    for_each_vector<A>(out, [&](int64_t i, int count) AT_FUSED_LAMBDA {
      A* to = map + (r * out - begin) + i;
      if (general.max) {
        store_best(count, to, channels + (r * out - begin) + i, [&](int j) AT_FUSED_LAMBDA {
          Best<A> best;
          for_each_pooled(feature, x, pool, window, w, i + j,
                          [&](int64_t c, Vec<A> pooled, int)
                              AT_FUSED_LAMBDA { best.offer(pooled, index<A>(c, 1)); });
          return best;
        });
        return;
      }
      Vec<A> totals[lanes<A>] = {};
      for (int j = 0; j < count; ++j) {
        Vec<A> total = {};
        for_each_pooled(feature, x, pool, window, w, i + j,
                        [&](int64_t, Vec<A> pooled, int)
                            AT_FUSED_LAMBDA { total += p.power(pooled); });
        totals[j] = total;
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
      const A factor = gradient * k[m] * (w.inverse[o] / A(window.size()));
      for_each_pooled(feature, x, pool, window, w, o,
                      [&](int64_t c, Vec<A> pooled, int count) AT_FUSED_LAMBDA {
                        Vec<A> each = factor * p.slope(pooled);
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

}  // namespace
}  // namespace at_fused
