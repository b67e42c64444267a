#include <torch/csrc/stable/library.h>
