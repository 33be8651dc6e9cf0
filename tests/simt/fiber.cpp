#include "fiber.h"

#if defined(__x86_64__)
extern "C" __attribute__((visibility("hidden"))) void simt_switch_stack(void** save, void* to);
asm(R"(
.text
.hidden simt_switch_stack
.globl simt_switch_stack
.type simt_switch_stack, @function
simt_switch_stack:
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
.size simt_switch_stack, .-simt_switch_stack
)");
#endif

namespace simt {

namespace {
[[maybe_unused]] Context* left = nullptr;  // whom the last switch left
}

void prepare(Context& c, char* bottom, size_t size, size_t colour, void (*entry)()) {
  c.bottom = bottom;
  c.size = size;
#if SIMT_ASAN
  ASAN_UNPOISON_MEMORY_REGION(bottom, size);  // an abandoned fiber's marks
#endif
#if defined(__x86_64__)
  // Tops at one offset of every page would share a few sets of the cache.
  auto** sp = reinterpret_cast<void**>(bottom + size - 64 - colour % 64 * 64);
  *--sp = nullptr;
  *--sp = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  c.sp = sp;
#else
  (void)colour;
  getcontext(&c.context);
  c.context.uc_stack.ss_sp = bottom;
  c.context.uc_stack.ss_size = size;
  c.context.uc_link = nullptr;
  makecontext(&c.context, entry, 0);
#endif
}

void entered() {
#if SIMT_ASAN
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  left->bottom = bottom;
  left->size = size;
#endif
}

void switch_context(Context& from, Context& to, bool last) {
#if SIMT_ASAN
  void* fake = nullptr;
  left = &from;
  __sanitizer_start_switch_fiber(last ? nullptr : &fake, to.bottom, to.size);
#else
  (void)last;
#endif
#if defined(__x86_64__)
  simt_switch_stack(&from.sp, to.sp);
#else
  swapcontext(&from.context, &to.context);
#endif
#if SIMT_ASAN
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(fake, &bottom, &size);
  left->bottom = bottom;
  left->size = size;
#endif
}

}  // namespace simt
