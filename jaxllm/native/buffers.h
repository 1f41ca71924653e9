// What XLA calls the types of numbers.
#pragma once

#include "numbers.h"
#include "xla/ffi/api/ffi.h"

namespace jaxllm {

inline bool known(xla::ffi::DataType type, Number* number) {
  switch (type) {
    case xla::ffi::F32: *number = Number::kF32; return true;
    case xla::ffi::BF16: *number = Number::kBF16; return true;
    case xla::ffi::F16: *number = Number::kF16; return true;
    case xla::ffi::U8: *number = Number::kU8; return true;
    case xla::ffi::S8: *number = Number::kS8; return true;
    case xla::ffi::DataType::F8E8M0FNU: *number = Number::kE8M0; return true;
    case xla::ffi::F8E4M3FN: *number = Number::kE4M3; return true;
    default: return false;
  }
}

}  // namespace jaxllm
