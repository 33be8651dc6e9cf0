// The attention map of a tile: some positions of one sample, all of its channels.
#pragma once

#include "kernel.cuh"

namespace at_fused {

// Where threads that share a position meet: kScratchBytes of shared memory (plan.h).
struct Tile {
  int32_t b;
  int32_t begin, end;  // positions
  char* scratch;
};

// What the values of a position become is a State of the tile's collector: take() adds a value of a
// channel, put() is given what came of all. Threads that share a position meet(). In rows of
// several channels a State is of those with number f in their row; it knows them by their rows
// until as_channel().
template <class A>
__device__ __forceinline__ A as_channel(A sum, int, int) {
  return sum;
}
template <class A>
__device__ __forceinline__ A from_lane(A sum, int distance) {
  return __shfl_xor_sync(kAllLanes, sum, distance);
}
__device__ __forceinline__ void meet(float& sum, float other) { sum += other; }
__device__ __forceinline__ void meet(double& sum, double other) { sum += other; }

// The sum of powers, for "mean" and "sum".
template <class E, class A>
struct PowerSum {
  using State = A;
  static constexpr int rows_in_flight = E::rows_in_flight;
  E e;
  A scale;
  A* out;

  __device__ __forceinline__ void take(A& sum, A x, int) const { sum += e.power(x); }
  __device__ __forceinline__ void put(int n, A sum) const { out[n] = sum * scale; }
};

// Some rows at a time: reads them, and calls add(u, j, x) for element j of row u. In kernels that
// `keep`, the sample is copied to `keep` on its way, densely, unless that is null.
template <int U, class T, int V, bool keeps, class F>
__device__ __forceinline__ void map_rows(const T* from, int64_t step, int row, int height, int rows,
                                         T* keep, int column, int columns, F add) {
  Pack<T, V> pack[U];
  load_rows<true>(pack, from, step, row, height, rows);
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const int r = row + u * height;
    if (r < rows) {
      if (keeps && keep) store(keep + (r * columns + column) * V, pack[u]);
      Accumulator<T> value[V];
      pack[u].get(value);
#pragma unroll
      for (int j = 0; j < V; ++j) add(u, j, value[j]);
    }
  }
}

// Rows are channels, threads side by side take adjacent positions.
template <class T, int V, bool keeps, class C>
__device__ __forceinline__ void map_tile_planar(const View& x, const Tile& tile, const C& collect,
                                                T* keep) {
  const int lanes = opaque(x.access.lanes), per_row = opaque(x.access.channels_per_row);
  const int tx = threadIdx.x & (lanes - 1), ty = threadIdx.x / lanes, height = kThreads / lanes;
  const int rows = x.C / per_row, columns = (tile.end - tile.begin) * per_row / V;
  const int64_t line = x.line * per_row, step = height * line;
  constexpr int U = C::rows_in_flight * kTimesRows<V>;
  using State = typename C::State;
  const T* first = static_cast<const T*>(x.data) + int64_t(opaque(tile.b)) * x.batch + tile.begin;
  State* scratch = reinterpret_cast<State*>(tile.scratch);

#pragma unroll 1
  for (int begin = 0; begin < columns; begin += lanes) {
    const int column = begin + tx;
    State total[V] = {};
    if (column < columns) {
      const T* from = first + ty * line + column * V;
#pragma unroll 1
      for (int row = ty; row < rows; row += height * U, from += U * step) {
        map_rows<U, T, V, keeps>(
            from, step, row, height, rows, keep, column, columns,
            [&](int u, int j, auto value) { collect.take(total[j], value, row + u * height); });
      }
    }
    __syncthreads();  // the last chunk's may still be read
#pragma unroll
    for (int j = 0; j < V; ++j) scratch[threadIdx.x * V + j] = total[j];
    __syncthreads();
    const int width = lanes * V, count = min(columns - begin, lanes) * V / per_row;
    for (int n = threadIdx.x; n < count; n += kThreads) {
      State all{};
      for (int y = 0; y < height; ++y) {
        for (int f = 0; f < per_row; ++f) {
          meet(all, as_channel(scratch[y * width + f * count + n], f, per_row));
        }
      }
      collect.put(begin * V + n, all);
    }
  }
}

// Rows are positions, threads side by side take adjacent channels.
template <class T, int V, bool keeps, class C>
__device__ __forceinline__ void map_tile_interleaved(const View& x, const Tile& tile,
                                                     const C& collect, T* keep) {
  const int lanes = opaque(x.access.lanes);
  const int tx = threadIdx.x & (lanes - 1), ty = threadIdx.x / lanes, height = kThreads / lanes;
  const int columns = opaque(x.C) / V, rows = opaque(tile.end - tile.begin);
  const T* first =
      static_cast<const T*>(x.data) + int64_t(opaque(tile.b)) * x.batch + tile.begin * x.line;

  const int64_t step = height * x.line;
  constexpr int U = C::rows_in_flight;

#pragma unroll 1
  for (int begin = 0; begin < rows; begin += height * U) {
    typename C::State total[U] = {};
    const int row = begin + ty;
    const T* from = first + row * x.line + tx * V;
#pragma unroll 1
    for (int column = tx; column < columns; column += lanes, from += lanes * V) {
      map_rows<U, T, V, keeps>(
          from, step, row, height, rows, keep, column, columns,
          [&](int u, int j, auto value) { collect.take(total[u], value, column * V + j); });
    }
    // The rows' shuffles side by side: one after the other each would wait for the one before.
    const int width = opaque(x.access.lanes);
#pragma unroll 1
    for (int d = 1; d < width; d *= 2) {
#pragma unroll
      for (int u = 0; u < U; ++u) meet(total[u], from_lane(total[u], d));
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int r = begin + threadIdx.x / width + u * (kThreads / width);
      if (threadIdx.x % width == 0 && r < rows) collect.put(r, total[u]);
    }
  }
}

// A tile in the layout and the vectors that it is read in.
template <class T, bool keeps, class C>
__device__ __forceinline__ void collect_tile(const View& x, const Tile& tile, const C& collect,
                                             T* keep) {
  with_vector<T>(x.access, [&](auto vector) {
    constexpr int V = decltype(vector)::value;
    if (x.layout == Layout::planar) {
      map_tile_planar<T, V, keeps>(x, tile, collect, keep);
    } else {
      map_tile_interleaved<T, V, keeps>(x, tile, collect, keep);
    }
  });
}

// The map of a tile, for position `tile.begin` on at `out`, in fp64 for fp64 features and fp32 for
// others.
template <class E, bool fp64, bool keeps>
__device__ __forceinline__ void map_tile(const View& x, const Tile& tile, double p, double scale,
                                         char* keep, void* out) {
  with_dtype<fp64>(x.dtype, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const PowerSum<E, A> sum{E(opaque(p)), A(scale), static_cast<A*>(out)};
    collect_tile<T, keeps>(x, tile, sum, reinterpret_cast<T*>(keep));
  });
}

}  // namespace at_fused
