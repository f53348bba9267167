// A folder of our own for the files that an engine reads by their names: what lies in it nobody else exchanges.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace tmd::internal {

// Gone with its files when the object is. Where it cannot be made, nothing can be put into it either.
class PrivateFolder {
 public:
  // In `parent`; empty: in the folder for temporary files.
  explicit PrivateFolder(const std::string& parent = "");
  PrivateFolder(const PrivateFolder&) = delete;
  PrivateFolder& operator=(const PrivateFolder&) = delete;
  ~PrivateFolder();

  // Both false if that is not possible, such as on a full disk.
  bool write(const std::string& name, std::string_view content);
  bool link(const std::string& source, const std::string& name);  // a second name of `source`, on its file system only
  std::string path(const std::string& name) const { return folder_ + "/" + name; }

 private:
  std::string folder_;  // empty: there is none
  std::vector<std::string> names_;
};

}  // namespace tmd::internal
