#include "shadow.h"

namespace ascendc_host {

void Shadow::reset(uint64_t bytes) {
  const uint64_t granules = (bytes + GRANULE - 1) / GRANULE + 1;
  const uint64_t chunks = (granules + CHUNK - 1) / CHUNK;
  if (chunks_.size() < chunks) chunks_.resize(chunks);
  ++epoch_;
}

void Shadow::clear(Chunk& chunk) {
  for (Granule& granule : chunk.granules) {
    granule.used = 0;
    granule.overflow.clear();
  }
  chunk.epoch = epoch_;
}

}  // namespace ascendc_host
