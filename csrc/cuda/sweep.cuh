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
  return x.layout == Layout::planar ? x.C / x.access.fold : x.N;
}
__device__ inline int columns_of(const View& x) {
  return (x.layout == Layout::planar ? x.N * x.access.fold : x.C) / x.access.vector;
}

__device__ inline Span span_of(const View& x, const Sweep& sweep, int piece) {
  const int row = piece / sweep.column_pieces * sweep.rows;
  const int column = piece % sweep.column_pieces * sweep.columns;
  return {row, min(row + sweep.rows, rows_of(x)), column,
          min(column + sweep.columns, columns_of(x))};
}

// What a gradient is added to: nothing.
struct NoAddend {
  static constexpr bool adds = false;
  template <class T>
  __device__ __forceinline__ NoAddend sample(int64_t, int64_t) const {
    return {};
  }
  __device__ __forceinline__ NoAddend at(int64_t, int64_t) const { return {}; }
};

// Rows that are read in the vectors of the feature's.
template <class T>
struct AddendRows {
  static constexpr bool adds = true;
  const T* first;
  int64_t line;

  __device__ __forceinline__ AddendRows at(int64_t row, int64_t column) const {
    return {first + row * line + column, line};
  }
};

// A tensor, which may be the one that is written: who writes an element has read it before.
struct Addend {
  const void* data;
  int64_t batch, line;

  template <class T>
  __device__ __forceinline__ AddendRows<T> sample(int64_t b, int64_t fold) const {
    return {static_cast<const T*>(data) + b * batch, line * fold};
  }
};

// Rows that a thread has under way. With an addend each is two loads; shared memory is near.
template <class E, class Add, bool shared>
constexpr int kRows = Add::adds || shared ? 2 : E::rows_in_flight;

// Some rows at a time: reads them, and writes factor(u, j) * slope, plus the addend, for
// element j of row u. prepare() completes the first factors, when the rows are under way as well.
template <class T, int V, int U, bool shared, class E, class Add, class P, class F>
__device__ __forceinline__ void sweep_rows(const T* from, int64_t step, T* to, int64_t out_step,
                                           Add add, int row, int height, int rows, E e, P prepare,
                                           F factor) {
  Pack<T, V> pack[U], base[U];
  load_rows<!shared>(pack, from, step, row, height, rows);
  if constexpr (Add::adds) load_rows<false>(base, add.first, height * add.line, row, height, rows);
  prepare();
#pragma unroll
  for (int u = 0; u < U; ++u) {
    if (row + u * height < rows) {
      Accumulator<T> value[V], sum[V];
      pack[u].get(value);
      if constexpr (Add::adds) base[u].get(sum);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        value[j] = factor(u, j) * e.slope(value[j]);
        if constexpr (Add::adds) value[j] += sum[j];
      }
      pack[u].set(value);
      store(to + u * out_step, pack[u]);
    }
  }
}

template <class T, int V, bool shared, class E, class A, class Add, class G>
__device__ __forceinline__ void sweep_planar(const T* x, int64_t line, T* out, int64_t out_line,
                                             Add add, Span span, int lanes, int positions, E e,
                                             G gradient, const A* k) {
  lanes = here(lanes), positions = here(positions);
  const int tx = threadIdx.x & (lanes - 1), ty = threadIdx.x / lanes, height = kThreads / lanes;
  const int64_t step = height * line, out_step = height * out_line;
  constexpr int U = kRows<E, Add, shared> * kTimesRows<V>;
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
    const T* from = x + first * line + column * V;
    T* to = out + first * out_line + column * V;
#pragma unroll 1
    for (int row = first; row < span.row_end; row += height * U) {
      const auto prepare = [&] {
        if (row > first) return;
        const A g = A(gradient());
#pragma unroll
        for (int j = 0; j < V; ++j) factor[j] *= g;
      };
      sweep_rows<T, V, U, shared>(from, step, to, out_step, add.at(row, column * V), row, height,
                                  span.row_end, e, prepare, [&](int, int j) { return factor[j]; });
      from += U * step;
      to += U * out_step;
    }
  }
}

template <class T, int V, bool shared, class E, class A, class Add, class G>
__device__ __forceinline__ void sweep_interleaved(const T* x, int64_t line, T* out,
                                                  int64_t out_line, Add add, Span span, int lanes,
                                                  E e, G gradient, const A* k) {
  lanes = here(lanes);
  const int tx = threadIdx.x & (lanes - 1), ty = threadIdx.x / lanes, height = kThreads / lanes;
  constexpr int U = kRows<E, Add, shared>;
#pragma unroll 1
  for (int row = span.row_begin + ty; row < span.row_end; row += height * U) {
    A factor[U] = {};
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (row + u * height < span.row_end) factor[u] = k[row + u * height];
    }
    const int first = span.column_begin + tx;
    const T* from = x + row * line + first * V;
    T* to = out + row * out_line + first * V;
#pragma unroll 1
    for (int column = first; column < span.column_end; column += lanes) {
      const int64_t apart = here(height);  // else the addresses of all rows are kept
      const auto prepare = [&] {
        if (column > first) return;
        const A g = A(gradient());
#pragma unroll
        for (int u = 0; u < U; ++u) factor[u] *= g;
      };
      sweep_rows<T, V, U, shared>(from, apart * line, to, apart * out_line, add.at(row, column * V),
                                  row, height, span.row_end, e, prepare,
                                  [&](int u, int) { return factor[u]; });
      from += lanes * V;
      to += lanes * V;
    }
  }
}

// One piece of sample b. k is the sample's coefficient map, in fp64 for fp64 features and fp32 for
// others; gradient() multiplies it. With `shared` the sample is read from `kept`, a dense copy in
// shared memory.
template <class E, bool fp64, bool shared, class G, class Add = NoAddend>
__device__ __forceinline__ void sweep_piece(const View& x, const Sweep& sweep, int b, Span span,
                                            double p, G gradient, const void* k, const char* kept,
                                            Add addend = {}) {
  with_dtype<fp64>(x.dtype, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const int64_t sample = here(b);
    const bool planar = x.layout == Layout::planar;
    const int64_t dense = planar ? x.N : x.C;
    const int64_t fold = planar ? x.access.fold : 1;
    const T* from = shared ? reinterpret_cast<const T*>(kept)
                           : static_cast<const T*>(x.data) + sample * x.batch;
    const int64_t line = (shared ? dense : x.line) * fold;
    T* to = static_cast<T*>(sweep.out) + sample * sweep.batch;
    const int64_t out_line = sweep.line * fold;
    const auto add = addend.template sample<T>(sample, fold);
    const E e(here(p));
    const A* map = static_cast<const A*>(k);
    if (planar) {
      if (x.access.vector > 1) {
        sweep_planar<T, kVector<T>, shared>(from, line, to, out_line, add, span, sweep.lanes, x.N,
                                            e, gradient, map);
      } else {
        sweep_planar<T, 1, shared>(from, line, to, out_line, add, span, sweep.lanes, x.N, e,
                                   gradient, map);
      }
    } else if (x.access.vector > 1) {
      sweep_interleaved<T, kVector<T>, shared>(from, line, to, out_line, add, span, sweep.lanes, e,
                                               gradient, map);
    } else {
      sweep_interleaved<T, 1, shared>(from, line, to, out_line, add, span, sweep.lanes, e, gradient,
                                      map);
    }
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
                       here(b) * params.sample_step);
    });
  });
}

}  // namespace at_fused
