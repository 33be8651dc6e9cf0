// The attention map of a tile: some positions of one sample, all of its channels.
#pragma once

#include "block.cuh"
#include "numbers.cuh"

namespace at_fused {

// Where threads that share a position meet: kScratchBytes of shared memory (plan.h).
struct Tile {
  int32_t b;
  int32_t begin, end;  // positions
  char* scratch;
};

// Some rows at a time: reads them, and calls add(u, j, |x|^p) for element j of row u. In kernels
// that `keep`, the sample is copied to `keep` on its way, densely, unless that is null.
template <class T, int V, bool keeps, class E, class F>
__device__ __forceinline__ void map_rows(const T* from, int64_t step, int row, int height, int rows,
                                         T* keep, int column, int columns, E e, F add) {
  constexpr int U = E::rows_in_flight;
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
      for (int j = 0; j < V; ++j) add(u, j, e.power(value[j]));
    }
  }
}

// Rows are channels, threads side by side take adjacent positions.
template <class T, int V, bool keeps, class E, class A>
__device__ __forceinline__ void map_tile_planar(const View& x, const Tile& tile, E e, A scale,
                                                T* keep, A* out) {
  const int lanes = here(x.access.lanes), fold = here(x.access.fold);
  const int tx = threadIdx.x & (lanes - 1), ty = threadIdx.x / lanes, height = kThreads / lanes;
  const int rows = x.C / fold, columns = (tile.end - tile.begin) * fold / V;
  const int64_t line = x.line * fold, step = height * line;
  constexpr int U = E::rows_in_flight;
  const T* first = static_cast<const T*>(x.data) + int64_t(here(tile.b)) * x.batch + tile.begin;
  A* scratch = reinterpret_cast<A*>(tile.scratch);

#pragma unroll 1
  for (int begin = 0; begin < columns; begin += lanes) {
    const int column = begin + tx;
    A total[V] = {};
    if (column < columns) {
      const T* from = first + ty * line + column * V;
#pragma unroll 1
      for (int row = ty; row < rows; row += height * U, from += U * step) {
        map_rows<T, V, keeps>(from, step, row, height, rows, keep, column, columns, e,
                              [&](int, int j, A power) { total[j] += power; });
      }
    }
    if (height == 1 && fold == 1) {
      if (column < columns) {
#pragma unroll
        for (int j = 0; j < V; ++j) out[column * V + j] = total[j] * scale;
      }
      continue;
    }
    // Added up first within each warp, then over warps, and over the channels of a fold.
    for (int d = lanes; d < 32; d *= 2) {
#pragma unroll
      for (int j = 0; j < V; ++j) total[j] += __shfl_xor_sync(kAllLanes, total[j], d);
    }
    __syncthreads();  // the last chunk's sums may still be read
    const int strip = lanes < 32 ? 32 : lanes, width = lanes * V;
    if (threadIdx.x % strip < lanes) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        scratch[threadIdx.x / strip * width + tx * V + j] = total[j];
      }
    }
    __syncthreads();
    const int count = (columns - begin < lanes ? columns - begin : lanes) * V / fold;
    for (int n = threadIdx.x; n < count; n += kThreads) {
      A sum = 0;
      for (int s = 0; s < kThreads / strip; ++s) {
        for (int f = 0; f < fold; ++f) sum += scratch[s * width + f * count + n];
      }
      out[begin * V + n] = sum * scale;
    }
  }
}

// Rows are positions, threads side by side take adjacent channels.
template <class T, int V, bool keeps, class E, class A>
__device__ __forceinline__ void map_tile_interleaved(const View& x, const Tile& tile, E e, A scale,
                                                     T* keep, A* out) {
  const int lanes = here(x.access.lanes);
  const int tx = threadIdx.x & (lanes - 1), ty = threadIdx.x / lanes, height = kThreads / lanes;
  const int columns = here(x.C) / V, rows = here(tile.end - tile.begin);
  const T* first =
      static_cast<const T*>(x.data) + int64_t(here(tile.b)) * x.batch + tile.begin * x.line;

  const int64_t step = height * x.line;
  constexpr int U = E::rows_in_flight;

#pragma unroll 1
  for (int begin = 0; begin < rows; begin += height * U) {
    A total[U] = {};
    const int row = begin + ty;
    const T* from = first + row * x.line + tx * V;
#pragma unroll 1
    for (int column = tx; column < columns; column += lanes, from += lanes * V) {
      map_rows<T, V, keeps>(from, step, row, height, rows, keep, column, columns, e,
                            [&](int u, int, A power) { total[u] += power; });
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      for (int d = 1; d < lanes; d *= 2) total[u] += __shfl_xor_sync(kAllLanes, total[u], d);
      const int r = row + u * height;
      if (tx == 0 && r < rows) out[r] = total[u] * scale;
    }
  }
}

// The map of a tile, for position `tile.begin` on at `out`, in fp64 for fp64 features and fp32 for
// others.
template <class E, bool fp64, bool keeps>
__device__ __forceinline__ void map_tile(const View& x, const Tile& tile, double p, double scale,
                                         char* keep, void* out) {
  with_dtype<fp64>(x.dtype, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    T* kept = reinterpret_cast<T*>(keep);
    A* map = static_cast<A*>(out);
    const A s = A(scale);
    const E e(here(p));
    if (x.layout == Layout::planar) {
      if (x.access.vector > 1) {
        map_tile_planar<T, kVector<T>, keeps>(x, tile, e, s, kept, map);
      } else {
        map_tile_planar<T, 1, keeps>(x, tile, e, s, kept, map);
      }
    } else if (x.access.vector > 1) {
      map_tile_interleaved<T, kVector<T>, keeps>(x, tile, e, s, kept, map);
    } else {
      map_tile_interleaved<T, 1, keeps>(x, tile, e, s, kept, map);
    }
  });
}

}  // namespace at_fused
