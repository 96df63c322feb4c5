/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * cgroup/getpeername4, getpeername6: the application sees the service that it asked for. A socket
 * whose peer is not the endpoint that was chosen for it is left alone.
 */
#pragma once

#include "connect.h"

static __always_inline struct socket_state *state_by_peer(struct bpf_sock_addr *ctx,
							  const struct destination *peer)
{
	struct socket_state *state = bpf_sk_storage_get(&sockets, ctx->sk, 0, 0);

	if (!state || !state->service || state->endpoint_port != peer->port ||
	    !ip_equal(&state->endpoint, &peer->address))
		return NULL;
	return state;
}

SEC("cgroup/getpeername4")
int pykmesh_peer4(struct bpf_sock_addr *ctx)
{
	struct destination peer = { .address = ip_from_v4(ctx->user_ip4), .port = ctx->user_port };
	struct socket_state *state = state_by_peer(ctx, &peer);

	if (state) {
		ctx->user_ip4 = state->vip.word[3];
		ctx->user_port = state->vip_port;
	}
	return ALLOW;
}

SEC("cgroup/getpeername6")
int pykmesh_peer6(struct bpf_sock_addr *ctx)
{
	struct destination peer = { .address = ip_from_v6(ctx), .port = ctx->user_port };
	struct socket_state *state;

	state = state_by_peer(ctx, &peer);
	if (state) {
		set_v6(ctx, &state->vip);
		ctx->user_port = state->vip_port;
	}
	return ALLOW;
}
