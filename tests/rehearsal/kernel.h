// What the runtime and the kernels that it runs know of each other.
#pragma once

#include <cstddef>
#include <vector>

namespace aia::rehearsal {

// A launch as the runtime is asked for it.
struct Launch {
  unsigned grid[3] = {1, 1, 1}, block[3] = {1, 1, 1};
  size_t dynamic_bytes = 0;
  unsigned cluster = 1;
  bool cooperative = false;
};

// A kernel with copies of its arguments: what waits in a stream.
struct Bound {
  virtual ~Bound() = default;
  virtual void run(const Launch& launch) = 0;
  // Its arguments that are pointers, in their order.
  virtual std::vector<const void*> pointers() const = 0;
};

// Copies the arguments that a launch hands over.
using Bind = Bound* (*)(const void* function, void** arguments);

}  // namespace aia::rehearsal

extern "C" void rehearsal_register(const void* function, aia::rehearsal::Bind bind);
