// The loss operators on CUDA devices: they plan and launch the kernels.

#include <algorithm>
#include <utility>
#include <vector>

#include "device.h"

namespace at_fused {
namespace {

// Launches a list of pairs, kMaxPairs per launch. `options` are common to all launches. If `outs`
// is not null, students cached in shared memory write their gradients there. `set_maps(index,
// pair)` sets the maps in global memory that a pair needs.
template <class SetMaps>
Tensor launch_pairs(const LossArguments& loss, LossParams options, const DeviceScope& device,
                    bool raw_maps, const Feature* outs,
                    void (*run)(const LossParams&, const Launch&), SetMaps set_maps) {
  Tensor result = loss.new_loss();
  options.p = loss.p;
  options.eps = loss.eps;
  options.eps_mode = loss.eps_mode;
  options.form = loss.form;
  options.sums_pairs = loss.reduction == Reduction::sum;
  options.per_sample = loss.reduction == Reduction::sample;
  options.loss_fp64 = loss.fp64;
  options.loss = result.mutable_data_ptr();
  std::vector<std::pair<LossParams, Launch>> launches;
  int64_t samples = 0;
  for (size_t begin = 0; begin < loss.pairs.size(); begin += kMaxPairs) {
    LossParams params = options;
    params.continues_sum = options.sums_pairs && begin > 0;
    params.count = int32_t(std::min<size_t>(kMaxPairs, loss.pairs.size() - begin));
    for (size_t index = begin; index < begin + size_t(params.count); ++index) {
      samples += loss.pairs[index].student.B;
      check_extent(loss.pairs[index].student, samples);
      check_extent(loss.pairs[index].teacher, samples);
    }
    const SharedBytes shared = plan_pairs(params.pairs, &loss.pairs[begin], params.count, raw_maps,
                                          outs ? outs + begin : nullptr, loss.fp64, device.limits);
    for (int32_t i = 0; i < params.count; ++i) {
      const size_t index = begin + size_t(i);
      params.pairs[i].index = int32_t(index);
      params.pairs[i].weight = loss.sample_weight(index);
      set_maps(index, params.pairs[i]);
    }
    const int64_t blocks = assign_tasks(params.pairs, params.count);
    for (int32_t i = 0; i < params.count; ++i) {
      params.pairs[i].first_sample = params.samples;
      params.samples += params.pairs[i].B;
    }
    params.map_bytes = int32_t(shared.map_bytes);
    const int64_t feature_bytes = kScratchBytes + shared.map_bytes + shared.student_bytes;
    const int64_t shared_bytes = kControlBytes + (raw_maps ? 0 : feature_bytes);
    launches.emplace_back(params, device.launch(blocks, shared_bytes, loss.fp64));
  }
  // The workspace: a sum, the samples' losses, and counters, which must start at 0. It is allocated
  // per call: a persistent buffer could belong to a CUDA graph, or to a memory pool that is freed.
  const int64_t counters = int64_t(launches.size()) + samples, stride = 1;
  const int64_t size = 1 + samples + divide_up(counters, 2);
  Tensor workspace = new_tensor(1, &size, &stride, ScalarType::Double, loss.device);
  double* const sum = static_cast<double*>(workspace.mutable_data_ptr());
  double* sample_losses = sum + 1;
  uint32_t* finished = reinterpret_cast<uint32_t*>(sample_losses + samples);
  uint32_t* arrived = finished + launches.size();
  check_cuda(cudaMemsetAsync(finished, 0, size_t(counters) * sizeof(uint32_t),
                             static_cast<cudaStream_t>(device.stream)));
  for (auto& [params, launch] : launches) {
    params.sum = sum;
    params.sample_losses = sample_losses;
    params.finished = finished++;
    params.arrived = arrived;
    sample_losses += params.samples;
    arrived += params.samples;
    run(params, launch);
  }
  return result;
}

}  // namespace

Tensor compute_loss(const LossArguments& loss, bool student_grad, bool teacher_grad,
                    Tensors& student_maps, Tensors& teacher_maps) {
  const DeviceScope device(loss.device);
  LossParams options{};
  options.scale = 1;
  options.gradient[kStudent] = student_grad;
  options.gradient[kTeacher] = teacher_grad;
  return launch_pairs(loss, options, device, false, nullptr, launch_at_loss,
                      [&](size_t index, PairParams& pair) {
                        // Without gradients, only blocks that share a sample need global maps.
                        if (!student_grad && !teacher_grad && pair.samples_per_task) return;
                        student_maps.push_back(new_map(loss.pairs[index].student, loss.device));
                        teacher_maps.push_back(new_map(loss.pairs[index].teacher, loss.device));
                        pair.sides[kStudent].maps = student_maps.back().mutable_data_ptr();
                        pair.sides[kTeacher].maps = teacher_maps.back().mutable_data_ptr();
                      });
}

// A second launch sweeps students too large for shared memory, from coefficients of the first one.
Tensor compute_value_and_grad(const LossArguments& loss, const Gradients& gradients,
                              const LossGradient& loss_gradient, double scale) {
  const DeviceScope device(loss.device);
  const size_t count = loss.pairs.size();
  Tensors maps;                // keeps the memory of maps until the kernels are launched
  std::vector<Maps> k(count);  // coefficients of students for the second launch
  const auto add_map = [&](const Feature& feature) {
    maps.push_back(new_map(feature, loss.device));
    return Maps(maps.back());
  };
  LossParams options{};
  options.scale = scale;
  options.sample_stride = loss_gradient.sample_stride;
  options.loss_gradient_fp64 = loss_gradient.fp64;
  options.gradient[kStudent] = true;
  Tensor result = launch_pairs(loss, options, device, false, gradients.out.data(),
                               launch_at_value_and_grad, [&](size_t index, PairParams& pair) {
                                 pair.loss_gradient = loss_gradient.address(int64_t(index));
                                 if (pair.out.data) return;
                                 k[index] = add_map(loss.pairs[index].student);
                                 pair.sides[kStudent].maps = k[index].data;
                                 if (!pair.samples_per_task)
                                   pair.sides[kTeacher].maps =
                                       add_map(loss.pairs[index].teacher).data;
                               });
  const LossGradient no_gradient({}, {}, {});  // the coefficients already include it
  compute_gradients(
      {gradients, no_gradient, Ints(count), k, std::vector<Maps>(count), loss.p, loss.device});
  return result;
}

Tensor compute_map_loss(const LossArguments& loss, const std::vector<Maps>& student_maps,
                        const std::vector<Maps>& teacher_maps) {
  const DeviceScope device(loss.device);
  LossParams options{};
  options.scale = 1;
  options.gradient[kStudent] = options.gradient[kTeacher] = true;
  return launch_pairs(loss, options, device, true, nullptr, launch_map_loss,
                      [&](size_t index, PairParams& pair) {
                        pair.sides[kStudent].maps = student_maps[index].data;
                        pair.sides[kTeacher].maps = teacher_maps[index].data;
                      });
}

}  // namespace at_fused
