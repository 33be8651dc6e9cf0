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

// Whom the last switch left: AddressSanitizer only then tells where its stack lies.
Context* left = nullptr;

void arrive([[maybe_unused]] void* fake_stack) {
#if EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(fake_stack, &left->bottom, &left->size);
#endif
}

}  // namespace

void entered() { arrive(nullptr); }

void prepare(Context& c, char* bottom, size_t size, [[maybe_unused]] size_t number,
             void (*entry)()) {
  c.bottom = bottom;
  c.size = size;
#if EMULATOR_ASAN
  ASAN_UNPOISON_MEMORY_REGION(bottom, size);  // an abandoned fiber's marks
#endif
#if defined(__x86_64__)
  // Tops at one offset of every page would share a few sets of the cache.
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
  left = &from;
  __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack, to.bottom, to.size);
#endif
#if defined(__x86_64__)
  emulator_switch_stack(&from.sp, to.sp);
#else
  swapcontext(&from.context, &to.context);
#endif
  arrive(fake_stack);
}

}  // namespace emulator
