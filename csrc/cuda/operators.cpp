// The operators on CUDA devices: arguments to plans, plans to launches.

#include "../operators.h"

#include <algorithm>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "device.h"
#include "params.h"
#include "plan.h"

namespace at_fused {
namespace {

// ---- lists of any length, cut into launches ---------------------------------------------------

void check_samples(int64_t samples) {
  STD_TORCH_CHECK(samples <= kMaxExtent, "at_fused: at most 2^30 samples, got ", samples);
}

void check_extent(const Feature& x) {
  STD_TORCH_CHECK(x.C <= kMaxExtent && x.N <= kMaxExtent,
                  "at_fused: at most 2^30 channels and 2^30 positions, got ", x.C, " and ", x.N);
  check_samples(x.B);
}

int64_t check_blocks(int64_t blocks) {
  STD_TORCH_CHECK(blocks <= kMaxBlocks, "at_fused: too many blocks for one launch: ", blocks);
  return blocks;
}

// Launches a list of features in parts. `options` are those of all parts; `plan(at, feature)` fills
// in member number `at`.
template <class Params, class Plan, class Run>
void launch_features(size_t count, const Params& options, int32_t shared_bytes, void* stream,
                     Plan plan, Run run) {
  constexpr size_t most = std::extent_v<decltype(Params::features)>;
  for (size_t begin = 0; begin < count; begin += most) {
    Params params = options;
    params.count = int32_t(std::min(most, count - begin));
    Launch launch{0, shared_bytes, false, stream};
    for (int32_t i = 0; i < params.count; ++i) {
      plan(begin + size_t(i), params.features[i]);
      launch.fp64 |= params.features[i].view.dtype == Dtype::float64;
    }
    launch.blocks = check_blocks(number_tasks(params.features, params.count));
    run(params, launch);
  }
}

// Launches a list of pairs in parts. `options` are those of all parts. `plan(begin, params)` cuts
// params.count pairs of the list, from number `begin` on, and returns the shared memory of a block;
// `run(params, launch)` launches them.
template <class Plan, class Run>
Tensor launch_pairs(const LossArguments& loss, LossParams options, void* stream, Plan plan,
                    Run run) {
  Tensor result = loss.new_loss();
  options.p = loss.p;
  options.eps = loss.eps;
  options.eps_mode = loss.eps_mode;
  options.form = loss.form;
  options.add = loss.reduction == Reduction::sum;
  options.of_samples = loss.reduction == Reduction::sample;
  options.loss_fp64 = loss.fp64;
  options.loss = result.mutable_data_ptr();
  std::vector<std::pair<LossParams, Launch>> launches;
  int64_t samples = 0;
  bool counts = !options.of_samples;  // the losses of whole samples, as they are, take no counter
  for (size_t begin = 0; begin < loss.pairs.size(); begin += kMaxPairs) {
    LossParams params = options;
    params.continues = begin > 0;
    params.count = int32_t(std::min<size_t>(kMaxPairs, loss.pairs.size() - begin));
    const int64_t shared_bytes = plan(begin, params);
    for (int32_t i = 0; i < params.count; ++i) {
      params.pairs[i].number = int32_t(begin) + i;
      params.pairs[i].weight = loss.sample_weight(begin + size_t(i));
    }
    const int64_t blocks = check_blocks(number_tasks(params.pairs, params.count));
    for (int32_t i = 0; i < params.count; ++i) {
      params.pairs[i].first_sample = params.samples;
      samples += params.pairs[i].B;
      check_samples(samples);
      params.samples += params.pairs[i].B;
      counts |= !params.pairs[i].samples;
    }
    launches.emplace_back(params, Launch{blocks, int32_t(shared_bytes), loss.fp64, stream});
  }
  // Counters (params.h), a sum, and the samples' losses, which need no start value. Of this call
  // alone: what an operator kept from torch's allocator might be a CUDA graph's, or a pool's that
  // ends.
  std::optional<Tensor> workspace;
  if (counts) {
    const int64_t counters = int64_t(launches.size()) + samples, stride = 1;
    const int64_t size = divide_up(counters, 2) + 1 + samples;
    workspace = new_tensor(1, &size, &stride, aoti_torch_dtype_float64(), loss.device);
    void* const memory = workspace->mutable_data_ptr();
    check_cuda(cudaMemsetAsync(memory, 0, size_t(counters) * 4, static_cast<cudaStream_t>(stream)));
    uint32_t* finished = static_cast<uint32_t*>(memory);
    uint32_t* arrived = finished + launches.size();
    double* const sum = static_cast<double*>(memory) + divide_up(counters, 2);
    double* sample_losses = sum + 1;
    for (auto& [params, launch] : launches) {
      params.finished = finished++;
      params.arrived = arrived;
      params.sum = sum;
      params.sample_losses = sample_losses;
      arrived += params.samples;
      sample_losses += params.samples;
    }
  }
  for (const auto& [params, launch] : launches) run(params, launch);
  return result;
}

// As launch_pairs, for pairs of features. `give_maps(at, pair)` gives pair number `at` the maps
// that it needs in global memory. Student gradients are written to `outs` where samples stay on
// chip.
template <class GiveMaps>
Tensor launch_feature_pairs(const LossArguments& loss, const LossParams& options,
                            const Limits& limits, void* stream, const std::vector<Feature>* outs,
                            GiveMaps give_maps) {
  return launch_pairs(
      loss, options, stream,
      [&](size_t begin, LossParams& params) {
        for (size_t at = begin; at < begin + size_t(params.count); ++at) {
          check_extent(loss.pairs[at].student);
          check_extent(loss.pairs[at].teacher);
        }
        const OnChip chip = plan_pairs(params.pairs, &loss.pairs[begin], params.count,
                                       outs ? outs->data() + begin : nullptr, loss.fp64, limits);
        params.map_bytes = int32_t(chip.map_bytes);
        for (int32_t i = 0; i < params.count; ++i) give_maps(begin + size_t(i), params.pairs[i]);
        return kControlBytes + kScratchBytes + chip.map_bytes + chip.kept_bytes;
      },
      [&](const LossParams& params, const Launch& launch) {
        const bool keeps = std::any_of(params.pairs, params.pairs + params.count,
                                       [](const PairParams& pair) { return pair.sweep.out; });
        keeps ? launch_at_value_and_grad(params, launch) : launch_at_loss(params, launch);
      });
}

}  // namespace

// ---- losses -----------------------------------------------------------------------------------

Tensor compute_loss(const LossArguments& loss, bool student_grad, bool teacher_grad,
                    Tensors& student_maps, Tensors& teacher_maps) {
  const OnDevice scope(loss.device);
  LossParams options{};
  options.scale = 1;
  options.student_grad = student_grad;
  options.teacher_grad = teacher_grad;
  return launch_feature_pairs(
      loss, options, limits_of(loss.device), scope.stream(), nullptr,
      [&](size_t at, PairParams& pair) {
        // Without a gradient to come only blocks that share a sample need maps, to meet.
        if (!student_grad && !teacher_grad && pair.samples) return;
        student_maps.push_back(new_map(loss.pairs[at].student, loss.device));
        teacher_maps.push_back(new_map(loss.pairs[at].teacher, loss.device));
        pair.student_maps = student_maps.back().mutable_data_ptr();
        pair.teacher_maps = teacher_maps.back().mutable_data_ptr();
      });
}

// Students that are too large to stay on chip are swept by a second launch, from the coefficients
// that the first one leaves.
Tensor compute_value_and_grad(const LossArguments& loss, const Gradients& gradients,
                              const LossGradient& loss_gradient, double scale) {
  const OnDevice scope(loss.device);
  const Limits limits = limits_of(loss.device);
  Tensors maps;                                      // until the launches are on their way
  std::vector<std::pair<size_t, const void*>> left;  // numbers and coefficients
  const auto keep_map = [&](const Feature& feature) {
    maps.push_back(new_map(feature, loss.device));
    return maps.back().mutable_data_ptr();
  };
  LossParams options{};
  options.scale = scale;
  options.sample_step = loss_gradient.sample_stride;
  options.loss_gradient_fp64 = loss_gradient.fp64;
  options.student_grad = true;
  Tensor result = launch_feature_pairs(loss, options, limits, scope.stream(), &gradients.out,
                                       [&](size_t at, PairParams& pair) {
                                         pair.loss_gradient = loss_gradient.of(int64_t(at));
                                         if (pair.sweep.out) return;
                                         pair.student_maps = keep_map(loss.pairs[at].student);
                                         left.emplace_back(at, pair.student_maps);
                                         if (!pair.samples)
                                           pair.teacher_maps = keep_map(loss.pairs[at].teacher);
                                       });
  int64_t total = 0;
  for (const auto& [at, k] : left) total += total_bytes(loss.pairs[at].student);
  launch_features(
      left.size(), SweepParams{loss.p, 0, 0, false, {}}, 0, scope.stream(),
      [&](size_t i, SweepFeature& feature) {
        const auto [at, k] = left[i];
        feature.k = k;
        plan_sweep(feature, loss.pairs[at].student, gradients.out[at], total, limits);
      },
      launch_attention_map_backward);
  return result;
}

Tensor compute_map_loss(const LossArguments& loss, const std::vector<Maps>& student_maps,
                        const std::vector<Maps>& teacher_maps) {
  const OnDevice scope(loss.device);
  const Limits limits = limits_of(loss.device);
  LossParams options{};
  options.scale = 1;
  return launch_pairs(
      loss, options, scope.stream(),
      [&](size_t begin, LossParams& params) {
        for (int32_t i = 0; i < params.count; ++i) {
          const size_t at = begin + size_t(i);
          check_extent(loss.pairs[at].student);
          plan_map_loss(params.pairs[i], loss.pairs[at], limits);
          params.pairs[i].student_maps = student_maps[at].first;
          params.pairs[i].teacher_maps = teacher_maps[at].first;
        }
        return int64_t(kControlBytes);
      },
      launch_map_loss);
}

// ---- maps, and gradients from their coefficients ----------------------------------------------

void compute_maps(const MapArguments& arguments) {
  const OnDevice scope(arguments.device);
  const Limits limits = limits_of(arguments.device);
  const bool maximum = arguments.collapse == Collapse::max;
  const int64_t total = total_bytes(arguments.features);
  launch_features(
      arguments.features.size(), MapParams{arguments.p, 0, {}},
      maximum ? kMaximumBytes : kScratchBytes, scope.stream(),
      [&](size_t at, MapFeature& feature) {
        const Feature& x = arguments.features[at];
        check_extent(x);
        feature.map = arguments.maps[at].first;
        feature.scale = collapse_scale(arguments.collapse, x);
        if (maximum) feature.channels = reinterpret_cast<int32_t*>(arguments.channels[at].first);
        plan_map(feature, x, total, limits);
      },
      launch_attention_map);
}

void compute_gradients(const SweepArguments& arguments) {
  const OnDevice scope(arguments.device);
  const Limits limits = limits_of(arguments.device);
  const std::vector<Feature>& features = arguments.gradients.features;
  const LossGradient& above = arguments.loss_gradient;
  const bool maximum = !arguments.channels.empty();
  const int64_t total = total_bytes(features);
  launch_features(
      features.size(), SweepParams{arguments.p, above.sample_stride, 0, above.fp64, {}}, 0,
      scope.stream(),
      [&](size_t at, SweepFeature& feature) {
        check_extent(features[at]);
        feature.k = arguments.k[at].first;
        feature.loss_gradient = above.of(arguments.pairs[at]);
        if (maximum) feature.channels = reinterpret_cast<int32_t*>(arguments.channels[at].first);
        plan_sweep(feature, features[at], arguments.gradients.out[at], total, limits);
      },
      launch_attention_map_backward);
}

void compute_tap(const Tap& tap) {
  const OnDevice scope(tap.device);
  const Feature &feature = tap.feature, &add = tap.gradient;
  check_extent(feature);
  TapParams params{tap.p, tap.scale, add.data, add.batch, add.line, {}};
  params.feature.k = tap.k.first;
  params.feature.channels = reinterpret_cast<int32_t*>(tap.channels.first);
  plan_sweep(params.feature, feature, tap.out, total_bytes(feature), limits_of(tap.device), &add);
  const Launch launch{check_blocks(tasks_of(params.feature)), 0, accumulates_fp64(feature),
                      scope.stream()};
  launch_attention_tap_backward(params, launch);
}

}  // namespace at_fused

STABLE_TORCH_LIBRARY_IMPL(AT_FUSED_NAMESPACE, AT_FUSED_DEVICE_KEY, m) {
  at_fused::register_operators(m);
}
