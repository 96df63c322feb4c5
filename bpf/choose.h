/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The decision: what becomes of a connection or datagram to (address, port). To a loopback address: nothing.
 *
 * Reads `pods`, `services`, `endpoints`, `addresses`, `ranges`, `loads`, `shunned`; keeps `affinities`. A
 * service that is known is routed or refused, never let through to its own address (fail closed). An address
 * that is not known is left alone.
 *
 * What is verified_once is so for the verifier: it follows the function by itself, once, for any arguments,
 * and not at each call on each way to it. Such arguments may be NULL, and what they point to is no key to
 * look up for 6.1: keys lie on the stack.
 */
#pragma once

#include "mesh_helpers.h"

struct destination {
	struct ip address;
	__be16 port;
};

/* Who connects. */
struct client {
	__u64 netns_cookie;
	const struct pod_value *pod; /* NULL when it is no enrolled pod */
};

struct choice {
	__u64 service;
	struct destination endpoint;
	__u32 slot;
	enum service_flag flags; /* of the service */
	bool rewrite;		 /* only with REASON_ROUTED: false for what is no service */
};

/* An update may hide a service's port for a moment: it is looked for again this often. */
#define FIND_ATTEMPTS 4
/* Endpoints are read without a lock: a list that shrinks meanwhile is read again this often. */
#define CHOOSE_ATTEMPTS 6
/* An element that is reused while it is read is looked for again this often. */
#define READ_ATTEMPTS 2
/* In a list of more endpoints a datagram socket is not followed when its endpoint gets another slot. */
#define KEEP_SLOTS 64
/* For an endpoint that is shunned another is drawn this often; then the first of so many slots from any on
 * that is not is taken, or where there is none the one that was drawn: nothing is refused for it. */
#define SHUN_DRAWS 3
#define SHUN_SLOTS 64

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
		found->view = value->view;
		barrier();
		found->address = value->address;
		found->network = value->network;
		if (ip_equal(&found->address, &key->address) && found->network == key->network)
			return true;
	}
	found->kind = ADDRESS_SERVICE;
	found->verdict = REASON_ROUTED;
	found->view = 0;
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
		found->flags = value->flags;
		found->affinity_s = value->affinity_s;
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
 * What becomes of a connection to an address that has no such port: of a service, a workload, or
 * (kind 0) nobody known.
 */
static __always_inline enum reason unserved_verdict(const struct address_value *known)
{
	if (known->kind == ADDRESS_SERVICE && known->verdict == REASON_ROUTED)
		return REASON_NO_PORT;
	return known->verdict;
}

