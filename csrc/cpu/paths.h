// Which kernels this CPU can run. Apart from kernels.h, since code of a standard header that is compiled for a better
// CPU's instructions could be linked into everything.
#pragma once

#include <vector>

#include "kernels.h"

namespace attnreuse {

std::vector<const Kernels*> paths();  // best first

}  // namespace attnreuse
