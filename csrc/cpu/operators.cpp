// The CPU operators: choice of the instruction set, tasks for threads, losses, maps and gradients.

#include "../operators.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <numeric>
#include <string>
#include <vector>

#include "kernels.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace at_fused {
namespace {

// ---- instruction sets -------------------------------------------------------------------------

// Returns the kernels that this processor can run, widest vectors last.
std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> usable = {&kernels_baseline};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    usable.push_back(&kernels_avx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      usable.push_back(&kernels_avx512);
    }
  }
#endif
  return usable;
}

// Returns the kernels of AT_FUSED_CPU_ISA, for tests and comparisons; by default the widest.
const Kernels& kernels() {
  static const Kernels* selected = [] {
    const std::vector<const Kernels*> usable = usable_kernels();
    const char* requested = std::getenv("AT_FUSED_CPU_ISA");
    for (const Kernels* candidate : usable) {
      if (requested && std::string(requested) == candidate->name) return candidate;
    }
    return usable.back();
  }();
  return *selected;
}

std::string cpu_isa() { return kernels().name; }

std::vector<std::string> cpu_instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* candidate : usable_kernels()) names.push_back(candidate->name);
  return names;
}

// ---- tasks for torch's threads ----------------------------------------------------------------

// A part of a feature or pair: samples [b0, b1), or lines or positions [begin, end) of one sample.
struct Task {
  size_t index;  // of the feature or pair in its list
  int64_t b0, b1;
  int64_t begin, end;
};

constexpr int64_t kSerialBytes = 1 << 16;  // smaller lists run faster on one thread
constexpr int64_t kPositionStep = 256;     // positions are split at multiples of this

// Splits B samples of `lines` lines into tasks. A task has several small samples, or a multiple of
// `step` lines of a large one. `total` is the bytes of the whole list. Four tasks per thread
// balance the load; bounds on their size limit the wait for the last task and the scheduling cost.
void split(std::vector<Task>& tasks, int64_t total, size_t index, int64_t B, int64_t lines,
           int64_t sample_bytes, int64_t step) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t bytes = std::clamp<int64_t>(total / (4 * threads), kSerialBytes / 2, 8 << 20);
  const int64_t parts = (sample_bytes + bytes / 2) / bytes;
  int64_t samples = std::max<int64_t>(1, bytes / sample_bytes), count = lines;
  if (parts > 1 && lines > step) {
    samples = 1;
    count = std::max<int64_t>(1, (lines / parts + step - 1) / step) * step;
  }
  for (int64_t b = 0; b < B; b += samples) {
    for (int64_t begin = 0; begin < lines; begin += count) {
      tasks.push_back({index, b, std::min(b + samples, B), begin, std::min(begin + count, lines)});
    }
  }
}

void split_lines(std::vector<Task>& tasks, int64_t total, size_t index, const Feature& feature) {
  split(tasks, total, index, feature.B, lines(feature), sample_bytes(feature), 1);
}

// Runs f(task) for every task. Idle threads take the next task, so f must not depend on the thread.
template <class F>
void run_tasks(const std::vector<Task>& tasks, int64_t total_bytes, const F& f) {
  std::atomic<size_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    for (size_t i = next++; i < tasks.size(); i = next++) f(tasks[i]);
  };
  const int64_t threads = total_bytes < kSerialBytes ? 1 : torch::stable::get_num_threads();
  const int64_t workers = std::min<int64_t>(threads, int64_t(tasks.size()));
  if (workers <= 1) {
    work(0, 1);
  } else {
    torch::stable::parallel_for(0, workers, 1, work);
  }
}

// Runs f(task, b) for every sample of every task.
template <class F>
void run_samples(const std::vector<Task>& tasks, int64_t total_bytes, const F& f) {
  run_tasks(tasks, total_bytes, [&](const Task& task) {
    for (int64_t b = task.b0; b < task.b1; ++b) f(task, b);
  });
}

