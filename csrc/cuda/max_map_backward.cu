#include "launch.cuh"
#include "sweep.cuh"

namespace at_fused {

// One piece of a sample: zero but at the channels that won, which alone are read, each by the
// thread that writes it. Rows are channels.
template <class T, int V, class A>
__device__ __forceinline__ void sweep_maxima_planar(const T* x, int64_t x_line, T* out,
                                                    int64_t out_line, Span span, int lanes,
                                                    int fold, int positions, double p, A gradient,
                                                    const A* k, const int32_t* channels) {
  lanes = here(lanes), positions = here(positions), fold = here(fold);
  const int tx = threadIdx.x & (lanes - 1), ty = threadIdx.x / lanes, height = kThreads / lanes;
  const int64_t line = out_line * fold;
#pragma unroll 1
  for (int column = span.column_begin + tx; column < span.column_end; column += lanes) {
    const int first = span.row_begin + ty;
    A value[V];
    int winner[V];  // its row
#pragma unroll
    for (int j = 0; j < V; ++j) {
      // A row of several channels has those that are f modulo `fold` at this place.
      const int f = (column * V + j) / positions, n = (column * V + j) % positions;
      const int channel = channels[n];
      winner[j] = channel % fold == f ? channel / fold : -1;
      value[j] = 0;
      if (winner[j] >= first && winner[j] < span.row_end &&
          ((winner[j] - first) & (height - 1)) == 0) {
        value[j] = gradient * k[n] * AnyPower(here(p)).slope(widen(x[channel * x_line + n]));
      }
    }
    T* to = out + first * line + column * V;
#pragma unroll 1
    for (int row = first; row < span.row_end; row += height, to += height * line) {
      A gradients[V];
#pragma unroll
      for (int j = 0; j < V; ++j) gradients[j] = row == winner[j] ? value[j] : A(0);
      Pack<T, V> pack;
      pack.set(gradients);
      store(to, pack);
    }
  }
}

// Rows are positions.
template <class T, int V, class A>
__device__ __forceinline__ void sweep_maxima_interleaved(const T* x, int64_t x_line, T* out,
                                                         int64_t out_line, Span span, int lanes,
                                                         double p, A gradient, const A* k,
                                                         const int32_t* channels) {
  lanes = here(lanes);
  const int tx = threadIdx.x & (lanes - 1), ty = threadIdx.x / lanes, height = kThreads / lanes;
#pragma unroll 1
  for (int row = span.row_begin + ty; row < span.row_end; row += height) {
    const int channel = channels[row];
    T* to = out + row * out_line;
#pragma unroll 1
    for (int column = span.column_begin + tx; column < span.column_end; column += lanes) {
      const int winner = channel - column * V;
      A value = 0;
      if (winner >= 0 && winner < V) {
        value = gradient * k[row] * AnyPower(here(p)).slope(widen(x[row * x_line + channel]));
      }
      A gradients[V];
#pragma unroll
      for (int j = 0; j < V; ++j) gradients[j] = j == winner ? value : A(0);
      Pack<T, V> pack;
      pack.set(gradients);
      store(to + column * V, pack);
    }
  }
}

// Gradients of a list of features from the coefficients of their maps of maxima.
template <bool fp64>
__global__ void __launch_bounds__(kThreads, kBlocks<fp64>)
    max_map_backward_kernel(const __grid_constant__ SweepParams params) {
  sweep_task(
      params, [&](const SweepFeature& feature, int b, Span span, const char* k, auto gradient) {
        const View& view = feature.view;
        const Sweep& sweep = feature.sweep;
        with_dtype<fp64>(view.dtype, [&](auto element) {
          using T = decltype(element);
          using A = Accumulator<T>;
          const int64_t sample = here(b);
          const T* x = static_cast<const T*>(view.data) + sample * view.batch;
          T* out = static_cast<T*>(sweep.out) + sample * sweep.batch;
          const A g = A(gradient());
          const A* map = reinterpret_cast<const A*>(k);
          const int32_t* channels = feature.channels + sample * view.N;
          const auto run = [&](auto vector) {
            constexpr int V = decltype(vector)::value;
            if (view.layout == Layout::planar) {
              sweep_maxima_planar<T, V>(x, view.line, out, sweep.line, span, sweep.lanes,
                                        view.access.fold, view.N, params.p, g, map, channels);
            } else {
              sweep_maxima_interleaved<T, V>(x, view.line, out, sweep.line, span, sweep.lanes,
                                             params.p, g, map, channels);
            }
          };
          if (view.access.vector > 1) {
            run(std::integral_constant<int, kVector<T>>{});
          } else {
            run(std::integral_constant<int, 1>{});
          }
        });
      });
}

void launch_max_map_backward(const SweepParams& params, const Launch& launch) {
  AT_FUSED_LAUNCH_DTYPES(max_map_backward_kernel, params, launch);
}

}  // namespace at_fused
