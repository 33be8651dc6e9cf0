// The CUDA implementations of the losses among torch.ops.at_fused.*: arguments to plans, plans to
// launches. Their schemas are in _ops.

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../box.h"
#include "../loss_arguments.h"
#include "device.h"
#include "lists.h"

namespace at_fused {
namespace {

// ---- at_loss and at_value_and_grad --------------------------------------------------------------

// What a loss needs beside its outputs, for all the launches of a list: counters (params.h), and
// the samples' losses, which need no start value. Of this call alone: what an operator kept from
// torch's allocator might be a CUDA graph's, or a pool's that ends.
class Workspace {
 public:
  Workspace(Device device, void* stream, int64_t launches, int64_t samples)
      : counters_(launches + samples),
        launches_(launches),
        memory_(new_doubles(device, divide_up(counters_, 2) + 1 + samples)) {
    check_cuda(cudaMemsetAsync(memory_.mutable_data_ptr(), 0, size_t(counters_) * 4,
                               static_cast<cudaStream_t>(stream)));
  }

  // For launch number `launch`, after those of `before` samples.
  void give(LossParams& params, int64_t launch, int64_t before) const {
    uint32_t* const counters = static_cast<uint32_t*>(memory_.mutable_data_ptr());
    params.finished = counters + launch;
    params.arrived = counters + launches_ + before;
    params.sum = static_cast<double*>(memory_.mutable_data_ptr()) + divide_up(counters_, 2);
    params.sample_losses = params.sum + 1 + before;
  }

 private:
  static Tensor new_doubles(Device device, int64_t count) {
    const int64_t stride = 1;
    return new_tensor(1, &count, &stride, aoti_torch_dtype_float64(), device);
  }