// Page faults on every 4 KiB dominate the first write to new memory. With 2 MiB pages they do not.
void advise_huge_pages([[maybe_unused]] const Feature& feature) {
#if defined(__linux__)
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t first = reinterpret_cast<uintptr_t>(feature.data);
  const uintptr_t begin = (first + page - 1) / page * page;
  const uintptr_t end = (first + total_bytes(feature)) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Returns true for gradients too large for the last-level cache. A gradient that fits with its
// features and a third tensor (the teacher's features or the upstream gradient) stays cached for
// the next operator. For larger ones, non-temporal stores avoid reading cache lines before writing
// them.
bool writes_past_caches(int64_t bytes) {
  static const int64_t cache_kib = [] {
    int64_t kib = 32 << 10;  // if Linux does not say; sysconf would add all caches of a socket
    std::ifstream("/sys/devices/system/cpu/cpu0/cache/index3/size") >> kib;
    return kib;
  }();
  return 3 * bytes > cache_kib << 10;
}

// ---- losses -----------------------------------------------------------------------------------

using Losses = std::vector<std::vector<double>>;  // per pair and sample

// Applies the reduction. The order of additions is fixed, so threads do not change the bits.
Tensor reduce(const LossArguments& loss, const Losses& losses) {
  std::vector<double> values;
  double total = 0;
  for (const std::vector<double>& sample_losses : losses) {
    const double pair_loss = std::accumulate(sample_losses.begin(), sample_losses.end(), 0.0);
    total += pair_loss;
    if (loss.reduction == Reduction::none) values.push_back(pair_loss);
    if (loss.reduction != Reduction::sample) continue;
    values.insert(values.end(), sample_losses.begin(), sample_losses.end());
  }
  if (loss.reduction == Reduction::sum) values.push_back(total);
  Tensor result = loss.new_loss();
  for (size_t i = 0; i < values.size(); ++i) {
    store_value(result.mutable_data_ptr(), loss.fp64, int64_t(i), values[i]);
  }
  return result;
}

// Returns a sample's loss. Writes coefficient maps to the results that are not null.
double sample_loss(const LossArguments& loss, size_t index, const void* student,
                   const void* teacher, void* student_result, void* teacher_result) {
  const Pair& pair = loss.pairs[index];
  return kernels().sample_loss(
      {student, teacher, student_result, teacher_result, accumulates_fp64(pair.student),
       accumulates_fp64(pair.teacher), pair.student.N, loss.form, loss.eps_mode, loss.eps,
       loss.sample_weight(index), loss.p * pair.student_scale, loss.p * pair.teacher_scale});
}

// Multiplies the map or the coefficient map of sample b by its mask, if there is one.
void apply_mask(const Pair& pair, const Feature& feature, int64_t b, void* map) {
  if (!pair.mask) return;
  const auto multiply = [&](auto* values) {
    for (int64_t n = 0; n < feature.N; ++n) {
      values[n] *= value_or_one(pair.mask, pair.fp64(), b * feature.N + n);
    }
  };
  accumulates_fp64(feature) ? multiply(static_cast<double*>(map))
                            : multiply(static_cast<float*>(map));
}

using SweepFunction = std::function<void(const Task&, int64_t)>;

// Computes the losses of pairs of features, and their maps: coefficient maps for sides that need a
// gradient, else raw maps. `sweep(task, b)` writes the gradient of the student's lines as soon as
// the coefficients are known.
Tensor run_pairs(const LossArguments& loss, bool student_grad, bool teacher_grad, Tensors& students,
                 Tensors& teachers, const SweepFunction& sweep = nullptr) {
  std::vector<Maps> student_maps, teacher_maps;
  Losses losses;
  int64_t total = 0;
  for (const Pair& pair : loss.pairs) {
    student_maps.emplace_back(students.emplace_back(new_map(pair.student, loss.device)));
    teacher_maps.emplace_back(teachers.emplace_back(new_map(pair.teacher, loss.device)));
    losses.emplace_back(pair.student.B);
    total += pair.student.B * pair.bytes_of_sample();
  }
  // A sample larger than a task is split over several. Its loss is computed once all maps are done,
  // and its gradient once all losses are done.
  std::vector<Task> tasks, large, large_lines;
  for (size_t i = 0; i < loss.pairs.size(); ++i) {
    const Feature& student = loss.pairs[i].student;
    split(tasks, total, i, student.B, student.N, loss.pairs[i].bytes_of_sample(), kPositionStep);
    if (tasks.back().begin == 0) continue;
    for (int64_t b = 0; b < student.B; ++b) large.push_back({i, b, b + 1, 0, student.N});
    split_lines(large_lines, total, i, student);
  }
  const auto finish_sample = [&](const Task& task, int64_t b) {
    const Pair& pair = loss.pairs[task.index];
    void* student = student_maps[task.index].sample(b);
    void* teacher = teacher_maps[task.index].sample(b);
    apply_mask(pair, pair.student, b, student);
    apply_mask(pair, pair.teacher, b, teacher);
    losses[task.index][b] =
        sample_loss(loss, task.index, student, teacher, student_grad ? student : nullptr,
                    teacher_grad ? teacher : nullptr);
    if (student_grad) apply_mask(pair, pair.student, b, student);
    if (teacher_grad) apply_mask(pair, pair.teacher, b, teacher);
  };
  run_tasks(tasks, total, [&](const Task& task) {
    const Pair& pair = loss.pairs[task.index];
    // With a sweep, process one sample at a time, while the student's features are in the L2 cache.
    // Otherwise process all teacher samples, then all student samples. These are long sequential
    // reads, and they leave the students in a cache for the backward pass.
    const int64_t step = sweep ? 1 : task.b1 - task.b0;
    for (int64_t first = task.b0; first < task.b1; first += step) {
      const int64_t end = first + step;
      for (const bool teacher : {true, false}) {
        const Feature& x = teacher ? pair.teacher : pair.student;
        const double scale = teacher ? pair.teacher_scale : pair.student_scale;
        const Maps& maps = (teacher ? teacher_maps : student_maps)[task.index];
        for (int64_t b = first; b < end; ++b) {
          kernels().attention_map(x, b, task.begin, task.end, loss.p, scale, maps.sample(b),
                                  nullptr);
        }
      }
      if (task.end - task.begin < pair.student.N) continue;
      for (int64_t b = first; b < end; ++b) finish_sample(task, b);
      if (sweep) sweep({task.index, first, end, 0, lines(pair.student)}, first);
    }
  });
  run_samples(large, total, finish_sample);
  if (sweep) run_samples(large_lines, total, sweep);
  return reduce(loss, losses);
}

}  // namespace

