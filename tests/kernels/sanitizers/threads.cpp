// torch's parallel_for by threads that ThreadSanitizer knows: OpenMP's, which meet in code that is
// not instrumented, would look like races. Linked into the library under test (cpu_library.py).
#include <torch/csrc/stable/c/shim.h>

#include <thread>
#include <vector>

extern "C" {

AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t, ParallelFunc f, void* data) {
  std::vector<std::thread> threads;
  for (int64_t i = begin; i < end; ++i) threads.emplace_back(f, i, i + 1, data);
  for (std::thread& thread : threads) thread.join();
  return 0;
}

AOTITorchError torch_get_num_threads(uint32_t* count) {
  *count = 3;
  return 0;
}

}  // extern "C"
