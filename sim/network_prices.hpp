#pragma once
// Prices of communication by formulas: one collective alone on an idle network.

#include "sim/price.hpp"

namespace orrery {

Price price_exchange(const ExpertExchange& exchange, int sms, const Profile& profile,
                     const Cluster& cluster);
Price price_collective(const Collective& collective, const Cluster& cluster);
Price price_send(const Send& send, const Cluster& cluster);

}  // namespace orrery
