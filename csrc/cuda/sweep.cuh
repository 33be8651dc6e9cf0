// The gradient of a sample, or of a piece of it: out = g * k[n] * |x|^(p-1) * sign(x), or what it
// is added to plus that.
#pragma once

#include "block.cuh"
#include "numbers.cuh"

namespace at_fused {

// Where a sweep reads, writes and how far it goes: rows and columns of vectors as in Access.
struct Span {
  int32_t row_begin, row_end;
  int32_t column_begin, column_end;
};

__device__ inline int rows_of(const View& x) {
  return x.layout == Layout::planar ? x.C / x.access.channels_per_row : x.N;
}
__device__ inline int columns_of(const View& x) {
  return (x.layout == Layout::planar ? x.N * x.access.channels_per_row : x.C) / x.access.vector;
}

__device__ inline Span span_of(const View& x, const Sweep& sweep, int piece) {
  const int row = piece / sweep.column_pieces * sweep.rows;
  const int column = piece % sweep.column_pieces * sweep.columns;
  return {row, min(row + sweep.rows, rows_of(x)), column,
          min(column + sweep.columns, columns_of(x))};
}

// The rows of a sample, as its feature is read.
template <class T>
struct Rows {
  T* data;
  int64_t line;

  __device__ __forceinline__ Rows(const void* tensor, int64_t batch, int64_t line, const View& x,
                                  int64_t b)
      : data(static_cast<T*>(const_cast<void*>(tensor)) + b * batch),
        line(line * x.access.channels_per_row) {}
  __device__ __forceinline__ Rows(T* data, int64_t line) : data(data), line(line) {}
  __device__ __forceinline__ Rows at(int64_t row, int64_t column) const {
    return {data + row * line + column, line};
  }
};

// What a gradient is added to, read in the vectors of the feature. It may be the tensor that is
// written: the thread that writes an element has read it before.
struct Addend {
  const void* data;
  int64_t batch, line;
};

// Rows that a thread has under way. With an addend each is two loads; shared memory is near.
template <class E, bool adds, bool shared>
constexpr int kRows = adds || shared ? 2 : E::rows_in_flight;

// Some rows, `height` apart: reads them, and writes factor(u, j) * slope, plus the addend, for
// element j of row u. prepare() completes the first factors, when the rows are under way as well.
template <class T, int V, int U, bool shared, bool adds, class E, class P, class F>
__device__ __forceinline__ void sweep_rows(Rows<const T> from, Rows<T> to, Rows<const T> add,
                                           int row, int64_t height, int rows, E e, P prepare,
                                           F factor) {
  Pack<T, V> pack[U], base[U];
  load_rows<!shared>(pack, from.data, height * from.line, row, int(height), rows);
  if constexpr (adds) load_rows<false>(base, add.data, height * add.line, row, int(height), rows);
  prepare();
#pragma unroll
  for (int u = 0; u < U; ++u) {
    if (row + u * int(height) < rows) {
      Accumulator<T> value[V], sum[V];
      pack[u].get(value);
      if constexpr (adds) base[u].get(sum);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        value[j] = factor(u, j) * e.slope(value[j]);
        if constexpr (adds) value[j] += sum[j];
      }
      pack[u].set(value);
      store(to.data + u * height * to.line, pack[u]);
    }
  }
}

template <class T, int V, bool shared, bool adds, class E, class A, class G>
__device__ __forceinline__ void sweep_planar(Rows<const T> x, Rows<T> out, Rows<const T> add,
                                             Span span, int lanes, int positions, E e, G gradient,
                                             const A* k) {
  lanes = opaque(lanes), positions = opaque(positions);
  const int tx = threadIdx.x & (lanes - 1), ty = threadIdx.x / lanes, height = kThreads / lanes;
  constexpr int U = kRows<E, adds, shared> * kTimesRows<V>;
  const int64_t step = U * height * x.line, out_step = U * height * out.line;
#pragma unroll 1
  for (int column = span.column_begin + tx; column < span.column_end; column += lanes) {
    A factor[V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      int n = column * V + j;
      if (n >= positions) n %= positions;  // a row of several channels
      factor[j] = k[n];
    }
    const int first = span.row_begin + ty;
    Rows<const T> from = x.at(first, column * V);
    Rows<T> to = out.at(first, column * V);
#pragma unroll 1
    for (int row = first; row < span.row_end; row += height * U) {
      const auto prepare = [&] {
        if (row > first) return;
        const A g = A(gradient());
#pragma unroll
        for (int j = 0; j < V; ++j) factor[j] *= g;
      };
      sweep_rows<T, V, U, shared, adds>(from, to, add.at(row, column * V), row, height,
                                        span.row_end, e, prepare,
                                        [&](int, int j) { return factor[j]; });
      from.data += step;
      to.data += out_step;
    }
  }
}

