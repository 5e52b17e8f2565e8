#include "lockstep/tools/dashboard.h"

#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <nlohmann/json.hpp>
#include <thread>

#include "lockstep/base/deadline.h"
#include "lockstep/base/error.h"
#include "lockstep/base/file.h"
#include "lockstep/observe/status.h"

namespace lockstep {
namespace {

using namespace std::chrono_literals;
using testing::HasSubstr;
using testing::StartsWith;

UniqueFd client_of(const Dashboard& dashboard) {
  const std::string url = dashboard.url();
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(std::uint16_t(std::stoi(url.substr(url.rfind(':') + 1))));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  UniqueFd fd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  EXPECT_EQ(::connect(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
  return fd;
}

// Until the other side closes the connection.
std::string answer_to(const Dashboard& dashboard, const std::string& request) {
  const UniqueFd fd = client_of(dashboard);
  EXPECT_EQ(write_all(fd.get(), as_byte_span(request)), 0);
  std::string answer;
  char bytes[4096];
  for (ssize_t count; (count = ::recv(fd.get(), bytes, sizeof bytes, 0)) > 0;)
    answer.append(bytes, std::size_t(count));
  return answer;
}

std::string get(const Dashboard& dashboard, const std::string& path,
                const std::string& headers = "Host: localhost\r\n") {
  return answer_to(dashboard, "GET " + path + " HTTP/1.1\r\n" + headers + "\r\n");
}

nlohmann::json status(const std::string& failure = "") {
  Status job({.title = "a job", .folder = "runs/a", .workers = 2, .started = 100});
  if (!failure.empty()) job.on_event(-1, {{"event", "end"}, {"failed", failure}}, 105);
  return job.json(110);
}

TEST(Dashboard, ServesWhatWasPublishedLast) {
  Dashboard dashboard("0", "--dashboard", 30);
  EXPECT_TRUE(dashboard.wants_snapshot());
  dashboard.publish(status());
  EXPECT_FALSE(dashboard.wants_snapshot());
  EXPECT_THAT(get(dashboard, "/"), HasSubstr("\r\n\r\n<!DOCTYPE html>"));
  EXPECT_THAT(get(dashboard, "/status.json"), HasSubstr("\"title\":\"a job\""));
  EXPECT_THAT(get(dashboard, "/metrics"), HasSubstr("\nlockstep_healthy 1\n"));
  EXPECT_THAT(get(dashboard, "/healthz"), StartsWith("HTTP/1.1 200 "));
  dashboard.publish(status("it broke"));
  EXPECT_THAT(get(dashboard, "/healthz"),
              AllOf(StartsWith("HTTP/1.1 503 "), HasSubstr("\r\n\r\nthe job failed: it broke\n")));
}

TEST(Dashboard, AnAgentThatSaysNothingIsNotHealthy) {
  Dashboard dashboard("0", "--dashboard", 0);
  dashboard.publish(status());
  EXPECT_THAT(get(dashboard, "/healthz"), HasSubstr("the agent has said nothing for "));
}

TEST(Dashboard, IsReadByManyWhileItIsWritten) {
  Dashboard dashboard("0", "--dashboard", 30);
  dashboard.publish(status());
  std::atomic<bool> over = false;
  std::vector<std::thread> readers;
  for (int i = 0; i < 8; ++i)
    readers.emplace_back([&] {
      for (int round = 0; round < 20; ++round) {
        const std::string answer = get(dashboard, "/status.json");
        ASSERT_THAT(answer, StartsWith("HTTP/1.1 200 "));
        ASSERT_TRUE(nlohmann::json::accept(
            answer.substr(std::min(answer.find("\r\n\r\n"), answer.size()))));
      }
    });
  std::thread writer([&] {
    while (!over) dashboard.publish(status());
  });
  for (std::thread& reader : readers) reader.join();
  over = true;
  writer.join();
}

TEST(Dashboard, RequestsThatAreNone) {
  Dashboard dashboard("0", "--dashboard", 30);
  dashboard.publish(status());
  const auto is_not_served = testing::Not(HasSubstr(" 200 OK"));
  EXPECT_THAT(get(dashboard, "/", "Host: example.org\r\n"), StartsWith("HTTP/1.1 403 "));
  EXPECT_THAT(get(dashboard, "/", "Host: localhost\r\nhost: a\r\n"), StartsWith("HTTP/1.1 403 "));
  EXPECT_THAT(get(dashboard, "/", ""), StartsWith("HTTP/1.1 403 "));
  EXPECT_THAT(answer_to(dashboard, "\r\n\r\n"), is_not_served);
  EXPECT_THAT(answer_to(dashboard, "GET\r\n\r\n"), is_not_served);
  EXPECT_THAT(answer_to(dashboard, std::string(8192, 'G')), is_not_served);
  EXPECT_THAT(answer_to(dashboard, "GET / HTTP/1.1\r\nHost: localhost\r\n"), is_not_served);
  std::string ranges = "Host: localhost\r\nRange: bytes=0-1";
  while (ranges.size() < 8000) ranges += ",0-1";
  EXPECT_THAT(get(dashboard, "/", ranges + "\r\n"), HasSubstr("\r\n\r\n<!DOCTYPE html>"));
}

TEST(Dashboard, EndsAtOnceWhateverClientsDo) {
  std::vector<UniqueFd> silent;
  auto dashboard = std::make_unique<Dashboard>("0", "--dashboard", 30);
  for (int i = 0; i < 20; ++i) silent.push_back(client_of(*dashboard));
  const auto started = Clock::now();
  dashboard.reset();
  EXPECT_LT(Clock::now() - started, 2s);  // a connection may take longer
  Dashboard("0", "--dashboard", 30);      // nor does it hurt to end before it has begun
}

TEST(Dashboard, APortThatIsTaken) {
  Dashboard first("0", "--dashboard", 30);
  const std::string url = first.url();
  const std::string port = url.substr(url.rfind(':') + 1, url.size() - url.rfind(':') - 2);
  try {
    Dashboard second(port, "--dashboard", 30);
    FAIL();
  } catch (const ConfigError& error) {
    EXPECT_EQ(error.what(), "--dashboard " + port + ": cannot listen on 127.0.0.1:" + port +
                                ": Address already in use; hint: --dashboard 0 takes a free port");
  }
}

}  // namespace
}  // namespace lockstep
