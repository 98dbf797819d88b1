// What the statically linked CUDA runtime of this build can use.

#pragma once

#include <string>
#include <vector>

namespace attnreuse {

std::string cuda_version();
std::vector<std::string> cuda_devices();

}  // namespace attnreuse
