/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * cgroup/connect4, connect6: the service address of a TCP or connected UDP socket becomes an
 * endpoint's, or connect() fails at once. v4-mapped addresses come by connect6.
 *
 * Writes `sockets` (what the application asked for), `counters`, `flows` (refusals), `opens` (UDP).
 * No memory for the socket's state: the connection is made, but getpeername() shows the endpoint
 * and its records lack the service; counted as state_lost.
 */
#pragma once

#include "dns.h"

#define ALLOW  1
#define REFUSE 0

static __always_inline int refuse(enum reason reason)
{
	count(reason);
	if (has_set_retval)
		bpf_set_retval(-ECONNREFUSED);
	return REFUSE;
}

static __always_inline struct client client_of(void *ctx)
{
	struct pod_key key = { .netns_cookie = bpf_get_netns_cookie(ctx) };

	return (struct client){ .netns_cookie = key.netns_cookie, .pod = bpf_map_lookup_elem(&pods, &key) };
}

static __always_inline bool is_served(struct bpf_sock_addr *ctx)
{
	return ctx->protocol == IPPROTO_TCP || ctx->protocol == IPPROTO_UDP;
}

static __always_inline void count_datagram_open(const struct pod_value *pod, __u64 service,
						const struct destination *endpoint)
{
	struct open_key key = { .remote = endpoint->address,
				.service = service,
				.direction = DIRECTION_OUTBOUND,
				.protocol = IPPROTO_UDP };

	if (pod)
		key.local = ip_is_v4(&endpoint->address) ? pod->address4 : pod->address6;
	count_open(&key);
}

static __always_inline void remember(struct bpf_sock_addr *ctx, const struct destination *to,
				     const struct choice *choice)
{
	struct socket_state *state = bpf_sk_storage_get(&sockets, ctx->sk, 0, BPF_SK_STORAGE_GET_F_CREATE);

	if (!state) {
		count(REASON_STATE_LOST);
		return;
	}
	state->service = choice->service;
	state->vip = to->address;
	state->vip_port = to->port;
	state->endpoint = choice->endpoint.address;
	state->endpoint_port = choice->endpoint.port;
	state->handed_over = !!(choice->flags & SERVICE_WAYPOINT);
	if (state->handed_over)
		state->netns_cookie = bpf_get_netns_cookie(ctx);
	state->balanced = choice->flags & SERVICE_LEAST_CONNECTIONS ? BALANCED_WANTED : BALANCED_NOT;
	if (!state->opened_ns && ctx->protocol == IPPROTO_UDP)
		state->opened_ns = bpf_ktime_get_ns();
}

/* A socket that goes to no service now keeps none from before. */
static __always_inline void forget(struct bpf_sock_addr *ctx)
{
	struct socket_state *state = bpf_sk_storage_get(&sockets, ctx->sk, 0, 0);

	if (state)
		state->service = 0;
}

/* A waypoint takes no datagrams of a service. */
static __always_inline bool by_waypoint(const struct choice *choice)
{
	return choice->rewrite && (choice->flags & SERVICE_WAYPOINT);
}

/* Returns REASON_ROUTED with choice->rewrite, or what to do instead. */
static __always_inline enum reason decide_connect(struct bpf_sock_addr *ctx, const struct destination *to,
						  struct choice *choice)
{
	struct client client = client_of(ctx);
	enum reason reason = choose(to, &client, ctx->protocol == IPPROTO_UDP, -1, choice);

	if (reason == REASON_ROUTED && ctx->protocol == IPPROTO_UDP && by_waypoint(choice))
		reason = REASON_WAYPOINT_UNSUPPORTED;
	if (reason == REASON_ROUTED || reason == REASON_PASSTHROUGH) {
		if (choice->rewrite && ctx->protocol == IPPROTO_UDP)
			count_datagram_open(client.pod, choice->service, &choice->endpoint);
		return reason;
	}
	record_refusal(to, client.pod, choice->service, ctx->protocol, reason);
	return reason;
}

SEC("cgroup/connect4")
int pykmesh_conn4(struct bpf_sock_addr *ctx)
{
	struct destination to = { .address = ip_from_v4(ctx->user_ip4), .port = ctx->user_port };
	struct choice choice = {};
	enum reason reason;

	if (!is_served(ctx))
		return ALLOW;
	if (dns_redirect(ctx, &to)) {
		forget(ctx);
		ctx->user_ip4 = to.address.word[3];
		ctx->user_port = to.port;
		return ALLOW;
	}
	reason = decide_connect(ctx, &to, &choice);
	if (is_refusal(reason))
		return refuse(reason);
	if (!choice.rewrite) {
		forget(ctx);
		return ALLOW;
	}
	count(REASON_ROUTED);
	remember(ctx, &to, &choice);
	ctx->user_ip4 = choice.endpoint.address.word[3];
	ctx->user_port = choice.endpoint.port;
	return ALLOW;
}

SEC("cgroup/connect6")
int pykmesh_conn6(struct bpf_sock_addr *ctx)
{
	struct destination to = { .address = ip_from_v6(ctx), .port = ctx->user_port };
	struct choice choice = {};
	enum reason reason;

	if (!is_served(ctx))
		return ALLOW;
	if (dns_redirect(ctx, &to)) {
		forget(ctx);
		set_v6(ctx, &to.address);
		ctx->user_port = to.port;
		return ALLOW;
	}
	reason = decide_connect(ctx, &to, &choice);
	if (is_refusal(reason))
		return refuse(reason);
	if (!choice.rewrite) {
		forget(ctx);
		return ALLOW;
	}
	count(REASON_ROUTED);
	remember(ctx, &to, &choice);
	set_v6(ctx, &choice.endpoint.address);
	ctx->user_port = choice.endpoint.port;
	return ALLOW;
}
