// The operators on the CPU: the instruction-set level, tasks over the samples, and what the tasks
// make of them.

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

// ---- levels -----------------------------------------------------------------------------------

// Those that this processor has, lowest first.
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

// AT_FUSED_CPU_ISA asks for a lower level than the highest, for tests and comparisons.
const Kernels& kernels() {
  static const Kernels* chosen = [] {
    const std::vector<const Kernels*> usable = usable_kernels();
    const char* wanted = std::getenv("AT_FUSED_CPU_ISA");
    for (const Kernels* level : usable) {
      if (wanted && std::string(wanted) == level->name) return level;
    }
    return usable.back();
  }();
  return *chosen;
}

std::string cpu_isa() { return kernels().name; }

std::vector<std::string> cpu_isa_levels() {
  std::vector<std::string> names;
  for (const Kernels* level : usable_kernels()) names.push_back(level->name);
  return names;
}

// ---- tasks: how work is shared out over torch's threads ---------------------------------------

// A piece of one tensor or pair: samples [b0, b1), or lines or positions [begin, end) of one.
struct Task {
  size_t number;  // in the list
  int64_t b0, b1;
  int64_t begin, end;
};

constexpr int64_t kSerialBytes = 1 << 16;  // below this a second thread costs more than it brings
constexpr int64_t kPositionStep = 256;     // a cut through a row keeps runs of at least this length

// Cuts B samples of `lines` lines, of a list of `total` bytes, along samples while they are small
// and in multiples of `step` lines where one alone is large. Several tasks per thread, so that
// unequal ones even out, but none so large that a thread waits long for the last, nor so small that
// handing it out costs more than it brings.
void cut(std::vector<Task>& tasks, int64_t total, size_t number, int64_t B, int64_t lines,
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
      tasks.push_back({number, b, std::min(b + samples, B), begin, std::min(begin + count, lines)});
    }
  }
}

void cut_lines(std::vector<Task>& tasks, int64_t total, size_t number, const Feature& feature) {
  cut(tasks, total, number, feature.B, lines(feature), sample_bytes(feature), 1);
}

// Runs f(task) for every task; idle threads take the next one. Who runs a task never changes what
// it computes.
template <class F>
void run(const std::vector<Task>& tasks, int64_t total_bytes, const F& f) {
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
  run(tasks, total_bytes, [&](const Task& task) {
    for (int64_t b = task.b0; b < task.b1; ++b) f(task, b);
  });
}

