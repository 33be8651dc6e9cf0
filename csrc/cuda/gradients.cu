// Gradients of features from the coefficients of their maps, and the same added to another
// gradient.
#include "launch.cuh"
#include "sweep.cuh"

namespace at_fused {

// Gradients of a list of features from their coefficient maps.
template <class E, bool fp64>
__global__ void __launch_bounds__(kThreads, kBlocks<fp64>)
    attention_map_backward_kernel(const __grid_constant__ SweepParams params) {
  sweep_task(params,
             [&](const SweepFeature& feature, int b, Span span, const char* k, auto gradient) {
               sweep_piece<E, fp64, false>(feature.view, feature.sweep, b, span, params.p, gradient,
                                           k, nullptr);
             });
}

// A feature's gradient from its own map, added to what came from the layers behind it.
template <class E, bool fp64>
__global__ void __launch_bounds__(kThreads, kBlocks<fp64>)
    attention_tap_backward_kernel(const __grid_constant__ TapParams params) {
  const SweepFeature& feature = params.feature;
  sweep_samples(feature, blockIdx.x, [&](int b, Span span, const char* k) {
    sweep_piece<E, fp64, false, true>(
        feature.view, feature.sweep, b, span, params.p, [&] { return params.scale; }, k, nullptr,
        Addend{params.gradient, params.batch, params.line});
  });
}

// ---- maxima -----------------------------------------------------------------------------------

// One vector of a gradient, the value of its element j.
template <class T, int V, class F>
__device__ __forceinline__ void store_each(T* to, F value) {
  Accumulator<T> values[V];
#pragma unroll
  for (int j = 0; j < V; ++j) values[j] = value(j);
  Pack<T, V> pack;
  pack.set(values);
  store(to, pack);
}

// One piece of a sample: zero but at the channels that won, which alone are read, each by the
// thread that writes it. Rows are channels.
template <class T, int V, class A>
__device__ __forceinline__ void sweep_maxima_planar(Rows<const T> x, Rows<T> out, Span span,
                                                    int lanes, int per_row, int positions, double p,
                                                    A gradient, const A* k,
                                                    const int32_t* channels) {
  lanes = opaque(lanes), positions = opaque(positions), per_row = opaque(per_row);
  const int tx = threadIdx.x & (lanes - 1), ty = threadIdx.x / lanes, height = kThreads / lanes;
  const int first = span.row_begin + ty;
#pragma unroll 1
  for (int column = span.column_begin + tx; column < span.column_end; column += lanes) {
    A value[V];
    int winner[V];  // its row
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const int n = (column * V + j) % positions, channel = channels[n];
      winner[j] = channel % per_row == (column * V + j) / positions ? channel / per_row : -1;
      value[j] = 0;
      if (winner[j] >= first && winner[j] < span.row_end &&
          ((winner[j] - first) & (height - 1)) == 0) {
        const A element = widen(*x.at(winner[j], column * V + j).data);
        value[j] = gradient * k[n] * AnyPower(opaque(p)).slope(element);
      }
    }
    T* to = out.at(first, column * V).data;
#pragma unroll 1
    for (int row = first; row < span.row_end; row += height, to += height * out.line) {
      store_each<T, V>(to, [&](int j) { return row == winner[j] ? value[j] : A(0); });
    }
  }
}

// Rows are positions.
template <class T, int V, class A>
__device__ __forceinline__ void sweep_maxima_interleaved(Rows<const T> x, Rows<T> out, Span span,
                                                         int lanes, double p, A gradient,
                                                         const A* k, const int32_t* channels) {
  lanes = opaque(lanes);
  const int tx = threadIdx.x & (lanes - 1), ty = threadIdx.x / lanes, height = kThreads / lanes;
#pragma unroll 1
  for (int row = span.row_begin + ty; row < span.row_end; row += height) {
    const int channel = channels[row];
#pragma unroll 1
    for (int column = span.column_begin + tx; column < span.column_end; column += lanes) {
      const int winner = channel - column * V;
      A value = 0;
      if (winner >= 0 && winner < V) {
        const A element = widen(*x.at(row, channel).data);
        value = gradient * k[row] * AnyPower(opaque(p)).slope(element);
      }
      store_each<T, V>(out.at(row, column * V).data,
                       [&](int j) { return j == winner ? value : A(0); });
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
          const int64_t sample = opaque(b);
          const Rows<const T> x(view.data, view.batch, view.line, view, sample);
          const Rows<T> out(sweep.out, sweep.batch, sweep.line, view, sample);
          const A g = A(gradient());
          const A* map = reinterpret_cast<const A*>(k);
          const int32_t* channels = feature.channels + sample * view.N;
          with_vector<T>(view.access, [&](auto vector) {
            constexpr int V = decltype(vector)::value;
            if (view.layout == Layout::planar) {
              sweep_maxima_planar<T, V>(x, out, span, sweep.lanes, view.access.channels_per_row,
                                        view.N, params.p, g, map, channels);
            } else {
              sweep_maxima_interleaved<T, V>(x, out, span, sweep.lanes, params.p, g, map, channels);
            }
          });
        });
      });
}

