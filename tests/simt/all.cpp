// The whole runtime in one file, which compiles faster than its parts do.
#include "access.cpp"
#include "callbacks.cpp"
#include "clocks.cpp"
#include "fiber.cpp"
#include "schedule.cpp"
#include "shadow.cpp"
#include "simt.cpp"
#include "sync.cpp"