template <class T, int V, bool shared, bool adds, class E, class A, class G>
__device__ __forceinline__ void sweep_interleaved(Rows<const T> x, Rows<T> out, Rows<const T> add,
                                                  Span span, int lanes, E e, G gradient,
                                                  const A* k) {
  lanes = opaque(lanes);
  const int tx = threadIdx.x & (lanes - 1), ty = threadIdx.x / lanes, height = kThreads / lanes;
  constexpr int U = kRows<E, adds, shared>;
#pragma unroll 1
  for (int row = span.row_begin + ty; row < span.row_end; row += height * U) {
    A factor[U] = {};
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (row + u * height < span.row_end) factor[u] = k[row + u * height];
    }
    const int first = span.column_begin + tx;
    Rows<const T> from = x.at(row, first * V);
    Rows<T> to = out.at(row, first * V);
#pragma unroll 1
    for (int column = first; column < span.column_end; column += lanes) {
      const int64_t apart = opaque(height);  // else the addresses of all rows are kept
      const auto prepare = [&] {
        if (column > first) return;
        const A g = A(gradient());
#pragma unroll
        for (int u = 0; u < U; ++u) factor[u] *= g;
      };
      sweep_rows<T, V, U, shared, adds>(from, to, add.at(row, column * V), row, apart, span.row_end,
                                        e, prepare, [&](int u, int) { return factor[u]; });
      from.data += lanes * V;
      to.data += lanes * V;
    }
  }
}

// One piece of sample b. k is the sample's coefficient map, in fp64 for fp64 features and fp32 for
// others; gradient() multiplies it. With `shared` the sample is read from `kept`, a dense copy in
// shared memory.
template <class E, bool fp64, bool shared, bool adds = false, class G>
__device__ __forceinline__ void sweep_piece(const View& x, const Sweep& sweep, int b, Span span,
                                            double p, G gradient, const void* k, const char* kept,
                                            Addend addend = {}) {
  with_dtype<fp64>(x.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t sample = opaque(b);
    const bool planar = x.layout == Layout::planar;
    const int64_t dense = (planar ? x.N : x.C) * x.access.channels_per_row;
    const Rows<const T> from = shared ? Rows<const T>(reinterpret_cast<const T*>(kept), dense)
                                      : Rows<const T>(x.data, x.batch, x.line, x, sample);
    const Rows<T> to(sweep.out, sweep.batch, sweep.line, x, sample);
    const Rows<const T> add(addend.data, addend.batch, addend.line, x, sample);
    const E e(opaque(p));
    const auto* map = static_cast<const Accumulator<T>*>(k);
    with_vector<T>(x.access, [&](auto vector) {
      constexpr int V = decltype(vector)::value;
      if (planar) {
        sweep_planar<T, V, shared, adds>(from, to, add, span, sweep.lanes, x.N, e, gradient, map);
      } else {
        sweep_interleaved<T, V, shared, adds>(from, to, add, span, sweep.lanes, e, gradient, map);
      }
    });
  });
}

// Calls f(b, span, k) for the samples of a feature's task, with a sample's coefficients.
template <class F>
__device__ __forceinline__ void sweep_samples(const SweepFeature& feature, int local, F f) {
  const int pieces = feature.sweep.row_pieces * feature.sweep.column_pieces;
  const Span span = span_of(feature.view, feature.sweep, local % pieces);
  const int b0 = local / pieces * feature.samples;
  const int b1 = min(b0 + feature.samples, feature.B);
  const int64_t size = accumulate_size(feature.view.dtype == Dtype::float64);
  for (int b = b0; b < b1; ++b) {
    const char* k = static_cast<const char*>(feature.k) + int64_t(b) * feature.view.N * size;
    f(b, span, k);
  }
}

// Calls f(feature, b, span, k, gradient) for those of this block's task; gradient() reads that of a
// pair's loss.
template <class F>
__device__ __forceinline__ void sweep_task(const SweepParams& params, F f) {
  const SweepFeature& feature =
      params.features[member_of(params.features, params.count, blockIdx.x)];
  sweep_samples(feature, blockIdx.x - feature.first_task, [&](int b, Span span, const char* k) {
    f(feature, b, span, k, [&] {
      return factor_of(feature.loss_gradient, params.loss_gradient_fp64,
                       opaque(b) * params.sample_step);
    });
  });
}

}  // namespace at_fused
