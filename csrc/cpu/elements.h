// Rows of elements of any dtype, in tiles of the dtype that they are computed in: one kernel for
// all dtypes.
#pragma once

#include "numbers.h"

namespace at_fused {
namespace {

constexpr int kTile = 512;  // elements; a multiple of every vector's

template <class T>
AT_FUSED_INLINE void widen_tile(const T* from, int n, float* to) {
  constexpr int width = lanes<float>;
  int i = 0;
  for (; i + width <= n; i += width) store(to + i, load(from + i));
  if (i < n) store(to + i, load_partial(from + i, n - i));
}

template <class T>
AT_FUSED_INLINE void narrow_tile(const float* from, int n, T* to) {
  constexpr int width = lanes<float>;
  int i = 0;
  for (; i + width <= n; i += width) store(to + i, load(from + i));
  if (i < n) store_partial(to + i, load(from + i), n - i);
}

// Elements [at, at + n) of a row: where they lie, or converted in `buffer` (kTile elements).
inline const float* read_tile(const void* row, Dtype dtype, int64_t at, int n, float* buffer) {
  switch (dtype) {
    case Dtype::float32:
      return static_cast<const float*>(row) + at;
    case Dtype::float16:
      widen_tile(static_cast<const Half*>(row) + at, n, buffer);
      return buffer;
    case Dtype::bfloat16:
      widen_tile(static_cast<const BFloat16*>(row) + at, n, buffer);
      return buffer;
    case Dtype::float64:  // never read as float
      break;
  }
  return buffer;
}

inline const double* read_tile(const void* row, Dtype dtype, int64_t at, int n, double* buffer) {
  if (dtype == Dtype::float64) return static_cast<const double*>(row) + at;
  float narrow[kTile];
  const float* from = read_tile(row, dtype, at, n, narrow);
  for (int i = 0; i < n; ++i) buffer[i] = from[i];
  return buffer;
}

// Where elements [at, at + n) of a row are to be written: in place, or first in `buffer`.
template <class A>
inline A* begin_tile(void* row, Dtype dtype, int64_t at, A* buffer) {
  const bool own = dtype == (sizeof(A) == 8 ? Dtype::float64 : Dtype::float32);
  return own ? static_cast<A*>(row) + at : buffer;
}

inline void end_tile(void* row, Dtype dtype, int64_t at, int n, const float* buffer) {
  if (dtype == Dtype::float16) narrow_tile(buffer, n, static_cast<Half*>(row) + at);
  if (dtype == Dtype::bfloat16) narrow_tile(buffer, n, static_cast<BFloat16*>(row) + at);
}

inline void end_tile(void* row, Dtype dtype, int64_t at, int n, const double* buffer) {
  if (dtype == Dtype::float64) return;
  float narrow[kTile];
  float* to = begin_tile(row, dtype, at, narrow);
  for (int i = 0; i < n; ++i) to[i] = float(buffer[i]);
  end_tile(row, dtype, at, n, to);
}

// Whether two dtypes are computed in fp64.
inline bool computes_fp64(Dtype a, Dtype b) { return a == Dtype::float64 || b == Dtype::float64; }

// Whether a lane is one of the first `count`.
template <class A>
AT_FUSED_INLINE MaskOf<Vec<A>> first_lanes(int count) {
  MaskOf<Vec<A>> lane;
  for (int i = 0; i < lanes<A>; ++i) lane[i] = i;
  return lane < count;
}

// The first `count` elements, `fill` behind them.
template <class A>
AT_FUSED_INLINE Vec<A> load_filled(const A* from, int count, A fill) {
  return select(first_lanes<A>(count), load_partial(from, count), splat(fill));
}

// f(a, b, i, count) for every vector of two tiles: `count` elements from i on, `fill` behind them.
template <class A, class F>
AT_FUSED_INLINE void for_each_vector(const A* a, const A* b, int n, A fill, F f) {
  constexpr int width = lanes<A>;
  int i = 0;
  for (; i + width <= n; i += width) f(load(a + i), load(b + i), i, width);
  if (i < n) f(load_filled(a + i, n - i, fill), load_filled(b + i, n - i, fill), i, n - i);
}

struct Halves {
  VectorOf<float, lanes<double>>::type low, high;
};

// The sums of pairs of lanes in fp64.
AT_FUSED_INLINE Vec<double> wide(Vec<double> v) { return v; }
AT_FUSED_INLINE Vec<double> wide(Vec<float> v) {
  const auto halves = bit_cast<Halves>(v);
  return __builtin_convertvector(halves.low, Vec<double>) +
         __builtin_convertvector(halves.high, Vec<double>);
}

}  // namespace
}  // namespace at_fused
