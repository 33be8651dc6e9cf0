// Stand-in for CUDA's header of this name: lets g++ compile kernels, which simt.cpp then runs.
#pragma once

#include "simt_device.h"
#include "simt_host.h"
