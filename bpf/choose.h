/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The decision: what becomes of a connection or datagram to (address, port).
 *
 * Reads `pods`, `services`, `endpoints`, `addresses`, `ranges`. A service that is known is routed or refused,
 * never let through to its own address (fail closed). An address that is not known is left alone.
 */
#pragma once

#include "mesh_helpers.h"

struct destination {
	struct ip address;
	__be16 port;
};

struct choice {
	__u64 service;
	struct destination endpoint;
	__u32 slot;
	bool rewrite; /* only with REASON_ROUTED: false for what is no service */
};

/* Endpoints are read without a lock: a list that shrinks meanwhile is read again this often. */
#define CHOOSE_ATTEMPTS 4

static __always_inline __u32 client_network(const struct pod_value *pod)
{
	return pod ? pod->network : node_network;
}

/*
 * Looks for the address in the ranges of services, and makes the key that of the range. An address
 * that is a service's by itself comes before a range, a workload's after it (as ztunnel has it).
 */
static __always_inline bool widen(struct service_key *key)
{
	struct range_key range = { .prefix_bits = 160, .network = key->network, .address = key->address };
	struct address_key exact = { .address = key->address, .network = key->network };
	struct range_value *found = bpf_map_lookup_elem(&ranges, &range);
	struct address_value *known;

	if (!found)
		return false;
	known = bpf_map_lookup_elem(&addresses, &exact);
	if (known && known->kind == ADDRESS_SERVICE)
		return false;
	key->address = found->address;
	key->network = found->network;
	return true;
}

static __always_inline enum reason unserved_verdict(const struct ip *address, __u32 network)
{
	struct address_key key = { .address = *address, .network = network };
	struct address_value *known = bpf_map_lookup_elem(&addresses, &key);

	if (!known)
		return REASON_ROUTED;
	if (known->kind == ADDRESS_SERVICE && known->verdict == REASON_ROUTED)
		return REASON_NO_PORT;
	return known->verdict;
}

/* True when the slot held an endpoint of this service for the whole time that it was read. */
static __always_inline bool read_endpoint(__u64 service, __u32 slot, struct endpoint_value *endpoint)
{
	struct endpoint_key key = { .service = service, .slot = slot };
	struct endpoint_value *value = bpf_map_lookup_elem(&endpoints, &key);

	if (!value)
		return false;
	endpoint->address = value->address;
	endpoint->port = value->port;
	endpoint->other = value->other;
	endpoint->share = value->share;
	barrier();
	return *(volatile __u64 *)&value->service == service;
}

/* Draws a slot, in proportion to the weights. False when the list changed meanwhile. */
static __always_inline bool draw_endpoint(__u64 service, __u32 count, struct choice *choice)
{
	struct endpoint_value drawn;

	choice->slot = bpf_get_prandom_u32() % count;
	if (!read_endpoint(service, choice->slot, &drawn))
		return false;
	if (drawn.share && bpf_get_prandom_u32() >= drawn.share) {
		choice->slot = drawn.other;
		if (!read_endpoint(service, choice->slot, &drawn))
			return false;
	}
	choice->endpoint.address = drawn.address;
	choice->endpoint.port = drawn.port;
	return true;
}

/* Whether a slot still holds the endpoint that a socket went to before. */
static __always_inline bool holds(__u64 service, __u32 slot, const struct destination *kept)
{
	struct endpoint_value held;

	return read_endpoint(service, slot, &held) && ip_equal(&held.address, &kept->address) &&
	       held.port == kept->port;
}

/*
 * `preferred` is a slot to keep when it still holds `choice->endpoint` (datagrams of one socket),
 * or -1. Returns REASON_ROUTED, REASON_PASSTHROUGH, or why it is refused.
 */
static __always_inline enum reason choose(const struct destination *to, __u32 network, __s64 preferred,
					  struct choice *choice)
{
	struct service_key key = { .address = to->address, .network = network, .port = to->port };
	struct destination kept = choice->endpoint;
	struct service_value *service;
	__u32 endpoints_count;
	int attempt;

	choice->rewrite = false;
#pragma unroll
	for (attempt = 0; attempt < CHOOSE_ATTEMPTS; attempt++) {
		service = bpf_map_lookup_elem(&services, &key);
		if (!service && widen(&key))
			service = bpf_map_lookup_elem(&services, &key);
		if (!service)
			return unserved_verdict(&key.address, key.network);
		choice->service = service->id;
		if (service->verdict != REASON_ROUTED)
			return service->verdict;
		endpoints_count = service->endpoints;
		if (!endpoints_count)
			return REASON_NO_ENDPOINT;
		if (preferred >= 0 && preferred < endpoints_count &&
		    holds(choice->service, preferred, &kept)) {
			choice->slot = preferred;
			choice->endpoint = kept;
			choice->rewrite = true;
			return REASON_ROUTED;
		}
		if (draw_endpoint(choice->service, endpoints_count, choice)) {
			choice->rewrite = true;
			return REASON_ROUTED;
		}
	}
	return REASON_ENDPOINT_VANISHED;
}

static __always_inline void record_refusal(const struct destination *to, const struct pod_value *pod,
					   __u64 service, __u8 protocol, enum reason reason)
{
	struct flow_record *record = record_reserve();

	if (!record)
		return;
	record->kind = FLOW_REFUSED;
	record->direction = DIRECTION_OUTBOUND;
	record->protocol = protocol;
	record->reason = reason;
	record->service = service;
	record->opened_ns = record->closed_ns = bpf_ktime_get_ns();
	if (pod)
		record->local = ip_is_v4(&to->address) ? pod->address4 : pod->address6;
	record->remote = record->vip = to->address;
	record->remote_port = record->vip_port = to->port;
	record_submit(record);
}
