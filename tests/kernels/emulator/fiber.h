// Switching between stacks.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMULATOR_ASAN 1
#else
#define EMULATOR_ASAN 0
#endif

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

struct Context {
#if defined(__x86_64__)
  void* sp;
#else
  ucontext_t context;
#endif
  const void* bottom;  // for AddressSanitizer
  size_t size;
};

// The stack will call entry, which must not return, at the first switch to it.
void prepare(Context& c, char* bottom, size_t size, size_t number, void (*entry)());
// What entry must call first.
void entered();
// last: nothing will switch back to from.
void switch_context(Context& from, Context& to, bool last);

}  // namespace emulator
