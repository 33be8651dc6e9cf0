// The CPU kernels, once for every instruction-set level: kernels_*.cpp choose the level and include
// this file. A position's value never depends on where a tile begins or ends, so that results are
// the same bits for any number of threads: a partial vector does the arithmetic of a full one.
#pragma once

#include <cmath>
#include <type_traits>

#include "kernels.h"
#include "simd.h"

namespace at_fused {
namespace {

// ---- |x|^p and its derivative over p: |x|^(p-1) * sign(x) -------------------------------------

// 2^((p_high + p_low) * log2(x)) for x >= 0 (NaN stays), to a few units of the last place: log2(x)
// is a whole number and a small rest, and p_high is short, so that its product with the whole is
// exact.
AT_FUSED_INLINE Vec<float> positive_power(Vec<float> x, float p_high, float p_low) {
  const auto subnormal = x < 0x1p-126f;
  const Vec<float> scaled = select(subnormal, x * 0x1p24f, x);
  const Word bits = bit_cast<Word>(scaled);
  // Mantissa in [sqrt(1/2), sqrt(2)): the offset moves the split of the exponent there.
  const Word shifted = bits - 0x3f3504f3u;
  const VectorOf<int32_t, lanes<float>>::type whole =
      (VectorOf<int32_t, lanes<float>>::type)shifted >> 23;
  const Vec<float> mantissa = bit_cast<Vec<float>>(bits - ((Word)whole << 23));
  const Vec<float> exponent =
      __builtin_convertvector(whole, Vec<float>) - select(subnormal, splat(24.0f), Vec<float>{});
  const Vec<float> s = (mantissa - 1) / (mantissa + 1);
  const Vec<float> z = s * s;
  const Vec<float> log2_mantissa =
      s * (2.88539008f +
           z * (0.961796694f + z * (0.577078016f + z * (0.412198583f + z * 0.320598898f))));

  const Vec<float> tail = (p_high + p_low) * log2_mantissa + p_low * exponent;
  Vec<float> y = p_high * exponent + tail;
  y = select(y > 192.0f, splat(192.0f), y);
  y = select(y < -192.0f, splat(-192.0f), y);
  const Vec<float> rounded = (y + 0x1.8p23f) - 0x1.8p23f;
  // The large product cancels before the small part is added: no digit of it is lost.
  Vec<float> f = (p_high * exponent - rounded) + tail;
  f = select(absolute(y) >= 192.0f, Vec<float>{}, f);
  const Vec<float> e =
      1 + f * (0.693147181f +
               f * (0.240226507f +
                    f * (0.0555041087f +
                         f * (0.00961812911f + f * (0.00133335581f + f * (0.000154035304f +
                                                                          f * 1.52527338e-05f))))));
  // 2^rounded in two factors, so that the result may be subnormal or infinite.
  const auto n = __builtin_convertvector(rounded, VectorOf<int32_t, lanes<float>>::type);
  const auto low = n >> 1;
  const Vec<float> power =
      e * bit_cast<Vec<float>>((low + 127) << 23) * bit_cast<Vec<float>>((n - low + 127) << 23);
  const auto edge = (x == 0) | (x != x) | (x == __builtin_inff());
  return select(edge, x, power);
}

AT_FUSED_INLINE Vec<double> positive_power(Vec<double> x, double p_high, double p_low) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = std::pow(x[i], p_high + p_low);
  return x;
}

template <class V>
AT_FUSED_INLINE V signed_like(V magnitude, V x) {
  const auto sign = bit_cast<MaskOf<V>>(-V{});
  const V value =
      bit_cast<V>((bit_cast<MaskOf<V>>(magnitude) & ~sign) | (bit_cast<MaskOf<V>>(x) & sign));
  return select((x == 0) | (x != x), x, value);  // sign(0) = 0, and a NaN is not hidden
}

// One exponent p each: `power` is |x|^p, `slope` is |x|^(p-1) * sign(x).
template <class A>
struct One {
  explicit One(double) {}
  AT_FUSED_INLINE Vec<A> power(Vec<A> x) const { return absolute(x); }
  AT_FUSED_INLINE Vec<A> slope(Vec<A> x) const { return signed_like(splat(A(1)), x); }
};

template <class A>
struct Two {
  explicit Two(double) {}
  AT_FUSED_INLINE Vec<A> power(Vec<A> x) const { return x * x; }
  AT_FUSED_INLINE Vec<A> slope(Vec<A> x) const { return x; }
};

template <class A>
struct Four {
  explicit Four(double) {}
  AT_FUSED_INLINE Vec<A> power(Vec<A> x) const { return (x * x) * (x * x); }
  AT_FUSED_INLINE Vec<A> slope(Vec<A> x) const { return (x * x) * x; }
};

// x^p with its sign, for an odd p: few are small enough to be asked for, none needs logarithms.
template <class A>
struct Odd {
  int64_t p;
  explicit Odd(double exponent) : p(int64_t(exponent < 1e6 ? exponent : 1e6 + 1)) {}
  AT_FUSED_INLINE Vec<A> power(Vec<A> x) const { return x * slope(x); }
  AT_FUSED_INLINE Vec<A> slope(Vec<A> x) const {
    Vec<A> y = splat(A(1));
    const Vec<A> square = x * x;
    for (int64_t i = 1; i < p; i += 2) y *= square;
    return y;
  }
};

// The part of p in 12 bits; the exponents that it multiplies have 8.
inline float short_part(double p, float) {
  return bit_cast<float>(bit_cast<uint32_t>(float(p)) & 0xfffff000u);
}
inline double short_part(double p, double) { return p; }

template <class A>
struct AnyExponent {
  A p, p_low, slope_p, slope_p_low;
  explicit AnyExponent(double exponent)
      : p(short_part(exponent, A())),
        p_low(A(exponent - p)),
        slope_p(short_part(exponent - 1, A())),
        slope_p_low(A(exponent - 1 - slope_p)) {}
  AT_FUSED_INLINE Vec<A> power(Vec<A> x) const { return positive_power(absolute(x), p, p_low); }
  AT_FUSED_INLINE Vec<A> slope(Vec<A> x) const {
    return signed_like(positive_power(absolute(x), slope_p, slope_p_low), x);
  }
};

// ---- forward: the attention map of one sample -------------------------------------------------

// The hardware runs ahead in a row, but not into the next ones: these are asked for in time, in the
// order in which they lie, for the second-level cache.
struct Ahead {
  int64_t distance = 0, step = 0;  // bytes, from the rows at work and for each step through them

