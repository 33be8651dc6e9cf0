// Runs a CPU kernel once for each line of standard input, between two dumps of callgrind's
// counters:
//
//     level kernel dtype layout C N p offset
//
// `offset`: by how many elements the features begin behind a cache line. The kernels alone are
// linked in, without torch.
#include <valgrind/callgrind.h>

#include <cstdlib>
#include <cstring>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "../../csrc/cpu/kernels.h"

using namespace at_fused;

namespace {

using Buffer = std::unique_ptr<char, decltype(&std::free)>;

Buffer zeros(int64_t bytes) {
  const int64_t rounded = (bytes + 4095) / 4096 * 4096;
  char* data = static_cast<char*>(std::aligned_alloc(4096, rounded));
  std::memset(data, 0, rounded);
  return Buffer(data, std::free);
}

}  // namespace

int main() {
  std::string level, kernel;
  int dtype, layout;
  int64_t C, N, offset;
  double p;
  while (std::cin >> level >> kernel >> dtype >> layout >> C >> N >> p >> offset) {
    const Kernels& kernels = level == "avx2" ? kernels_avx2 : kernels_baseline;
    Feature feature{nullptr, Dtype(dtype), Layout(layout), 1, C, N, C * N, layout == 0 ? N : C};
    const int64_t bytes = sample_bytes(feature), shift = offset * element_size(feature.dtype);
    const Buffer x = zeros(bytes + shift), gradient = zeros(bytes + shift);
    const Buffer map = zeros(8 * N), other = zeros(8 * N);
    feature.data = x.get() + shift;
    Feature out = feature;
    out.data = gradient.get() + shift;
    const bool fp64 = accumulates_fp64(feature);
    const SampleLoss loss{map.get(),  other.get(),  map.get(), nullptr, fp64, fp64, N,
                          Form::code, EpsMode::max, 1e-12,     1.0,     1.0,  1.0};
    const auto run = [&] {
      if (kernel == "map") kernels.attention_map(feature, 0, 0, N, p, 1.0, map.get());
      if (kernel == "loss") kernels.sample_loss(loss);
      if (kernel == "backward" || kernel == "streaming") {
        kernels.attention_map_backward(feature, 0, 0, lines(feature), p, 1.0, map.get(), out,
                                       kernel == "streaming");
      }
    };
    run();  // what is resolved at a first call is not counted
    CALLGRIND_ZERO_STATS;
    run();
    CALLGRIND_DUMP_STATS;
  }
}
