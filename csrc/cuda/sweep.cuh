// The backward sweep: out = addend + g * k[n] * |x|^(p-1) * sign(x), with an optional addend.
#pragma once

#include "kernel.cuh"

namespace at_fused {

// A range of rows and columns (vectors), as in Access.
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

// The rows of a sample of a feature or gradient.
template <class T>
struct Rows {
  T* data;
  int64_t row_stride;

  __device__ __forceinline__ Rows(const Target& tensor, const View& x, int64_t b)
      : data(static_cast<T*>(tensor.data) + b * tensor.batch_stride),
        row_stride(tensor.line_stride * x.access.channels_per_row) {}
  __device__ __forceinline__ Rows(T* data, int64_t row_stride)
      : data(data), row_stride(row_stride) {}
  __device__ __forceinline__ Rows at(int64_t row, int64_t column) const {
    return {data + row * row_stride + column, row_stride};
  }
};

__device__ __forceinline__ Target target_of(const View& x) {
  return {const_cast<void*>(x.data), x.batch_stride, x.line_stride};
}

// Reads U rows, `height` apart, and writes g * factor(u, j) * slope plus the addend for element j
// of row u. `to` may be the addend's memory: a thread reads each element before it writes it.
template <class T, int V, int U, bool shared, bool has_addend, class E, class A, class F>
__device__ __forceinline__ void sweep_rows(Rows<const T> from, Rows<T> to, Rows<const T> addend,
                                           int row, int64_t height, int rows, E e, A g, F factor) {
  Pack<T, V> pack[U], base[U];
  load_rows<!shared>(pack, from.data, height * from.row_stride, row, int(height), rows);
  if constexpr (has_addend) {
    load_rows<false>(base, addend.data, height * addend.row_stride, row, int(height), rows);
  }
  g = opaque(g);  // g is being loaded too: keeps the compiler from waiting for it before the rows
#pragma unroll
  for (int u = 0; u < U; ++u) {
    if (row + u * int(height) < rows) {
      A value[V], sum[V];
      pack[u].get(value);
      if constexpr (has_addend) base[u].get(sum);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        value[j] = g * factor(u, j) * e.slope(value[j]);
        if constexpr (has_addend) value[j] += sum[j];
      }
      pack[u].set(value);
      store(to.data + u * height * to.row_stride, pack[u]);
    }
  }
}

template <class T, int V, int U, bool shared, bool has_addend, class E, class A>
__device__ __forceinline__ void sweep_planar(Rows<const T> x, Rows<T> out, Rows<const T> addend,
                                             Span span, int lanes, int positions, E e, A g,
                                             const A* k) {
  lanes = opaque(lanes), positions = opaque(positions);
  const int tx = threadIdx.x & (lanes - 1), ty = threadIdx.x / lanes, height = kThreads / lanes;
#pragma unroll 1
  for (int column = span.column_begin + tx; column < span.column_end; column += lanes) {
    A factor[V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      int n = column * V + j;
      if (n >= positions) n %= positions;  // rows of several channels
      factor[j] = k[n];
    }
#pragma unroll 1
    for (int row = span.row_begin + ty; row < span.row_end; row += height * U) {
      sweep_rows<T, V, U, shared, has_addend>(x.at(row, column * V), out.at(row, column * V),
                                              addend.at(row, column * V), row, height, span.row_end,
                                              e, g, [&](int, int j) { return factor[j]; });
    }
  }
}

template <class T, int V, int U, bool shared, bool has_addend, class E, class A>
__device__ __forceinline__ void sweep_interleaved(Rows<const T> x, Rows<T> out,
                                                  Rows<const T> addend, Span span, int lanes, E e,
                                                  A g, const A* k) {
  lanes = opaque(lanes);
  const int tx = threadIdx.x & (lanes - 1), ty = threadIdx.x / lanes, height = kThreads / lanes;
#pragma unroll 1
  for (int row = span.row_begin + ty; row < span.row_end; row += height * U) {
    A factor[U] = {};
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (row + u * height < span.row_end) factor[u] = k[row + u * height];
    }
#pragma unroll 1
    for (int column = span.column_begin + tx; column < span.column_end; column += lanes) {
      const int row_step = opaque(height);  // otherwise registers hold the addresses of all rows
      sweep_rows<T, V, U, shared, has_addend>(
          x.at(row, column * V), out.at(row, column * V), addend.at(row, column * V), row, row_step,
          span.row_end, e, g, [&](int u, int) { return factor[u]; });
    }
  }
}

// Sweeps a piece of sample b. k is the sample's coefficient map, in fp64 for fp64 features and else
// in fp32; g is a factor. `shared` reads the sample from `cache`, a dense copy in shared memory.
template <class E, bool fp64, bool shared, bool has_addend>
__device__ __forceinline__ void sweep_piece(const View& x, const Target& out, const Target& addend,
                                            int b, Span span, double p, double g, const void* k,
                                            const char* cache) {
  with_dtype<fp64>(x.dtype, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const int64_t sample = opaque(b);
    const bool planar = x.layout == Layout::planar;
    const int64_t dense = (planar ? x.N : x.C) * x.access.channels_per_row;
    const Rows<const T> from = shared ? Rows<const T>(reinterpret_cast<const T*>(cache), dense)
                                      : Rows<const T>(target_of(x), x, sample);
    const Rows<T> to(out, x, sample);
    const Rows<const T> base(has_addend ? addend : out, x, sample);
    const E e(opaque(p));
    const A* map = static_cast<const A*>(k);
    const int lanes = x.access.lanes;
    with_vector<T>(x.access, [&](auto vector) {
      constexpr int V = decltype(vector)::value;
      // Fewer rows in flight: an addend doubles the loads, and shared memory has a low latency.
      constexpr int U = has_addend || shared ? 2 : E::rows_in_flight;
      if (planar) {
        sweep_planar<T, V, U * kRowFactor<V>, shared, has_addend>(from, to, base, span, lanes, x.N,
                                                                  e, A(g), map);
      } else {
        sweep_interleaved<T, V, U, shared, has_addend>(from, to, base, span, lanes, e, A(g), map);
      }
    });
  });
}

}  // namespace at_fused
