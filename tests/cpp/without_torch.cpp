// What the CPU kernels need of libtorch, for processors that it is not here for: how TORCH_CHECK
// ends.
#include <c10/util/Exception.h>

#include <stdexcept>

namespace c10::detail {

void torchCheckFail(const char*, const char*, uint32_t, const std::string& message) {
  throw std::runtime_error(message);
}

void torchCheckFail(const char*, const char*, uint32_t, const char* message) {
  throw std::runtime_error(message);
}

}  // namespace c10::detail
