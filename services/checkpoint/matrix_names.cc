#include "services/checkpoint/matrix_names.h"

#include <algorithm>

#include "absl/strings/match.h"
#include "absl/strings/strip.h"

namespace rwkv::checkpoint {

bool IsMultipliedMatrix(absl::string_view name) {
  if (!absl::ConsumeSuffix(&name, ".weight")) return false;
  if (name == "head") return true;
  if (!absl::ConsumePrefix(&name, "blocks.")) return false;
  name.remove_prefix(std::min(name.find('.'), name.size()));
  if (absl::ConsumePrefix(&name, ".att.")) return name != "ln_x";
  return absl::ConsumePrefix(&name, ".ffn.") && !absl::StartsWith(name, "s_emb");
}

}  // namespace rwkv::checkpoint
