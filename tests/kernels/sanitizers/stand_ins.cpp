// Stand-ins for the sanitized library: no kernels for AVX2 and AVX-512, and under ThreadSanitizer a
// parallel_for with std::thread. OpenMP is not instrumented, so its synchronisation is invisible
// and would cause false reports.
#include <torch/csrc/stable/c/shim.h>

#include <thread>
#include <vector>

#include "../../../csrc/cpu/kernels.h"

#if defined(__x86_64__)
extern const at_fused::Kernels at_fused::kernels_avx2 = {}, at_fused::kernels_avx512 = {};
#endif

#if defined(__SANITIZE_THREAD__)
extern "C" AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t, ParallelFunc f,
                                             void* data) {
  std::vector<std::thread> threads;
  for (int64_t i = begin; i < end; ++i) threads.emplace_back(f, i, i + 1, data);
  for (std::thread& thread : threads) thread.join();
  return 0;
}

extern "C" AOTITorchError torch_get_num_threads(uint32_t* count) {
  *count = 3;
  return 0;
}
#endif
