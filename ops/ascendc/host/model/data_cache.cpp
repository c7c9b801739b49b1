#include "data_cache.h"

#include <cstring>

namespace ascendc_host {

DataCache::Line& DataCache::line_of(uintptr_t address) {
  const uintptr_t base = address / CACHE_LINE_BYTES * CACHE_LINE_BYTES;
  const auto [found, fresh] = lines_.try_emplace(base);
  // Lines are aligned and smaller than a page, so all of one can be read where a byte of it can.
  if (fresh) std::memcpy(found->second.data, reinterpret_cast<const void*>(base), CACHE_LINE_BYTES);
  return found->second;
}

void DataCache::read(uintptr_t address, uint64_t bytes, void* target) {
  for (uint64_t i = 0; i < bytes; ++i) {
    static_cast<uint8_t*>(target)[i] = line_of(address + i).data[(address + i) % CACHE_LINE_BYTES];
  }
}

void DataCache::write(uintptr_t address, uint64_t bytes, const void* source) {
  for (uint64_t i = 0; i < bytes; ++i) {
    Line& line = line_of(address + i);
    const uint64_t offset = (address + i) % CACHE_LINE_BYTES;
    line.data[offset] = static_cast<const uint8_t*>(source)[i];
    line.dirty |= uint64_t{1} << offset;
  }
}

bool DataCache::store(uintptr_t line, Line& contents, uint64_t from) {
  const uint64_t part = ~uint64_t{0} << from;
  if ((contents.dirty & part) == 0) return false;
  // Only changed bytes are stored: the chip stores the line, which is the same unless somebody
  // else changed it meanwhile, and that is reported as a race.
  for (uint64_t i = from; i < CACHE_LINE_BYTES; ++i) {
    if ((contents.dirty >> i & 1) != 0) reinterpret_cast<uint8_t*>(line)[i] = contents.data[i];
  }
  contents.dirty &= ~part;
  return true;
}

uintptr_t DataCache::first_dirty() const {
  for (const auto& [line, contents] : lines_) {
    if (contents.dirty != 0) return line + static_cast<uintptr_t>(__builtin_ctzll(contents.dirty));
  }
  return 0;
}

}  // namespace ascendc_host
