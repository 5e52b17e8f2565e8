// What the dashboard's answers are made of; pure.
#include <openssl/evp.h>
#include <prometheus/text_serializer.h>

#include <array>
#include <nlohmann/json.hpp>

#include "lockstep/base/error.h"
#include "lockstep/tools/dashboard.h"
#include "lockstep/tools/page.h"

namespace lockstep {
namespace {

// "sha256-…" of what is between <TAG> and </TAG>, as a policy names inline content.
std::string source_of(std::string_view page, const std::string& tag) {
  const std::size_t begin = page.find("<" + tag + ">") + tag.size() + 2;
  const std::string_view content = page.substr(begin, page.find("</" + tag + ">", begin) - begin);
  std::array<unsigned char, EVP_MAX_MD_SIZE> digest{};
  unsigned size = 0;
  LOCKSTEP_CHECK(
      EVP_Digest(content.data(), content.size(), digest.data(), &size, EVP_sha256(), nullptr) == 1);
  std::array<unsigned char, 2 * EVP_MAX_MD_SIZE> text{};
  const int length = EVP_EncodeBlock(text.data(), digest.data(), static_cast<int>(size));
  return "'sha256-" + std::string(text.begin(), text.begin() + length) + "'";
}

void replace(std::string& text, std::string_view mark, std::string_view with) {
  const std::size_t at = text.find(mark);
  LOCKSTEP_CHECK(at != std::string::npos);
  text.replace(at, mark.size(), with);
}

class Families {
 public:
  // A null value is not known and left out.
  void add(const char* name, const char* help, const nlohmann::json& value,
           std::vector<prometheus::ClientMetric::Label> labels = {}, bool counter = false) {
    if (!value.is_number() && !value.is_boolean()) return;
    if (families_.empty() || families_.back().name != name) {
      const auto type = counter ? prometheus::MetricType::Counter : prometheus::MetricType::Gauge;
      families_.push_back({name, help, type, {}});
    }
    prometheus::ClientMetric metric;
    metric.label = std::move(labels);
    (counter ? metric.counter.value : metric.gauge.value) =
        value.is_boolean() ? double(value.get<bool>()) : value.get<double>();
    families_.back().metric.push_back(std::move(metric));
  }
  void count(const char* name, const char* help, const nlohmann::json& value,
             std::vector<prometheus::ClientMetric::Label> labels = {}) {
    add(name, help, value, std::move(labels), true);
  }
  std::string text() const { return prometheus::TextSerializer().Serialize(families_); }

 private:
  std::vector<prometheus::MetricFamily> families_;
};

std::string dumped(const nlohmann::json& value) {
  return value.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

}  // namespace

std::string page_policy() {
  return "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; "
         "form-action 'none'; script-src " +
         source_of(kPage, "script") + "; style-src " + source_of(kPage, "style");
}

std::string status_page(const nlohmann::json& status) {
  std::string data;
  for (const char c : dumped(status)) {
    // "</script>" and "<!--" would end the element; everywhere in JSON "<" stands in a string.
    if (c == '<')
      data += "\\u003c";
    else
      data += c;
  }
  std::string page(kPage);
  replace(page, "{{policy}}", page_policy());
  replace(page, "{{data}}", data);  // last: what it holds is not looked at again
  return page;
}

std::string prometheus_text(const nlohmann::json& status) {
  const nlohmann::json& progress = status.at("progress");
  Families families;
  families.add("lockstep_job_info", "The job; always 1.", 1,
               {{"title", status.at("title")}, {"state", status.at("state")}});
  families.add("lockstep_healthy", "1 while the job makes progress, as /healthz.",
               status.at("health").at("ok"));
  families.add("lockstep_uptime_seconds", "Since the job was started.",
               status.at("time").get<double>() - status.at("started").get<double>());
  families.add("lockstep_since_last_step_seconds", "Since the last committed step.",
               status.at("last_step_s"));
  families.add("lockstep_workers_wanted", "Workers that the job aims at.",
               status.at("workers_wanted"));
  std::map<std::string, int> states = {{"member", 0}};
  for (const auto& worker : status.at("workers")) ++states[worker.at("state")];
  for (const auto& [state, count] : states)
    families.add("lockstep_workers", "Worker processes by state.", count, {{"state", state}});
  families.add("lockstep_generation", "The agreed list of members, numbered.",
               status.at("generation"));
  families.count("lockstep_worker_deaths_total", "Workers that ended before the job did.",
                 status.at("deaths"));
  families.count("lockstep_recoveries_total", "Failures that the job went on after.",
                 status.at("recovery_count"));
  if (!status.at("recoveries").empty())
    families.add("lockstep_last_recovery_seconds", "From the failure to the next committed step.",
                 status.at("recoveries").back().at("seconds"));
  families.count("lockstep_steps_total", "Committed steps.", progress.at("step"));
  families.count("lockstep_samples_total", "Samples trained on.", progress.at("samples"));
  families.add("lockstep_epoch", "The epoch under way, from 1.", progress.at("epoch"));
  families.add("lockstep_samples_per_second", "Training throughput of all workers.",
               progress.at("samples_per_s"));
  families.add("lockstep_train_loss", "Of the last step reported.", progress.at("loss"));
  families.add("lockstep_learning_rate", "Of the last step reported.", progress.at("lr"));
  families.add("lockstep_gradient_norm", "Of the last step reported.", progress.at("grad_norm"));
  if (!status.at("epochs").empty()) {
    const nlohmann::json& epoch = status.at("epochs").back();
    families.add("lockstep_test_loss", "Of the last whole epoch.", epoch.at("test_loss"));
    families.add("lockstep_test_accuracy", "Of the last whole epoch, 0 to 1.",
                 epoch.at("test_accuracy"));
  }
  for (const auto& rank : status.at("breakdown"))
    for (const auto& [phase, seconds] : rank.at("seconds").items())
      families.count("lockstep_phase_seconds_total", "Where each worker's time went.", seconds,
                     {{"rank", dumped(rank.at("rank"))}, {"phase", phase}});
  for (const auto& rank : status.at("breakdown"))
    families.add("lockstep_worker_peak_memory_bytes", "Largest resident size.",
                 rank.at("peak_memory_bytes"), {{"rank", dumped(rank.at("rank"))}});
  return families.text();
}

}  // namespace lockstep
