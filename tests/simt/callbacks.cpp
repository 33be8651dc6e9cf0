// The functions that g++ -fsanitize=thread makes kernels call at each load and store. Hidden, so
// that they bind within this library, whatever else the process holds.
#include <cstdint>

#include "access.h"

using simt::Access;

#define PC __builtin_return_address(0)
#define CALLBACK extern "C" __attribute__((visibility("hidden")))

#define SIZED(n)                                                                                  \
  CALLBACK void __tsan_read##n(void* p) { simt::touch(p, n, Access::kRead, PC); }                 \
  CALLBACK void __tsan_write##n(void* p) { simt::touch(p, n, Access::kWrite, PC); }               \
  CALLBACK void __tsan_unaligned_read##n(void* p) { simt::touch_range(p, n, Access::kRead, PC); } \
  CALLBACK void __tsan_unaligned_write##n(void* p) { simt::touch_range(p, n, Access::kWrite, PC); }
SIZED(1)
SIZED(2)
SIZED(4)
SIZED(8)
SIZED(16)

CALLBACK void __tsan_read_range(void* p, unsigned long n) {
  simt::touch_range(p, n, Access::kRead, PC);
}
CALLBACK void __tsan_write_range(void* p, unsigned long n) {
  simt::touch_range(p, n, Access::kWrite, PC);
}
CALLBACK void __tsan_init() {}
