// For tests alone: this process as one of several nodes, each in a network namespace with such a
// process (tests/nodes_conformance_test.py). Its ranks are threads, with an endpoint each.
//   LOCKSTEP_TEST_NODES="ENGINE RANKS,RANKS,… NODE FOLDER"
// RANKS: of each node. FOLDER: empty, of all nodes, who leave their addresses there.
#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <functional>
#include <memory>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "lockstep/base/file.h"
#include "lockstep/transport/transport.h"

namespace lockstep {

struct TestNode {
  std::string engine;
  std::vector<int> local_sizes;  // by node
  int node = 0;
  int first = 0;                                     // rank of this node
  std::vector<std::unique_ptr<Endpoint>> endpoints;  // of this node's ranks
  std::vector<std::string> addresses;                // of all

  int size() const { return static_cast<int>(addresses.size()); }

  // body(rank) on a thread for each rank of this node's that is below `size`.
  void run(int size, const std::function<void(int)>& body) const {
    std::vector<std::jthread> threads;
    for (int local = 0; local < local_sizes[node] && first + local < size; ++local)
      threads.emplace_back([&body, rank = first + local] {
        try {
          body(rank);
        } catch (const std::exception& error) {
          ADD_FAILURE() << "rank " << rank << ": " << error.what();
        }
      });
  }
  std::unique_ptr<Transport> connect(int rank, int size, std::uint64_t generation) const {
    return endpoints[rank - first]->connect(
        {addresses.begin(), addresses.begin() + size}, rank,
        {.generation = generation, .deadline = Deadline::after(std::chrono::seconds(60))});
  }
};

// Null where this process is no such node.
inline const TestNode* test_node() {
  static const std::unique_ptr<TestNode> found = []() -> std::unique_ptr<TestNode> {
    const char* const text = std::getenv("LOCKSTEP_TEST_NODES");
    if (text == nullptr) return nullptr;
    auto self = std::make_unique<TestNode>();
    std::istringstream words(text);
    std::string sizes, folder;
    words >> self->engine >> sizes >> self->node >> folder;
    std::istringstream numbers(sizes);
    for (std::string number; std::getline(numbers, number, ',');)
      self->local_sizes.push_back(std::stoi(number));
    int rank = 0;
    for (int node = 0; node < static_cast<int>(self->local_sizes.size()); ++node) {
      if (node == self->node) self->first = rank;
      for (int local = 0; local < self->local_sizes[node]; ++local, ++rank) {
        if (node != self->node) continue;
        self->endpoints.push_back(
            make_endpoint(engine_from(self->engine), {.interface = "eth0", .key = "secret"}));
        write_file_atomically(std::filesystem::path(folder) / std::to_string(rank),
                              self->endpoints.back()->address());
      }
    }
    const Deadline deadline = Deadline::after(std::chrono::seconds(60));
    for (int other = 0; other < rank; ++other) {
      const auto path = std::filesystem::path(folder) / std::to_string(other);
      while (!std::filesystem::exists(path)) {
        if (deadline.expired()) throw Error("test: rank " + std::to_string(other) + " is missing");
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
      self->addresses.push_back(read_text_file(path));
    }
    return self;
  }();
  return found.get();
}

}  // namespace lockstep
