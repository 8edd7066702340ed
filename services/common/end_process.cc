#include "services/common/end_process.h"

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <iostream>

#if !defined(__has_feature)
#define __has_feature(x) 0
#endif

namespace rwkv::common {

void EndProcess(int status) {
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
  std::exit(status);
#else
  std::cout.flush();
  std::fflush(nullptr);
  _exit(status);
#endif
}

}  // namespace rwkv::common
