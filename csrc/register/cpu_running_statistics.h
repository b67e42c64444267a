// What moves running statistics, on the CPU: the pass, and the end of an operator that has all of a layer.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "../common/norm.h"
#include "checks_attention_in_attention.h"
#include "cpu_products.h"

namespace aia::cpu {

inline void move_statistics(std::vector<Tensor> mean, std::vector<Tensor> var, std::vector<Tensor> tracked,
                            std::vector<Tensor> statistics, double momentum) {
  check_running(mean, var, tracked, statistics, momentum);
  for (Tensor& number : tracked) ++*static_cast<int64_t*>(number.mutable_data_ptr());
  for (size_t i = 0; i < mean.size(); ++i)
    with_type(statistics[i], [&](auto type) {
      using A = decltype(type);
      const Parameter running_mean = parameter_of(mean[i], mean[i], "mean", true),
                      running_var = parameter_of(var[i], var[i], "var", true);
      for (int64_t c = 0; c < mean[i].numel(); ++c)
        aia::move_statistics(numbers<A>(statistics[i]) + 3 * c, static_cast<A>(momentum), running_mean, running_var, c);
    });
}

// Running mean and variance, and where there is one the number of batches, of each gate.
class Running {
 public:
  Running(const std::vector<Tensor>& tensors, const std::vector<bool>& batch, double momentum, const Tensor& x)
      : tensors_(tensors), each_(tensors.size() / batch.size()), momentum_(momentum) {
    const size_t n = batch.size();
    AIA_CHECK(tensors.empty() || tensors.size() == 2 * n || tensors.size() == 3 * n,
              "running must be empty or hold mean, variance and perhaps a number for each of ", n, " gates, got ",
              tensors.size(), " entries");
    if (tensors.empty()) return;
    AIA_CHECK(std::isfinite(momentum), "momentum must be finite, got ", momentum);
    AIA_CHECK(std::all_of(batch.begin(), batch.end(), [](bool of_batch) { return of_batch; }),
              "running statistics move toward those of the batch, which every gate must use");
    for (size_t i = 0; i < tensors.size(); ++i) {
      const bool is_number = i % each_ == 2;
      check_operand(tensors[i], x, "running");
      AIA_CHECK(tensors[i].numel() == 1, "running must hold one number in each entry, got ", described(tensors[i]));
      if (is_number)
        AIA_CHECK(tensors[i].scalar_type() == ScalarType::Long, "running must hold ", n == 1 ? "a number" : "numbers",
                  " of batches in int64, got ", described(tensors[i]));
      else
        scalar_of(tensors[i], "running");
      check_apart({tensors[i], "running", true}, {{x, "x"}});
    }
  }

  // Those of some gates move toward statistics [count, 3], one after the other: gates may share them.
  void move(const void* statistics, int64_t first, int64_t count, const Tensor& x) const {
    if (tensors_.empty()) return;
    with_type(x, [&](auto zero) {
      using A = decltype(zero);
      for (int64_t i = 0; i < count; ++i) {
        const Tensor* own = &tensors_[each_ * (first + i)];
        if (each_ == 3) ++*static_cast<int64_t*>(own[2].mutable_data_ptr());
        aia::move_statistics(static_cast<const A*>(statistics) + 3 * i, static_cast<A>(momentum_),
                             parameter_of(own[0], x, "running", true), parameter_of(own[1], x, "running", true), 0);
      }
    });
  }

 private:
  const std::vector<Tensor>& tensors_;
  const size_t each_;
  const double momentum_;
};

}  // namespace aia::cpu