  Ahead() = default;
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
  const auto block = [&](auto&& read_channel, Vec<A> before) AT_FUSED_LAMBDA {
    Vec<A> total = p.power(read_channel(x));
    for (int r = 1; r < rows; ++r) total += p.power(read_channel(x + r * line));
    return (before + total) * scale;
  };
  int64_t i = 0;
  for (; i + 2 * width <= n; i += 2 * width) {
    for (const char* end = next + ahead.step; next < end; next += kCacheLine) {
      __builtin_prefetch(next, 0, 2);
    }
    Both<Vec<A>> totals{};
    for (int r = 0; r < rows; ++r) {
      const Both<Vec<A>> channel = load_both(x + r * line + i);
      totals.low = r == 0 ? p.power(channel.low) : totals.low + p.power(channel.low);
      totals.high = r == 0 ? p.power(channel.high) : totals.high + p.power(channel.high);
    }
    store(map + i, ((first ? Vec<A>{} : load(map + i)) + totals.low) * scale);
    store(map + i + width, ((first ? Vec<A>{} : load(map + i + width)) + totals.high) * scale);
  }
  for (; i + width <= n; i += width) {
    store(map + i, block([&](const T* c) AT_FUSED_LAMBDA { return load(c + i); },
                         first ? Vec<A>{} : load(map + i)));
  }
  if (const int rest = int(n - i)) {
    const Vec<A> value =
        block([&](const T* c) AT_FUSED_LAMBDA { return load_partial(c + i, rest); },
              first ? Vec<A>{} : load_partial(map + i, rest));
    store_partial(map + i, value, rest);
  }
}

template <class T, class A, class P>
void attention_map_planar(const T* x, int64_t C, int64_t line, int64_t n, P p, A scale, A* map) {
  constexpr int64_t tile = 16384 / sizeof(A);  // half of a small first-level cache
  for (int64_t i = 0; i < n; i += tile) {
    const int64_t count = n - i < tile ? n - i : tile;
    const Ahead ahead(8 * line * int64_t(sizeof(T)), count / (2 * lanes<A>));
    int64_t c = 0;
    const auto add = [&](auto rows, Ahead next) {
      for (; c + rows <= C; c += rows) {
        add_channels<rows>(x + c * line + i, line, count, p, c == 0, c + rows == C ? scale : A(1),
                           next, map + i);
      }
    };
    add(std::integral_constant<int, 8>{}, ahead);
    add(std::integral_constant<int, 4>{}, Ahead{});
    add(std::integral_constant<int, 1>{}, Ahead{});
  }
}

// The channels of one position, added up lane by lane. `vectors` is C / width where that is small
// enough to be known when compiling, else -1.
template <int vectors, class T, class A, class P>
AT_FUSED_INLINE Vec<A> add_position(const T* x, int64_t C, P p) {
  constexpr int width = lanes<A>;
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
      add_both(0, x + c);
      add_both(2, x + c + 2 * width);
    }
    for (; c + width <= C; c += width) total[0] += p.power(load(x + c));
  }
  if (const int rest = int(C - c)) total[1] += p.power(load_partial(x + c, rest));
  const Vec<A> first = total[0] + total[1];
  return vectors >= 0 && vectors <= 2 ? first : first + (total[2] + total[3]);
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
    const Vec<float> sums = alternate(sum_each<float, half>(totals)) * scale;
    count == width ? store(map, sums) : store_partial(map, sums, count);
  }
}

