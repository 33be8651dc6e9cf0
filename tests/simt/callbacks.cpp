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
  CALLBACK void __tsan_unaligned_write##n(void* p) {                                              \
    simt::touch_range(p, n, Access::kWrite, PC);                                                  \
  }                                                                                               \
  CALLBACK void __tsan_volatile_read##n(void* p) { simt::touch_volatile(p, n, PC); }              \
  CALLBACK void __tsan_volatile_write##n(void* p) { simt::touch(p, n, Access::kWrite, PC); }      \
  CALLBACK void __tsan_unaligned_volatile_read##n(void* p) { simt::touch_volatile(p, n, PC); }    \
  CALLBACK void __tsan_unaligned_volatile_write##n(void* p) {                                     \
    simt::touch(p, n, Access::kWrite, PC);                                                        \
  }
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
CALLBACK void __tsan_func_entry(void*) {}
CALLBACK void __tsan_func_exit() {}
CALLBACK void __tsan_vptr_read(void**) {}
CALLBACK void __tsan_vptr_update(void**, void*) {}

// Host code's own atomics (reference counts): these carry out what they report.
#define FETCH(bits, T, name, builtin)                                      \
  CALLBACK T __tsan_atomic##bits##_fetch_##name(volatile T* p, T v, int) { \
    return builtin(p, v, __ATOMIC_SEQ_CST);                                \
  }
#define CAS(bits, T, strength, weak)                                                               \
  CALLBACK bool __tsan_atomic##bits##_compare_exchange_##strength(volatile T* p, T* old, T v, int, \
                                                                  int) {                           \
    return __atomic_compare_exchange_n(p, old, v, weak, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);       \
  }
#define ATOMICS(bits, T)                                                                       \
  CALLBACK T __tsan_atomic##bits##_load(const volatile T* p, int) {                            \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                               \
  }                                                                                            \
  CALLBACK void __tsan_atomic##bits##_store(volatile T* p, T v, int) {                         \
    __atomic_store_n(p, v, __ATOMIC_SEQ_CST);                                                  \
  }                                                                                            \
  CALLBACK T __tsan_atomic##bits##_exchange(volatile T* p, T v, int) {                         \
    return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                        \
  }                                                                                            \
  CALLBACK T __tsan_atomic##bits##_compare_exchange_val(volatile T* p, T old, T v, int, int) { \
    __atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);        \
    return old;                                                                                \
  }                                                                                            \
  FETCH(bits, T, add, __atomic_fetch_add)                                                      \
  FETCH(bits, T, sub, __atomic_fetch_sub)                                                      \
  FETCH(bits, T, and, __atomic_fetch_and)                                                      \
  FETCH(bits, T, or, __atomic_fetch_or)                                                        \
  FETCH(bits, T, xor, __atomic_fetch_xor)                                                      \
  FETCH(bits, T, nand, __atomic_fetch_nand)                                                    \
  CAS(bits, T, strong, false)                                                                  \
  CAS(bits, T, weak, true)
ATOMICS(8, uint8_t)
ATOMICS(16, uint16_t)
ATOMICS(32, uint32_t)
ATOMICS(64, uint64_t)
CALLBACK void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
CALLBACK void __tsan_atomic_signal_fence(int) {}
