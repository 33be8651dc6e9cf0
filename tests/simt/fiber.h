// Switching between stacks.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define SIMT_ASAN 1
#else
#define SIMT_ASAN 0
#endif

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#pragma GCC visibility push(hidden)
namespace simt {

struct Context {
#if defined(__x86_64__)
  void* sp;
#else
  ucontext_t context;
#endif
  const void* bottom;  // for ASan
  size_t size;
};

// The stack will call entry, which must not return, at the first switch to it.
void prepare(Context& c, char* bottom, size_t size, size_t colour, void (*entry)());
// entry must call this first.
void entered();
// last: nothing will switch back to from.
void switch_context(Context& from, Context& to, bool last);

}  // namespace simt
#pragma GCC visibility pop
