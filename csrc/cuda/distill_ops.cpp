// The CUDA implementations of Hinton's loss and of distances. Their schemas are in _ops.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../distill_arguments.h"
#include "checks.h"
#include "device.h"
#include "distill.h"

namespace at_fused {
namespace {

bool aligned_rows(const void* data, Dtype dtype, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0 &&
         stride * element_size(dtype) % kVectorBytes == 0;
}
bool aligned_rows(const Logits& x) { return !x.data || aligned_rows(x.data, x.dtype, x.stride); }

// Elements that rows of vectors come in; those of a thread's turn for every dtype.
constexpr int64_t kTurnElements = 8;

// ---- Hinton's loss ----------------------------------------------------------------------------

// Rows are a warp's where they are short, or long enough and so many that all have work.
KdParams kd_params(const KdArguments& kd, const Limits& limits) {
  STD_TORCH_CHECK(kd.B <= kMaxExtent, "at_fused: at most 2^30 rows, got ", kd.B);
  KdParams params{};
  params.student = kd.student;
  params.teacher = kd.teacher;
  params.labels = kd.labels;
  params.label_stride = kd.label_stride;
  params.K = kd.K;
  params.B = int32_t(kd.B);
  const bool many = kd.B >= 2 * int64_t(limits.multiprocessors) * (kThreads / 32);
  params.group = kd.K <= 256 || (kd.K <= 2048 && many) ? 32 : kThreads;
  params.options = kd.options;
  return params;
}

Launch kd_launch(KdParams& params, bool fp64, void* stream) {
  params.vector = params.K % kTurnElements == 0 && aligned_rows(params.student) &&
                  aligned_rows(params.teacher) && aligned_rows(params.student_gradient) &&
                  aligned_rows(params.teacher_gradient);
  return {check_blocks(divide_up(params.B, kThreads / params.group)), kKdBytes, fp64, stream};
}

std::tuple<Tensor, Tensor, Tensor> kd_loss(Tensor student, Tensor teacher,
                                           std::optional<Tensor> labels, double temperature,
                                           double alpha, double label_smoothing,
                                           int64_t ignore_index) {
  const KdArguments kd(student, teacher, labels, temperature, alpha, label_smoothing, ignore_index);
  const OnDevice scope(kd.device);
  const Counters counters(kd.device, scope.stream(), 1);
  Tensor loss = new_losses(true, 1, kd.fp64, kd.device);
  Tensor valid = new_losses(true, 1, true, kd.device);
  Tensor stats = new_rows(kd.B, kStatistics, aoti_torch_dtype_float64(), kd.device);
  KdParams params = kd_params(kd, limits_of(kd.device));
  params.stats = static_cast<double*>(stats.mutable_data_ptr());
  params.valid = static_cast<double*>(valid.mutable_data_ptr());
  params.loss = loss.mutable_data_ptr();
  params.loss_fp64 = kd.fp64;
  params.finished = counters.data();
  launch_kd_loss(params, kd_launch(params, kd.fp64, scope.stream()));
  return {std::move(loss), std::move(stats), std::move(valid)};
}

Tensors kd_loss_backward(Tensor student, Tensor teacher, std::optional<Tensor> labels, Tensor stats,
                         Tensor valid, Tensor gradient, double temperature, double alpha,
                         double label_smoothing, int64_t ignore_index, bool student_grad,
                         bool teacher_grad) {
  if (!student_grad && !teacher_grad) return {};
  const OnDevice scope(device_of(student));
  std::optional<LogitsGradient> to_student, to_teacher;
  if (student_grad) to_student.emplace(student);
  if (teacher_grad) to_teacher.emplace(teacher);
  const KdArguments kd(student, teacher, labels, temperature, alpha, label_smoothing, ignore_index);
  const KdBackward backward(stats, valid, gradient, kd);
  KdParams params = kd_params(kd, limits_of(kd.device));
  params.stats = const_cast<double*>(backward.stats);
  params.valid = const_cast<double*>(backward.valid);
  params.gradient = backward.gradient;
  params.gradient_fp64 = backward.gradient_fp64;
  const auto place = [](std::optional<LogitsGradient>& to, Dtype dtype) {
    if (!to) return Logits{nullptr, dtype, 0};
    return Logits{to->written.mutable_data_ptr(), dtype, to->written.stride(0)};
  };
  params.student_gradient = place(to_student, kd.student.dtype);
  params.teacher_gradient = place(to_teacher, kd.teacher.dtype);
  launch_kd_loss_backward(params, kd_launch(params, kd.fp64, scope.stream()));
  Tensors gradients;
  if (to_student) gradients.push_back(to_student->finish());
  if (to_teacher) gradients.push_back(to_teacher->finish());
  return gradients;
}

// ---- distances ------------------------------------------------------------------------

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
          params.pairs[i].weight = options.weights[size_t(params.pairs[i].row)];
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
                   params.pairs[i].weight = backward.options.weights[size_t(row)];
                   params.pairs[i].gradient = backward.gradient.of(row);
                 }
                 launch_distance_loss_backward(params, launch);
               });
  return gradients.finish();
}

}  // namespace
}  // namespace at_fused

STABLE_TORCH_LIBRARY_IMPL(AT_FUSED_NAMESPACE, AT_FUSED_DEVICE_KEY, m) {
  m.impl("kd_loss", TORCH_BOX(&at_fused::kd_loss));
  m.impl("kd_loss_backward", TORCH_BOX(&at_fused::kd_loss_backward));
  m.impl("distance_loss", TORCH_BOX(&at_fused::distance_loss));
  m.impl("distance_loss_backward", TORCH_BOX(&at_fused::distance_loss_backward));
}
