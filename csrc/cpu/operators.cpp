// The operators on the CPU: the instruction-set level, tasks over the samples, and what the tasks
// make of them.

#include "../operators.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <fstream>
#include <memory>
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
  static const Kernels& chosen = [&]() -> const Kernels& {
    const std::vector<const Kernels*> usable = usable_kernels();
    const char* wanted = std::getenv("AT_FUSED_CPU_ISA");
    for (const Kernels* level : usable) {
      if (wanted && std::string(wanted) == level->name) return *level;
    }
    return *usable.back();
  }();
  return chosen;
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
constexpr int64_t kUsualCacheBytes = 32 << 20;
constexpr int64_t kPositionStep = 256;  // a cut through a row keeps runs of at least this length

// Bytes of a task: several tasks per thread, so that unequal ones even out, but none so large that
// a thread waits long for the last, nor so small that handing it out costs more than it brings.
int64_t task_bytes(int64_t total_bytes) {
  const int64_t tasks = 4 * int64_t(torch::stable::get_num_threads());
  return std::clamp<int64_t>(total_bytes / tasks, kSerialBytes / 2, 8 << 20);
}

// Cuts B samples of `lines` lines into tasks of about `bytes`, along samples while they are small
// and in multiples of `step` lines where one alone is larger.
void cut(std::vector<Task>& tasks, size_t number, int64_t B, int64_t lines, int64_t sample_bytes,
         int64_t bytes, int64_t step) {
  const int64_t parts = (sample_bytes + bytes / 2) / bytes;
  if (parts > 1 && lines > step) {
    const int64_t count = std::max<int64_t>(1, (lines / parts + step - 1) / step) * step;
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t begin = 0; begin < lines; begin += count) {
        tasks.push_back({number, b, b + 1, begin, std::min(begin + count, lines)});
      }
    }
    return;
  }
  const int64_t samples = std::max<int64_t>(1, bytes / sample_bytes);
  for (int64_t b = 0; b < B; b += samples) {
    tasks.push_back({number, b, std::min(b + samples, B), 0, lines});
  }
}

