// Gradients of features from the coefficients of their maps, and the same added to another
// gradient.
#include "sweep.cuh"

namespace at_fused {

// Calls f(feature, b, span, k, g) for the samples of this block's task: what its gradient is made
// of.
template <class F>
__device__ __forceinline__ void sweep_task(const SweepParams& params, F f) {
  const SweepFeature& feature =
      params.features[member_of(params.features, params.count, blockIdx.x)];
  const View& x = feature.view;
  const int local = blockIdx.x - feature.first_task;
  const int piece = local % (feature.row_pieces * feature.column_pieces);
  const int row = piece / feature.column_pieces * feature.rows;
  const int column = piece % feature.column_pieces * feature.columns;
  const Span span{row, min(row + feature.rows, rows_of(x)), column,
                  min(column + feature.columns, columns_of(x))};
  const int b0 = local / (feature.row_pieces * feature.column_pieces) * feature.samples;
  const int b1 = min(b0 + feature.samples, feature.B);
  const int64_t size = accumulate_size(x.dtype == Dtype::float64);
  for (int b = b0; b < b1; ++b) {
    const double g = params.scale * factor_of(feature.loss_gradient, params.loss_gradient_fp64,
                                              opaque(b) * params.sample_step);
    f(feature, b, span, static_cast<const char*>(feature.k) + int64_t(b) * x.N * size, g);
  }
}

// Gradients of a list of features from their coefficient maps.
template <class E, bool fp64>
__global__ void __launch_bounds__(kThreads, kBlocks<fp64>)
    attention_map_backward_kernel(const __grid_constant__ SweepParams params) {
  sweep_task(params, [&](const SweepFeature& feature, int b, Span span, const char* k, double g) {
    sweep_piece<E, fp64, false, false>(feature.view, feature.out, feature.add, b, span, params.p, g,
                                       k, nullptr);
  });
}

// The same, added to what came from the layers behind the features.
template <class E, bool fp64>
__global__ void __launch_bounds__(kThreads, kGradientBlocks)
    attention_tap_backward_kernel(const __grid_constant__ SweepParams params) {
  sweep_task(params, [&](const SweepFeature& feature, int b, Span span, const char* k, double g) {
    sweep_piece<E, fp64, false, true>(feature.view, feature.out, feature.add, b, span, params.p, g,
                                      k, nullptr);
  });
}

// ---- maxima -----------------------------------------------------------------------------------

// A piece of a gradient but for what the winners add to it: another gradient, or 0.
template <class T, int V>
__device__ __forceinline__ void fill_piece(bool adds, Rows<const T> from, Rows<T> out, Span span,
                                           int lanes) {
  constexpr int U = 4;
  lanes = opaque(lanes);
  const int tx = threadIdx.x & (lanes - 1), ty = threadIdx.x / lanes, height = kThreads / lanes;
#pragma unroll 1
  for (int row = span.row_begin + ty; row < span.row_end; row += height * U) {
#pragma unroll 1
    for (int column = span.column_begin + tx; column < span.column_end; column += lanes) {
      Pack<T, V> pack[U] = {};
      if (adds) {
        load_rows<false>(pack, from.at(row, column * V).data, height * from.line, row, height,
                         span.row_end);
      }
      T* to = out.at(row, column * V).data;
#pragma unroll
      for (int u = 0; u < U; ++u) {
        if (row + u * height < span.row_end) store(to + u * height * out.line, pack[u]);
      }
    }
  }
}

// Both of the above for maps of maxima. Of the features the channels that won are all that is read,
// and in place all that is written. One that is none, which only a direct call can name, has no
// gradient.
template <bool fp64>
__global__ void __launch_bounds__(kThreads, kGradientBlocks)
    max_map_backward_kernel(const __grid_constant__ SweepParams params) {
  sweep_task(params, [&](const SweepFeature& feature, int b, Span span, const char* k, double g) {
    const View& view = feature.view;
    with_dtype<fp64>(view.dtype, [&](auto element) {
      using T = decltype(element);
      using A = Accumulator<T>;
      const int64_t sample = opaque(b);
      const Rows<const T> x(target_of(view), view, sample);
      const Rows<const T> base(feature.add, view, sample);
      const Rows<T> out(feature.out, view, sample);
      const bool adds = feature.add.data;
      if (base.data != out.data) {
        with_vector<T>(view.access, [&](auto vector) {
          fill_piece<T, decltype(vector)::value>(adds, base, out, span, view.access.lanes);
        });
        __syncthreads();
      }
      const int32_t* channels = feature.channels + sample * view.N;
      const A* map = reinterpret_cast<const A*>(k);
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
        const A sum = adds ? widen(*base.at(row, at).data) : A(0);
        narrow(sum + A(g) * map[n] * slope, *out.at(row, at).data);
      }
    });
  });
}

void launch_attention_map_backward(const SweepParams& params, const Launch& launch) {
  if (params.features[0].channels) {
    AT_FUSED_LAUNCH_DTYPES(max_map_backward_kernel, params, launch);
  } else if (params.features[0].add.data) {
    AT_FUSED_LAUNCH_POWERS(attention_tap_backward_kernel, params, launch);
  } else {
    AT_FUSED_LAUNCH_POWERS(attention_map_backward_kernel, params, launch);
  }
}

}  // namespace at_fused
