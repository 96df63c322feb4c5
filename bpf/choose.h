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
/* An element that is reused while it is read is looked for again this often. */
#define READ_ATTEMPTS 2
/* In a list of more endpoints a datagram socket is not followed when its endpoint gets another slot. */
#define KEEP_SLOTS 64

static __always_inline __u32 client_network(const struct pod_value *pod)
{
	return pod ? pod->network : node_network;
}

/*
 * What an address is, copied; false when it is unknown. One that changes meanwhile is read again; one
 * that does so each time is taken for a service's, whose ports are then looked for again.
 */
static __always_inline bool read_address(const struct address_key *key, struct address_value *found)
{
	int attempt;

#pragma unroll
	for (attempt = 0; attempt < READ_ATTEMPTS; attempt++) {
		struct address_value *value = bpf_map_lookup_elem(&addresses, key);

		if (!value)
			return false;
		found->kind = value->kind;
		found->verdict = value->verdict;
		barrier();
		found->address = value->address;
		found->network = value->network;
		if (ip_equal(&found->address, &key->address) && found->network == key->network)
			return true;
	}
	found->kind = ADDRESS_SERVICE;
	found->verdict = REASON_ROUTED;
	return true;
}

/* A port of a service, copied; false when there is none. One that changes meanwhile is read again. */
static __always_inline bool read_service(const struct service_key *key, struct service_value *found)
{
	int attempt;

#pragma unroll
	for (attempt = 0; attempt < READ_ATTEMPTS; attempt++) {
		struct service_value *value = bpf_map_lookup_elem(&services, key);

		if (!value)
			return false;
		found->id = value->id;
		found->endpoints = value->endpoints;
		found->verdict = value->verdict;
		barrier();
		found->address = value->address;
		found->network = value->network;
		found->port = value->port;
		if (ip_equal(&found->address, &key->address) && found->network == key->network &&
		    found->port == key->port)
			return true;
	}
	return false;
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
	struct address_value known = {};

	if (!found || (read_address(&exact, &known) && known.kind == ADDRESS_SERVICE))
		return false;
	key->address = found->address;
	key->network = found->network;
	return true;
}

static __always_inline enum reason unserved_verdict(const struct service_key *key)
{
	struct address_key address = { .address = key->address, .network = key->network };
	struct address_value known = {};

	if (!read_address(&address, &known))
		return REASON_ROUTED;
	if (known.kind == ADDRESS_SERVICE && known.verdict == REASON_ROUTED)
		return REASON_NO_PORT;
	return known.verdict;
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

static __always_inline bool holds(__u64 service, __u32 slot, const struct destination *kept)
{
	struct endpoint_value held;

	return read_endpoint(service, slot, &held) && ip_equal(&held.address, &kept->address) &&
	       held.port == kept->port;
}

/* Finds the endpoint that a socket went to before: in its slot, or where a change of the list put it. */
static __always_inline bool find_kept(const struct service_value *service, __s64 slot, struct choice *choice)
{
	struct destination kept = choice->endpoint;
	__u32 other;

	if (slot < 0)
		return false;
	choice->slot = slot;
	if (choice->slot < service->endpoints && holds(service->id, choice->slot, &kept))
		return true;
	for (other = 0; other < KEEP_SLOTS && other < service->endpoints; other++) {
		if (!holds(service->id, other, &kept))
			continue;
		choice->slot = other;
		return true;
	}
	return false;
}

/*
 * `preferred` is a slot to keep when the list still has `choice->endpoint` (datagrams of one socket),
 * or -1. Returns REASON_ROUTED, REASON_PASSTHROUGH, or why it is refused.
 */
static __always_inline enum reason choose(const struct destination *to, __u32 network, __s64 preferred,
					  struct choice *choice)
{
	struct service_key key = { .address = to->address, .network = network, .port = to->port };
	struct service_value service = {};
	enum reason verdict;
	int attempt;

	choice->rewrite = false;
#pragma unroll
	for (attempt = 0; attempt < CHOOSE_ATTEMPTS; attempt++) {
		if (!read_service(&key, &service) && !(widen(&key) && read_service(&key, &service))) {
			verdict = unserved_verdict(&key);
			/* An update may hide an entry for a moment: a service's port is looked for again. */
			if (verdict == REASON_NO_PORT && attempt < CHOOSE_ATTEMPTS - 1)
				continue;
			return verdict;
		}
		choice->service = service.id;
		if (service.verdict != REASON_ROUTED)
			return service.verdict;
		if (!service.endpoints)
			return REASON_NO_ENDPOINT;
		if ((!attempt && find_kept(&service, preferred, choice)) ||
		    draw_endpoint(service.id, service.endpoints, choice)) {
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
