// A folder of our own for the files that an engine reads by their names: what lies in it nobody else exchanges.
//
// It has a name and a lock as everything that is in the making (tmd_engines.unfinished). The lock ends with its
// process, so what a killed one left behind is told from what another uses, and the next process removes it.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace tmd::internal {

// In the folder for temporary files; gone with its files when the object is. Where it cannot be made, nothing can be put
// into it either.
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
  std::string real_path(const std::string& name) const;  // with the links on the way to the folder followed

 private:
  std::string folder_;  // empty: there is none
  int lock_ = -1;       // -1: the file system has no locks
  std::vector<std::string> paths_;  // of the files in it
};

// Removes this user's folders of that kind in `parent` whose processes are gone. Where the file system has no locks,
// nothing is removed.
void sweep_private_folders(const std::string& parent);

}  // namespace tmd::internal
