// The CUDA implementations of torch.ops.at_fused.distance_loss*: as map_ops.cpp.

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "../box.h"
#include "../distance_arguments.h"
#include "checks.h"
#include "device.h"
#include "launch.h"

namespace at_fused {
namespace {

// Calls launch(params, how) for as many pairs at a time as a launch carries.
template <class F>
void launch_pairs(const DistanceArguments& arguments, const Limits& limits, int32_t shared_bytes,
                  void* stream, const Tensors* out, const F& launch) {
  STD_TORCH_CHECK(arguments.B <= kMaxExtent, "at_fused: at most 2^30 samples, got ", arguments.B);
  constexpr int64_t turn = kThreads * kTurnElements;
  const int64_t target = task_bytes(arguments.bytes, limits);
  for (size_t begin = 0; begin < arguments.pairs.size(); begin += kMaxDistances) {
    DistanceParams params{};
    Launch how{0, shared_bytes, false, stream};
    params.count = int32_t(std::min<size_t>(kMaxDistances, arguments.pairs.size() - begin));
    params.B = int32_t(arguments.B);
    params.first_pair = int32_t(begin);
    for (int32_t i = 0; i < params.count; ++i) {
      const DistanceArguments::Pair& given = arguments.pairs[begin + size_t(i)];
      DistancePair& pair = params.pairs[i];
      pair.a = given.a.data, pair.a_dtype = given.a.dtype, pair.a_stride = given.a.stride;
      pair.b = given.b.data, pair.b_dtype = given.b.dtype, pair.b_stride = given.b.stride;
      pair.M = given.M;
      pair.vector = given.M % kTurnElements == 0 &&
                    aligned_rows(given.a.data, given.a.dtype, given.a.stride) &&
                    aligned_rows(given.b.data, given.b.dtype, given.b.stride);
      if (out) {
        const Tensor& written = (*out)[begin + size_t(i)];
        pair.out = written.mutable_data_ptr();
        pair.out_stride = written.stride(0);
        pair.vector = pair.vector && aligned_rows(pair.out, pair.a_dtype, pair.out_stride);
      }
      const int64_t wanted = std::max<int64_t>(1, given.bytes() / target);
      const int64_t piece = std::min(round_up(divide_up(given.M, wanted), turn), kMaxExtent);
      pair.piece = int32_t(piece);
      const int64_t pieces = divide_up(given.M, piece);
      pair.pieces = check_blocks(pieces);
      pair.first_task = how.blocks;
      how.blocks = check_blocks(how.blocks + arguments.B * pieces);
      how.fp64 |= given.fp64();
    }
    launch(params, how);
  }
}

std::tuple<Tensor, Tensor> distance_loss(Tensors student, Tensors teacher,
                                         std::vector<double> weights, bool root,
                                         std::string reduction) {
  const DistanceArguments arguments(student, teacher);
  const OnDevice scope(arguments.device);
  const int64_t count = int64_t(arguments.pairs.size());
  const DistanceOptions options(weights, count, arguments.B, root, reduction);
  const int64_t samples = count * arguments.B;
  STD_TORCH_CHECK(samples < kMaxExtent, "at_fused: at most 2^30 samples, got ", samples);
  Tensor loss = new_losses(options.sum, count, arguments.fp64, arguments.device);
  Tensor squares = new_rows(count, arguments.B, aoti_torch_dtype_float64(), arguments.device);
  Tensor sum = new_rows(1, 1, aoti_torch_dtype_float64(), arguments.device);
  const Counters counters(arguments.device, scope.stream(), 1 + samples);
  Tensors kept;  // until the launches are on their way
  launch_pairs(
      arguments, limits_of(arguments.device), kControlBytes, scope.stream(), nullptr,
      [&](DistanceParams& params, const Launch& launch) {
        kept.push_back(new_rows(1, launch.blocks, aoti_torch_dtype_float64(), arguments.device));
        params.root = root;
        params.add = options.sum;
        params.continues = params.first_pair > 0;
        params.loss_fp64 = arguments.fp64;
        params.squares = static_cast<double*>(squares.mutable_data_ptr());
        params.sums = static_cast<double*>(kept.back().mutable_data_ptr());
        params.sum = static_cast<double*>(sum.mutable_data_ptr());
        params.loss = loss.mutable_data_ptr();
        params.finished = counters.data();
        params.arrived = counters.data() + 1;
        for (int32_t i = 0; i < params.count; ++i) {
          params.pairs[i].row = params.first_pair + i;
          params.pairs[i].weight = options.sample_weight(params.pairs[i].row);
        }
        launch_distance_loss(params, launch);
      });
  return {std::move(loss), std::move(squares)};
}

Tensors distance_loss_backward(Tensors a, Tensors b, Tensor squares, Tensor gradient,
                               std::vector<int64_t> pairs, std::vector<double> weights, bool root,
                               std::string reduction) {
  STD_TORCH_CHECK(!a.empty(), "at_fused: as many tensors on both sides, got 0");
  const OnDevice scope(device_of(a[0]));
  DistanceGradients gradients(a);
  const DistanceArguments arguments(a, b, &gradients);
  const DistanceBackward backward(squares, gradient, pairs, weights, root, reduction, arguments);
  launch_pairs(arguments, limits_of(arguments.device), 0, scope.stream(), &gradients.written,
               [&](DistanceParams& params, const Launch& launch) {
                 params.root = root;
                 params.squares = const_cast<double*>(backward.squares);
                 params.gradient_fp64 = backward.gradient.fp64;
                 for (int32_t i = 0; i < params.count; ++i) {
                   const int64_t row = pairs[size_t(params.first_pair + i)];
                   params.pairs[i].row = int32_t(row);
                   params.pairs[i].weight = backward.options.sample_weight(row);
                   params.pairs[i].gradient = backward.gradient.of(row);
                 }
                 launch_distance_loss_backward(params, launch);
               });
  return gradients.finish();
}

}  // namespace
}  // namespace at_fused

STABLE_TORCH_LIBRARY_IMPL(AT_FUSED_NAMESPACE, AT_FUSED_DEVICE_KEY, m) {
  m.impl("distance_loss", AT_FUSED_BOX(distance_loss));
  m.impl("distance_loss_backward", AT_FUSED_BOX(distance_loss_backward));
}
