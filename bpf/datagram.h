/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * cgroup/sendmsg4, sendmsg6, recvmsg4, recvmsg6: unconnected UDP. Each (socket, service) keeps its
 * endpoint for as long as the endpoint is usable (in a list of more than KEEP_SLOTS as long as it
 * stays in its slot, too), and the answers come from the service's address.
 * An AF_INET6 socket that sends to a v4-mapped address comes by sendmsg4 and recvmsg6.
 *
 * Writes `datagrams`, `sockets`, `counters`, `flows` (refusals), `opens`.
 */
#pragma once

#include "connect.h"

/* The service that an answer from `from` belongs to replaces it. False: it is what it looks like. */
static __always_inline bool restore_source(struct bpf_sock_addr *ctx, struct destination *from)
{
	struct datagram_key key = { .socket_cookie = bpf_get_socket_cookie(ctx),
				    .address = from->address,
				    .port = from->port,
				    .is_reply = 1 };
	struct datagram_value *sent;
	struct socket_state *state;

	if (dns_restore(ctx, from))
		return true;
	sent = bpf_map_lookup_elem(&datagrams, &key);
	if (sent) {
		from->address = sent->address;
		from->port = sent->port;
		return true;
	}
	state = bpf_sk_storage_get(&sockets, ctx->sk, 0, 0);
	if (!state || !state->service || state->endpoint_port != from->port ||
	    !ip_equal(&state->endpoint, &from->address))
		return false;
	from->address = state->vip;
	from->port = state->vip_port;
	return true;
}

static __always_inline struct datagram_key way_back(__u64 cookie, const struct choice *choice)
{
	return (struct datagram_key){ .socket_cookie = cookie,
				      .address = choice->endpoint.address,
				      .port = choice->endpoint.port,
				      .is_reply = 1 };
}

/* Two services may have one endpoint: its answers are then taken for those of the service asked last. */
static __noinline bool leads_back(__u64 cookie, const struct destination *to, const struct choice *choice)
{
	struct datagram_key back = way_back(cookie, choice);
	struct datagram_value *service = bpf_map_lookup_elem(&datagrams, &back);

	return service && service->port == to->port && ip_equal(&service->address, &to->address);
}

static __noinline bool keep_way(__u64 cookie, const struct destination *to, const struct choice *choice)
{
	struct datagram_key there = { .socket_cookie = cookie, .address = to->address, .port = to->port };
	struct datagram_key back = way_back(cookie, choice);
	struct datagram_value endpoint = { .service = choice->service,
					   .address = choice->endpoint.address,
					   .port = choice->endpoint.port,
					   .slot = choice->slot };
	struct datagram_value service = { .service = choice->service,
					  .address = to->address,
					  .port = to->port };

	return !bpf_map_update_elem(&datagrams, &back, &service, BPF_ANY) &&
	       !bpf_map_update_elem(&datagrams, &there, &endpoint, BPF_ANY);
}

/* Returns REASON_ROUTED with choice->rewrite, or what to do instead. */
static __always_inline enum reason decide_datagram(struct bpf_sock_addr *ctx, const struct destination *to,
						   struct choice *choice)
{
	__u64 cookie = bpf_get_socket_cookie(ctx);
	struct datagram_key key = { .socket_cookie = cookie, .address = to->address, .port = to->port };
	struct datagram_value *kept = bpf_map_lookup_elem(&datagrams, &key);
	struct client client = client_of(ctx);
	struct destination before = {};
	__s64 slot = -1;
	enum reason reason;

	if (kept) {
		slot = kept->slot;
		choice->endpoint.address = before.address = kept->address;
		choice->endpoint.port = before.port = kept->port;
	}
	reason = choose(to, &client, true, slot, choice);
	if ((reason == REASON_ROUTED || reason == REASON_PASSTHROUGH) && !choice->rewrite) {
		/* Sent to the address itself: its answers are its own. */
		key.is_reply = 1;
		bpf_map_delete_elem(&datagrams, &key);
		return reason;
	}
	if (reason == REASON_ROUTED && by_waypoint(choice))
		reason = REASON_WAYPOINT_UNSUPPORTED;
	/* The kernel sends no v4-mapped datagram for an IPv6 destination (net/ipv6/udp.c). */
	if (reason == REASON_ROUTED && ip_is_v4(&to->address) != ip_is_v4(&choice->endpoint.address))
		reason = REASON_FAMILY;
	if (reason == REASON_ROUTED) {
		bool same = ip_equal(&before.address, &choice->endpoint.address) &&
			    before.port == choice->endpoint.port;

		if (same && kept)
			kept->slot = choice->slot;
		if (same && leads_back(cookie, to, choice))
			return reason;
		if (keep_way(cookie, to, choice)) {
			remember(ctx, to, choice);
			if (!same)
				count_datagram_open(client.pod, choice->service, &choice->endpoint);
			return reason;
		}
		reason = REASON_DATAGRAM_LOST;
	}
	if (is_refusal(reason))
		record_refusal(to, client.pod, choice->service, IPPROTO_UDP, reason);
	return reason;
}

SEC("cgroup/sendmsg4")
int pykmesh_send4(struct bpf_sock_addr *ctx)
{
	struct destination to = { .address = ip_from_v4(ctx->user_ip4), .port = ctx->user_port };
	struct choice choice = {};
	enum reason reason;

	if (dns_redirect(ctx, &to)) {
		ctx->user_ip4 = to.address.word[3];
		ctx->user_port = to.port;
		return ALLOW;
	}
	reason = decide_datagram(ctx, &to, &choice);
	if (reason == REASON_PASSTHROUGH)
		return ALLOW;
	if (reason != REASON_ROUTED)
		return refuse(reason);
	if (!choice.rewrite)
		return ALLOW;
	ctx->user_ip4 = choice.endpoint.address.word[3];
	ctx->user_port = choice.endpoint.port;
	return ALLOW;
}

SEC("cgroup/sendmsg6")
int pykmesh_send6(struct bpf_sock_addr *ctx)
{
	struct destination to = { .address = ip_from_v6(ctx), .port = ctx->user_port };
	struct choice choice = {};
	enum reason reason;

	if (dns_redirect(ctx, &to)) {
		set_v6(ctx, &to.address);
		ctx->user_port = to.port;
		return ALLOW;
	}
	reason = decide_datagram(ctx, &to, &choice);
	if (reason == REASON_PASSTHROUGH)
		return ALLOW;
	if (reason != REASON_ROUTED)
		return refuse(reason);
	if (!choice.rewrite)
		return ALLOW;
	set_v6(ctx, &choice.endpoint.address);
	ctx->user_port = choice.endpoint.port;
	return ALLOW;
}

SEC("cgroup/recvmsg4")
int pykmesh_recv4(struct bpf_sock_addr *ctx)
{
	struct destination from = { .address = ip_from_v4(ctx->user_ip4), .port = ctx->user_port };

	if (restore_source(ctx, &from)) {
		ctx->user_ip4 = from.address.word[3];
		ctx->user_port = from.port;
	}
	return ALLOW;
}

SEC("cgroup/recvmsg6")
int pykmesh_recv6(struct bpf_sock_addr *ctx)
{
	struct destination from = { .address = ip_from_v6(ctx), .port = ctx->user_port };

	if (restore_source(ctx, &from)) {
		set_v6(ctx, &from.address);
		ctx->user_port = from.port;
	}
	return ALLOW;
}
