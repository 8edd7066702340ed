#include "services/rwkvctl/local_clusters.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <system_error>

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "services/common/address.h"

namespace rwkv::rwkvctl {

absl::Status CheckRouters(absl::string_view routers) {
  for (const absl::string_view address : absl::StrSplit(routers, ',')) {
    if (absl::Status status = common::ParseHostPort(address).status(); !status.ok()) return status;
  }
  return absl::OkStatus();
}

uint64_t StartTicks(int64_t pid) {
  std::ifstream file(absl::StrCat("/proc/", pid, "/stat"));
  const std::string stat{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  // "PID (NAME) STATE ...": the name may hold blanks and brackets.
  const size_t end_of_name = stat.rfind(") ");
  if (end_of_name == std::string::npos) return 0;
  const std::vector<absl::string_view> fields =
      absl::StrSplit(absl::string_view(stat).substr(end_of_name + 2), ' ', absl::SkipEmpty());
  uint64_t ticks = 0;
  if (fields.size() < 20 || fields[0] == "Z" || fields[0] == "X" || !absl::SimpleAtoi(fields[19], &ticks)) return 0;
  return ticks;
}

namespace {

// Whether one of the processes, numbers by commas, is alive and began when its place in `started` says.
bool AnyRuns(absl::string_view pids, absl::string_view started) {
  const std::vector<absl::string_view> each = absl::StrSplit(pids, ',');
  const std::vector<absl::string_view> began = absl::StrSplit(started, ',');
  for (size_t i = 0; i < each.size() && i < began.size(); ++i) {
    int64_t pid = 0;
    uint64_t ticks = 0;
    if (!absl::SimpleAtoi(each[i], &pid) || pid < 1 || !absl::SimpleAtoi(began[i], &ticks) || ticks == 0) continue;
    if (StartTicks(pid) == ticks) return true;
  }
  return false;
}

}  // namespace

std::vector<LocalCluster> RunningClusters(const std::string& folder) {
  constexpr uintmax_t kMaxFileBytes = 64 << 10;
  std::vector<LocalCluster> clusters;
  std::error_code error;
  for (std::filesystem::directory_iterator entry(folder, error), end; !error && entry != end; entry.increment(error)) {
    std::error_code ignored;
    if (!entry->is_regular_file(ignored) || entry->file_size(ignored) > kMaxFileBytes) continue;
    std::ifstream file(entry->path());
    std::map<std::string, std::string> values;
    for (std::string line; std::getline(file, line);) {
      const size_t equals = line.find('=');
      if (equals != std::string::npos) values[line.substr(0, equals)] = line.substr(equals + 1);
    }
    if (!CheckRouters(values["router"]).ok() || !AnyRuns(values["pid"], values["started"])) continue;
    clusters.push_back(
        {values["router"], values["data_dir"], values["model"], values["tls_authorities"], values["api_key_file"]});
  }
  std::sort(clusters.begin(), clusters.end(),
            [](const LocalCluster& a, const LocalCluster& b) { return a.router < b.router; });
  return clusters;
}

absl::StatusOr<LocalCluster> OnlyCluster(absl::Span<const LocalCluster> clusters) {
  if (clusters.empty()) {
    return absl::NotFoundError("no cluster runs here: start one with deploy/local/run.sh, or give --router HOST:PORT");
  }
  if (clusters.size() == 1) return clusters[0];
  std::string list;
  for (const LocalCluster& cluster : clusters) {
    absl::StrAppend(&list, list.empty() ? "" : "; ", "--router ", cluster.router, " (", cluster.model, ", in ",
                    cluster.data_dir, ")");
  }
  return absl::FailedPreconditionError(absl::StrCat(clusters.size(), " clusters run here, name one: ", list));
}

const LocalCluster* ClusterOf(absl::string_view routers, absl::Span<const LocalCluster> clusters) {
  for (const LocalCluster& cluster : clusters) {
    const std::vector<absl::string_view> known = absl::StrSplit(cluster.router, ',');
    const std::vector<absl::string_view> asked = absl::StrSplit(routers, ',');
    if (std::all_of(asked.begin(), asked.end(), [&known](absl::string_view address) {
          return std::find(known.begin(), known.end(), address) != known.end();
        })) {
      return &cluster;
    }
  }
  return nullptr;
}

}  // namespace rwkv::rwkvctl
