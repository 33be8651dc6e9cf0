// The CUDA implementations of torch.ops.at_fused.*: arguments to plans, plans to launches. Their
// schemas are in _ops.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../arguments.h"
#include "device.h"
#include "launch.h"

namespace at_fused {
namespace {

void check_extent(const Feature& x) {
  STD_TORCH_CHECK(x.C <= kMaxExtent && x.N <= kMaxExtent,
                  "at_fused: at most 2^30 channels and 2^30 positions, got ", x.C, " and ", x.N);
}

// The number of the next task of a launch that has so many.
int32_t begin_task(int64_t tasks) {
  STD_TORCH_CHECK(tasks <= kMaxBlocks, "at_fused: too many blocks for one launch: ", tasks);
  return int32_t(tasks);
}

// ---- attention_map ----------------------------------------------------------------------------

Tensors attention_map(Tensors tensors, double p, std::string collapse, bool absolute,
                      std::vector<int64_t> sizes) {
  check_exponent(p);
  if (tensors.empty()) return {};
  const Device device = device_of(tensors[0]);
  const OnDevice scope(device);
  const Limits limits = limits_of(device);
  const std::vector<Feature> features = native_features(tensors);
  int64_t total = 0;
  for (const Feature& x : features) total += total_bytes(x);
  Tensors maps;
  for (size_t begin = 0; begin < features.size(); begin += kMaxFeatures) {
    MapParams params{};
    params.p = p;
    Launch launch{0, kScratchBytes, false, scope.stream()};
    params.count = int32_t(std::min<size_t>(kMaxFeatures, features.size() - begin));
    for (int32_t i = 0; i < params.count; ++i) {
      const Feature& x = features[begin + size_t(i)];
      check_extent(x);
      MapFeature& feature = params.features[i];
      maps.push_back(new_map(x, device));
      feature.map = maps.back().mutable_data_ptr();
      feature.scale = collapse_scale(collapse_of(collapse), x);
      feature.first_task = begin_task(launch.blocks);
      launch.blocks += plan_map(feature, x, total, limits);
      launch.fp64 |= accumulates_fp64(x);
    }
    begin_task(launch.blocks);
    launch_attention_map(params, launch);
  }
  return maps;
}

// ---- attention_map_backward -------------------------------------------------------------------

Tensors attention_map_backward(Tensors tensors, Tensors coefficients,
                               std::optional<Tensor> loss_gradient, std::vector<int64_t> pairs,
                               double p, bool absolute, std::vector<int64_t> sizes,
                               Tensors channels) {
  const size_t n = tensors.size();
  check_sweep(tensors, coefficients, channels, pairs, p);
  if (n == 0) return {};
  const Device device = device_of(tensors[0]);
  const OnDevice scope(device);
  const Limits limits = limits_of(device);
  const LossGradient gradient(loss_gradient, pairs, device);
  Gradients gradients(tensors);
  int64_t total = 0;
  for (const Feature& x : gradients.features) total += 2 * total_bytes(x);
  for (size_t begin = 0; begin < n; begin += kMaxFeatures) {
    SweepParams params{};
    params.p = p;
    params.loss_gradient_fp64 = gradient.fp64;
    Launch launch{0, 0, false, scope.stream()};
    params.count = int32_t(std::min<size_t>(kMaxFeatures, n - begin));
    for (int32_t i = 0; i < params.count; ++i) {
      const size_t at = begin + size_t(i);
      const Feature& x = gradients.features[at];
      check_extent(x);
      SweepFeature& feature = params.features[i];
      feature.k = coefficient_map(coefficients[at], x, x.N, device).first;
      feature.loss_gradient = gradient.of(pairs[at]);
      feature.first_task = begin_task(launch.blocks);
      launch.blocks += plan_sweep(feature, x, gradients.out[at], total, limits);
      launch.fp64 |= accumulates_fp64(x);
    }
    begin_task(launch.blocks);
    launch_attention_map_backward(params, launch);
  }
  return gradients.finish();
}

// ---- at_loss and at_value_and_grad --------------------------------------------------------------

// What a loss needs beside its outputs, for all the launches of a list: counters (params.h), and
// the samples' losses, which need no start value.
class Workspace {
 public:
  Workspace(const LossArguments& loss, void* stream)
      : samples_(count_samples(loss)),
        counters_(loss.device, stream, 4 + 2 * samples_),
        losses_(new_losses(loss, samples_)) {}

