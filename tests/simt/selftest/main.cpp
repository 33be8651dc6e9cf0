// Runs the cases named on the command line: for builds with ASan, which a process cannot load late.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>

#include "../simt.h"

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    auto run = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, argv[i]));
    if (!run) return EXIT_FAILURE;
    for (uint64_t seed = 0; seed < 3; ++seed) {
      simt_seed(seed);
      int result = run();
      std::printf("%s %d %s\n", argv[i], result, simt_last_error());
    }
  }
}
