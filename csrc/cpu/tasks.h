// How work is shared out over torch's threads, and what is asked of the system's memory.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <fstream>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace at_fused {

// A piece of one tensor or pair: samples [b0, b1), or lines or positions [begin, end) of one.
struct Task {
  int64_t index;
  int64_t b0, b1;
  int64_t begin, end;
};

constexpr int64_t kSerialBytes = 1 << 16;  // below this a second thread costs more than it brings
constexpr int64_t kUsualCacheBytes = 32 << 20;
constexpr int64_t kPositionStep = 256;  // a cut through a row keeps runs of at least this length

// Bytes of a task: several tasks per thread, so that unequal ones even out, but none so large that
// a thread waits long for the last, nor so small that handing it out costs more than it brings.
inline int64_t task_bytes(int64_t total_bytes) {
  const int64_t tasks = 4 * int64_t(torch::stable::get_num_threads());
  return std::clamp<int64_t>(total_bytes / tasks, kSerialBytes / 2, 8 << 20);
}

// Cuts B samples of `lines` lines into tasks of about `bytes`, along samples while they are small
// and in multiples of `step` lines where one alone is larger.
inline void cut(std::vector<Task>& tasks, int64_t index, int64_t B, int64_t lines,
                int64_t sample_bytes, int64_t bytes, int64_t step) {
  const int64_t parts = (sample_bytes + bytes / 2) / bytes;
  if (parts > 1 && lines > step) {
    const int64_t count = std::max<int64_t>(1, (lines / parts + step - 1) / step) * step;
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t begin = 0; begin < lines; begin += count) {
        tasks.push_back({index, b, b + 1, begin, std::min(begin + count, lines)});
      }
    }
    return;
  }
  const int64_t samples = std::max<int64_t>(1, bytes / sample_bytes);
  for (int64_t b = 0; b < B; b += samples) {
    tasks.push_back({index, b, std::min(b + samples, B), 0, lines});
  }
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
inline void advise_huge_pages(void* data, int64_t bytes) {
  constexpr uintptr_t huge = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + huge - 1) / huge * huge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / huge * huge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

// The cache that cores share. sysconf adds up those of a socket on some processors.
inline int64_t last_level_cache_bytes() {
  static const int64_t bytes = [] {
    int64_t kib = 0;
    std::ifstream("/sys/devices/system/cpu/cpu0/cache/index3/size") >> kib;
    return kib > 0 ? kib << 10 : kUsualCacheBytes;
  }();
  return bytes;
}
#else
inline void advise_huge_pages(void*, int64_t) {}
inline int64_t last_level_cache_bytes() { return kUsualCacheBytes; }
#endif

// Returns true for gradients too large for the cache. One that fits beside its features and a third
// tensor (the teacher's, or the gradient from above) is left there for the next operator; each line
// of a larger one would be read before it is written.
inline bool writes_past_caches(int64_t bytes) { return 3 * bytes > last_level_cache_bytes(); }

}  // namespace at_fused
