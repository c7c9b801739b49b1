// Captured graphs: handles, for capture and replay.
#pragma once

#include "runtime.h"

namespace sim {

// Null, with the error kept, for a handle that is none. The lock is held.
std::shared_ptr<Graph> find_graph(aclmdlRI handle, const char *caller);
TaskGroup *find_group(aclrtTaskGrp handle, const char *caller);

}  // namespace sim
