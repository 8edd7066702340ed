#include "services/rwkvctl/sampling_flags.h"

#include <cmath>
#include <limits>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace rwkv::rwkvctl {

void AddSamplingFlags(FlagSet& flags, v1::Sampling* sampling) {
  flags.AddFloat("temperature", "0 is greedy", [=](float value) { sampling->set_temperature(value); });
  flags.AddInt32("top-k", "keep the k likeliest; 0: all", [=](int32_t value) { sampling->set_top_k(value); });
  flags.AddFloat("top-p", "keep the smallest set with this probability, in (0, 1]",
                 [=](float value) { sampling->set_top_p(value); });
  flags.AddFloat("min-p", "drop below this fraction of the likeliest, in [0, 1]",
                 [=](float value) { sampling->set_min_p(value); });
  flags.AddFloat("typical-p", "keep the locally typical set of this probability, in (0, 1]",
                 [=](float value) { sampling->set_typical_p(value); });
  flags.AddFloat("presence-penalty", "taken from the logit of tokens of this answer",
                 [=](float value) { sampling->set_presence_penalty(value); });
  flags.AddFloat("frequency-penalty", "taken once per count of the token in this answer",
                 [=](float value) { sampling->set_frequency_penalty(value); });
  flags.AddFloat("repetition-penalty", "divides the logit of tokens seen, or multiplies a negative one",
                 [=](float value) { sampling->set_repetition_penalty(value); });
  flags.AddBool("penalize-prompt", "the penalties count the session and the prompt, too",
                [=](bool value) { sampling->set_penalize_prompt(value); });
  flags.AddFloat("penalty-decay", "counts shrink by this factor each token (default 0.996)",
                 [=](float value) { sampling->set_penalty_decay(value); });
  flags.AddString("logit-bias", "ID=X", "added to the logit of a token, -inf bans it; may be given often",
                  [=](const std::string& text) {
                    const size_t equals = text.find('=');
                    absl::StatusOr<uint64_t> id =
                        ParseUint64(absl::string_view(text).substr(0, equals), std::numeric_limits<uint32_t>::max());
                    float bias = 0;
                    if (!id.ok() || equals == std::string::npos || !absl::SimpleAtof(text.substr(equals + 1), &bias) ||
                        (!std::isfinite(bias) && !(std::isinf(bias) && bias < 0))) {
                      return absl::InvalidArgumentError(absl::StrCat("\"", text, "\" is not ID=NUMBER or ID=-inf"));
                    }
                    (*sampling->mutable_logit_bias())[static_cast<uint32_t>(*id)] = bias;
                    return absl::OkStatus();
                  });
  flags.AddString(
      "sampling-order", "ORDER", "temperature-first (default), or rwkv-pip: as the rwkv pip package",
      [=](const std::string& text) {
        if (text == "temperature-first") {
          sampling->set_order(v1::SAMPLING_ORDER_TEMPERATURE_FIRST);
        } else if (text == "rwkv-pip") {
          sampling->set_order(v1::SAMPLING_ORDER_RWKV_PIP);
        } else {
          return absl::InvalidArgumentError(absl::StrCat("\"", text, "\" is neither temperature-first nor rwkv-pip"));
        }
        return absl::OkStatus();
      });
  flags.AddUint64("seed", "the same seed draws the same tokens (default: the router draws one)",
                  [=](uint64_t value) { sampling->set_seed(value); });
}

}  // namespace rwkv::rwkvctl