  void give(LossParams& params) const {
    params.finished = counters_.data();
    params.arrived = counters_.data() + 4;
    params.sum = static_cast<double*>(losses_.mutable_data_ptr());
    params.sample_losses = params.sum + 1;
  }
  void give(GradientParams& params) const {
    params.ticket = counters_.data() + 1;
    params.done = counters_.data() + 2;
    params.ready = counters_.data() + 4 + samples_;
  }

 private:
  static int64_t count_samples(const LossArguments& loss) {
    int64_t samples = 0;
    for (const LossArguments::Pair& pair : loss.pairs) samples += pair.student.B;
    STD_TORCH_CHECK(samples < kMaxExtent, "at_fused: at most 2^30 samples, got ", samples);
    return samples;
  }
  static Tensor new_losses(const LossArguments& loss, int64_t samples) {
    const int64_t count = samples + 1, stride = 1;
    return new_tensor(1, &count, &stride, aoti_torch_dtype_float64(), loss.device);
  }

  int64_t samples_;
  Counters counters_;
  Tensor losses_;
};

// Launches a list in parts of kMaxPairs. `plan(at, i, pair)` cuts pair number `at`, the part's
// number i, and returns its tasks; `run(params, launch)` launches a part.
template <class Plan, class Run>
Tensor launch_pairs(const LossArguments& loss, bool student_grad, bool teacher_grad,
                    const Workspace& workspace, void* stream, Plan plan, Run run) {
  Tensor result = loss.new_loss();
  for (size_t begin = 0; begin < loss.pairs.size(); begin += kMaxPairs) {
    LossParams params{};
    params.p = loss.p;
    params.eps = loss.eps;
    params.form = loss.form;
    params.student_grad = student_grad;
    params.teacher_grad = teacher_grad;
    params.add = loss.sum;
    params.continues = begin > 0;
    params.loss_fp64 = loss.fp64;
    params.first_pair = int32_t(begin);
    params.loss = result.mutable_data_ptr();
    workspace.give(params);
    params.count = int32_t(std::min<size_t>(kMaxPairs, loss.pairs.size() - begin));
    Launch launch{0, 0, loss.fp64, stream};
    int64_t map_bytes = 0;
    for (int32_t i = 0; i < params.count; ++i) {
      const LossArguments::Pair& given = loss.pairs[begin + size_t(i)];
      check_extent(given.student);
      check_extent(given.teacher);
      PairParams& pair = params.pairs[i];
      pair.student_scale = given.student_collapse;
      pair.teacher_scale = given.teacher_collapse;
      pair.weight = given.weight;
      pair.first_task = begin_task(launch.blocks);
      pair.first_sample = params.samples;
      launch.blocks += plan(begin + size_t(i), i, pair);
      params.samples += pair.B;
      map_bytes = map_bytes_of_list(map_bytes, pair, loss.fp64);
    }
    begin_task(launch.blocks);
    params.map_bytes = int32_t(map_bytes);
    launch.shared_bytes = int32_t(kControlBytes + kScratchBytes + map_bytes);
    run(params, launch);
  }
  return result;
}

std::tuple<Tensor, Tensors> at_loss(Tensors student, Tensors teacher, std::vector<double> weights,
                                    double p, std::string collapse, std::string form,
                                    std::string reduction, double eps, bool student_grad,
                                    bool teacher_grad) {
  const LossArguments loss(student, teacher, weights, p, collapse, form, reduction, eps);
  const OnDevice scope(loss.device);
  const Limits limits = limits_of(loss.device);
  const Workspace workspace(loss, scope.stream());
  int64_t total = 0;
  for (const LossArguments::Pair& pair : loss.pairs) {
    total += total_bytes(pair.student) + total_bytes(pair.teacher);
  }
  // With a gradient to come both sides' maps are kept: k where it is asked for, else the raw map.
  // Without, only blocks that share a sample need them, to meet.
  const bool keep = student_grad || teacher_grad;
  Tensors maps, teacher_maps;
  Tensor result = launch_pairs(
      loss, student_grad, teacher_grad, workspace, scope.stream(),
      [&](size_t at, int32_t, PairParams& pair) {
        const LossArguments::Pair& given = loss.pairs[at];
        const int64_t tasks =
            plan_loss(pair, given.student, given.teacher, total, loss.fp64, limits);
        if (keep || !pair.samples) {
          maps.push_back(new_map(given.student, loss.device));
          teacher_maps.push_back(new_map(given.teacher, loss.device));
          pair.student_maps = maps.back().mutable_data_ptr();
          pair.teacher_maps = teacher_maps.back().mutable_data_ptr();
        }
        return tasks;
      },
      [&](const LossParams& params, const Launch& launch) { launch_at_loss(params, launch); });
  for (Tensor& map : teacher_maps) maps.push_back(std::move(map));
  if (!keep) maps.clear();
  return {std::move(result), std::move(maps)};
}

std::tuple<Tensor, Tensors> at_value_and_grad(Tensors student, Tensors teacher,
                                              std::vector<double> weights, double p,
                                              std::string collapse, std::string form,
                                              std::string reduction, double eps, double scale,
                                              std::optional<Tensor> loss_gradient) {
  STD_TORCH_CHECK(!student.empty(), "at_fused: as many teachers as students, got 0");
  const OnDevice scope(device_of(student[0]));
  Gradients gradients(student);  // first: it settles in which layout a student is read
  const LossArguments loss(student, teacher, weights, p, collapse, form, reduction, eps);
  const Limits limits = limits_of(loss.device);
  const LossGradient above(loss_gradient, loss.numbers(), loss.device);
  const Workspace workspace(loss, scope.stream());
  Tensors maps;  // until the launch is on its way
  GradientParams gradient{};
  int64_t kept_bytes = 0;
  Tensor result = launch_pairs(
      loss, true, false, workspace, scope.stream(),
      [&](size_t at, int32_t i, PairParams& pair) {
        if (i == 0) {
          gradient = {};
          gradient.scale = scale;
          gradient.loss_gradient_fp64 = above.fp64;
          workspace.give(gradient);
          kept_bytes = 0;
        }
        const LossArguments::Pair& given = loss.pairs[at];
        int64_t kept = 0;
        const int64_t tasks = plan_gradient(pair, gradient.pairs[i], given.student, given.teacher,
                                            gradients.out[at], loss.fp64, limits, kept);
        gradient.pairs[i].loss_gradient = above.of(int64_t(at));
        kept_bytes = std::max(kept_bytes, kept);
        if (!pair.samples) {
          gradient.queue = true;
          maps.push_back(new_map(given.student, loss.device));
          pair.student_maps = maps.back().mutable_data_ptr();
          maps.push_back(new_map(given.teacher, loss.device));
          pair.teacher_maps = maps.back().mutable_data_ptr();
        }
        return tasks;
      },
      [&](const LossParams& params, Launch launch) {
        launch.shared_bytes += int32_t(kept_bytes);
        launch_at_value_and_grad(params, gradient, launch);
      });
  return {std::move(result), gradients.finish()};
}

}  // namespace
}  // namespace at_fused

STABLE_TORCH_LIBRARY_IMPL(AT_FUSED_NAMESPACE, AT_FUSED_DEVICE_KEY, m) {
  m.impl("attention_map", TORCH_BOX(&at_fused::attention_map));
  m.impl("at_loss", TORCH_BOX(&at_fused::at_loss));
  m.impl("attention_map_backward", TORCH_BOX(&at_fused::attention_map_backward));
  m.impl("at_value_and_grad", TORCH_BOX(&at_fused::at_value_and_grad));
}
