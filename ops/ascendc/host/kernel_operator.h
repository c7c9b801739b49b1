// Host model of the AscendC subset that this project's kernels use (910B, dav-2201).
//
// Stands where the vendor's kernel_operator.h stands on the chip. Pipes are asynchronous in-order
// queues, so what a kernel leaves unsynchronised goes wrong here too. See README.md.
#pragma once

#include "api/atomic.h"
#include "api/cast.h"
#include "api/copy.h"
#include "api/cube.h"
#include "api/fill.h"
#include "api/queue.h"
#include "api/reduce.h"
#include "api/select.h"
#include "api/sort.h"
#include "api/sync.h"
#include "api/tensor.h"
#include "api/types.h"
#include "api/vector.h"
