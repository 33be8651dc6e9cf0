// The CPU implementations of torch.ops.at_fused.distance_loss*. Their schemas are in _ops.

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../box.h"
#include "../distance.h"
#include "../distance_arguments.h"
#include "kernels.h"
#include "losses.h"
#include "tasks.h"

namespace at_fused {
namespace {

// Elements that are summed as one, whoever does it: results do not depend on the threads.
constexpr int64_t kPiece = 16384;

int64_t pieces_of(const DistanceArguments::Pair& pair) { return (pair.M + kPiece - 1) / kPiece; }

// f(pair number, b, piece, its first element, their number) for every piece of every sample.
template <class F>
void run_pieces(const DistanceArguments& arguments, const F& f) {
  std::vector<Task> tasks;
  for (size_t i = 0; i < arguments.pairs.size(); ++i) {
    const DistanceArguments::Pair& pair = arguments.pairs[i];
    cut(tasks, int64_t(i), arguments.B, pieces_of(pair), pair.bytes(), task_bytes(arguments.bytes),
        1);
  }
  run(tasks, arguments.bytes, [&](const Task& task) {
    const int64_t M = arguments.pairs[size_t(task.index)].M;
    for (int64_t b = task.b0; b < task.b1; ++b) {
      for (int64_t piece = task.begin; piece < task.end; ++piece) {
        const int64_t at = piece * kPiece;
        f(size_t(task.index), b, piece, at, std::min(kPiece, M - at));
      }
    }
  });
}

std::tuple<Tensor, Tensor> distance_loss(Tensors student, Tensors teacher,
                                         std::vector<double> weights, bool root,
                                         std::string reduction) {
  const DistanceArguments arguments(student, teacher);
  const int64_t count = int64_t(arguments.pairs.size()), B = arguments.B;
  const DistanceOptions options(weights, count, B, root, reduction);
  std::vector<std::vector<double>> sums;
  for (const DistanceArguments::Pair& pair : arguments.pairs) {
    sums.emplace_back(size_t(B * pieces_of(pair)));
  }
  run_pieces(arguments, [&](size_t i, int64_t b, int64_t piece, int64_t at, int64_t n) {
    const DistanceArguments::Pair& pair = arguments.pairs[i];
    sums[i][size_t(b * pieces_of(pair) + piece)] = kernels().squared_distance(
        pair.a.at(b, at), pair.a.dtype, pair.b.at(b, at), pair.b.dtype, n);
  });
  Tensor squares = new_rows(count, B, aoti_torch_dtype_float64(), arguments.device);
  double* to = static_cast<double*>(squares.mutable_data_ptr());
  std::vector<double> losses(options.sum ? 1 : size_t(count));
  for (size_t i = 0; i < sums.size(); ++i) {
    const size_t pieces = sums[i].size() / size_t(B);
    double loss = 0;
    for (size_t b = 0; b < size_t(B); ++b) {
      double total = 0;
      for (size_t piece = 0; piece < pieces; ++piece) total += sums[i][b * pieces + piece];
      *to++ = total;
      loss += root ? std::sqrt(total) : total;
    }
    losses[options.sum ? 0 : i] += options.sample_weight(i) * loss;
  }
  return {losses_of(losses, options.sum, arguments.fp64, arguments.device), std::move(squares)};
}

Tensors distance_loss_backward(Tensors a, Tensors b, Tensor squares, Tensor gradient,
                               std::vector<int64_t> pairs, std::vector<double> weights, bool root,
                               std::string reduction) {
  DistanceGradients gradients(a);
  const DistanceArguments arguments(a, b, &gradients);
  const DistanceBackward backward(squares, gradient, pairs, weights, root, reduction, arguments);
  std::vector<Samples> out;
  std::vector<double> above;
  for (size_t i = 0; i < a.size(); ++i) {
    Tensor& written = gradients.written[i];
    out.push_back({written.mutable_data_ptr(), arguments.pairs[i].a.dtype, written.stride(0)});
    advise_huge_pages(written.mutable_data_ptr(), written.numel() * written.element_size());
    above.push_back(value_of(backward.gradient, pairs[i]) *
                    backward.options.sample_weight(pairs[i]));
  }
  run_pieces(arguments, [&](size_t i, int64_t b, int64_t, int64_t at, int64_t n) {
    const DistanceArguments::Pair& pair = arguments.pairs[i];
    const double slope = distance_slope(backward.squares[pairs[i] * arguments.B + b], root);
    kernels().squared_distance_backward(pair.a.at(b, at), pair.a.dtype, pair.b.at(b, at),
                                        pair.b.dtype, n, above[i] * slope,
                                        const_cast<void*>(out[i].at(b, at)));
  });
  return gradients.finish();
}

}  // namespace
}  // namespace at_fused

STABLE_TORCH_LIBRARY_IMPL(at_fused, CPU, m) {
  m.impl("distance_loss", AT_FUSED_BOX(distance_loss));
  m.impl("distance_loss_backward", AT_FUSED_BOX(distance_loss_backward));
}
