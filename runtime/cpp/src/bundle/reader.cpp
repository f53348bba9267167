#include "bundle/reader.hpp"

#include <sys/stat.h>

#include <cerrno>
#include <cstdlib>
#include <memory>
#include <system_error>
#include <vector>

#include "base/error.hpp"
#include "base/quote.hpp"
#include "bundle/files.hpp"
#include "bundle/geometry.hpp"
#include "bundle/graph_file.hpp"
#include "bundle/operators.hpp"

namespace tmd::internal {
namespace {

constexpr const char* kRemedy = " Copy the bundle again, or make it again with tmd-export.";

std::string existing_folder(const std::string& path) {
  const std::unique_ptr<char, void (*)(void*)> resolved(::realpath(path.c_str(), nullptr), std::free);
  if (!resolved) {
    if (errno == ENOENT)
      refuse_bundle(quote(path, 300) + " does not exist: a bundle is a folder made by tmd-export. Check the path.");
    refuse_bundle(quote(path, 300) + " cannot be opened: " + std::generic_category().message(errno) +
                  ". Check the path and its permissions.");
  }
  struct stat status;
  if (::stat(resolved.get(), &status) != 0 || !S_ISDIR(status.st_mode))
    refuse_bundle(quote(path, 300) + " is a file, and a bundle is a folder with a manifest.json. Give the folder.");
  return resolved.get();
}

void check_size(const File& file, const FileInfo& stated, const std::string& path, bool is_graph) {
  const std::uint64_t size = file.size();
  if (size != stated.size) {
    std::string have = format_size(size), want = format_size(stated.size);
    if (have == want) have = std::to_string(size) + " bytes", want = std::to_string(stated.size) + " bytes";
    refuse_bundle(path + " is " + have + ", the manifest says " + want + ": " +
                  (size < stated.size ? "the copy is incomplete." : "the file was changed or replaced.") + kRemedy);
  }
  if (is_graph && size > kMaxGraphBytes)
    refuse_bundle(path + " is " + format_size(size) + ", more than the " + format_size(kMaxGraphBytes) +
                  " that a graph may have: weights belong into its data file. Export the bundle again.");
}

[[noreturn]] void refuse_content(const std::string& path) {
  refuse_bundle(path +
                " has the right size but another sha256 than the manifest says: it is damaged or was exchanged." +
                kRemedy);
}

}  // namespace

Bundle Bundle::open(const std::string& path) {
  Bundle bundle;
  bundle.folder = existing_folder(path);
  const auto full = [&](const std::string& name) { return bundle.folder + "/" + name; };
  {
    const File file = open_regular(bundle.folder, kManifestName, Links::follow);
    if (file.size() > kMaxManifestBytes)
      refuse_bundle(full(kManifestName) + " is " + format_size(file.size()) + ", more than the " +
                    format_size(kMaxManifestBytes) + " that a manifest may have: this is another file." + kRemedy);
    const std::string content = file.read_up_to(kMaxManifestBytes + 1, full(kManifestName));
    bundle.manifest = parse_manifest(content, full(kManifestName));
  }
  std::map<std::string, const GraphInfo*> graph_of;
  std::map<std::string, std::string> name_of;
  for (const auto& [name, info] : bundle.manifest.graphs) graph_of[info.file] = &info, name_of[info.file] = name;

  // All kinds and sizes first: an incomplete copy is found at once, not after hashing gigabytes.
  std::map<std::string, File> opened;
  for (const auto& [name, stated] : bundle.manifest.files) {
    const File& file = opened.emplace(name, open_regular(bundle.folder, name, Links::follow)).first->second;
    check_size(file, stated, full(name), graph_of.count(name) != 0);
  }
  std::map<std::string, std::string> contents;
  for (const auto& [name, file] : opened) {
    const FileInfo& stated = bundle.manifest.files[name];
    if (graph_of.count(name)) {
      std::string content = file.read_up_to(stated.size + 1, full(name));
      if (sha256_hex(content) != stated.sha256) refuse_content(full(name));
      contents[name] = std::move(content);  // what is parsed is what was hashed
    } else if (file.sha256_hex(full(name)) != stated.sha256) {
      refuse_content(full(name));
    }
  }
  std::map<std::string, GraphFacts> known;
  for (const auto& [name, info] : graph_of) {
    const std::uint64_t data_size = info->data ? bundle.manifest.files[*info->data].size : 0;
    check_graph(contents[name], *info, data_size, full(name));
    if (is_denoiser(name_of[name])) known[name_of[name]] = facts_of(contents[name], *info);
  }
  check_geometry(bundle.manifest, known, full(kManifestName));
  return bundle;
}

const GraphInfo& Bundle::graph(const std::string& name, const char* purpose) const {
  const auto found = manifest.graphs.find(name);
  if (found == manifest.graphs.end())
    fail_run("this bundle has no graph " + name + ", so it cannot " + purpose + ". Export it again with " + name +
             " among --parts, or use another bundle.");
  return found->second;
}

std::string Bundle::read_graph(const GraphInfo& info) const {
  const std::string path = graph_path(info);
  const FileInfo& stated = manifest.files.at(info.file);
  const File file = open_regular(folder, info.file, Links::follow);
  check_size(file, stated, path, true);
  std::string content = file.read_up_to(stated.size + 1, path);
  if (sha256_hex(content) != stated.sha256) refuse_content(path);
  return content;
}

std::string Bundle::data_path(const GraphInfo& info) const {
  if (!info.data) return "";
  const std::string path = folder + "/" + *info.data;
  const std::unique_ptr<char, void (*)(void*)> resolved(::realpath(path.c_str(), nullptr), std::free);
  return resolved ? resolved.get() : path;
}

}  // namespace tmd::internal
