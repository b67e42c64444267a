// Passes are written on typed pointers, and tables hold them on void pointers: untyped<pass> is a pass as a table holds
// it, and costs nothing.
#pragma once

#include <type_traits>

namespace aia::cpu::AIA_CPU_LEVEL {

template <class P>
struct Untype {
  using type = P;
};
template <class T>
struct Untype<T*> {
  using type = std::conditional_t<std::is_const_v<T>, const void, void>*;
};

template <auto pass>
struct Untyped;
template <class... P, void (*pass)(P...)>
struct Untyped<pass> {
  static void call(typename Untype<P>::type... arguments) { pass(static_cast<P>(arguments)...); }
};
template <auto pass>
constexpr auto untyped = &Untyped<pass>::call;

}  // namespace aia::cpu::AIA_CPU_LEVEL
