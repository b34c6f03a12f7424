// Differences between the releases of torch that we build with (2.11 to 2.15), each with the last
// release that needs it.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/version.h>

#include <memory>

#define OE_EXT_TORCH_BEFORE(major, minor) \
  (TORCH_VERSION_MAJOR < (major) ||       \
   (TORCH_VERSION_MAJOR == (major) && TORCH_VERSION_MINOR < (minor)))

namespace oe_ext {

// Up to 2.12 an autograd node is a std::shared_ptr. It needs the deleter of torch, otherwise a long
// graph is freed by recursion. Since 2.13 it is an intrusive pointer.
#if OE_EXT_TORCH_BEFORE(2, 13)
template <typename Node>
using NodePtr = std::shared_ptr<Node>;

template <typename Node>
NodePtr<Node> make_node() {
  return NodePtr<Node>(new Node(), torch::autograd::deleteNode);
}
#else
template <typename Node>
using NodePtr = c10::intrusive_ptr<Node>;

template <typename Node>
NodePtr<Node> make_node() {
  return c10::make_intrusive<Node>();
}
#endif

}  // namespace oe_ext
