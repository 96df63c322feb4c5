/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * cgroup/getpeername4, getpeername6: the application sees the service that it asked for. A socket
 * whose peer is not the endpoint that was chosen for it is left alone. So does one that asks for names see
 * the server that it asked.
 */
#pragma once

#include "connect.h"

/* What was asked for replaces the peer. False: it is what it looks like. */
static __always_inline bool restore_peer(struct bpf_sock_addr *ctx, struct destination *peer)
{
	struct socket_state *state = bpf_sk_storage_get(&sockets, ctx->sk, 0, 0);

	if (dns_restore(ctx, peer))
		return true;
	if (!state || !state->service || state->endpoint_port != peer->port ||
	    !ip_equal(&state->endpoint, &peer->address))
		return false;
	peer->address = state->vip;
	peer->port = state->vip_port;
	return true;
}

SEC("cgroup/getpeername4")
int pykmesh_peer4(struct bpf_sock_addr *ctx)
{
	struct destination peer = { .address = ip_from_v4(ctx->user_ip4), .port = ctx->user_port };

	if (restore_peer(ctx, &peer)) {
		ctx->user_ip4 = peer.address.word[3];
		ctx->user_port = peer.port;
	}
	return ALLOW;
}

SEC("cgroup/getpeername6")
int pykmesh_peer6(struct bpf_sock_addr *ctx)
{
	struct destination peer = { .address = ip_from_v6(ctx), .port = ctx->user_port };

	if (restore_peer(ctx, &peer)) {
		set_v6(ctx, &peer.address);
		ctx->user_port = peer.port;
	}
	return ALLOW;
}