template <class T, int V>
__device__ __forceinline__ void copy_piece(Rows<const T> from, Rows<T> out, Span span, int lanes) {
  constexpr int U = 4;
  lanes = opaque(lanes);
  const int tx = threadIdx.x & (lanes - 1), ty = threadIdx.x / lanes, height = kThreads / lanes;
#pragma unroll 1
  for (int row = span.row_begin + ty; row < span.row_end; row += height * U) {
#pragma unroll 1
    for (int column = span.column_begin + tx; column < span.column_end; column += lanes) {
      Pack<T, V> pack[U];
      load_rows<false>(pack, from.at(row, column * V).data, height * from.line, row, height,
                       span.row_end);
      T* to = out.at(row, column * V).data;
#pragma unroll
      for (int u = 0; u < U; ++u) {
        if (row + u * height < span.row_end) store(to + u * height * out.line, pack[u]);
      }
    }
  }
}

// attention_tap_backward_kernel of a map of maxima. In place the channels that won are all that is
// read and written. One that is none, which only a direct call can name, has no gradient.
template <bool fp64>
__global__ void __launch_bounds__(kThreads, kBlocks<fp64>)
    max_tap_backward_kernel(const __grid_constant__ TapParams params) {
  const View& view = params.feature.view;
  const Sweep& sweep = params.feature.sweep;
  sweep_samples(params.feature, blockIdx.x, [&](int b, Span span, const char* k) {
    with_dtype<fp64>(view.dtype, [&](auto element) {
      using T = decltype(element);
      using A = Accumulator<T>;
      const int64_t sample = opaque(b);
      const Rows<const T> x(view.data, view.batch, view.line, view, sample);
      const Rows<const T> base(params.gradient, params.batch, params.line, view, sample);
      const Rows<T> out(sweep.out, sweep.batch, sweep.line, view, sample);
      if (base.data != out.data) {
        with_vector<T>(view.access, [&](auto vector) {
          copy_piece<T, decltype(vector)::value>(base, out, span, sweep.lanes);
        });
        __syncthreads();
      }
      const int32_t* channels = params.feature.channels + sample * view.N;
      const A* map = reinterpret_cast<const A*>(k);
      const A scale = A(params.scale);
      const AnyPower exponent(opaque(params.p));
      const bool planar = view.layout == Layout::planar;
      const int per_row = view.access.channels_per_row;
      for (int n = threadIdx.x; n < view.N; n += kThreads) {
        const int channel = channels[n];
        if (channel < 0 || channel >= view.C) continue;
        const int row = planar ? channel / per_row : n;
        const int at = planar ? channel % per_row * view.N + n : channel;
        const int column = at / view.access.vector;
        if (row < span.row_begin || row >= span.row_end || column < span.column_begin ||
            column >= span.column_end) {
          continue;
        }
        const A slope = exponent.slope(widen(*x.at(row, at).data));
        *out.at(row, at).data = narrow<T>(widen(*base.at(row, at).data) + scale * map[n] * slope);
      }
    });
  });
}

// ---- launches ---------------------------------------------------------------------------------

void launch_attention_map_backward(const SweepParams& params, const Launch& launch) {
  if (params.features[0].channels) {
    AT_FUSED_LAUNCH_DTYPES(max_map_backward_kernel, params, launch);
  } else {
    AT_FUSED_LAUNCH_POWERS(attention_map_backward_kernel, params, launch);
  }
}

void launch_attention_tap_backward(const TapParams& params, const Launch& launch) {
  if (params.feature.channels) {
    AT_FUSED_LAUNCH_DTYPES(max_tap_backward_kernel, params, launch);
  } else {
    AT_FUSED_LAUNCH_POWERS(attention_tap_backward_kernel, params, launch);
  }
}

}  // namespace at_fused
