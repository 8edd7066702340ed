#include "services/common/memory.h"

#include <malloc.h>

namespace rwkv::common {

void KeepFreedMemory() {
  // Fixed, glibc's own thresholds would follow what is freed. 32 MiB is the largest it takes for the first.
  mallopt(M_MMAP_THRESHOLD, 32 << 20);
  mallopt(M_TRIM_THRESHOLD, 64 << 20);
  mallopt(M_TOP_PAD, 4 << 20);
  mallopt(M_ARENA_MAX, 2);  // Each keeps what was freed in it; glibc would make eight a processor.
}

}  // namespace rwkv::common
