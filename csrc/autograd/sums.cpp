#include "sums.h"

#include <numeric>
#include <vector>

namespace oe_ext {
namespace {

// The axes of the repeated tensor: first those that `values` has itself, then those along which it
// repeats.
struct Axes {
  std::vector<int64_t> order;
  int64_t num_own = 0;

  Axes(const at::Tensor& values, const at::Tensor& repeated) {
    std::vector<int64_t> others;
    const int64_t num_missing = repeated.dim() - values.dim();
    for (int64_t axis = 0; axis < repeated.dim(); ++axis) {
      // A size that torch.compile does not know is not taken to be 1.
      const bool repeats = axis < num_missing ||
                           (TORCH_GUARD_OR_FALSE(values.sym_size(axis - num_missing).sym_eq(1)) &&
                            TORCH_GUARD_OR_TRUE(repeated.sym_size(axis).sym_ne(1)));
      (repeats ? others : order).push_back(axis);
    }
    num_own = static_cast<int64_t>(order.size());
    order.insert(order.end(), others.begin(), others.end());
  }

  bool repeat() const { return num_own < static_cast<int64_t>(order.size()); }

  std::vector<int64_t> inverse() const {
    std::vector<int64_t> position(order.size());
    for (size_t i = 0; i < order.size(); ++i) {
      position[order[i]] = static_cast<int64_t>(i);
    }
    return position;
  }
};

at::Tensor two_of(const at::Tensor& values) {
  c10::SymDimVector sizes = {2};
  sizes.append(values.sym_sizes().begin(), values.sym_sizes().end());
  return values.unsqueeze(0).expand_symint(sizes);
}

}  // namespace

at::Tensor sum_from_axis(const at::Tensor& values, int64_t first) {
  std::vector<int64_t> axes(values.dim() - first);
  std::iota(axes.begin(), axes.end(), first);
  c10::SymInt num_sums = 1;
  for (int64_t axis = 0; axis < first; ++axis) {
    num_sums *= values.sym_size(axis);
  }
  const at::Tensor rows = values.contiguous();
  if (!TORCH_GUARD_OR_FALSE(num_sums.sym_eq(1))) {
    return rows.sum(axes);
  }
  std::iota(axes.begin(), axes.end(), first + 1);
  return two_of(rows).sum(axes).select(0, 0);
}

at::Tensor sum_like(const at::Tensor& repeated, const at::Tensor& values) {
  const Axes axes(values, repeated);
  if (!axes.repeat()) {
    return repeated;
  }
  return sum_from_axis(repeated.permute(axes.order), axes.num_own)
      .reshape_symint(values.sym_sizes());
}

at::Tensor repeat_like(const at::Tensor& values, const at::Tensor& like) {
  const Axes axes(values, like);
  if (!axes.repeat()) {
    return values;
  }
  at::Tensor own = values;
  while (own.dim() < like.dim()) {
    own = own.unsqueeze(0);
  }
  // In two steps: the derivative of the second step computes two sums at a time.
  const at::Tensor twice = two_of(own.permute(axes.order));
  c10::SymDimVector sizes = {2};
  for (const int64_t axis : axes.order) {
    sizes.push_back(like.sym_size(axis));
  }
  return twice.expand_symint(sizes).select(0, 0).permute(axes.inverse());
}

}  // namespace oe_ext
