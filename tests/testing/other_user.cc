#include "tests/testing/other_user.h"

#include <grp.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>

namespace rwkv::testing {

void BecomeNobody() {
  constexpr int kNobody = 65534;
  if (geteuid() != 0) return;
  if (setgroups(0, nullptr) != 0 || setresgid(kNobody, kNobody, kNobody) != 0 ||
      setresuid(kNobody, kNobody, kNobody) != 0) {
    std::abort();
  }
}

std::string MakeOpenFolder() {
  constexpr char kVariable[] = "RWKV_TEST_OPEN_FOLDER";
  if (const char* const inherited = std::getenv(kVariable)) {
    if (mkdir(inherited, 0777) == 0 && chmod(inherited, 0777) != 0) std::abort();
    return inherited;
  }
  std::string name = "/tmp/rwkv_test_XXXXXX";
  if (mkdtemp(name.data()) == nullptr || chmod(name.c_str(), 0777) != 0 || setenv(kVariable, name.c_str(), 1) != 0) {
    std::abort();
  }
  return name;
}

}  // namespace rwkv::testing
