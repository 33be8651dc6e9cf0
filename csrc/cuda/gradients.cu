// Gradients of features from coefficient maps, optionally added to an upstream gradient (taps).
#include "sweep.cuh"

namespace at_fused {

// Calls f(feature, b, span, k, g) for each sample b of this block's task. k is the sample's
// coefficient map, and g the factor of its gradient.
template <class F>
__device__ __forceinline__ void sweep_task(const SweepParams& params, F f) {
  const SweepFeature& feature =
      params.features[member_of(params.features, params.count, blockIdx.x)];
  const View& x = feature.view;
  const int local = blockIdx.x - feature.first_task;
  const int piece = local % (feature.row_pieces * feature.column_pieces);
  const int row = piece / feature.column_pieces * feature.rows_per_piece;
  const int column = piece % feature.column_pieces * feature.columns_per_piece;
  const Span span{row, min(row + feature.rows_per_piece, rows_of(x)), column,
                  min(column + feature.columns_per_piece, columns_of(x))};
  const int b0 = local / (feature.row_pieces * feature.column_pieces) * feature.samples_per_task;
  const int b1 = min(b0 + feature.samples_per_task, feature.B);
  const int64_t size = accumulate_size(x.dtype == Dtype::float64);
  for (int b = b0; b < b1; ++b) {
    const double g = params.scale * value_or_one(feature.loss_gradient, params.loss_gradient_fp64,
                                                 opaque(b) * params.sample_stride);
    f(feature, b, span, static_cast<const char*>(feature.k) + int64_t(b) * x.N * size, g);
  }
}

// Gradients of a list of features.
template <class E, bool fp64>
__global__ void __launch_bounds__(kThreads, kMinBlocks<fp64>)
    attention_map_backward_kernel(const __grid_constant__ SweepParams params) {
  sweep_task(params, [&](const SweepFeature& feature, int b, Span span, const char* k, double g) {
    sweep_piece<E, fp64, false, false>(feature.view, feature.out, feature.addend, b, span, params.p,
                                       g, k, nullptr);
  });
}

// Gradients added to the upstream gradients of the features.
template <class E, bool fp64>
__global__ void __launch_bounds__(kThreads, kGradientBlocks)
    attention_tap_backward_kernel(const __grid_constant__ SweepParams params) {
  sweep_task(params, [&](const SweepFeature& feature, int b, Span span, const char* k, double g) {
    sweep_piece<E, fp64, false, true>(feature.view, feature.out, feature.addend, b, span, params.p,
                                      g, k, nullptr);
  });
}

// ---- collapse="max" ---------------------------------------------------------------------------

// Fills a piece of a gradient with the addend or 0, before the argmax channels are updated.
template <class T, int V>
__device__ __forceinline__ void fill_piece(bool has_addend, Rows<const T> from, Rows<T> out,
                                           Span span, int lanes) {
  constexpr int U = 4;
  lanes = opaque(lanes);
  const int tx = threadIdx.x & (lanes - 1), ty = threadIdx.x / lanes, height = kThreads / lanes;
#pragma unroll 1
  for (int row = span.row_begin + ty; row < span.row_end; row += height * U) {
#pragma unroll 1
    for (int column = span.column_begin + tx; column < span.column_end; column += lanes) {
      Pack<T, V> pack[U] = {};
      if (has_addend) {
        load_rows<false>(pack, from.at(row, column * V).data, height * from.row_stride, row, height,
                         span.row_end);
      }
      T* to = out.at(row, column * V).data;
#pragma unroll
      for (int u = 0; u < U; ++u) {
        if (row + u * height < span.row_end) store(to + u * height * out.row_stride, pack[u]);
      }
    }
  }
}

// Gradients of collapse="max", with or without an addend. Reads the features at the argmax channels
// only. In place, also writes only there. Channels out of range, which only a direct call of the
// operator can pass, are skipped.
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
      const Rows<const T> base(feature.addend, view, sample);
      const Rows<T> out(feature.out, view, sample);
      const bool has_addend = feature.addend.data;
      if (base.data != out.data) {
        with_vector<T>(view.access, [&](auto vector) {
          fill_piece<T, decltype(vector)::value>(has_addend, base, out, span, view.access.lanes);
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
        const int element = planar ? channel % per_row * view.N + n : channel;
        const int column = element / view.access.vector;
        if (row < span.row_begin || row >= span.row_end || column < span.column_begin ||
            column >= span.column_end) {
          continue;
        }
        const A slope = exponent.slope(widen(*x.at(row, element).data));
        const A sum = has_addend ? widen(*base.at(row, element).data) : A(0);
        narrow(sum + A(g) * map[n] * slope, *out.at(row, element).data);
      }
    });
  });
}

void launch_attention_map_backward(const SweepParams& params, const Launch& launch) {
  if (params.features[0].channels) {
    AT_FUSED_LAUNCH_DTYPES(max_map_backward_kernel, params, launch);
  } else if (params.features[0].addend.data) {
    AT_FUSED_LAUNCH_POWERS(attention_tap_backward_kernel, params, launch);
  } else {
    AT_FUSED_LAUNCH_POWERS(attention_map_backward_kernel, params, launch);
  }
}

}  // namespace at_fused
