// The pass that moves running statistics, on the CPU.
#pragma once

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

}  // namespace aia::cpu
