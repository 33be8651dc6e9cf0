// What the operators (*_ops.cpp) ask of one instruction-set level, as plain structs and function
// pointers: nothing from the standard library crosses this line, because an inline function
// compiled for AVX-512 could otherwise be merged by the linker into code for older processors.
#pragma once

#include <cstdint>

#include "../feature.h"
#include "../loss.h"

namespace at_fused {

// The two raw attention maps of one sample and what becomes of them: fp64 for fp64 features and
// fp32 otherwise. A result is the coefficient map k, and may lie where the raw map does; null: not
// wanted.
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
  double weight;                        // of the sample, before a division by N
  double student_scale, teacher_scale;  // d Q / d |A|^p times p: p / C for mean, p for sum
};

// How a feature becomes a map where it is not a plain sum of powers, and the way back.
struct GeneralMap {
  double p, scale;
  bool absolute, max;
  Pool pool;
};

struct Kernels {
  const char* name;

  // map[n] = scale * sum_c |A[b, c, n]|^p  for n in [begin, end), one sample.
  // Without `absolute` A^p with its sign, p odd, in place of |A|^p.
  void (*attention_map)(const Feature& feature, int64_t b, int64_t begin, int64_t end, double p,
                        bool absolute, double scale, void* map);

  // Normalises both maps of a sample, returns its share of the loss and leaves k = dL/dQ * scale.
  double (*sample_loss)(const SampleLoss& sample);

  // out[b, c, n] = gradient * k[n] * |A|^(p-1) * sign(A) for the lines [begin, end) of a sample:
  // channels in planar, positions in interleaved. `out` has the layout and dtype of `feature`.
  void (*attention_map_backward)(const Feature& feature, int64_t b, int64_t begin, int64_t end,
                                 double p, bool absolute, double gradient, const void* k,
                                 const Feature& out, bool stream);

  // The map of a sample at the positions [begin, end), whole rows of the last dimension where
  // pooled; with `max` the channels too. `scratch`: general_scratch() elements.
  void (*general_map)(const Feature& feature, const GeneralMap& general, int64_t b, int64_t begin,
                      int64_t end, void* map, int32_t* channels, void* scratch);

  // As attention_map_backward; interleaved and pooled, the lines are whole rows of the last
  // dimension.
  void (*general_backward)(const Feature& feature, const GeneralMap& general, int64_t b,
                           int64_t begin, int64_t end, double gradient, const void* k,
                           const int32_t* channels, const Feature& out, void* scratch);

  // As attention_map_backward, added to `add`, of the layout and dtype of `feature`, which may be
  // `out`; with `channels` only those have a gradient.
  void (*attention_tap_backward)(const Feature& feature, const Feature& add, int64_t b,
                                 int64_t begin, int64_t end, double p, bool absolute,
                                 double gradient, const void* k, const int32_t* channels,
                                 const Feature& out, bool stream);
};

// Doubles that the general kernels keep in their caller's memory, for one feature at a time:
// windows (kernels_general.h), and sums. Zeroed before the first use.
constexpr int64_t kScratchHeader = 4, kScratchPadding = 32;

inline int64_t general_scratch(const Feature& feature, const GeneralMap& general) {
  const Pool& pool = general.pool;
  const int64_t in = pool.in[2], out = pool.out[2];
  const int64_t rows = int64_t(pool.in[0]) * pool.in[1] + int64_t(pool.out[0]) * pool.out[1];
  const int64_t windows = kScratchHeader + 2 * rows + 3 * in + 4 * out + 5 * kScratchPadding;
  return windows + (feature.layout == Layout::planar ? 0 : out * feature.C);
}

// The table of the level in use.
const Kernels& kernels();

extern const Kernels kernels_baseline;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

}  // namespace at_fused
