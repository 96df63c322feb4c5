/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * How a waypoint learns what a connection is for: the client's side (sockops) notes it under the
 * connection's addresses and ports before the SYN leaves, and cgroup/getsockopt on the waypoint's side
 * answers SO_ORIGINAL_DST from there, once. Whoever connects to the waypoint by himself has no note: the
 * waypoint is told nothing, and closes.
 *
 * All instances of a waypoint on a node stand behind one address, its front: sk_lookup gives each new
 * connection to one that listens. One that was killed gets none from that moment on, and who is behind a
 * front is no other node's business.
 */
#pragma once

#include "choose.h"

#define SOL_IP		  0
#define SOL_IPV6	  41
#define SO_ORIGINAL_DST	  80 /* linux/netfilter_ipv4.h; IP6T_SO_ORIGINAL_DST is the same number */
#define SOCKADDR_IN_SIZE  16
#define SOCKADDR_IN6_SIZE 28

/* struct sockaddr_in6, whose beginning is that of struct sockaddr_in. */
struct original_destination {
	__u16 family;
	__be16 port;
	__be32 address4; /* the flow information of an IPv6 address */
	struct ip address6;
	__u32 scope;
};

static __always_inline void note_handoff(const struct handoff_key *key, const struct socket_state *state)
{
	struct handoff_value asked = { .service = state->service,
				       .vip = state->vip,
				       .vip_port = state->vip_port };

	if (bpf_map_update_elem(&handoffs, key, &asked, BPF_ANY))
		count(REASON_STATE_LOST);
}

static __always_inline bool handoff_key_of(struct bpf_sock *sk, struct handoff_key *key)
{
	if (sk->family == AF_INET) {
		key->waypoint = ip_from_v4(sk->src_ip4);
		key->client = ip_from_v4(sk->dst_ip4);
	} else if (sk->family == AF_INET6) {
		key->waypoint.word[0] = sk->src_ip6[0];
		key->waypoint.word[1] = sk->src_ip6[1];
		key->waypoint.word[2] = sk->src_ip6[2];
		key->waypoint.word[3] = sk->src_ip6[3];
		key->client.word[0] = sk->dst_ip6[0];
		key->client.word[1] = sk->dst_ip6[1];
		key->client.word[2] = sk->dst_ip6[2];
		key->client.word[3] = sk->dst_ip6[3];
	} else {
		return false;
	}
	key->waypoint_port = bpf_htons(sk->src_port);
	key->client_port = sk->dst_port;
	return true;
}

/* An IPv4 service is told as IPv4 and an IPv6 one as IPv6, whatever the socket is. */
SEC("cgroup/getsockopt")
int pykmesh_origdst(struct bpf_sockopt *ctx)
{
	struct original_destination *answer = ctx->optval;
	struct handoff_key key = {};
	struct handoff_value *asked;
	struct bpf_sock *sk = ctx->sk;

	if (ctx->optname != SO_ORIGINAL_DST || (ctx->level != SOL_IP && ctx->level != SOL_IPV6) || !sk)
		return 1;
	if (!handoff_key_of(sk, &key))
		return 1;
	asked = bpf_map_lookup_elem(&handoffs, &key);
	if (!asked || (void *)answer + SOCKADDR_IN_SIZE > ctx->optval_end)
		return 1;
	answer->port = asked->vip_port;
	if (ip_is_v4(&asked->vip)) {
		answer->family = AF_INET;
		answer->address4 = asked->vip.word[3];
		ctx->optlen = SOCKADDR_IN_SIZE;
	} else {
		if ((void *)answer + SOCKADDR_IN6_SIZE > ctx->optval_end)
			return 1;
		answer->family = AF_INET6;
		answer->address4 = 0;
		answer->address6 = asked->vip;
		answer->scope = 0;
		ctx->optlen = SOCKADDR_IN6_SIZE;
	}
	ctx->retval = 0;
	bpf_map_delete_elem(&handoffs, &key);
	return 1;
}

/*
 * The same instance for the same client's port: what begins with a SYN cookie ends where it began. Without
 * an instance it is as if there were no program.
 */
SEC("sk_lookup")
int pykmesh_front(struct bpf_sk_lookup *ctx)
{
	struct front_key key = { .port = ctx->local_port };
	struct front_value *front;
	__u32 from, count, i;

	if (ctx->protocol != IPPROTO_TCP)
		return SK_PASS;
	/* The kernel reads zero for an address of another family. */
	key.address.word[0] = ctx->local_ip6[0];
	key.address.word[1] = ctx->local_ip6[1];
	key.address.word[2] = ctx->local_ip6[2] | (ctx->family == AF_INET ? bpf_htonl(0xffff) : 0);
	key.address.word[3] = ctx->local_ip6[3] | ctx->local_ip4;
	front = bpf_map_lookup_elem(&fronts, &key);
	if (!front)
		return SK_PASS;
	count = front->count;
	if (!count)
		return SK_PASS;
	from = ctx->remote_ip4 ^ ctx->remote_ip6[0] ^ ctx->remote_ip6[1] ^ ctx->remote_ip6[2] ^
	       ctx->remote_ip6[3];
	from = (from + ctx->remote_port) * 0x9e3779b1u >> 8;
	for (i = 0; i < FRONT_INSTANCES_MAX && i < count; i++) {
		__u32 port = front->ports[(from + i) % count & (FRONT_INSTANCES_MAX - 1)];
		struct bpf_sock *listener = bpf_map_lookup_elem(&listeners, &port);
		long refused;

		if (!listener)
			continue;
		refused = bpf_sk_assign(ctx, listener, 0);
		bpf_sk_release(listener);
		if (!refused)
			break;
	}
	return SK_PASS;
}
