// Squared distances.
#pragma once

#include <cmath>

#include "elements.h"
#include "kernels.h"

namespace at_fused {
namespace {

// The squares of vectors, added up in fp64: those of fp32 overflow from 2e19 on.
struct Squares {
  Vec<double> sums[4] = {};

  AT_FUSED_INLINE void add(int u, Vec<double> d) { sums[u] += d * d; }
  AT_FUSED_INLINE void add(int u, Vec<float> d) {
    const Halves halves = bit_cast<Halves>(d);
    add(2 * u, __builtin_convertvector(halves.low, Vec<double>));
    add(2 * u + 1, __builtin_convertvector(halves.high, Vec<double>));
  }
  AT_FUSED_INLINE double total() const {
    return sum<double>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
};

template <class A>
double squared_distance_of(const void* a, Dtype a_dtype, const void* b, Dtype b_dtype, int64_t n) {
  alignas(64) A a_buffer[kTile], b_buffer[kTile];
  Squares squares;
  for (int64_t at = 0; at < n; at += kTile) {
    const int count = int(n - at < kTile ? n - at : kTile);
    const A* x = read_tile(a, a_dtype, at, count, a_buffer);
    const A* y = read_tile(b, b_dtype, at, count, b_buffer);
    constexpr int width = lanes<A>, vectors = 4 * lanes<double> / width;
    int i = 0;
    for (; i + vectors * width <= count; i += vectors * width) {
#pragma GCC unroll 4
      for (int u = 0; u < vectors; ++u) {
        squares.add(u, load(x + i + u * width) - load(y + i + u * width));
      }
    }
    for_each_vector(x + i, y + i, count - i, A(0),
                    [&](Vec<A> s, Vec<A> t, int, int) AT_FUSED_LAMBDA { squares.add(0, s - t); });
  }
  return squares.total();
}

template <class A>
void squared_distance_backward_of(const void* a, Dtype a_dtype, const void* b, Dtype b_dtype,
                                  int64_t n, double factor, void* out) {
  // In two factors: either is within fp32's range where the product with a - b is.
  const A first = A(factor == 0 ? 1 : std::sqrt(std::fabs(factor))), second = A(factor / first);
  alignas(64) A a_buffer[kTile], b_buffer[kTile], out_buffer[kTile];
  for (int64_t at = 0; at < n; at += kTile) {
    const int count = int(n - at < kTile ? n - at : kTile);
    const A* x = read_tile(a, a_dtype, at, count, a_buffer);
    const A* y = read_tile(b, b_dtype, at, count, b_buffer);
    A* to = begin_tile(out, a_dtype, at, out_buffer);
    for_each_vector(x, y, count, A(0), [&](Vec<A> s, Vec<A> t, int i, int left) AT_FUSED_LAMBDA {
      const Vec<A> gradient = ((s - t) * first) * second;
      left == lanes<A> ? store(to + i, gradient) : store_partial(to + i, gradient, left);
    });
    end_tile(out, a_dtype, at, count, to);
  }
}

double squared_distance(const void* a, Dtype a_dtype, const void* b, Dtype b_dtype, int64_t n) {
  return computes_fp64(a_dtype, b_dtype) ? squared_distance_of<double>(a, a_dtype, b, b_dtype, n)
                                         : squared_distance_of<float>(a, a_dtype, b, b_dtype, n);
}

void squared_distance_backward(const void* a, Dtype a_dtype, const void* b, Dtype b_dtype,
                               int64_t n, double factor, void* out) {
  if (computes_fp64(a_dtype, b_dtype)) {
    squared_distance_backward_of<double>(a, a_dtype, b, b_dtype, n, factor, out);
  } else {
    squared_distance_backward_of<float>(a, a_dtype, b, b_dtype, n, factor, out);
  }
}

}  // namespace
}  // namespace at_fused
