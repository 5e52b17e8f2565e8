// --hostfile: the same command on each host, over ssh. One thread.
#pragma once

#include <string>
#include <vector>

namespace lockstep {

// One a line; what follows the name, blank lines and # comments are skipped. Throws ConfigError.
std::vector<std::string> read_hostfile(const std::string& path);

// `arguments` without --hostfile, --ssh and --key-file, and for each host with what makes it a node
// of one job. Shell words.
std::string words_for(const std::string& program, const std::string& command,
                      const std::vector<std::string>& arguments,
                      const std::vector<std::string>& hosts, int rank);

// Starts them, and returns the first exit code that is not 0 when all have ended. The key goes to
// each through its standard input, whose end tells it to stop: so they end with this program.
int run_on_hosts(const std::string& command, const std::vector<std::string>& arguments,
                 const std::string& hostfile, const std::string& ssh, const std::string& key_file);

}  // namespace lockstep