/* The network in which the client's namespace sees services that others do not; 0: it sees what all do. */
static __always_inline __u32 view_of(const struct client *client)
{
	struct address_key own = {};
	struct address_value known = {};
	__u32 index = SWITCH_VIEWS, *views = bpf_map_lookup_elem(&switches, &index);

	if (!views || !*views || !client->pod)
		return 0;
	own.network = client->pod->network;
	own.address = client->pod->address4.word[3] ? client->pod->address4 : client->pod->address6;
	return read_address(&own, &known) ? known.view : 0;
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
static __always_inline bool draw_once(const struct service_value *service, struct choice *choice)
{
	struct endpoint_value drawn;

	choice->slot = bpf_get_prandom_u32() % service->endpoints;
	if (!read_endpoint(service->id, choice->slot, &drawn))
		return false;
	if (drawn.share && bpf_get_prandom_u32() >= drawn.share) {
		choice->slot = drawn.other;
		if (!read_endpoint(service->id, choice->slot, &drawn))
			return false;
	}
	choice->endpoint.address = drawn.address;
	choice->endpoint.port = drawn.port;
	return true;
}

static __always_inline struct peer_key peer_of(const struct destination *endpoint)
{
	return (struct peer_key){ .address = endpoint->address, .port = endpoint->port };
}

static __always_inline __s64 load_of(const struct destination *endpoint)
{
	struct peer_key key = peer_of(endpoint);
	__s64 *load = bpf_map_lookup_elem(&loads, &key);

	return load && *load > 0 ? *load : 0; /* an entry that was evicted and made anew counts from 0 */
}

static __always_inline bool is_shunned(const struct destination *endpoint)
{
	struct peer_key key = peer_of(endpoint);
	__u64 *until_ns = bpf_map_lookup_elem(&shunned, &key);

	return until_ns && *until_ns > bpf_ktime_get_ns();
}

verified_once int draw_endpoint(const struct service_value *service, struct choice *choice)
{
	struct choice second = {};

	if (!service || !choice || !draw_once(service, choice))
		return false;
	if (!(service->flags & SERVICE_LEAST_CONNECTIONS))
		return true;
	if (draw_once(service, &second) && load_of(&second.endpoint) < load_of(&choice->endpoint)) {
		choice->slot = second.slot;
		choice->endpoint = second.endpoint;
	}
	return true;
}

static __always_inline bool holds(__u64 service, __u32 slot, const struct destination *kept)
{
	struct endpoint_value held;

	return read_endpoint(service, slot, &held) && ip_equal(&held.address, &kept->address) &&
	       held.port == kept->port;
}

/* Finds the endpoint that a socket went to before: in its slot, or where a change of the list put it. */
verified_once int find_kept(const struct service_value *service, __s64 slot, struct choice *choice)
{
	struct destination kept;
	__u32 other;

	if (!service || !choice || slot < 0)
		return false;
	kept = choice->endpoint;
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

/* An endpoint that is not shunned, whatever its weight. */
verified_once int find_unshunned(const struct service_value *service, struct choice *choice)
{
	struct endpoint_value held;
	struct destination found;
	__u32 slot, seen;

	if (!service || !choice || !service->endpoints)
		return false;
	slot = bpf_get_prandom_u32() % service->endpoints;
	for (seen = 0; seen < SHUN_SLOTS && seen < service->endpoints; seen++, slot++) {
		if (slot >= service->endpoints)
			slot = 0;
		if (!read_endpoint(service->id, slot, &held))
			continue;
		found.address = held.address;
		found.port = held.port;
		if (is_shunned(&found))
			continue;
		choice->slot = slot;
		choice->endpoint = found;
		return true;
	}
	return false;
}

/* The endpoint of the client's last connection to this service, while that is not too long ago. */
verified_once __s64 affine_slot(__u64 netns_cookie, const struct service_value *service,
				struct choice *choice)
{
	struct affinity_key key = { .netns_cookie = netns_cookie };
	struct affinity_value *last;

	if (!service || !choice)
		return -1;
	key.service = service->id;
	last = bpf_map_lookup_elem(&affinities, &key);
	if (!last || bpf_ktime_get_ns() - last->used_ns > service->affinity_s * 1000000000ULL)
		return -1;
	choice->endpoint.address = last->address;
	choice->endpoint.port = last->port;
	if (shun_ns && is_shunned(&choice->endpoint))
		return -1;
	return last->slot;
}

static __always_inline void keep_affinity(const struct client *client, const struct choice *choice)
{
	struct affinity_key key = { .netns_cookie = client->netns_cookie, .service = choice->service };
	struct affinity_value now = { .used_ns = bpf_ktime_get_ns(),
				      .address = choice->endpoint.address,
				      .port = choice->endpoint.port,
				      .slot = choice->slot };

	bpf_map_update_elem(&affinities, &key, &now, BPF_ANY);
}

/* Makes the key that of the range that the address is in, if it is in one in the key's network. */
static __always_inline bool widen(struct service_key *key)
{
	struct range_key range = { .prefix_bits = 160, .network = key->network, .address = key->address };
	struct range_value *found = bpf_map_lookup_elem(&ranges, &range);

	/* What an IPv6 range is around as bytes may be IPv4. */
	if (!found || ip_is_v4(&key->address) != ip_is_v4(&found->address))
		return false;
	key->address = found->address;
	key->network = found->network;
	return true;
}

enum found {
	FOUND_NOTHING, /* no service is there */
	FOUND_PORT,
	FOUND_ADDRESS, /* a service is there, without this port: `known` says what becomes of it */
};

verified_once int find_at(const struct service_key *key, struct service_value *service,
			  struct address_value *known)
{
	struct address_key address = {};
	struct service_key own;

	if (!key || !service || !known)
		return FOUND_NOTHING;
	own = *key; /* 6.1 looks up no key that an argument points to */
	address.address = own.address;
	address.network = own.network;
	if (read_service(&own, service))
		return FOUND_PORT;
	known->kind = known->verdict = 0;
	return read_address(&address, known) && known->kind == ADDRESS_SERVICE ? FOUND_ADDRESS
									       : FOUND_NOTHING;
}

/*
 * What is reached at an address and port, as the client sees it (as ztunnel has it): a service's own
 * address before ranges, ranges before workloads; each time what the client's namespace sees by itself
 * before what all see. A workload that goes by way of a waypoint is found at port 0, whatever port is asked
 * for. False: `verdict` says what becomes of a connection to what is no service's port.
 */
verified_once int find_service(const struct destination *to, __u64 networks, struct service_key *key,
			       struct service_value *service, enum reason *verdict)
{
	__u32 view = networks >> 32, common = networks;
	struct address_value known = {}, ranged = {}, *met;
	enum found found = FOUND_NOTHING;
	int attempt, step;

	if (!to || !key || !service || !verdict)
		return false;
	/* Unrolled: the verifier of 6.1 follows every way through a loop again. */
#pragma unroll
	for (attempt = 0; attempt < FIND_ATTEMPTS; attempt++) {
#pragma unroll
		for (step = 0; step < 4; step++) {
			__u32 network = step & 1 ? common : view;

			if (!network && !(step & 1))
				continue;
			key->address = to->address;
			key->network = network;
			if (step < 2)
				found = find_at(key, service, &known);
			else
				found = widen(key) ? find_at(key, service, &ranged) : FOUND_NOTHING;
			if (found == FOUND_PORT)
				return true;
			if (found == FOUND_ADDRESS)
				break;
		}
		met = step < 2 || found != FOUND_ADDRESS ? &known : &ranged;
		*verdict = unserved_verdict(met);
		if (met->kind == ADDRESS_WORKLOAD && *verdict == REASON_WAYPOINT_UNAVAILABLE) {
			struct service_key any = { .address = to->address, .network = common };

			*key = any;
			return read_service(&any, service);
		}
		if (*verdict != REASON_NO_PORT)
			return false;
	}
	return false;
}

/*
 * `preferred` is a slot to keep when the list still has `choice->endpoint` (datagrams of one socket),
 * or -1. A workload's waypoint is for connections: datagrams go to the workload itself, as answers must.
 * Returns REASON_ROUTED, REASON_PASSTHROUGH, or why it is refused.
 */
static __always_inline enum reason choose(const struct destination *to, const struct client *client,
					  bool is_datagram, __s64 preferred, struct choice *choice)
{
	struct service_key key = { .address = to->address,
				   .network = client_network(client->pod),
				   .port = to->port };
	struct service_value service = {};
	enum reason verdict = REASON_NO_PORT;
	bool avoided = false;
	__u64 networks;
	bool found;
	int attempt;

	choice->rewrite = false;
	if (ip_is_loopback(&to->address))
		return REASON_ROUTED;
	networks = (__u64)view_of(client) << 32 | client_network(client->pod);
	found = find_service(to, networks, &key, &service, &verdict);
	if (is_datagram && (found ? !key.port : verdict == REASON_WAYPOINT_UNAVAILABLE))
		return REASON_ROUTED;
	if (!found)
		return verdict;
	choice->service = service.id;
	if (service.affinity_s && preferred < 0)
		preferred = affine_slot(client->netns_cookie, &service, choice);
	if (service.verdict == REASON_ROUTED && find_kept(&service, preferred, choice))
		goto routed;
	for (attempt = 0; attempt < CHOOSE_ATTEMPTS; attempt++) {
		if (service.verdict != REASON_ROUTED)
			return service.verdict;
		if (!service.endpoints)
			return REASON_NO_ENDPOINT;
		if (!draw_endpoint(&service, choice)) {
			if (!read_service(&key, &service))
				break;
			choice->service = service.id;
			continue;
		}
		if (!shun_ns || !is_shunned(&choice->endpoint)) {
			if (avoided)
				count(REASON_SHUNNED);
			goto routed;
		}
		avoided = true;
		if (attempt >= SHUN_DRAWS) {
			if (find_unshunned(&service, choice))
				count(REASON_SHUNNED);
			goto routed;
		}
	}
	return REASON_ENDPOINT_VANISHED;
routed:
	choice->rewrite = true;
	choice->flags = service.flags;
	if (service.affinity_s)
		keep_affinity(client, choice);
	return REASON_ROUTED;
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
