#include "lockstep/observe/status.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "lockstep/observe/words.h"

namespace lockstep {
namespace {

using Json = nlohmann::json;

constexpr std::size_t kMostPoints = 1000, kMostEpochs = 500, kMostRows = 200, kMostText = 600;
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// Few digits: a page cannot show more, and they are sent again and again.
Json rounded(double value) {
  if (!std::isfinite(value)) return nullptr;
  return value == 0 ? 0.0 : std::strtod(fmt::format("{:.5g}", value).c_str(), nullptr);
}

Json or_null(bool known, Json value) { return known ? std::move(value) : Json(); }

std::string clipped(std::string text) {
  if (text.size() > kMostText) text = text.substr(0, kMostText) + " …";
  return text;
}

std::string text_in(const Json& event, const char* member) {
  const auto found = event.find(member);
  return found != event.end() && found->is_string() ? clipped(*found) : std::string();
}

void push(std::deque<Json>& rows, Json row) {
  rows.push_back(std::move(row));
  if (rows.size() > kMostRows) rows.pop_front();
}

// In the agent's words; "" where it does not tell of workers.
bool is_death(const std::string& cause) {
  return !cause.empty() && cause != "exited with code 0" && cause != "not needed any more";
}

std::string workers_in_words(std::size_t count) {
  return fmt::format("{} worker{}", count, count == 1 ? "" : "s");
}

Json epochs_json(const std::vector<EpochRecord>& epochs) {
  Json rows = Json::array();
  const std::size_t stride = (epochs.size() + kMostEpochs - 1) / kMostEpochs;
  for (std::size_t i = 0; i < epochs.size(); ++i) {
    const EpochRecord& epoch = epochs[i];
    if (i % stride != 0 && i + 1 < epochs.size()) continue;
    rows.push_back({{"epoch", epoch.epoch},
                    {"train_loss", rounded(epoch.train_loss)},
                    {"test_loss", rounded(epoch.test_loss.value_or(kNaN))},
                    {"test_accuracy", rounded(epoch.test_accuracy.value_or(kNaN))},
                    {"seconds", rounded(epoch.seconds)},
                    {"evaluation_seconds", rounded(epoch.evaluation_seconds)},
                    {"samples_per_s", rounded(epoch.samples_per_s)}});
  }
  return rows;
}

}  // namespace

Status::Status(StatusOptions options)
    : options_(std::move(options)),
      lr_(kNaN),
      grad_norm_(kNaN),
      steps_(kMostPoints),
      progressed_(options_.started) {}

void Status::note(double now, const char* kind, std::string text) {
  push(events_, {{"time", now}, {"kind", kind}, {"text", clipped(std::move(text))}});
}

void Status::set_state(Worker& worker, const std::string& state, double now) {
  if (worker.state != state) worker.since = now;
  worker.state = state;
}

void Status::take_worker(const Json& event, double now) {
  const int seat = event.at("seat"), node = event.value("node", 0);
  const std::string state = text_in(event, "state"), cause = text_in(event, "cause");
  Worker& worker = workers_[{node, seat}];
  const std::int64_t pid = event.value("pid", std::int64_t{0});
  if (worker.pid != pid) worker = Worker();  // another one in this seat
  const bool died = state == "ended" && worker.state != "ended" && is_death(cause);
  const int rank = event.value("rank", -1);
  worker.seat = seat;
  worker.node = node;
  worker.pid = pid;
  worker.cause = cause;
  if (rank >= 0 || state != "ended") worker.rank = rank;
  if (died) {
    ++deaths_;
    recovering_ = recovering_ || worker.state == "member";
    if (worker.rank >= 0) last_deaths_[worker.rank] = {cause, now};
  }
  set_state(worker, state, now);
  if (state == "member") return;  // its generation says so
  const std::string place = event.contains("node") ? fmt::format(" of node {}", node) : "";
  const std::string who =
      worker.rank >= 0 ? fmt::format("rank {} (pid {}, seat {}{})", worker.rank, pid, seat, place)
                       : fmt::format("worker (pid {}, seat {}{})", pid, seat, place);
  note(now, died ? "death" : "worker",
       fmt::format("{} {}", who, cause.empty() ? "is " + state : state + ": " + cause));
}

void Status::take_generation(const Json& event, double now) {
  const Json& ranks = event.at("ranks");
  generation_ = event.at("generation").get<std::uint64_t>();
  ++generation_count_;
  for (auto& [place, worker] : workers_)
    if (worker.state == "member") worker.rank = -1;  // those who still are one follow
  for (const Json& member : ranks) {
    const int seat = member.at("seat");
    const int node = member.value("node", 0);
    Worker& worker = workers_[{node, seat}];
    worker.seat = seat;
    worker.node = node;
    worker.rank = member.at("rank");
    worker.pid = member.value("pid", worker.pid);
    set_state(worker, "member", now);
  }
  for (auto& [place, worker] : workers_)
    if (worker.state == "member" && worker.rank < 0) set_state(worker, "leaving", now);
  const std::string reason = text_in(event, "reason");
  push(generations_,
       {{"generation", generation_}, {"time", now}, {"workers", ranks.size()}, {"reason", reason}});
  note(now, "generation",
       fmt::format("generation {}, {}: {}", generation_.get<std::uint64_t>(),
                   workers_in_words(ranks.size()), reason));
}

void Status::take_recovery(const Json& event, double now) {
  ++recovery_count_;
  recovering_ = false;
  Json row = {{"time", now},
              {"step", run_.step},
              {"cause", text_in(event, "cause")},
              {"source", text_in(event, "source")}};
  for (const char* member : {"rank", "seconds", "rejoined_seconds", "steps_redone", "generation"})
    row[member] = rounded(number_in(event, member));
  const int redone = event.value("steps_redone", 0);
  note(now, "recovery",
       fmt::format("rank {} recovered after {:.3f} s, {} step{} redone, from the {}",
                   event.value("rank", -1), number_in(event, "seconds"), redone,
                   redone == 1 ? "" : "s", text_in(event, "source")));
  push(recoveries_, std::move(row));
}

void Status::take_run(const Json& event, double now) {
  options_.title = text_in(event, "title");
  options_.workers = event.at("workers");
  if (options_.started > 0) note(now, "training", "the run is resumed");
  if (options_.started == 0) options_.started = event.at("started");
  progressed_ = now;
  ended_ = recovering_ = false;
  failure_.clear();
  workers_.clear();
  run_.first_step_clock.reset();
}

void Status::take_from_agent(const Json& event, double now) {
  const std::string& kind = event.at("event").get_ref<const std::string&>();
  if ((kind == "worker" || kind == "generation") && !std::exchange(agent_tells_, true))
    workers_.clear();
  if (kind == "worker") take_worker(event, now);
  if (kind == "generation") take_generation(event, now);
  if (kind == "recovery") take_recovery(event, now);
  if (kind == "message") note(now, "message", text_in(event, "text"));
  if (kind == "run") take_run(event, now);
  if (kind == "end") take_end(event.at("failed"), now);
}

// While no agent tells of them, what workers say of themselves.
void Status::take_from_worker(int rank, const Json& event, double now) {
  const std::string& kind = event.at("event").get_ref<const std::string&>();
  if (kind == "join" || kind == "rank") {
    if (agent_tells_) return;
    Worker& worker = workers_[{0, rank}];
    worker.rank = rank;
    set_state(worker, kind == "join" ? "ready" : "member", now);
  } else if (kind == "first_step") {
    note(now, "training", "the first step is committed");
    for (auto& [place, worker] : workers_)
      if (!agent_tells_) set_state(worker, "member", now);
  } else if (kind == "message") {
    note(now, "message", text_in(event, "text"));
  } else if (kind == "output") {
    note(now, "output", fmt::format("rank {}: {}", rank, text_in(event, "text")));
  } else if (kind == "error" || kind == "comm_error") {
    recovering_ = recovering_ || kind == "comm_error";
    note(now, "error", fmt::format("rank {}: {}", rank, text_in(event, "message")));
  } else if (kind == "injected") {
    note(now, "injected", fmt::format("rank {}: {}", rank, text_in(event, "fault")));
  } else if (kind == "finished") {
    note(now, "end", "training is finished: " + text_in(event, "reason"));
  }
}

void Status::on_event(int rank, const Json& event, double now) {
  const std::string& kind = event.at("event").get_ref<const std::string&>();
  if (rank < 0) return take_from_agent(event, now);
  if (kind == "ready" && run_.epochs_planned > 0) {  // of another generation, or another session
    if (event.contains("resumed"))
      for (const Json& epoch : event["resumed"].at("epochs")) on_event(rank, epoch, now);
    return;
  }
  if (kind == "epoch" && event.at("epoch") <= run_.epochs.size()) return;  // done again
  run_.take(event);
  if (kind == "step" || kind == "epoch") {
    progressed_ = now;
    lr_ = number_in(event, "lr");
    grad_norm_ = number_in(event, "grad_norm");
  }
  if (kind == "first_step" || kind == "recovered") progressed_ = now;
  if (kind == "step" || kind == "recovered") recovering_ = false;
  if (kind == "step")
    steps_.add(double(run_.step), {run_.loss, run_.samples_per_s > 0 ? run_.samples_per_s : kNaN});
  take_from_worker(rank, event, now);
}

void Status::take_end(const std::string& failure, double now) {
  ended_ = true;
  ended_at_ = now;
  failure_ = failure;
  for (auto& [place, worker] : workers_)
    if (worker.state != "ended") set_state(worker, "ended", now);
  if (!failure.empty()) note(now, "error", "the job failed: " + failure);
}

bool Status::enough_workers() const {
  const auto members = std::count_if(workers_.begin(), workers_.end(), [](const auto& each) {
    return each.second.state == "member";
  });
  const bool ending = !run_.stopped_because.empty();
  return !agent_tells_ || ending || generation_.is_null() || members >= options_.least;
}

std::string Status::state() const {
  if (ended_) return failure_.empty() ? "finished" : "failed";
  if (!enough_workers()) return "waiting for workers";
  if (recovering_) return "recovering";
  if (!run_.first_step_clock) return "starting";
  return run_.stopped_because.empty() ? "training" : "ending";
}

std::string Status::ill_because(double now) const {
  if (ended_) return failure_.empty() ? "" : "the job failed: " + clipped(failure_);
  if (!enough_workers())
    return fmt::format("fewer workers than the {} that the job needs", options_.least);
  if (now - progressed_ > options_.hang_timeout_s)
    return fmt::format("no committed step for {:.0f} s (the limit is {:g} s)", now - progressed_,
                       options_.hang_timeout_s);
  return "";
}

Json Status::workers_json() const {
  std::vector<const Worker*> sorted;
  for (const auto& [key, worker] : workers_) sorted.push_back(&worker);
  const auto place = [](const Worker* worker) {  // members by rank, others, the dead
    const bool dead = worker->state == "ended" && is_death(worker->cause);
    const int group = dead ? 2 : worker->rank >= 0 ? 0 : 1;
    return std::tuple(group, worker->rank, worker->node, worker->seat);
  };
  std::sort(sorted.begin(), sorted.end(),
            [&](const Worker* a, const Worker* b) { return place(a) < place(b); });
  Json rows = Json::array();
  for (const Worker* worker : sorted) {
    Json row = {{"rank", or_null(worker->rank >= 0, worker->rank)},
                {"seat", or_null(worker->seat >= 0, worker->seat)},
                {"node", worker->node},
                {"pid", or_null(worker->pid > 0, worker->pid)},
                {"state", worker->state},
                {"since", worker->since},
                {"cause", worker->cause},
                {"died", worker->state == "ended" && is_death(worker->cause)}};
    const auto death = last_deaths_.find(worker->rank);
    if (death != last_deaths_.end())
      row["last_death"] = {{"cause", death->second.cause}, {"time", death->second.time}};
    rows.push_back(std::move(row));
  }
  return rows;
}

Json Status::progress_json() const {
  const bool begun = run_.step > 0;
  return {{"step", run_.step},
          {"steps", run_.epochs_planned * run_.steps_per_epoch},
          {"epoch", run_.epoch},
          {"epochs", run_.epochs_planned},
          {"samples", run_.samples},
          {"train_samples", run_.train_samples},
          {"test_samples", run_.test_samples},
          {"parameters", run_.parameters},
          {"loss", or_null(begun, rounded(run_.loss))},
          {"lr", rounded(lr_)},
          {"grad_norm", rounded(grad_norm_)},
          {"samples_per_s", or_null(run_.samples_per_s > 0, rounded(run_.samples_per_s))}};
}

Json Status::json(double now) const {
  const std::string ill = ill_because(now);
  Json x = Json::array(), loss = Json::array(), rate = Json::array();
  for (const auto& point : steps_.points()) {
    x.push_back(std::int64_t(point.x));
    loss.push_back(rounded(point.values[0]));
    rate.push_back(rounded(point.values[1]));
  }
  Json breakdown = Json::array();
  for (const auto& [rank, event] : run_.ranks) {
    breakdown.push_back(event);
    breakdown.back().erase("event");
  }
  return {{"title", options_.title},
          {"folder", options_.folder},
          {"state", state()},
          {"reason", failure_.empty() ? run_.stopped_because : failure_},
          {"health", {{"ok", ill.empty()}, {"reason", ill}}},
          {"time", now},
          {"started", or_null(options_.started > 0, options_.started)},
          {"ended", or_null(ended_, ended_at_)},
          {"workers_wanted", options_.workers},
          {"workers_least", options_.least},
          {"generation", generation_},
          {"deaths", deaths_},
          {"generation_count", generation_count_},
          {"recovery_count", recovery_count_},
          {"last_step_s", or_null(run_.step > 0, now - progressed_)},
          {"progress", progress_json()},
          {"workers", workers_json()},
          {"generations", generations_},
          {"recoveries", recoveries_},
          {"steps", {{"step", x}, {"loss", loss}, {"samples_per_s", rate}}},
          {"epochs", epochs_json(run_.epochs)},
          {"breakdown", breakdown},
          {"events", events_}};
}

}  // namespace lockstep