// Fresh memory of this size is bound by page faults, one in 4 KiB; asked for 2 MiB pages before it
// is first written it is not.
void advise_huge_pages([[maybe_unused]] const Feature& feature) {
#if defined(__linux__)
  constexpr uintptr_t huge = 2 << 20;
  const uintptr_t first = reinterpret_cast<uintptr_t>(feature.data);
  const uintptr_t begin = (first + huge - 1) / huge * huge;
  const uintptr_t end = (first + total_bytes(feature)) / huge * huge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Returns true for gradients too large for the cache that cores share. One that fits beside its
// features and a third tensor (the teacher's, or the gradient from above) is left there for the
// next operator; each line of a larger one would be read before it is written.
bool writes_past_caches(int64_t bytes) {
  static const int64_t cache_kib = [] {
    int64_t kib = 32 << 10;  // where Linux does not say; sysconf would add up those of a socket
    std::ifstream("/sys/devices/system/cpu/cpu0/cache/index3/size") >> kib;
    return kib;
  }();
  return 3 * bytes > cache_kib << 10;
}

// ---- losses -----------------------------------------------------------------------------------

using Losses = std::vector<std::vector<double>>;  // of each pair's samples

// Reduces them as asked for: added in order, so that neither threads nor tasks can change a bit.
Tensor reduced(const LossArguments& loss, const Losses& losses) {
  std::vector<double> values;
  double total = 0;
  for (const std::vector<double>& of_samples : losses) {
    const double of_pair = std::accumulate(of_samples.begin(), of_samples.end(), 0.0);
    total += of_pair;
    if (loss.reduction == Reduction::none) values.push_back(of_pair);
    if (loss.reduction != Reduction::sample) continue;
    values.insert(values.end(), of_samples.begin(), of_samples.end());
  }
  if (loss.reduction == Reduction::sum) values.push_back(total);
  Tensor result = loss.new_loss();
  for (size_t i = 0; i < values.size(); ++i) {
    store_loss(result.mutable_data_ptr(), loss.fp64, int64_t(i), values[i]);
  }
  return result;
}

// A sample's loss from its maps, and its coefficient maps where a result is wanted.
double sample_loss(const LossArguments& loss, size_t number, const void* student,
                   const void* teacher, void* student_result, void* teacher_result) {
  const Pair& pair = loss.pairs[number];
  return kernels().sample_loss(
      {student, teacher, student_result, teacher_result, accumulates_fp64(pair.student),
       accumulates_fp64(pair.teacher), pair.student.N, loss.form, loss.eps_mode, loss.eps,
       loss.sample_weight(number), loss.p * pair.student_scale, loss.p * pair.teacher_scale});
}

// Multiplies a feature's map, or its coefficients, by the sample's mask.
void apply_mask(const Pair& pair, const Feature& feature, int64_t b, void* map) {
  if (!pair.mask) return;
  const auto multiply = [&](auto* values) {
    for (int64_t n = 0; n < feature.N; ++n) {
      values[n] *= factor_of(pair.mask, pair.fp64(), b * feature.N + n);
    }
  };
  accumulates_fp64(feature) ? multiply(static_cast<double*>(map))
                            : multiply(static_cast<float*>(map));
}

using SweepTask = std::function<void(const Task&, int64_t)>;

// The losses of pairs of features, and their maps: coefficient maps where a gradient is asked for.
// `sweep(task, b)` writes the gradient of the student's lines, as soon as its coefficients are
// there.
Tensor run_pairs(const LossArguments& loss, bool student_grad, bool teacher_grad, Tensors& students,
                 Tensors& teachers, const SweepTask& sweep = nullptr) {
  std::vector<Maps> student_maps, teacher_maps;
  Losses losses;
  int64_t total = 0;
  for (const Pair& pair : loss.pairs) {
    student_maps.emplace_back(students.emplace_back(new_map(pair.student, loss.device)));
    teacher_maps.emplace_back(teachers.emplace_back(new_map(pair.teacher, loss.device)));
    losses.emplace_back(pair.student.B);
    total += pair.student.B * pair.bytes_of_sample();
  }
  // Samples that are larger than a task are cut into pieces for all threads: their losses wait for
  // all maps, and their gradients for all losses.
  std::vector<Task> tasks, large, large_lines;
  for (size_t i = 0; i < loss.pairs.size(); ++i) {
    const Feature& student = loss.pairs[i].student;
    cut(tasks, total, i, student.B, student.N, loss.pairs[i].bytes_of_sample(), kPositionStep);
    if (tasks.back().begin == 0) continue;
    for (int64_t b = 0; b < student.B; ++b) large.push_back({i, b, b + 1, 0, student.N});
    cut_lines(large_lines, total, i, student);
  }
  const auto find_loss = [&](const Task& task, int64_t b) {
    const Pair& pair = loss.pairs[task.number];
    void* student = student_maps[task.number].of(b);
    void* teacher = teacher_maps[task.number].of(b);
    apply_mask(pair, pair.student, b, student);
    apply_mask(pair, pair.teacher, b, teacher);
    losses[task.number][b] =
        sample_loss(loss, task.number, student, teacher, student_grad ? student : nullptr,
                    teacher_grad ? teacher : nullptr);
    if (student_grad) apply_mask(pair, pair.student, b, student);
    if (teacher_grad) apply_mask(pair, pair.teacher, b, teacher);
  };
  run(tasks, total, [&](const Task& task) {
    const Pair& pair = loss.pairs[task.number];
    // With a sweep sample by sample: the student's is read again while it is in the second-level
    // cache. Else two long runs through memory, the student's last, as a backward pass reads it.
    const int64_t step = sweep ? 1 : task.b1 - task.b0;
    for (int64_t first = task.b0; first < task.b1; first += step) {
      const int64_t end = first + step;
      for (const bool teacher : {true, false}) {
        const Feature& x = teacher ? pair.teacher : pair.student;
        const double scale = teacher ? pair.teacher_scale : pair.student_scale;
        const Maps& maps = (teacher ? teacher_maps : student_maps)[task.number];
        for (int64_t b = first; b < end; ++b) {
          kernels().attention_map(x, b, task.begin, task.end, loss.p, scale, maps.of(b), nullptr);
        }
      }
      if (task.end - task.begin < pair.student.N) continue;
      for (int64_t b = first; b < end; ++b) find_loss(task, b);
      if (sweep) sweep({task.number, first, end, 0, lines(pair.student)}, first);
    }
  });
  run_samples(large, total, find_loss);
  if (sweep) run_samples(large_lines, total, sweep);
  return reduced(loss, losses);
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
    const size_t i = task.number;
    kernels().sweep({gradients.features[i], gradients.out[i], nullptr, b, task.begin, task.end,
                     loss.p, scale * loss_gradient.value(int64_t(i), b),
                     Maps(student_maps[i]).of(b), nullptr, stream});
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
    cut(tasks, total, i, pair.student.B, 1, pair.bytes_of_sample(), 1);
  }
  run_samples(tasks, total, [&](const Task& task, int64_t b) {
    const size_t i = task.number;
    losses[i][b] = sample_loss(loss, i, sample_of(loss.pairs[i].student, b),
                               sample_of(loss.pairs[i].teacher, b), student_maps[i].of(b),
                               teacher_maps[i].of(b));
  });
  return reduced(loss, losses);
}

