// Runs CUDA C++ kernels on the host, for tests on machines without a GPU.
//
// Every CUDA thread is a fiber. One fiber runs at a time, until it waits at a barrier or a warp
// collective, exits, or fails a check; then the scheduler picks the next one, in ascending,
// descending or seeded random order. So a kernel whose result depends on an ordering that CUDA
// does not promise gives different results under different seeds. Blocks run one after another.
//
// Built with -fsanitize=address, shared-memory arrays have red zones and fresh contents are NaN;
// built with -fsanitize=thread, only barriers order threads, so missing ones are reported as races.
#pragma once

#include "cuda/emu/barrier.h"
#include "cuda/emu/cp_async.h"
#include "cuda/emu/launch.h"
#include "cuda/emu/warpgroup.h"
