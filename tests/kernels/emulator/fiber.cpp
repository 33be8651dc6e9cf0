#include "state.h"

#if defined(__x86_64__)
extern "C" __attribute__((visibility("hidden"))) void emulator_switch_stack(void** save, void* to);
asm(R"(
.text
.hidden emulator_switch_stack
.globl emulator_switch_stack
.type emulator_switch_stack, @function
emulator_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch_stack, .-emulator_switch_stack
)");
#endif

namespace emulator {

namespace {

// The context that the last switch left. AddressSanitizer reports its stack only after the switch.
Context* previous = nullptr;

void finish_switch([[maybe_unused]] void* fake_stack) {
#if EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(fake_stack, &previous->bottom, &previous->size);
#endif
}

}  // namespace

void finish_first_switch() { finish_switch(nullptr); }

void make_context(Context& c, char* bottom, size_t size, [[maybe_unused]] size_t number,
                  void (*entry)()) {
  c.bottom = bottom;
  c.size = size;
#if EMULATOR_ASAN
  ASAN_UNPOISON_MEMORY_REGION(bottom, size);  // an abandoned fiber leaves it poisoned
#endif
#if defined(__x86_64__)
  // Staggers the tops: at the same page offset they would compete for a few cache sets.
  auto** sp = reinterpret_cast<void**>(bottom + size - 64 - number % 64 * 64);
  *--sp = nullptr;
  *--sp = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  c.sp = sp;
#else
  getcontext(&c.context);
  c.context.uc_stack.ss_sp = bottom;
  c.context.uc_stack.ss_size = size;
  c.context.uc_link = nullptr;
  makecontext(&c.context, entry, 0);
#endif
}

void switch_context(Context& from, Context& to, [[maybe_unused]] bool last) {
  void* fake_stack = nullptr;
#if EMULATOR_ASAN
  previous = &from;
  __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack, to.bottom, to.size);
#endif
#if defined(__x86_64__)
  emulator_switch_stack(&from.sp, to.sp);
#else
  swapcontext(&from.context, &to.context);
#endif
  finish_switch(fake_stack);
}

}  // namespace emulator
