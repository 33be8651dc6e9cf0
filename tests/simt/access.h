// From an instrumented load or store to the shadow.
#pragma once

#include <cstddef>

#include "shadow.h"

#pragma GCC visibility push(hidden)
namespace simt {

void touch(void* p, size_t size, Access access, void* pc);
// Of unknown alignment: counted in the largest aligned pieces.
void touch_range(void* p, size_t size, Access access, void* pc);

}  // namespace simt
#pragma GCC visibility pop