  int64_t counters_, launches_;
  Tensor memory_;
};

// Launches a list in parts of kMaxPairs. `options` are those of all parts. `plan(begin, params)`
// cuts params.count pairs of the list, from number `begin` on, and returns the shared memory of a
// block; `run(params, launch)` launches them.
template <class Arguments, class Plan, class Run>
Tensor launch_pairs(const Arguments& loss, const LossParams& options, void* stream, Plan plan,
                    Run run) {
  Tensor result = loss.new_loss();
  std::vector<std::pair<LossParams, Launch>> launches;
  int64_t samples = 0;
  bool counts = loss.reduction != Reduction::sample;
  for (size_t begin = 0; begin < loss.pairs.size(); begin += kMaxPairs) {
    LossParams params = options;
    params.eps = loss.eps;
    params.eps_mode = loss.eps_mode;
    params.form = loss.form;
    params.add = loss.reduction == Reduction::sum;
    params.of_samples = loss.reduction == Reduction::sample;
    params.continues = begin > 0;
    params.loss_fp64 = loss.fp64;
    params.loss = result.mutable_data_ptr();
    params.count = int32_t(std::min<size_t>(kMaxPairs, loss.pairs.size() - begin));
    const int64_t shared_bytes = plan(begin, params);
    for (int32_t i = 0; i < params.count; ++i) {
      params.pairs[i].number = int32_t(begin) + i;
      params.pairs[i].weight = loss.sample_weight(begin + size_t(i), params.pairs[i].B);
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
  // The losses of whole samples, as they are, take no counter.
  std::optional<Workspace> workspace;
  if (counts) workspace.emplace(loss.device, stream, int64_t(launches.size()), samples);
  int64_t before = 0;
  for (size_t i = 0; i < launches.size(); ++i) {
    auto& [params, launch] = launches[i];
    if (workspace) workspace->give(params, int64_t(i), before);
    before += params.samples;
    run(params, launch);
  }
  return result;
}

// As launch_pairs, for pairs of features. `place(at, pair)` says where results of pair number `at`
// go, whose student gradients are written to `outs` where samples stay on chip.
template <class Place>
Tensor launch_features(const LossArguments& loss, LossParams options, const Limits& limits,
                       void* stream, const std::vector<Feature>* outs, Place place) {
  options.p = loss.p;
  return launch_pairs(
      loss, options, stream,
      [&](size_t begin, LossParams& params) {
        std::vector<PairFeatures> features;
        for (size_t at = begin; at < begin + size_t(params.count); ++at) {
          const LossArguments::Pair& given = loss.pairs[at];
          check_extent(given.student);
          check_extent(given.teacher);
          features.push_back({given.student, given.teacher, outs ? (*outs)[at] : Feature{}});
        }
        const OnChip chip = plan_pairs(params.pairs, features, outs, loss.fp64, limits);
        params.map_bytes = int32_t(chip.map_bytes);
        for (int32_t i = 0; i < params.count; ++i) {
          const LossArguments::Pair& given = loss.pairs[begin + size_t(i)];
          PairParams& pair = params.pairs[i];
          pair.mask = given.mask;
          pair.student_scale = given.student_scale;
          pair.teacher_scale = given.teacher_scale;
          place(begin + size_t(i), pair);
        }
        return kControlBytes + kScratchBytes + chip.map_bytes + chip.kept_bytes;
      },
      [&](const LossParams& params, const Launch& launch) {
        const bool keeps = std::any_of(params.pairs, params.pairs + params.count,
                                       [](const PairParams& pair) { return pair.sweep.out; });
        keeps ? launch_at_value_and_grad(params, launch) : launch_at_loss(params, launch);
      });
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
  // With a gradient to come both sides' maps are kept: k where it is asked for, else the masked raw
  // map. Without, only blocks that share a sample need them, to meet.
  const bool keep = student_grad || teacher_grad;
  Tensors maps, teacher_maps;
  LossParams options{};
  options.scale = 1;
  options.student_grad = student_grad;
  options.teacher_grad = teacher_grad;
  Tensor result = launch_features(
      loss, options, limits, scope.stream(), nullptr, [&](size_t at, PairParams& pair) {
        if (!keep && pair.samples) return;
        maps.push_back(new_map(loss.pairs[at].student, loss.device));
        teacher_maps.push_back(new_map(loss.pairs[at].teacher, loss.device));
        pair.student_maps = maps.back().mutable_data_ptr();
        pair.teacher_maps = teacher_maps.back().mutable_data_ptr();
      });
  for (Tensor& map : teacher_maps) maps.push_back(std::move(map));
  if (!keep) maps.clear();
  return {std::move(result), std::move(maps)};
}

// Students that are too large to stay on chip are swept by a second launch, from the coefficients
// that the first one leaves.
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
  Tensors maps;                                      // until the launches are on their way
  std::vector<std::pair<size_t, const void*>> left;  // numbers and coefficients
  LossParams options{};
  options.scale = scale;
  options.sample_step = above.sample_stride;
  options.loss_gradient_fp64 = above.fp64;
  options.student_grad = true;
  Tensor result = launch_features(loss, options, limits, scope.stream(), &gradients.out,
                                  [&](size_t at, PairParams& pair) {
                                    pair.loss_gradient = above.of(int64_t(at));
                                    if (pair.sweep.out) return;
                                    maps.push_back(new_map(loss.pairs[at].student, loss.device));
                                    pair.student_maps = maps.back().mutable_data_ptr();
                                    left.emplace_back(at, pair.student_maps);
                                    if (pair.samples) return;
                                    maps.push_back(new_map(loss.pairs[at].teacher, loss.device));
                                    pair.teacher_maps = maps.back().mutable_data_ptr();
                                  });
  int64_t total = 0;
  for (const auto& [at, k] : left) total += total_bytes(loss.pairs[at].student);
  launch_parts(
      left.size(), SweepParams{p, 0, 0, false, {}}, 0, scope.stream(),
      [&](size_t i, SweepFeature& feature) {
        const auto [at, k] = left[i];
        feature.k = k;
        plan_sweep(feature, loss.pairs[at].student, gradients.out[at], total, limits);
      },
      launch_attention_map_backward);
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
  Tensors maps, teacher_maps;
  const auto result_of = [&](bool wanted, const MapLossArguments::Pair& pair, bool fp64,
                             Tensors& results) -> void* {
    if (!wanted) return nullptr;
    results.push_back(new_rows(pair.B, pair.N, accumulate_dtype(fp64), loss.device));
    return results.back().mutable_data_ptr();
  };
  LossParams options{};
  options.p = options.scale = 1;
  options.student_grad = student_grad;
  options.teacher_grad = teacher_grad;
  Tensor result = launch_pairs(
      loss, options, scope.stream(),
      [&](size_t begin, LossParams& params) {
        for (int32_t i = 0; i < params.count; ++i) {
          const MapLossArguments::Pair& given = loss.pairs[begin + size_t(i)];
          PairParams& pair = params.pairs[i];
          plan_map_loss(pair, map_feature(given, given.student, given.student_fp64),
                        map_feature(given, given.teacher, given.teacher_fp64), limits);
          pair.student_maps = result_of(student_grad, given, given.student_fp64, maps);
          pair.teacher_maps = result_of(teacher_grad, given, given.teacher_fp64, teacher_maps);
          pair.student_scale = pair.teacher_scale = 1;
        }
        return int64_t(kControlBytes);
      },
      launch_map_loss);
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