// ---- maps, and gradients from their coefficients ----------------------------------------------

void compute_maps(const MapArguments& arguments) {
  const std::vector<Feature>& features = arguments.features;
  const int64_t total = total_bytes(features);
  std::vector<Task> tasks;
  for (size_t i = 0; i < features.size(); ++i) {
    const Feature& x = features[i];
    cut(tasks, total, i, x.B, x.N, sample_bytes(x), kPositionStep);
  }
  run_samples(tasks, total, [&](const Task& task, int64_t b) {
    const size_t i = task.number;
    kernels().attention_map(features[i], b, task.begin, task.end, arguments.p,
                            collapse_scale(arguments.collapse, features[i]),
                            arguments.maps[i].of(b), arguments.channels[i].channels(b));
  });
}

void compute_gradients(const SweepArguments& arguments) {
  const std::vector<Feature>& features = arguments.gradients.features;
  const std::vector<Feature>& out = arguments.gradients.out;
  const int64_t total = total_bytes(features);
  std::vector<Task> tasks;
  for (size_t i = 0; i < features.size(); ++i) {
    advise_huge_pages(out[i]);
    cut_lines(tasks, total, i, features[i]);
  }
  const bool stream = writes_past_caches(total);
  run_samples(tasks, total, [&](const Task& task, int64_t b) {
    const size_t i = task.number;
    kernels().sweep({features[i], out[i], nullptr, b, task.begin, task.end, arguments.p,
                     arguments.loss_gradient.value(arguments.pairs[i], b), arguments.k[i].of(b),
                     arguments.channels[i].channels(b), stream});
  });
}

void compute_tap(const Tap& tap) {
  const Feature& feature = tap.feature;
  const bool in_place = tap.gradient.data == tap.out.data, maximum = tap.channels.first;
  const int64_t total = total_bytes(feature);
  if (!in_place) advise_huge_pages(tap.out);
  std::vector<Task> tasks;
  cut_lines(tasks, total, 0, feature);
  // In place a line is in the cache when it is written.
  const bool stream = !in_place && !maximum && writes_past_caches(total);
  run_samples(tasks, total, [&](const Task& task, int64_t b) {
    kernels().sweep({feature, tap.out, &tap.gradient, b, task.begin, task.end, tap.p, tap.scale,
                     tap.k.of(b), tap.channels.channels(b), stream});
  });
}

}  // namespace at_fused

STABLE_TORCH_LIBRARY_IMPL(at_fused, CPU, m) { at_fused::register_operators(m); }

STABLE_TORCH_LIBRARY_FRAGMENT(at_fused, m) {
  m.def("cpu_isa() -> str");
  m.def("cpu_isa_levels() -> str[]");
}

STABLE_TORCH_LIBRARY_IMPL(at_fused, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&at_fused::cpu_isa));
  m.impl("cpu_isa_levels", TORCH_BOX(&at_fused::cpu_isa_levels));
}