template <int vectors, class T, class A, class P>
void attention_map_interleaved(const T* x, int64_t C, int64_t line, int64_t n, P p, A scale,
                               A* map) {
  constexpr int width = lanes<A>;
  const bool dense = vectors == 1 && C == width && line == C;
  if constexpr (vectors == 1 && std::is_same_v<T, BFloat16>) {
    if (dense) return attention_map_pairs(x, n, p, scale, map);
  }
  for (; n >= width; n -= width, map += width) {
    Vec<A> totals[width];
    if (dense) {
      for (int j = 0; j < width; j += 2, x += 2 * width) {
        const Both<Vec<A>> positions = load_both(x);
        totals[j] = p.power(positions.low), totals[j + 1] = p.power(positions.high);
      }
    } else {
      for (int j = 0; j < width; ++j, x += line) totals[j] = add_position<vectors, T, A>(x, C, p);
    }
    store(map, sum_each<A>(totals) * scale);
  }
  if (n > 0) {
    Vec<A> totals[width] = {};
    for (int j = 0; j < n; ++j, x += line) totals[j] = add_position<vectors, T, A>(x, C, p);
    store_partial(map, sum_each<A>(totals) * scale, int(n));
  }
}

template <class T, class A, class P>
void attention_map_interleaved(const T* x, int64_t C, int64_t line, int64_t n, P p, A scale,
                               A* map) {
  switch (C / lanes<A>) {
    case 0:
      return attention_map_interleaved<0, T, A>(x, C, line, n, p, scale, map);
    case 1:
      return attention_map_interleaved<1, T, A>(x, C, line, n, p, scale, map);
    case 2:
      return attention_map_interleaved<2, T, A>(x, C, line, n, p, scale, map);
    case 3:
      return attention_map_interleaved<3, T, A>(x, C, line, n, p, scale, map);
    case 4:
      return attention_map_interleaved<4, T, A>(x, C, line, n, p, scale, map);
    default:
      return attention_map_interleaved<-1, T, A>(x, C, line, n, p, scale, map);
  }
}

// ---- backward: one sweep over the features ----------------------------------------------------

