// Completion times of flows by SimGrid, another flow-level simulator (S4U interface; its model CM02
// shares links max-min fairly, as sim/flows.hpp does). Reads from the standard input what
// platform.hpp writes; arguments are SimGrid's own (--cfg=...), or --sendto_async. Prints the
// seconds of processor time that building the platform and simulating took, then the completion
// time of every flow in seconds, one a line.

#include <simgrid/s4u.hpp>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <iostream>
#include <string>
#include <utility>
#include <vector>

namespace s4u = simgrid::s4u;

namespace {

struct Flow {
  std::size_t from = 0;
  std::size_t to = 0;
  double start_s = 0;
  std::uint64_t bytes = 0;
};

double now_s() {
  timespec t{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

template <class Value>
Value next() {
  Value value{};
  if (!(std::cin >> value)) {
    std::fprintf(stderr, "simgrid_flows: the description ends early or holds no number\n");
    std::exit(2);
  }
  return value;
}

std::string name_of(char kind, std::size_t i) {
  return std::string(1, kind).append(std::to_string(i));
}

void wait_until(double start_s) {
  if (start_s > s4u::Engine::get_clock()) s4u::this_actor::sleep_until(start_s);
}

}  // namespace

int main(int argc, char** argv) {
  std::ios::sync_with_stdio(false);
  s4u::Engine engine(&argc, argv);

  // All of the description first, so that reading is not timed.
  const auto hosts = next<std::size_t>();
  std::vector<std::pair<double, double>> rates(next<std::size_t>());
  for (auto& [bytes_per_s, latency_s] : rates) {
    bytes_per_s = next<double>();
    latency_s = next<double>();
  }
  struct Route {
    std::size_t from = 0;
    std::size_t to = 0;
    std::vector<std::size_t> links;
  };
  std::vector<Route> routes(next<std::size_t>());
  for (Route& route : routes) {
    route.from = next<std::size_t>();
    route.to = next<std::size_t>();
    route.links.resize(next<std::size_t>());
    for (std::size_t& link : route.links) link = next<std::size_t>();
  }
  std::vector<Flow> flows(next<std::size_t>());
  for (Flow& flow : flows) {
    flow.from = next<std::size_t>();
    flow.to = next<std::size_t>();
    flow.start_s = next<double>();
    flow.bytes = next<std::uint64_t>();
  }

  const double begin_s = now_s();
  auto* zone = s4u::create_full_zone("world");
  std::vector<s4u::Host*> host;
  for (std::size_t i = 0; i < hosts; ++i) {
    host.push_back(zone->create_host(name_of('h', i), 1e9)->seal());
  }
  std::vector<s4u::Link*> link;
  for (std::size_t i = 0; i < rates.size(); ++i) {
    link.push_back(
        zone->create_link(name_of('l', i), rates[i].first)->set_latency(rates[i].second)->seal());
  }
  for (const Route& route : routes) {
    std::vector<s4u::LinkInRoute> path;
    for (const std::size_t i : route.links) path.emplace_back(link[i]);
    zone->add_route(host[route.from]->get_netpoint(), host[route.to]->get_netpoint(), nullptr,
                    nullptr, path, false);
  }
  zone->seal();

  std::vector<s4u::CommPtr> comms(flows.size());

  if (argc > 1 && argv[1] == std::string("--sendto_async")) {
    s4u::Actor::create("sender", host.at(0), [&] {
      for (std::size_t i = 0; i < flows.size(); ++i) {
        wait_until(flows[i].start_s);
        comms[i] = s4u::Comm::sendto_async(host[flows[i].from], host[flows[i].to], flows[i].bytes);
      }
    });
  } else {
    // The shorter way above has its price: SimGrid 3.32 keeps all of its transfers in one list and
    // walks it at every completion. So every flow has a mailbox of its own, and every host a sender
    // and a receiver.
    std::vector<std::vector<std::size_t>> sent(hosts);  // flows by host, by start
    std::vector<std::vector<std::size_t>> received(hosts);
    for (std::size_t i = 0; i < flows.size(); ++i) {
      sent[flows[i].from].push_back(i);
      received[flows[i].to].push_back(i);
    }
    const auto mailbox = [](std::size_t i) { return s4u::Mailbox::by_name(std::to_string(i)); };
    static char payload = 0;
    for (std::size_t at = 0; at < hosts; ++at) {
      s4u::Actor::create("receiver", host[at], [&, own = std::move(received[at])] {
        std::vector<void*> sink(own.size());
        std::vector<s4u::CommPtr> parts;
        for (const std::size_t i : own) {
          parts.push_back(mailbox(i)->get_async<void>(&sink[parts.size()]));
        }
        for (const s4u::CommPtr& part : parts) part->wait();
      });
      s4u::Actor::create("sender", host[at], [&, own = std::move(sent[at])] {
        for (const std::size_t i : own) {
          wait_until(flows[i].start_s);
          comms[i] = mailbox(i)->put_async(&payload, flows[i].bytes);
        }
        for (const std::size_t i : own) comms[i]->wait();
      });
    }
  }
  const double run_s = now_s();
  engine.run();
  const double done_s = now_s();

  std::printf("%.6f %.6f\n", run_s - begin_s, done_s - run_s);
  for (const auto& comm : comms) std::printf("%.15g\n", comm->get_finish_time());
}
