// The CUDA implementations of the losses among torch.ops.at_fused.*: arguments to plans, plans to
// launches. Their schemas are in _ops.

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../box.h"
#include "../loss_arguments.h"
#include "checks.h"
#include "device.h"
#include "launch.h"

namespace at_fused {
namespace {

// ---- at_loss and at_value_and_grad --------------------------------------------------------------

int64_t batch_of(const LossArguments::Pair& pair) { return pair.student.B; }
int64_t batch_of(const MapLossArguments::Pair& pair) { return pair.B; }

// What a loss needs beside its outputs, for all the launches of a list: counters (params.h), and
// the samples' losses, which need no start value.
class Workspace {
 public:
  template <class Arguments>
  Workspace(const Arguments& loss, void* stream)
      : samples_(count_samples(loss)),
        counters_(loss.device, stream, 4 + 2 * samples_),
        losses_(new_losses(loss.device, samples_)) {}

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
  template <class Arguments>
  static int64_t count_samples(const Arguments& loss) {
    int64_t samples = 0;
    for (const auto& pair : loss.pairs) samples += batch_of(pair);
    STD_TORCH_CHECK(samples < kMaxExtent, "at_fused: at most 2^30 samples, got ", samples);
    return samples;
  }
  static Tensor new_losses(Device device, int64_t samples) {
    const int64_t count = samples + 1, stride = 1;
    return new_tensor(1, &count, &stride, aoti_torch_dtype_float64(), device);
  }