// What a sweep's gradient is added to: nothing, or the line of another one.
struct Nothing {
  Nothing line(int64_t) const { return {}; }
  bool follows(int64_t) const { return true; }
  template <class V>
  AT_FUSED_INLINE V full(int64_t, V v) const {
    return v;
  }
  template <class V>
  AT_FUSED_INLINE V partial(int64_t, int, V v) const {
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
  AT_FUSED_INLINE V full(int64_t i, V v) const {
    return load(first + i) + rounded(v);
  }
  template <class V>
  AT_FUSED_INLINE V partial(int64_t i, int count, V v) const {
    return load_partial(first + i, count) + rounded(v);
  }
};

// Whether lines are written past the caches: a cache line that is not written as a whole costs more
// than many save.
template <class T>
bool streams(const T* out, int64_t line, int64_t n) {
  const uint64_t ends = reinterpret_cast<uintptr_t>(out) | line * sizeof(T) | n * sizeof(T);
  return n * sizeof(T) >= 2048 || ends % kCacheLine == 0;
}

// out = f(x, k) over one line, and what `add` has. With `stream` the aligned middle is written past
// the caches. `out` may be what is added to.
template <class T, class A, class K, class Add, class F>
AT_FUSED_INLINE void sweep_line(const T* x, T* out, int64_t n, bool stream, K k, Add add, F f) {
  constexpr int width = lanes<A>;
  int64_t i = 0;
  const auto full = [&]() AT_FUSED_LAMBDA { return add.full(i, f(load(x + i), k.full(i))); };
  const auto both = [&]() AT_FUSED_LAMBDA {
    const Both<Vec<A>> features = load_both(x + i);
    return Both<Vec<A>>{add.full(i, f(features.low, k.full(i))),
                        add.full(i + width, f(features.high, k.full(i + width)))};
  };
  const auto partial = [&](int count) {
    const Vec<A> value = f(load_partial(x + i, count), k.partial(i, count));
    store_partial(out + i, add.partial(i, count, value), count);
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

template <class A>
struct CoefficientRow {
  const A* k;
  AT_FUSED_INLINE Vec<A> full(int64_t i) const { return load(k + i); }
  AT_FUSED_INLINE Vec<A> partial(int64_t i, int count) const { return load_partial(k + i, count); }
};

template <class A>
struct CoefficientSplat {
  Vec<A> k;
  AT_FUSED_INLINE Vec<A> full(int64_t) const { return k; }
  AT_FUSED_INLINE Vec<A> partial(int64_t, int) const { return k; }
};

// Lines of one vector each, one behind the other.
template <class A>
struct CoefficientVectors {
  const A* k;
  A gradient;
  AT_FUSED_INLINE Vec<A> full(int64_t i) const { return splat(gradient * k[i / lanes<A>]); }
  AT_FUSED_INLINE Vec<A> partial(int64_t i, int) const { return full(i); }  // of a multiple: never
};

template <class T, class A, class P, class Add>
void backward_planar(const T* x, int64_t line, T* out, int64_t out_line, int64_t channels,
                     int64_t n, P p, A gradient, const A* k, bool stream, Add add) {
  stream = stream && streams(out, out_line, n);
  for (int64_t c = 0; c < channels; ++c) {
    sweep_line<T, A>(x + c * line, out + c * out_line, n, stream, CoefficientRow<A>{k}, add.line(c),
                     [&](Vec<A> a, Vec<A> kn)
                         AT_FUSED_LAMBDA { return (gradient * kn) * p.slope(a); });
  }
}

template <class T, class A, class P, class Add>
void backward_interleaved(const T* x, int64_t line, T* out, int64_t out_line, int64_t positions,
                          int64_t C, P p, A gradient, const A* k, bool stream, Add add) {
  const auto slope = [&](Vec<A> a, Vec<A> kn) AT_FUSED_LAMBDA { return kn * p.slope(a); };
  stream = stream && streams(out, out_line, C);
  if (C == lanes<A> && line == C && out_line == C && add.follows(C) && !stream) {
    const CoefficientVectors<A> all{k, gradient};
    return sweep_line<T, A>(x, out, positions * C, false, all, add.line(0), slope);
  }
  for (int64_t i = 0; i < positions; ++i) {
    sweep_line<T, A>(x + i * line, out + i * out_line, C, stream,
                     CoefficientSplat<A>{splat(gradient * k[i])}, add.line(i), slope);
  }
}

// ---- the loss of one sample -------------------------------------------------------------------

// Everything from here to the coefficients is done in fp64: maps are small, and their squares
// overflow fp32 from features of 1e10 on.
AT_FUSED_INLINE Vec<double> load_fp64(const double* from) { return load(from); }
AT_FUSED_INLINE Vec<double> load_fp64(const float* from) {
  return __builtin_convertvector(read<VectorOf<float, lanes<double>>::type>(from), Vec<double>);
}
AT_FUSED_INLINE void store_fp64(double* to, Vec<double> v) { store(to, v); }
AT_FUSED_INLINE void store_fp64(float* to, Vec<double> v) {
  const auto narrowed = __builtin_convertvector(v, VectorOf<float, lanes<double>>::type);
  std::memcpy(to, &narrowed, sizeof(narrowed));
}

// f(u, s, t, i) for every vector of the two maps, i its first position; the last, partial one comes
// from padded copies. u counts 0, 1, 2, 3 and again: f may keep as many sums, since an addition
// waits for the last one.
constexpr int chains = 4;

template <class S, class T, class F>
AT_FUSED_INLINE void for_each_position(const S* student, const T* teacher, int64_t n, F f) {
  constexpr int width = lanes<double>;
  int64_t i = 0;
  for (; i + chains * width <= n; i += chains * width) {
    for (int u = 0; u < chains; ++u) {
      f(u, load_fp64(student + i + u * width), load_fp64(teacher + i + u * width), i + u * width);
    }
  }
  for (; i + width <= n; i += width) f(0, load_fp64(student + i), load_fp64(teacher + i), i);
  if (i < n) {
    S s[width] = {};
    T t[width] = {};
    copy_few<S, width / 2>(student + i, int(n - i), s);
    copy_few<T, width / 2>(teacher + i, int(n - i), t);
    f(0, load_fp64(s), load_fp64(t), i);
  }
}

// The part of v that belongs to positions below n, from position i on.
template <class A>
AT_FUSED_INLINE void store_positions(A* map, int64_t i, int64_t n, Vec<double> v) {
  constexpr int width = lanes<double>;
  if (i + width <= n) return store_fp64(map + i, v);
  A padded[width];
  store_fp64(padded, v);
  copy_few<A, width / 2>(padded, int(n - i), map + i);
}

AT_FUSED_INLINE double total(const Vec<double> (&sums)[chains]) {
  return sum<double>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// A side's divisor and what belongs to it: q = Q / divisor, and Q / norm = q * to_unit, 0 where the
// norm has no part in the divisor.
struct Divisor {
  double divisor, inverse, to_unit;

  Divisor(double norm, EpsMode mode, double eps) {
    // Written so that a NaN norm is not clamped away.
    const bool constant = norm <= (mode == EpsMode::max ? eps : 0.0);
    divisor = mode == EpsMode::add ? norm + eps : constant ? eps : norm;
    inverse = 1.0 / divisor;
    to_unit = constant ? 0.0 : mode == EpsMode::add ? divisor / norm : 1.0;
  }
};

template <class S, class T>
double sample_loss(const SampleLoss& sample, const S* student, const T* teacher, S* student_result,
                   T* teacher_result) {
  const int64_t N = sample.N;
  Vec<double> student_squares[chains] = {}, teacher_squares[chains] = {};
  for_each_position(student, teacher, N,
                    [&](int u, Vec<double> s, Vec<double> t, int64_t) AT_FUSED_LAMBDA {
                      student_squares[u] += s * s;
                      teacher_squares[u] += t * t;
                    });
  const Divisor ds(std::sqrt(total(student_squares)), sample.eps_mode, sample.eps);
  const Divisor dt(std::sqrt(total(teacher_squares)), sample.eps_mode, sample.eps);

  // A division gives a single position exactly 1, so that its loss is exactly 0; it costs too much
  // elsewhere.
  const bool single = N == 1;
  const auto normalize = [single](Vec<double> raw, const Divisor& by) AT_FUSED_LAMBDA {
    return rounded(single ? raw / by.divisor : raw * by.inverse);
  };

  // The differences are summed as such: 2 - 2 qs.qt would cancel where the maps are alike.
  Vec<double> squares[chains] = {}, along_student[chains] = {}, along_teacher[chains] = {};
  for_each_position(student, teacher, N,
                    [&](int u, Vec<double> s, Vec<double> t, int64_t) AT_FUSED_LAMBDA {
                      const Vec<double> qs = normalize(s, ds), qt = normalize(t, dt);
                      const Vec<double> difference = qs - qt;
                      squares[u] += difference * difference;
                      along_student[u] += difference * qs;
                      along_teacher[u] += difference * qt;
                    });
  const double squared_distance = total(squares);
  const double distance = std::sqrt(squared_distance);
  const bool code = sample.form == Form::code;
  const double mean = code ? sample.weight / double(N) : sample.weight;
  const double loss = mean * (code ? squared_distance : distance);

  if (student_result || teacher_result) {
    // dL/dq = slope * difference; at difference = 0 the norm of the paper's form takes 0.
    const double slope = code ? 2 * mean : distance == 0 ? 0.0 : mean / distance;
    // Where a map is divided by a constant there is nothing to project out.
    const double ps = ds.to_unit == 0 ? 0.0 : total(along_student) * ds.to_unit;
    const double pt = dt.to_unit == 0 ? 0.0 : total(along_teacher) * dt.to_unit;
    const double gs = slope * ds.inverse * sample.student_scale;
    const double gt = slope * dt.inverse * sample.teacher_scale;
    for_each_position(student, teacher, N,
                      [&](int, Vec<double> s, Vec<double> t, int64_t i) AT_FUSED_LAMBDA {
                        const Vec<double> qs = normalize(s, ds), qt = normalize(t, dt);
                        const Vec<double> difference = qs - qt;
                        if (student_result)
                          store_positions(student_result, i, N, gs * (difference - qs * ps));
                        if (teacher_result)
                          store_positions(teacher_result, i, N, gt * (qt * pt - difference));
                      });
  }
  return loss;
}

// ---- the table --------------------------------------------------------------------------------

template <class A, class F>
AT_FUSED_INLINE void with_exponent(double p, bool absolute, F f) {
  if (!absolute) {
    f(Odd<A>(p));
  } else if (p == 2) {
    f(Two<A>(p));
  } else if (p == 1) {
    f(One<A>(p));
  } else if (p == 4) {
    f(Four<A>(p));
  } else {
    f(AnyExponent<A>(p));
  }
}

template <class F>
AT_FUSED_INLINE void with_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::float32:
      return f(float{}, float{});
    case Dtype::float64:
      return f(double{}, double{});
    case Dtype::float16:
      return f(Half{}, float{});
    case Dtype::bfloat16:
      return f(BFloat16{}, float{});
  }
}

void attention_map(const Feature& feature, int64_t b, int64_t begin, int64_t end, double p,
                   bool absolute, double scale, void* map) {
  with_dtype(feature.dtype, [&](auto element, auto accumulator) {
    using T = decltype(element);
    using A = decltype(accumulator);
    const T* x = static_cast<const T*>(feature.data) + b * feature.batch;
    A* out = static_cast<A*>(map) + begin;
    with_exponent<A>(p, absolute, [&](auto exponent) {
      if (feature.layout == Layout::planar) {
        attention_map_planar<T, A>(x + begin, feature.C, feature.line, end - begin, exponent,
                                   A(scale), out);
      } else {
        attention_map_interleaved<T, A>(x + begin * feature.line, feature.C, feature.line,
                                        end - begin, exponent, A(scale), out);
      }
    });
  });
}

double sample_loss(const SampleLoss& sample) {
  const auto with_teacher = [&](auto* student, auto* result) {
    if (sample.teacher_double) {
      return sample_loss(sample, student, static_cast<const double*>(sample.teacher), result,
                         static_cast<double*>(sample.teacher_result));
    }
    return sample_loss(sample, student, static_cast<const float*>(sample.teacher), result,
                       static_cast<float*>(sample.teacher_result));
  };
  if (sample.student_double) {
    return with_teacher(static_cast<const double*>(sample.student),
                        static_cast<double*>(sample.student_result));
  }
  return with_teacher(static_cast<const float*>(sample.student),
                      static_cast<float*>(sample.student_result));
}

// The lines [begin, end) of a sample, added to what `add` has of them.
template <class T, class A, class P, class Add>
void backward_lines(const Feature& feature, const Feature& out, int64_t b, int64_t begin,
                    int64_t end, P p, A gradient, const A* k, bool stream, Add add) {
  const T* x = static_cast<const T*>(feature.data) + b * feature.batch + begin * feature.line;
  T* to = static_cast<T*>(const_cast<void*>(out.data)) + b * out.batch + begin * out.line;
  if (feature.layout == Layout::planar) {
    backward_planar<T, A>(x, feature.line, to, out.line, end - begin, feature.N, p, gradient, k,
                          stream, add);
  } else {
    backward_interleaved<T, A>(x, feature.line, to, out.line, end - begin, feature.C, p, gradient,
                               k + begin, stream, add);
  }
}

void attention_map_backward(const Feature& feature, int64_t b, int64_t begin, int64_t end, double p,
                            bool absolute, double gradient, const void* k, const Feature& out,
                            bool stream) {
  with_dtype(feature.dtype, [&](auto element, auto accumulator) {
    using T = decltype(element);
    using A = decltype(accumulator);
    with_exponent<A>(p, absolute, [&](auto exponent) {
      backward_lines<T, A>(feature, out, b, begin, end, exponent, A(gradient),
                           static_cast<const A*>(k), stream, Nothing{});
    });
  });
  if (stream) streaming_fence();
}

}  // namespace
}  // namespace at_fused