Tensor compute_loss(const LossArguments& loss, bool student_grad, bool teacher_grad,
                    Tensors& student_maps, Tensors& teacher_maps) {
  return run_pairs(loss, student_grad, teacher_grad, student_maps, teacher_maps);
}

Tensor compute_value_and_grad(const LossArguments& loss, const Gradients& gradients,
                              const LossGradient& loss_gradient, double scale) {
  int64_t total = 0;
  for (const Feature& out : gradients.out) {
    advise_huge_pages(out);
    total += total_bytes(out);
  }
  const bool stream = writes_past_caches(total);
  Tensors student_maps, teacher_maps;
  return run_pairs(loss, true, false, student_maps, teacher_maps, [&](const Task& task, int64_t b) {
    const size_t i = task.index;
    kernels().sweep({gradients.features[i], gradients.out[i], nullptr, b, task.begin, task.end,
                     loss.p, scale * loss_gradient.value(int64_t(i), b),
                     Maps(student_maps[i]).sample(b), nullptr, stream});
  });
}

Tensor compute_map_loss(const LossArguments& loss, const std::vector<Maps>& student_maps,
                        const std::vector<Maps>& teacher_maps) {
  std::vector<Task> tasks;
  Losses losses;
  int64_t total = 0;
  for (const Pair& pair : loss.pairs) total += pair.student.B * pair.bytes_of_sample();
  for (size_t i = 0; i < loss.pairs.size(); ++i) {
    const Pair& pair = loss.pairs[i];
    losses.emplace_back(pair.student.B);
    split(tasks, total, i, pair.student.B, 1, pair.bytes_of_sample(), 1);
  }
  run_samples(tasks, total, [&](const Task& task, int64_t b) {
    const size_t i = task.index;
    losses[i][b] = sample_loss(loss, i, sample_of(loss.pairs[i].student, b),
                               sample_of(loss.pairs[i].teacher, b), student_maps[i].sample(b),
                               teacher_maps[i].sample(b));
  });
  return reduce(loss, losses);
}

