#include "launch.cuh"
#include "sweep.cuh"

namespace at_fused {

template <class T, int V>
__device__ __forceinline__ void copy_piece(AddendRows<T> from, T* out, int64_t out_line, Span span,
                                           int lanes) {
  constexpr int U = 4;
  lanes = here(lanes);
  const int tx = threadIdx.x & (lanes - 1), ty = threadIdx.x / lanes, height = kThreads / lanes;
#pragma unroll 1
  for (int row = span.row_begin + ty; row < span.row_end; row += height * U) {
#pragma unroll 1
    for (int column = span.column_begin + tx; column < span.column_end; column += lanes) {
      Pack<T, V> pack[U];
      load_rows<false>(pack, from.at(row, column * V).first, height * from.line, row, height,
                       span.row_end);
      T* to = out + row * out_line + column * V;
#pragma unroll
      for (int u = 0; u < U; ++u) {
        if (row + u * height < span.row_end) store(to + u * height * out_line, pack[u]);
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
      const int64_t sample = here(b), fold = view.access.fold;
      const Addend addend{params.gradient, params.batch, params.line};
      const AddendRows<T> from = addend.template sample<T>(sample, fold);
      T* out = static_cast<T*>(sweep.out) + sample * sweep.batch;
      const int64_t out_line = sweep.line * fold;
      if (from.first != out) {
        if (view.access.vector > 1) {
          copy_piece<T, kVector<T>>(from, out, out_line, span, sweep.lanes);
        } else {
          copy_piece<T, 1>(from, out, out_line, span, sweep.lanes);
        }
        __syncthreads();
      }
      const T* x = static_cast<const T*>(view.data) + sample * view.batch;
      const int32_t* channels = params.feature.channels + sample * view.N;
      const A* map = reinterpret_cast<const A*>(k);
      const A scale = A(params.scale);
      const AnyPower exponent(here(params.p));
      const bool planar = view.layout == Layout::planar;
      for (int n = threadIdx.x; n < view.N; n += kThreads) {
        const int channel = channels[n];
        if (channel < 0 || channel >= view.C) continue;
        const int row = planar ? channel / int(fold) : n;
        const int at = planar ? channel % int(fold) * view.N + n : channel;
        const int column = at / view.access.vector;
        if (row < span.row_begin || row >= span.row_end || column < span.column_begin ||
            column >= span.column_end) {
          continue;
        }
        const A slope = exponent.slope(widen(x[row * view.line * fold + at]));
        out[row * out_line + at] =
            narrow<T>(widen(*from.at(row, at).first) + scale * map[n] * slope);
      }
    });
  });
}

void launch_max_tap_backward(const TapParams& params, const Launch& launch) {
  AT_FUSED_LAUNCH_DTYPES(max_tap_backward_kernel, params, launch);
}

}  // namespace at_fused
