// Shims for what this Abseil lacks: leave a function with the error of an absl::Status or absl::StatusOr.
#pragma once

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#define RWKV_RETURN_IF_ERROR(expr)                              \
  do {                                                          \
    if (absl::Status rwkv_status = (expr); !rwkv_status.ok()) { \
      return rwkv_status;                                       \
    }                                                           \
  } while (false)

// RWKV_ASSIGN_OR_RETURN(std::unique_ptr<Store> store, Store::Create(options));
#define RWKV_ASSIGN_OR_RETURN(lhs, expr) RWKV_ASSIGN_OR_RETURN_IMPL(RWKV_STATUS_CONCAT(rwkv_or_, __LINE__), lhs, expr)

#define RWKV_ASSIGN_OR_RETURN_IMPL(var, lhs, expr) \
  auto var = (expr);                               \
  if (!var.ok()) return std::move(var).status();   \
  lhs = *std::move(var)

#define RWKV_STATUS_CONCAT(a, b) RWKV_STATUS_CONCAT_IMPL(a, b)
#define RWKV_STATUS_CONCAT_IMPL(a, b) a##b