  int64_t samples_;
  Counters counters_;
  Tensor losses_;
};

// Launches a list in parts of kMaxPairs. `options` are those of all parts. `plan(at, i, pair)` cuts
// pair number `at`, the part's number i, and returns its tasks; `run(params, launch)` launches a
// part.
template <class Arguments, class Plan, class Run>
Tensor launch_pairs(const Arguments& loss, const LossParams& options, const Workspace& workspace,
                    void* stream, Plan plan, Run run) {
  Tensor result = loss.new_loss();
  for (size_t begin = 0; begin < loss.pairs.size(); begin += kMaxPairs) {
    LossParams params = options;
    params.eps = loss.eps;
    params.eps_mode = loss.eps_mode;
    params.form = loss.form;
    params.add = loss.reduction == Reduction::sum;
    params.of_samples = loss.reduction == Reduction::sample;
    params.continues = begin > 0;
    params.loss_fp64 = loss.fp64;
    params.first_pair = int32_t(begin);
    params.loss = result.mutable_data_ptr();
    workspace.give(params);
    params.count = int32_t(std::min<size_t>(kMaxPairs, loss.pairs.size() - begin));
    Launch launch{0, kControlBytes, loss.fp64, stream};
    for (int32_t i = 0; i < params.count; ++i) {
      PairParams& pair = params.pairs[i];
      pair.first_task = check_blocks(launch.blocks);
      pair.first_sample = params.samples;
      launch.blocks += plan(begin + size_t(i), i, pair);
      params.samples += pair.B;
    }
    check_blocks(launch.blocks);
    run(params, launch);
  }
  return result;
}

// Pairs of features: what stands in `pair` before it is cut.
void begin_pair(PairParams& pair, const LossArguments& loss, size_t at) {
  const LossArguments::Pair& given = loss.pairs[at];
  check_extent(given.student);
  check_extent(given.teacher);
  pair.mask = given.mask;
  pair.student_scale = given.student_scale;
  pair.teacher_scale = given.teacher_scale;
  pair.weight = loss.sample_weight(at, given.student.B);
}

// The shared memory of a launch that makes maps.
void share_maps(LossParams& params, Launch& launch) {
  int64_t map_bytes = 0;
  for (int32_t i = 0; i < params.count; ++i) {
    map_bytes = map_bytes_of_list(map_bytes, params.pairs[i], launch.fp64);
  }
  params.map_bytes = int32_t(map_bytes);
  launch.shared_bytes += int32_t(kScratchBytes + map_bytes);
}

std::tuple<Tensor, Tensors> at_loss(Tensors student, Tensors teacher, Tensors masks,
                                    std::vector<double> weights, std::vector<int64_t> skip_tokens,
                                    double p, std::string collapse, std::string form,
                                    std::string reduction, std::string eps_mode, double eps,
                                    bool student_grad, bool teacher_grad) {
  const LossArguments loss(student, teacher, masks, weights, skip_tokens, p, collapse, form,
                           reduction, eps_mode, eps);
  const OnDevice scope(loss.device);
  const Limits limits = limits_of(loss.device);
  const Workspace workspace(loss, scope.stream());
  int64_t total = 0;
  for (const LossArguments::Pair& pair : loss.pairs) {
    total += total_bytes(pair.student) + total_bytes(pair.teacher);
  }
  // With a gradient to come both sides' maps are kept: k where it is asked for, else the masked raw
  // map.
  // Without, only blocks that share a sample need them, to meet.
  const bool keep = student_grad || teacher_grad;
  Tensors maps, teacher_maps;
  LossParams options{};
  options.p = loss.p;
  options.student_grad = student_grad;
  options.teacher_grad = teacher_grad;
  Tensor result = launch_pairs(
      loss, options, workspace, scope.stream(),
      [&](size_t at, int32_t, PairParams& pair) {
        const LossArguments::Pair& given = loss.pairs[at];
        begin_pair(pair, loss, at);
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
      [&](LossParams& params, Launch& launch) {
        share_maps(params, launch);
        launch_at_loss(params, launch);
      });
  for (Tensor& map : teacher_maps) maps.push_back(std::move(map));
  if (!keep) maps.clear();
  return {std::move(result), std::move(maps)};
}

std::tuple<Tensor, Tensors> at_value_and_grad(Tensors student, Tensors teacher, Tensors masks,
                                              std::vector<double> weights,
                                              std::vector<int64_t> skip_tokens, double p,
                                              std::string collapse, std::string form,
                                              std::string reduction, std::string eps_mode,
                                              double eps, double scale,
                                              std::optional<Tensor> loss_gradient) {
  STD_TORCH_CHECK(!student.empty(), "at_fused: as many teachers as students, got 0");
  const OnDevice scope(device_of(student[0]));
  // First: it settles in which layout a student is read.
  Gradients gradients(student, skip_of_students(skip_tokens, student.size()));
  const LossArguments loss(student, teacher, masks, weights, skip_tokens, p, collapse, form,
                           reduction, eps_mode, eps);
  const Limits limits = limits_of(loss.device);
  const LossGradient above(loss_gradient, loss.numbers(), student);
  const Workspace workspace(loss, scope.stream());
  Tensors maps;  // until the launch is on its way
  LossParams options{};
  options.p = loss.p;
  options.student_grad = true;
  GradientParams gradient{};
  int64_t kept_bytes = 0;
  Tensor result = launch_pairs(
      loss, options, workspace, scope.stream(),
      [&](size_t at, int32_t i, PairParams& pair) {
        if (i == 0) {
          gradient = {};
          gradient.scale = scale;
          gradient.sample_step = above.sample_stride;
          gradient.loss_gradient_fp64 = above.fp64;
          workspace.give(gradient);
          kept_bytes = 0;
        }
        const LossArguments::Pair& given = loss.pairs[at];
        begin_pair(pair, loss, at);
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
      [&](LossParams& params, Launch& launch) {
        share_maps(params, launch);
        launch.shared_bytes += int32_t(kept_bytes);
        launch_at_value_and_grad(params, gradient, launch);
      });
  return {std::move(result), gradients.finish()};
}

// ---- map_loss -----------------------------------------------------------------------------------

// A raw map as a feature of one channel.
Feature map_feature(const MapLossArguments::Pair& pair, const void* data, bool fp64) {
  const Feature map{
      data,  fp64 ? Dtype::float64 : Dtype::float32, Layout::planar, pair.B, 1, pair.N, pair.N,
      pair.N};
  check_extent(map);
  return map;
}

std::tuple<Tensor, Tensors> map_loss(Tensors student, Tensors teacher, std::vector<double> weights,
                                     std::string form, std::string reduction, std::string eps_mode,
                                     double eps, bool student_grad, bool teacher_grad) {
  const MapLossArguments loss(student, teacher, weights, form, reduction, eps_mode, eps);
  const OnDevice scope(loss.device);
  const Limits limits = limits_of(loss.device);
  const Workspace workspace(loss, scope.stream());
  Tensors maps, teacher_maps;
  const auto result_of = [&](bool wanted, const MapLossArguments::Pair& pair, bool fp64,
                             Tensors& results) -> void* {
    if (!wanted) return nullptr;
    results.push_back(new_rows(pair.B, pair.N, accumulate_dtype(fp64), loss.device));
    return results.back().mutable_data_ptr();
  };
  LossParams options{};
  options.p = 1;
  options.student_grad = student_grad;
  options.teacher_grad = teacher_grad;
  Tensor result = launch_pairs(
      loss, options, workspace, scope.stream(),
      [&](size_t at, int32_t, PairParams& pair) {
        const MapLossArguments::Pair& given = loss.pairs[at];
        const int64_t tasks =
            plan_map_loss(pair, map_feature(given, given.student, given.student_fp64),
                          map_feature(given, given.teacher, given.teacher_fp64), limits);
        pair.student_maps = result_of(student_grad, given, given.student_fp64, maps);
        pair.teacher_maps = result_of(teacher_grad, given, given.teacher_fp64, teacher_maps);
        pair.student_scale = pair.teacher_scale = 1;
        pair.weight = loss.sample_weight(at, given.B);
        return tasks;
      },
      [&](const LossParams& params, const Launch& launch) { launch_map_loss(params, launch); });
  for (Tensor& map : teacher_maps) maps.push_back(std::move(map));
  return {std::move(result), std::move(maps)};
}

}  // namespace
}  // namespace at_fused

STABLE_TORCH_LIBRARY_IMPL(AT_FUSED_NAMESPACE, AT_FUSED_DEVICE_KEY, m) {
  m.impl("at_loss", AT_FUSED_BOX(at_loss));
  m.impl("at_value_and_grad", AT_FUSED_BOX(at_value_and_grad));
  m.impl("map_loss", AT_FUSED_BOX(map_loss));
}
