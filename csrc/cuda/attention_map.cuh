// Attention maps of tiles. A tile is a range of positions of one sample, with all channels.
#pragma once

#include "kernel.cuh"

namespace at_fused {

struct Tile {
  int32_t b;
  int32_t begin, end;  // positions
  char* scratch;       // shared memory, to combine threads that share a position
};

// A reduction folds the channels of a position into a State: add() adds a value, write() stores the
// result, and combine() merges the states of two threads. If a row holds several channels
// (channels_per_row), a state covers the channels at offset f of their rows, and add() gets row
// numbers; to_channel() converts them to channels.
template <class A>
__device__ __forceinline__ A to_channel(A sum, int, int) {
  return sum;
}
template <class A>
__device__ __forceinline__ A shuffle_xor(A sum, int distance) {
  return __shfl_xor_sync(kAllLanes, sum, distance);
}
__device__ __forceinline__ void combine(float& sum, float other) { sum += other; }
__device__ __forceinline__ void combine(double& sum, double other) { sum += other; }

// Sums powers, for collapse "mean" and "sum".
template <class E, class A>
struct PowerSum {
  using State = A;
  static constexpr int rows_in_flight = E::rows_in_flight;
  E e;
  A scale;
  A* out;

  __device__ __forceinline__ void add(A& sum, A x, int) const { sum += e.power(x); }
  __device__ __forceinline__ void write(int n, A sum) const { out[n] = sum * scale; }
};

// Loads U rows and calls add(u, j, x) for element j of row u. If `caches` and `cache` is not null,
// it also copies the rows to `cache`, without gaps.
template <int U, class T, int V, bool caches, class F>
__device__ __forceinline__ void map_rows(const T* from, int64_t step, int row, int height, int rows,
                                         T* cache, int column, int columns, F add) {
  Pack<T, V> pack[U];
  load_rows<true>(pack, from, step, row, height, rows);
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const int r = row + u * height;
    if (r < rows) {
      if (caches && cache) store(cache + (r * columns + column) * V, pack[u]);
      Accumulator<T> value[V];
      pack[u].get(value);
#pragma unroll
      for (int j = 0; j < V; ++j) add(u, j, value[j]);
    }
  }
}

// Rows are channels; adjacent threads read adjacent positions.
template <class T, int V, bool caches, class C>
__device__ __forceinline__ void map_tile_planar(const View& x, const Tile& tile, const C& reduction,
                                                T* cache) {
  const int lanes = opaque(x.access.lanes), per_row = opaque(x.access.channels_per_row);
  const int tx = threadIdx.x & (lanes - 1), ty = threadIdx.x / lanes, height = kThreads / lanes;
  const int rows = x.C / per_row, columns = (tile.end - tile.begin) * per_row / V;
  const int64_t line = x.line_stride * per_row, step = height * line;
  constexpr int U = C::rows_in_flight * kRowFactor<V>;
  using State = typename C::State;
  const T* first =
      static_cast<const T*>(x.data) + int64_t(opaque(tile.b)) * x.batch_stride + tile.begin;
  State* scratch = reinterpret_cast<State*>(tile.scratch);

#pragma unroll 1
  for (int begin = 0; begin < columns; begin += lanes) {
    const int column = begin + tx;
    State total[V] = {};
    if (column < columns) {
      const T* from = first + ty * line + column * V;
#pragma unroll 1
      for (int row = ty; row < rows; row += height * U, from += U * step) {
        map_rows<U, T, V, caches>(
            from, step, row, height, rows, cache, column, columns,
            [&](int u, int j, auto value) { reduction.add(total[j], value, row + u * height); });
      }
    }
    __syncthreads();  // other threads may still read the previous chunk's states
#pragma unroll
    for (int j = 0; j < V; ++j) scratch[threadIdx.x * V + j] = total[j];
    __syncthreads();
    const int width = lanes * V, count = min(columns - begin, lanes) * V / per_row;
    for (int n = threadIdx.x; n < count; n += kThreads) {
      State all{};
      for (int y = 0; y < height; ++y) {
        for (int f = 0; f < per_row; ++f) {
          combine(all, to_channel(scratch[y * width + f * count + n], f, per_row));
        }
      }
      reduction.write(begin * V + n, all);
    }
  }
}

// Rows are positions; adjacent threads read adjacent channels.
template <class T, int V, bool caches, class C>
__device__ __forceinline__ void map_tile_interleaved(const View& x, const Tile& tile,
                                                     const C& reduction, T* cache) {
  const int lanes = opaque(x.access.lanes);
  const int tx = threadIdx.x & (lanes - 1), ty = threadIdx.x / lanes, height = kThreads / lanes;
  const int columns = opaque(x.C) / V, rows = opaque(tile.end - tile.begin);
  const T* first = static_cast<const T*>(x.data) + int64_t(opaque(tile.b)) * x.batch_stride +
                   tile.begin * x.line_stride;

  const int64_t step = height * x.line_stride;
  constexpr int U = C::rows_in_flight;

#pragma unroll 1
  for (int begin = 0; begin < rows; begin += height * U) {
    typename C::State total[U] = {};
    const int row = begin + ty;
    const T* from = first + row * x.line_stride + tx * V;
#pragma unroll 1
    for (int column = tx; column < columns; column += lanes, from += lanes * V) {
      map_rows<U, T, V, caches>(
          from, step, row, height, rows, cache, column, columns,
          [&](int u, int j, auto value) { reduction.add(total[u], value, column * V + j); });
    }
    // Interleaves the shuffles of U rows, to hide their latency.
    const int width = opaque(x.access.lanes);
#pragma unroll 1
    for (int d = 1; d < width; d *= 2) {
#pragma unroll
      for (int u = 0; u < U; ++u) combine(total[u], shuffle_xor(total[u], d));
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int r = begin + threadIdx.x / width + u * (kThreads / width);
      if (threadIdx.x % width == 0 && r < rows) reduction.write(r, total[u]);
    }
  }
}

// Reduces a tile, with the code for its layout and vector width.
template <class T, bool caches, class C>
__device__ __forceinline__ void reduce_tile(const View& x, const Tile& tile, const C& reduction,
                                            T* cache) {
  with_vector<T>(x.access, [&](auto vector) {
    constexpr int V = decltype(vector)::value;
    if (x.layout == Layout::planar) {
      map_tile_planar<T, V, caches>(x, tile, reduction, cache);
    } else {
      map_tile_interleaved<T, V, caches>(x, tile, reduction, cache);
    }
  });
}

// Writes the map of a tile to `out`, which starts at position `tile.begin`: fp64 for fp64 features,
// else fp32.
template <class E, bool fp64, bool caches>
__device__ __forceinline__ void map_tile(const View& x, const Tile& tile, double p, double scale,
                                         char* cache, void* out) {
  with_dtype<fp64>(x.dtype, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const PowerSum<E, A> sum{E(opaque(p)), A(scale), static_cast<A*>(out)};
    reduce_tile<T, caches>(x, tile, sum, reinterpret_cast<T*>(cache));
  });
}

}  // namespace at_fused