// Cuts a feature of a list of `total` bytes along its lines.
void cut_lines(std::vector<Task>& tasks, size_t number, const Feature& feature, int64_t total) {
  cut(tasks, number, feature.B, lines(feature), sample_bytes(feature), task_bytes(total), 1);
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

#if defined(__linux__)
// Fresh memory of this size is bound by page faults, one in 4 KiB; asked for 2 MiB pages before it
// is first written it is not.
void advise_huge_pages(const Feature& feature) {
  constexpr uintptr_t huge = 2 << 20;
  const uintptr_t first = reinterpret_cast<uintptr_t>(feature.data);
  const uintptr_t begin = (first + huge - 1) / huge * huge;
  const uintptr_t end = (first + total_bytes(feature)) / huge * huge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

// The cache that cores share. sysconf adds up those of a socket on some processors.
int64_t last_level_cache_bytes() {
  static const int64_t bytes = [] {
    int64_t kib = 0;
    std::ifstream("/sys/devices/system/cpu/cpu0/cache/index3/size") >> kib;
    return kib > 0 ? kib << 10 : kUsualCacheBytes;
  }();
  return bytes;
}
#else
void advise_huge_pages(const Feature&) {}
int64_t last_level_cache_bytes() { return kUsualCacheBytes; }
#endif

// Returns true for gradients too large for the cache. One that fits beside its features and a third
// tensor (the teacher's, or the gradient from above) is left there for the next operator; each line
// of a larger one would be read before it is written.
bool writes_past_caches(int64_t bytes) { return 3 * bytes > last_level_cache_bytes(); }

// ---- losses -----------------------------------------------------------------------------------

using Losses = std::vector<std::vector<double>>;  // of each pair's samples

// Reduces them as asked for: added in order, so that neither threads nor tasks can change a bit.
Tensor reduced(const LossArguments& loss, const Losses& losses) {
  std::vector<double> values;
  for (const std::vector<double>& of_samples : losses) {
    if (loss.reduction == Reduction::sample) {
      values.insert(values.end(), of_samples.begin(), of_samples.end());
      continue;
    }
    double of_pair = 0;
    for (double value : of_samples) of_pair += value;
    if (loss.reduction == Reduction::none || values.empty()) {
      values.push_back(of_pair);
    } else {
      values[0] += of_pair;
    }
  }
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

// Multiplies a map, or its coefficients, by the sample's mask.
void apply_mask(const Pair& pair, int64_t b, bool map_fp64, void* map) {
  if (!pair.mask) return;
  const int64_t N = pair.student.N;
  const auto multiply = [&](auto* values, const auto* factors) {
    for (int64_t n = 0; n < N; ++n) values[n] *= factors[b * N + n];
  };
  if (map_fp64) {
    multiply(static_cast<double*>(map), static_cast<const double*>(pair.mask));
  } else if (pair.fp64()) {
    multiply(static_cast<float*>(map), static_cast<const double*>(pair.mask));
  } else {
    multiply(static_cast<float*>(map), static_cast<const float*>(pair.mask));
  }
}

// Pairs of features at work.
class PairsAtWork {
 public:
  std::vector<Task> tasks;  // over positions
  int64_t total = 0;        // bytes that will be read
  std::vector<Maps> student_maps;

  PairsAtWork(const LossArguments& loss, bool student_grad, bool teacher_grad, Tensors& students,
              Tensors& teachers)
      : loss_(loss),
        student_grad_(student_grad),
        teacher_grad_(teacher_grad),
        missing_(loss.pairs.size()) {
    for (const Pair& pair : loss.pairs) {
      student_maps.emplace_back(students.emplace_back(new_map(pair.student, loss.device)));
      teacher_maps_.emplace_back(teachers.emplace_back(new_map(pair.teacher, loss.device)));
      losses_.emplace_back(pair.student.B);
      total += pair.student.B * pair.bytes_of_sample();
    }
    for (size_t i = 0; i < loss.pairs.size(); ++i) {
      const Feature& student = loss.pairs[i].student;
      const size_t before = tasks.size();
      cut(tasks, i, student.B, student.N, loss.pairs[i].bytes_of_sample(), task_bytes(total),
          kPositionStep);
      if (tasks[before].end == student.N) continue;
      const int64_t pieces = int64_t(tasks.size() - before) / student.B;
      missing_[i].reset(new std::atomic<int64_t>[student.B]);
      for (int64_t b = 0; b < student.B; ++b) missing_[i][b] = pieces;
    }
  }

  // Returns true for pairs whose samples are cut into pieces.
  bool is_cut(size_t number) const { return missing_[number] != nullptr; }

  // The maps of a task's samples [b0, b1), and losses and coefficient maps of those that are whole
  // with them.
  void run(const Task& task, int64_t b0, int64_t b1) {
    const Pair& pair = loss_.pairs[task.number];
    // Two long runs through memory, the student's last: the backward pass reads it again.
    for (int64_t b = b0; b < b1; ++b) {
      kernels().attention_map(pair.teacher, b, task.begin, task.end, loss_.p, pair.teacher_scale,
                              teacher_maps_[task.number].of(b), nullptr);
    }
    for (int64_t b = b0; b < b1; ++b) {
      kernels().attention_map(pair.student, b, task.begin, task.end, loss_.p, pair.student_scale,
                              student_maps[task.number].of(b), nullptr);
    }
    for (int64_t b = b0; b < b1; ++b) finish_sample(task.number, b);
  }

  Tensor total_loss() const { return reduced(loss_, losses_); }

 private:
  void finish_sample(size_t number, int64_t b) {
    // The thread that brings the last piece of a sample finishes it, and must see all the others'.
    if (is_cut(number) && missing_[number][b].fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    const Pair& pair = loss_.pairs[number];
    const bool student_fp64 = accumulates_fp64(pair.student);
    const bool teacher_fp64 = accumulates_fp64(pair.teacher);
    void* student = student_maps[number].of(b);
    void* teacher = teacher_maps_[number].of(b);
    apply_mask(pair, b, student_fp64, student);
    apply_mask(pair, b, teacher_fp64, teacher);
    losses_[number][b] =
        sample_loss(loss_, number, student, teacher, student_grad_ ? student : nullptr,
                    teacher_grad_ ? teacher : nullptr);
    if (student_grad_) apply_mask(pair, b, student_fp64, student);
    if (teacher_grad_) apply_mask(pair, b, teacher_fp64, teacher);
  }

  const LossArguments& loss_;
  bool student_grad_, teacher_grad_;
  std::vector<Maps> teacher_maps_;
  std::vector<std::unique_ptr<std::atomic<int64_t>[]>>
      missing_;  // pieces of each sample that is cut
  Losses losses_;
};

}  // namespace

Tensor compute_loss(const LossArguments& loss, bool student_grad, bool teacher_grad,
                    Tensors& student_maps, Tensors& teacher_maps) {
  PairsAtWork pairs(loss, student_grad, teacher_grad, student_maps, teacher_maps);
  run(pairs.tasks, pairs.total, [&](const Task& task) { pairs.run(task, task.b0, task.b1); });
  return pairs.total_loss();
}

Tensor compute_value_and_grad(const LossArguments& loss, const Gradients& gradients,
                              const LossGradient& loss_gradient, double scale) {
  Tensors student_maps, teacher_maps;
  PairsAtWork pairs(loss, true, false, student_maps, teacher_maps);
  int64_t student_total = 0;
  for (const Feature& out : gradients.out) {
    advise_huge_pages(out);
    student_total += total_bytes(out);
  }
  const bool stream = writes_past_caches(student_total);
  const auto sweep = [&](const Task& task, int64_t b) {
    kernels().sweep(gradients.features[task.number], nullptr, b, task.begin, task.end, loss.p,
                    scale * loss_gradient.value(task.number, b),
                    pairs.student_maps[task.number].of(b), nullptr, gradients.out[task.number],
                    stream);
  };
  run(pairs.tasks, pairs.total, [&](const Task& task) {
    if (pairs.is_cut(task.number)) return pairs.run(task, task.b0, task.b1);
    // Sample by sample: the student's is read again while it is in the second-level cache.
    const Task of_lines{task.number, 0, 0, 0, lines(gradients.features[task.number])};
    for (int64_t b = task.b0; b < task.b1; ++b) {
      pairs.run(task, b, b + 1);
      sweep(of_lines, b);
    }
  });
  // A sample that was cut is too large for that cache: all threads share its gradient.
  std::vector<Task> rest;
  for (size_t i = 0; i < gradients.features.size(); ++i) {
    if (pairs.is_cut(i)) cut_lines(rest, i, gradients.features[i], student_total);
  }
  run(rest, student_total, [&](const Task& task) {
    for (int64_t b = task.b0; b < task.b1; ++b) sweep(task, b);
  });
  return pairs.total_loss();
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
    cut(tasks, i, pair.student.B, 1, pair.bytes_of_sample(), task_bytes(total), 1);
  }
  run(tasks, total, [&](const Task& task) {
    const Pair& pair = loss.pairs[task.number];
    for (int64_t b = task.b0; b < task.b1; ++b) {
      losses[task.number][b] =
          sample_loss(loss, task.number, sample_of(pair.student, b), sample_of(pair.teacher, b),
                      student_maps[task.number].of(b), teacher_maps[task.number].of(b));
    }
  });
  return reduced(loss, losses);
}

// ---- maps, and gradients from their coefficients ----------------------------------------------

void compute_maps(const MapArguments& arguments) {
  const std::vector<Feature>& features = arguments.features;
  const int64_t total = total_bytes(features);
  std::vector<Task> tasks;
  for (size_t i = 0; i < features.size(); ++i) {
    cut(tasks, i, features[i].B, features[i].N, sample_bytes(features[i]), task_bytes(total),
        kPositionStep);
  }
  run(tasks, total, [&](const Task& task) {
    const size_t i = task.number;
    for (int64_t b = task.b0; b < task.b1; ++b) {
      kernels().attention_map(features[i], b, task.begin, task.end, arguments.p,
                              collapse_scale(arguments.collapse, features[i]),
                              arguments.maps[i].of(b), arguments.channels_of(i, b));
    }
  });
}

void compute_gradients(const SweepArguments& arguments) {
  const std::vector<Feature>& features = arguments.gradients.features;
  const std::vector<Feature>& out = arguments.gradients.out;
  const int64_t total = total_bytes(features);
  std::vector<Task> tasks;
  for (size_t i = 0; i < features.size(); ++i) {
    advise_huge_pages(out[i]);
    cut_lines(tasks, i, features[i], total);
  }
  const bool stream = writes_past_caches(total);
  run(tasks, total, [&](const Task& task) {
    const size_t i = task.number;
    for (int64_t b = task.b0; b < task.b1; ++b) {
      kernels().sweep(features[i], nullptr, b, task.begin, task.end, arguments.p,
                      arguments.loss_gradient.value(arguments.pairs[i], b), arguments.k[i].of(b),
                      arguments.channels_of(i, b), out[i], stream);
    }
  });
}

void compute_tap(const Tap& tap) {
  const Feature& feature = tap.feature;
  const bool in_place = tap.gradient.data == tap.out.data, maximum = tap.channels.first;
  const int64_t total = total_bytes(feature);
  if (!in_place) advise_huge_pages(tap.out);
  std::vector<Task> tasks;
  cut_lines(tasks, 0, feature, total);
  // In place a line is in the cache when it is written.
  const bool stream = !in_place && !maximum && writes_past_caches(total);
  run(tasks, total, [&](const Task& task) {
    for (int64_t b = task.b0; b < task.b1; ++b) {
      kernels().sweep(feature, &tap.gradient, b, task.begin, task.end, tap.p, tap.scale,
                      tap.k.of(b), static_cast<const int32_t*>(tap.channels.of(b)), tap.out,
                      stream);
    }
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
