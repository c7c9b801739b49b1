// The arithmetic of Mmad on fractals.
#pragma once

#include <cstdint>

namespace ascendc_host {

/// The sizes of an Mmad in fractals.
struct MmadShape {
  uint32_t m, n, k;     // elements
  uint32_t m1, n1, k1;  // fractals
  bool fresh;           // C starts at zero
};

/// c = a * b, or added to c; defined for the types of Mmad in model/multiply.cpp.
template <class C, class A, class B>
void multiply(C* c, const A* a, const B* b, const MmadShape& shape);

}  // namespace ascendc_host
