#include "launch.cuh"
#include "pool.cuh"
#include "sweep.cuh"

namespace at_fused {

// What a task does: some channels of one sample, in a box of inputs.
struct Part {
  int b;
  Range channels;
  Ranges inputs, outputs;  // all outputs that the inputs are in

  __device__ Part(const PooledSweep& feature, int task) {
    const Pool& pool = feature.pool;
    int local = task - feature.first_task;
    const auto next = [&](int count) {
      const int i = local % count;
      local /= count;
      return i;
    };
    const auto cut = [&](int d, Range& in, Range& out) {
      const int boxes = (pool.in[d] + feature.box[d] - 1) / feature.box[d];
      in.begin = next(boxes) * feature.box[d];
      in.end = min(in.begin + feature.box[d], pool.in[d]);
      out.begin = range_of(in.begin, pool.out[d], pool.in[d]).begin;
      out.end = range_of(in.end - 1, pool.out[d], pool.in[d]).end;
    };
    cut(2, inputs.w, outputs.w);
    cut(1, inputs.h, outputs.h);
    cut(0, inputs.d, outputs.d);
    const int groups = (feature.view.C + feature.group - 1) / feature.group;
    channels.begin = next(groups) * feature.group;
    channels.end = min(channels.begin + feature.group, feature.view.C);
    b = local;
  }
};
static_assert(sizeof(Part) <= kPartBytes);

// In two steps, with what lies between them in shared memory, by channel and output of the part, in
// the order of the features' own layout: each is read in the first, written in the second.
struct Between {
  int by_channel, by_output;  // strides

  __device__ Between(bool planar, const Part& part)
      : by_channel(planar ? part.outputs.count() : 1),
        by_output(planar ? 1 : part.channels.count()) {}
};

// What each output sends back to every input of its window: g * k * slope / area.
template <class T>
__device__ __forceinline__ void send_back(const PooledSweep& feature, const Part& part,
                                          EitherPower e, Accumulator<T> gradient,
                                          Accumulator<T>* sent) {
  using A = Accumulator<T>;
  const Pool& pool = feature.pool;
  const bool planar = feature.view.layout == Layout::planar;
  const int C = part.channels.count(), M = part.outputs.count();
  const Between between(planar, part);
  const Seat seat(planar, here(feature.output_places), here(feature.share));
  const Sample<T> x(feature.view, here(part.b));
  const int64_t map = int64_t(part.b) * pool.out[0] * pool.out[1] * pool.out[2];
  const A* k = static_cast<const A*>(feature.k) + map;
  const int height = part.outputs.h.count(), width = part.outputs.w.count();
#pragma unroll 1
  for (int begin = 0; begin < M; begin += seat.places) {
    const int m = begin + seat.place;
    const bool inside = m < M;
    const Cell at = cell_of(m, height, width);
    const Cell o{at.d + part.outputs.d.begin, at.h + part.outputs.h.begin,
                 at.w + part.outputs.w.begin};
    const int n = (o.d * pool.out[1] + o.h) * pool.out[2] + o.w;
    const Ranges window = inputs_of(o, pool);
    const A inverse = A(1) / A(window.count());
    const A factor = inside ? gradient * k[n] * inverse : A(0);
    const int winner = inside && feature.channels ? feature.channels[map + n] : -1;
    // As many turns in all threads: they meet.
#pragma unroll 1
    for (int turn = 0; turn < C; turn += kPoolUnroll * seat.members) {
      const int first = turn + seat.member;
      unsigned present = 0, wanted = 0;
#pragma unroll
      for (int u = 0; u < kPoolUnroll; ++u) {
        const int c = first + u * seat.members;
        if (!inside || c >= C) continue;
        present |= 1u << u;
        if (!feature.channels || part.channels.begin + c == winner) wanted |= 1u << u;
      }
      A sum[kPoolUnroll];
      window_sums(sum, x, part.channels.begin + first, seat.members, wanted, window, pool, seat);
#pragma unroll
      for (int u = 0; u < kPoolUnroll; ++u) {
        if (!(present >> u & 1) || seat.sub > 0) continue;
        const int c = first + u * seat.members;
        sent[c * between.by_channel + m * between.by_output] =
            wanted >> u & 1 ? factor * e.slope(sum[u] * inverse) : A(0);
      }
    }
  }
}

// The sum of what each input was sent, over the outputs whose windows hold it.
template <class T>
__device__ __forceinline__ void collect(const PooledSweep& feature, const Part& part,
                                        const Accumulator<T>* sent) {
  const Pool& pool = feature.pool;
  const bool planar = feature.view.layout == Layout::planar;
  const int C = part.channels.count(), inputs = part.inputs.count();
  const Between between(planar, part);
  const Seat seat(planar, here(feature.input_places), 1);
  const int height = part.inputs.h.count(), width = part.inputs.w.count();
  const int out_height = part.outputs.h.count(), out_width = part.outputs.w.count();
  T* out = static_cast<T*>(feature.out) + int64_t(part.b) * feature.batch;
  const int64_t channel = planar ? feature.line : 1, position = planar ? 1 : feature.line;
#pragma unroll 1
  for (int input = seat.place; input < inputs; input += seat.places) {
    const Cell at = cell_of(input, height, width);
    const Cell i{at.d + part.inputs.d.begin, at.h + part.inputs.h.begin,
                 at.w + part.inputs.w.begin};
    const Ranges from = outputs_of(i, pool);
    const int n = (i.d * pool.in[1] + i.h) * pool.in[2] + i.w;
#pragma unroll 1
    for (int c = seat.member; c < C; c += seat.members) {
      Accumulator<T> sum = 0;
#pragma unroll 1
      for (int d = from.d.begin; d < from.d.end; ++d) {
#pragma unroll 1
        for (int h = from.h.begin; h < from.h.end; ++h) {
          const int row =
              ((d - part.outputs.d.begin) * out_height + h - part.outputs.h.begin) * out_width -
              part.outputs.w.begin;
          for (int w = from.w.begin; w < from.w.end; ++w) {
            sum += sent[c * between.by_channel + (row + w) * between.by_output];
          }
        }
      }
      out[(part.channels.begin + c) * channel + n * position] = narrow<T>(sum);
    }
  }
}

// Gradients of a list of features from the coefficients of their pooled maps.
template <bool fp64>
__global__ void __launch_bounds__(kThreads, kBlocks<fp64>)
    pooled_map_backward_kernel(const __grid_constant__ PooledSweepParams params) {
  AT_FUSED_DYNAMIC_SHARED(bytes);
  const PooledSweep& feature =
      params.features[member_of(params.features, params.count, blockIdx.x)];
  const double gradient = gradient_of(feature.loss_gradient, params.loss_gradient_fp64);
  // In shared memory: it is the same in all threads, whose registers are needed for other things.
  Part& part = *reinterpret_cast<Part*>(bytes);
  if (threadIdx.x == 0) part = Part(feature, blockIdx.x);
  __syncthreads();
  with_dtype<fp64>(feature.view.dtype, [&](auto element) {
    using T = decltype(element);
    const EitherPower e(here(params.p), params.absolute);
    using A = Accumulator<T>;
    A* sent = reinterpret_cast<A*>(bytes + kPartBytes);
    send_back<T>(feature, part, e, A(gradient), sent);
    __syncthreads();
    collect<T>(feature, part, sent);
  });
}

void launch_pooled_map_backward(const PooledSweepParams& params, const Launch& launch) {
  launch_instance(AT_FUSED_DTYPES(pooled_map_backward_kernel), launch, params);
}

}  // namespace at_fused
