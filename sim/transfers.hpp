#pragma once
// Collectives as transfers: who sends how much to whom when a group of GPUs communicates.
//
// The transfers of one op keep pace with each other (rings and trees pass every chunk on, DeepEP's
// channels send to all destinations in turn), so an op is two sets of transfers, one inside nodes
// (near) and one between nodes (far), and two volumes that scale them (Communication, in
// network_prices.hpp). In each set the GPU that sends most sends one byte.

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "sim/fabric.hpp"

namespace orrery {

enum class CommunicationPattern : std::uint8_t {
  ring,        ///< each member to the next; across nodes one ring per member of a node, each over
               ///< that member's NICs, while NVLink passes all rings through all members
  tree,        ///< two binary trees over nodes, half of the bytes each, up and down (NCCL's double
               ///< binary tree); per node as many as members; inside nodes a ring or the switch
  all_to_all,  ///< every member to every other
  dispatch,    ///< DeepEP: to the GPU of the same index in other nodes, from there to the others
  combine,     ///< the same the other way round
  send,        ///< the first member to the second
  storage,     ///< every member by itself, through its NIC and out of the fabric's sight
};
std::string_view name_of(CommunicationPattern pattern);

struct UnitTransfers {
  std::vector<Transfer> near;
  std::vector<Transfer> far;
};

/// The members of a group by node; those of one node adjoin.
std::vector<std::vector<GpuId>> by_node(std::span<const GpuId> members, const Fabric& fabric);

/// Transfers among the GPUs of a group, node by node (`nodes[n]` are its members on one node, in
/// the order of their rails). Nodes may hold different numbers of members: then the last member of
/// a smaller node stands in for those that it lacks.
UnitTransfers unit_transfers(CommunicationPattern pattern,
                             std::span<const std::vector<GpuId>> nodes);

}  // namespace orrery
