// The interface between the operators and the kernels of an instruction set: plain structs and
// function pointers. It has no types of the standard library, because the linker keeps one copy of
// each inline function. If it kept a copy compiled for AVX-512, older processors would crash.
#pragma once

#include <cstdint>

#include "../feature.h"

namespace at_fused {

// The two raw attention maps of a sample, in fp64 for fp64 features and else in fp32. A result is
// the coefficient map k. It may overwrite the raw map; null if it is not needed.
struct SampleLoss {
  const void* student;
  const void* teacher;
  void* student_result;
  void* teacher_result;
  bool student_fp64, teacher_fp64;
  int64_t N;
  Form form;
  EpsMode eps_mode;
  double eps;
  double weight;                        // of the sample in the loss, before the division by N
  double student_scale, teacher_scale;  // p * dQ / d|A|^p: p / C for mean, p for sum
};

// out[b, c, n] = gradient * k[n] * |A|^(p-1) * sign(A) for lines [begin, end) of sample b, plus
// `addend` unless that is null. `addend` may be `out`. If `channels` is not null, only these argmax
// channels have a gradient. All tensors have the same layout and dtype.
struct Sweep {
  const Feature &feature, &out;
  const Feature* addend;
  int64_t b, begin, end;
  double p, gradient;
  const void* k;
  const int32_t* channels;
  bool stream;  // use non-temporal stores
};

struct Kernels {
  const char* name;

  // map[n] = scale * sum_c |A[b, c, n]|^p for positions [begin, end) of sample b. If `channels` is
  // not null: map[n] = max_c |A[b, c, n]|^p, without `scale`, and channels[n] is the argmax.
  void (*attention_map)(const Feature& feature, int64_t b, int64_t begin, int64_t end, double p,
                        double scale, void* map, int32_t* channels);

  // Returns the sample's share of the loss, and writes k = dL/dQ * scale to the results.
  double (*sample_loss)(const SampleLoss& sample);

  void (*sweep)(const Sweep& sweep);
};

extern const Kernels kernels_baseline;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

}  // namespace at_fused