// ---- maps, and gradients from their coefficients ----------------------------------------------

void compute_maps(const MapArguments& arguments) {
  const std::vector<Feature>& features = arguments.features;
  const int64_t total = total_bytes(features);
  std::vector<Task> tasks;
  for (size_t i = 0; i < features.size(); ++i) {
    const Feature& x = features[i];
    split(tasks, total, i, x.B, x.N, sample_bytes(x), kPositionStep);
  }
  run_samples(tasks, total, [&](const Task& task, int64_t b) {
    const size_t i = task.index;
    kernels().attention_map(features[i], b, task.begin, task.end, arguments.p,
                            collapse_scale(arguments.collapse, features[i]),
                            arguments.maps[i].sample(b), arguments.channels[i].channels(b));
  });
}

void compute_gradients(const SweepArguments& arguments) {
  const std::vector<Feature>& features = arguments.gradients.features;
  const std::vector<Feature>& out = arguments.gradients.out;
  const int64_t total = total_bytes(features);
  std::vector<Task> tasks;
  for (size_t i = 0; i < features.size(); ++i) {
    advise_huge_pages(out[i]);
    split_lines(tasks, total, i, features[i]);
  }
  const bool stream = writes_past_caches(total);
  run_samples(tasks, total, [&](const Task& task, int64_t b) {
    const size_t i = task.index;
    kernels().sweep({features[i], out[i], nullptr, b, task.begin, task.end, arguments.p,
                     arguments.loss_gradient.value(arguments.pairs[i], b), arguments.k[i].sample(b),
                     arguments.channels[i].channels(b), stream});
  });
}

void compute_tap(const Tap& tap) {
  const Feature& feature = tap.feature;
  const bool in_place = tap.gradient.data == tap.out.data, is_max = tap.channels.data;
  const int64_t total = total_bytes(feature);
  if (!in_place) advise_huge_pages(tap.out);
  std::vector<Task> tasks;
  split_lines(tasks, total, 0, feature);
  // In place, non-temporal stores save nothing: the line was read, so it is in a cache.
  const bool stream = !in_place && !is_max && writes_past_caches(total);
  run_samples(tasks, total, [&](const Task& task, int64_t b) {
    kernels().sweep({feature, tap.out, &tap.gradient, b, task.begin, task.end, tap.p, tap.scale,
                     tap.k.sample(b), tap.channels.channels(b), stream});
  });
}

}  // namespace at_fused

STABLE_TORCH_LIBRARY_IMPL(at_fused, CPU, m) { at_fused::register_operators(m); }

STABLE_TORCH_LIBRARY_FRAGMENT(at_fused, m) {
  m.def("cpu_isa() -> str");
  m.def("cpu_instruction_sets() -> str[]");
}

STABLE_TORCH_LIBRARY_IMPL(at_fused, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&at_fused::cpu_isa));
  m.impl("cpu_instruction_sets", TORCH_BOX(&at_fused::cpu_instruction_sets));
}
