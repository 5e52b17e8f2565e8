#include "lockstep/cluster/control_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "lockstep/base/error.h"
#include "lockstep/base/file.h"

namespace lockstep {
namespace {

namespace fs = std::filesystem;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

template <typename Kind = ConfigError, typename Action>
std::string message_of(Action action) {
  try {
    action();
  } catch (const Kind& error) {
    return error.what();
  }
  return "nothing was thrown";
}

class ControlFiles : public testing::Test {
 protected:
  ControlFiles() {
    std::string name = (fs::temp_directory_path() / "lockstep-control-XXXXXX").string();
    folder = ::mkdtemp(name.data());
  }
  ~ControlFiles() override { fs::remove_all(folder); }

  static mode_t mode_of(const fs::path& path) {
    struct stat status {};
    EXPECT_EQ(::lstat(path.c_str(), &status), 0) << path;
    return status.st_mode & 07777;
  }
  void write(const fs::path& path, const std::string& text, mode_t mode = 0600) {
    std::ofstream(path) << text;
    ::chmod(path.c_str(), mode);
  }

  fs::path folder;  // mode 0700
  const ControlEntry entry{.endpoint = "tcp://127.0.0.1:40123",
                           .server_public = make_curve_pair().public_key,
                           .client_secret = make_curve_pair().secret_key,
                           .host = host_name(),
                           .pid = ::getpid(),
                           .process_start = 0};
};

TEST_F(ControlFiles, TheRunsFolderHoldsTheFileAsLongAsTheJobLives) {
  const mode_t before = ::umask(0);
  {
    const ControlFile file(folder, entry);
    EXPECT_EQ(file.path(), folder / "control.json");
    EXPECT_EQ(mode_of(file.path()), 0600u);
    const ControlEntry read = read_control_entry(folder);
    EXPECT_EQ(read.endpoint, entry.endpoint);
    EXPECT_EQ(read.client_secret, entry.client_secret);
    EXPECT_EQ(read.pid, entry.pid);
    EXPECT_EQ(target_of(read).client.public_key, curve_pair_of(entry.client_secret).public_key);
  }
  ::umask(before);
  EXPECT_TRUE(fs::is_empty(folder));
}

TEST_F(ControlFiles, AServersEntryLeadsToIt) {
  const ControlServer server({});
  const ControlEntry own = entry_of(server);
  EXPECT_EQ(own.endpoint, server.endpoint());
  EXPECT_EQ(own.pid, ::getpid());
  EXPECT_GT(own.process_start, 0u);
  EXPECT_EQ(target_of(own).client.public_key, server.key().client.public_key);
  EXPECT_EQ(parse_control_entry(format_control_entry(own)).process_start, own.process_start);
}

TEST_F(ControlFiles, AFileOpenToOthersIsRefused) {
  for (const mode_t mode : {0640u, 0604u, 0620u, 0601u}) {
    write(folder / kControlFile, format_control_entry(entry), mode);
    EXPECT_THAT(message_of([&] { read_control_entry(folder); }),
                HasSubstr("others than its owner may use it"));
  }
}

TEST_F(ControlFiles, AnotherUsersFileIsRefused) {
  if (::geteuid() != 0) GTEST_SKIP() << "only root can give a file away";
  write(folder / kControlFile, format_control_entry(entry));
  ASSERT_EQ(::chown((folder / kControlFile).c_str(), 65534, 65534), 0);
  EXPECT_THAT(message_of([&] { read_control_entry(folder); }),
              HasSubstr("it belongs to another user (uid 65534)"));
}

TEST_F(ControlFiles, WhatIsNoControlFile) {
  const auto refusal = [&](const std::string& text) {
    write(folder / kControlFile, text);
    return message_of([&] { read_control_entry(folder); });
  };
  EXPECT_THAT(refusal(""), HasSubstr("control.json: it is no JSON object"));
  EXPECT_THAT(refusal(std::string(70'000, ' ')), HasSubstr("it is too long"));
  const auto changed = [&](const char* member, const nlohmann::json& value) {
    nlohmann::json json = nlohmann::json::parse(format_control_entry(entry));
    json[member] = value;
    return refusal(json.dump());
  };
  EXPECT_THAT(changed("lockstep_control", 2), HasSubstr("its version is 2"));
  EXPECT_THAT(changed("endpoint", "ipc:///tmp/socket"), HasSubstr("its 'endpoint' is none"));
  EXPECT_THAT(changed("endpoint", "tcp://127.0.0.1:1;eth0"), HasSubstr("its 'endpoint' is none"));
  EXPECT_THAT(changed("client_secret", "short"), HasSubstr("its keys are none"));
  EXPECT_THAT(changed("pid", 0), HasSubstr("its 'pid' is none"));
  EXPECT_THAT(changed("pid", 1ull << 40), HasSubstr("its 'pid' is none"));
  EXPECT_THAT(changed("pid", -1), HasSubstr("no whole number 'pid'"));
  EXPECT_THAT(changed("host", nlohmann::json::array({1})), HasSubstr("nested too deeply"));
  fs::remove(folder / kControlFile);
  EXPECT_THAT(message_of<Error>([&] { read_control_entry(folder); }),
              HasSubstr("No such file or directory"));
  fs::create_directory(folder / kControlFile);
  EXPECT_THAT(message_of([&] { read_control_entry(folder); }), HasSubstr("no regular file"));
}

TEST_F(ControlFiles, JobsWithoutAFolderAreFoundByName) {
  const fs::path base = job_base("", folder);
  EXPECT_EQ(base, folder / ("lockstep-" + std::to_string(::geteuid())));
  EXPECT_THAT(job_folders(base), IsEmpty());
  {
    const ControlFile one = ControlFile::in_new_folder(base, "run-1", entry);
    const ControlFile two = ControlFile::in_new_folder(base, "run-2", entry);
    EXPECT_EQ(mode_of(base), 0700u);
    EXPECT_EQ(mode_of(base / "run-1"), 0700u);
    EXPECT_EQ(mode_of(one.path()), 0600u);
    EXPECT_THAT(job_folders(base), ElementsAre(base / "run-1", base / "run-2"));
  }
  EXPECT_TRUE(fs::is_empty(base));
  for (const char* id : {"", ".", "..", ".x", "a/b", "../x", "a b", "\x1b[1m"})
    EXPECT_THAT(message_of([&] { ControlFile::in_new_folder(base, id, entry); }),
                HasSubstr("a job cannot be named"));
}

TEST_F(ControlFiles, TheRuntimeFolderIsUsedIfItIsThisUsersAlone) {
  EXPECT_EQ(job_base(folder), folder / "lockstep");
  ::chmod(folder.c_str(), 0755);
  EXPECT_THAT(job_base(folder).string(), testing::StartsWith("/tmp/lockstep-"));
  EXPECT_THAT(job_base("relative").string(), testing::StartsWith("/tmp/lockstep-"));
}

TEST_F(ControlFiles, AFolderThatAnotherUserCouldHaveMadeIsRefused) {
  const fs::path base = job_base("", folder);
  const auto refusal = [&] {
    return message_of([&] { ControlFile::in_new_folder(base, "run-1", entry); });
  };
  fs::create_directory(folder / "elsewhere");
  ::chmod((folder / "elsewhere").c_str(), 0700);
  fs::create_directory_symlink("elsewhere", base);
  EXPECT_THAT(refusal(), HasSubstr("not a folder of this user alone"));
  EXPECT_TRUE(fs::is_empty(folder / "elsewhere"));
  fs::remove(base);
  fs::create_directory(base);
  ::chmod(base.c_str(), 0777);
  EXPECT_THAT(refusal(), HasSubstr("not a folder of this user alone"));
  EXPECT_THAT(job_folders(base), IsEmpty());
  ::chmod(base.c_str(), 0700);
  EXPECT_EQ(refusal(), "nothing was thrown");
  if (::geteuid() == 0) {
    ASSERT_EQ(::chown(base.c_str(), 65534, 65534), 0);
    EXPECT_THAT(refusal(), HasSubstr("not a folder of this user alone"));
  }
}

TEST_F(ControlFiles, WhatAKilledAgentLeftIsRemovedByTheNext) {
  const fs::path base = job_base("", folder);
  const pid_t child = ::fork();
  if (child == 0) ::_exit(0);
  ASSERT_EQ(::waitpid(child, nullptr, 0), child);
  const ControlFile living = ControlFile::in_new_folder(base, "living", entry);
  ControlEntry dead = entry;
  dead.pid = child;
  fs::create_directory(base / "dead");
  write(base / "dead" / kControlFile, format_control_entry(dead));
  fs::create_directory(base / "strange");
  write(base / "strange" / kControlFile, "?");
  const ControlFile next = ControlFile::in_new_folder(base, "next", entry);
  EXPECT_THAT(job_folders(base), ElementsAre(base / "living", base / "next", base / "strange"));
}

TEST_F(ControlFiles, KeyFiles) {
  const fs::path path = folder / "key";
  const ControlKey key = make_control_key();
  write_control_key(path, key);
  EXPECT_EQ(mode_of(path), 0600u);
  const ControlKey read = read_control_key(path);
  EXPECT_EQ(read.server.public_key, key.server.public_key);
  EXPECT_EQ(read.client.secret_key, key.client.secret_key);
  EXPECT_NE(key.client.secret_key, make_control_key().client.secret_key);
  EXPECT_THAT(message_of([&] { write_control_key(path, key); }), HasSubstr("exists"));
  EXPECT_THAT(message_of([&] { write_control_key(folder / "no" / "key", key); }),
              HasSubstr("there is no folder"));
  ::chmod(path.c_str(), 0644);
  EXPECT_THAT(message_of([&] { read_control_key(path); }),
              HasSubstr("others than its owner may use it (mode 0644)"));
  EXPECT_THAT(message_of([&] { read_control_key(folder / "none"); }),
              HasSubstr("hint: lockstep key FILE makes one"));
  write(path, R"({"lockstep_key": 1, "server_secret": ")" + std::string(4000, 'a') +
                  R"(", "client_secret": ""})");
  EXPECT_THAT(message_of([&] { read_control_key(path); }), HasSubstr("40 characters of Z85"));
}

}  // namespace
}  // namespace lockstep
