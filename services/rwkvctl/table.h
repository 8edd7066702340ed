// Rows of text in columns as wide as they need.
#pragma once

#include <string>
#include <vector>

namespace rwkv::rwkvctl {

// The first row is the heading. Columns are parted by two blanks; nothing trails.
std::string FormatTable(const std::vector<std::vector<std::string>>& rows);

}  // namespace rwkv::rwkvctl
